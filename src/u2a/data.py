"""From the user's files to pairs and examples: no dataset registry, a source and a field map.

``read_rows`` turns any source into raw rows that know their ``file:line``; ``parse_pairs`` and
``parse_examples`` turn raw rows into records. TRL's standard and conversational formats are understood:
an answer column may hold text, one assistant turn, or a whole conversation whose last turn is the answer.
Every problem of a source is collected and reported at once.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from u2a.config import DataSection, FieldMap
from u2a.errors import DataError
from u2a.types import Example, Message, Pair, content_id

if TYPE_CHECKING:
    from datasets import Dataset

Source = str | Path | Iterable[Mapping[str, Any]]
"""A path, ``hub:OWNER/NAME[:SPLIT][@REVISION]``, a ``datasets.Dataset``, or a list of dicts."""

Turns = tuple[Message, ...]
AnswerField = Literal["completion", "chosen", "rejected"]

MAX_CHARS = 1_000_000  # a longer text is a damaged file, not an answer
MESSAGES = "messages"  # TRL's column of a whole conversation
LABEL = "label"  # TRL's column of unpaired preferences: true is a good answer
_HUB = re.compile(r"hub:(?P<name>[^:@]+)(?::(?P<split>[^@]+))?(?:@(?P<revision>.+))?")
_LABELS = {"true": True, "1": True, "false": False, "0": False}


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


def fold(text: str) -> str:
    """Return a text without differences of case, spacing and Unicode presentation.

    Args:
        text: any text.

    Returns:
        NFKC, case-folded, with runs of white space replaced by one space.

    >>> fold("  Ｈow   ARE you? ")
    'how are you?'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def prompt_key(prompt: Sequence[Message]) -> str:
    """Return the id of what the user asks: equal for prompts that differ in case or spacing only.

    Args:
        prompt: turns before the answer; system and assistant turns do not count.

    Returns:
        Content id of the folded user turns.
    """
    return content_id(*(fold(turn.content) for turn in prompt if turn.role == "user"))


def example_id(prompt: Sequence[Message], completion: str) -> str:
    """Return the id of a prompt with one answer.

    Args:
        prompt: turns before the answer.
        completion: the answer.

    Returns:
        Content id of the exact texts.
    """
    return content_id(*(part for turn in prompt for part in (turn.role, turn.content)), "completion", completion)


def pair_id(prompt: Sequence[Message], chosen: str, rejected: str) -> str:
    """Return the id of a prompt with a preferred and a rejected answer.

    Args:
        prompt: turns before the answer.
        chosen: preferred answer.
        rejected: rejected answer.

    Returns:
        Content id of the exact texts.
    """
    return content_id(*(part for turn in prompt for part in (turn.role, turn.content)), "pair", chosen, rejected)


# --- reading ------------------------------------------------------------------------------------


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


# --- interpreting -------------------------------------------------------------------------------


def read_pairs(source: Source, section: DataSection, name: str = "pairs") -> list[Pair]:
    """Read preference pairs.

    Args:
        source: see :func:`read_rows`.
        section: field map (``fields``) and ``system_prompt``.
        name: what rows of an in-memory source are called.

    Returns:
        One pair per row, in the source's order.

    Raises:
        DataError: every problem of the source, one line each.
    """
    return parse_pairs(read_rows(source, name), section)


def read_examples(source: Source, section: DataSection, good: bool, name: str = "rows") -> list[Example]:
    """Read prompts with one answer each.

    Args:
        source: see :func:`read_rows`.
        section: field maps and ``system_prompt``.
        good: True for a retain source (``retain_fields``), False for negatives (``fields``). With TRL's column
            ``label`` only rows with that label are kept.
        name: what rows of an in-memory source are called.

    Returns:
        Examples in the source's order.

    Raises:
        DataError: every problem of the source, one line each.
    """
    return parse_examples(read_rows(source, name), section, good)


def parse_pairs(rows: Iterable[RawRow], section: DataSection) -> list[Pair]:
    """Interpret raw rows as preference pairs; arguments, result and errors as in :func:`read_pairs`."""
    problems: list[str] = []
    readers = [_RowReader(row, section.fields, "data.fields", problems) for row in rows]
    pairs = [reader.pair(section.system_prompt) for reader in readers]
    if problems:
        raise DataError(problems)
    return [pair for pair in pairs if pair is not None]


