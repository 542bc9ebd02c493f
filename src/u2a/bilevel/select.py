"""Selection: how reliable the gains are, what candidates are ranked by, and when to fall back. Pure functions.

A gain is an estimate over preference pairs, so it carries a standard error from prompt-disjoint folds. "Does
unlearning help at all?" (the mean gain) and "which?" (the centred gains) are two questions with two answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol

import torch
from torch import Tensor

from u2a.bilevel.variance import between, precise, variance_of_mean
from u2a.config import SolveSection
from u2a.solution import Reliability

LEVEL = 0.05  # of the test for signal
TIE = 1e-5  # of the largest gain: what float32 rounding moves a gain by, and some more
PRIOR_DOF = 4.0  # pseudo degrees of freedom that pull each candidate's noise towards the common one


@dataclass(frozen=True)
class FoldStatistics:
    """Gains with their uncertainty.

    Attributes:
        gain: (n,) gain under all pairs.
        se: (n,) standard error of the centred gain, or None with one fold.
        signal_var: estimated variance of the true centred gains; may be negative (no signal).
        p_signal: p-value of "no signal", by flipping the signs of whole folds, or None with one fold.
        mean_gain: average gain.
        mean_gain_se: its standard error, or None with one fold.
    """

    gain: Tensor
    se: Tensor | None
    signal_var: float | None
    p_signal: float | None
    mean_gain: float
    mean_gain_se: float | None
    n_folds: int = 1

    @property
    def centred(self) -> Tensor:
        """Gains minus their mean, (n,)."""
        return self.gain - self.mean_gain

    @property
    def has_signal(self) -> bool:
        """Whether the folds agree on which candidates are better by more than chance would have it.

        The level is 5 %, or the smallest p-value that so few folds can give at all (six or more can give less).
        """
        if self.signal_var is None or self.p_signal is None:
            return False
        return self.signal_var > 0.0 and self.p_signal <= max(LEVEL, 0.5 ** (self.n_folds - 1))


def fold_statistics(
    fold_gains: Tensor, fold_sizes: Sequence[int], noise: Sequence[float] | None = None
) -> FoldStatistics:
    """Summarise gains over folds.

    The gain is that of J, the mean over all pairs, so it weights folds by their pairs, and so do its errors. Folds that
    differ by one pair at most, as those of prompts with one pair each do, are taken as alike.

    Args:
        fold_gains: (candidates, folds) gain under each fold's pairs.
        fold_sizes: pairs per fold.
        noise: variance of each fold's noise, up to a common factor; None: one over its pairs.

    Returns:
        The statistics. The signal variance is the mean covariance of the centred gains between different folds,
        which is unbiased because folds share no prompt; folds with less noise count for more.
    """
    sizes = torch.tensor(fold_sizes, dtype=torch.float64)
    gain = fold_gains @ (sizes / sizes.sum())
    n, folds = fold_gains.shape
    mean_gain = float(gain.mean())
    if folds < 2:
        return FoldStatistics(gain, None, None, None, mean_gain, None)
    centred = fold_gains - fold_gains.mean(0, keepdim=True)
    covariance = centred.T @ centred / max(1, n - 1)
    if noise is None and max(fold_sizes) - min(fold_sizes) <= 1:
        own, agreement = centred.var(1, correction=1) / folds, covariance
        mean_se = float(fold_gains.mean(0).std(correction=1)) / math.sqrt(folds)
    else:
        variances = 1.0 / sizes if noise is None else torch.tensor(noise, dtype=torch.float64)
        own = variance_of_mean(centred, sizes / sizes.sum(), variances)
        agreement = precise(covariance, variances)
        mean_se = float(variance_of_mean(fold_gains.mean(0, keepdim=True), sizes / sizes.sum(), variances).sqrt())
    se = (((folds - 1) * own + PRIOR_DOF * own.mean()) / (folds - 1 + PRIOR_DOF)).sqrt()
    return FoldStatistics(gain, se, between(agreement), sign_flip_p(agreement), mean_gain, mean_se, folds)


def sign_flip_p(covariance: Tensor, most: int = 4096) -> float:
    """Test whether folds agree: p-value of the mean covariance between folds under flips of whole folds' signs.

    Without signal a fold's centred gains are noise of symmetric distribution, independent between folds, so flipping
    the sign of any fold changes nothing. The noise may be correlated between candidates as it likes (it is: all of
    them are scored along the same few gradients), which the jackknife over few folds or a test over candidates do
    not survive.

    Args:
        covariance: (folds, folds) of the centred gains, at least two folds.
        most: sign patterns tried; more than 13 folds draw that many at random, seeded.

    Returns:
        Share of patterns (the one as found among them) with a mean covariance at least as large; at least one over the
        number of patterns, 2^(folds - 1) or ``most``.

    Source: Fisher's randomisation test; signs of whole groups as in Winkler et al. 2014.
    """
    folds = covariance.shape[0]
    if 2 ** (folds - 1) <= most:
        bits = torch.arange(2 ** (folds - 1))[:, None] >> torch.arange(folds - 1)[None, :] & 1
    else:
        bits = torch.randint(0, 2, (most, folds - 1), generator=torch.Generator().manual_seed(0))
        bits[0] = 0
    signs = torch.cat([torch.ones(len(bits), 1), 1.0 - 2.0 * bits], dim=1).to(covariance)
    agreement = torch.einsum("pi,ij,pj->p", signs, covariance, signs)
    return float((agreement >= agreement[0] - 1e-12 * covariance.abs().sum()).double().mean())


def spearman(left: Tensor, right: Tensor) -> float | None:
    """Spearman rank correlation with mid-ranks for ties.

    Args:
        left: (n,) values.
        right: (n,) values.

    Returns:
        The correlation, or None when undefined (n < 3, or one side constant).

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])), 6)
    0.5
    """
    if left.numel() < 3:
        return None
    first, second = _ranks(left), _ranks(right)
    first, second = first - first.mean(), second - second.mean()
    size = float(first.norm() * second.norm())
    return None if size == 0.0 else max(-1.0, min(1.0, float(first @ second) / size))


def _ranks(values: Tensor) -> Tensor:
    """Mid-ranks, float64."""
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    upper = counts.cumsum(0).double()
    return (upper - (counts.double() - 1) / 2)[place]


def reliability(fold_gains: Tensor, fold_sizes: Sequence[int], gram: Tensor, statistics: FoldStatistics) -> Reliability:
    """Ask whether the ranking survives a change of preference pairs.

    Args:
        fold_gains: (candidates, folds).
        fold_sizes: pairs per fold.
        gram: (folds, folds) inner products of the folds' gradients of J.
        statistics: of the same gains.

    Returns:
        Split-half Spearman and gradient cosine, averaged over all ways to split the folds into two halves of
        (nearly) equal number, with Spearman-Brown's prediction for the whole set (None where the halves
        contradict each other, for which the formula has no meaning). With one fold or one candidate there is neither
        signal nor noise to speak of: None.
    """
    n, folds = fold_gains.shape
    sizes = torch.tensor(fold_sizes, dtype=torch.float64)
    ranks: list[float] = []
    cosines: list[float] = []
    for half in halves(folds):
        first = torch.zeros(folds, dtype=torch.float64)
        first[list(half)] = 1.0
        a, b = first * sizes, (1.0 - first) * sizes
        rank = spearman(fold_gains @ (a / a.sum()), fold_gains @ (b / b.sum()))
        if rank is not None:
            ranks.append(rank)
        size = float((a @ gram @ a) * (b @ gram @ b))
        if size > 0:
            cosines.append(float(a @ gram @ b) / math.sqrt(size))
    split = sum(ranks) / len(ranks) if ranks else None
    signal_sd = noise_sd = None
    if n > 1 and statistics.se is not None and statistics.signal_var is not None:
        signal_sd, noise_sd = max(0.0, statistics.signal_var) ** 0.5, float(statistics.se.square().mean().sqrt())
    return Reliability(
        split_half=split,
        full_set=None if split is None or split < 0.0 else 2 * split / (1 + split),
        gradient_cosine=sum(cosines) / len(cosines) if cosines else None,
        mean_gain=statistics.mean_gain,
        mean_gain_se=statistics.mean_gain_se,
        signal_sd=signal_sd,
        noise_sd=noise_sd,
        p_signal=statistics.p_signal if n > 1 else None,
        n_pairs=sum(fold_sizes),
        n_folds=folds,
        n_candidates=n,
    )


def halves(folds: int, most: int = 64) -> list[tuple[int, ...]]:
    """List the ways to split folds into two halves, each counted once.

    Args:
        folds: number of folds.
        most: at most this many; where there are more, a seeded draw of them.

    Returns:
        The first half of each split: the one with fold 0, or the larger one; empty for one fold.

    >>> halves(4)
    [(0, 1), (0, 2), (0, 3)]
    """
    if folds < 2:
        return []
    size, fixed = (folds + 1) // 2, () if folds % 2 else (0,)  # of an odd number each choice of the larger half counts
    free = range(len(fixed), folds)
    if math.comb(len(free), size - len(fixed)) <= most:
        return [(*fixed, *rest) for rest in combinations(free, size - len(fixed))]
    generator, drawn = random.Random(0), dict[tuple[int, ...], None]()
    while len(drawn) < most:
        drawn[(*fixed, *sorted(generator.sample(free, size - len(fixed))))] = None
    return list(drawn)


class Estimator(Protocol):
    """What candidates are ranked by, as a value."""

    @property
    def name(self) -> str:
        """Name with parameters, for records."""
        ...

    def estimate(self, statistics: FoldStatistics) -> Tensor:
        """Turn gains with uncertainty into one number per candidate.

        Args:
            statistics: gains and their noise.

        Returns:
            (n,) estimates in the unit of the gains.
        """
        ...


@dataclass(frozen=True)
class Mean:
    """The plain gain (the paper's ranking)."""

    name: str = "mean"

    def estimate(self, statistics: FoldStatistics) -> Tensor:
        """The gain."""
        return statistics.gain


@dataclass(frozen=True)
class LowerBound:
    """Gain minus z standard errors, those of its centred part and of the mean gain taken as independent.

    Attributes:
        z: standard errors, > 0.
    """

    z: float = 1.0

    @property
    def name(self) -> str:
        """Name with parameters."""
        return f"lower_bound(z={self.z:g})"

    def estimate(self, statistics: FoldStatistics) -> Tensor:
        """Lower confidence bound; with one fold the gain itself."""
        if statistics.se is None:
            return statistics.gain
        return statistics.gain - self.z * (statistics.se.square() + (statistics.mean_gain_se or 0.0) ** 2).sqrt()


@dataclass(frozen=True)
class Shrunken:
    """Empirical-Bayes posterior mean: mean + (gain - mean) tau^2 / (tau^2 + se^2), tau^2 the signal variance.

    Source: Efron and Morris 1973. With no signal (tau^2 <= 0) every estimate is the mean gain.
    """

    name: str = "shrunken"

    def estimate(self, statistics: FoldStatistics) -> Tensor:
        """Shrunken gains; with one fold the gain itself."""
        if statistics.se is None or statistics.signal_var is None:
            return statistics.gain
        tau_sq = max(0.0, statistics.signal_var)
        noise = statistics.se.square()
        share = torch.where(noise + tau_sq > 0, tau_sq / (noise + tau_sq).clamp_min(1e-300), 0.0)
        return statistics.mean_gain + share * statistics.centred


def make_estimator(section: SolveSection) -> Estimator:
    """Turn the configured name into an estimator value.

    Args:
        section: options of the outer problem.

    Returns:
        The estimator.
    """
    estimators: dict[str, Estimator] = {
        "mean": Mean(),
        "lower_bound": LowerBound(section.confidence),
        "shrunken": Shrunken(),
    }
    return estimators[section.estimator]


def decide(
    statistics: FoldStatistics, estimates: Tensor, fallback: str, damage: float = 0.0
) -> Literal["none", "random_k", "empty"]:
    """Say whether to rank, to draw at random, or to select nothing.

    Args:
        statistics: gains and their noise.
        estimates: (n,) what would be ranked by.
        fallback: ``random_k`` (draw where there is no signal) or ``none`` (rank whatever the noise).
        damage: mean over the candidates of what the estimates subtract for the damage to the retain rows.

    Returns:
        ``empty`` when nothing promises a gain: the mean gain less the damage is negative by over two standard errors
        where there is no signal (the damage does not rank by then), or no estimate is positive where there is;
        ``random_k`` without signal; else ``none``. With one fold nothing can be tested and the gains are ranked as
        they are.
    """
    if fallback == "none" or statistics.se is None:
        return "none" if bool((estimates > 0).any()) else "empty"
    if statistics.has_signal:
        return "none" if bool((estimates > 0).any()) else "empty"
    clearly_harmful = statistics.mean_gain - damage + 2.0 * (statistics.mean_gain_se or 0.0) < 0.0
    return "empty" if clearly_harmful else "random_k"


def alike(values: Tensor) -> bool:
    """Whether all values differ by no more than rounding; see :func:`ranking`.

    Args:
        values: (n,) values, at least one.

    Returns:
        True for a single one.
    """
    return float(values.max() - values.min()) <= TIE * float(values.abs().max())


def ranking(values: Tensor, ids: Sequence[str]) -> list[int]:
    """Order candidates, best first; values that differ by no more than rounding are a tie, broken by id.

    Another batch, number of threads or order of rows changes a gain in its last digits. Without the tolerance that
    would decide between candidates of equal gain, such as copies.

    Args:
        values: (n,) what candidates are ranked by.
        ids: candidate ids.

    Returns:
        All indices. Values within 1e-5 of the largest magnitude below the first of a group are tied with it.

    >>> ranking(torch.tensor([0.5, 2.0, 2.0000001, 3.0]), ["a", "b", "c", "d"])
    [3, 1, 2, 0]
    """
    numbers = values.tolist()
    tolerance = TIE * max(map(abs, numbers), default=0.0)
    groups: list[list[int]] = []
    for k in sorted(range(len(numbers)), key=lambda k: (-numbers[k], ids[k])):
        if not groups or numbers[k] < numbers[groups[-1][0]] - tolerance:
            groups.append([])
        groups[-1].append(k)
    return [k for group in groups for k in sorted(group, key=lambda k: ids[k])]


def top_block(estimates: Tensor, ids: Sequence[str], taken: Sequence[bool], size: int) -> list[int]:
    """Choose the best candidates that are not yet selected and promise a gain, in the order of :func:`ranking`.

    Args:
        estimates: (n,) what candidates are ranked by.
        ids: candidate ids.
        taken: (n,) already selected.
        size: most candidates to choose.

    Returns:
        Indices, best first.
    """
    return [k for k in ranking(estimates, ids) if not taken[k] and float(estimates[k]) > 0.0][:size]
