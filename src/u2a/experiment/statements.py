"""Verdicts on statements that the protocol declares beforehand, such as the claims of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from u2a.experiment.cell import LevelResult
from u2a.experiment.contrasts import ContrastFigures
from u2a.experiment.estimates import BY_PROMPT, Cells
from u2a.experiment.measured import Measured
from u2a.experiment.protocol import Protocol, StatementSection
from u2a.record import Row

Finding = Literal["shown", "not shown", "refuted", "not run"]


class Verdict(Row):
    """What the experiment says of one statement.

    Attributes:
        name: of the statement.
        text: the statement.
        finding: ``shown``, ``not shown`` or ``refuted``, at this scale; ``not run`` where there is nothing to judge by.
        why: the figures behind it, in one line.
    """

    name: str
    text: str
    finding: Finding
    why: str


def judge(protocol: Protocol, cells: Cells, contrasts: Sequence[ContrastFigures]) -> tuple[Verdict, ...]:
    """Judge every statement by the rule it was declared with.

    Args:
        protocol: its statements.
        cells: what was found.
        contrasts: of all families.

    Returns:
        In the order of the protocol.
    """
    out = []
    for name, section in protocol.statements.items():
        if section.rule == "cheaper":
            finding, why = _cheaper(section, protocol, cells)
        else:
            rows = [row for row in contrasts if row.family == section.family]
            wanted = section.contrasts
            chosen = rows if wanted is None else [row for row in rows if (row.first, row.second) in wanted]
            finding, why = _by_contrasts(section, chosen)
        out.append(Verdict(name=name, text=section.text, finding=finding, why=why))
    return tuple(out)


def _by_contrasts(section: StatementSection, rows: Sequence[ContrastFigures]) -> tuple[Finding, str]:
    """``better``: every contrast is; ``not_worse``: every one is better or equivalent; one that is worse refutes."""
    verdicts = [row.verdict for row in rows]
    wanted = {"better"} if section.rule == "better" else {"better", "equivalent"}
    parts = [f"{row.task}: {row.first} - {row.second} {row.verdict}" for row in rows]
    why = "; ".join(parts) or "no contrast"
    if set(verdicts) <= {"not run"}:
        return "not run", why
    if "worse" in verdicts:
        return "refuted", why
    return ("shown" if rows and set(verdicts) <= wanted else "not shown"), why


def _cheaper(section: StatementSection, protocol: Protocol, cells: Cells) -> tuple[Finding, str]:
    """Whether the first arm reaches what the second one has in the end with at most a share of what that one spent."""
    first, second = section.arms
    read = BY_PROMPT[section.metric]
    shares: list[float | None] = []
    known: list[str] = []
    for task in protocol.tasks:
        ends = {cell.seed: cell.levels[-1] for cell in cells.of(task, second) if cell.status == "ok"}
        for cell in cells.of(task, first):
            start = cells.starts.get((task, cell.seed))
            if cell.status != "ok" or cell.seed not in ends or start is None:
                continue

            def mean(measured: Measured, task: str = task, seed: int = cell.seed) -> float:
                return fmean(cells.prompts(task, seed, dict(read(measured))).values())

            end = ends[cell.seed]  # points that were measured count, and nothing between them
            target = mean(end.measured)
            if target <= mean(start):
                known.append(f"{second} gained nothing")
                continue
            there = [level for level in cell.levels if read(level.measured) and mean(level.measured) >= target]
            shares.append(_spent(section, there[0]) / _spent(section, end) if there else None)
            known.append("not reached" if shares[-1] is None else f"{shares[-1]:.2f}")
    within = [share is not None and share <= section.at_most for share in shares]
    unit = section.spent.replace("cpu_seconds", "CPU seconds")
    why = f"{first} needs this share of {second}'s {unit}, by seed: {', '.join(known) or 'no cell'}"
    if len(shares) < len(known) or not known:
        return "not shown" if known else "not run", why
    return ("shown" if all(within) else "not shown" if any(within) else "refuted"), why


def _spent(section: StatementSection, level: LevelResult) -> float:
    """What an arm had spent at a level."""
    return level.level if section.spent == "budget" else sum(level.spent.cpu_seconds.values())
