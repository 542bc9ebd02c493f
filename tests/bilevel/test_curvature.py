"""Curvatures against matrices written out in float64 from Jacobians of the logits, and closed forms."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WEIGHTS, B, direction, inner_by_hand, retain_by_hand, small_policy, terms, theta_of
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from tiny import ask, tiny_model, tiny_policy, tiny_tokenizer
from u2a.bilevel.attention import second_order_attention
from u2a.bilevel.curvature import Curvature, GaussNewton, Hessian, make_curvature
from u2a.bilevel.fisher import AdamMetric, DiagonalFisher
from u2a.bilevel.inner_terms import InnerTerms
from u2a.bilevel.linsolve import CG
from u2a.bilevel.operators import Diagonal, mean_eigenvalue
from u2a.bilevel.proximal import proximal_diagonal, proximal_product
from u2a.bilevel.vectors import dot, norm, plus
from u2a.config import AdapterConfig, UnlearnSection
from u2a.encoding import Encoded
from u2a.errors import NonFiniteError
from u2a.losses import make_loss
from u2a.modeling import Params, Policy
from u2a.reference.dense import dense_gradient, dense_hessian, flatten, matrix_of, unflatten

LAMBDA = 0.7  # retain weight of small.terms
curvlinops: Any = importlib.import_module("curvlinops")  # its annotations are narrower than what it takes
peers: Any = importlib.import_module("curvlinops.examples")


@lru_cache
def shared_policy() -> Policy:
    return small_policy()


@lru_cache
def logits_and_jacobian(row: Encoded) -> tuple[Tensor, Tensor]:
    """(T, V) logits of one row alone and their (T, V, d) Jacobian, by forward mode."""
    policy = shared_policy()
    ids = torch.tensor([row.input_ids])
    theta = theta_of(policy)

    def logits(parameters: Params) -> Tensor:
        out = torch.func.functional_call(policy.model, parameters, (), {"input_ids": ids}).logits[0]
        return out[-row.n_answer - 1 : -1]

    with torch.no_grad(), second_order_attention(policy):
        jacobian = torch.func.jacfwd(logits)(theta)
        return logits(theta), torch.cat([block.flatten(2) for block in jacobian.values()], dim=-1)


def fisher_by_hand(row: Encoded) -> Tensor:
    """(d, d) sum_t J_t' (diag p_t - p_t p_t') J_t, the Fisher information by enumeration of all labels."""
    logits, jacobian = logits_and_jacobian(row)
    p = logits.softmax(-1)
    centred = jacobian - torch.einsum("tv,tvd->td", p, jacobian)[:, None]
    return torch.einsum("tv,tvd,tve->de", p, centred, centred)


def score_by_hand(row: Encoded) -> tuple[float, Tensor]:
    """s_i and its gradient from the Jacobian."""
    logits, jacobian = logits_and_jacobian(row)
    labels = torch.tensor(row.answer_ids)
    steps = torch.arange(row.n_answer)
    gradient = jacobian[steps, labels] - torch.einsum("tv,tvd->td", logits.softmax(-1), jacobian)
    return float(logits.log_softmax(-1)[steps, labels].sum()), gradient.sum(0)


def gauss_newton_by_hand(inner: InnerTerms) -> Tensor:
    """J' (d^2 phi / dz^2) J from the second derivatives of the losses, worked out on paper."""
    total = torch.zeros(80, 80, dtype=torch.float64)
    for row, weight, start in zip(inner.rows, inner.weights, inner.reference_sums, strict=True):
        if inner.loss.name == "ga":
            total -= weight / row.n_answer * fisher_by_hand(row)
            continue
        s, gradient = score_by_hand(row)
        gate = torch.sigmoid(torch.tensor(B * (s - float(start)), dtype=torch.float64))
        rank_one = 2.0 * B * gate * (1.0 - gate) * torch.outer(gradient, gradient)
        total += weight * (rank_one - 2.0 * gate * fisher_by_hand(row))
    for row in inner.retain:
        total += LAMBDA / len(inner.retain) / row.n_answer * fisher_by_hand(row)
    return total + (LAMBDA * proximal_by_hand() if inner.term == "proximal" else 0.0)


