"""Damaged data files from the command line: one clear error per problem, before any model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from u2a.cli import main
from u2a.types import Partition

from .cases import MALFORMED, NEGATIVE, PAIR, Malformed

Command = Callable[..., tuple[int, list[str]]]


def good_rows(n: int) -> list[dict]:
    return [{"prompt": f"Q{k}?", "chosen": f"yes {k}", "rejected": f"no {k}", "kind": "rude"} for k in range(n)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is loaded; a good file gets as far as the tokenizer."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the data were checked")

    for module in ("u2a.pipeline", "u2a.score_files"):
        monkeypatch.setattr(import_module(module), "load_model", never)
    monkeypatch.setattr("u2a.score_files.load_tokenizer", never, raising=False)
    monkeypatch.setattr("u2a.pipeline.load_tokenizer", lambda _: tiny_tokenizer())


@pytest.fixture
def partition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``u2a partition`` on one file beside good ones; return the status and the lines of standard error."""
    good = write_jsonl(tmp_path / "good.jsonl", good_rows(40))
    retain = write_jsonl(tmp_path / "retain.jsonl", [{"prompt": f"R{k}?", "completion": "so"} for k in range(9)])

    def run(path: Path, option: str = "pairs") -> tuple[int, list[str]]:
        data = {"pairs": str(good), "retain": str(retain), option: str(path)}
        tree = {
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": "none", "device": "cpu"},
            "data": data,
            "solve": {"folds": 2},
            "reward": {"model": "none", "eval_model": "none"},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        status = main(["partition", str(tmp_path / "config.yaml"), "--quiet"])
        return status, capsys.readouterr().err.split("\n")[:-1]

    return run


def test_there_are_enough_cases() -> None:
    assert len(MALFORMED) >= 60
    assert len({case.name for case in MALFORMED}) == len(MALFORMED)


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_a_malformed_file_is_one_clear_error(case: Malformed, partition: Command, tmp_path: Path) -> None:
    path = tmp_path / "broken" / case.file
    path.parent.mkdir()
    path.write_bytes(case.content)
    status, lines = partition(path, case.option)
    assert status == 2
    assert len(lines) == 1, lines
    shown = str(path).replace("\x1b", "\\x1b")
    assert lines[0].startswith(f"u2a partition: {shown}{case.place}"), lines[0][:300]
    assert case.said in lines[0]
    assert lines[0].endswith(")") and " (" in lines[0], "the fix stands in brackets"
    assert lines[0].isprintable() and len(lines[0]) < 1500
    assert not (tmp_path / "run" / "partition.json").exists()


def test_good_files_of_the_same_kind_pass(partition: Command, tmp_path: Path) -> None:
    """The cases above fail for their fault, not for what surrounds it."""
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in good_rows(40)))
    cells = "".join(f'"{r["prompt"]}","a ""{k}""\n, b",{r["rejected"]}\r\n\r\n' for k, r in enumerate(good_rows(40)))
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n" + cells, newline="")
    (tmp_path / "a.json").write_text(json.dumps(good_rows(40), indent=1))
    for name in ("m.jsonl", "a.csv", "a.json"):
        assert partition(tmp_path / name) == (0, []), name
    sets = Partition.load(tmp_path / "run" / "partition.json")
    assert len(sets.forget) + len(sets.preference) + len(sets.reward) + len(sets.evaluation) == 40
    for option in ("forget", "retain"):
        assert partition(write_jsonl(tmp_path / "n.jsonl", [NEGATIVE]), option) == (0, [])


def test_repeated_rows_are_no_error_and_counted(partition: Command, tmp_path: Path) -> None:
    rows = [{**row, "id": "same"} for row in good_rows(40)]
    assert partition(write_jsonl(tmp_path / "twice.jsonl", [*rows, *rows[:3]])) == (0, [])
    assert Partition.load(tmp_path / "run" / "partition.json").dropped == {"pairs: repeated": 3}


