"""The hypergradient of a transformer against inner problems solved anew in float64.

Truth: central differences of J(theta*(w)), theta* found by L-BFGS and Newton steps with dense Hessians
(``u2a.reference.inner``). Under test: the package's losses, Hessian products, CG, scorers and objective
(``tiny_engine``). Agreement checks sign, scale, 1/n factors, damping and solver at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest
import scipy.stats
import tiny_engine
import torch
from tiny_engine import (
    DecoderPolicy,
    encoded,
    engine_gains,
    groups,
    hessian_operator,
    losses_of,
    objective_slope,
    policy_at,
    slopes,
    solve_for_u,
)
from torch import Tensor

from u2a.bilevel.curvature import GaussNewton, HessianOperator
from u2a.bilevel.differences import Central, OneSided
from u2a.bilevel.forward_mode import ForwardMode
from u2a.bilevel.inner_terms import InnerTerms
from u2a.bilevel.linsolve import CG
from u2a.bilevel.vectors import dot, scaled
from u2a.encoding import Encoded
from u2a.errors import NotConverged
from u2a.losses import SFT
from u2a.progress import Quiet
from u2a.reference import dense
from u2a.reference.decoder import Decoder, Params, Shape, flatten, full_decoder, lora_decoder, unflatten
from u2a.reference.inner import (
    InnerProblem,
    InnerSolution,
    Row,
    random_problem,
    random_rows,
    resolved_gains,
    solve_inner,
    summed_log_probs,
)

KINDS = ("sft", "ga", "npo", "dpo") * 2
SMALL = Shape(layers=1)
TRAINED = ("layer1_q", "layer1_v", "layer1_norm1", "layer1_norm2", "norm")


def uniform(n: int) -> Tensor:
    return torch.full((n,), 1.0 / n, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A problem, weights w_0 and its solution there."""

    problem: InnerProblem
    weights: Tensor
    solution: InnerSolution
    hessian: Tensor

    @property
    def theta(self) -> Tensor:
        return self.solution.theta


def solved(problem: InnerProblem, weights: Tensor) -> Case:
    """Solve, and insist that the solution is one and the Hessian there safely positive definite."""
    solution = solve_inner(problem, weights)
    assert solution.converged
    hessian = problem.hessian(solution.theta, weights)
    assert float(torch.linalg.eigvalsh(hessian)[0]) > 0.01
    return Case(problem, weights, solution, hessian)


@cache
def case(name: str) -> Case:
    """LoRA of two layers, all parameters with a frozen part, and a smaller LoRA model at equal and at no weights."""
    if name == "full":
        return solved(random_problem(*full_decoder(1, TRAINED), 0.5, KINDS, seed=1), uniform(8))
    if name == "none":
        return solved(small().problem, torch.zeros(8, dtype=torch.float64))
    return small() if name == "small" else solved(random_problem(*lora_decoder(0), 0.5, KINDS), uniform(8))


@cache
def small() -> Case:
    """One layer, LoRA on q and v (128 numbers)."""
    problem = random_problem(*lora_decoder(1, SMALL, modules=("q", "v")), 0.5, KINDS * 2)
    return solved(replace(problem, terms=problem.terms[:8]), uniform(8))


@cache
def many() -> Case:
    """Another model of that size, with 16 candidates."""
    return solved(random_problem(*lora_decoder(2, SMALL, modules=("q", "v")), 0.5, KINDS * 2), uniform(16))


STEPS = {"lora": (1e-2, 1e-3, 1e-4), "none": (1e-2, 1e-3, 3e-5), "full": (1e-2, 1e-3, 3e-5)}


@cache
def resolved(name: str) -> tuple[Tensor, ...]:
    """Truth at each step; the last is the best."""
    it = case(name)
    return tuple(resolved_gains(it.problem, it.weights, step, it.solution) for step in STEPS[name])


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def assert_true_gains(found: Tensor, true: Tensor) -> None:
    """What a planted error must not survive."""
    assert torch.equal(found.sign(), true.sign())
    assert relative_error(found, true) < 1e-6


# T1, T2, T3: the hypergradient


def test_the_variants_are_of_the_stated_size():
    assert sum(value.numel() for value in case("lora").problem.start.values()) == 416
    it = case("full").problem
    trained = sum(value.numel() for value in it.start.values())
    assert trained == 560
    assert 5000 < trained + sum(value.numel() for value in it.decoder.frozen.values()) < 8000
    assert {value.dtype for value in (*it.start.values(), *it.decoder.frozen.values())} == {torch.float64}