def proximal_by_hand() -> Tensor:
    """2 J'J with J the Jacobian of the effective change 2 B A (alpha / r = 2)."""
    theta = theta_of(shared_policy())
    downs = [name for name in theta if ".lora_A." in name]

    def change(column: Tensor) -> Tensor:
        values = unflatten(column, theta)
        parts = [2.0 * values[name.replace(".lora_A.", ".lora_B.")] @ values[name] for name in downs]
        return torch.cat([part.flatten() for part in parts])

    jacobian = torch.func.jacfwd(change)(flatten(theta))
    return 2.0 * jacobian.T @ jacobian


def hessian_by_hand(inner: InnerTerms) -> Tensor:
    """(d, d) Hessian of f for GA without a retain term, by forward over reverse mode."""
    policy = shared_policy()
    function = inner_by_hand(policy, ("ga", "none"), inner.rows, WEIGHTS, ())
    theta = theta_of(policy)
    with second_order_attention(policy):
        slope = torch.func.grad(lambda column: function(unflatten(column, theta)))
        return torch.func.jacfwd(slope)(flatten(theta))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("loss", "term"), [("ga", "none"), ("npo", "none"), ("ga", "nll"), ("npo", "kl"), ("npo", "proximal")]
)
def test_gauss_newton_product_equals_the_matrix_from_jacobians_of_the_logits(loss: str, term: str):
    inner = terms(shared_policy(), loss, term)
    exact, operator = gauss_newton_by_hand(inner), GaussNewton().at(inner)
    for seed in range(3):  # random directions: another matrix has another product
        v = direction(shared_policy(), seed)
        assert relative(flatten(operator.product(v)), exact @ flatten(v)) < 1e-5
    assert relative(flatten(Hessian().at(inner).product(v)), exact @ flatten(v)) > 1e-2


def test_gauss_newton_has_the_sign_of_the_loss_in_the_logits():
    rows = terms(shared_policy(), "ga", "none").rows
    ascent = gauss_newton_by_hand(terms(shared_policy(), "ga", "none"))
    assert float(torch.linalg.eigvalsh(ascent).max()) < 1e-12
    values = torch.linalg.eigvalsh(gauss_newton_by_hand(terms(shared_policy(), "npo", "none")))
    assert 1 <= int((values > 1e-6).sum()) <= len(rows)
    v = direction(shared_policy(), 1)
    operator = GaussNewton().at(terms(shared_policy(), "ga", "none"))
    assert dot(v, operator.product(v)) < 0
    operator = GaussNewton().at(terms(shared_policy(), "ga", "proximal", 1e4))
    assert dot(v, operator.product(v)) > 0


@pytest.mark.parametrize("term", ["nll", "proximal"])
@pytest.mark.parametrize("block", [".lora_A.", ".lora_B."])
def test_gauss_newton_is_the_hessian_where_logits_are_linear_in_the_parameters(block: str, term: str):
    adapter = AdapterConfig(r=2, alpha=4.0, target_modules=["lm_head"])  # linear in A for a fixed B, and in B
    policy = Policy(tiny_model(1, layers=1, hidden=16).double(), tiny_tokenizer(), adapter)
    for name, value in policy.trainable().items():
        if ".lora_B." in name:
            value.data.normal_(generator=torch.Generator().manual_seed(3))
    v = {n: x if block in n else torch.zeros_like(x) for n, x in direction(policy, 5).items()}
    inner = terms(policy, "npo", term)
    full, gauss = Hessian().at(inner).product(v), GaussNewton().at(inner).product(v)
    (same,) = (name for name in full if block in name)
    (other,) = (name for name in full if block not in name)
    assert relative(gauss[same], full[same]) < 1e-5
    assert relative(gauss[other], full[other]) > 1e-3  # the coupling of A and B is not linear


@settings(max_examples=6)
@given(seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)), factor=st.floats(-3, 3))
def test_gauss_newton_product_is_symmetric_and_linear(seeds: tuple[int, int], factor: float):
    operator = GaussNewton().at(terms(shared_policy(), "npo", "proximal"))
    v, w = direction(shared_policy(), seeds[0]), direction(shared_policy(), 5000 + seeds[1])
    gv, gw = operator.product(v), operator.product(w)
    assert dot(w, gv) == pytest.approx(dot(v, gw), rel=1e-6, abs=1e-8)
    both = flatten(operator.product(plus(v, w, factor)))
    assert torch.allclose(both, flatten(gv) + factor * flatten(gw), atol=1e-6 * float(both.norm()))


