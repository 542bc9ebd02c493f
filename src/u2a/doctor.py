"""The data doctor: what is wrong, or worth knowing, about a run's rows before any model is loaded.

Rows of one set are compared with those of the others and with each other (same text, same but for case and spacing,
near-duplicates, same prompt), answers are searched for contradictions, and with a tokenizer the lengths, the cuts and
the chat template are looked at. Everything found is a sentence with a count, up to three example ids and a remedy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

from u2a.contradictions import answer_key
from u2a.data import prompt_key
from u2a.diagnosis import Diagnosis, Finding, Level, Overlap, SetHealth, Severity
from u2a.folding import fold
from u2a.near_duplicates import fingerprint, near_labels
from u2a.partition import SETS
from u2a.token_checks import Measured, measure, template_problems
from u2a.types import Example, Pair, Partition

if TYPE_CHECKING:
    from u2a.encoding import Encoder

DataRow = Pair | Example

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
LEVELS: dict[Level, str] = {
    "exact": "stand there too, prompt and answer",
    "folded": "stand there too but for case and spacing",
    "near": "have a near-duplicate there",
    "prompt": "share their prompt, with another answer",
}
LEAKS: tuple[Level, ...] = ("exact", "folded")  # the very row stands in the evaluation set
GOOD, BAD = ("retain", "good"), ("forget", "bad")  # sets of examples whose answers are good, or bad
HELD_OUT = ("evaluation", "holdout")
NEVER_TOKENIZED = ("reward",)  # read by reward models only, which have tokenizers of their own


def examine(
    partition: Partition,
    encoder: Encoder | None = None,
    others: Mapping[str, Sequence[DataRow]] | None = None,
    allow_leak: bool = False,
) -> Diagnosis:
    """Examine the sets of a run.

    Args:
        partition: the sets; what reading them already dropped is in its ``dropped``.
        encoder: tokenizes the rows (its cache is used and filled); None counts words and checks no template.
        others: further rows by name that are held out, such as ``holdout``.
        allow_leak: let a leak into the evaluation set be a warning.

    Returns:
        What was found.
    """
    return examine_sets({name: getattr(partition, name) for name in SETS} | dict(others or {}), encoder, allow_leak)


def examine_sets(
    sets: Mapping[str, Sequence[DataRow]], encoder: Encoder | None = None, allow_leak: bool = False
) -> Diagnosis:
    """Examine sets of rows by name; arguments and result as in :func:`examine`."""
    tables = {name: _Table(name, rows) for name, rows in sets.items() if rows}
    healths, findings = [], []
    for table in tables.values():
        measured = measure(table.rows, None if table.name in NEVER_TOKENIZED else encoder)
        healths.append(_health(table, measured))
        findings += [*_repeats(table), *_lengths(table, measured)]
    near = _near(tables) if len(tables) > 1 else {}
    overlaps = [found for pair in combinations(tables.values(), 2) for found in _overlaps(*pair, near)]
    findings += [_overlap_finding(overlap, tables[overlap.first], allow_leak) for overlap in overlaps]
    findings += _contradictions(tables.values())
    if encoder is not None:
        findings += [Finding(severity=kind, check=check, text=text) for kind, check, text in template_problems(encoder)]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(sets=tuple(healths), overlaps=tuple(overlaps), findings=tuple(findings))


# --- what is compared ---------------------------------------------------------------------------

Text = tuple[str, str]  # prompt and one answer


@dataclass(frozen=True)
class _Item:
    """A row with what it is compared by."""

    row: DataRow
    key: str
    prompt: str

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.row.chosen, self.row.rejected) if isinstance(self.row, Pair) else (self.row.completion,)

    @cached_property
    def raw(self) -> tuple[Text, ...]:
        return tuple((self.prompt, answer) for answer in self.answers)

    @cached_property
    def folded(self) -> tuple[Text, ...]:
        return tuple((self.key, fold(answer)) for answer in self.answers)


class _Table:
    """A set's rows, indexed."""

    def __init__(self, name: str, rows: Sequence[DataRow]) -> None:
        self.name, self.rows = name, rows
        self.items = [_Item(row, prompt_key(row.prompt), _asked(row)) for row in rows]
        self.keys = {item.key for item in self.items}
        self.raw = {text for item in self.items for text in item.raw}
        self.folded = {text for item in self.items for text in item.folded}
        exact: dict[tuple[Text, ...], _Item] = {}
        alike: dict[tuple[Text, ...], _Item] = {}
        self.repeated, self.repeated_folded = [], []
        for item in self.items:
            if exact.setdefault(item.raw, item) is not item:
                self.repeated.append(item)
            elif alike.setdefault(item.folded, item) is not item:
                self.repeated_folded.append(item)
        distinct = list(alike.values())
        prints = [fingerprint(item.key, fold(item.prompt), [text[1] for text in item.folded]) for item in distinct]
        found = near_labels(prints, [1] * len(distinct))
        self.near = [item for item, near in zip(distinct, found, strict=True) if near]


