"""From a source to raw rows that know their ``file:line``; nothing is interpreted here."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from u2a.errors import DataError
from u2a.record import one_line

Source = str | Path | Iterable[Any]
"""A path, ``hub:OWNER/NAME[:SPLIT][@REVISION]``, a ``datasets.Dataset``, or a list of dicts."""

_HUB = re.compile(r"hub:(?P<name>\w[\w.-]*/\w[\w.-]*)(?::(?P<split>[^@]+))?(?:@(?P<revision>.+))?")


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in the source.

    Attributes:
        where: ``file:line`` or ``name[index]``.
        values: column to value.
        all_text: True where the format knows text only (CSV), so that numbers are read from it.
    """

    where: str
    values: Mapping[str, Any]
    all_text: bool = False


def problem(where: str, field: str, what: str, fix: str) -> str:
    """Describe what is wrong with one place of a source.

    Args:
        where: ``file:line`` or ``name[index]``.
        field: column, or ``row``, ``text`` or ``header`` for what is wider than one.
        what: the problem.
        fix: what to do about it.

    Returns:
        One printable line, ``where: field: what (fix)``, whatever the source holds.
    """
    return f"{where}: {one_line(field, 80)}: {one_line(what)} ({one_line(fix)})"


def read_rows(source: Source, name: str = "rows") -> list[RawRow]:
    """Read every row of a source without interpreting it.

    Args:
        source: path (.jsonl, .json, .csv, .parquet), ``hub:OWNER/NAME[:SPLIT][@REVISION]`` (split ``train``
            when none is named), ``datasets.Dataset``, or an iterable of dicts.
        name: what rows of an in-memory source are called in messages.

    Returns:
        Rows in the source's order, at least one.

    Raises:
        DataError: unreadable, empty or damaged source; all damaged lines are listed.
    """
    problems: list[str] = []
    if isinstance(source, Mapping):
        keys = ", ".join(map(str, source))
        raise DataError(f"{name}: a {type(source).__name__}, expected rows (choose one split of: {keys})")
    if not isinstance(source, str | Path | Iterable):
        raise DataError(f"{name}: a {type(source).__name__}, expected a path, or rows as dicts")
    if isinstance(source, str | Path):
        name = one_line(str(source), most=4096)
        rows = _from_hub(name, problems) if name.startswith("hub:") else _from_file(Path(source), name, problems)
    else:
        rows = _from_memory(source, name, problems)
    if not rows and not problems:
        problems.append(f"{name}: holds no rows (expected at least one)")
    if problems:
        raise DataError(problems)
    return rows


def _from_memory(source: Iterable[Any], name: str, problems: list[str]) -> list[RawRow]:
    rows = []
    for index, values in enumerate(source):
        if isinstance(values, Mapping):
            rows.append(RawRow(f"{name}[{index}]", values))
        else:
            what = f"a {type(values).__name__}"
            problems.append(problem(f"{name}[{index}]", "row", what, "expected a dict of columns"))
    return rows


def _from_hub(source: str, problems: list[str]) -> list[RawRow]:
    match = _HUB.fullmatch(source)
    if match is None:
        problems.append(f"{source}: not a dataset name (expected hub:OWNER/NAME[:SPLIT][@REVISION])")
        return []
    import datasets
    from datasets.exceptions import DatasetsError

    split = match["split"] or "train"
    try:
        loaded = datasets.load_dataset(match["name"], split=split, revision=match["revision"])
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = one_line(" ".join(str(error).split()))
        problems.append(f"{source}: cannot be loaded: {reason} (check name, split and network, or give a file)")
        return []
    return _from_memory(cast(Iterable[Any], loaded), source, problems)


def _from_file(path: Path, name: str, problems: list[str]) -> list[RawRow]:
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".json", ".csv", ".parquet"):
        shown = one_line(path.suffix, 20)
        problems.append(f"{name}: unknown extension '{shown}' (expected .jsonl, .json, .csv or .parquet)")
        return []
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        problems.append(f"{name}: cannot be read: {reason} (check path and permissions)")
        return []
    if kind == ".parquet":
        return _from_parquet(name, raw, problems)
    try:
        text = raw.decode("utf-8-sig")
        damage, at = "holds a NUL character", text.find("\0")
    except UnicodeDecodeError as error:
        text, damage, at = raw.decode("latin-1"), "not UTF-8", error.start
    if at >= 0:
        line = text.count("\n", 0, at) + 1
        problems.append(problem(f"{name}:{line}", "text", damage, "save the file as UTF-8"))
        return []
    return _from_csv(name, text, problems) if kind == ".csv" else _from_json(name, kind, text, problems)


