"""The evaluation's cache of robustness conditions: every number comes back as it was."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from u2a.evaluation_stage import _kept
from u2a.jsonl_cache import JsonlCache

NAMES = st.text(min_size=1, max_size=5)
VALUES = st.dictionaries(NAMES, st.dictionaries(NAMES, st.dictionaries(NAMES, st.floats()), min_size=1), min_size=1)


def bits(found: dict) -> list:
    """All keys in order with the exact numbers."""
    return [
        (condition, metric, name, "nan" if math.isnan(value) else value.hex())
        for condition, metrics in found.items()
        for metric, values in metrics.items()
        for name, value in values.items()
    ]


@given(found=VALUES)
@settings(max_examples=25)
def test_values_and_their_order_survive_the_file(found: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(found, Path(folder, "robustness.jsonl"))


def check(found: dict, path: Path) -> None:
    calls = []

    def measure() -> dict:
        calls.append(1)
        return found

    for _ in range(2):
        assert bits(_kept(JsonlCache(path), "key", "before: none", measure)) == bits(found)
    assert len(calls) == 1
    _kept(JsonlCache(path), "another key", "before: none", measure)
    _kept(JsonlCache(path), "key", "after: none", measure)
    assert len(calls) == 3, "of other options or another arm nothing is taken"
