"""Numbers by item as columns: what is packed comes back, and a damaged column is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2a.experiment.columns import NAMES, packed, unpacked

NUMBERS = st.dictionaries(st.text(max_size=6), st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 9))
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.floats(allow_nan=False))
TREES = st.recursive(
    LEAVES | NUMBERS,
    lambda inner: st.dictionaries(st.sampled_from(["margin", "reward", "levels", "answers"]), inner | NUMBERS),
    max_leaves=12,
)


def test_the_names_are_those_of_numbers_by_item() -> None:
    assert {"margin", "retain_nll", "reward", "words"} <= NAMES and not {"answers", "collapsed", "seconds"} & NAMES


@given(TREES)
def test_what_is_packed_comes_back_to_the_digit(tree: Any) -> None:
    items: list[list[str]] = []
    written = json.loads(json.dumps([packed(tree, items), items]))
    assert unpacked(*written) == tree


def test_items_stand_once_and_in_their_order() -> None:
    items: list[list[str]] = []
    found = packed([{"margin": {"b": 0.1, "a": 1e-300}, "hit": {"b": 1, "a": 0.5}}, {"reward": {"a": 2.0}}], items)
    assert items == [["b", "a"], ["a"]]
    assert found[0] == {"margin": {"items": 0, "values": "0.1 1e-300"}, "hit": {"items": 0, "values": "1.0 0.5"}}
    assert list(unpacked(found, items)[0]["margin"]) == ["b", "a"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "1", None])
def test_what_is_no_finite_number_stays_for_the_record_to_refuse(number: Any) -> None:
    tree = {"margin": {"a": 1.0, "b": number}}
    assert packed(tree, []) is not tree and packed(tree, []) == tree


@pytest.mark.parametrize(
    ("column", "items", "said"),
    [
        ({"items": 0, "values": "1.0"}, [["a", "b"]], "margin: 1 values do not fit items 0"),
        ({"items": 1, "values": "1.0"}, [["a"]], "margin: 1 values do not fit items 1"),
        ({"items": -1, "values": "1.0"}, [["a"]], "margin: 1 values do not fit items -1"),
        ({"values": "1.0"}, [["a"]], "margin: 1 values do not fit items None"),
        ({"items": 0, "values": "1.0 2.0"}, [["a", "a"]], "margin: 2 values do not fit items 0"),
        ({"items": 0, "values": "nan"}, [["a"]], "margin: a value that is not a finite number"),
        ({"items": 0, "values": "one"}, [["a"]], "could not convert"),
    ],
)
def test_a_damaged_column_is_refused(column: dict[str, Any], items: list[list[str]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unpacked({"margin": column}, items)
