"""Verdicts on statements that the protocol declares beforehand, such as the claims of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from u2a.experiment.analysis import budget_to_reach
from u2a.experiment.cell import LevelResult
from u2a.experiment.contrasts import ContrastFigures
from u2a.experiment.estimates import BY_PROMPT, Cells
from u2a.experiment.protocol import Protocol, StatementSection
from u2a.record import Row

Finding = Literal["shown", "not shown", "refuted"]


class Verdict(Row):
    """What the experiment says of one statement.

    Attributes:
        name: of the statement.
        text: the statement.
        finding: ``shown``, ``not shown`` or ``refuted``, at this scale.
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
    if "worse" in verdicts:
        return "refuted", why
    return ("shown" if rows and set(verdicts) <= wanted else "not shown"), why


def _cheaper(section: StatementSection, protocol: Protocol, cells: Cells) -> tuple[Finding, str]:
    """Whether the first arm reaches what the second one has in the end with at most a share of its budget."""
    first, second = section.arms
    shares: list[float | None] = []
    for task in protocol.tasks:
        ends = {cell.seed: cell for cell in cells.of(task, second) if cell.status == "ok"}
        for cell in cells.of(task, first):
            start = cells.starts.get((task, cell.seed))
            if cell.status != "ok" or cell.seed not in ends or start is None:
                continue
            read = BY_PROMPT[section.metric]

            def mean(values: dict[str, float], task: str = task, seed: int = cell.seed) -> float:
                return fmean(cells.prompts(task, seed, values).values())

            end = ends[cell.seed].levels[-1]
            target = mean(dict(read(end.measured)))
            curve = [(0.0, mean(dict(read(start))))]
            measured = [level for level in cell.levels if read(level.measured)]
            curve += [(_spent(section, level), mean(dict(read(level.measured)))) for level in measured]
            reached = budget_to_reach(curve, target)
            shares.append(None if reached is None else reached / _spent(section, end))
    within = [share is not None and share <= section.at_most for share in shares]
    known = [f"{share:.2f}" if share is not None else "not reached" for share in shares]
    unit = section.spent.replace("cpu_seconds", "CPU seconds")
    why = f"{first} needs this share of {second}'s {unit}, by seed: {', '.join(known) or 'no cell'}"
    if shares and all(within):
        return "shown", why
    return ("refuted" if shares and not any(within) else "not shown"), why


def _spent(section: StatementSection, level: LevelResult) -> float:
    """What an arm had spent at a level."""
    return level.level if section.spent == "budget" else sum(level.spent.cpu_seconds.values())
