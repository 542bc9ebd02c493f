"""What the data doctor found, as a record that can be saved, printed and acted upon."""

from __future__ import annotations

from typing import Literal

from u2a.errors import DataError
from u2a.record import Record, Row
from u2a.terminal import escaped

Severity = Literal["error", "warning", "note"]
Level = Literal["exact", "folded", "near", "prompt"]
Unit = Literal["tokens", "words"]


class Finding(Row):
    """One thing found.

    Attributes:
        severity: ``error`` stops the run, ``warning`` may spoil its result, ``note`` is worth knowing.
        check: short name of the check.
        text: what was found, how often, and what to do.
        count: rows concerned (0 where no row is).
        examples: ids of up to three of them.
        places: their ``file:line``.
    """

    severity: Severity
    check: str
    text: str
    count: int = 0
    examples: tuple[str, ...] = ()
    places: tuple[str, ...] = ()


class Overlap(Row):
    """Rows of one set that stand in a later one too; every row counts once, at the first level that holds.

    Attributes:
        first, second: the sets.
        level: ``exact`` (prompt and answer, character by character), ``folded`` (but for case and spacing), ``near``
            (near-duplicate), ``prompt`` (same prompt after folding, other answers).
        count: rows of ``first`` concerned.
        examples: ids of up to three of them.
    """

    first: str
    second: str
    level: Level
    count: int
    examples: tuple[str, ...]


class SetHealth(Row):
    """One set by itself.

    Attributes:
        name: the set.
        rows, prompts: rows, and prompts that differ after folding.
        repeated: rows that repeat an earlier one exactly.
        repeated_folded: further rows that repeat an earlier one but for case and spacing.
        near: rows, repeats aside, that have a near-duplicate among the others.
        unit: what lengths count: ``tokens`` of the rendered conversation, or ``words`` without a tokenizer.
        cut: answers cut at the maximum length, or None without a tokenizer.
        lengths: length of prompt and answer together before any cut, one per answer, in the order of the rows.
    """

    name: str
    rows: int
    prompts: int
    repeated: int
    repeated_folded: int
    near: int
    unit: Unit
    cut: int | None
    lengths: tuple[int, ...]


class Diagnosis(Record):
    """What the doctor found.

    Attributes:
        sets: every set that has rows.
        overlaps: between the sets.
        findings: errors first, then warnings, then notes.
    """

    sets: tuple[SetHealth, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def n_cut(self) -> int | None:
        """Answers cut at the maximum length in all sets that were tokenized; None when none was."""
        cuts = [item.cut for item in self.sets if item.cut is not None]
        return sum(cuts) if cuts else None

    def lines(self) -> list[str]:
        """Describe the findings for the console.

        Returns:
            One line per finding, safe to print whatever the data hold.
        """
        if not self.findings:
            return ["nothing found"]
        lines = []
        for item in self.findings:
            some = ", ".join(item.places or item.examples) + (", ..." if item.count > len(item.examples) else "")
            lines.append(escaped(f"{item.severity}: {item.text}" + (f" [{some}]" if item.examples else "")))
        return lines

    def refuse(self) -> None:
        """Stop where something makes the run's result worthless.

        Raises:
            DataError: every finding of severity ``error``.
        """
        errors = [line.removeprefix("error: ") for line in self.lines() if line.startswith("error: ")]
        if errors:
            raise DataError(errors)
