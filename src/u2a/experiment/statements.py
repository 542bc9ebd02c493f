"""Verdicts on statements that the protocol declares beforehand, such as the claims of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from u2a.evaluation.significance import sign_flip_test
from u2a.experiment.cell import CellResult, LevelResult
from u2a.experiment.contrasts import ContrastFigures
from u2a.experiment.estimates import BY_PROMPT, EQUAL, Cells, measured_for, values_of
from u2a.experiment.measured import Measured
from u2a.experiment.protocol import Protocol
from u2a.experiment.protocol_sections import StatementSection
from u2a.record import Row

Finding = Literal["shown", "not shown", "refuted", "unfinished", "not run"]


class Verdict(Row):
    """What the experiment says of one statement.

    Attributes:
        name: of the statement.
        text: the statement.
        finding: ``shown``, ``not shown`` or ``refuted``, at this scale; ``unfinished`` where declared seeds are
            still to be run, ``not run`` where there is nothing to judge by.
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
            finding, why = _by_contrasts(section, chosen, protocol)
        out.append(Verdict(name=name, text=section.text, finding=finding, why=why))
    return tuple(out)


def _by_contrasts(
    section: StatementSection, rows: Sequence[ContrastFigures], protocol: Protocol
) -> tuple[Finding, str]:
    """``better``: every contrast is; ``not_worse``: every one is better or equivalent; one that is worse refutes.

    Against the original an arm must be better in any case: one that does nothing is no success.

    Returns:
        The finding and the figures behind it.
    """
    verdicts = [row.verdict for row in rows]
    strict = [section.rule == "better" or protocol.arms[row.second].method == "original" for row in rows]
    good = all(
        row.verdict == "better" or (row.verdict == "equivalent" and not must)
        for row, must in zip(rows, strict, strict=True)
    )
    parts = [f"{row.task}: {row.first} - {row.second} {row.verdict}" for row in rows]
    why = "; ".join(parts) or "no contrast"
    if set(verdicts) <= {"not run"}:
        return "not run", why
    if set(verdicts) & {"unfinished", "not run"}:
        return "unfinished", why
    if "worse" in verdicts:
        return "refuted", why
    return ("shown" if rows and good else "not shown"), why


def _cheaper(section: StatementSection, protocol: Protocol, cells: Cells) -> tuple[Finding, str]:
    """Whether the first arm reaches what the second one has in the end with at most a share of what that one spent.

    Seeds that agree are a sign test: with fewer than six there is no verdict. A seed counts once on however many tasks
    it was run.

    Returns:
        The finding and the figures behind it.
    """
    found: list[tuple[bool | None, str]] = []
    judged: set[int] = set()
    missing = lost = 0
    tasks = [task for task in protocol.tasks if all(task in protocol.tasks_of(arm) for arm in section.arms)]
    for task in tasks:
        sides = [{cell.seed: cell for cell in cells.of(task, arm)} for arm in section.arms]
        seeds = [protocol.seeds_of(arm, task) for arm in section.arms]
        for seed in min(seeds, key=len):  # both are the first ones of the same list
            both = [side.get(seed) for side in sides]
            start = cells.starts.get((task, seed))
            if both[0] is None or both[1] is None or start is None:
                missing += 1
            elif both[0].status != "ok" or both[1].status != "ok":
                lost += 1
            else:
                judged.add(seed)
                found.append(_share(section, cells, start, both[0], both[1]))
    parts = [text for _, text in found] + [f"{lost} failed"] * bool(lost) + [f"{missing} not run"] * bool(missing)
    unit = section.spent.replace("cpu_seconds", "CPU seconds")
    first, second = section.arms
    why = f"{first} needs this share of {second}'s {unit}, by seed: {', '.join(parts) or 'no cell'}"
    if missing or not parts:
        return ("unfinished" if found or lost else "not run"), why
    within = {answer for answer, _ in found}
    if lost or None in within or len(within) != 1:
        return "not shown", why
    p = sign_flip_test({str(seed): 1.0 for seed in judged}).p
    if p is None or p > 0.05:
        return "not shown", f"{why} (too few seeds for a verdict)"
    return ("shown" if within == {True} else "refuted"), why


def _share(
    section: StatementSection, cells: Cells, start: Measured, first: CellResult, second: CellResult
) -> tuple[bool | None, str]:
    """Whether the share is small enough on one seed (None: the measured points do not tell), and what it is.

    What the second arm spent counts up to the first point at which it had what it has in the end: waiting longer does
    not make the first one cheaper. Points that were measured count, and nothing between them; where the last point of
    the first arm before it reaches the target is still within the share, nothing is known.

    Returns:
        The answer and the share. What a collapsed model reaches is nothing to reach, and has not been reached by it:
        where the second arm ends so, the answer is None, and other points of such models do not count.
    """

    def mean(values: Mapping[str, float]) -> float:
        return fmean(cells.prompts(first.task, first.seed, dict(values)).values())

    if second.levels and _broken(section.metric, second.levels[-1]):
        return None, f"{second.arm} collapsed"
    found = [
        [
            (mean(values), level)
            for level in cell.levels
            if (values := values_of(section.metric, level)) and not _broken(section.metric, level)
        ]
        for cell in (first, second)
    ]
    if not all(found):
        return None, "not measured"
    target = found[1][-1][0]
    if target <= mean(BY_PROMPT[section.metric.removesuffix(EQUAL)](start)):
        return None, f"{second.arm} gained nothing"
    needed = _spent(section, next(level for value, level in found[1] if value >= target))
    shares = [_spent(section, level) / needed for _, level in found[0]]
    at = next((k for k, (value, _) in enumerate(found[0]) if value >= target), None)
    if at is None:
        return (False if shares and shares[-1] >= section.at_most else None), "not reached"
    if shares[at] <= section.at_most:
        return True, f"{shares[at]:.2f}"
    before = shares[at - 1] if at else 0.0
    return (False if before >= section.at_most else None), f"{before:.2f} to {shares[at]:.2f}"


def _broken(metric: str, level: LevelResult) -> bool:
    """Whether the policy that was measured for a metric had collapsed."""
    found = measured_for(metric, level)
    return found is not None and bool(found.collapsed)


def _spent(section: StatementSection, level: LevelResult) -> float:
    """What an arm had spent at a level."""
    return level.level if section.spent == "budget" else sum(level.spent.cpu_seconds.values())