def parse_examples(rows: Iterable[RawRow], section: DataSection, good: bool) -> list[Example]:
    """Interpret raw rows as prompts with one answer; otherwise as :func:`read_examples`."""
    problems: list[str] = []
    fields, option = (section.retain_fields, "data.retain_fields") if good else (section.fields, "data.fields")
    readers = [_RowReader(row, fields, option, problems) for row in rows]
    examples = [reader.example(section.system_prompt) for reader in readers if reader.label() in (None, good)]
    if problems:
        raise DataError(problems)
    return [example for example in examples if example is not None]


@dataclass(frozen=True)
class _RowReader:
    """Interprets one row; what is wrong with it is appended to ``problems`` and the result is None."""

    row: RawRow
    fields: FieldMap
    option: str
    problems: list[str]

    def pair(self, system_prompt: str | None) -> Pair | None:
        chosen, rejected = self.answer("chosen"), self.answer("rejected")
        prompt = self.prompt([answer[0] for answer in (chosen, rejected) if answer], ("chosen", "rejected"))
        kind = self.kind()
        if chosen is None or rejected is None or prompt is None:
            return None
        if chosen[1].strip() == rejected[1].strip():
            self.fail(self.fields.rejected, "the same text as the chosen answer", "remove the row: it prefers nothing")
            return None
        turns = _with_system(prompt, system_prompt)
        return Pair(
            id=pair_id(turns, chosen[1], rejected[1]),
            prompt=turns,
            chosen=chosen[1],
            rejected=rejected[1],
            kind=kind,
            source=self.row.where,
        )

    def example(self, system_prompt: str | None) -> Example | None:
        answer = self.answer("completion")
        prompt = self.prompt([answer[0]] if answer else [], ("completion",))
        weight, kind = self.weight(), self.kind()
        if answer is None or prompt is None:
            return None
        turns = _with_system(prompt, system_prompt)
        return Example(
            id=example_id(turns, answer[1]),
            prompt=turns,
            completion=answer[1],
            weight=weight,
            kind=kind,
            source=self.row.where,
        )

    def fail(self, column: str, problem: str, fix: str) -> None:
        self.problems.append(f"{self.row.where}: {column}: {problem} ({fix})")

    def column(self, field: AnswerField) -> str:
        name: str = getattr(self.fields, field)
        whole = field == "completion" and name not in self.row.values and MESSAGES in self.row.values
        return MESSAGES if whole else name

    def missing(self, field: str, name: str) -> None:
        """Report a column that is absent or null, with the nearest column that is there."""
        if name in self.row.values:
            self.fail(name, "null", "give a text, or remove the row")
            return
        present = [str(key) for key in self.row.values]
        close = difflib.get_close_matches(name, present, n=1, cutoff=0.6)
        if close:
            self.fail(name, f"missing, nearest column is {close[0]!r}", f"set {self.option}.{field}={close[0]}")
        else:
            self.fail(name, f"missing, columns are {', '.join(present) or 'none'}", f"set {self.option}.{field}")

    def is_text(self, name: str, value: Any) -> bool:
        """Report and return whether a value can be trained on."""
        if not isinstance(value, str):
            self.fail(name, f"a {type(value).__name__}, expected text", "quote it, or name another column")
        elif not value.strip():
            self.fail(name, "empty", "give a text, or remove the row")
        elif "\0" in value:
            self.fail(name, "holds a NUL character", "remove it")
        elif any("\ud800" <= char <= "\udfff" for char in value):
            self.fail(name, "holds half a surrogate pair", "write the character as UTF-8")
        elif len(value) > MAX_CHARS:
            self.fail(name, f"{len(value)} characters, at most {MAX_CHARS} are read", "cut it, or remove the row")
        else:
            return True
        return False

    def turns(self, name: str, value: Any) -> Turns | None:
        """Return a list of {role, content} as turns, each with text."""
        if not isinstance(value, list | tuple):
            self.fail(name, f"a {type(value).__name__}, expected text or a list of turns", "name another column")
            return None
        turns = []
        for index, item in enumerate(value):
            where = f"{name}[{index}]"
            if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
                self.fail(where, "no role and content", 'write {"role": ..., "content": ...}')
                return None
            if item["role"] not in ("system", "user", "assistant"):
                self.fail(where, f"role {item['role']!r}", "expected system, user or assistant")
                return None
            blank_system = item["role"] == "system" and isinstance(item["content"], str) and not item["content"].strip()
            if not blank_system and not self.is_text(where, item["content"]):
                return None
            turns.append(Message(role=item["role"], content=item["content"]))
        if not turns:
            self.fail(name, "empty", "give at least one turn, or remove the row")
            return None
        return tuple(turns)

    def answer(self, field: AnswerField) -> tuple[Turns, str] | None:
        """Return the turns that stand before an answer in its own column, and its text."""
        name = self.column(field)
        value = self.row.values.get(name)
        if value is None:
            self.missing(field, name)
            return None
        if isinstance(value, str):
            return ((), value) if self.is_text(name, value) else None
        turns = self.turns(name, value)
        if turns is None:
            return None
        if turns[-1].role != "assistant":
            self.fail(name, f"ends with a turn of the {turns[-1].role}", "the last turn is the answer")
            return None
        return turns[:-1], turns[-1].content

    def prompt(self, contexts: list[Turns], answers: tuple[AnswerField, ...]) -> Turns | None:
        """Return the prompt from its own column or from the turns before the answers."""
        name = self.fields.prompt
        value = self.row.values.get(name)
        if value is None:
            implicit = any(isinstance(self.row.values.get(self.column(field)), list | tuple) for field in answers)
            if not implicit or contexts and not any(contexts):
                self.missing("prompt", name)
                return None
            prompt: Turns | None = contexts[0] if contexts else None
        elif isinstance(value, str):
            prompt = (Message(role="user", content=value),) if self.is_text(name, value) else None
        else:
            prompt = self.turns(name, value)
        if prompt is None:
            return None
        for context in contexts:
            if value is None and context != prompt or context and context[-len(prompt) :] != prompt:
                self.fail(name, "differs from the turns before an answer", "give the same prompt, or none")
                return None
            prompt = context or prompt
        roles = [turn.role for turn in prompt]
        talk = roles[1:] if roles[0] == "system" else roles
        if talk[-1:] != ["user"] or talk != [("user", "assistant")[i % 2] for i in range(len(talk))]:
            self.fail(name, f"turns of {', '.join(roles)}", "expected user and assistant in turn, the last a user's")
            return None
        return prompt

    def weight(self) -> float | None:
        name = self.fields.weight
        value = self.row.values.get(name)
        if value is None or (self.row.all_text and value == ""):
            return None
        try:
            number = float(value) if self.row.all_text else value
        except ValueError:
            number = None
        if not isinstance(number, int | float) or isinstance(number, bool):
            self.fail(name, f"{value!r:.40}, expected a number", "a weight is a number >= 0")
        elif not math.isfinite(number) or number < 0:
            self.fail(name, f"{number}, expected a finite number >= 0", "give the weight, or leave it out")
        else:
            return float(number)
        return None

    def kind(self) -> str | None:
        value = self.row.values.get(self.fields.kind)
        if value is None or value == "":
            return None
        if not isinstance(value, str | int | bool):
            self.fail(self.fields.kind, f"a {type(value).__name__}, expected a short label", "name another column")
            return None
        return str(value)

    def label(self) -> bool | None:
        """Return TRL's unpaired label, None without one."""
        value = self.row.values.get(LABEL)
        if value is None or value == "":
            return None
        known = _LABELS.get(str(value).strip().lower()) if isinstance(value, str | int | bool) else None
        if known is None:
            self.fail(LABEL, f"{value!r:.40}, expected true or false", "true marks a good answer; rename other labels")
        return known


