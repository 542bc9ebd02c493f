"""Intervals: Wilson for rates, seeded cluster bootstrap for means, ratios and paired differences, t over seeds too.

The unit is the prompt: rows of one prompt are drawn together, because their values are not independent.
All intervals are two-sided 95 % unless ``level`` says otherwise. Tests are in :mod:`u2a.evaluation.significance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import scipy.stats

from u2a.errors import DataError

_CHUNK = 256  # resamples drawn at a time, which bounds memory at _CHUNK x clusters
_NORMAL = NormalDist()

Bootstrap = Literal["percentile", "bca"]


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval.

    Attributes:
        value: the estimate, or None without data.
        low, high: ends of the interval, or None where it is undefined (fewer than two clusters).
        n: clusters (prompts), or trials for a rate.
        method: how the interval was made, or None without one. ``percentile`` also where ``bca`` was asked for but is
            undefined (all resamples on one side of the estimate, or clusters that do not differ).
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: Literal["wilson", "percentile", "bca", "t"] | None = None


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a rate.

    Args:
        successes: count in [0, n]; a tie may count one half.
        n: independent trials, >= 0.
        level: coverage in (0, 1).

    Returns:
        The rate and its interval inside [0, 1]; all None for ``n = 0``.

    Source: Wilson (1927), J. Am. Stat. Assoc. 22, 209-212.

    >>> interval = wilson(54, 520)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.08, 0.133)
    """
    if n == 0:
        return Interval(None, None, None, 0)
    z = _NORMAL.inv_cdf(0.5 + level / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(rate, max(0.0, centre - half), min(1.0, centre + half), n, "wilson")


def bootstrap_mean(
    values: Mapping[str, float],
    groups: Mapping[str, str],
    resamples: int,
    seed: int,
    level: float = 0.95,
    method: Bootstrap = "percentile",
) -> Interval:
    """Mean over items with an interval from resampling whole prompts.

    Args:
        values: finite value by item id.
        groups: prompt key by item id; ids that are missing form clusters of their own.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.
        level: coverage in (0, 1).
        method: ``percentile``, or ``bca`` for the bias-corrected and accelerated interval (Efron 1987).

    Returns:
        Mean over items and interval; ``n`` counts prompts.
    """
    ones = dict.fromkeys(values, 1.0)
    return bootstrap_ratio(values, ones, groups, resamples, seed, level, method)


def bootstrap_ratio(
    numerator: Mapping[str, float],
    denominator: Mapping[str, float],
    groups: Mapping[str, str],
    resamples: int,
    seed: int,
    level: float = 0.95,
    method: Bootstrap = "percentile",
) -> Interval:
    """Ratio of two sums over items, for example NLL per token; arguments as in :func:`bootstrap_mean`.

    Args:
        numerator: finite value by item id.
        denominator: positive value by the same ids.
        groups: prompt key by item id.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.
        level: coverage in (0, 1).
        method: ``percentile``, or ``bca`` for the bias-corrected and accelerated interval (Efron 1987).

    Returns:
        Ratio of the sums and interval; ``n`` counts prompts.
    """
    table, n = _cluster_sums([numerator, denominator], groups)
    if n == 0:
        return Interval(None, None, None, 0)
    draws = _resampled(table, n, resamples, seed)
    total = table.sum(0)
    left_out = total - table if method == "bca" and n > 1 else None  # sums without each cluster in turn
    jackknives = [] if left_out is None else [left_out[:, 0] / left_out[:, 1]]
    return _bootstrap_interval(float(total[0] / total[1]), draws[:, 0] / draws[:, 1], n, level, jackknives)


def paired_difference(
    first: Mapping[str, float],
    second: Mapping[str, float],
    groups: Mapping[str, str],
    resamples: int,
    seed: int,
    level: float = 0.95,
    method: Bootstrap = "percentile",
) -> Interval:
    """Mean difference first minus second over the items both have, prompts resampled together.

    Args:
        first: finite value by item id.
        second: the same for the other arm; items of only one arm are left out.
        groups: prompt key by item id.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.
        level: coverage in (0, 1).
        method: ``percentile``, or ``bca`` for the bias-corrected and accelerated interval (Efron 1987).

    Returns:
        Mean difference and interval; ``n`` counts shared prompts.
    """
    shared = {key: value - second[key] for key, value in first.items() if key in second}
    return bootstrap_mean(shared, groups, resamples, seed, level, method)


def crossed_mean(values: Mapping[str, Mapping[str, float]], level: float = 0.95) -> Interval:
    """Mean over training seeds and prompts, both taken as draws, for arms (or paired differences) with several seeds.

    The design is crossed (every seed answers the same prompts), so that the variance of the mean is that of seeds over
    their number, that of prompts over theirs, and the interaction's over both. It is estimated from the mean squares
    of a two-way table, as MS_seed + MS_prompt - MS_rest over the number of values (and not below what seeds or prompts
    alone say), with a t quantile at Satterthwaite's degrees of freedom. A bootstrap over both is too narrow for a
    handful of seeds: it takes their spread without the factor (S - 1) / S and a normal quantile for a t.

    Args:
        values: by training seed and then by prompt; the same prompts under each seed.
        level: coverage in (0, 1).

    Returns:
        Mean and interval; ``n`` counts prompts. There is no interval with fewer than two seeds or prompts. With two
        seeds it covers a little less than it says where seeds are most of the variance.

    Raises:
        DataError: the prompts are not the same under every seed.

    Source: Satterthwaite (1946), Biometrics Bulletin 2, 110-114; Brennan (2001), Generalizability Theory, chapter 6.
    """
    seeds = sorted(values)
    prompts = sorted(set().union(*values.values()))
    for name in seeds:
        if len(values[name]) < len(prompts):
            missing = len(prompts) - len(values[name])
            raise DataError(f"seed {name}: {missing} of {len(prompts)} prompts are missing (give all seeds the same)")
    if not prompts:
        return Interval(None, None, None, 0)
    table = np.array([[values[name][prompt] for prompt in prompts] for name in seeds])
    value, (n, m) = float(table.mean()), table.shape
    if min(n, m) < 2:
        return Interval(value, None, None, m)
    rows, columns = table.mean(1) - value, table.mean(0) - value
    rest = table - value - rows[:, None] - columns[None, :]
    freedom = np.array([n - 1.0, m - 1.0, (n - 1.0) * (m - 1.0)])
    squares = np.array([m * (rows @ rows), n * (columns @ columns), (rest * rest).sum()]) / freedom
    total = float(max(squares[0] + squares[1] - squares[2], squares[0], squares[1]))
    if total == 0.0:
        return Interval(value, value, value, m, "t")
    degrees = total**2 / float((squares**2 / freedom).sum())
    half = float(scipy.stats.t(degrees).ppf((1.0 + level) / 2.0)) * math.sqrt(total / (n * m))
    return Interval(value, value - half, value + half, m, "t")


def paired_perplexity_difference(
    first: Mapping[str, float],
    second: Mapping[str, float],
    tokens: Mapping[str, float],
    groups: Mapping[str, str],
    resamples: int,
    seed: int,
) -> Interval:
    """Difference of two perplexities exp(sum NLL / sum tokens) on the same rows, prompts resampled together.

    Args:
        first: summed NLL in nats by row id, of one arm.
        second: the same of the other arm, on equal rows.
        tokens: answer tokens by row id.
        groups: prompt key by row id.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.

    Returns:
        Difference and 95 % interval; all None when a perplexity overflows.
    """
    table, n = _cluster_sums([first, second, tokens], groups)
    if n == 0:
        return Interval(None, None, None, 0)
    sums = np.vstack([table.sum(0), _resampled(table, n, resamples, seed)])
    with np.errstate(over="ignore", invalid="ignore"):
        differences = np.exp(sums[:, 0] / sums[:, 2]) - np.exp(sums[:, 1] / sums[:, 2])
    if not np.isfinite(differences).all():
        return Interval(None, None, None, n)
    return _bootstrap_interval(float(differences[0]), differences[1:], n, 0.95)


def rate_interval(values: Mapping[str, float], groups: Mapping[str, str], resamples: int, seed: int) -> Interval:
    """Interval of a rate: Wilson where every prompt has one value or all values agree, else cluster bootstrap.

    Args:
        values: 0, 1/2 or 1 by item id.
        groups: prompt key by item id.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.

    Returns:
        Rate over items and interval; ``n`` counts prompts.
    """
    n = len({groups.get(key, key) for key in values})
    if n == len(values) or len(set(values.values())) == 1:
        rate = sum(values.values()) / len(values) if values else 0.0
        return wilson(rate * n, n)
    return bootstrap_mean(values, groups, resamples, seed)


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson correlation.

    Args:
        first: finite numbers.
        second: as many.

    Returns:
        The correlation in [-1, 1], or None with fewer than three points or a constant side.
    """
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    value = float(np.corrcoef(first, second)[0, 1])
    return max(-1.0, min(1.0, value)) if np.isfinite(value) else None


def _cluster_sums(columns: Sequence[Mapping[str, float]], groups: Mapping[str, str]) -> tuple[np.ndarray, int]:
    """Sum each column within clusters: (clusters, columns), clusters in sorted order of their key."""
    keys = sorted(columns[0])
    names = sorted({groups.get(key, key) for key in keys})
    place = {name: index for index, name in enumerate(names)}
    table = np.zeros((len(names), len(columns)))
    for key in keys:
        table[place[groups.get(key, key)]] += [column[key] for column in columns]
    return table, len(names)


def _resampled(table: np.ndarray, n: int, resamples: int, seed: int) -> np.ndarray:
    """Column sums of ``resamples`` draws of n clusters with replacement: (resamples, columns)."""
    generator = np.random.default_rng(seed)
    shares = np.full(n, 1.0 / n)
    return np.vstack([generator.multinomial(n, shares, size=size) @ table for size in _chunks(resamples)])


def _chunks(resamples: int) -> list[int]:
    return [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]


def _bootstrap_interval(
    value: float, draws: np.ndarray, n: int, level: float, jackknives: Sequence[np.ndarray] = ()
) -> Interval:
    """Percentile interval, or BCa where jackknife values are given and it is defined.

    Args:
        value: the estimate.
        draws: its bootstrap values.
        n: clusters.
        level: coverage.
        jackknives: estimates that leave out each unit in turn, one array for every kind of unit that is resampled.

    Returns:
        The interval; no ends with fewer than two clusters.

    Source: Efron (1987), J. Am. Stat. Assoc. 82, 171-185; several samples: Efron & Tibshirani (1993), chapter 14.
    """
    if n < 2:
        return Interval(value, None, None, n)
    ends = np.array([0.5 - level / 2, 0.5 + level / 2])
    corrected = _bca_ends(value, draws, ends, jackknives) if jackknives else None
    low, high = np.quantile(draws, ends if corrected is None else corrected)
    return Interval(value, float(low), float(high), n, "percentile" if corrected is None else "bca")


def _bca_ends(value: float, draws: np.ndarray, ends: np.ndarray, jackknives: Sequence[np.ndarray]) -> np.ndarray | None:
    """Quantiles of the draws at which a BCa interval ends, or None where it is undefined."""
    below = float(((draws < value).mean() + (draws <= value).mean()) / 2)
    influence = [(len(part) - 1) / len(part) * (part.mean() - part) for part in jackknives]
    spread = sum(float((part**2).sum()) for part in influence)
    if not 0.0 < below < 1.0 or not spread > 1e-24 * value**2:  # rounding alone is no spread
        return None
    acceleration = sum(float((part**3).sum()) for part in influence) / (6.0 * spread**1.5)
    bias = _NORMAL.inv_cdf(below)
    shifted = [bias + _NORMAL.inv_cdf(float(end)) for end in ends]
    if any(1.0 - acceleration * z <= 0.0 for z in shifted):
        return None
    return np.array([_NORMAL.cdf(bias + z / (1.0 - acceleration * z)) for z in shifted])
