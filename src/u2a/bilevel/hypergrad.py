"""Adjoints: how the derivative of J(theta*(omega)) reaches the candidates, as interchangeable values.

The gradient of the outer problem is dg/d omega_k = u' grad l_k (+ penalty), with u = H^-1 grad J and H the
Hessian of the inner problem at its solution. It is a gradient to *descend*; the gain of candidate k is its
negative, -u' grad l_k. ``Identity`` and ``Implicit`` find a direction u and score all candidates along it;
``Unrolled`` differentiates the optimiser steps really taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from u2a.bilevel.adjoint import Adjoint, Derivatives, InnerPoint
from u2a.bilevel.curvature import Curvature, Hessian, make_curvature
from u2a.bilevel.fisher import AdamMetric
from u2a.bilevel.linsolve import CG, LinearSolution, LinearSolver
from u2a.bilevel.operators import Diagonal, Operator, mean_eigenvalue
from u2a.bilevel.score import score_all
from u2a.bilevel.unrolled import Unrolled
from u2a.bilevel.vectors import norm, plus, scaled
from u2a.config import SolveSection, UnlearnSection
from u2a.modeling import Params
from u2a.progress import Console
from u2a.record import derive_seed
from u2a.solution import SolveStatus

_MOST_REPEATS = 8  # rounds in which all are solved under the highest damping; each raise is by a factor


@dataclass(frozen=True)
class Identity:
    """H^-1 ~ I / gamma: what the released code really does; cheapest, a baseline.

    Attributes:
        gamma: curvature taken for every direction, > 0.
    """

    gamma: float = 1.0

    @property
    def name(self) -> str:
        """Name with parameters."""
        return f"identity(gamma={self.gamma:g})"

    def solve(self, gradient: Params) -> LinearSolution:
        """Return grad J / gamma.

        Args:
            gradient: grad J.

        Returns:
            u with status ``closed_form``.
        """
        status = SolveStatus(status="closed_form", steps=0, residual=0.0, damping=self.gamma)
        return LinearSolution(scaled(gradient, 1.0 / self.gamma), status)

    def derivatives(self, point: InnerPoint, gradients: Sequence[Params], console: Console) -> Derivatives:
        """See :class:`Adjoint`."""
        return _along([self.solve(gradient) for gradient in gradients], point, console)


@dataclass(frozen=True)
class Implicit:
    """u = (H + rho I)^-1 grad J by a matrix-free solve (implicit function theorem).

    Attributes:
        linsolve: the linear solver; a diagonal curvature is solved in closed form instead.
        curvature: what stands for H.
        damping: rho in units of the mean eigenvalue of the curvature, >= 0; or ``auto``: 1 / (learning rate x steps),
            absolute, since gradient descent stopped after T steps of rate eta behaves like a proximal term of that
            strength (0 for the metric of Adam, which that factor would only scale). Where negative curvature raises it
            for one gradient, all are solved under the highest value.
    """

    linsolve: LinearSolver = CG()
    curvature: Curvature = Hessian()
    damping: float | Literal["auto"] = "auto"

    @property
    def name(self) -> str:
        """Name with parameters."""
        damping = self.damping if self.damping == "auto" else f"{self.damping:g}"
        return f"implicit({self.curvature.name}, {self.linsolve.name}, damping={damping})"

    def solve(self, gradient: Params, operator: Operator, damping: float) -> LinearSolution:
        """Solve (H + rho I) u = grad J.

        Args:
            gradient: grad J.
            operator: H.
            damping: rho >= 0, absolute.

        Returns:
            u with the status of the solve; see :class:`~u2a.bilevel.linsolve.CG`.
        """
        if not isinstance(operator, Diagonal):
            return self.linsolve.solve(operator.product, gradient, damping)
        value = operator.solve(gradient, damping)
        image = plus(operator.product(value), value, damping)
        size = norm(gradient)
        residual = norm(plus(image, gradient, -1.0)) / size if size > 0 else 0.0
        return LinearSolution(value, SolveStatus(status="closed_form", steps=0, residual=residual, damping=damping))

    def _damping(self, operator: Operator, like: Params, point: InnerPoint) -> tuple[float, float | None]:
        """Absolute damping, and the mean eigenvalue where it was asked for in that unit."""
        if self.damping != "auto":
            unit = mean_eigenvalue(operator, like, seed=derive_seed(point.seed, "trace"))
            return self.damping * unit, unit
        if isinstance(self.curvature, AdamMetric):
            return 0.0, None  # the metric of the steps themselves: 1 / (rate x steps) only scales it
        return 1.0 / (point.problem.section.learning_rate * max(1, point.steps)), None

    def derivatives(self, point: InnerPoint, gradients: Sequence[Params], console: Console) -> Derivatives:
        """See :class:`Adjoint`."""
        with console.phase("linear solve", len(gradients), "folds") as advance:
            operator = self.curvature.at(point.terms())
            damping, unit = self._damping(operator, gradients[0], point)
            solved = []
            for number, gradient in enumerate(gradients):
                solved.append(_kept(point, f"solve {number}", partial(self.solve, gradient, operator, damping)))
                advance.advance(1)
            for again in range(_MOST_REPEATS):  # else folds would not be replicates of one quantity
                highest = max(each.status.damping for each in solved)
                behind = [number for number, each in enumerate(solved) if each.status.damping < highest]
                for number in behind:
                    solve = partial(self.solve, gradients[number], operator, highest)
                    solved[number] = _repeated(solved[number], _kept(point, f"solve {number}, {again}", solve))
                if not behind:
                    break
        found = [
            LinearSolution(each.value, each.status.model_copy(update={"mean_eigenvalue": unit})) for each in solved
        ]
        return _along(found, point, console)


def _repeated(before: LinearSolution, now: LinearSolution) -> LinearSolution:
    """A solve done again since another right-hand side met negative curvature; its status says so, steps add up."""
    steps = before.status.steps + now.status.steps
    return LinearSolution(now.value, now.status.model_copy(update={"status": "negative_curvature", "steps": steps}))


def _kept(point: InnerPoint, name: str, solve: Callable[[], LinearSolution]) -> LinearSolution:
    """A linear solve, or what an earlier process found by it."""

    def tree() -> dict[str, Any]:
        found = solve()
        return {"value": found.value, "status": found.status.model_dump()}

    found = point.parts.get(name, tree)
    value = {name: each.to(point.policy.device) for name, each in found["value"].items()}
    return LinearSolution(value, SolveStatus.model_validate(found["status"]))


def _along(solved: Sequence[LinearSolution], point: InnerPoint, console: Console) -> Derivatives:
    """Score all candidates along the solutions."""
    found = score_all(point.section, point.losses, [solution.value for solution in solved], console)
    statuses = tuple(solution.status for solution in solved)
    return Derivatives(found.slopes.derivatives, found.slopes.losses, statuses, found.scorer, found.error)


def make_adjoint(section: SolveSection, unlearn: UnlearnSection) -> Adjoint:
    """Turn the configured name into the adjoint that screens all candidates.

    Args:
        section: options of the outer problem.
        unlearn: options of the inner run, whose metric the curvature ``adam`` is.

    Returns:
        The adjoint.
    """
    if section.adjoint == "identity":
        return Identity()
    return Implicit(CG(section.cg_steps, section.cg_tol), make_curvature(section.curvature, unlearn), section.damping)


def make_refining_adjoint(section: SolveSection, unlearn: UnlearnSection) -> Adjoint:
    """Turn the configured name into the adjoint that refines the weights on the selected set.

    Args:
        section: options of the outer problem.
        unlearn: options of the inner run.

    Returns:
        The adjoint.
    """
    return Unrolled() if section.refines_unrolled(unlearn) else make_adjoint(section, unlearn)
