"""What the cells of an experiment say together: the figures of every arm, the contrasts, curves over the budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import numpy as np

from u2a.experiment.cell import CellResult
from u2a.experiment.contrasts import ContrastFigures, family_contrasts
from u2a.experiment.estimates import (
    BY_PROMPT,
    BY_SEED,
    PROMPT_METRICS,
    Cells,
    Figure,
    figure_by_prompt,
    figure_by_seed,
    values_of,
)
from u2a.experiment.frozen import Replaced
from u2a.experiment.measured import retain_ppl
from u2a.experiment.protocol import Protocol
from u2a.experiment.tuning import Tuned
from u2a.record import Record, Row


class LevelFigures(Row):
    """An arm at one level.

    Attributes:
        level: in units of one GA pass over all candidates.
        n_reached: seeds that spent so much.
        n_untrained: seeds whose policy still stood at the start (all was spent on choosing).
        n_collapsed: seeds whose answers were those of a collapsed model.
        metrics: figure by metric.
    """

    level: float
    n_reached: int
    n_untrained: int
    n_collapsed: int
    metrics: dict[str, Figure]


class ArmFigures(Row):
    """One arm on one task.

    Attributes:
        arm, method, track: which.
        n_seeds: seeds whose cell came through.
        failed: one line for every cell that did not.
        notes: what the cells say of themselves, with the number of seeds.
        fallbacks: seeds by what was done instead of ranking.
        split_half: mean reliability of the gains it ranked by, or None.
        selected: fewest, mean and most candidates it gave a weight to, or None for an arm that chooses nothing.
        phases: mean FLOPs by phase of the whole cell.
        phase_passes: the same in units of the budget, each seed's own.
        phase_seconds: mean wall seconds by phase.
        chosen_at: mean budget that choosing takes, up to which the policy stands at the start.
        area: mean preference margin over the start's, averaged over the budget from 0 to the last level of all arms.
        start: figures of the start by metric, over the arm's own seeds.
        levels: by level.
    """

    arm: str
    method: str
    track: str
    n_seeds: int
    failed: tuple[str, ...] = ()
    notes: dict[str, int] = {}
    fallbacks: dict[str, int] = {}
    split_half: float | None = None
    selected: tuple[int, float, int] | None = None
    phases: dict[str, float] = {}
    phase_passes: dict[str, float] = {}
    phase_seconds: dict[str, float] = {}
    chosen_at: float = 0.0
    area: float | None = None
    start: dict[str, Figure] = {}
    levels: tuple[LevelFigures, ...] = ()


class TaskFigures(Row):
    """One task.

    Attributes:
        start: figures of the start (the policy before any arm), by metric.
        arms: in the order of the protocol.
        unit_flops: mean FLOPs of one unit of the budget.
    """

    start: dict[str, Figure]
    arms: tuple[ArmFigures, ...]
    unit_flops: float | None


class ExperimentFigures(Record):
    """Everything the cells of one experiment say.

    Attributes:
        protocol: hash of the protocol that was fixed before the first cell.
        seeds: of the main runs.
        tasks: by name.
        contrasts: in the order of the protocol.
        missing: cells that have not been run, by name.
        tuning: which trial was chosen for every tuned arm.
        replaced: protocols that stood there before, oldest first.
        machines, libraries, codes: that ran the main cells, by how many each; under an empty name those that do not
            say.
    """

    protocol: str
    seeds: tuple[int, ...]
    tasks: dict[str, TaskFigures]
    contrasts: tuple[ContrastFigures, ...]
    missing: tuple[str, ...] = ()
    tuning: tuple[Tuned, ...] = ()
    replaced: tuple[Replaced, ...] = ()
    machines: dict[str, int] = {}
    libraries: dict[str, int] = {}
    codes: dict[str, int] = {}


def analyse(protocol: Protocol, protocol_hash: str, cells: Cells, missing: Sequence[str] = ()) -> ExperimentFigures:
    """Compute every table of an experiment.

    Args:
        protocol: what was declared.
        protocol_hash: of it.
        cells: what was found.
        missing: names of cells that have not been run.

    Returns:
        All figures; contrasts corrected within their families.

    Raises:
        ConfigError: the seeds of a task did not measure the same prompts.
    """
    tasks = {task: _task(protocol, cells, task) for task in protocol.tasks}
    contrasts = [
        row for name, family in protocol.families.items() for row in family_contrasts(name, family, protocol, cells)
    ]
    return ExperimentFigures(
        protocol=protocol_hash,
        seeds=tuple(protocol.seeds),
        tasks=tasks,
        contrasts=tuple(contrasts),
        missing=tuple(missing),
        machines=dict(sorted(Counter(cell.machine for cell in cells.results).items())),
        libraries=dict(sorted(Counter(cell.libraries for cell in cells.results).items())),
        codes=dict(sorted(Counter(cell.code for cell in cells.results).items())),
    )


def _task(protocol: Protocol, cells: Cells, task: str) -> TaskFigures:
    units = {cell.seed: float(cell.unit_flops) for cell in cells.results if cell.task == task}
    arms = tuple(_arm(protocol, cells, task, arm) for arm in protocol.arms if task in protocol.tasks_of(arm))
    return TaskFigures(
        start=_start(cells, task, {seed for name, seed in cells.starts if name == task}),
        arms=arms,
        unit_flops=fmean(units.values()) if units else None,
    )


def _start(cells: Cells, task: str, seeds: Collection[int]) -> dict[str, Figure]:
    """Figures of the start over some seeds."""
    starts = {seed: cells.starts[task, seed] for seed in sorted(seeds) if (task, seed) in cells.starts}
    figures = {
        metric: figure_by_prompt(
            {seed: cells.prompts(task, seed, read(found)) for seed, found in starts.items()}, metric
        )
        for metric, read in BY_PROMPT.items()
    }
    figures["retain_ppl"] = figure_by_seed([retain_ppl(found) for found in starts.values()], "retain_ppl")
    return {name: figure for name, figure in figures.items() if figure.value is not None}


def _arm(protocol: Protocol, cells: Cells, task: str, arm: str) -> ArmFigures:
    found = cells.of(task, arm)
    fine = [cell for cell in found if cell.status == "ok"]
    halves = [cell.reliability.split_half for cell in fine if cell.reliability is not None]
    defined = [value for value in halves if value is not None]
    sizes = [len(cell.weights) for cell in fine if cell.weights is not None]
    return ArmFigures(
        arm=arm,
        method=protocol.arms[arm].method,
        track=found[0].track if found else "none",
        n_seeds=len(fine),
        failed=tuple(f"seed {cell.seed}: {cell.status}: {cell.error}" for cell in found if cell.status != "ok"),
        notes=dict(Counter(cell.note for cell in fine if cell.note)),
        fallbacks=dict(Counter(cell.fallback for cell in fine if cell.weights is not None)),
        split_half=fmean(defined) if defined else None,
        selected=(min(sizes), fmean(sizes), max(sizes)) if sizes else None,
        phases=_mean_by_name([cell.spent.flops for cell in fine]),
        phase_passes=_mean_by_name(
            [{name: flops / cell.unit_flops for name, flops in cell.spent.flops.items()} for cell in fine]
        ),
        phase_seconds=_mean_by_name([cell.spent.seconds for cell in fine]),
        chosen_at=fmean(map(_chosen_at, fine)) if fine else 0.0,
        start=_start(cells, task, {cell.seed for cell in fine}),
        area=_area(cells, task, fine, min(protocol.levels_of(name)[-1] for name in protocol.arms)),
        levels=tuple(_level(cells, task, fine, k) for k in range(len(protocol.levels_of(arm)))) if fine else (),
    )


def _level(cells: Cells, task: str, fine: Sequence[CellResult], k: int) -> LevelFigures:
    at = {cell.seed: cell.levels[k] for cell in fine}
    metrics: dict[str, Figure] = {}
    for metric in PROMPT_METRICS:
        values = {seed: cells.prompts(task, seed, values_of(metric, found)) for seed, found in at.items()}
        metrics[metric] = figure_by_prompt(values, metric)
    metrics |= {
        metric: figure_by_seed([read(found) for found in at.values()], metric) for metric, read in BY_SEED.items()
    }
    metrics["passes"] = figure_by_seed([cell.levels[k].spent.total_flops / cell.unit_flops for cell in fine])
    return LevelFigures(
        level=fine[0].levels[k].level,
        n_reached=sum(found.reached for found in at.values()),
        n_untrained=sum(found.untrained for found in at.values()),
        n_collapsed=sum(bool(found.measured.collapsed) for found in at.values()),
        metrics={name: figure for name, figure in metrics.items() if figure.value is not None},
    )


def _area(cells: Cells, task: str, fine: Sequence[CellResult], last: float) -> float | None:
    """Mean over seeds of the preference margin's rise over the start, averaged over the budget up to a level."""
    areas = []
    for cell in fine:
        begin = cells.starts.get((task, cell.seed))
        if begin is None or not begin.margin:
            return None
        base = fmean(cells.prompts(task, cell.seed, begin.margin).values())
        points = [(0.0, 0.0), (min(last, _chosen_at(cell)), 0.0)]
        for found in (level for level in cell.levels if level.level <= last):
            mean = fmean(cells.prompts(task, cell.seed, found.measured.margin).values())
            points.append((found.level, mean - base))
        areas.append(area(sorted(points)))
    return fmean(areas) if areas else None


