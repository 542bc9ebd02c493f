"""Hypergradients of problems whose inner solution is known, computed through the package's own engines in float64.

J(theta*(omega)) is differentiated in three ways that share nothing: closed form, central differences of inner
problems solved anew, and adjoint + linear solver + sign convention of the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from u2a.bilevel.hypergrad import Identity, Implicit
from u2a.bilevel.linsolve import CG, Neumann
from u2a.bilevel.vectors import dot
from u2a.bilevel.weight import mirror_step
from u2a.modeling import Params
from u2a.reference.dense import central_differences, dense_gradient, dense_hessian, flatten
from u2a.reference.quadratic import QuadraticProblem, random_quadratic

EXACT = Implicit(CG(max_steps=50, tol=1e-12))
SEEDS = range(4)


def split(column: Tensor) -> Params:
    """A vector in two blocks, so that structure is exercised."""
    return {"first": column[:2].clone(), "second": column[2:].reshape(1, -1).clone()}


@dataclass(frozen=True)
class Dense:
    """A matrix as a curvature."""

    matrix: Tensor

    def product(self, vector: Params) -> Params:
        return split(self.matrix @ flatten(vector))


def engine_gains(adjoint: Implicit | Identity, hessian: Tensor, slope: Tensor, gradients: Tensor) -> Tensor:
    """Gains as the pipeline computes them: u = H^-1 grad J, then -u' grad l_k."""
    if isinstance(adjoint, Identity):
        u = adjoint.solve(split(slope)).value
    else:  # damping is absolute here: the unit is asked of a curvature, and none is built
        damping = 0.0 if adjoint.damping == "auto" else float(adjoint.damping)
        u = adjoint.solve(split(slope), Dense(hessian), damping).value
    return torch.tensor([-dot(u, split(row)) for row in gradients], dtype=torch.float64)


