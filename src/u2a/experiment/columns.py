"""Numbers by item as columns: the items once for all that was measured on them, the numbers of each as one line."""

from __future__ import annotations

import math
from typing import Any, cast

from u2a.experiment.measured import Measured

NAMES = frozenset(name for name, info in Measured.model_fields.items() if info.annotation == dict[str, float])


def packed(tree: Any, items: list[list[str]]) -> Any:
    """Replace numbers by item, wherever they stand in a document, with columns.

    Args:
        tree: JSON values.
        items: lists of items that columns refer to by their place; new ones are added.

    Returns:
        The document with ``{"items": place, "values": "number number ..."}`` for every non-empty mapping under a
        name of :class:`~u2a.experiment.measured.Measured`. Numbers are written so that they come back the same.
    """
    if isinstance(tree, dict):
        return {
            key: _column(value, items) if key in NAMES and _is_numbers(value) else packed(value, items)
            for key, value in tree.items()
        }
    return [packed(value, items) for value in tree] if isinstance(tree, list | tuple) else tree


def unpacked(tree: Any, items: list[list[str]]) -> Any:
    """Undo :func:`packed`; what was never packed is left as it is.

    Args:
        tree: JSON values.
        items: lists of items.

    Returns:
        The document.

    Raises:
        ValueError: a column does not fit its items, or holds a number that is not finite.
    """
    if isinstance(tree, dict):
        return {
            key: _mapping(key, value, items) if key in NAMES and _is_column(value) else unpacked(value, items)
            for key, value in tree.items()
        }
    return [unpacked(value, items) for value in tree] if isinstance(tree, list) else tree


def _is_numbers(value: Any) -> bool:
    """Whether a value is a mapping that a column can hold; others stay, and are refused where they are saved."""
    numbers = list(cast(dict[str, Any], value).values()) if isinstance(value, dict) else []
    return bool(numbers) and all(isinstance(number, float | int) and math.isfinite(number) for number in numbers)


def _column(values: dict[str, float], items: list[list[str]]) -> dict[str, Any]:
    names = list(values)
    if names not in items:
        items.append(names)
    return {"items": items.index(names), "values": " ".join(repr(float(value)) for value in values.values())}


def _is_column(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(cast(dict[str, Any], value).get("values"), str)


def _mapping(name: str, column: dict[str, Any], items: list[list[str]]) -> dict[str, float]:
    place, values = column.get("items"), [float(value) for value in column["values"].split()]
    if not isinstance(place, int) or not 0 <= place < len(items) or len(set(items[place])) != len(values):
        raise ValueError(f"{name}: {len(values)} values do not fit items {place!r}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name}: a value that is not a finite number")
    return dict(zip(items[place], values, strict=True))
