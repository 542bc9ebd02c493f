"""From a source to raw rows that know their ``file:line``; nothing is interpreted here."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from u2a.errors import DataError

Source = str | Path | Iterable[Any]
"""A path, ``hub:OWNER/NAME[:SPLIT][@REVISION]``, a ``datasets.Dataset``, or a list of dicts."""

_HUB = re.compile(r"hub:(?P<name>[^:@]+)(?::(?P<split>[^@]+))?(?:@(?P<revision>.+))?")


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
    if isinstance(source, str | Path):
        name = str(source)
        rows = _from_hub(name, problems) if name.startswith("hub:") else _from_file(Path(source), problems)
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
            problems.append(f"{name}[{index}]: row: a {type(values).__name__} (expected a dict of columns)")
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
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        problems.append(f"{source}: cannot be loaded: {reason} (check name, split and network, or give a file)")
        return []
    return _from_memory(cast(Iterable[Any], loaded), source, problems)


def _from_file(path: Path, problems: list[str]) -> list[RawRow]:
    if path.suffix.lower() not in (".jsonl", ".json", ".csv", ".parquet"):
        problems.append(f"{path}: unknown extension {path.suffix!r} (expected .jsonl, .json, .csv or .parquet)")
        return []
    try:
        raw = path.read_bytes()
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror or error} (check path and permissions)")
        return []
    if path.suffix.lower() == ".parquet":
        return _from_parquet(path, raw, problems)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(f"{path}:{line}: text: not UTF-8 (save the file as UTF-8)")
        return []
    if path.suffix.lower() == ".csv":
        return _from_csv(path, text, problems)
    return _from_json(path, text, problems)


def _from_parquet(path: Path, raw: bytes, problems: list[str]) -> list[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(raw))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        problems.append(f"{path}: not a readable parquet file: {reason} (write it again)")
        return []
    return _from_memory(table.to_pylist(), str(path), problems)


def _from_csv(path: Path, text: str, problems: list[str]) -> list[RawRow]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows, line = [], 2
    try:
        for values in reader:
            if None in values:
                problems.append(f"{path}:{line}: row: more cells than the header names (quote cells with commas)")
            else:
                rows.append(RawRow(f"{path}:{line}", values, all_text=True))
            line = reader.line_num + 1
    except csv.Error as error:
        problems.append(f"{path}:{line}: row: not valid CSV: {error} (quote the cell, or use .jsonl)")
    return rows


def _from_json(path: Path, text: str, problems: list[str]) -> list[RawRow]:
    """Read a list of objects, or one object per line, whichever the text is."""
    try:
        whole = json.loads(text) if text.lstrip()[:1] == "[" or path.suffix.lower() == ".json" else None
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == "[":
            line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            problems.append(f"{path}:{line}: text: not valid JSON: {_reason(error)} (repair the file)")
            return []
        whole = None
    rows = []
    if isinstance(whole, dict) and "\n" in text.strip():
        problems.append(f"{path}: one object with {', '.join(whole)} (expected a list of rows)")
        return []
    for line, values in _items(text) if isinstance(whole, list) else _lines(path, text, problems):
        if isinstance(values, dict):
            rows.append(RawRow(f"{path}:{line}", values))
        else:
            problems.append(f"{path}:{line}: row: a {type(values).__name__} (expected an object with columns)")
    return rows


def _lines(path: Path, text: str, problems: list[str]) -> Iterator[tuple[int, Any]]:
    for line, part in enumerate(text.split("\n"), 1):
        if part.strip():
            try:
                yield line, json.loads(part)
            except (ValueError, RecursionError) as error:
                problems.append(f"{path}:{line}: row: not valid JSON: {_reason(error)} (one object per line)")


def _items(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the items of a valid JSON list with the line each begins on."""
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
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
