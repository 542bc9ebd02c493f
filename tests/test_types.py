"""Every record: round trip through its file, refusal of NaN, damaged and foreign files, atomic writing."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tiny import ask, examples, pairs
from u2a.errors import RecordError, WriteError
from u2a.record import SCHEMA, Record, content_id, derive_seed, write_whole
from u2a.solution import Reliability, Round, ScoreRow, ScoreTable, Solution, SolveStatus, WeightRow
from u2a.types import (
    Contrast,
    EvalTable,
    Example,
    Leak,
    Message,
    Metric,
    Partition,
    RewardCard,
    RewardRow,
    RewardTable,
    Sample,
    StepLog,
    UnlearnResult,
)

CARD = RewardCard(name="head", n_train=8, pair_accuracy=0.75, pair_accuracy_low=0.5, pair_accuracy_high=0.9, n_pairs=4)
SCORES = ScoreTable(
    rows=(ScoreRow(id="a", gain=0.25, gain_se=0.1, estimate=0.2, fold_gains=(0.2, 0.3), loss=-1.5, n_answer_tokens=7),),
    objective="margin",
    loss="npo(beta=0.1)",
    adjoint="identity",
    scorer="central",
    estimator="shrunken",
    objective_value=0.1 + 0.2,
    reliability=Reliability(
        split_half=None, mean_gain=0.1, signal_sd=0.0, noise_sd=0.2, n_pairs=4, n_folds=2, n_candidates=1
    ),
    solve=(SolveStatus(status="converged", steps=3, residual=1e-3, damping=10.0),),
)
RECORDS: list[Record] = [
    Partition(
        finetune=pairs(2),
        forget=(*examples(3), Example(id="w", prompt=ask("é\n\u2028\ud7ff"), completion='"\\', weight=0.5, kind="k")),
        retain=examples(2, start=9),
        preference=pairs(2, start=5),
        leaks=(Leak(first="forget", second="evaluation", level="text", count=1, examples=("a",)),),
        dropped={"duplicate": 3},
        fingerprint="abc",
    ),
    RewardTable(
        card=CARD,
        threshold=-0.125,
        quantile=0.25,
        rows=(RewardRow(id="a", reward=1 / 3, token_rewards=(0.1, -1e-30), low_token_frac=0.5, kept=False),),
    ),
    SCORES,
    Solution(
        rows=(WeightRow(id="a", weight=1.0, estimate=0.2, reason="gain"), WeightRow(id="b", weight=0.0)),
        rounds=(Round(index=0, objective_pa=0.5, n_selected=1, added=("a",), fw_gap=None),),
        scores=SCORES,
        stopped="rounds",
        fallback="random_k",
    ),
    UnlearnResult(
        arm="u2a",
        loss="npo",
        n_samples=1,
        steps=2,
        steps_kept=1,
        breached=True,
        retain_ppl_start=3.5,
        history=(StepLog(step=1, loss=0.5), StepLog(step=2, loss=None, retain_ppl=4.0, grad_norm=1.0)),
    ),
    EvalTable(
        arms={"before": {"margin": Metric(value=None, n=0), "ppl": Metric(value=2.5, low=2.0, values={"a": 2.5})}},
        contrasts=(Contrast(metric="margin", first="after", second="before", difference=0.5, n=3),),
        samples=(Sample(id="a", prompt="Tea?", answers={"before": "no"}, rewards={"before": -1.0}),),
        reward_card=CARD,
        verdict="not shown",
    ),
]


def test_every_record_class_is_covered() -> None:
    handed_on = {kind for kind in Record.__subclasses__() if kind.__module__ in ("u2a.types", "u2a.solution")}
    assert {type(record) for record in RECORDS} == handed_on


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_save_and_load_give_an_equal_record(record: Record, tmp_path: Path) -> None:
    path = record.save(tmp_path / "sub" / "record.json")
    assert type(record).load(path) == record
    document = json.loads(path.read_text(encoding="utf-8"))
    assert (document["record"], document["schema"]) == (type(record).__name__, SCHEMA)
    assert record.save(tmp_path / "again.json").read_bytes() == path.read_bytes()


BAD_NUMBERS = [
    (RECORDS[0].model_copy(update={"forget": (examples(1)[0].model_copy(update={"weight": float("inf")}),)}), "weight"),
    (RewardTable(card=CARD, rows=(RewardRow(id="a", reward=float("nan")),)), r"rows\.0\.reward"),
    (SCORES.model_copy(update={"objective_value": float("nan")}), "objective_value"),
    (
        RECORDS[3].model_copy(update={"rows": (WeightRow(id="a", weight=float("nan")),)}),
        r"Solution\.rows\.0\.weight",
    ),
    (UnlearnResult(arm="a", loss="b", n_samples=1, steps=1, steps_kept=1, retain_ppl_end=float("inf")), "retain_ppl"),
    (EvalTable(arms={"before": {"m": Metric(value=1.0, values={"x": float("-inf")})}}), r"arms\.before\.m\.values\.x"),
]


@pytest.mark.parametrize(("record", "where"), BAD_NUMBERS, ids=[type(record).__name__ for record, _ in BAD_NUMBERS])
def test_non_finite_numbers_are_refused_by_place_and_nothing_is_written(
    record: Record, where: str, tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(RecordError, match=f"{where}.*: not a finite number"):
        record.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(RecordError, match="no ScoreTable there .run the stage that writes it first"):
        ScoreTable.load(path)
    for text in ("", "{", "[1, 2]", '"x"', '{"record": "Partition"}', "\0"):
        path.write_text(text)
        with pytest.raises(RecordError, match="record.json"):
            ScoreTable.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match="unreadable"):
        ScoreTable.load(path)
    with pytest.raises(RecordError, match="unreadable"):
        ScoreTable.load(tmp_path)
    RECORDS[0].save(path)
    with pytest.raises(RecordError, match="holds 'Partition', expected 'ScoreTable'"):
        ScoreTable.load(path)


def test_a_newer_schema_and_unknown_fields_are_refused(tmp_path: Path) -> None:
    path = SCORES.save(tmp_path / "record.json")
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"schema": SCHEMA + 1}))
    with pytest.raises(RecordError, match="newer than"):
        ScoreTable.load(path)
    path.write_text(json.dumps(document | {"data": document["data"] | {"extra": 1}}))
    with pytest.raises(RecordError, match="(?s)not a valid ScoreTable.*extra"):
        ScoreTable.load(path)
    path.write_text(json.dumps({"record": "ScoreTable", "schema": 1}))
    with pytest.raises(RecordError, match="not a valid ScoreTable"):
        ScoreTable.load(path)


def test_records_are_frozen_and_strict() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CARD.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra"):
        RewardCard(name="a", accuracy=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Message(role="tool", content="x")  # type: ignore[arg-type]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_exactly(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.getbasetemp() / "number.json"
    table = RewardTable(card=CARD, threshold=value)
    assert RewardTable.load(table.save(path)) == table


def test_solution_weights_are_the_positive_ones() -> None:
    solution = RECORDS[3]
    assert isinstance(solution, Solution)
    assert solution.weights == {"a": 1.0}


@given(st.integers(0, 40))
def test_retain_parts_are_disjoint_and_complete(n: int) -> None:
    rows = examples(n)
    parts = Partition(retain=rows).retain_parts()
    again = Partition(retain=tuple(reversed(rows))).retain_parts()
    assert parts == again  # the order of rows does not matter
    if n < 5:
        assert all(set(part) == set(rows) for part in parts)
    else:
        assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
        assert min(map(len, parts)) >= 1
        assert len(parts.train) >= len(parts.guard) + len(parts.evaluation) - 1


def test_measured_retain_rows_of_their_own_are_held_out_and_the_others_train() -> None:
    rows, own = examples(10), examples(3, start=50)
    parts = Partition(retain=rows, retain_measured=own).retain_parts()
    assert set(parts.train) == set(parts.guard) == set(rows) and set(parts.evaluation) == set(own)


def test_content_ids_respect_boundaries_and_never_change() -> None:
    """The literal pins the format: saved records of older runs must keep their ids."""
    assert content_id("ab", "c") != content_id("a", "bc") != content_id("abc")
    assert content_id() != content_id("")
    assert content_id("a", "b") == "235870420603e322"
    assert content_id("\ud800") != content_id("\ud801")  # even half surrogate pairs have one


def test_seeds_differ_by_purpose() -> None:
    seeds = {derive_seed(seed, purpose) for seed in range(20) for purpose in ("a", "b", "c")}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(3, "a") == 1068002585


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "record.json"
    write_whole(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(WriteError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
