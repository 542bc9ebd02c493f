"""Largest scale within a utility budget: against closed forms, brute force and the policy's own weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import examples, tiny_policy
from u2a.errors import ConfigError, NonFiniteError
from u2a.evaluation.equal_utility import EqualUtility, at_equal_utility, largest_scale
from u2a.modeling import Policy


class ScaleOnly:
    """Stands for a policy; its only state is the scale of its change."""

    scale = 1.0

    @contextmanager
    def change_scaled(self, scale: float):
        before, self.scale = self.scale, scale
        try:
            yield
        finally:
            self.scale = before


def search(curve: Callable[[float], float], *arguments, **named) -> EqualUtility:
    policy = ScaleOnly()
    found = largest_scale(policy, lambda policy: curve(policy.scale), *arguments, **named)
    assert policy.scale == 1.0
    return found


@given(st.floats(0.001, 0.95), st.sampled_from([1 / 8, 1 / 64, 1e-3]))
def test_bisection_brackets_the_crossing_of_a_rising_cost(eps: float, tolerance: float) -> None:
    found = search(lambda a: 10 * (1 + a * a), eps, tolerance)
    truth = math.sqrt(eps)
    assert found.scale <= truth < found.scale + tolerance
    assert found.cost == 10 * (1 + found.scale**2) <= found.budget == 10 * (1 + eps)
    assert found.monotone
    assert found.evaluations == len(found.path) == 2 + math.ceil(math.log2(1 / tolerance))


def test_the_whole_change_is_kept_where_it_fits_and_nothing_where_nothing_does() -> None:
    falling = search(lambda a: 5 - a)
    assert (falling.scale, falling.evaluations, falling.monotone) == (1.0, 2, False)
    exact = search(lambda a: 1 + a, 1.0)
    assert (exact.scale, exact.monotone) == (1.0, True)  # equal to the budget is within it
    steep = search(lambda a: 1.0 if a == 0 else 100.0, 0.05, 1 / 32)
    assert (steep.scale, steep.cost) == (0.0, 1.0)
    assert [point.scale for point in steep.path] == [0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    assert search(lambda a: a, 0.0).scale == 0.0


def test_collapse_counts_as_over_the_budget(tmp_path) -> None:
    for bad in (math.inf, math.nan):
        found = search(lambda a, bad=bad: bad if a > 0.3 else 1.0, 0.05, 1 / 16)
        assert found.scale == 0.25
        assert [point.cost for point in found.path if point.scale > 0.3] == [None] * 4  # 5/16, 3/8, 1/2, 1
        assert found.monotone
        assert EqualUtility.load(found.save(tmp_path / "found.json")) == found


def test_a_cost_that_is_not_monotone_is_said_to_be_so() -> None:
    found = search(lambda a: 1.0 + 0.2 * math.sin(3 * math.pi * a) ** 2, 0.05, 1 / 64)
    assert found.scale == 1.0  # it is within the budget at the end, over it between
    bump = search(lambda a: {0.0: 1.0, 0.5: 3.0}.get(a, 2.0), 0.5, 1 / 4)
    assert (bump.scale, bump.monotone) == (0.0, False)
    costs = {0.0: 1.0, 0.75: 1.0, 1.0: 2.0, 0.5: 2.0}
    known = search(lambda a: 2.0, 0.5, 1 / 4, dict(costs))
    assert (known.scale, known.monotone, known.evaluations) == (0.75, False, 0)  # the largest one evaluated


def test_known_costs_are_not_computed_again() -> None:
    known: dict[float, float] = {}
    calls: list[float] = []

    def cost(scale: float) -> float:
        calls.append(scale)
        return 1 + scale

    first = search(cost, 0.3, 1 / 64, known)
    assert len(calls) == first.evaluations == len(known)
    again = search(cost, 0.3, 1 / 64, known)
    assert (again.evaluations, again.scale, again.path) == (0, first.scale, first.path)
    wider = search(cost, 0.6, 1 / 64, known)
    assert wider.scale == search(lambda a: 1 + a, 0.6, 1 / 64).scale
    assert wider.evaluations < 6
    assert len(calls) == len(set(calls)) == len(known)


def test_bad_arguments_are_refused() -> None:
    for eps in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="budget_frac"):
            search(lambda a: 1.0, eps)
    for tolerance in (0.0, 2.0, math.nan):
        with pytest.raises(ConfigError, match="tolerance"):
            search(lambda a: 1.0, 0.1, tolerance)
    with pytest.raises(NonFiniteError):
        search(lambda a: math.nan)
    with pytest.raises(ConfigError, match="multiple"):
        search(lambda a: -1.0)


@pytest.mark.parametrize("adapter", [True, False])
def test_perplexity_of_a_real_policy(adapter: bool) -> None:
    policy = tiny_policy(adapter=adapter)
    rows = [policy.encoder.encode(row.prompt, row.completion, row.source) for row in examples(6)]
    policy.log_probs(rows).sum.sum().backward()
    for value in policy.trainable().values():  # a step that makes the rows less likely
        value.data.sub_(1e-4 * value.grad)
    before = policy.snapshot()

    def cost(policy: Policy) -> float:
        return policy.perplexity(rows)

    with policy.reference():
        start = cost(policy)
    whole = cost(policy)
    assert whole > 1.01 * start  # else this tests nothing
    found = largest_scale(policy, cost, budget_frac=(whole / start - 1) / 2, tolerance=1 / 32)
    assert found.start == pytest.approx(start, rel=1e-5)
    assert found.path[-1].cost == pytest.approx(whole, rel=1e-6)
    assert 0 < found.scale < 1
    grid = []
    for k in range(33):
        with policy.change_scaled(k / 32):
            grid.append(cost(policy))
    here = round(found.scale * 32)
    assert grid[here] <= found.budget < grid[here + 1]
    assert found.cost == pytest.approx(grid[here], rel=1e-6)
    at = at_equal_utility(policy, found, cost)
    assert at.search is found
    assert at.value == pytest.approx(found.cost, rel=1e-6)
    assert all(torch.equal(before[name], value) for name, value in policy.snapshot().items())
    with pytest.raises(ZeroDivisionError):  # the policy is left as it was after a failure, too
        at_equal_utility(policy, found, lambda policy: 1 / 0)
    assert all(torch.equal(before[name], value) for name, value in policy.snapshot().items())
