"""Tests of paired comparisons: McNemar, sign flips, equivalence, Holm's correction, agreement of two rankings.

A p-value says how surprising the data are without a difference; a large one does not say that two arms are equal
(:func:`equivalence` does). The unit is the prompt, or the training seed: give one value for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import scipy.stats
import torch

from u2a.bilevel.select import spearman
from u2a.errors import ConfigError, NonFiniteError
from u2a.evaluation.stats import Interval
from u2a.record import Row

EXACT_UNITS = 16  # up to so many units every pattern of signs is tried
_ROUNDING = 1e-12  # relative; sums that differ by less count as equal
_CHUNK = 1024  # random patterns held at a time


class McNemar(Row):
    """Comparison of two arms by an outcome that either happens or does not, on the same prompts.

    Attributes:
        first_only, second_only: prompts where it happened in that arm alone.
        n: shared prompts.
        p: two-sided exact mid-p value, or None where the arms never differ.
    """

    first_only: int
    second_only: int
    n: int
    p: float | None


class SignFlip(Row):
    """Permutation test of a paired difference.

    Attributes:
        difference: mean, or None without units.
        p: two-sided p-value of "differences are as likely to be of either sign", or None without units.
        n: units.
        exact: whether all patterns of signs were tried.
    """

    difference: float | None
    p: float | None
    n: int
    exact: bool


class Equivalence(Row):
    """Whether a paired difference is shown to be smaller than a margin.

    Attributes:
        difference: mean, or None without units.
        low, high: interval at level 1 - 2 alpha, or None where it is undefined.
        margin: largest difference that does not matter, fixed before the data were seen.
        alpha: level of the test.
        p: larger p-value of the two one-sided tests, or None with fewer than two units or without any spread.
        equivalent: whether the interval lies within the margin, which is p < alpha; None where p is.
        n: units.
    """

    difference: float | None
    low: float | None
    high: float | None
    margin: float
    alpha: float
    p: float | None
    equivalent: bool | None
    n: int


class RankAgreement(Row):
    """How far two rankings of the same things agree.

    Attributes:
        spearman: rank correlation in [-1, 1], or None with fewer than three things or a constant side.
        kendall: tau-b in [-1, 1], None likewise.
        n: things that both rank.
    """

    spearman: float | None
    kendall: float | None
    n: int


def mcnemar(first: Mapping[str, float], second: Mapping[str, float]) -> McNemar:
    """Exact McNemar test with the mid-p value, over the prompts that both arms have.

    The mid-p value is the chance of a split of the differing prompts more uneven than the one found, plus half the
    chance of one as uneven, when both directions are equally likely.

    Args:
        first: 0 or 1 by prompt.
        second: the same of the other arm.

    Returns:
        Counts and p-value.

    Raises:
        ConfigError: a value is neither 0 nor 1.

    Source: Fagerland, Lydersen & Laake (2013), BMC Med. Res. Methodol. 13:91.

    >>> mcnemar({"a": 1, "b": 1, "c": 0}, {"a": 0, "b": 0, "c": 0})
    McNemar(first_only=2, second_only=0, n=3, p=0.25)
    """
    shared = sorted(first.keys() & second.keys())
    wrong = [key for key in shared if first[key] not in (0, 1) or second[key] not in (0, 1)]
    if wrong:
        raise ConfigError(f"McNemar's test needs outcomes 0 or 1; prompt {wrong[0]!r} has another (leave ties out)")
    first_only = sum(first[key] > second[key] for key in shared)
    second_only = sum(first[key] < second[key] for key in shared)
    differing = first_only + second_only
    if differing == 0:
        return McNemar(first_only=0, second_only=0, n=len(shared), p=None)
    split = np.arange(differing + 1)
    chance = scipy.stats.binom.pmf(split, differing, 0.5)
    uneven, found = np.abs(2 * split - differing), abs(first_only - second_only)
    p = float(chance[uneven > found].sum() + 0.5 * chance[uneven == found].sum())
    return McNemar(first_only=first_only, second_only=second_only, n=len(shared), p=p)


def sign_flip_test(differences: Mapping[str, float], draws: int = 9999, seed: int = 0) -> SignFlip:
    """Permutation test of a mean paired difference by flipping the signs of whole units.

    Over training seeds give each seed's mean difference; the smallest p is then 2^(1 - seeds): .031 with six seeds.

    Args:
        differences: first arm minus second, by unit (training seed or prompt).
        draws: random patterns where there are more than ``EXACT_UNITS`` units.
        seed: seed of those.

    Returns:
        Mean difference and two-sided p-value: the share of patterns with a sum at least as far from 0. Random patterns
        count the one found among them, so that p is at least 1 / (draws + 1).

    Source: Phipson & Smyth (2010), Stat. Appl. Genet. Mol. Biol. 9:39, for the one added.

    >>> sign_flip_test({"a": 1.0, "b": 2.0, "c": 0.5})
    SignFlip(difference=1.1666666666666667, p=0.25, n=3, exact=True)
    """
    values = _finite(differences, "paired difference")
    n = len(values)
    if n == 0:
        return SignFlip(difference=None, p=None, n=0, exact=True)
    least = abs(values.sum()) - _ROUNDING * np.abs(values).sum()
    if n <= EXACT_UNITS:
        bits = np.arange(2**n)[:, None] >> np.arange(n)[None, :] & 1
        p = float((np.abs((1 - 2 * bits) @ values) >= least).mean())
        return SignFlip(difference=float(values.mean()), p=p, n=n, exact=True)
    generator, extreme = np.random.default_rng(seed), 0
    for start in range(0, draws, _CHUNK):
        signs = 2 * generator.integers(0, 2, size=(min(_CHUNK, draws - start), n)) - 1
        extreme += int((np.abs(signs @ values) >= least).sum())
    return SignFlip(difference=float(values.mean()), p=(extreme + 1) / (draws + 1), n=n, exact=False)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's adjustment of the p-values of one family of tests, named before the data were seen.

    Args:
        p_values: p-value by test; None (undefined) stays None and still counts as a member of the family.

    Returns:
        Adjusted p-values in the same order: at most ``alpha`` where the test is rejected while the chance of any wrong
        rejection in the family stays within ``alpha``.

    Raises:
        ConfigError: a p-value is outside [0, 1].

    Source: Holm (1979), Scand. J. Stat. 6, 65-70.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    defined = {name: p for name, p in p_values.items() if p is not None}
    wrong = [name for name, p in defined.items() if not 0.0 <= p <= 1.0]
    if wrong:
        raise ConfigError(f"p-value of {wrong[0]!r} is {defined[wrong[0]]}, expected a number in [0, 1]")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(defined, key=lambda name: defined[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * defined[name]))
        adjusted[name] = largest
    return {name: adjusted.get(name) for name in p_values}


def equivalence(differences: Mapping[str, float], margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t-tests (TOST): is the mean paired difference within plus or minus a margin?

    Args:
        differences: first arm minus second, by unit (prompt or training seed), independent of each other.
        margin: largest difference that does not matter, > 0, fixed in advance.
        alpha: level in (0, 1/2).

    Returns:
        Interval at level 1 - 2 alpha, p-value and conclusion. Without any spread between units, nothing is concluded.

    Raises:
        ConfigError: margin or alpha is out of range.

    Source: Schuirmann (1987), J. Pharmacokinet. Biopharm. 15, 657-680.
    """
    _check_margin(margin)
    if not 0.0 < alpha < 0.5:
        raise ConfigError(f"alpha is {alpha}, expected a number between 0 and 1/2")
    values = _finite(differences, "paired difference")
    n = len(values)
    mean = float(values.mean()) if n else None
    spread = float(values.std(ddof=1)) if n > 1 else 0.0
    if mean is None or spread <= _ROUNDING * abs(mean):
        return Equivalence(
            difference=mean, low=None, high=None, margin=margin, alpha=alpha, p=None, equivalent=None, n=n
        )
    error = spread / math.sqrt(n)
    student = scipy.stats.t(n - 1)
    half = float(student.ppf(1.0 - alpha)) * error
    p = float(student.sf((margin - abs(mean)) / error))  # the larger of the two: the nearer end of the margin
    return Equivalence(
        difference=mean, low=mean - half, high=mean + half, margin=margin, alpha=alpha, p=p, equivalent=p < alpha, n=n
    )