def _asked(row: DataRow) -> str:
    """Return the user's turns, which are what makes two prompts the same."""
    return "\n\n".join(turn.content for turn in row.prompt if turn.role == "user")


def _near(tables: Mapping[str, _Table]) -> dict[Text, set[str]]:
    """Return the names of the sets in which a text has a near-duplicate, for those that have one."""
    names = list(tables)
    masks: dict[Text, int] = defaultdict(int)
    prints = {}
    for bit, table in enumerate(tables.values()):
        for item in table.items:
            for text in item.folded:
                masks[text] |= 1 << bit
                if text not in prints:
                    prints[text] = fingerprint(item.key, fold(item.prompt), [text[1]])
    found = near_labels(list(prints.values()), [masks[text] for text in prints])
    return {
        text: {name for bit, name in enumerate(names) if mask >> bit & 1}
        for text, mask in zip(prints, found, strict=True)
        if mask
    }


def _overlaps(first: _Table, second: _Table, near: Mapping[Text, set[str]]) -> list[Overlap]:
    by_level: dict[Level, list[str]] = {level: [] for level in LEVELS}
    for item in first.items:
        if not second.raw.isdisjoint(item.raw):
            by_level["exact"].append(item.row.id)
        elif not second.folded.isdisjoint(item.folded):
            by_level["folded"].append(item.row.id)
        elif any(second.name in near.get(text, ()) for text in item.folded):
            by_level["near"].append(item.row.id)
        elif item.key in second.keys:
            by_level["prompt"].append(item.row.id)
    return [
        Overlap(first=first.name, second=second.name, level=level, count=len(ids), examples=tuple(ids[:3]))
        for level, ids in by_level.items()
        if ids
    ]


# --- findings -----------------------------------------------------------------------------------


def _finding(severity: Severity, check: str, text: str, rows: Sequence[DataRow]) -> Finding:
    some = rows[:3]
    ids, places = tuple(row.id for row in some), tuple(row.source for row in some if row.source)
    return Finding(severity=severity, check=check, text=text, count=len(rows), examples=ids, places=places)


def _health(table: _Table, measured: Sequence[Measured]) -> SetHealth:
    return SetHealth(
        name=table.name,
        rows=len(table.rows),
        prompts=len(table.keys),
        repeated=len(table.repeated),
        repeated_folded=len(table.repeated_folded),
        near=len(table.near),
        unit=measured[0].unit,
        cut=sum(item.n_cut > 0 for item in measured) if measured[0].unit == "tokens" else None,
        lengths=tuple(item.length for item in measured if item.length is not None),
    )