def _chosen_at(cell: CellResult) -> float:
    """Budget that choosing takes; the arm trains after it."""
    return cell.spent.flops.get("select", 0) / cell.unit_flops


def area(points: Sequence[tuple[float, float]]) -> float:
    """Mean height of a broken line over its whole width.

    Args:
        points: (x, y), x rising, at least two.

    Returns:
        The integral by trapezoids divided by the width.

    >>> area([(0.0, 0.0), (1.0, 2.0), (3.0, 2.0)])
    1.6666666666666667
    """
    pieces = zip(points, points[1:], strict=False)
    total = math.fsum((right - left) * (low + high) / 2 for (left, low), (right, high) in pieces)
    return total / (points[-1][0] - points[0][0])


def break_even(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float | None:
    """The budget from which one curve is above another one and stays so, by straight lines between their points.

    Args:
        first: (budget, value), budgets not falling, from and to the same budgets as the second one.
        second: the same.

    Returns:
        The budget; None when the first curve is not above the second one at the end.

    >>> break_even([(0.0, 0.0), (2.0, 0.0), (4.0, 3.0)], [(0.0, 0.0), (2.0, 1.0), (4.0, 2.0)])
    3.0
    >>> break_even([(0.0, 0.0), (1.0, 0.0), (4.0, 3.0)], [(0.0, 0.0), (4.0, 2.0)])
    2.0
    """
    budgets = sorted({at for at, _ in (*first, *second)})
    leads = [(at, _height(first, at) - _height(second, at)) for at in budgets]
    if leads[-1][1] <= 0.0:
        return None
    behind = max((index for index, (_, lead) in enumerate(leads) if lead <= 0.0), default=None)
    if behind is None:
        return leads[0][0]
    (left, low), (right, high) = leads[behind], leads[behind + 1]
    return left + (right - left) * -low / (high - low)


def _height(points: Sequence[tuple[float, float]], at: float) -> float:
    """Value of a broken line at a budget."""
    return float(np.interp(at, [budget for budget, _ in points], [value for _, value in points]))


def _mean_by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(float(row.get(name, 0.0)) for row in rows) for name in names}
