"""Contrasts of two arms over seeds and prompts, as declared beforehand, corrected within their families."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from u2a.evaluation.significance import equivalence, holm, sign_flip_test, within_margin
from u2a.experiment.cell import LevelResult
from u2a.experiment.estimates import (
    BY_SEED,
    EQUAL,
    LOWER_IS_BETTER,
    PROMPT_METRICS,
    Cells,
    crossed,
    measured_for,
    t_interval,
    values_of,
)
from u2a.experiment.protocol import Protocol
from u2a.experiment.protocol_sections import FamilySection
from u2a.record import Row


class ContrastFigures(Row):
    """First arm minus second, over the seeds both have.

    Attributes:
        family, task, metric, level, first, second: which comparison.
        difference: mean; interval in ``low`` and ``high`` (95 %).
        n_seeds, n_prompts: what it rests on.
        n_lost: seeds that it does not rest on although they were run, since a side failed or diverged.
        n_missing: declared seeds that a side has not been run with.
        n_untrained: of ``n_seeds``, those in which the first and in which the second arm stood at the start.
        n_collapsed: the same, in which they had collapsed as far as their answers tell.
        p: two-sided p-value of flipping the signs of whole seeds; never below 2^(1 - n_seeds).
        p_holm: the same, corrected over all tests of the family.
        margin: largest difference that does not matter, declared beforehand, or None.
        equivalent: whether two one-sided tests over seeds show the difference to be within it, and so does the 90 %
            interval over seeds and prompts where prompts are the unit; None without.
        verdict: ``better``, ``worse`` (the interval excludes 0 and p_holm <= 0.05), ``equivalent``, ``not shown``,
            ``unfinished`` (some declared seeds have not been run: no verdict is taken on the way), or ``not run``.
            Nothing is shown where seeds were lost, or by an arm that nothing was done to in any seed, or that collapsed
            in one.
    """

    family: str
    task: str
    metric: str
    level: float
    first: str
    second: str
    difference: float | None
    low: float | None
    high: float | None
    n_seeds: int
    n_prompts: int | None
    n_lost: int
    n_missing: int
    n_untrained: tuple[int, int]
    n_collapsed: tuple[int, int] = (0, 0)
    p: float | None
    p_holm: float | None = None
    margin: float | None = None
    equivalent: bool | None = None
    verdict: str = "not run"


def family_contrasts(name: str, family: FamilySection, protocol: Protocol, cells: Cells) -> list[ContrastFigures]:
    """The contrasts of one family on each of its tasks that has both arms, corrected by Holm's procedure.

    Args:
        name: of the family.
        family: what it declares.
        protocol: tasks, arms and margins.
        cells: what was found.

    Returns:
        One row per contrast and task; a contrast that cannot be computed counts in the correction.
    """
    rows = []
    for task in protocol.tasks if family.tasks is None else family.tasks:
        for first, second in family.contrasts:
            if all(task in protocol.tasks_of(arm) for arm in (first, second)):
                rows.append(_contrast(name, protocol, task, (first, second), cells))
    adjusted = holm({str(k): row.p for k, row in enumerate(rows)})
    return [
        row.model_copy(update={"p_holm": adjusted[str(k)], "verdict": _verdict(row, adjusted[str(k)])})
        for k, row in enumerate(rows)
    ]


def _contrast(name: str, protocol: Protocol, task: str, arms: tuple[str, str], cells: Cells) -> ContrastFigures:
    family = protocol.families[name]
    margin = protocol.margins.get(family.metric)
    sides = [
        {cell.seed: level for cell in cells.of(task, arm) for level in cell.levels if level.level == family.level}
        for arm in arms
    ]
    ok = [{cell.seed for cell in cells.of(task, arm) if cell.status == "ok"} for arm in arms]
    run = {cell.seed for cell in cells.of(task, arms[0])} & {cell.seed for cell in cells.of(task, arms[1])}
    declared = set(protocol.seeds_of(arms[0], task)) & set(protocol.seeds_of(arms[1], task))
    seeds = sorted(sides[0].keys() & sides[1].keys() & ok[0] & ok[1])
    inside: bool | None = True  # where the seed is the unit there is one test
    if family.metric in PROMPT_METRICS:
        pairs = {
            seed: [cells.prompts(task, seed, values_of(family.metric, side[seed])) for side in sides] for seed in seeds
        }
        differences = {
            str(seed): {prompt: left[prompt] - right[prompt] for prompt in left.keys() & right.keys()}
            for seed, (left, right) in pairs.items()
        }
        differences = {seed: values for seed, values in differences.items() if values}
        interval = crossed(differences)
        means = {seed: fmean(values.values()) for seed, values in differences.items()}
        n_prompts: int | None = interval.n
        inside = None if margin is None else within_margin(crossed(differences, level=0.9), margin)
    else:
        values = {seed: [BY_SEED[family.metric](side[seed]) for side in sides] for seed in seeds}
        means = {
            str(seed): left - right for seed, (left, right) in values.items() if left is not None and right is not None
        }
        interval, n_prompts = t_interval(list(means.values())), None
    tost = None if margin is None or len(means) < 2 else equivalence(means, margin)
    return ContrastFigures(
        family=name,
        task=task,
        metric=family.metric,
        level=family.level,
        first=arms[0],
        second=arms[1],
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        n_seeds=len(means),
        n_prompts=n_prompts,
        n_lost=len(run) - len(means),
        n_missing=len(declared - run),
        n_untrained=(_untrained(family.metric, sides[0], means), _untrained(family.metric, sides[1], means)),
        n_collapsed=(_collapsed(family.metric, sides[0], means), _collapsed(family.metric, sides[1], means)),
        p=sign_flip_test(means).p if means else None,
        margin=margin,
        equivalent=None if tost is None or tost.equivalent is None or inside is None else tost.equivalent and inside,
    )


def _untrained(metric: str, side: Mapping[int, LevelResult], means: Mapping[str, float]) -> int:
    """On how many seeds a metric is that of the start; a change that was scaled to nothing is none."""
    undone = {
        seed: found.untrained
        or (metric.endswith(EQUAL) and found.equal is not None and found.equal.search.scale == 0.0)
        for seed, found in side.items()
    }
    return sum(undone[seed] for seed in undone if str(seed) in means)


def _collapsed(metric: str, side: Mapping[int, LevelResult], means: Mapping[str, float]) -> int:
    measured = {seed: measured_for(metric, found) for seed, found in side.items() if str(seed) in means}
    return sum(found is not None and bool(found.collapsed) for found in measured.values())


def _verdict(row: ContrastFigures, p_holm: float | None) -> str:
    if row.n_lost or not row.n_seeds:
        return "not shown" if row.n_lost else "not run"
    if row.n_missing:
        return "unfinished"
    if row.low is not None and row.high is not None and p_holm is not None and p_holm <= 0.05:
        lower = row.metric in LOWER_IS_BETTER
        side = "better" if (row.low > 0) != lower else "worse"
        winner = 0 if side == "better" else 1
        won = row.n_untrained[winner] < row.n_seeds and not row.n_collapsed[winner]
        if (row.low > 0 or row.high < 0) and won:
            return side
    alive = max(row.n_untrained) < row.n_seeds and not any(row.n_collapsed)
    return "equivalent" if row.equivalent and alive else "not shown"
