"""Selection: how reliable the gains are, what candidates are ranked by, and when to fall back. Pure functions.

A gain is an estimate over preference pairs, so it carries a standard error from prompt-disjoint folds. "Does
unlearning help at all?" (the mean gain) and "which?" (the centred gains) are two questions with two answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Literal, Protocol

import torch
from torch import Tensor

from u2a.bilevel.variance import between
from u2a.config import SolveSection
from u2a.solution import Reliability

PRIOR_DOF = 4.0  # pseudo degrees of freedom that pull each candidate's noise towards the common one


@dataclass(frozen=True)
class FoldStatistics:
    """Gains with their uncertainty.

    Attributes:
        gain: (n,) gain under all pairs.
        se: (n,) standard error of the centred gain, or None with one fold.
        signal_var: estimated variance of the true centred gains; may be negative (no signal).
        signal_var_se: its jackknife standard error over folds, or None with fewer than three.
        mean_gain: average gain.
        mean_gain_se: its standard error, or None with one fold.
    """

    gain: Tensor
    se: Tensor | None
    signal_var: float | None
    signal_var_se: float | None
    mean_gain: float
    mean_gain_se: float | None

    @property
    def centred(self) -> Tensor:
        """Gains minus their mean, (n,)."""
        return self.gain - self.mean_gain

    @property
    def has_signal(self) -> bool:
        """Whether candidates differ by more than the noise: the variance is positive by over one standard error."""
        if self.signal_var is None:
            return False
        return self.signal_var > (self.signal_var_se or 0.0)


def fold_statistics(fold_gains: Tensor, fold_sizes: Sequence[int]) -> FoldStatistics:
    """Summarise gains over folds.

    Args:
        fold_gains: (candidates, folds) gain under each fold's pairs.
        fold_sizes: pairs per fold.

    Returns:
        The statistics. The signal variance is the mean covariance of the centred gains between different folds,
        which is unbiased because folds share no prompt.
    """
    sizes = torch.tensor(fold_sizes, dtype=torch.float64)
    gain = fold_gains @ (sizes / sizes.sum())
    n, folds = fold_gains.shape
    mean_gain = float(gain.mean())
    if folds < 2:
        return FoldStatistics(gain, None, None, None, mean_gain, None)
    centred = fold_gains - fold_gains.mean(0, keepdim=True)
    own = centred.var(1, correction=1) / folds
    se = (((folds - 1) * own + PRIOR_DOF * own.mean()) / (folds - 1 + PRIOR_DOF)).sqrt()
    covariance = centred.T @ centred / max(1, n - 1)
    signal, signal_se = between(covariance), None
    if folds >= 3:
        left_out = [between(_without(covariance, fold)) for fold in range(folds)]
        spread = sum((value - sum(left_out) / folds) ** 2 for value in left_out)
        signal_se = math.sqrt((folds - 1) / folds * spread)
    mean_se = float(fold_gains.mean(0).std(correction=1)) / math.sqrt(folds)
    return FoldStatistics(gain, se, signal, signal_se, mean_gain, mean_se)


def _without(matrix: Tensor, index: int) -> Tensor:
    keep = [k for k in range(matrix.shape[0]) if k != index]
    return matrix[keep][:, keep]


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
        contradict each other, for which the formula has no meaning).
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
    noise = 0.0 if statistics.se is None else float(statistics.se.square().mean().sqrt())
    return Reliability(
        split_half=split,
        full_set=None if split is None or split < 0.0 else 2 * split / (1 + split),
        gradient_cosine=sum(cosines) / len(cosines) if cosines else None,
        mean_gain=statistics.mean_gain,
        mean_gain_se=statistics.mean_gain_se,
        signal_sd=math.sqrt(max(0.0, statistics.signal_var or 0.0)),
        noise_sd=noise,
        n_pairs=sum(fold_sizes),
        n_folds=folds,
        n_candidates=n,
    )


def halves(folds: int, most: int = 64) -> list[tuple[int, ...]]:
    """List the ways to split folds into two halves, each counted once.

    Args:
        folds: number of folds.
        most: at most this many, in lexicographic order.

    Returns:
        The first half of each split: the one with fold 0, or the larger one; empty for one fold.

    >>> halves(4)
    [(0, 1), (0, 2), (0, 3)]
    """
    if folds < 2:
        return []
    size = (folds + 1) // 2
    if folds % 2:  # halves of different size: each choice of the larger one is another split
        return list(islice(combinations(range(folds), size), most))
    return [(0, *rest) for rest in islice(combinations(range(1, folds), size - 1), most)]


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
    """Gain minus z standard errors.

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
        return statistics.gain if statistics.se is None else statistics.gain - self.z * statistics.se


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


def decide(statistics: FoldStatistics, estimates: Tensor, fallback: str) -> Literal["none", "random_k", "empty"]:
    """Say whether to rank, to draw at random, or to select nothing.

    Args:
        statistics: gains and their noise.
        estimates: (n,) what would be ranked by.
        fallback: ``random_k`` (draw where there is no signal) or ``none`` (rank whatever the noise).

    Returns:
        ``empty`` when nothing promises a gain: the mean gain is negative by over two standard errors where there
        is no signal, or no estimate is positive where there is; ``random_k`` without signal; else ``none``.
    """
    if fallback == "none" or statistics.se is None:
        return "none" if bool((estimates > 0).any()) else "empty"
    if statistics.has_signal:
        return "none" if bool((estimates > 0).any()) else "empty"
    clearly_harmful = statistics.mean_gain + 2.0 * (statistics.mean_gain_se or 0.0) < 0.0
    return "empty" if clearly_harmful else "random_k"


def top_block(estimates: Tensor, ids: Sequence[str], taken: Sequence[bool], size: int) -> list[int]:
    """Choose the best candidates that are not yet selected and promise a gain; ties are broken by id.

    Args:
        estimates: (n,) what candidates are ranked by.
        ids: candidate ids.
        taken: (n,) already selected.
        size: most candidates to choose.

    Returns:
        Indices, best first.
    """
    free = [k for k in range(len(ids)) if not taken[k] and float(estimates[k]) > 0.0]
    return sorted(free, key=lambda k: (-float(estimates[k]), ids[k]))[:size]