def within_margin(interval: Interval, margin: float) -> bool | None:
    """Whether an interval at level 1 - 2 alpha shows equivalence at level alpha, for example a bootstrap interval.

    Args:
        interval: of a difference, computed with ``level = 1 - 2 * alpha``.
        margin: largest difference that does not matter, > 0, fixed in advance.

    Returns:
        True when the whole interval lies strictly inside plus or minus the margin; None without an interval.
    """
    _check_margin(margin)
    if interval.low is None or interval.high is None:
        return None
    return -margin < interval.low and interval.high < margin


def rank_agreement(first: Mapping[str, float], second: Mapping[str, float]) -> RankAgreement:
    """Agreement of two rankings over the things both rank, for example arms under two reward models.

    Args:
        first: finite value by name.
        second: the same of the other ranking.

    Returns:
        Spearman's and Kendall's (tau-b) correlation.
    """
    shared = sorted(first.keys() & second.keys())
    left = _finite({key: first[key] for key in shared}, "value to rank")
    right = _finite({key: second[key] for key in shared}, "value to rank")
    rho = spearman(torch.from_numpy(left), torch.from_numpy(right))
    if rho is None:
        return RankAgreement(spearman=None, kendall=None, n=len(shared))
    tau, _ = scipy.stats.kendalltau(left, right)
    return RankAgreement(spearman=rho, kendall=float(cast(float, tau)), n=len(shared))


def _check_margin(margin: float) -> None:
    if not 0.0 < margin < math.inf:
        raise ConfigError(f"the margin is {margin}, expected a positive number fixed before the data were seen")


def _finite(values: Mapping[str, float], what: str) -> np.ndarray:
    """Values in the order of their keys, float64, refused when one is not finite."""
    wrong = sorted(key for key, value in values.items() if not math.isfinite(value))
    if wrong:
        raise NonFiniteError(what, "evaluate", ids=wrong)
    return np.array([float(values[key]) for key in sorted(values)])
