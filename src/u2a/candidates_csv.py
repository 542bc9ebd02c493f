"""``candidates.csv``: every candidate with its numbers, for a spreadsheet.

A spreadsheet runs a cell that starts like a formula, and the texts come from anybody. Such a text gets one more
apostrophe in front, which makes it a text; :func:`text_of` takes it away again. Numbers are never touched.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from u2a.record import write_whole
from u2a.run_records import RunRecords, candidates

COLUMNS = ("id", "prompt", "answer", "gain", "se", "weight", "reason", "reward")

# What spreadsheets take for the start of a formula, full-width forms and leading line breaks included. Apostrophes
# before it count too, so that the one added can be told from those of the text.
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def cell(value: str | float | None) -> str | float | None:
    """Make a value safe for a cell.

    Args:
        value: a text, a number, or None for an empty cell.

    Returns:
        The value; a text that would be a formula with an apostrophe in front.

    >>> cell("=1+1"), cell("fine"), cell(-0.5)
    ("'=1+1", 'fine', -0.5)
    """
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def text_of(cell_text: str) -> str:
    """Undo :func:`cell` for a text.

    Args:
        cell_text: a text read from ``candidates.csv``.

    Returns:
        The text as it stands in the data.

    >>> text_of("'=1+1"), text_of("'tis")
    ('=1+1', "'tis")
    """
    return cell_text[1:] if cell_text.startswith("'") and FORMULA.match(cell_text) else cell_text


def candidates_csv(records: RunRecords) -> str:
    """Write all candidates as comma-separated values (RFC 4180).

    Args:
        records: what the run wrote.

    Returns:
        A header and one row per candidate, in the order of the report; numbers have every digit, and an unknown one
        is an empty cell.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for row in candidates(records):
        writer.writerow([cell(getattr(row, name)) for name in COLUMNS])
    return out.getvalue()


def write_candidates(records: RunRecords, path: Path) -> Path:
    """Write ``candidates.csv`` as UTF-8, whole or not at all.

    Args:
        records: what the run wrote.
        path: the file.

    Returns:
        The path written.
    """
    write_whole(path, candidates_csv(records))
    return path