def _from_parquet(name: str, raw: bytes, problems: list[str]) -> list[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        reason = one_line(" ".join(str(error).split()))
        problems.append(f"{name}: not a readable parquet file: {reason} (write it again)")
        return []
    return _from_memory(rows, name, problems)


def _from_csv(name: str, text: str, problems: list[str]) -> list[RawRow]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[RawRow] = []
    header: list[str] = []
    line = 1
    limit = csv.field_size_limit(len(text) + 1)  # of the process, 131,072 by default: texts are measured when parsed
    try:
        for cells in reader:
            where, line = f"{name}:{line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                twice = sorted({column for column in header if column and header.count(column) > 1})
                if twice:
                    what = "two columns of this name"
                    problems += [problem(where, column, what, "rename or remove one") for column in twice]
                    return []
            elif len(cells) > len(header):
                problems.append(problem(where, "row", "more cells than the header names", "quote cells with commas"))
            else:
                rows.append(RawRow(where, dict(zip_longest(header, cells)), all_text=True))
    except csv.Error as error:
        problems.append(problem(f"{name}:{line}", "row", f"not valid CSV: {error}", "quote the cell, or use .jsonl"))
    finally:
        csv.field_size_limit(limit)
    return rows


def _from_json(name: str, kind: str, text: str, problems: list[str]) -> list[RawRow]:
    """Read a list of objects, or one object per line, whichever the text is."""
    is_list = text.lstrip()[:1] == "["
    try:
        whole = json.loads(text) if is_list or kind == ".json" else None
    except (ValueError, RecursionError) as error:
        if is_list:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            problems.append(problem(f"{name}:{line}", "text", f"not valid JSON: {_reason(error)}", "repair the file"))
            return []
        whole = None
    if isinstance(whole, dict) and "\n" in text.strip():
        problems.append(f"{name}: one object with {one_line(', '.join(whole))} (expected a list of rows)")
        return []
    decoder = _Decoder()
    rows = []
    for line, values in _items(text, decoder) if isinstance(whole, list) else _lines(name, text, decoder, problems):
        where = f"{name}:{line}"
        twice = decoder.taken_twice()
        if not isinstance(values, dict):
            problems.append(problem(where, "row", f"a {type(values).__name__}", "expected an object with columns"))
        elif twice:
            problems += [problem(where, key, "stands twice in one object", "keep one of them") for key in twice]
        else:
            rows.append(RawRow(where, values))
    return rows


class _Decoder(json.JSONDecoder):
    """Reads JSON and remembers the keys that an object holds twice; of those, JSON readers keep one in silence."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self._twice: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            self._twice += [key for key in found if keys.count(key) > 1]
        return found

    def taken_twice(self) -> list[str]:
        """Return and forget those keys."""
        found, self._twice = self._twice, []
        return list(dict.fromkeys(found))


def _lines(name: str, text: str, decoder: _Decoder, problems: list[str]) -> Iterator[tuple[int, Any]]:
    for line, part in enumerate(text.split("\n"), 1):
        if part.strip():
            try:
                yield line, decoder.decode(part)
            except (ValueError, RecursionError) as error:
                decoder.taken_twice()
                what = f"not valid JSON: {_reason(error)}"
                problems.append(problem(f"{name}:{line}", "row", what, "one object per line"))


def _items(text: str, decoder: _Decoder) -> Iterator[tuple[int, Any]]:
    """Yield the items of a valid JSON list with the line each begins on."""
    space = re.compile(r"[\s,]*")
    line, seen, position = 1, 0, text.index("[") + 1
    while True:
        match = space.match(text, position)
        position = match.end() if match else position
        if text[position] == "]":
            return
        line, seen = line + text.count("\n", seen, position), position
        item, position = decoder.raw_decode(text, position)
        yield line, item


def _reason(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
