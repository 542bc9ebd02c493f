"""Matrix-free linear solves (A + rho I) x = b for symmetric A that may be indefinite.

Gradient ascent is concave in the NLL, so the curvature of an unlearning problem need not be positive definite.
A direction p with p'(A + rho I)p <= 0 is detected, the damping is raised (Levenberg-Marquardt), the solve starts
again, and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from u2a.bilevel.operators import random_unit
from u2a.bilevel.vectors import dot, is_finite, norm, plus, scaled, zeros_like
from u2a.errors import NonFiniteError, NotConverged
from u2a.modeling import Params
from u2a.solution import SolveStatus

Matvec = Callable[[Params], Params]
_RAISE = 4.0
_MOST_RAISES = 40
_POWER_PRODUCTS = 16  # enough for half of the largest eigenvalue of millions, from a random start
_LEAST_SHARE = 1e-6  # of the largest curvature seen: the first damping where there was none


@dataclass(frozen=True)
class LinearSolution:
    """Result of a linear solve.

    Attributes:
        value: x.
        status: how it ended; the residual is ||(A + rho I) x - b|| / ||b||, recomputed from the definition.
    """

    value: Params
    status: SolveStatus


class LinearSolver(Protocol):
    """A linear solver as a value."""

    @property
    def name(self) -> str:
        """Name with parameters, for records."""
        ...

    def solve(self, matvec: Matvec, right: Params, damping: float) -> LinearSolution:
        """Solve (A + damping I) x = right.

        Args:
            matvec: v -> A v.
            right: b.
            damping: rho >= 0, absolute.

        Returns:
            The solution with its status.
        """
        ...


@dataclass(frozen=True)
class CG:
    """Conjugate gradients with detection of negative curvature.

    It sees the operator on the span of b, A b, A^2 b, ... only. Negative curvature outside of it is not detected and
    does no harm: x solves the system as it was asked. A singular system with b in its range is solved without
    damping (least solution); with b out of its range, rho is raised from 0 and the result says so.

    Attributes:
        max_steps: most matrix-vector products of one attempt.
        tol: relative residual at which it stops.
        throw: raise :class:`~u2a.errors.NotConverged` instead of returning status ``max_steps``.

    Source: Hestenes and Stiefel 1952; detection as in Steihaug 1983; damping as in Martens 2010.
    """

    max_steps: int = 10
    tol: float = 1e-2
    throw: bool = False

    @property
    def name(self) -> str:
        """Name with parameters."""
        return f"cg(tol={self.tol:g}, max_steps={self.max_steps})"

    def solve(self, matvec: Matvec, right: Params, damping: float) -> LinearSolution:
        """Solve (A + rho I) x = b, raising rho where the curvature is not positive.

        Args:
            matvec: v -> A v.
            right: b; zero gives the zero solution.
            damping: rho >= 0.

        Returns:
            x with status ``converged``, ``max_steps`` or ``negative_curvature``: rho was raised, and the residual is
            that of the system with the raised rho.

        Raises:
            NotConverged: ``throw`` is set and the residual is above ``tol``; or rho could not be raised enough.
            NonFiniteError: a product, or a number made of it, is not finite.
        """
        if norm(right) == 0.0:
            return LinearSolution(
                zeros_like(right), SolveStatus(status="converged", steps=0, residual=0.0, damping=damping)
            )
        steps, raised = 0, False
        for _ in range(_MOST_RAISES):
            attempt = _attempt(matvec, right, damping, self.max_steps, self.tol)
            steps += attempt.steps
            if attempt.curvature is None:
                residual = _residual(matvec, right, damping, attempt.value)
                solved = residual <= self.tol * (1 + 1e-6) + 1e-12
                if self.throw and not solved:
                    raise NotConverged(f"cg: residual {residual:.2e} after {steps} steps, asked for {self.tol:.2e}")
                status = "negative_curvature" if raised else "converged" if solved else "max_steps"
                return LinearSolution(
                    attempt.value, SolveStatus(status=status, steps=steps, residual=residual, damping=damping)
                )
            if attempt.scale == damping == 0.0:
                raise NotConverged("cg: the curvature is 0 along the gradient (set solve.damping above 0)")
            raised = True
            damping = max(_RAISE * damping, -2.0 * attempt.curvature, _LEAST_SHARE * attempt.scale)
        raise NotConverged(f"cg: negative curvature persists at damping {damping:.2e} (set solve.damping)")


@dataclass
class _Attempt:
    """State of one run of CG.

    ``curvature`` is the Rayleigh quotient p'Ap/p'p of a refused direction, ``scale`` the largest ||(A + rho I)p||/||p||
    met: what counts as zero curvature is relative to it, so that a solve does not depend on the unit of the losses.
    """

    value: Params
    steps: int = 0
    curvature: float | None = None
    scale: float = 0.0


def _attempt(matvec: Matvec, right: Params, damping: float, max_steps: int, tol: float) -> _Attempt:
    attempt = _Attempt(zeros_like(right))
    residual = {name: value.clone() for name, value in right.items()}
    direction = residual
    rr = dot(residual, residual)
    goal = tol * tol * rr
    round_off = 10.0 * max(torch.finfo(value.dtype).eps for value in right.values())
    for _ in range(max_steps):
        image = plus(matvec(direction), direction, damping)
        if not is_finite(image):
            raise NonFiniteError("curvature product", "solve", attempt.steps)
        attempt.steps += 1
        bend, length = dot(direction, image), dot(direction, direction)
        _check(attempt.steps - 1, rr=rr, curvature=bend, length=length)
        attempt.scale = max(attempt.scale, norm(image) / math.sqrt(length))
        if bend <= round_off * attempt.scale * length:
            attempt.curvature = bend / length - damping
            return attempt
        step = rr / bend
        attempt.value = plus(attempt.value, direction, step)
        residual = plus(residual, image, -step)
        new = dot(residual, residual)
        _check(attempt.steps - 1, rr=new)
        if new <= goal:
            break
        direction = plus(residual, direction, new / rr)
        rr = new
    return attempt


def _check(step: int, **scalars: float) -> None:
    """Refuse the numbers that steps are made of when one of them is not finite."""
    bad = [name for name, value in scalars.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(f"{bad[0]} of conjugate gradients", "solve", step)


def _residual(matvec: Matvec, right: Params, damping: float, value: Params) -> float:
    image = plus(matvec(value), value, damping)
    return norm(plus(image, right, -1.0)) / norm(right)


@dataclass(frozen=True)
class Neumann:
    """Truncated Neumann series x = s sum_k (I - s (A + rho I))^k b; converges for 0 < s < 2 / lambda_max.

    Attributes:
        step: s > 0, or None to find one by power iterations (see :func:`neumann_step`).
        max_steps: terms.
        tol: relative residual at which it stops.
    """

    step: float | None = None
    max_steps: int = 50
    tol: float = 1e-2

    @property
    def name(self) -> str:
        """Name with parameters."""
        step = "auto" if self.step is None else f"{self.step:g}"
        return f"neumann(step={step}, max_steps={self.max_steps}, tol={self.tol:g})"

    def solve(self, matvec: Matvec, right: Params, damping: float) -> LinearSolution:
        """Solve (A + rho I) x = b by damped Richardson iteration (the same partial sums).

        Args:
            matvec: v -> A v.
            right: b.
            damping: rho >= 0.

        Returns:
            x with its status.

        Raises:
            NotConverged: the residual grew (the step is too long, or the curvature negative).
        """
        size = norm(right)
        if size == 0.0:
            return LinearSolution(
                zeros_like(right), SolveStatus(status="converged", steps=0, residual=0.0, damping=damping)
            )
        step = neumann_step(matvec, right, damping) if self.step is None else self.step
        spent = _POWER_PRODUCTS if self.step is None else 0
        value, first = scaled(right, step), math.inf
        for terms in range(1, self.max_steps + 1):
            rest = plus(right, plus(matvec(value), value, damping), -1.0)
            relative = norm(rest) / size
            first = min(first, relative) if terms == 1 else first
            if not relative < 1e3:
                raise NotConverged(
                    f"neumann: residual {relative:.1e} after {terms} terms (shorten the step {step:g}, or raise "
                    "solve.damping if the curvature is negative)"
                )
            if relative <= self.tol:
                status = SolveStatus(status="converged", steps=spent + terms, residual=relative, damping=damping)
                return LinearSolution(value, status)
            value = plus(value, rest, step)
        residual = _residual(matvec, right, damping, value)
        if residual > first:
            raise NotConverged(
                f"neumann: the residual grew from {first:.1e} to {residual:.1e} (shorten the step {step:g}, or raise "
                "solve.damping if the curvature is negative)"
            )
        steps = spent + self.max_steps + 1
        return LinearSolution(value, SolveStatus(status="max_steps", steps=steps, residual=residual, damping=damping))


def neumann_step(matvec: Matvec, like: Params, damping: float, seed: int = 0) -> float:
    """Step of the Neumann series: 1 / lambda, with lambda the largest eigenvalue of A + rho I by power iterations.

    The series converges for steps below 2 / lambda, and power iterations estimate lambda from below, so half of the
    longest step leaves room for an estimate that is too small by half.

    Args:
        matvec: v -> A v.
        like: a vector of the space.
        damping: rho >= 0.
        seed: of the random start.

    Returns:
        The step, > 0.

    Raises:
        NotConverged: the eigenvalue of largest magnitude is not positive, so that no step converges.
    """
    vector = random_unit(like, seed)
    bend = length = 0.0
    for _ in range(_POWER_PRODUCTS):
        image = plus(matvec(vector), vector, damping)
        bend, length = dot(vector, image), norm(image)
        if not length > 0.0 or not math.isfinite(length):
            break
        vector = scaled(image, 1.0 / length)
    if not (bend > 0.0 and math.isfinite(length)):
        raise NotConverged("neumann: the curvature is not positive (raise solve.damping, or use cg)")
    return 1.0 / length
