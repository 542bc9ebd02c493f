"""Rows that stand in two sets, from the command line: four kinds between four pairs of sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fake_records import fake_records
from planted_overlaps import ENDS, KINDS, planted
from tiny import tiny_tokenizer
from u2a.cli import main
from u2a.config import RunConfig
from u2a.diagnosis import Diagnosis
from u2a.model_card import model_card
from u2a.report import render_report
from u2a.run_records import RunRecords

FILES = {"preference": "preferences", "evaluation": "evaluation", "forget": "forget", "retain": "retain"}
Row = dict[str, str]


def row(name: str, prompt: str, answer: str) -> Row:
    """A row whose answer is the bad one, where a row has two (an answer good here and bad there would be left out)."""
    if name in ("forget", "retain", "holdout"):
        return {"prompt": prompt, "completion": answer}
    return {"prompt": prompt, "chosen": f"a good answer for {name}", "rejected": answer}


@pytest.fixture
def partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Write the files of all sets and run ``u2a partition`` on them; returns the exit status."""
    monkeypatch.setattr("u2a.pipeline.load_tokenizer", lambda _: tiny_tokenizer())

    def run(sets: dict[str, list[Row]], *more: str) -> int:
        data: dict[str, object] = {"max_length": 4000}
        for name in ("preference", "evaluation", "forget", "retain", "holdout"):
            rows = [row(name, f"{name} question {k}?", f"{name} answer {k}") for k in range(8)] + sets.get(name, [])
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
            data[FILES.get(name, name)] = str(path)
        tree = {
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": "none", "device": "cpu"},
            "data": data,
            "solve": {"folds": 2},
            "reward": {"model": "none", "eval_model": "none"},
            "evaluation": {"forget_rows": 2},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        return main(["partition", str(tmp_path / "config.yaml"), *more])

    return run


@pytest.mark.parametrize("ends", ENDS, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_overlap_is_an_error_or_a_warning_with_its_count(
    kind: str,
    ends: tuple[str, str],
    partition: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = ends
    texts = [planted(kind, k) for k in range(KINDS[kind])]
    sets = {first: [row(first, *here) for here, _ in texts], second: [row(second, *there) for _, there in texts]}
    lines = [f"{tmp_path}/{first}.jsonl:{9 + k}" for k in range(KINDS[kind])]
    more: tuple[str, ...] = ()
    if second == "evaluation" and kind in ("exact", "folded"):
        assert partition(sets, "--quiet") == 2
        problems = capsys.readouterr().err.removeprefix("u2a partition: ").splitlines()
        assert sorted(problem.split(": ")[0] for problem in problems) == sorted(lines)
        assert all("data.allow_leak=true" in problem and first in problem and second in problem for problem in problems)
        assert not (tmp_path / "run" / "partition.json").exists()
        more = ("--set", "data.allow_leak=true")
    assert partition(sets, *more) == 0
    (found,) = [
        item for item in Diagnosis.load(tmp_path / "run" / "diagnosis.json").findings if item.check == "overlap"
    ]
    assert (found.severity, found.count, len(found.examples)) == ("warning", KINDS[kind], min(3, KINDS[kind]))
    assert set(found.places) <= set(lines)
    assert ("data.allow_leak" in found.text) == bool(more)
    (shown,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  warning: ")]
    assert f"{KINDS[kind]} rows of {first}" in shown and all(place in shown for place in found.places)
    if more:
        leaks = RunRecords.load(tmp_path / "run").partition.leaks
        assert (first, second, "text", KINDS[kind]) in [
            (item.first, item.second, item.level, item.count) for item in leaks
        ]
        records = RunRecords.load(tmp_path / "run")
        assert records.config.data.allow_leak
        assert f"{KINDS[kind]} rows of {first} stand in {second} too (same text)" in render_report(records)


def test_separate_sets_are_no_leak(partition: Callable[..., int], tmp_path: Path) -> None:
    assert partition({}, "--quiet") == 0
    assert Diagnosis.load(tmp_path / "run" / "diagnosis.json").overlaps == ()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("data.allow_leak", "Copies of evaluation rows in other sets were allowed (data.allow_leak)."),
        ("model.trust_remote_code", "Code shipped with the model was run (model.trust_remote_code)."),
    ],
)
def test_what_was_allowed_stands_first_in_the_report_and_in_the_card(option: str, sentence: str) -> None:
    section, name = option.split(".")
    made = fake_records(4)
    tree = made.config.model_dump(mode="json")
    for value in (False, True):
        tree[section][name] = value
        records = RunRecords(**{**vars(made), "config": RunConfig.model_validate(tree)})
        page, card = render_report(records), model_card(records, "base")
        first = page.partition("Read this first")[2].partition("</div>")[0]
        assert (sentence in first) == value
        assert (sentence.replace("_", "\\_") in card or sentence in card) == value
    assert RunConfig().data.allow_leak is RunConfig().model.trust_remote_code is False
