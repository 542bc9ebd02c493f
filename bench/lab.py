"""One world made measurable: the very run of `u2a.unlearn`, replayed for any omega, and J where it ends.

A replay takes the batches, learning rates and options of the real run and only exchanges the coefficients of its
losses, so hundreds of different omega cost hundreds of short runs and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from small_world import World
from torch import Tensor

from u2a.bilevel.adjoint import Adjoint, InnerPoint
from u2a.bilevel.gains import candidate_losses
from u2a.bilevel.objective import Item, Margin, Objective, objective_gradient, objective_values
from u2a.bilevel.trajectory import Plan, Step, plan_of, replay
from u2a.config import SolveSection, UnlearnSection
from u2a.modeling import Params
from u2a.progress import Console
from u2a.types import Pair
from u2a.unlearn import InnerProblem

QUIET = Console(quiet=True)
SCREENING = SolveSection(scorer="jvp", curvature_samples=64, heldout_frac=0.0)


@dataclass(frozen=True)
class Lab:
    """A world with one inner problem and one outer objective.

    Attributes:
        world: the world.
        section: loss and optimiser of the inner problem.
        n_pa: PA pairs used.
        objective: J.
    """

    world: World
    section: UnlearnSection
    n_pa: int = 128
    objective: Objective = Margin()

    @property
    def ids(self) -> list[str]:
        """Candidate ids in the order of every vector here."""
        return [row.id for row in self.world.candidates]

    @property
    def inner(self) -> InnerProblem:
        """The inner problem."""
        return self.world.inner(self.section)

    @cached_property
    def plan(self) -> Plan:
        """The run at uniform weights."""
        return plan_of(self.world.policy, self.inner, self.inner.uniform())

    @cached_property
    def _pa(self) -> list[Item]:
        return self.objective.prepare(self.world.policy, self.preference)

    @cached_property
    def _heldout(self) -> list[Item]:
        return self.objective.prepare(self.world.policy, self.world.heldout)

    @property
    def preference(self) -> tuple[Pair, ...]:
        """The PA pairs."""
        return self.world.preference[: self.n_pa]

    def uniform(self) -> Tensor:
        """Equal weights."""
        return torch.full((len(self.ids),), 1.0 / len(self.ids), dtype=torch.float64)

    def run(self, omega: Tensor, steps: int | None = None) -> None:
        """Unlearn from theta_0; the policy is left at theta_T(omega).

        Args:
            omega: (n,) weights >= 0 that sum to 1; 0 keeps a candidate's place in the batches, without effect.
            steps: stop after so many steps; None: all.
        """
        factors = {name: len(self.ids) * float(weight) for name, weight in zip(self.ids, omega, strict=True)}
        plan = self.plan
        made = [
            Step(
                tuple(
                    {**batch, "weight": torch.tensor([factors[plan.ids[k]] for k in batch["index"].tolist()])}
                    for batch in step.micro_batches
                ),
                step.rate,
            )
            for step in plan.steps[:steps]
        ]
        replay(self.world.policy, replace(plan, steps=tuple(made)), every=len(made) + 1)

    def values(self) -> tuple[float, float]:
        """J on the PA pairs and on the held-out pairs at the policy's theta."""
        policy = self.world.policy
        pa, heldout = (objective_values(self.objective, policy, items) for items in (self._pa, self._heldout))
        return float(pa.mean()), float(heldout.mean())

    def measured(self, omegas: Sequence[Tensor]) -> Tensor:
        """J at the end of one run per omega.

        Args:
            omegas: weights.

        Returns:
            (omegas, 2) J on PA and on held-out pairs.
        """
        out = []
        for omega in omegas:
            self.run(omega)
            out.append(self.values())
        return torch.tensor(out, dtype=torch.float64)

    def gradient(self, heldout: bool = False) -> Params:
        """Gradient of J at the policy's theta.

        Args:
            heldout: on the held-out pairs instead of the PA pairs (what an oracle would know).

        Returns:
            grad J.
        """
        items = self._heldout if heldout else self._pa
        return objective_gradient(self.objective, self.world.policy, items).gradient

    def point(self) -> InnerPoint:
        """The inner problem at uniform weights, with the policy at its end."""
        policy, inner = self.world.policy, self.inner
        self.run(self.uniform())
        return InnerPoint(policy, inner, inner.uniform(), candidate_losses(policy, inner), SCREENING, self.world.seed)

    def gains(self, adjoint: Adjoint, heldout: bool = False) -> Tensor:
        """Predicted dJ / d omega at uniform weights.

        Args:
            adjoint: how it is predicted.
            heldout: for J on the held-out pairs.

        Returns:
            (n,) gains, positive = more weight raises J.
        """
        point = self.point()
        return -adjoint.derivatives(point, [self.gradient(heldout)], QUIET).values[:, 0]
