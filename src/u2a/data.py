"""From the user's files to pairs and examples: no dataset registry, a source and a field map.

``rows.read_rows`` turns any source into raw rows that know their ``file:line``; ``parse_pairs`` and
``parse_examples`` turn raw rows into records. TRL's standard and conversational formats are understood:
an answer column may hold text, one assistant turn, or a whole conversation whose last turn is the answer.
Every problem of a source is collected and reported at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from u2a.config import DataSection, FieldMap
from u2a.errors import DataError
from u2a.folding import fold
from u2a.record import content_id
from u2a.rows import RawRow, Source, problem, read_rows
from u2a.types import Example, Message, Pair

if TYPE_CHECKING:
    from datasets import Dataset

Turns = tuple[Message, ...]
AnswerField = Literal["completion", "chosen", "rejected"]

MAX_CHARS = 1_000_000  # a longer text is a damaged file, not an answer
MESSAGES = "messages"  # TRL's column of a whole conversation
LABEL = "label"  # TRL's column of unpaired preferences: true is a good answer
_LABELS = {"true": True, "1": True, "false": False, "0": False}


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


def parse_prompts(rows: Iterable[RawRow], section: DataSection) -> list[Turns]:
    """Interpret raw rows as prompts alone; the other columns are not looked at.

    Args:
        rows: raw rows.
        section: the prompt's column (``fields.prompt``) and ``system_prompt``.

    Returns:
        One prompt per row.

    Raises:
        DataError: every problem, one line each.
    """
    problems: list[str] = []
    readers = [_RowReader(row, section.fields, "data.fields", problems) for row in rows]
    prompts = [reader.prompt([], ()) for reader in readers]
    if problems:
        raise DataError(problems)
    return [_with_system(prompt, section.system_prompt) for prompt in prompts if prompt is not None]


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

    def fail(self, column: str, what: str, fix: str) -> None:
        self.problems.append(problem(self.row.where, column, what, fix))

    def column(self, field: AnswerField) -> str:
        name: str = getattr(self.fields, field)
        has = self.row.values.keys()  # beside a pair a conversation is the good answer in some sets: not taken unasked
        whole = field == "completion" and name not in has and MESSAGES in has and not {"chosen", "rejected"} <= has
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
        number = math.nan
        if self.row.all_text or (isinstance(value, int | float) and not isinstance(value, bool)):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = math.nan
        if math.isfinite(number) and number >= 0:
            return number
        self.fail(name, f"{value!r:.40}, expected a finite number >= 0", "give the weight, or leave it out")
        return None

    def kind(self) -> str | None:
        name = self.fields.kind
        value = self.row.values.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, str | int):
            self.fail(name, f"a {type(value).__name__}, expected a short label", "name another column")
            return None
        return str(value) if not isinstance(value, str) or self.is_text(name, value) else None

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
    kept = [example for example in examples if example.id in weights]
    columns = {
        "id": [example.id for example in kept],
        "prompt": [[message.model_dump() for message in example.prompt] for example in kept],
        "completion": [[{"role": "assistant", "content": example.completion}] for example in kept],
        "weight": [float(weights[example.id]) for example in kept],
    }
    return datasets.Dataset.from_dict(columns, features=features)