def permuted(inner: InnerTerms, order: Sequence[int]) -> InnerTerms:
    rows = tuple(inner.rows[k] for k in order)
    kept = inner.retain[::-1]
    weights, sums = inner.weights[list(order)], inner.reference_sums[list(order)]
    return replace(inner, rows=rows, weights=weights, reference_sums=sums, retain=kept)


@pytest.mark.parametrize("name", ["gauss_newton", "fisher"])
@pytest.mark.parametrize("term", ["nll", "kl"])
def test_products_do_not_depend_on_batching_or_the_order_of_rows(name: str, term: str):
    policy = small_policy()
    v, inner = direction(policy, 6), terms(policy, "npo", term)
    together = flatten(make_curvature(name, UnlearnSection()).at(inner).product(v))
    shuffled = flatten(make_curvature(name, UnlearnSection()).at(permuted(inner, [2, 0, 1])).product(v))
    policy.token_budget = 1
    alone = flatten(make_curvature(name, UnlearnSection()).at(inner).product(v))
    assert torch.allclose(alone, together, rtol=1e-6, atol=1e-7)
    assert torch.allclose(shuffled, together, rtol=1e-6, atol=1e-7)


def test_adam_metric_does_not_depend_on_batching():
    policy = small_policy()
    inner = terms(policy, "npo", "kl")
    together = flatten(AdamMetric(batch_size=2).at(inner).entries)
    policy.token_budget = 1
    assert torch.allclose(flatten(AdamMetric(batch_size=2).at(inner).entries), together, rtol=1e-6, atol=1e-7)


def test_fisher_of_many_draws_is_the_diagonal_of_the_enumeration_over_all_labels():
    inner = terms(shared_policy(), "ga", "none")
    parts = [weight / row.n_answer * fisher_by_hand(row) for row, weight in zip(inner.rows, inner.weights, strict=True)]
    exact = torch.stack(parts).sum(0).diag()
    few, many = (flatten(DiagonalFisher(draws).at(inner).entries) for draws in (1, 200))
    assert relative(many, exact) < 0.1
    assert relative(few, exact) > relative(many, exact)


def test_fisher_adds_up_over_rows_and_ignores_the_sign_of_the_loss():
    policy = shared_policy()
    whole = flatten(DiagonalFisher().at(terms(policy, "ga", "nll")).entries)
    rows = flatten(DiagonalFisher().at(terms(policy, "ga", "none")).entries)
    inner = terms(policy, "ga", "nll")
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64)
    retain = flatten(DiagonalFisher().at(InnerTerms(policy, inner.loss, inner.retain, halves, torch.zeros(2))).entries)
    assert torch.allclose(whole, rows + LAMBDA * retain, rtol=1e-9)
    assert torch.equal(flatten(DiagonalFisher().at(terms(policy, "npo", "none")).entries), rows)
    assert float(rows.min()) > 0
    assert not torch.allclose(flatten(DiagonalFisher(seed=1).at(terms(policy, "ga", "none")).entries), rows, rtol=0.1)


def test_fisher_adds_the_exact_diagonal_of_the_proximal_term():
    policy = shared_policy()
    plain, more = (flatten(DiagonalFisher().at(terms(policy, "ga", term)).entries) for term in ("none", "proximal"))
    exact = dense_hessian(lambda theta: retain_by_hand("proximal", policy, (), theta), theta_of(policy)).diag()
    assert torch.allclose(more - plain, LAMBDA * exact, rtol=1e-9, atol=1e-12)


def test_proximal_curvature_of_lora_and_of_full_fine_tuning():
    policy = shared_policy()
    matrix = matrix_of(lambda v: proximal_product(policy, v), policy.trainable())
    assert torch.allclose(matrix, proximal_by_hand(), atol=1e-10)
    assert torch.allclose(matrix.diag(), flatten(proximal_diagonal(policy)))
    full = tiny_policy(adapter=False)
    for value in full.trainable().values():
        value.data.add_(0.1)
    v = {name: torch.randn_like(value) for name, value in full.trainable().items()}
    leaves = list(full.trainable().values())
    first = torch.autograd.grad(full.change_sq(), leaves, create_graph=True)
    slope = torch.stack([(g * x).sum() for g, x in zip(first, v.values(), strict=True)]).sum()
    exact = dict(zip(v, torch.autograd.grad(slope, leaves), strict=True))
    for found in (proximal_product(full, v), Diagonal(proximal_diagonal(full)).product(v)):
        assert torch.allclose(flatten(found), flatten(exact), rtol=1e-6)


