"""Any file and any configuration at all: the run goes on, or says in one clear way why not, with exit status 2.

The seeds are fixed, so that every run of the tests tries the same cases; those marked slow try many more.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from u2a.cli import main
from u2a.config_file import all_options

from .cases import BAD_CONFIGS, MALFORMED

QUICK = settings(max_examples=40, suppress_health_check=list(HealthCheck))
THOROUGH = settings(max_examples=1500, suppress_health_check=list(HealthCheck))
LONG = [pytest.mark.slow, pytest.mark.timeout(1800)]
both = pytest.mark.parametrize("effort", [QUICK, pytest.param(THOROUGH, marks=LONG)], ids=["quick", "slow"])
GOOD = [{"prompt": f"Q{k}?", "chosen": f"yes {k}", "rejected": f"no {k}", "kind": "rude"} for k in range(40)]
OPTIONS = ("pairs", "forget", "preferences", "retain", "evaluation", "reward", "finetune", "holdout")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def u2a(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run one command; returns status, standard output and standard error. An exception passes, and fails the test."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("u2a.pipeline.load_model", never)
    monkeypatch.setattr("u2a.pipeline.load_tokenizer", lambda _: tiny_tokenizer())
    monkeypatch.setattr("datasets.load_dataset", never)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        status = main(list(words))
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def read(u2a: Command, tmp_path: Path) -> Callable[[Path, str], None]:
    """Check what ``u2a partition`` says to one file beside good ones."""
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in GOOD), encoding="utf-8")

    def check(path: Path, option: str) -> None:
        tree = {
            "output_dir": "run",
            "model": {"name_or_path": "none", "device": "cpu"},
            "data": {"pairs": str(good), option: str(path)},
            "solve": {"folds": 2},
            "unlearn": {"retain_term": "none"},
            "reward": {"model": "none", "eval_model": "none"},
            "evaluation": {"forget_rows": 1},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        status, out, err = u2a("partition", "config.yaml", "--quiet")
        assert status in (0, 2)
        if status == 0:
            assert err == "" and out.startswith("Partition\n  ")
            return
        assert err.startswith("u2a partition: ") and err.endswith("\n")
        lines = err.removeprefix("u2a partition: ").splitlines()
        assert 1 <= len(lines) <= 21 and all(line.isprintable() and len(line) < 700 for line in lines), lines
        places = re.compile(rf"{re.escape(str(path))}(:\d+: [^:]+)?: .+ \(.+\)$|\.\.\. and \d+ more")
        sets = re.compile(r"(preference|forget|evaluation|retain|reward|finetune|solve\.n_selected): .+ \(.+\)$")
        of_rows = re.compile(r".+ \(.+\)( \[.+\])?$")  # what the doctor says of rows that are good one by one
        for line in lines:
            assert places.match(line) or sets.match(line) or of_rows.match(line), line
            assert "Traceback" not in line and "Error:" not in line, line

    return check


# --- data ------------------------------------------------------------------------------------------------------


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    made = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), made)
    return made.getvalue()


NEGATIVES = [{"prompt": f"N{k}?", "completion": f"never {k}", "weight": 0.5} for k in range(9)]
VALID = [
    ("a.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in GOOD[:9])),
    ("a.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in NEGATIVES)),
    ("a.json", json.dumps(GOOD[:9], indent=1).encode()),
    ("a.csv", as_csv(GOOD[:9])),
    ("a.csv", as_csv(NEGATIVES)),
    ("a.parquet", as_parquet(GOOD[:9])),
]
FAULTY = [(case.file, case.content) for case in MALFORMED if len(case.content) < 5000 and case.file.isprintable()]
TOKENS = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\\", b"\\ud800", b"\n", b"\r", b",", b"{", b"}", b"[", b"]"]
TOKENS += [b"null", b"NaN", b"-1e999", b"1" * 30, b"true", b'""', b'" "', b":", b"\xe2\x80\xa8", b"\x1b[2J", b"''"]


@st.composite
def mutated(draw: st.DrawFn, sources: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """A file with a few pieces cut out, doubled, replaced, or joined with a piece of another file."""
    name, content = draw(st.sampled_from(sources))
    for _ in range(draw(st.integers(1, 4))):
        low, high = sorted((draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))))
        piece = draw(st.sampled_from(TOKENS) | st.binary(max_size=4))
        other = draw(st.sampled_from(sources))[1]
        content = {
            "cut": content[:low] + content[high:],
            "double": content[:high] + content[low:],
            "replace": content[:low] + piece + content[low + len(piece) :],
            "insert": content[:low] + piece + content[low:],
            "splice": content[:low] + other[min(low, len(other)) :],
        }[draw(st.sampled_from(["cut", "double", "replace", "insert", "splice"]))]
    return draw(st.sampled_from([name, name, name, "a.jsonl", "a.json", "a.csv", "a.parquet"])), content[:20_000]


def put(folder: Path, file: tuple[str, bytes]) -> Path:
    (folder / file[0]).write_bytes(file[1])
    return folder / file[0]


@both
def test_changed_files(effort: settings, read: Callable[[Path, str], None], tmp_path: Path) -> None:
    @effort
    @given(mutated([*VALID, *FAULTY]), st.sampled_from(OPTIONS))
    def check(file: tuple[str, bytes], option: str) -> None:
        read(put(tmp_path, file), option)

    check()


@both
def test_any_bytes_at_all(effort: settings, read: Callable[[Path, str], None], tmp_path: Path) -> None:
    pieces = st.binary(max_size=300) | st.lists(st.sampled_from(TOKENS), max_size=30).map(b"".join)

    @effort
    @given(pieces, st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet"]), st.sampled_from(OPTIONS))
    def check(content: bytes, name: str, option: str) -> None:
        read(put(tmp_path, (name, content)), option)

    check()


# --- configurations ----------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=6) | st.sampled_from(
    ["", " ", "a\0b", "auto", "package:x", "1e999", "~", "$HOME", "../x", "\ud800"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*all_options(), *{name.split(".")[0] for name in all_options()}, "nothing", "data.x.y"])
CONFIGS = [(case.name, case.yaml.encode("utf-8", "replace")) for case in BAD_CONFIGS if len(case.yaml) < 5000]


@pytest.fixture
def configured(u2a: Command, tmp_path: Path) -> Callable[[bytes], None]:
    """Check what ``u2a config`` says to a file."""

    def check(content: bytes) -> None:
        path = tmp_path / "any.yaml"
        path.write_bytes(content)
        status, out, err = u2a("config", str(path))
        assert (status, out, err) == (0, "the configuration is valid\n", "") or (status, out) == (2, "")
        if status == 0:
            return
        assert err.startswith("u2a config: ") and err.endswith("\n")
        lines = err.removeprefix("u2a config: ").split("\n")[:-1]
        begins = re.compile(
            rf"{re.escape(str(path))}(:\d+)?: |[^ ]+( conflicts|: )|unlearn|partition|.+: (unknown option|holds )"
        )
        for line in lines:
            assert line.isprintable() and len(line) < 700 and begins.match(line), line
            assert "Traceback" not in line and "pydantic" not in line, line

    return check


def tree_of(options: list[tuple[str, Any]]) -> dict[str, Any]:
    """Nested options from dotted names; a section that was given a value of its own keeps it."""
    tree: dict[str, Any] = {}
    for name, value in options:
        held, parts = tree, name.split(".")
        for part in parts[:-1]:
            held = held.setdefault(part, {}) if isinstance(held, dict) else None
        if isinstance(held, dict):
            held[parts[-1]] = value
    return tree


@both
def test_any_values_of_options(effort: settings, configured: Callable[[bytes], None]) -> None:
    @effort
    @given(st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=6), st.booleans())
    def check(options: list[tuple[str, Any]], as_json: bool) -> None:
        tree = tree_of(options)
        text = json.dumps(tree) if as_json else yaml.safe_dump(tree)
        configured(text.encode("utf-8", "replace"))

    check()


@both
def test_changed_configurations(effort: settings, configured: Callable[[bytes], None]) -> None:
    @effort
    @given(mutated(CONFIGS))
    def check(file: tuple[str, bytes]) -> None:
        configured(file[1])

    check()


@both
def test_any_words_after_set(effort: settings, u2a: Command) -> None:
    words = st.lists(
        st.tuples(NAMES | TEXTS, st.sampled_from(["=", "", "==", ": "]), TEXTS | SCALARS.map(str)), max_size=3
    )

    @effort
    @given(words)
    def check(parts: list[tuple[str, str, str]]) -> None:
        status, out, err = u2a("config", *("--set=" + "".join(part) for part in parts))
        assert (status == 0 and out == "the configuration is valid\n" and not err) or (status == 2 and not out)
        assert all(line.isprintable() for line in err.split("\n"))

    check()
