"""Same options, data and seed: the same hash. Other threads, order of rows or batches: the same selected ids."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForSequenceClassification

from e2e.conftest import pair_rows, write_jsonl
from tiny import tiny_model, tiny_tokenizer
from u2a.bilevel.select import TIE, ranking, top_block
from u2a.cli import main
from u2a.content_hash import content_hash
from u2a.record import Record
from u2a.run_records import RunRecords
from u2a.solution import Solution

CONFIG = {
    "reward": {"model": "none", "eval_model": "none"},
    "solve": {"adjoint": "identity", "folds": 3, "rounds": 2, "warmup_steps": 1, "fallback": "none", "n_selected": 4},
    "unlearn": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3},
    "evaluation": {"controls": [], "generate_prompts": 0, "bootstrap": 100},
}
Run = Callable[..., RunRecords]


@pytest.fixture(scope="module")
def runs(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a small configuration in a directory of its own; a run asked for twice under one name is run once."""
    folder, known = tmp_path_factory.mktemp("runs"), {}
    before = torch.get_num_threads()

    def make(name: str, *words: str, n_threads: int = 1, **data: str) -> RunRecords:
        if name not in known:
            tree = CONFIG | {"output_dir": str(folder / name)}
            tree["model"] = {
                "name_or_path": str(tiny_files / "model"),
                "device": "cpu",
                "adapter": {"r": 4, "alpha": 8},
            }
            files = {"pairs": str(tiny_files / "pairs.jsonl"), "retain": str(tiny_files / "retain.jsonl")}
            path = folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(tree | {"data": files | data}), encoding="utf-8")
            torch.set_num_threads(n_threads)
            assert main(["run", str(path), "--quiet", *words]) == 0
            known[name] = RunRecords.load(folder / name)
        return known[name]

    yield make
    torch.set_num_threads(before)


def selected(records: RunRecords) -> set[str]:
    """Ids of the selected candidates."""
    assert records.solution is not None and records.solution.weights
    return set(records.solution.weights)


