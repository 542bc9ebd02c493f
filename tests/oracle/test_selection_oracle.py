"""Greedy selection, mirror descent and the Frank-Wolfe certificate against exhaustive search and scipy.

What is true of greedy selection, over 50 problems of 8 losses (one of them concave) and at most 3 chosen: adding one
at a time it ends at the best of all subsets in about three of four problems, goes on average nine tenths of the way
from a random draw to the best subset, and never ends below the random draw. Where losses do not interact it is exact.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from u2a.bilevel.select import top_block
from u2a.bilevel.weight import frank_wolfe_gap, penalty, penalty_gradient, refine, with_block
from u2a.reference.dense import central_differences
from u2a.reference.quadratic import QuadraticProblem, random_quadratic
from u2a.reference.selection import best_subset, equal_weights, lowest_on_simplex

IDS = tuple(f"id{k}" for k in range(8))


def greedy(problem: QuadraticProblem, most: int, block: int) -> tuple[tuple[int, ...], float]:
    """The package's search with exact gains and inner solutions: add a block, keep it if J rises, else stop."""
    n = len(problem.centres)
    weights = torch.zeros(n, dtype=torch.float64)
    best = (torch.zeros(n, dtype=torch.float64), -math.inf)
    while int((weights > 0).sum()) < most:
        taken = (weights > 0).tolist()
        added = top_block(problem.gains(weights), IDS[:n], taken, min(block, most - sum(taken)))
        weights = with_block(weights, added)
        if not added or problem.value(weights) <= best[1]:
            break
        best = (weights, problem.value(weights))
    return tuple(torch.nonzero(best[0]).flatten().tolist()), best[1]


@cache
def shares(block: int) -> tuple[list[float], int]:
    """Share of the way from the mean draw of 3 to the best subset of at most 3; and how often greedy finds the best."""
    out, exact = [], 0
    for seed in range(50):
        problem = random_quadratic(seed, n=8, d=6, concave=1)
        chosen, value = greedy(problem, 3, block)
        subset, best = best_subset(problem.value, 8, (1, 2, 3))
        draws = [problem.value(equal_weights(8, three)) for three in itertools.combinations(range(8), 3)]
        assert value <= best + 1e-12
        out.append((value - sum(draws) / len(draws)) / (best - sum(draws) / len(draws)))
        exact += chosen == subset
    return out, exact


def test_greedy_selection_comes_close_to_exhaustive_search():
    found, exact = shares(1)
    assert min(found) > 0.25
    assert sum(found) / 50 > 0.9
    assert exact >= 30


def test_small_blocks_are_better_than_one_large_block():
    """All three at once ignores that the second of two similar candidates adds little; it still beats a draw."""
    single, block = (sum(shares(size)[0]) / 50 for size in (1, 3))
    assert single > block + 0.05
    assert min(shares(3)[0]) > 0.0
    assert block > 0.7


def separable(seed: int, n: int = 8) -> QuadraticProblem:
    """Loss k acts on coordinate k alone and pulls it to the target (most) or away from it (the first two)."""
    target = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    towards = target.clone()
    towards[:2] *= -1.0
    unit = torch.eye(n, dtype=torch.float64)
    return QuadraticProblem(torch.einsum("ki,kj->kij", unit, unit), torch.diag(towards), 0.0 * target, target, 0.5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_selection_is_exact_where_losses_do_not_interact(size: int):
    for seed in range(10):
        problem = separable(seed)
        chosen = tuple(sorted(top_block(problem.gains(torch.zeros(8).double()), IDS, [False] * 8, size)))
        assert chosen == best_subset(problem.value, 8, (size,))[0]
        assert not {0, 1} & set(chosen)
    assert len(top_block(problem.gains(torch.zeros(8).double()), IDS, [False] * 8, 8)) == 6  # the harmful two stay out


def test_best_subset_and_lowest_point_know_a_closed_form():
    """Two losses with minima at -1 and 3 on a line, target 1, no pull elsewhere: equal weights are exact."""
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    centres = torch.tensor([[-1.0], [3.0]], dtype=torch.float64)
    problem = QuadraticProblem(one, centres, torch.zeros(1).double(), torch.ones(1).double(), strength=1e-9)
    assert best_subset(problem.value, 2, (1, 2))[0] == (0, 1)
    weights, value = lowest_on_simplex(problem)
    assert weights.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    assert value == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="no subset"):
        best_subset(problem.value, 2, (3,))
    alone = QuadraticProblem(one[:1], centres[:1], torch.zeros(1).double(), torch.ones(1).double(), strength=1e-9)
    assert lowest_on_simplex(alone)[0].tolist() == [1.0]


