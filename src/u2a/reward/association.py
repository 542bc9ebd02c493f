"""How closely two columns of numbers go together, with intervals from resampling whole prompts.

A measure takes the two columns and how often each row was drawn, for many draws at once: a row drawn twice counts as
two equal rows. Where a measure is undefined (too few rows, a column without variation) it is NaN, and None outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from u2a.evaluation.stats import Interval

Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
MAX_UNDEFINED_FRAC = 0.05  # of the resamples; with more of them undefined there is no interval
_CHUNK = 128  # resamples at a time, which bounds memory
_FLAT = 1e-12  # a variance under this share of the squared range is rounding


def pearson(first: np.ndarray, second: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Pearson's correlation.

    Args:
        first: (rows,) finite numbers.
        second: (rows,).
        times: (draws, rows) how often each row was drawn.

    Returns:
        (draws,) in [-1, 1]; NaN with fewer than three rows or a constant column.
    """
    if not len(first):
        return np.full(len(times), np.nan)
    columns = np.broadcast_to(first - first.mean(), times.shape), np.broadcast_to(second - second.mean(), times.shape)
    return _correlation(*columns, times)


def spearman(first: np.ndarray, second: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation, ties sharing their mean rank; arguments and result as for :func:`pearson`."""
    if not len(first):
        return np.full(len(times), np.nan)
    return _correlation(_ranks(first, times), _ranks(second, times), times)


def kendall(first: np.ndarray, second: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Kendall's tau-b, concordant minus discordant pairs of rows corrected for ties; otherwise as :func:`pearson`."""
    times = times.astype(float)
    sums = np.zeros((3, len(times)))
    for start in range(0, len(first), 256):
        block = slice(start, start + 256)
        x, y = np.sign(first[:, None] - first[None, block]), np.sign(second[:, None] - second[None, block])
        for index, table in enumerate((x * y, np.abs(x), np.abs(y))):
            sums[index] += ((times @ table) * times[:, block]).sum(1)
    few = (times.sum(1) < 3) | (sums[1] == 0) | (sums[2] == 0)
    return np.where(few, np.nan, sums[0] / np.sqrt(np.where(few, 1.0, sums[1] * sums[2])))


def kappa(first: np.ndarray, second: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Cohen's kappa of two 0/1 columns: agreement beyond what their two shares of ones give by chance.

    Args:
        first: (rows,) zeros and ones.
        second: (rows,).
        times: (draws, rows) how often each row was drawn.

    Returns:
        (draws,), 1 for full agreement, 0 for chance; NaN without rows, or where chance alone agrees always.

    Source: Cohen (1960), Educ. Psychol. Meas. 20, 37-46.
    """
    n = np.maximum(times.sum(1), 1)
    a, b, same = ((times @ column.astype(float)) / n for column in (first, second, first == second))
    chance = a * b + (1 - a) * (1 - b)
    undefined = (times.sum(1) == 0) | (chance >= 1.0)
    return np.where(undefined, np.nan, (same - chance) / np.where(undefined, 1.0, 1 - chance))


def measured(measure: Measure, first: Sequence[float], second: Sequence[float]) -> float | None:
    """Measure two columns as they are.

    Args:
        measure: for example :func:`spearman`.
        first: finite numbers.
        second: as many.

    Returns:
        The measure, or None where it is undefined.

    >>> round(measured(spearman, [1, 2, 3, 10], [1, 4, 9, 100]), 9)
    1.0
    >>> measured(kappa, [1, 1, 0, 0], [1, 0, 0, 0])
    0.5
    """
    value = float(measure(np.asarray(first, float), np.asarray(second, float), np.ones((1, len(first))))[0])
    return None if np.isnan(value) else value


def association(
    measure: Measure,
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[str],
    resamples: int,
    seed: int,
) -> Interval:
    """Measure two columns, with a percentile 95 % interval from resampling whole prompts.

    Args:
        measure: for example :func:`spearman`.
        first: finite numbers, one per row.
        second: as many.
        clusters: prompt key of each row.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.

    Returns:
        Value and interval; ``n`` counts prompts. The interval is None with fewer than two prompts, an undefined
        value, or more than 5 % of the resamples undefined.
    """
    names, cluster_of_row = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    n, value = len(names), measured(measure, first, second)
    if value is None or n < 2:
        return Interval(value, None, None, n)
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    generator, shares, draws = np.random.default_rng(seed), np.full(n, 1.0 / n), []
    for start in range(0, resamples, _CHUNK):
        times = generator.multinomial(n, shares, size=min(_CHUNK, resamples - start))
        draws.append(measure(a, b, times[:, cluster_of_row]))
    return interval_of(value, np.concatenate(draws), n)


def interval_of(value: float | None, draws: np.ndarray, n: int) -> Interval:
    """Percentile 95 % interval of a measure.

    Args:
        value: the measure itself, or None.
        draws: (resamples,) the measure on resampled prompts, NaN where undefined.
        n: prompts.

    Returns:
        The interval; its ends are None where the value is, with fewer than two prompts, or with more than 5 % of the
        draws undefined.
    """
    if value is None or n < 2 or np.isnan(draws).mean() > MAX_UNDEFINED_FRAC:
        return Interval(value, None, None, n)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high), n)


def _ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Mean rank of every row among the rows drawn: (draws, rows), minus half the number of rows drawn."""
    _, group = np.unique(values, return_inverse=True)
    drawn = np.zeros((len(times), int(group.max()) + 1))
    np.add.at(drawn.T, group, times.T)
    last = drawn.cumsum(1)
    return ((last - drawn / 2) - last[:, -1:] / 2)[:, group]


def _correlation(first: np.ndarray, second: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Correlation of (draws, rows) columns, row by row of ``times``."""
    total = times.sum(1)
    n = np.maximum(total, 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return (times * values).sum(1) / n

    spread = [np.square(column).max(1, initial=0.0) for column in (first, second)]
    centre = mean(first), mean(second)
    variance = [mean(column**2) - c**2 for column, c in zip((first, second), centre, strict=True)]
    few = (total < 3) | (variance[0] <= _FLAT * spread[0]) | (variance[1] <= _FLAT * spread[1])
    covariance = mean(first * second) - centre[0] * centre[1]
    product = np.where(few, 1.0, variance[0] * variance[1])
    return np.where(few, np.nan, np.clip(covariance / np.sqrt(product), -1.0, 1.0))
