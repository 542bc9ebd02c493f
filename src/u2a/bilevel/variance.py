"""Ways to raise the signal of gains over the noise of few preference pairs (method, section 6b). Pure functions.

The bottleneck of selection is the noise of grad J, not H^-1: gains are linear in grad J, so most remedies are linear
maps of the matrix of gains under each fold of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cross_fold_variance(fold_gains: Tensor) -> float:
    """Variance of the true gains over candidates: mean covariance of the centred gains between different folds.

    Args:
        fold_gains: (candidates, folds), at least two folds.

    Returns:
        The estimate; unbiased because folds share no prompt, hence negative now and then where there is no signal.
    """
    centred = fold_gains - fold_gains.mean(0, keepdim=True)
    covariance = centred.T @ centred / max(1, len(fold_gains) - 1)
    return between(covariance)


def between(covariance: Tensor) -> float:
    """Mean off-diagonal entry of a covariance matrix over folds.

    Args:
        covariance: (folds, folds), at least two folds.

    Returns:
        The mean.
    """
    folds = covariance.shape[0]
    return float((covariance.sum() - covariance.trace()) / (folds * (folds - 1)))


def variance_of_mean(fold_values: Tensor, shares: Tensor, variances: Tensor) -> Tensor:
    """Estimate the variance of a weighted mean over independent folds whose variances are known up to a factor.

    s^2 sum_k w_k^2 v_k, where s^2 = sum_k (x_k - m)^2 / v_k / (K - 1) and m is the mean under weights 1 / v_k. For
    equal folds that is the sample variance over K. A sum of w_k^2 (x_k - x)^2 would not do: a fold that makes up most
    of the mean x lies next to it, however noisy it is.

    Args:
        fold_values: (n, folds) values x, at least two folds.
        shares: (folds,) weights w, summing to 1.
        variances: (folds,) relative variances v, > 0.

    Returns:
        (n,) estimates, unbiased.

    >>> equal = torch.full((4,), 0.25)
    >>> round(float(variance_of_mean(torch.tensor([[1.0, 2.0, 3.0, 6.0]]), equal, equal)) * 4 * 3, 4)
    14.0
    """
    precision = 1.0 / variances
    centre = fold_values @ precision / precision.sum()
    scale = (fold_values - centre[:, None]).square() @ precision / (len(variances) - 1)
    return scale * (shares.square() @ variances)


def precise(covariance: Tensor, variances: Tensor) -> Tensor:
    """Weight a covariance matrix so that :func:`between` becomes its mean under weights 1 / (v_j v_k).

    Args:
        covariance: (folds, folds), at least two folds.
        variances: (folds,) relative variances v of the folds, > 0.

    Returns:
        (folds, folds), unchanged for equal folds.
    """
    precision = 1.0 / variances
    weights = precision[:, None] * precision[None, :]
    return covariance * weights / between(weights)


def without_common(fold_gains: Tensor, common: Tensor, shares: Tensor) -> Tensor:
    """Gains under grad J without its component along the mean negative gradient, at their old mean.

    "Does unlearning as such help?" and "which?" are two questions: the common direction answers the first one for
    all candidates alike, and its noise would drown the second.

    Args:
        fold_gains: (candidates, folds).
        common: (candidates,) gain under a J whose gradient is the mean candidate gradient.
        shares: (folds,) grad J . mean gradient / ||mean gradient||^2 of each fold.

    Returns:
        (candidates, folds); each fold keeps its mean.
    """
    projected = fold_gains - common[:, None] * shares[None, :]
    return projected - projected.mean(0, keepdim=True) + fold_gains.mean(0, keepdim=True)


def pooled(fold_gains: Tensor, clusters: Sequence[int]) -> Tensor:
    """Pull each gain towards the mean of its cluster of similar negatives, as far as the folds justify it.

    Two-level empirical Bayes: the share of signal in the differences between cluster means and in those inside
    clusters is estimated from the covariance between folds; the inner differences are scaled by the ratio of the two.

    Args:
        fold_gains: (candidates, folds).
        clusters: (candidates,) cluster numbers.

    Returns:
        (candidates, folds); unchanged with one fold, or where cluster means carry no signal.

    Source: Efron and Morris 1973, for groups.
    """
    if fold_gains.shape[1] < 2:
        return fold_gains
    labels = torch.tensor(list(clusters))
    means = torch.zeros_like(fold_gains)
    for label in labels.unique():
        inside = labels == label
        means[inside] = fold_gains[inside].mean(0, keepdim=True)
    outer, inner = _share(means), _share(fold_gains - means)
    if outer <= 0.0:
        return fold_gains
    return means + min(1.0, inner / outer) * (fold_gains - means)


def _share(fold_gains: Tensor) -> float:
    """Share of signal in the variance of gains averaged over folds, in [0, 1]."""
    total = float(fold_gains.mean(1).var(correction=1)) if len(fold_gains) > 1 else 0.0
    return 0.0 if total <= 0.0 else min(1.0, max(0.0, cross_fold_variance(fold_gains) / total))


def clip_factors(norms: Tensor, quantile: float) -> Tensor:
    """Factors that clip gradients to a quantile of their lengths, so that no single pair decides.

    Args:
        norms: (pairs,) lengths.
        quantile: in [0, 1]; 1 clips nothing.

    Returns:
        (pairs,) min(1, c / length), c the quantile of the lengths.

    >>> clip_factors(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist()
    [1.0, 1.0, 0.5]
    """
    ceiling = torch.quantile(norms, quantile)
    return torch.where(norms > ceiling, ceiling / norms, 1.0)