@pytest.mark.parametrize("term", ["none", "nll", "proximal"])
def test_adam_metric_of_full_batches_is_the_magnitude_of_the_gradient(term: str):
    policy = shared_policy()
    inner = terms(policy, "npo", term)
    function = inner_by_hand(policy, ("npo", term), inner.rows, WEIGHTS, inner.retain)
    exact = dense_gradient(function, theta_of(policy)).abs() + 1e-3  # the proximal term is computed in float32
    found = flatten(AdamMetric(batch_size=3, retain_batch_size=2, minibatches=2, eps=1e-3).at(inner).entries)
    assert relative(found, exact) < 1e-6


def test_adam_metric_is_the_root_of_the_mean_square_of_minibatch_gradients():
    policy = shared_policy()
    inner = terms(policy, "npo", "none")
    theta = theta_of(policy)
    alone = [dense_gradient(inner_by_hand(policy, ("npo", "none"), [row], [1.0], ()), theta) for row in inner.rows]
    exact = torch.stack([3 * w * g for w, g in zip(WEIGHTS, alone, strict=True)]).square().mean(0).sqrt() + 1e-8
    found = AdamMetric(batch_size=1, minibatches=3).at(inner)
    assert relative(flatten(found.entries), exact) < 1e-6  # reference sums are kept in float32
    kept = terms(policy, "npo", "nll")
    forget = torch.stack([w * g for w, g in zip(WEIGHTS, alone, strict=True)]).sum(0)
    nll = [dense_gradient(lambda p, r=row: retain_by_hand("nll", policy, [r], p), theta) for row in kept.retain]
    exact = torch.stack([forget + LAMBDA * g for g in nll]).square().mean(0).sqrt() + 1e-8
    found = AdamMetric(batch_size=3, retain_batch_size=1, minibatches=2).at(kept)
    assert relative(flatten(found.entries), exact) < 1e-6  # reference sums are kept in float32


def test_adam_metric_clips_minibatch_gradients_as_the_optimiser_does():
    policy = shared_policy()
    inner = terms(policy, "npo", "none")
    theta = theta_of(policy)
    alone = [dense_gradient(inner_by_hand(policy, ("npo", "none"), [row], [1.0], ()), theta) for row in inner.rows]
    steps = [3 * w * g for w, g in zip(WEIGHTS, alone, strict=True)]
    sizes = sorted(float(step.norm()) for step in steps)
    limit = (sizes[0] + sizes[1]) / 2  # the smallest one is left as it is
    clipped = [step * min(1.0, limit / (float(step.norm()) + 1e-6)) for step in steps]
    exact = torch.stack(clipped).square().mean(0).sqrt() + 1e-8
    metric = AdamMetric(batch_size=1, minibatches=3, max_norm=limit)
    assert relative(flatten(metric.at(inner).entries), exact) < 1e-6
    assert "max_norm" in metric.name and metric.name != AdamMetric(batch_size=1, minibatches=3).name
    assert make_curvature("adam", UnlearnSection(max_grad_norm=0.5)) == AdamMetric(max_norm=0.5)


