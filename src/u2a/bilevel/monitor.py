"""What J is worth at the policy's current theta, on the pairs that rank candidates and on those held out."""

from __future__ import annotations

from u2a.bilevel.objective import Objective, objective_values
from u2a.bilevel.outer_problem import Folds
from u2a.modeling import Policy
from u2a.types import Pair


class Monitor:
    """J on the PA folds and on the held-out pairs.

    Args:
        policy: the policy.
        objective: J.
        folds: the pairs.
    """

    def __init__(self, policy: Policy, objective: Objective, folds: Folds) -> None:
        self._policy, self._objective = policy, objective
        self._pairs = [pair for fold in folds.folds for pair in fold]
        self._heldout = list(folds.heldout)

    def measure(self) -> tuple[float, float | None]:
        """(J on the PA pairs, J on the held-out pairs or None) at the policy's current theta.

        An objective that draws answers draws them anew at each call, since its value holds where they were drawn.

        Returns:
            The two means.
        """
        on_pa = self._mean(self._pairs)
        assert on_pa is not None
        return on_pa, self.heldout()

    def heldout(self) -> float | None:
        """J on the held-out pairs alone, or None without any."""
        return self._mean(self._heldout)

    def _mean(self, pairs: list[Pair]) -> float | None:
        items = self._objective.prepare(self._policy, pairs)
        return float(objective_values(self._objective, self._policy, items).mean()) if items else None