def convex(seed: int, n: int = 5) -> QuadraticProblem:
    """All losses share one curvature, so theta*(w) is linear in w on the simplex and g convex."""
    problem = random_quadratic(seed, n=n, d=4, concave=0)
    shared = problem.curvatures[:1].expand(n, -1, -1).clone()
    return QuadraticProblem(shared, problem.centres, problem.start, problem.target, problem.strength)


def by_scipy(problem: QuadraticProblem) -> tuple[np.ndarray, float]:
    n = len(problem.centres)
    found = minimize(
        lambda w: -problem.value(torch.from_numpy(w)),
        np.full(n, 1.0 / n),
        jac=lambda w: -problem.gains(torch.from_numpy(w)).numpy(),
        method="SLSQP",
        bounds=[(0.0, 1.0)] * n,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x, float(found.fun)


def descend(problem: QuadraticProblem, steps: int, rate: float) -> tuple[Tensor, list[float]]:
    """Mirror descent with the gradient computed anew at each step; (weights, Frank-Wolfe gaps)."""
    n = len(problem.centres)
    weights = torch.full((n,), 1.0 / n, dtype=torch.float64)
    gaps = []
    for _ in range(steps):
        gradient = -problem.gains(weights)
        gaps.append(frank_wolfe_gap(weights, gradient))
        weights = refine(weights, gradient, rate, 1)
    return weights, gaps


@pytest.mark.parametrize("seed", range(6))
def test_mirror_descent_reaches_the_minimum_of_slsqp_and_of_the_search_and_its_gap_vanishes(seed: int):
    problem = convex(seed)
    weights, gaps = descend(problem, 600, 2.0)
    value = -problem.value(weights)
    assert value == pytest.approx(by_scipy(problem)[1], abs=1e-6)
    assert value == pytest.approx(lowest_on_simplex(problem)[1], abs=1e-6)
    assert gaps[0] > 1e-3
    assert gaps[-1] < 1e-4 * gaps[0]
    assert min(gaps) >= -1e-12


@cache
def lowest(seed: int) -> float:
    return by_scipy(convex(seed))[1]


@settings(max_examples=60)
@given(seed=st.integers(0, 4), raw=st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5))
def test_frank_wolfe_gap_bounds_the_true_gap_of_a_convex_problem(seed: int, raw: list[float]):
    problem = convex(seed)
    weights = torch.tensor(raw, dtype=torch.float64)
    weights = weights / weights.sum() if float(weights.sum()) > 1e-6 else torch.full((5,), 0.2, dtype=torch.float64)
    gap = frank_wolfe_gap(weights, -problem.gains(weights))
    assert gap >= -problem.value(weights) - lowest(seed) - 1e-9


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_gradient_of_the_penalised_outer_problem_equals_differences_of_resolved_problems(p: float):
    problem = random_quadratic(3)
    weights = torch.tensor([0.3, 0.05, 0.25, 0.1, 0.3], dtype=torch.float64)
    true = central_differences(lambda w: -problem.value(w) + penalty(w, 0.7, p), weights, 1e-6)
    found = -problem.gains(weights) + penalty_gradient(weights, 0.7, p)
    assert torch.allclose(found, true, rtol=1e-7, atol=1e-8)
