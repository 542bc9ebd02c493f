"""Gradients of J under each fold of the preference pairs, each kept on the disk as it is found."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from u2a.bilevel.objective import Item, Objective, ObjectiveGradient, gradient_norms, objective_gradient
from u2a.bilevel.variance import clip_factors
from u2a.modeling import Policy
from u2a.parts import Parts
from u2a.progress import Advance, Console
from u2a.types import Pair


def fold_gradients(
    policy: Policy,
    objective: Objective,
    folds: Sequence[Sequence[Pair]],
    pair_clip: float,
    kept: Parts,
    console: Console,
) -> list[ObjectiveGradient]:
    """Differentiate J under each fold, clipped per pair where that is asked for.

    Args:
        policy: the policy at the theta of interest.
        objective: J.
        folds: pairs of each fold.
        pair_clip: quantile in (0, 1] at which gradients of single pairs are clipped; 1 clips none.
        kept: where what is found is kept, for a run that is stopped.
        console: progress.

    Returns:
        Values and gradient of each fold.
    """

    def differentiate(fold: Sequence[Item], weights: Tensor | None, advance: Advance) -> dict[str, Any]:
        return vars(objective_gradient(objective, policy, fold, advance, weights))

    sizes = [len(fold) for fold in folds]
    items = [objective.prepare(policy, fold) for fold in folds]
    factors: list[Tensor | None] = [None] * len(items)
    if pair_clip < 1.0:
        with console.phase("gradient of J, pair by pair", sum(sizes), "pairs") as advance:
            norms = [
                kept.get(f"norms {number}", partial(gradient_norms, objective, policy, fold, advance))
                for number, fold in enumerate(items)
            ]
        factors = list(clip_factors(torch.cat(norms), pair_clip).split(sizes))
    with console.phase("gradient of J", sum(sizes), "pairs") as advance:
        found = [
            kept.get(f"gradient {number}", partial(differentiate, fold, weights, advance))
            for number, (fold, weights) in enumerate(zip(items, factors, strict=True))
        ]
    return [_on_device(policy, part) for part in found]


def _on_device(policy: Policy, part: dict[str, Any]) -> ObjectiveGradient:
    gradient = {name: value.to(policy.device) for name, value in part["gradient"].items()}
    return ObjectiveGradient(part["values"], gradient)
