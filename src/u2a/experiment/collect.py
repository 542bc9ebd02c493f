"""What an experiment has so far, read back from its folder: cells, prompts and starts, and what is still missing."""

from __future__ import annotations

from pathlib import Path

from u2a.experiment.analysis import analyse
from u2a.experiment.cell import CellResult
from u2a.experiment.estimates import Cells
from u2a.experiment.frozen import FrozenProtocol, file_of, protocol_hash
from u2a.experiment.kept import CELLS, keep
from u2a.experiment.measured import Measured
from u2a.experiment.plan import Plan
from u2a.experiment.results import write_results
from u2a.experiment.statements import judge


def collect(plan: Plan) -> tuple[Cells, list[str]]:
    """Read the cells of the main seeds; tuning cells are left out.

    Args:
        plan: which cells there are.

    Returns:
        What was found, and the names of cells that have not been run.
    """
    results: list[CellResult] = []
    missing: list[str] = []
    groups: dict[tuple[str, int], dict[str, str]] = {}
    starts: dict[tuple[str, int], Measured] = {}
    for slot in plan.slots:
        if slot.seed in plan.protocol.tuning.seeds:
            continue
        cell, start = plan.cell(slot), plan.start(plan.place(slot))
        if cell is None or start is None or not plan.path(cell).exists():
            missing.append(f"{slot.task}.{slot.arm}.s{slot.seed}")
            continue
        results.append(CellResult.load(plan.path(cell)))
        groups[slot.task, slot.seed] = start.groups
        starts[slot.task, slot.seed] = start.measured
    return Cells(results, groups, starts), missing


def write_found(plan: Plan, folder: Path) -> tuple[Path, ...]:
    """Analyse what there is, write tables and figures, and keep the cells beside them.

    Args:
        plan: which cells there are.
        folder: where to.

    Returns:
        The files.
    """
    cells, missing = collect(plan)
    found = analyse(plan.protocol, protocol_hash(plan.protocol), cells, missing)
    path = file_of(plan.protocol)
    replaced = FrozenProtocol.load(path).replaced if path.exists() else ()
    tuned = tuple(plan.tuned(task, arm) for task, arm in _tuned_arms(plan))
    whole = tuple(choice for choice in tuned if choice is not None)
    found = found.model_copy(update={"tuning": whole, "replaced": replaced})
    files = write_results(plan.protocol, found, judge(plan.protocol, cells, found.contrasts), folder)
    return (*files, keep(plan, folder / CELLS))


def _tuned_arms(plan: Plan) -> list[tuple[str, str]]:
    arms = plan.protocol.arms
    return [
        (task, arm)
        for task, section in plan.protocol.tasks.items()
        for arm in arms
        if len(arms[arm].trials) > 1 and task in plan.protocol.tasks_of(arm) and section.tuned_on is None
    ]