@pytest.mark.parametrize("name", ["lora", "none", "full"])
def test_engine_equals_resolved_problems_and_their_error_falls_as_step_squared(name: str):
    it = case(name)
    found = engine_gains(it.problem, it.weights, it.theta)
    coarse, fine, best = resolved(name)
    order = torch.log10(torch.tensor(relative_error(coarse, found) / relative_error(fine, found)))
    assert float(order) == pytest.approx(2.0, abs=0.2)
    assert_true_gains(found, best)
    assert float(best.abs().min()) > 1e-4  # so that every sign means something


@pytest.mark.parametrize("name", ["lora", "none", "full"])
def test_dense_hessian_and_solve_equal_resolved_problems(name: str):
    it = case(name)
    slope = torch.func.grad(it.problem.objective)(it.theta)
    gradients = torch.func.jacrev(it.problem.losses)(it.theta)
    assert_true_gains(dense.implicit_gains(it.hessian, slope, gradients), resolved(name)[-1])


def test_hessian_products_of_the_engine_equal_the_dense_hessian_and_cg_the_dense_solve():
    it = case("small")
    operator = hessian_operator(it.problem, it.weights, it.theta)
    matrix = dense.matrix_of(operator.product, it.problem.start) + 0.5 * torch.eye(len(it.theta)).double()
    assert relative_error(matrix, it.hessian) < 1e-6
    assert relative_error(matrix, matrix.T) < 1e-12
    slope = objective_slope(it.problem, policy_at(it.problem, it.theta))
    assert relative_error(flatten(slope), torch.func.grad(it.problem.objective)(it.theta)) < 1e-11
    found = solve_for_u(it.problem, it.weights, it.theta, CG(max_steps=2000, tol=1e-13))
    assert relative_error(flatten(found.value), torch.linalg.solve(matrix, flatten(slope))) < 1e-9
    assert (found.status.status, found.status.damping) == ("converged", 0.5)
    early = solve_for_u(it.problem, it.weights, it.theta, CG(max_steps=5, tol=1e-9))
    true = float((matrix @ flatten(early.value) - flatten(slope)).norm() / flatten(slope).norm())
    assert early.status.status == "max_steps"
    assert early.status.residual == pytest.approx(true, rel=1e-9)
    assert true > 1e-3


# T4, T8: scoring


