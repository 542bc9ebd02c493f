"""Selection by trying everything: the best subset, and the least value of g on the simplex, of small problems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from u2a.reference.dense import minimise_on_simplex
from u2a.reference.quadratic import QuadraticProblem

_GRID_POINTS = 3000  # of the first, coarse search


def equal_weights(n: int, chosen: tuple[int, ...]) -> Tensor:
    """Weights 1 / k on k chosen candidates.

    Args:
        n: candidates.
        chosen: indices; none gives zeros.

    Returns:
        (n,) float64.

    >>> equal_weights(3, (0, 2)).tolist()
    [0.5, 0.0, 0.5]
    """
    weights = torch.zeros(n, dtype=torch.float64)
    for index in chosen:
        weights[index] = 1.0 / len(chosen)
    return weights


def best_subset(value: Callable[[Tensor], float], n: int, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], float]:
    """Try every subset with equal weights, and keep the one of highest value.

    Args:
        value: (n,) weights -> J(theta*(w)), higher is better.
        n: candidates, few: there are (n choose k) subsets of size k.
        sizes: sizes k to try.

    Returns:
        (indices, their value); of equals the first in lexicographic order.

    Raises:
        ValueError: no subset to try.

    >>> best_subset(lambda w: float(w @ torch.tensor([1.0, 3.0, 2.0]).double()), 3, (2,))
    ((1, 2), 2.5)
    """
    best: tuple[int, ...] | None = None
    highest = -math.inf
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(n), size) for size in sizes):
        found = value(equal_weights(n, chosen))
        if found > highest:
            best, highest = chosen, found
    if best is None:
        raise ValueError(f"best_subset: no subset of sizes {sizes} of {n} candidates has a value")
    return best, highest


def lowest_on_simplex(problem: QuadraticProblem, accuracy: float = 1e-7) -> tuple[Tensor, float]:
    """Minimise g(w) = -J(theta*(w)) on the simplex: a grid, then moves of weight between pairs, halved until tiny.

    Every point tried is feasible, so the value returned is an upper bound of the minimum whatever happens; no
    gradient is used.

    Args:
        problem: the problem, with few candidates.
        accuracy: amount of weight moved at the end.

    Returns:
        (w, g(w)).
    """
    n = len(problem.centres)
    resolution = 1
    while n > 1 and math.comb(resolution + n, n - 1) <= _GRID_POINTS:
        resolution += 1
    weights, lowest = minimise_on_simplex(lambda point: -problem.value(point), n, resolution)
    step = 1.0 / resolution
    while step > accuracy:
        improved = False
        for source, target in itertools.permutations(range(n), 2):
            moved = weights.clone()
            amount = min(step, float(moved[source]))
            moved[source] -= amount
            moved[target] += amount
            found = -problem.value(moved)
            if found < lowest - 1e-15:
                weights, lowest, improved = moved, found, True
        if not improved:
            step /= 2.0
    return weights, lowest
