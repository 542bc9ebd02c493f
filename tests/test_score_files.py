"""Scoring plain files: what is refused before a model is loaded, what is said, and which inner problem is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import u2a.score_files
from tiny import examples, pairs, save_tiny
from u2a.cli import main
from u2a.unlearn import InnerProblem

torch.set_num_threads(1)
PAIRS = [{"prompt": row.prompt[0].content, "chosen": row.chosen, "rejected": row.rejected} for row in pairs(12)]
FORGET = [{"prompt": row.prompt[0].content, "completion": row.completion} for row in examples(6)]
RETAIN = [{"prompt": f"R{k}?", "completion": f"fine {k}"} for k in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[InnerProblem]:
    """The inner problems that were scored."""
    seen: list[InnerProblem] = []
    plain = u2a.score_files.score

    def spy(policy, inner, outer, console):  # noqa: ANN001, ANN202
        seen.append(inner)
        return plain(policy, inner, outer, console)

    monkeypatch.setattr(u2a.score_files, "score", spy)
    return seen


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: whatever is refused is refused before."""

    def load(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(u2a.score_files, "load_model", load)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def command(folder: Path, *more: str, forget: list[dict] = FORGET, prefs: list[dict] = PAIRS, **files: str) -> int:
    words = ["--forget", write(folder / "n.jsonl", forget), "--prefs", write(folder / "p.jsonl", prefs)]
    words += [word for name, path in {"out": str(folder / "o.jsonl"), **files}.items() for word in (f"--{name}", path)]
    return main(["score", *words, "--set", "solve.warmup_steps=0", *more])


@pytest.mark.parametrize(
    ("more", "retain", "term"),
    [
        ((), None, "none"),
        ((), "--retain", "nll"),
        ((), "--set", "nll"),
        (("--preset", "paper"), None, "proximal"),
        (("--preset", "paper"), "--retain", "proximal"),
    ],
)
def test_only_a_retain_term_without_rows_is_left_out(
    tmp_path: Path,
    model: str,
    scored: list[InnerProblem],
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    retain: str | None,
    term: str,
) -> None:
    path = write(tmp_path / "r.jsonl", RETAIN)
    given = {None: (), "--retain": ("--retain", path), "--set": ("--set", f"data.retain={path}")}[retain]
    assert command(tmp_path, *more, *given, model=model) == 0
    assert (scored[0].section.retain_term, len(scored[0].retain)) == (term, 6 if retain else 0)
    said = "no retain rows: the retain term nll is left out (give --retain)" in capsys.readouterr().err
    assert said == (term == "none")


def test_rows_that_are_left_out_and_folds_that_are_not_filled_are_said(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS[:6]]
    shared = {"prompt": PAIRS[8]["prompt"], "completion": "never"}
    assert command(tmp_path, forget=[*FORGET[:2], shared, *good], model=model) == 0
    said = capsys.readouterr().err
    assert "left out: 6 rows, forget: contradictory" in said
    assert "left out: 6 rows, preference: contradictory" in said
    assert "warning: forget, preference: 1 row of forget" in said
    assert "the pairs have 6 prompts, so there are 6 folds, not solve.folds=8" in said
    assert command(tmp_path, forget=good, prefs=PAIRS[:6], model=model) == 2
    assert "no usable preference pair (left out: 6 rows, forget: contradictory; left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("solve.objective=reward", "solve.objective: reward needs a reward model, which plain files do not name"),
        ("solve.damage_weight=1", "solve.damage_weight: 1 needs retain rows (give --retain"),
        ("unlearn.loss=grad_diff", "unlearn.loss: grad_diff needs retain rows (give --retain"),
        ("solve.cluster_embedder=package:no_such", "solve.cluster_embedder: package:no_such"),
    ],
)
def test_what_plain_files_cannot_serve_is_refused_early(
    tmp_path: Path, model: str, no_model: None, capsys: pytest.CaptureFixture[str], option: str, expected: str
) -> None:
    more = ("--set", "solve.clusters=2") if "cluster" in option else ()
    assert command(tmp_path, "--set", option, *more, model=model) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "is a directory"),
        ("n.jsonl/o.jsonl", "n.jsonl is a file"),
        ("n.jsonl", "is the file of data.forget"),
        ("p.jsonl", "is the file of data.preferences"),
        ("link.jsonl", "is the file of data.forget"),
    ],
)
def test_a_place_for_the_scores_is_checked_first(
    tmp_path: Path, model: str, no_model: None, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "n.jsonl")
    assert command(tmp_path, model=model, out=str(tmp_path / name)) == 2
    assert expected in capsys.readouterr().err
    assert len((tmp_path / "n.jsonl").read_text().splitlines()) == len(FORGET)


def test_the_root_is_no_place_for_the_scores(tmp_path: Path, model: str, no_model: None, capsys) -> None:
    assert command(tmp_path, model=model, out="/") == 2
    assert "--out: / is a directory" in capsys.readouterr().err


def test_a_failed_write_does_not_speak_of_a_run_that_goes_on(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(part: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("u2a.disk.write", full)
    assert command(tmp_path, "--quiet", model=model) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and "score again" in said and "goes on" not in said
