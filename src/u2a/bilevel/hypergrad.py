"""Adjoints: how the derivative of J(theta*(omega)) reaches the candidates, as interchangeable values.

The gradient of the outer problem is dg/d omega_k = u' grad l_k (+ penalty), with u = H^-1 grad J and H the
Hessian of the inner problem at its solution. It is a gradient to *descend*; the gain of candidate k is its
negative, -u' grad l_k. ``Identity`` and ``Implicit`` find a direction u and score all candidates along it;
``Unrolled`` differentiates the optimiser steps really taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from u2a.bilevel.curvature import Curvature, Diagonal, Hessian, InnerTerms, Operator, make_curvature, mean_eigenvalue
from u2a.bilevel.linsolve import CG, LinearSolution, LinearSolver
from u2a.bilevel.score import CandidateLosses, score_all
from u2a.bilevel.vectors import norm, plus, scaled
from u2a.config import SolveSection
from u2a.modeling import Params, Policy
from u2a.progress import Console
from u2a.record import derive_seed
from u2a.solution import SolveStatus
from u2a.stream import permutation
from u2a.types import UnlearnResult
from u2a.unlearn import InnerProblem


@dataclass(frozen=True)
class InnerPoint:
    """An inner problem at its solution, where the policy stands: all that an adjoint may need.

    Attributes:
        policy: the policy at theta*(omega).
        problem: candidates, losses and the options of the run that led here.
        weights: omega by candidate id.
        losses: the vector of candidate losses.
        section: options of the outer problem (scorer, rows of the curvature).
        seed: seed of random draws.
        result: what the run did (steps kept, line search), or None for all its steps.
    """

    policy: Policy
    problem: InnerProblem
    weights: Mapping[str, float]
    losses: CandidateLosses
    section: SolveSection
    seed: int = 0
    result: UnlearnResult | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps between theta_0 and here."""
        return self.problem.section.max_steps if self.result is None else self.result.steps_kept

    def terms(self) -> InnerTerms:
        """The inner problem on a seeded sample of the weighted candidates and retain rows, for a curvature."""
        inner, most = self.problem, self.section.curvature_samples
        chosen = sorted((row for row in inner.forget if self.weights.get(row.id, 0.0) > 0), key=lambda row: row.id)
        order = permutation(derive_seed(self.seed, "curvature"), 0, len(chosen))[:most]
        chosen = [chosen[k] for k in order]
        encode = self.policy.encoder.encode
        rows = tuple(encode(row.prompt, row.completion) for row in chosen)
        mass = torch.tensor([self.weights[row.id] for row in chosen], dtype=torch.float64)
        term = inner.section.retain_term
        n_retain = max(1, most // 2) if term in ("nll", "kl") else 0
        return InnerTerms(
            policy=self.policy,
            loss=inner.loss,
            rows=rows,
            weights=mass / mass.sum(),
            reference_sums=self.policy.reference_sums(rows) if inner.loss.needs_reference else torch.zeros(len(rows)),
            retain=tuple(encode(row.prompt, row.completion) for row in inner.retain[:n_retain]),
            term=term,
            retain_weight=inner.section.retain_weight,
        )


@dataclass(frozen=True)
class Derivatives:
    """dg/d omega_k of every candidate under one or several gradients of J.

    Attributes:
        values: (candidates, gradients) float64, CPU, without the penalty; to be descended.
        losses: (candidates,) l_k where they were scored, or None.
        solves: status of the linear solves, one per gradient; empty where there was none.
        scorer: how the inner products were found.
        error: disagreement of the scorer with exact derivatives on a sample, or None.
    """

    values: Tensor
    losses: Tensor | None
    solves: tuple[SolveStatus, ...]
    scorer: str
    error: float | None = None


class Adjoint(Protocol):
    """How gradients of J become derivatives with respect to omega."""

    @property
    def name(self) -> str:
        """Name with parameters, for records."""
        ...

    def derivatives(self, point: InnerPoint, gradients: Sequence[Params], console: Console) -> Derivatives:
        """dg/d omega_k for every candidate.

        Args:
            point: the inner problem and its solution.
            gradients: grad J at the solution, one per fold.
            console: progress.

        Returns:
            The derivatives, in the order of ``point.problem.forget``.
        """
        ...


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
            strength.
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

    def derivatives(self, point: InnerPoint, gradients: Sequence[Params], console: Console) -> Derivatives:
        """See :class:`Adjoint`."""
        with console.phase("linear solve", len(gradients), "folds") as advance:
            operator = self.curvature.at(point.terms())
            unit = None
            if self.damping == "auto":
                damping = 1.0 / (point.problem.section.learning_rate * point.problem.section.max_steps)
            else:
                unit = mean_eigenvalue(operator, gradients[0], seed=derive_seed(point.seed, "trace"))
                damping = self.damping * unit
            solved = []
            for gradient in gradients:
                found = self.solve(gradient, operator, damping)
                status = found.status.model_copy(update={"mean_eigenvalue": unit})
                solved.append(LinearSolution(found.value, status))
                advance.advance(1)
        return _along(solved, point, console)


def _along(solved: Sequence[LinearSolution], point: InnerPoint, console: Console) -> Derivatives:
    """Score all candidates along the solutions."""
    found = score_all(point.section, point.losses, [solution.value for solution in solved], console)
    statuses = tuple(solution.status for solution in solved)
    return Derivatives(found.slopes.derivatives, found.slopes.losses, statuses, found.scorer, found.error)


def make_adjoint(section: SolveSection) -> Adjoint:
    """Turn the configured name into the adjoint that screens all candidates.

    Args:
        section: options of the outer problem.

    Returns:
        The adjoint.
    """
    if section.adjoint == "identity":
        return Identity()
    return Implicit(CG(section.cg_steps, section.cg_tol), make_curvature(section.curvature), section.damping)