def _with_system(prompt: Turns, system_prompt: str | None) -> Turns:
    """Put the system turn in front of a prompt that has none."""
    if system_prompt is None or prompt[0].role == "system":
        return prompt
    return (Message(role="system", content=system_prompt), *prompt)


# --- handing on ---------------------------------------------------------------------------------


def to_dataset(examples: Sequence[Example], weights: Mapping[str, float]) -> Dataset:
    """Return the weighted examples in TRL's conversational prompt-completion format.

    Args:
        examples: rows to choose from.
        weights: weight (finite, >= 0) by example id; examples without one are left out.

    Returns:
        Columns id, prompt and completion (lists of {role, content}), and weight; :func:`read_examples` reads it.

    Raises:
        DataError: a weight belongs to no example.
    """
    import datasets

    unknown = sorted(set(weights) - {example.id for example in examples})
    if unknown:
        raise DataError([f"weights: {key}: belongs to no example (use the ids of this partition)" for key in unknown])
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features(
        id=datasets.Value("string"),
        prompt=datasets.List(turn),
        completion=datasets.List(turn),
        weight=datasets.Value("float64"),
    )
    rows = [
        {
            "id": example.id,
            "prompt": [message.model_dump() for message in example.prompt],
            "completion": [{"role": "assistant", "content": example.completion}],
            "weight": float(weights[example.id]),
        }
        for example in examples
        if example.id in weights
    ]
    return datasets.Dataset.from_list(rows, features=features)
