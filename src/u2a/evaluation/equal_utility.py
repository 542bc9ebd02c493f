"""Comparison at equal utility: how far the change may go before utility is spent, and what it bought by then.

Two methods are hard to compare when one costs more utility than the other. So the change of each is scaled by a
factor a in [0, 1] (0 = the start, 1 = the whole change), the largest a within a common budget is found, and the metric
is measured there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from u2a.errors import ConfigError, NonFiniteError
from u2a.modeling import Policy
from u2a.record import Record, Row

Measured = TypeVar("Measured")


class ScalePoint(Row):
    """Cost at one scale.

    Attributes:
        scale: factor on the change.
        cost: perplexity or what else was given; None where it is not finite (collapse).
    """

    scale: float
    cost: float | None


class EqualUtility(Record):
    """The largest scale found within the budget.

    Attributes:
        scale: largest evaluated scale whose cost is within the budget.
        cost: cost there.
        start: cost at scale 0.
        budget: largest cost allowed, (1 + budget_frac) * start.
        budget_frac: the allowance.
        tolerance: an evaluated scale over the budget lies at most this far above ``scale``, unless that is 1.
        evaluations: times the cost was computed (costs that were known already do not count).
        path: evaluated scales in ascending order, those known already among them.
        monotone: whether cost never fell from one evaluated scale to the next. Cost need not be monotone: where this is
            False a scale above the one returned may be within the budget, unseen.
    """

    scale: float
    cost: float
    start: float
    budget: float
    budget_frac: float
    tolerance: float
    evaluations: int
    path: tuple[ScalePoint, ...]
    monotone: bool


@dataclass(frozen=True)
class AtEqualUtility(Generic[Measured]):
    """What was measured at equal utility.

    Attributes:
        search: the scale and how it was found.
        value: what the measurement returned there.
    """

    search: EqualUtility
    value: Measured


def largest_scale(
    policy: Policy,
    cost: Callable[[Policy], float],
    budget_frac: float = 0.05,
    tolerance: float = 1 / 64,
    known: dict[float, float] | None = None,
) -> EqualUtility:
    """Find the largest scale of the policy's change whose cost is within the budget, by bisection.

    Args:
        policy: the policy at its final theta; it is left as it was.
        cost: utility as a number that is better when lower and not negative, such as the perplexity of retain rows:
            ``lambda policy: policy.perplexity(rows)``. For a utility that is better when higher take its inverse.
        budget_frac: allowance eps >= 0: cost may be (1 + eps) times that of the start.
        tolerance: width of the last bracket, in [1e-6, 1].
        known: costs by scale, read and extended; keep it for other budgets of the same policy and the same cost.

    Returns:
        The scale with its path. Scale 0 is always within the budget.

    Raises:
        ConfigError: budget_frac or tolerance is out of range, or the cost of the start is negative.
        NonFiniteError: the cost of the start is not finite.

    Source: UWC, arXiv 2406.09179, which mixes models until a share of retain performance is back.
    """
    if not 0.0 <= budget_frac < math.inf:
        raise ConfigError(f"budget_frac is {budget_frac}, expected a number >= 0")
    if not 1e-6 <= tolerance <= 1.0:
        raise ConfigError(f"tolerance is {tolerance}, expected a number in [1e-6, 1]")
    costs: dict[float, float] = {} if known is None else known
    known_before = len(costs)

    def measure(scale: float) -> None:
        if scale not in costs:
            with policy.change_scaled(scale):
                costs[scale] = float(cost(policy))

    measure(0.0)
    start = costs[0.0]
    if not math.isfinite(start):
        raise NonFiniteError("cost of the start", "equal-utility search")
    if start < 0.0:
        raise ConfigError(f"the cost of the start is {start}, expected a number >= 0 (the budget is a multiple of it)")
    budget = (1.0 + budget_frac) * start
    measure(1.0)
    low, high = _bracket(costs, budget)
    while high - low > tolerance:
        measure((low + high) / 2)
        low, high = _bracket(costs, budget)
    path = tuple(
        ScalePoint(scale=scale, cost=costs[scale] if math.isfinite(costs[scale]) else None) for scale in sorted(costs)
    )
    ordered = [math.inf if point.cost is None else point.cost for point in path]
    return EqualUtility(
        scale=low,
        cost=costs[low],
        start=start,
        budget=budget,
        budget_frac=budget_frac,
        tolerance=tolerance,
        evaluations=len(costs) - known_before,
        path=path,
        monotone=ordered == sorted(ordered),
    )


def _bracket(costs: dict[float, float], budget: float) -> tuple[float, float]:
    """Largest scale within the budget and the next scale above it (itself where there is none)."""
    low = max(scale for scale, cost in costs.items() if cost <= budget)
    return low, min((scale for scale in costs if scale > low), default=low)


def at_equal_utility(
    policy: Policy, search: EqualUtility, measure: Callable[[Policy], Measured]
) -> AtEqualUtility[Measured]:
    """Measure a policy with its change scaled to the utility budget.

    Args:
        policy: the policy that was searched, at the same theta; it is left as it was.
        search: from :func:`largest_scale`.
        measure: any measurement, such as the mean reward of generated answers.

    Returns:
        The measurement beside the scale it was taken at.
    """
    with policy.change_scaled(search.scale):
        return AtEqualUtility(search, measure(policy))
