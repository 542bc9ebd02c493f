"""Adjoints, and the Hessian of the inner problem against dense Hessians and finite differences of gradients."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WEIGHTS, candidate_losses, direction, encode, hessian, inner_by_hand, small_policy, theta_of

from tiny import examples, tiny_policy
from u2a.bilevel.adjoint import InnerPoint
from u2a.bilevel.attention import second_order_attention
from u2a.bilevel.curvature import Hessian, HessianOperator
from u2a.bilevel.fisher import AdamMetric
from u2a.bilevel.hypergrad import Identity, Implicit, make_adjoint
from u2a.bilevel.inner_terms import InnerTerms
from u2a.bilevel.linsolve import CG
from u2a.bilevel.operators import mean_eigenvalue
from u2a.bilevel.vectors import dot, norm, plus, unit
from u2a.config import SolveSection, UnlearnSection
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.reference.dense import dense_gradient, dense_hessian, flatten, matrix_of, unflatten
from u2a.unlearn import InnerProblem

QUIET = Console(quiet=True)
TERMS = ("none", "nll", "kl", "proximal")
LOSSES = ("ga", "npo")


@lru_cache
def shared_policy() -> Policy:
    return small_policy()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("term", TERMS)
def test_product_is_the_derivative_of_the_gradient_of_the_inner_problem(loss: str, term: str):
    policy = shared_policy()
    operator = hessian(policy, loss, term)
    retain = encode(policy, examples(2, start=40))
    function = inner_by_hand(policy, (loss, term), operator.terms.rows, WEIGHTS, retain)
    v, theta = direction(policy, 3), theta_of(policy)
    step = 1e-4
    above, below = (dense_gradient(function, plus(theta, v, sign * step)) for sign in (1.0, -1.0))
    expected = (above - below) / (2 * step)
    found = flatten(operator.product(v))
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_product_is_a_dense_hessian_with_its_retain_term():
    policy = shared_policy()
    operator = hessian(policy, "npo", "nll")
    function = inner_by_hand(policy, ("npo", "nll"), operator.terms.rows, WEIGHTS, operator.terms.retain)
    with second_order_attention(policy):
        exact = dense_hessian(function, theta_of(policy))
    found = matrix_of(operator.product, policy.trainable())
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    dropped = matrix_of(hessian(policy, "npo", "none").product, policy.trainable())
    assert float((dropped - exact).norm() / exact.norm()) > 1e-2


@pytest.mark.parametrize("term", TERMS)
def test_product_is_affine_in_the_weight_of_the_retain_term(term: str):
    policy = shared_policy()
    v = direction(policy, 4)
    none, once, twice = (flatten(hessian(policy, "ga", term, weight).product(v)) for weight in (0.0, 1.0, 2.0))
    assert torch.allclose(twice - none, 2.0 * (once - none), atol=1e-6 * float(once.norm()))
    assert (float((once - none).norm()) > 1e-3) == (term != "none")


@settings(max_examples=8)
@given(seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)), loss=st.sampled_from(LOSSES))
def test_product_is_symmetric_and_linear(seeds: tuple[int, int], loss: str):
    policy = shared_policy()
    operator = hessian(policy, loss, "kl")
    v, w = direction(policy, seeds[0]), direction(policy, 5000 + seeds[1])
    hv, hw = operator.product(v), operator.product(w)
    assert dot(w, hv) == pytest.approx(dot(v, hw), rel=1e-5, abs=1e-7)
    both = flatten(operator.product(plus(v, w, -2.0)))
    assert torch.allclose(both, flatten(hv) - 2.0 * flatten(hw), atol=1e-6 * float(both.norm()))


@pytest.mark.parametrize("term", TERMS)
def test_product_does_not_depend_on_batching_or_the_order_of_rows(term: str):
    policy = small_policy()
    v = direction(policy, 6)
    together = flatten(hessian(policy, "npo", term).product(v))
    policy.token_budget = 1
    alone = flatten(hessian(policy, "npo", term).product(v))
    operator, order = hessian(policy, "npo", term), [2, 0, 1]
    rows = tuple(operator.terms.rows[k] for k in order)
    sums = operator.terms.reference_sums[order]
    shuffled = InnerTerms(
        policy, operator.terms.loss, rows, WEIGHTS[order], sums, operator.terms.retain[::-1], operator.terms.term, 0.7
    )
    assert torch.allclose(alone, together, rtol=1e-6, atol=1e-7)
    assert torch.allclose(flatten(HessianOperator(shuffled).product(v)), together, rtol=1e-6, atol=1e-7)


def test_gradient_ascent_has_negative_curvature_somewhere():
    matrix = matrix_of(hessian(shared_policy(), "ga", "none").product, shared_policy().trainable())
    assert float(torch.linalg.eigvalsh(matrix).min()) < -1e-3


def test_product_works_with_full_fine_tuning_and_leaves_theta_alone():
    policy = tiny_policy(adapter=False)
    before = policy.snapshot()
    operator = hessian(policy, "npo", "kl")
    v = {name: torch.randn_like(value) for name, value in policy.trainable().items()}
    image = operator.product(v)
    assert norm(image) > 0
    assert all(torch.equal(before[name], value) for name, value in policy.snapshot().items())
    assert all(value.grad is None for value in policy.trainable().values())


def test_identity_divides_by_gamma():
    gradient = {"a": torch.tensor([2.0, 4.0])}
    found = Identity(4.0).solve(gradient)
    assert found.value["a"].tolist() == [0.5, 1.0]
    assert (found.status.status, found.status.damping) == ("closed_form", 4.0)


def test_implicit_on_the_policy_equals_a_dense_solve_of_the_damped_hessian():
    policy = shared_policy()
    operator = hessian(policy, "npo", "nll")
    matrix = matrix_of(operator.product, policy.trainable())
    matrix = (matrix + matrix.T) / 2
    rho = 1.0 - float(torch.linalg.eigvalsh(matrix).min())
    gradient = direction(policy, 9)
    found = Implicit(CG(max_steps=200, tol=1e-8)).solve(gradient, operator, rho)
    exact = torch.linalg.solve(matrix + rho * torch.eye(len(matrix)).double(), flatten(gradient))
    assert found.status.status == "converged"
    assert float((flatten(found.value) - exact).norm() / exact.norm()) < 1e-6


def test_implicit_with_strong_damping_tends_to_identity():
    policy = shared_policy()
    operator, gradient = hessian(policy, "npo", "nll"), direction(policy, 10)
    found = Implicit(CG(50, 1e-10)).solve(gradient, operator, 1e7).value
    assert torch.allclose(1e7 * flatten(found), flatten(Identity().solve(gradient).value), atol=1e-4)


def point_of(policy: Policy, section: SolveSection, inner: UnlearnSection) -> InnerPoint:
    rows = examples(3)
    problem = InnerProblem(rows, section=inner)
    return InnerPoint(policy, problem, problem.uniform(), candidate_losses(policy, problem.loss, rows), section)


def test_automatic_damping_is_one_over_rate_times_steps_and_other_damping_is_in_mean_eigenvalues():
    policy = small_policy()
    inner = UnlearnSection(loss="npo", retain_term="none", learning_rate=0.01, max_steps=20)
    gradient = direction(policy, 2)
    section = SolveSection(adjoint="implicit", cg_steps=60, cg_tol=1e-6, scorer="jvp")
    point = point_of(policy, section, inner)
    found = Implicit(CG(60, 1e-6)).derivatives(point, [gradient], QUIET).solves[0]
    assert found.mean_eigenvalue is None and found.status in ("converged", "negative_curvature")
    assert found.damping == pytest.approx(5.0) or (found.status == "negative_curvature" and found.damping > 5.0)
    matrix = matrix_of(Hessian().at(point.terms()).product, policy.trainable())
    given_damping = Implicit(CG(60, 1e-6), damping=1e4).derivatives(point, [gradient], QUIET).solves[0]
    assert given_damping.mean_eigenvalue is not None
    assert given_damping.damping == pytest.approx(1e4 * given_damping.mean_eigenvalue)
    size = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).abs().mean())  # |lambda|: this matrix is indefinite
    assert mean_eigenvalue(Hessian().at(point.terms()), gradient, seed=0, probes=60) == pytest.approx(size, rel=0.3)


def test_all_gradients_are_solved_under_the_highest_damping_that_one_of_them_needed():
    policy = small_policy()
    inner = UnlearnSection(loss="ga", retain_term="none", learning_rate=1.0, max_steps=1)
    section = SolveSection(adjoint="implicit", scorer="jvp")
    operator = Hessian().at(point_of(policy, section, inner).terms())
    values, vectors = torch.linalg.eigh(matrix_of(operator.product, policy.trainable()))
    like = policy.trainable()
    up, down = (unflatten(vectors[:, k].contiguous(), like) for k in (-1, 0))
    rate = 1.0 / (0.5 * float(-values[0]))  # the damping does not make up for the lowest curvature
    point = point_of(policy, section, inner.model_copy(update={"learning_rate": rate}))
    alone = Implicit(CG(60, 1e-9)).derivatives(point, [up], QUIET)
    assert alone.solves[0].status == "converged"  # it does not meet the negative curvature
    found = Implicit(CG(60, 1e-9)).derivatives(point, [up, plus(up, down, 0.5)], QUIET)
    first, second = found.solves
    assert first.status == second.status == "negative_curvature"
    assert first.damping == second.damping > 1.5 * alone.solves[0].damping
    ratio = (float(values[-1]) + alone.solves[0].damping) / (float(values[-1]) + first.damping)
    torch.testing.assert_close(found.values[:, 0], ratio * alone.values[:, 0], rtol=1e-3, atol=1e-6)


def test_configured_adjoint():
    section = SolveSection(adjoint="implicit", damping=0.3, cg_steps=7, cg_tol=1e-4)
    assert make_adjoint(section, UnlearnSection()) == Implicit(CG(7, 1e-4), Hessian(), 0.3)
    run = UnlearnSection(
        adam_epsilon=1e-3, batch_size=4, gradient_accumulation_steps=3, retain_term="nll", retain_batch_size=2
    )
    found = make_adjoint(section.model_copy(update={"curvature": "adam"}), run)
    assert isinstance(found, Implicit)
    assert found.curvature == AdamMetric(
        batch_size=12, retain_batch_size=6, eps=1e-3, max_norm=1.0
    )  # the run's own steps
    assert make_adjoint(SolveSection(adjoint="identity"), UnlearnSection()) == Identity()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_second_order_attention_gives_double_backward_on_every_kernel(attention: str):
    policy = tiny_policy(lora_b_sd=0.1, attention=attention)
    v = {name: torch.ones_like(value) for name, value in policy.trainable().items()}
    assert norm(hessian(policy, "ga", "none").product(v)) > 0


@pytest.mark.parametrize("adapter", [True, False])
def test_flash_attention_gives_way_to_sdpa_for_the_block_and_comes_back(monkeypatch: pytest.MonkeyPatch, adapter: bool):
    policy = tiny_policy(lora_b_sd=0.1, adapter=adapter)
    base = policy.model.get_base_model() if adapter else policy.model
    monkeypatch.setattr(  # the kernel itself cannot be installed on a CPU; only its name matters here
        type(base), "set_attn_implementation", lambda self, name: setattr(self.config, "_attn_implementation", name)
    )
    base.config._attn_implementation = "flash_attention_2"
    with second_order_attention(policy):
        assert base.config._attn_implementation == "sdpa"
    assert base.config._attn_implementation == "flash_attention_2"
    v = {name: torch.ones_like(value) for name, value in policy.trainable().items()}
    assert norm(hessian(policy, "ga", "none").product(v)) > 0  # flash_attn is not installed: it was not called
    with pytest.raises(ValueError, match="stop"), second_order_attention(policy):
        raise ValueError("stop")
    assert base.config._attn_implementation == "flash_attention_2"


def test_unit_has_length_one_and_leaves_zero_alone():
    v, length = unit({"a": torch.tensor([3.0, 4.0])})
    assert (v["a"].tolist(), length) == (pytest.approx([0.6, 0.8]), 5.0)
    zero, none = unit({"a": torch.zeros(2)})
    assert (zero["a"].tolist(), none) == ([0.0, 0.0], 0.0)


def test_flatten_matches_the_order_of_trainable_parameters():
    policy = shared_policy()
    column = flatten(policy.trainable())
    assert len(column) == 80
    assert torch.equal(flatten(unflatten(column, policy.trainable())), column)
