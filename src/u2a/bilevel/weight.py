"""Weights on the simplex: mirror descent, the sparsity penalty, and the Frank-Wolfe certificate. Pure functions.

omega is a float64 vector with omega >= 0 and sum 1. Gradients are of g, to be *descended*: a candidate with a
negative gradient (a positive gain) gets more weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a.errors import NonFiniteError


def mirror_step(weights: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One step of entropic mirror descent: omega_i <- omega_i exp(-eta dg_i) / sum_j omega_j exp(-eta dg_j).

    Args:
        weights: (n,) omega on the simplex; zeros stay zeros.
        gradient: (n,) dg/d omega.
        rate: eta >= 0.

    Returns:
        (n,) new weights on the simplex.

    Raises:
        NonFiniteError: a gradient on the support is not finite.

    Source: poster eq. 10; Beck and Teboulle 2003.

    >>> mirror_step(torch.tensor([0.5, 0.5]), torch.tensor([-1.0, 0.0]), 1.0)[0] > 0.5
    tensor(True)
    """
    support = weights > 0
    if not torch.isfinite(gradient[support]).all():
        raise NonFiniteError("gradient of the weights", "solve")
    logits = torch.full_like(weights, -torch.inf)
    logits[support] = weights[support].log() - rate * gradient[support]
    return torch.softmax(logits, 0)


def penalty(weights: Tensor, beta: float, p: float = 0.5) -> float:
    """Sparsity penalty beta sum_i omega_i^p (poster eq. 7 with p = 1/2).

    Args:
        weights: (n,) omega >= 0.
        beta: strength >= 0.
        p: exponent in (0, 1].

    Returns:
        The penalty.

    >>> penalty(torch.tensor([0.25, 0.75, 0.0]), 2.0, 1.0)
    2.0
    """
    positive = weights[weights > 0]
    return float(beta * positive.pow(p).sum())


def penalty_gradient(weights: Tensor, beta: float, p: float = 0.5) -> Tensor:
    """Gradient beta p omega^(p-1) of the penalty; for p = 1/2 it is (beta / 2) omega^(-1/2).

    Args:
        weights: (n,) omega >= 0.
        beta: strength >= 0.
        p: exponent in (0, 1].

    Returns:
        (n,) gradient; 0 where omega is 0 (the slope there is infinite, so such entries are ranked by the data
        term alone and judged by a finite step).
    """
    out = torch.zeros_like(weights)
    support = weights > 0
    out[support] = beta * p * weights[support].pow(p - 1.0)
    return out


def frank_wolfe_gap(weights: Tensor, gradient: Tensor) -> float:
    """Certificate max_k <grad g, omega - e_k> = <grad g, omega> - min_k grad_k; >= 0, and 0 at a minimum of a convex g.

    Args:
        weights: (n,) omega on the simplex.
        gradient: (n,) data gradient of g at omega, for all candidates.

    Returns:
        The gap; for convex g an upper bound of g(omega) - min g.

    Source: Jaggi 2013.

    >>> frank_wolfe_gap(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 3.0]))
    1.0
    """
    return float((weights * gradient).sum() - gradient.min())


def refine(weights: Tensor, gradient: Tensor, rate: float, steps: int, beta: float = 0.0, p: float = 0.5) -> Tensor:
    """Run mirror steps with a fixed data gradient and the penalty's current one.

    Args:
        weights: (n,) omega on the simplex.
        gradient: (n,) data gradient.
        rate: eta >= 0.
        steps: number of steps >= 0.
        beta: strength of the penalty.
        p: exponent of the penalty.

    Returns:
        (n,) new weights.
    """
    for _ in range(steps):
        weights = mirror_step(weights, gradient + penalty_gradient(weights, beta, p), rate)
    return weights


def drop_small(weights: Tensor, share: float) -> Tensor:
    """Set weights under a share of the uniform weight to 0 and renormalise.

    Args:
        weights: (n,) omega on the simplex.
        share: of 1 / support size, in [0, 1].

    Returns:
        (n,) new weights; the largest is always kept.
    """
    support = int((weights > 0).sum())
    kept = torch.where(weights >= share / support, weights, 0.0)
    kept[weights.argmax()] = weights.max()
    return kept / kept.sum()


def with_block(weights: Tensor, block: list[int]) -> Tensor:
    """Give each new member the average weight and scale the old ones to make room.

    Args:
        weights: (n,) omega on the simplex, or all 0.
        block: indices of new members.

    Returns:
        (n,) trial weights on the simplex (all 0 when there is neither support nor block).
    """
    support = int((weights > 0).sum())
    if not block:
        return weights.clone()
    trial = weights * (support / (support + len(block)))
    trial[block] = 1.0 / (support + len(block))
    return trial