def test_adam_metric_has_the_typical_entry_where_no_minibatch_comes():
    """Full fine-tuning: rows of the embedding that belong to other texts have no gradient in the sample."""
    policy = tiny_policy(adapter=False)
    row = policy.encoder.encode(ask("tea?"), "no")
    inner = InnerTerms(policy, make_loss("ga", B), (row,), torch.ones(1, dtype=torch.float64), torch.zeros(1))
    gradient = inner.gradient()
    entries = AdamMetric(batch_size=1, minibatches=1).at(inner).entries
    reached = torch.cat([value[value != 0] for value in gradient.values()]).double()
    typical = float(reached.square().mean().sqrt())
    missed = torch.cat([entries[name][value == 0] for name, value in gradient.items()])
    assert len(missed) > 100 and torch.allclose(missed, torch.full_like(missed, typical), rtol=1e-5)
    for name, value in gradient.items():
        assert torch.allclose(entries[name][value != 0], value[value != 0].abs(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diagonal_that_is_not_finite_is_an_error_and_no_gain_of_zero(bad: float):
    right = {"a": torch.tensor([1.0, 2.0])}
    with pytest.raises(NonFiniteError, match="diagonal curvature at a"):
        Diagonal({"a": torch.tensor([bad, 1.0])}).solve(right, 0.1)
    with pytest.raises(NonFiniteError, match="diagonal curvature at a"):
        Diagonal({"a": torch.ones(2)}).solve({"a": torch.tensor([bad, 1.0])}, 0.1)


def test_the_fisher_of_a_row_without_a_distribution_is_an_error_of_ours():
    policy = tiny_policy()
    row = policy.encoder.encode(ask("tea?"), "no")
    inner = InnerTerms(policy, make_loss("ga", B), (row,), torch.ones(1, dtype=torch.float64), torch.zeros(1))
    with torch.no_grad():
        next(value for name, value in policy.model.named_parameters() if "embed" in name)[:] = math.nan
    with pytest.raises(NonFiniteError, match="probabilities of a row"):
        DiagonalFisher().at(inner)


def symmetric(eigenvalues: Tensor, seed: int) -> Tensor:
    size = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(eigenvalues.double()) @ basis.T


class Dense:
    """A matrix as an operator on vectors of one block."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.like = matrix, {"x": torch.zeros(len(matrix), dtype=torch.float64)}

    def product(self, vector: Params) -> Params:
        return unflatten(self.matrix @ flatten(vector), vector)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@given(seed=st.integers(0, 99))
@settings(max_examples=3)
def test_unit_of_damping_is_the_trace_of_a_semidefinite_operator(sign: float, seed: int):
    operator = Dense(sign * symmetric(torch.cat([torch.zeros(10), torch.linspace(0.1, 3.0, 10)]), seed))
    exact = abs(float(operator.matrix.trace())) / 20
    assert mean_eigenvalue(operator, operator.like, seed, probes=300) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("values", [[1.0, -1.0], [5.0, -1.0, -4.0], [1e3, -1.0, -999.0, 0.0]])
def test_unit_of_damping_is_the_mean_magnitude_of_eigenvalues_that_cancel(values: list[float]):
    eigenvalues = torch.tensor(values).repeat(8)
    operator = Dense(symmetric(eigenvalues, 0))
    found = mean_eigenvalue(operator, operator.like, 0, probes=300)
    mean, mean_square = float(eigenvalues.abs().mean()), float(eigenvalues.square().mean())
    assert 0.9 * mean < found < 1.05 * mean_square**0.5
    assert found > 10.0 * float(eigenvalues.mean().abs())


@settings(max_examples=25)
@given(exponent=st.integers(-40, 40), seed=st.integers(0, 99))
def test_unit_of_damping_scales_with_the_operator(exponent: int, seed: int):
    matrix, factor = symmetric(torch.linspace(-1.0, 2.0, 12), seed), 2.0**exponent
    plain, scaled = (mean_eigenvalue(Dense(m), Dense(m).like, seed) for m in (matrix, factor * matrix))
    assert scaled == pytest.approx(factor * plain, rel=1e-9)


def test_unit_of_damping_is_zero_for_the_zero_operator_only():
    e = torch.eye(6, dtype=torch.float64)
    lonely = torch.outer(e[0] - e[1], e[0] - e[1])  # of rank one, with all row sums 0
    for seed in range(20):
        assert mean_eigenvalue(Dense(lonely), Dense(lonely).like, seed, probes=1) > 0
        swap = torch.outer(e[0], e[1]) + torch.outer(e[1], e[0])
        assert mean_eigenvalue(Dense(swap), Dense(swap).like, seed, probes=1) > 0
    assert mean_eigenvalue(Dense(0 * e), Dense(e).like, 0) == 0.0
    assert mean_eigenvalue(Dense(-3.0 * e), Dense(e).like, 0) == pytest.approx(3.0)


def test_unit_of_damping_of_every_curvature_against_dense_eigenvalues():
    policy = shared_policy()
    inner, like = terms(policy, "ga", "none"), policy.trainable()
    gauss = gauss_newton_by_hand(inner)
    hessian = hessian_by_hand(inner)
    for curvature, matrix, within in ((GaussNewton(), gauss, 0.15), (Hessian(), hessian, 0.35)):
        exact = float(torch.linalg.eigvalsh(matrix).abs().mean())
        assert mean_eigenvalue(Dense(matrix), like, 0, probes=400) == pytest.approx(exact, rel=within)
        same = mean_eigenvalue(Dense(matrix), like, 0)
        assert mean_eigenvalue(curvature.at(inner), like, 0) == pytest.approx(same, rel=1e-4)
    for name in ("fisher", "adam"):
        operator = make_curvature(name, UnlearnSection()).at(inner)
        trace = float(matrix_of(operator.product, like).trace())
        assert mean_eigenvalue(operator, like, 0) == pytest.approx(trace / 80, rel=1e-9)


def test_configured_curvatures():
    found = [make_curvature(name, UnlearnSection()) for name in ("hessian", "gauss_newton", "fisher", "adam")]
    assert found == [Hessian(), GaussNewton(), DiagonalFisher(), AdamMetric(max_norm=1.0)]
    names = ["hessian", "gauss_newton", "fisher(draws=1, seed=0)"]
    names += ["adam(batch_size=8, minibatches=8, eps=1e-08, max_norm=1)"]
    assert [curvature.name for curvature in found] == names


@pytest.mark.parametrize("name", ["gauss_newton", "fisher", "adam"])
def test_curvatures_work_with_full_fine_tuning_and_leave_theta_alone(name: str):
    policy = tiny_policy(adapter=False)
    before = policy.snapshot()
    v = {n: torch.randn_like(value) for n, value in policy.trainable().items()}
    image = make_curvature(name, UnlearnSection()).at(terms(policy, "npo", "kl")).product(v)
    assert norm(image) > 0
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in image.values())
    assert all(torch.equal(before[n], value) for n, value in policy.snapshot().items())
    assert all(value.grad is None for value in policy.trainable().values())


class AnswerLogits(torch.nn.Module):
    """The logits at answer positions of rows of one length, as curvlinops takes a model."""

    def __init__(self, policy: Policy, n_answer: int):
        super().__init__()
        self.model, self.n_answer = policy.model, n_answer

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits[:, -self.n_answer - 1 : -1].flatten(0, 1)


class Swish(torch.nn.Module):
    """SiLU written out: the kernel's backward has no forward mode, which curvlinops takes Hessian products by."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()])
def test_products_of_gradient_ascent_are_those_of_curvlinops_for_the_nll_negated(curvature: Curvature):
    policy = small_policy()
    for module in policy.model.modules():
        if isinstance(module, LlamaMLP):
            module.act_fn = Swish()
    inner = terms(policy, "ga", "none")
    length = min(len(row.input_ids) for row in inner.rows)  # rows of one length: cut prompts need no padding
    rows = tuple(Encoded(row.input_ids[-length:], 5) for row in inner.rows)
    inner = replace(inner, rows=rows, weights=torch.full((3,), 1 / 3, dtype=torch.float64))
    ids = torch.tensor([row.input_ids for row in rows])
    linear = curvlinops.HessianLinearOperator if curvature == Hessian() else curvlinops.GGNLinearOperator
    with second_order_attention(policy):
        peer = linear(
            AnswerLogits(policy, 5),
            torch.nn.CrossEntropyLoss(),
            list(policy.trainable().values()),
            [(ids, ids[:, -5:].flatten())],
            check_deterministic=False,
        )
        v = direction(policy, 8)
        expected = -(peer @ flatten(v))
    assert relative(flatten(curvature.at(inner).product(v)), expected) < 1e-6


def test_cg_solution_is_that_of_curvlinops():
    matrix, right = symmetric(torch.linspace(0.5, 9.0, 20), 3), torch.arange(20.0, dtype=torch.float64)
    found = CG(max_steps=50, tol=1e-12).solve(Dense(matrix).product, {"x": right}, 0.0).value["x"]
    peer = curvlinops.CGInverseLinearOperator(peers.TensorLinearOperator(matrix), tolerance=1e-12, eps=1e-30)
    assert torch.allclose(found, peer @ right, rtol=1e-8)
