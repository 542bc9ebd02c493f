"""Markdown tables of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table.

    Args:
        head: column names.
        rows: cells; numbers are rounded, None is a dash.

    Returns:
        Its text.
    """
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    """One cell's text.

    Args:
        value: a number, text, truth value, interval (a list of two) or None.

    Returns:
        Its text.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(cell(part) for part in value)}]"
    return str(value)
