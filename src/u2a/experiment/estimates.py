"""Means over seeds and prompts of what cells measured, with intervals.

The unit is the prompt (values of one prompt are averaged first), crossed with the seed: every seed measures the same
prompts. Perplexity pools the tokens of its rows, so it has the seed as its unit, as compute has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import scipy.stats

from u2a.errors import ConfigError
from u2a.evaluation.stats import Interval, crossed_mean
from u2a.experiment.cell import CellResult, LevelResult
from u2a.experiment.measured import Measured, retain_ppl
from u2a.record import Row

BY_PROMPT: dict[str, Callable[[Measured], Mapping[str, float]]] = {
    "preference_margin": lambda found: found.margin,
    "preference_accuracy": lambda found: found.hit,
    "reward": lambda found: found.reward,
    "second_reward": lambda found: found.second_reward,
    "answer_words": lambda found: found.words,
    "refusal_rate": lambda found: found.refusal,
    "degenerate_rate": lambda found: found.degenerate,
}
BY_SEED: dict[str, Callable[[LevelResult], float | None]] = {
    "retain_ppl": lambda found: retain_ppl(found.measured),
    "scale_at_equal_ppl": lambda found: None if found.equal is None else found.equal.search.scale,
    "flops": lambda found: float(found.spent.total_flops),
    "seconds": lambda found: sum(found.spent.seconds.values()),
    "cpu_seconds": lambda found: sum(found.spent.cpu_seconds.values()),
    "peak_rss_bytes": lambda found: float(found.spent.peak_rss_bytes),
}
EQUAL = "_at_equal_ppl"  # ends the name of a metric that is measured with the change scaled to the utility budget
PROMPT_METRICS = (*BY_PROMPT, f"preference_margin{EQUAL}", f"reward{EQUAL}")
RANGES = {  # what intervals of means are cut to
    "preference_accuracy": (0.0, 1.0),
    "refusal_rate": (0.0, 1.0),
    "degenerate_rate": (0.0, 1.0),
    "answer_words": (0.0, math.inf),
    "retain_ppl": (1.0, math.inf),
    "scale_at_equal_ppl": (0.0, 1.0),
}
LOWER_IS_BETTER = ("degenerate_rate", *(name for name in BY_SEED if name != "scale_at_equal_ppl"))


class Figure(Row):
    """A mean over seeds with its interval.

    Attributes:
        value: the mean, or None where no seed has the value.
        low, high: ends of the 95 % interval, or None with fewer than two seeds or prompts.
        n_seeds: seeds that count.
        n_prompts: prompts of each, or None where the seed is the unit.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n_seeds: int = 0
    n_prompts: int | None = None


def values_of(metric: str, found: LevelResult) -> Mapping[str, float]:
    """Values of single items at a level.

    Args:
        metric: one of ``PROMPT_METRICS``.
        found: the level.

    Returns:
        Value by item id; empty where it was not measured.
    """
    measured = measured_for(metric, found)
    return {} if measured is None else BY_PROMPT[metric.removesuffix(EQUAL)](measured)


def measured_for(metric: str, found: LevelResult) -> Measured | None:
    """The measurement that a metric is read from.

    Args:
        metric: its name.
        found: the level.

    Returns:
        That of the policy with its change scaled to the utility budget, or None where there is none, for the metrics
        that ask for it; else that of the policy as it is.
    """
    return found.at_equal_ppl if metric.endswith(EQUAL) else found.measured


@dataclass(frozen=True)
class Cells:
    """The chosen cells of an experiment's test split.

    Attributes:
        results: all of them.
        groups: prompt by item id, by (task, seed).
        starts: measurement of the start by (task, seed).
    """

    results: Sequence[CellResult]
    groups: Mapping[tuple[str, int], Mapping[str, str]]
    starts: Mapping[tuple[str, int], Measured]

    def of(self, task: str, arm: str) -> list[CellResult]:
        """Cells of one arm on one task, by seed.

        Args:
            task: name.
            arm: name.

        Returns:
            In the order of the seeds, failed ones too.
        """
        found = [cell for cell in self.results if (cell.task, cell.arm) == (task, arm)]
        return sorted(found, key=lambda cell: cell.seed)

    def prompts(self, task: str, seed: int, values: Mapping[str, float]) -> dict[str, float]:
        """Average the values of every prompt.

        Args:
            task: name.
            seed: seed.
            values: by item id.

        Returns:
            Mean by prompt.
        """
        groups = self.groups[task, seed]
        gathered: defaultdict[str, list[float]] = defaultdict(list)
        for item, value in values.items():
            gathered[groups[item]].append(value)
        return {prompt: fmean(found) for prompt, found in gathered.items()}


def figure_by_prompt(values: Mapping[int, Mapping[str, float]], metric: str = "") -> Figure:
    """Mean over seeds and prompts.

    Args:
        values: by seed and prompt; seeds without any are left out.
        metric: which one; the interval of one of ``RANGES`` is cut to what it can be.

    Returns:
        The figure.
    """
    filled = {str(seed): dict(found) for seed, found in values.items() if found}
    return _figure(crossed(filled), metric, len(filled), by_prompt=True)


def _figure(interval: Interval, metric: str, n_seeds: int, by_prompt: bool = False) -> Figure:
    found = Figure(value=interval.value, n_seeds=n_seeds, n_prompts=interval.n if by_prompt else None)
    if interval.low is None or interval.high is None:
        return found
    least, most = RANGES.get(metric, (-math.inf, math.inf))
    return found.model_copy(update={"low": max(least, interval.low), "high": min(most, interval.high)})


def crossed(values: Mapping[str, Mapping[str, float]], level: float = 0.95) -> Interval:
    """Mean over seeds and prompts, both taken as draws.

    Args:
        values: by seed and prompt, the same prompts under every seed.
        level: coverage in (0, 1).

    Returns:
        The interval; it has no ends with one seed, since prompts alone would look too certain.

    Raises:
        ConfigError: the prompts differ between seeds.
    """
    sets = {frozenset(found) for found in values.values()}
    if len(sets) > 1:
        raise ConfigError(
            "the seeds did not measure the same prompts, so nothing can be said over seeds "
            "(set partition.held_out_seed in the task's configuration)"
        )
    return crossed_mean(values, level)


def figure_by_seed(values: Sequence[float | None], metric: str = "") -> Figure:
    """Mean over seeds.

    Args:
        values: one per seed; None where it is undefined.
        metric: which one; the interval of one of ``RANGES`` is cut to what it can be.

    Returns:
        The figure, over the seeds that have a value.
    """
    interval = t_interval([value for value in values if value is not None])
    return _figure(interval, metric, interval.n)


def t_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with a t interval.

    Args:
        values: one per seed.

    Returns:
        The 95 % interval; ``n`` counts seeds.
    """
    n = len(values)
    if n == 0:
        return Interval(None, None, None, 0)
    mean = fmean(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = float(scipy.stats.t(n - 1).ppf(0.975)) * spread
    return Interval(mean, mean - half, mean + half, n)