@cache
def scoring() -> tuple[InnerProblem, Tensor, Params]:
    """A problem, theta and a direction of length 1."""
    it = case("small")
    draw = torch.randn(len(it.theta), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return it.problem, it.theta, unflatten(draw / draw.norm(), it.problem.start)


def loop(problem: InnerProblem, policy: DecoderPolicy, u: Params) -> Tensor:
    """One forward and backward pass per candidate."""
    out = torch.zeros(len(problem.terms), dtype=torch.float64)
    for k, term in enumerate(problem.terms):
        loss = losses_of(problem, policy, [term]).of([0]).sum()
        gradients = torch.autograd.grad(loss, list(policy.trainable().values()))
        out[k] = sum((g * u[name]).sum() for g, name in zip(gradients, policy.trainable(), strict=True))
    return out


def test_forward_mode_equals_a_loop_over_samples_and_the_reference():
    problem, theta, u = scoring()
    policy = policy_at(problem, theta)
    found = slopes(problem, policy, u)
    assert relative_error(found, loop(problem, policy, u)) < 1e-11
    true = torch.func.jacrev(problem.losses)(theta) @ flatten(u)
    assert relative_error(found, true) < 1e-6
    plain = [k for kind in ("sft", "ga", "npo") for k in groups(problem)[kind]]
    assert relative_error(found[plain], true[plain]) < 1e-11


@pytest.mark.parametrize(("scorer", "order"), [(Central, 2.0), (OneSided, 1.0)])
def test_error_of_difference_scorers_falls_with_the_stated_order(scorer: type[Central] | type[OneSided], order: float):
    problem, theta, u = scoring()
    exact = slopes(problem, policy_at(problem, theta), u)
    errors = [relative_error(slopes(problem, policy_at(problem, theta), u, scorer(h)), exact) for h in (1e-2, 1e-3)]
    assert float(torch.tensor(errors[0] / errors[1]).log10()) == pytest.approx(order, abs=0.1)


def test_scores_do_not_depend_on_batches_order_or_padding():
    problem, theta, u = scoring()
    found = slopes(problem, policy_at(problem, theta), u)
    assert len({len(term.row.prompt + term.row.answer) for term in problem.terms}) > 2  # so there is padding
    assert relative_error(slopes(problem, policy_at(problem, theta, token_budget=1), u), found) < 1e-11
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = replace(problem, terms=tuple(problem.terms[k] for k in order))
    assert relative_error(slopes(shuffled, policy_at(problem, theta), u), found[order]) < 1e-11


def test_a_duplicate_gets_the_same_score_and_scores_add_up():
    problem, theta, u = scoring()
    twice = replace(problem, terms=(*problem.terms, problem.terms[2]))
    found = slopes(twice, policy_at(problem, theta), u)
    assert float(found[2]) == pytest.approx(float(found[8]), rel=1e-12)
    whole = torch.func.grad(lambda point: twice.losses(point).sum())(theta) @ flatten(u)
    assert float(found.sum()) == pytest.approx(float(whole), rel=1e-6)


def test_left_padded_masked_batches_equal_rows_alone_and_right_padded_ones():
    problem, theta, _ = scoring()
    rows = random_rows(9, 6)
    right = summed_log_probs(problem.decoder, unflatten(theta, problem.start), rows)
    alone = [float(summed_log_probs(problem.decoder, unflatten(theta, problem.start), [row])) for row in rows]
    left = policy_at(problem, theta).log_probs([encoded(row) for row in rows]).sum
    assert torch.allclose(left, right, rtol=1e-12, atol=1e-12)
    assert right.tolist() == pytest.approx(alone, rel=1e-12)


# T5: what damping means


def test_damping_is_an_extra_proximal_term_anchored_at_the_solution():
    it, rho = case("small"), 0.7
    found = engine_gains(it.problem, it.weights, it.theta, damping=rho)
    anchored = replace(it.problem, anchor=it.theta, anchor_strength=rho)
    warm = replace(it.solution, hessian=it.hessian + rho * torch.eye(len(it.theta)).double())
    coarse, fine, best = (resolved_gains(anchored, it.weights, step, warm) for step in (1e-2, 1e-3, 1e-4))
    assert_true_gains(found, best)
    order = torch.log10(torch.tensor(relative_error(coarse, found) / relative_error(fine, found)))
    assert float(order) == pytest.approx(2.0, abs=0.2)
    assert relative_error(engine_gains(it.problem, it.weights, it.theta), best) > 1e-2


# T6: Gauss-Newton


def gauss_newton(decoder: Decoder, start: Params, theta: Tensor, rows: tuple[Row, ...]) -> Tensor:
    """(1/m) sum_i (1/T_i) sum_t J_t' (diag(p) - p p') J_t of the NLL, J_t the Jacobian of the logits."""
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for row in rows:
        tokens = torch.tensor([row.prompt + row.answer])
        places = range(len(row.prompt) - 1, tokens.shape[1] - 1)

        def logits(point: Tensor, tokens: Tensor = tokens, places: range = places) -> Tensor:
            return decoder.logits(unflatten(point, start), tokens)[0, list(places)]

        jacobians, probabilities = torch.func.jacrev(logits)(theta), logits(theta).softmax(-1)
        for jacobian, p in zip(jacobians, probabilities, strict=True):
            total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(row.answer)
    return total / len(rows)


def test_gauss_newton_is_the_hessian_where_logits_are_linear_and_only_there():
    gaps = []
    for decoder, start in (full_decoder(2, ("head",), SMALL), lora_decoder(2, SMALL, modules=("q", "v"))):
        problem = InnerProblem(decoder, start, (), random_rows(3, 4), (), strength=0.0)
        theta, nothing = flatten(start), torch.zeros(0, dtype=torch.float64)
        rows = tuple(encoded(row) for row in problem.retain)
        terms = InnerTerms(policy_at(problem, theta), SFT(), (), nothing, nothing, rows, "nll", 1.0)
        v = torch.randn(len(theta), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        exact = flatten(HessianOperator(terms).product(unflatten(v, start)))
        dense_product = gauss_newton(decoder, start, theta, problem.retain) @ v
        package = flatten(GaussNewton().at(terms).product(unflatten(v, start)))
        assert relative_error(package, dense_product) < 1e-11
        gaps.append(relative_error(dense_product, exact))
    assert gaps[0] < 1e-12
    assert gaps[1] > 1e-2


# T7: the gauge of LoRA


@dataclass(frozen=True)
class Distance:
    """Mean KL(teacher || policy) over all positions of rows: least, and stationary, at the teacher."""

    policy: DecoderPolicy
    rows: tuple[Row, ...]
    teacher: tuple[Tensor, ...]

    def scalars(self) -> Iterator[Tensor]:
        for row, old in zip(self.rows, self.teacher, strict=True):
            new = self.policy.model(torch.tensor([row.prompt + row.answer])).logits.log_softmax(-1)
            yield (old.exp() * (old - new)).sum(-1).mean()

    def with_less_memory(self, compute: Callable[[], Params]) -> Params:
        return compute()


def gauge_directions(theta: Params, antisymmetric: bool = False) -> Tensor:
    """(B X, -X A) for every module and every X of a basis of r x r matrices: they leave B A as it is."""
    rank = next(value.shape[0] for name, value in theta.items() if name.endswith("_a"))
    columns = []
    for name in [name.removesuffix("_lora_a") for name in theta if name.endswith("_a")]:
        for i in range(rank):
            for j in range(i + 1 if antisymmetric else 0, rank):
                x = torch.zeros(rank, rank, dtype=torch.float64)
                x[i, j] = 1.0
                x = x - x.T if antisymmetric else x
                move = {key: torch.zeros_like(value) for key, value in theta.items()}
                move[f"{name}_lora_b"] = theta[f"{name}_lora_b"] @ x
                move[f"{name}_lora_a"] = -x @ theta[f"{name}_lora_a"]
                columns.append(flatten(move) / flatten(move).norm())
    return torch.stack(columns, dim=1)


def test_without_a_proximal_term_the_gauge_of_lora_is_the_null_space_and_cg_gives_the_pseudo_inverse():
    decoder, start = lora_decoder(4, SMALL, modules=("q", "v"))
    rows = random_rows(6, 8)
    problem = replace(random_problem(decoder, start, 0.0, ("sft", "npo")), start=start)
    policy = policy_at(problem, flatten(start))
    teacher = tuple(
        decoder.logits(start, torch.tensor([row.prompt + row.answer])).log_softmax(-1).detach() for row in rows
    )
    operator = HessianOperator(Distance(policy, rows, teacher))
    hessian = dense.matrix_of(operator.product, start)
    null = gauge_directions(start)
    assert null.shape[1] == 2 * 4  # r^2 directions per module
    assert float((hessian @ null).norm()) < 1e-10
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert float(eigenvalues[7].abs()) < 1e-12 < 1e-6 < float(eigenvalues[8])
    slope = objective_slope(problem, policy)
    gradients = torch.func.jacrev(problem.losses)(flatten(start))
    assert float((null.T @ flatten(slope)).norm()) < 1e-10
    assert float((gradients @ null).norm()) < 1e-10
    found = CG(max_steps=3000, tol=1e-11).solve(lambda v: unflatten(hessian @ flatten(v), start), slope, 0.0)
    assert (found.status.status, found.status.damping) == ("converged", 0.0)
    assert relative_error(flatten(found.value), torch.linalg.pinv(hessian, rtol=1e-10) @ flatten(slope)) < 1e-6


def test_a_proximal_term_on_the_factors_leaves_the_rotations_only():
    _, start = lora_decoder(4, SMALL, modules=("q", "v"))
    pull = flatten(start)  # gradient of ||theta||^2 / 2
    assert float((gauge_directions(start, antisymmetric=True).T @ pull).norm()) < 1e-12
    assert float((gauge_directions(start).T @ pull).norm()) > 1e-2


# T9: finite changes


def left_out(it: Case, zeros: list[list[int]], share: float = 1.0) -> tuple[Tensor, Tensor]:
    """(predicted, measured) change of J when groups of candidates lose a share of their weight."""
    gains = engine_gains(it.problem, it.weights, it.theta)
    base = float(it.problem.objective(it.theta))
    predicted, measured = [], []
    for group in zeros:
        weights = it.weights.clone()
        weights[group] *= 1.0 - share
        solution = solve_inner(it.problem, weights, it.solution)
        assert solution.converged
        measured.append(float(it.problem.objective(solution.theta)) - base)
        predicted.append(-share * float(gains[group] @ it.weights[group]))
    return torch.tensor(predicted), torch.tensor(measured)


def test_gains_predict_leaving_one_out():
    predicted, measured = left_out(many(), [[k] for k in range(16)])
    assert torch.equal(predicted.sign(), measured.sign())
    assert scipy.stats.spearmanr(predicted, measured).statistic >= 0.95


def test_error_of_that_prediction_shrinks_with_the_number_of_candidates():
    """Leaving out one of r copies of a candidate is to take 1 / r of its weight: the error is of second order."""
    once, twice, four = (relative_error(*left_out(small(), [[k] for k in range(8)], 1.0 / r)) for r in (1, 2, 4))
    assert once > 1.5 * twice > 1.5**2 * four


def test_gains_predict_leaving_random_halves_out():
    """The linear datamodelling score over 30 halves (0.945), a number to report rather than an equality."""
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randperm(16, generator=generator)[:8].tolist() for _ in range(30)]
    lds = float(scipy.stats.spearmanr(*left_out(many(), halves)).statistic)
    assert lds > 0.8


# T10 and planted errors: what must fail


def test_an_inner_problem_stopped_early_is_flagged_and_its_gains_are_wrong():
    it = case("small")
    early = solve_inner(it.problem, it.weights, stop_at=1e-2)
    assert not early.converged
    assert 1e-3 < early.gradient_norm < 0.1
    true = truth_and_engine()[1]
    good = relative_error(engine_gains(it.problem, it.weights, it.theta), true)
    bad = relative_error(engine_gains(it.problem, it.weights, early.theta), true)
    assert good < 1e-6 < 1e-3 < bad


def test_an_indefinite_hessian_is_reported_or_refused():
    problem = replace(case("small").problem, strength=0.0)
    theta = flatten(problem.start)
    lowest = float(torch.linalg.eigvalsh(problem.hessian(theta, uniform(8)))[0])
    assert lowest < -0.01
    found = solve_for_u(problem, uniform(8), theta, CG(max_steps=2000, tol=1e-10))
    assert found.status.status == "negative_curvature"
    assert found.status.damping > -lowest  # the system solved is another, positive definite one
    with pytest.raises(NotConverged):
        CG(max_steps=3, tol=1e-10, throw=True).solve(
            hessian_operator(problem, uniform(8), theta).product,
            objective_slope(problem, policy_at(problem, theta)),
            9.0,
        )


@cache
def truth_and_engine() -> tuple[Case, Tensor]:
    it = case("small")
    return it, resolved_gains(it.problem, it.weights, 1e-4, it.solution)


def test_planted_wrong_sign_of_u_is_killed():
    it, true = truth_and_engine()
    u = solve_for_u(it.problem, it.weights, it.theta).value
    policy = policy_at(it.problem, it.theta)
    assert_true_gains(-slopes(it.problem, policy, u), true)
    with pytest.raises(AssertionError):
        assert_true_gains(-slopes(it.problem, policy, scaled(u, -1.0)), true)


@pytest.mark.parametrize("shift", [-1, 1])
def test_planted_answer_mask_off_by_one_is_killed(shift: int, monkeypatch: pytest.MonkeyPatch):
    it, true = truth_and_engine()
    assert_true_gains(engine_gains(it.problem, it.weights, it.theta), true)
    monkeypatch.setattr(tiny_engine, "encoded", lambda row: Encoded(row.prompt + row.answer, len(row.answer) + shift))
    with pytest.raises(AssertionError):
        assert_true_gains(engine_gains(it.problem, it.weights, it.theta), true)


def test_planted_dropped_retain_term_is_killed():
    it, true = truth_and_engine()
    policy = policy_at(it.problem, it.theta)
    gains = []
    for retain in (True, False):
        operator = hessian_operator(it.problem, it.weights, it.theta, retain)
        u = tiny_engine.EXACT.solve(operator.product, objective_slope(it.problem, policy), it.problem.strength).value
        gains.append(-slopes(it.problem, policy, u))
    assert_true_gains(gains[0], true)
    with pytest.raises(AssertionError):
        assert_true_gains(gains[1], true)


def test_planted_forgotten_mean_is_killed():
    """The 1 / n of the gradient of J, and that of the weights of the inner problem."""
    it, true = truth_and_engine()
    policy = policy_at(it.problem, it.theta)
    slope = objective_slope(it.problem, policy)
    n = len(it.weights)
    for factor, weights in ((1.0, it.weights), (float(len(it.problem.pairs)), it.weights), (1.0, n * it.weights)):
        operator = hessian_operator(it.problem, weights, it.theta)
        u = tiny_engine.EXACT.solve(operator.product, scaled(slope, factor), it.problem.strength).value
        found = -slopes(it.problem, policy, u)
        if factor == 1.0 and weights is it.weights:
            assert_true_gains(found, true)
        else:
            with pytest.raises(AssertionError):
                assert_true_gains(found, true)


def test_inner_products_and_forward_mode_are_the_same_gain():
    it, true = truth_and_engine()
    u = solve_for_u(it.problem, it.weights, it.theta).value
    rows = torch.func.jacrev(it.problem.losses)(it.theta)
    assert_true_gains(torch.tensor([-dot(u, unflatten(row, it.problem.start)) for row in rows]).double(), true)
    losses = losses_of(it.problem, policy_at(it.problem, it.theta), [it.problem.terms[0]])
    found = ForwardMode().derivatives(losses, [u], Quiet()).derivatives
    assert -float(found[0, 0]) == pytest.approx(float(true[0]), rel=1e-5)