def _repeats(table: _Table) -> list[Finding]:
    found: list[tuple[Severity, str, str, list[_Item]]] = [
        ("warning", "repeated", "repeat an earlier row (remove them: a repeated row counts twice)", table.repeated),
        ("warning", "repeated", "repeat an earlier row but for case and spacing (remove them)", table.repeated_folded),
        ("note", "near-duplicates", "have a near-duplicate in the same set (they share their influence)", table.near),
    ]
    return [
        _finding(severity, check, f"{table.name}: {_rows(len(items))} {text}", [item.row for item in items])
        for severity, check, text, items in found
        if items
    ]


def _overlap_finding(overlap: Overlap, first: _Table, allow_leak: bool) -> Finding:
    sides = {overlap.first, overlap.second}
    places = {row.id: row.source for row in first.rows}
    severity: Severity = "warning" if sides & set(HELD_OUT) or sides == {"forget", "preference"} else "note"
    remedy = "remove them from one of both"
    if overlap.second == "evaluation" and overlap.level in LEAKS:
        severity = "warning" if allow_leak else "error"
        remedy = "allowed by data.allow_leak" if allow_leak else f"{remedy}, or set data.allow_leak=true"
    text = f"{overlap.first}, {overlap.second}: {_rows(overlap.count)} of {overlap.first} {LEVELS[overlap.level]}"
    return Finding(
        severity=severity,
        check="overlap",
        text=f"{text} ({remedy})",
        count=overlap.count,
        examples=overlap.examples,
        places=tuple(places[row_id] for row_id in overlap.examples if places[row_id]),
    )


def _contradictions(tables: Iterable[_Table]) -> list[Finding]:
    """Find answers that are good in one place and bad in another one, under the same turns."""
    good: dict[str, dict[str, DataRow]] = {}
    bad: dict[str, dict[str, DataRow]] = {}
    for table in tables:
        for item in table.items:
            if isinstance(item.row, Pair):
                good.setdefault(table.name, {})[answer_key(item.row.prompt, item.row.chosen)] = item.row
                bad.setdefault(table.name, {})[answer_key(item.row.prompt, item.row.rejected)] = item.row
            elif table.name in (*GOOD, *BAD):
                (good if table.name in GOOD else bad).setdefault(table.name, {})[
                    answer_key(item.row.prompt, item.row.completion)
                ] = item.row
    findings = []
    for here, texts in good.items():
        for there, others in bad.items():
            rows = [row for text, row in texts.items() if text in others]
            where = (
                f"good in {here} and bad in {there}" if here != there else f"good in one row of {here}, bad in another"
            )
            if rows:
                count = f"{len(rows)} answer{'s are' if len(rows) > 1 else ' is'}"
                findings.append(_finding("warning", "contradiction", f"{count} {where} (decide which)", rows))
    return findings


def _lengths(table: _Table, measured: Sequence[Measured]) -> list[Finding]:
    found: list[tuple[Severity, str, str, list[DataRow]]] = [
        (
            "error",
            "too long",
            "rows whose prompt leaves no room for an answer (raise data.max_length, or leave them out)",
            _distinct(item.row for item in measured if item.state == "no room"),
        ),
        (
            "error",
            "template",
            "rows that the chat template refuses (use only the roles it knows, or another model)",
            _distinct(item.row for item in measured if item.state == "refused"),
        ),
        (
            "warning",
            "cut",
            "rows with an answer cut at data.max_length, so without an end token (raise it, or leave them out)",
            _distinct(item.row for item in measured if item.n_cut),
        ),
        (
            "warning",
            "special tokens",
            "rows whose text holds special tokens of the model written out (remove them: they can fake a turn)",
            _distinct(item.row for item in measured if item.holds_special),
        ),
    ]
    return [
        _finding(severity, check, f"{table.name}: {len(rows)} {text}", rows)
        for severity, check, text, rows in found
        if rows
    ]


def _distinct(rows: Iterable[DataRow]) -> list[DataRow]:
    """Return each row object once (a pair is measured twice)."""
    return list({id(row): row for row in rows}.values())


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
