"""The packaged demo data: counts, form, uniqueness, and no length signal between good and bad answers."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from importlib.resources import files

import pytest

DEMO = files("u2a") / "assets" / "demo"
PAIR_KINDS = ("made_up", "rude", "private_data", "unsafe")
NAMES = ("pairs.jsonl", "candidates.jsonl", "retain.jsonl", "LICENSE.txt")
Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="ascii").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def trigrams(text: str) -> frozenset[tuple[str, ...]]:
    tokens = words(text)
    return frozenset(zip(tokens, tokens[1:], tokens[2:], strict=False))


def mean_words(rows: Rows, column: str) -> float:
    return sum(len(row[column].split()) for row in rows) / len(rows)


@pytest.fixture(scope="module")
def pairs() -> Rows:
    return read("pairs.jsonl")


@pytest.fixture(scope="module")
def candidates() -> Rows:
    return read("candidates.jsonl")


@pytest.fixture(scope="module")
def retain() -> Rows:
    return read("retain.jsonl")


@pytest.fixture(scope="module")
def answers(pairs: Rows, candidates: Rows, retain: Rows) -> list[str]:
    of_pairs = [row[column] for row in pairs for column in ("chosen", "rejected")]
    return of_pairs + [row["completion"] for row in candidates + retain]


def test_counts_and_columns(pairs: Rows, candidates: Rows, retain: Rows) -> None:
    assert Counter(row["kind"] for row in pairs) == dict.fromkeys(PAIR_KINDS, 70)
    assert Counter(row["kind"] for row in candidates) == {"mislabelled": 40, "unrelated": 24}
    assert len(retain) == 60
    assert {tuple(row) for row in pairs} == {("prompt", "chosen", "rejected", "kind")}
    assert {tuple(row) for row in candidates} == {("prompt", "completion", "kind")}
    assert {tuple(row) for row in retain} == {("prompt", "completion")}


def test_kinds_are_interleaved(pairs: Rows) -> None:
    assert all({row["kind"] for row in pairs[i : i + 4]} == set(PAIR_KINDS) for i in range(0, len(pairs), 4))


def test_files_are_small_printable_ascii() -> None:
    raw = [(DEMO / name).read_bytes() for name in NAMES]
    assert all(byte == 10 or 32 <= byte < 127 for byte in b"".join(raw))
    assert sum(map(len, raw)) < 190 * 1024
    assert b"CC0 1.0" in raw[-1]


def test_texts_are_trimmed(pairs: Rows, candidates: Rows, retain: Rows) -> None:
    texts = [text for row in pairs + candidates + retain for text in row.values()]
    assert all(text and text == " ".join(text.split()) for text in texts)


def test_prompts_are_distinct_across_files(pairs: Rows, candidates: Rows, retain: Rows) -> None:
    counts = Counter(" ".join(words(row["prompt"])) for row in pairs + candidates + retain)
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_no_two_answers_share_most_of_their_trigrams(answers: list[str]) -> None:
    grams = [(text, trigrams(text)) for text in answers]
    assert all(gram for _, gram in grams)
    alike = [
        (first, second)
        for (first, a), (second, b) in itertools.combinations(grams, 2)
        if not a.isdisjoint(b) and len(a & b) > 0.8 * min(len(a), len(b))
    ]
    assert alike == []


def test_lengths_of_pairs(pairs: Rows) -> None:
    assert all(6 <= len(row["prompt"].split()) <= 16 for row in pairs)
    assert all(12 <= len(row[column].split()) <= 26 for row in pairs for column in ("chosen", "rejected"))


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_length_carries_no_signal(pairs: Rows, kind: str) -> None:
    rows = [row for row in pairs if row["kind"] == kind]
    assert mean_words(rows, "chosen") == pytest.approx(mean_words(rows, "rejected"), rel=0.03)


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_no_telltale_opening(pairs: Rows, column: str) -> None:
    one = Counter(row[column].split()[0] for row in pairs)
    two = Counter(tuple(row[column].split()[:2]) for row in pairs)
    assert one.most_common(1)[0][1] <= 0.12 * len(pairs)
    assert two.most_common(1)[0][1] <= 0.05 * len(pairs)


def test_telephone_numbers_are_in_the_range_reserved_for_fiction(answers: list[str]) -> None:
    numbers = [number for text in answers for number in re.findall(r"\d[\d-]{5,}\d", text)]
    assert numbers
    assert all(re.fullmatch(r"555-01\d\d", number) for number in numbers)