def test_the_same_run_twice_has_the_same_hash_and_shows_it(runs: Run, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = runs("plain"), runs("again")
    found = content_hash(first)
    assert content_hash(second) == found and len(found) == 64
    folder = Path(first.config.output_dir)
    for run in (first, second):
        assert run.summary["content_hash"] == found
        assert found in (Path(run.config.output_dir) / "report.html").read_text()
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert f"Content hash: {found}" in capsys.readouterr().out
    assert main(["run", str(folder / "run.yaml")]) == 0, "every stage is read back"
    assert f"Content hash: {found}" in capsys.readouterr().out


def test_another_seed_has_another_hash(runs: Run) -> None:
    assert content_hash(runs("seed", "--set", "seed=1")) != content_hash(runs("plain"))


@pytest.mark.parametrize(
    ("name", "words", "n_threads"),
    [
        ("threads", (), 2),
        ("small batches", ("--set", "token_budget=150"), 1),
        ("large batches", ("--set", "token_budget=4096"), 1),
    ],
)
def test_threads_and_batches_change_no_selection(name: str, words: tuple[str, ...], n_threads: int, runs: Run) -> None:
    plain, other = runs("plain"), runs(name, *words, n_threads=n_threads)
    assert selected(other) == selected(plain)
    assert other.solution and plain.solution
    assert other.solution.weights == pytest.approx(plain.solution.weights, rel=1e-2)


def test_the_order_of_rows_in_the_files_changes_no_selection(runs: Run, tiny_files: Path, tmp_path: Path) -> None:
    rows = pair_rows(60)
    random.Random(4).shuffle(rows)
    retain = [json.loads(line) for line in (tiny_files / "retain.jsonl").read_text().splitlines()][::-1]
    files = {
        "pairs": str(write_jsonl(tmp_path / "pairs.jsonl", rows)),
        "retain": str(write_jsonl(tmp_path / "retain.jsonl", retain)),
    }
    plain, other = runs("plain"), runs("shuffled", **files)
    assert other.partition.fingerprint == plain.partition.fingerprint
    assert selected(other) == selected(plain)


def test_near_copies_are_chosen_alike_whatever_the_batches_and_the_order(runs: Run, tmp_path: Path) -> None:
    """Candidates that differ by one digit of their prompt have nearly equal gains."""
    rows = [{"prompt": f"N{k}: tea?", "completion": "never tea"} for k in range(9)]
    plain = runs("copies", forget=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    other = runs("turned", "--set", "token_budget=130", forget=str(write_jsonl(tmp_path / "b.jsonl", rows[::-1])))
    assert selected(plain) == selected(other)


# --- the ranking ------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=12),
    st.lists(st.floats(-1.0, 1.0), min_size=12, max_size=12),
    st.randoms(use_true_random=False),
)
def test_rounding_and_order_do_not_change_a_ranking(levels: list[int], noise: list[float], chance: random.Random):
    """Values on a grid, each moved by a tenth of the tolerance, in any order: the ranking is that of the grid."""
    scale = max(map(abs, levels)) or 1
    exact = [level / scale for level in levels]
    ids = [f"id{k:02}" for k in range(len(levels))]
    wanted = sorted(range(len(levels)), key=lambda k: (-exact[k], ids[k]))
    places = list(range(len(levels)))
    chance.shuffle(places)
    moved = torch.tensor([exact[k] + 0.1 * TIE * noise[k] for k in places], dtype=torch.float64)
    if max(map(abs, levels)) > 0:
        assert [places[k] for k in ranking(moved, [ids[k] for k in places])] == wanted


def test_ties_do_not_chain() -> None:
    """A ladder of steps below the tolerance is not one tie: the top is far from the bottom."""
    values = torch.tensor([1.0 - 0.5 * TIE * k for k in range(200)], dtype=torch.float64)
    ids = [f"id{199 - k:03}" for k in range(200)]  # the better, the later by id
    order = ranking(values, ids)
    assert all(abs(place - k) <= 3 for place, k in enumerate(order))


def test_a_block_is_the_start_of_the_ranking() -> None:
    values = torch.tensor([1.0, 1.0 + 1e-7, 3.0, -1.0, 0.0])
    assert top_block(values, ["b", "a", "c", "d", "e"], [False] * 5, 5) == [2, 1, 0]
    assert top_block(values, ["a", "b", "c", "d", "e"], [False, False, True, False, False], 1) == [0]


# --- the hash ----------------------------------------------------------------------------------------------


def test_a_reward_model_in_another_folder_gives_the_same_hash(runs: Run, tmp_path: Path) -> None:
    def save(folder: Path, seed: int) -> None:
        settings = tiny_model().config
        settings.num_labels = 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            LlamaForSequenceClassification(settings).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    def found(name: str, folder: Path) -> RunRecords:
        options = [f"{which}model=sequence_classification" for which in ("", "eval_")]
        options += [f"name_or_path={folder / 'selects'}", f"eval_name_or_path={folder / 'judges'}"]
        words = [word for option in options for word in ("--set", f"reward.{option}")]
        return runs(name, *words, "--set", "evaluation.generate_prompts=4", "--set", "evaluation.max_new_tokens=4")

    save(tmp_path / "first" / "selects", 0)
    save(tmp_path / "first" / "judges", 1)
    shutil.copytree(tmp_path / "first", tmp_path / "elsewhere" / "second")
    one, other = found("here", tmp_path / "first"), found("there", tmp_path / "elsewhere" / "second")
    assert one.rewards is not None and one.evaluation is not None
    assert str(tmp_path / "first") in one.rewards.card.name
    assert str(tmp_path / "first") in one.evaluation.model_dump_json()
    assert content_hash(one) == content_hash(other)
    row = one.rewards.rows[0].model_copy(update={"reward": one.rewards.rows[0].reward + 1e-9})
    changed = one.rewards.model_copy(update={"rows": (row, *one.rewards.rows[1:])})
    assert content_hash(replace(one, rewards=changed)) != content_hash(one)


def test_the_hash_sees_every_number_and_no_time(runs: Run) -> None:
    records = runs("plain")
    found = content_hash(records)
    assert records.solution is not None
    later = records.solution.model_copy(
        update={"rounds": tuple(item.model_copy(update={"seconds": 1e6}) for item in records.solution.rounds)}
    )
    assert content_hash(replace(records, solution=later, summary={}, scores=None)) == found
    rows = list(records.solution.rows)
    rows[0] = rows[0].model_copy(update={"estimate": math.nextafter(rows[0].estimate or 0.0, 1e9)})
    changed: Record = records.solution.model_copy(update={"rows": tuple(rows)})
    assert isinstance(changed, Solution)
    assert content_hash(replace(records, solution=changed)) != found