def problem_gains(problem: QuadraticProblem, weights: Tensor, adjoint: Implicit | Identity = EXACT) -> Tensor:
    theta = problem.solution(weights)
    slope = dense_gradient(lambda p: problem.objective(p["theta"]), {"theta": theta})
    return engine_gains(adjoint, problem.hessian(weights), slope, problem.loss_gradients(theta))


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def uniform(n: int) -> Tensor:
    return torch.full((n,), 1.0 / n, dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
def test_quadratic_hypergradient_matches_closed_form_and_resolved_problems(seed: int):
    problem, weights = random_quadratic(seed), uniform(5)
    assert float(torch.linalg.eigvalsh(problem.hessian(weights)).min()) > 0.1
    resolved = central_differences(problem.value, weights, 1e-5)
    found = problem_gains(problem, weights)
    assert relative_error(problem.gains(weights), resolved) < 1e-8
    assert relative_error(found, resolved) < 1e-6
    assert torch.equal(found.sign(), resolved.sign())


@pytest.mark.parametrize("seed", SEEDS)
def test_error_of_central_differences_falls_as_step_squared(seed: int):
    problem, weights = random_quadratic(seed), uniform(5)
    true = problem.gains(weights)
    coarse, fine = (float((central_differences(problem.value, weights, h) - true).norm()) for h in (1e-2, 1e-3))
    assert coarse / fine == pytest.approx(100.0, rel=0.2)


def test_hypergradient_off_uniform_weights_and_with_zero_entries():
    problem, weights = random_quadratic(7), torch.tensor([0.0, 0.6, 0.1, 0.3, 0.0], dtype=torch.float64)
    assert relative_error(problem_gains(problem, weights), central_differences(problem.value, weights, 1e-5)) < 1e-6


def assert_gains_agree(found: Tensor, resolved: Tensor) -> None:
    """The assertion that a wrong sign must not survive."""
    assert torch.equal(found.sign(), resolved.sign())
    assert relative_error(found, resolved) < 1e-6


def test_planted_wrong_sign_is_killed():
    problem, weights = random_quadratic(0), uniform(5)
    resolved = central_differences(problem.value, weights, 1e-5)
    assert_gains_agree(problem_gains(problem, weights), resolved)
    with pytest.raises(AssertionError):
        assert_gains_agree(-problem_gains(problem, weights), resolved)


def test_planted_dropped_regulariser_and_unnormalised_gradient_are_killed():
    problem, weights = random_quadratic(0), uniform(5)
    resolved = central_differences(problem.value, weights, 1e-5)
    theta = problem.solution(weights)
    slope, gradients = problem.target - theta, problem.loss_gradients(theta)
    assert_gains_agree(engine_gains(EXACT, problem.hessian(weights), slope, gradients), resolved)
    bare = problem.hessian(weights) - problem.strength * torch.eye(4).double()  # the retain term left out of H
    for hessian, scale in ((bare, 1.0), (problem.hessian(weights), 2.0)):
        with pytest.raises(AssertionError):
            assert_gains_agree(engine_gains(EXACT, hessian, scale * slope, gradients), resolved)


@pytest.mark.parametrize("seed", SEEDS)
def test_gains_raise_the_objective_when_followed_and_lower_it_when_reversed(seed: int):
    problem, weights = random_quadratic(seed), uniform(5)
    gains = problem_gains(problem, weights)
    rate = 0.05 / float(gains.abs().max())
    with_gain = problem.value(mirror_step(weights, -gains, rate))
    against = problem.value(mirror_step(weights, gains, rate))
    assert with_gain > problem.value(weights) > against


def test_damping_means_an_extra_proximal_term_anchored_at_the_solution():
    problem, weights, rho = random_quadratic(3), uniform(5), 0.7
    anchor = problem.solution(weights)

    def resolved(omega: Tensor) -> float:
        matrix = problem.hessian(omega) + rho * torch.eye(4).double()
        right = torch.einsum("k,kij,kj->i", omega, problem.curvatures, problem.centres)
        right = right + problem.strength * problem.start + rho * anchor
        return float(problem.objective(torch.linalg.solve(matrix, right)))

    found = problem_gains(problem, weights, Implicit(CG(50, 1e-12), damping=rho))
    assert relative_error(found, central_differences(resolved, weights, 1e-5)) < 1e-6


def test_identity_is_exact_only_where_the_hessian_is_a_multiple_of_one():
    problem, weights = random_quadratic(1), uniform(5)
    theta = problem.solution(weights)
    slope, gradients = problem.target - theta, problem.loss_gradients(theta)
    isotropic = 3.0 * torch.eye(4, dtype=torch.float64)
    exact = engine_gains(EXACT, isotropic, slope, gradients)
    assert relative_error(engine_gains(Identity(3.0), isotropic, slope, gradients), exact) < 1e-12
    assert relative_error(problem_gains(problem, weights, Identity(3.0)), problem.gains(weights)) > 1e-2


def test_neumann_agrees_with_cg():
    problem, weights = random_quadratic(2), uniform(5)
    step = 1.0 / float(torch.linalg.eigvalsh(problem.hessian(weights)).max())
    series = Implicit(Neumann(step, max_steps=2000, tol=1e-11))
    assert relative_error(problem_gains(problem, weights, series), problem.gains(weights)) < 1e-9


class Logistic:
    """Not quadratic: l_k = log(1 + exp(-a_k' theta)) on the negatives of a ridge-regularised inner problem."""

    def __init__(self, seed: int, n: int = 6, d: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
        self.goal = torch.randn(d, generator=generator, dtype=torch.float64)

    def losses(self, theta: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-self.rows @ theta)

    def inner(self, theta: Tensor, weights: Tensor) -> Tensor:
        return weights @ self.losses(theta) + 0.1 * theta.square().sum()

    def objective(self, theta: Tensor) -> Tensor:
        return torch.tanh(theta @ self.goal) + theta.sin().sum()

    def hessian(self, theta: Tensor, weights: Tensor) -> Tensor:
        return dense_hessian(lambda p: self.inner(p["t"], weights), {"t": theta})

    def solution(self, weights: Tensor) -> Tensor:
        theta = torch.zeros(len(self.goal), dtype=torch.float64)
        for _ in range(50):
            slope = dense_gradient(lambda p: self.inner(p["t"], weights), {"t": theta})
            if float(slope.norm()) < 1e-14:
                break
            theta = theta - torch.linalg.solve(self.hessian(theta, weights), slope)
        assert float(slope.norm()) < 1e-12
        return theta


@pytest.mark.parametrize("seed", range(2))
def test_nonlinear_hypergradient_matches_resolved_newton_solutions(seed: int):
    problem, weights = Logistic(seed), uniform(6)
    theta = problem.solution(weights)
    slope = dense_gradient(lambda p: problem.objective(p["t"]), {"t": theta})
    gradients = torch.func.jacrev(problem.losses)(theta)
    found = engine_gains(EXACT, problem.hessian(theta, weights), slope, gradients)
    resolved = central_differences(lambda w: float(problem.objective(problem.solution(w))), weights, 1e-4)
    assert_gains_agree(found, resolved)


def test_an_inner_problem_stopped_early_gives_a_visibly_wrong_hypergradient():
    problem, weights = Logistic(0), uniform(6)
    resolved = central_differences(lambda w: float(problem.objective(problem.solution(w))), weights, 1e-4)
    theta = problem.solution(weights) + 0.3
    slope = dense_gradient(lambda p: problem.objective(p["t"]), {"t": theta})
    gradients = torch.func.jacrev(problem.losses)(theta)
    assert relative_error(engine_gains(EXACT, problem.hessian(theta, weights), slope, gradients), resolved) > 1e-2