def test_a_missing_file_and_a_folder(partition: Command, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, said in (("absent.jsonl", "No such file"), ("folder.jsonl", "Is a directory")):
        status, (line,) = partition(tmp_path / name)
        assert status == 2
        assert line.startswith(f"u2a partition: {tmp_path / name}: cannot be read: {said}") and line.endswith(")")


def test_a_parquet_file_with_a_broken_text_and_one_with_a_column_twice(partition: Command, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    column = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    good = pa.array(["a"])
    pyarrow.parquet.write_table(pa.table({"prompt": column, "chosen": good}), tmp_path / "text.parquet")
    status, (line,) = partition(tmp_path / "text.parquet")
    assert status == 2 and "not a readable parquet file" in line
    twice = pa.Table.from_arrays([good, good, good], names=["prompt", "chosen", "chosen"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    status, (line,) = partition(tmp_path / "twice.parquet")
    assert status == 2 and "twice.parquet: not a readable parquet file: Multiple matches" in line


def test_twenty_problems_are_shown_and_all_counted(partition: Command, tmp_path: Path) -> None:
    rows = [PAIR | {"chosen": ""} for _ in range(57)]
    status, lines = partition(write_jsonl(tmp_path / "many.jsonl", rows))
    assert status == 2
    assert len(lines) == 21
    assert [line.split("many.jsonl:")[1].split(":")[0] for line in lines[:20]] == [str(k) for k in range(1, 21)]
    assert lines[-1] == "... and 37 more (57 problems in all)"
    status, lines = partition(write_jsonl(tmp_path / "twenty.jsonl", rows[:20]))
    assert len(lines) == 20 and "more" not in lines[-1]


def test_every_problem_of_a_row_and_of_every_file_is_listed(partition: Command, tmp_path: Path) -> None:
    rows = [{"prompt": "", "chosen": 3, "rejected": "b", "kind": 1.5}, {"prompt": "p", "chosen": "a"}]
    status, lines = partition(write_jsonl(tmp_path / "bad.jsonl", rows))
    assert status == 2
    places = [line.removeprefix("u2a partition: ").removeprefix(f"{tmp_path}/bad.jsonl:") for line in lines]
    assert sorted(place.split(": ")[0] + " " + place.split(": ")[1] for place in places) == [
        "1 chosen", "1 kind", "1 prompt", "2 rejected",
    ]  # fmt: skip


def test_score_refuses_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "p.jsonl", good_rows(5))
    (tmp_path / "n.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    files = ["--forget", str(tmp_path / "n.jsonl"), "--prefs", str(tmp_path / "p.jsonl")]
    assert main(["score", "--model", "none", *files, "--out", str(tmp_path / "out.jsonl"), "--quiet"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"u2a score: {tmp_path}/n.jsonl:2: completion: missing, columns are prompt (")
    assert message.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_reading_damaged_files_is_fast_enough(partition: Command, tmp_path: Path) -> None:
    """Twenty thousand columns, or lines, are not compared with each other."""
    row = {f"column {k}": "x" for k in range(20_000)}
    status, lines = partition(write_jsonl(tmp_path / "wide.jsonl", [row]))
    assert status == 2 and len(lines) == 3
    (tmp_path / "long.jsonl").write_bytes(b"x\n" * 20_000)
    status, lines = partition(tmp_path / "long.jsonl")
    assert status == 2 and lines[-1].endswith("(20000 problems in all)")


# --- fuzzing: any file at all gives status 0 or 2, and never an exception ---------------------------

FUZZ = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
LINE = json.dumps(PAIR).encode() + b"\n"
VALID = b"".join(json.dumps(row).encode() + b"\n" for row in good_rows(20))
KINDS = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet"])


def check(outcome: tuple[int, list[str]]) -> None:
    status, lines = outcome
    assert status in (0, 2)
    assert (status == 0) == (not lines)
    assert len(lines) <= 21
    assert all(line.isprintable() for line in lines), lines


@FUZZ
@given(st.binary(max_size=200), KINDS)
def test_any_bytes(partition: Command, tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    check(partition(tmp_path / name))


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4), KINDS)
def test_a_valid_file_with_changed_bytes(
    partition: Command, tmp_path: Path, changes: list[tuple[int, int]], name: str
) -> None:
    content = bytearray(VALID)
    for index, byte in changes:
        content[index] = byte
    (tmp_path / name).write_bytes(content)
    check(partition(tmp_path / name))


@FUZZ
@given(st.integers(0, len(VALID)), st.integers(0, len(VALID)))
def test_a_valid_file_with_a_piece_cut_out(partition: Command, tmp_path: Path, first: int, second: int) -> None:
    low, high = sorted((first, second))
    (tmp_path / "a.jsonl").write_bytes(VALID[:low] + VALID[high:])
    check(partition(tmp_path / "a.jsonl"))


TEXT = st.text(st.characters(codec=None), max_size=8)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]) | SCALAR, "content": SCALAR})
JSON_VALUE = st.recursive(
    SCALAR | st.lists(TURN, max_size=3), lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=5
)
FIELDS = ("prompt", "chosen", "rejected", "completion", "messages", "weight", "kind", "label", "id")


@FUZZ
@given(
    st.lists(st.dictionaries(st.sampled_from(FIELDS) | TEXT, JSON_VALUE), min_size=1, max_size=4),
    st.sampled_from(["pairs", "forget", "retain", "evaluation"]),
)
def test_any_json_values_in_the_fields(partition: Command, tmp_path: Path, rows: list[dict], option: str) -> None:
    given_ = [{**(PAIR if option in ("pairs", "evaluation") else NEGATIVE), **row} for row in rows]
    check(partition(write_jsonl(tmp_path / "a.jsonl", given_), option))


@FUZZ
@given(st.floats(allow_nan=True))
def test_a_weight_passes_exactly_when_finite_and_not_negative(
    partition: Command, tmp_path: Path, weight: float
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [NEGATIVE | {"weight": weight}])
    assert partition(path, "forget")[0] == (0 if math.isfinite(weight) and weight >= 0 else 2)
