"""Values and gradients of the losses against closed forms, and of the retain terms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inner_oracle import alone, dense_losses, encode_all, flat, gradient, relative
from tiny import examples, tiny_policy
from u2a.errors import ConfigError
from u2a.losses import GA, NPO, SFT, GradDiff, check_retain, kl_from_reference, make_loss, npo
from u2a.modeling import AnswerLogProbs

SUMS = st.floats(-40, 10)


def answers(rows: list[list[float]]) -> AnswerLogProbs:
    """Log-probabilities given by hand, right-aligned as in a batch."""
    width = max(map(len, rows))
    token, mask = torch.zeros(len(rows), width, dtype=torch.float64), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        token[index, width - len(row) :], mask[index, width - len(row) :] = torch.tensor(row).double(), True
    return AnswerLogProbs(token, mask, torch.zeros(len(rows), width, 1))


def test_values_by_hand() -> None:
    batch = answers([[-1.0, -2.0, -6.0], [-0.5]])
    assert GA().per_sample(batch, None).tolist() == [-3.0, -0.5]
    assert GradDiff().per_sample(batch, None).tolist() == [-3.0, -0.5]
    assert SFT().per_sample(batch, None).tolist() == [3.0, 0.5]
    reference = torch.tensor([-8.0, -0.5], dtype=torch.float64)
    expected = [(2 / 0.5) * math.log1p(math.exp(0.5 * (-9 + 8))), (2 / 0.5) * math.log(2)]
    assert NPO(0.5).per_sample(batch, reference).tolist() == pytest.approx(expected, rel=1e-12)


@given(SUMS, SUMS, st.floats(1e-3, 10))
def test_npo_is_the_papers_formula_and_its_gradient_is_a_sigmoid(s: float, start: float, beta: float) -> None:
    """l = -(2/b) log sigmoid(-b (s - s_ref)); dl/ds = 2 sigmoid(b (s - s_ref)), which weighs down unlearned answers."""
    value = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    loss = npo(value, torch.tensor(start, dtype=torch.float64), beta)
    (slope,) = torch.autograd.grad(loss, value)
    x = beta * (s - start)
    exact = (2 / beta) * (math.log1p(math.exp(-abs(x))) + max(x, 0.0))
    assert loss.item() == pytest.approx(exact, rel=1e-8, abs=1e-12)
    assert slope.item() == pytest.approx(2 / (1 + math.exp(-x)), rel=1e-8)  # torch is linear above x = 20
    assert loss.item() >= 0


def test_npo_gradient_by_finite_differences() -> None:
    start, beta = torch.tensor([-4.0, -1.0, -9.0], dtype=torch.float64), 0.3
    point = torch.tensor([-3.0, -6.0, -9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: npo(s, start, beta), (point,))


@pytest.mark.parametrize("beta", [1e-2, 1e-4, 1e-6])
def test_npo_tends_to_the_summed_log_likelihood_as_beta_vanishes(beta: float) -> None:
    """npo - (2/b) log 2 -> s - s_ref and dl/ds -> 1, with an error of order b."""
    value = torch.tensor([-3.0, -30.0], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([-5.0, -5.0], dtype=torch.float64)
    loss = npo(value, start, beta) - (2 / beta) * math.log(2)
    (slope,) = torch.autograd.grad(loss.sum(), value)
    assert torch.allclose(loss, value - start, atol=beta * 25**2)
    assert torch.allclose(slope, torch.ones(2, dtype=torch.float64), atol=beta * 25)


def test_npo_stays_finite_at_extreme_log_probabilities() -> None:
    value = torch.tensor([-3000.0, 3000.0], requires_grad=True)
    loss = npo(value, torch.zeros(2), 5.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 6000.0]
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("name", ["ga", "npo", "sft"])
def test_per_sample_losses_and_gradients_equal_the_dense_ones(name: str) -> None:
    """Padded batch against one sequence at a time, through a whole model with a non-zero adapter (float32: 1e-4)."""
    policy = tiny_policy(lora_b_sd=0.05)
    items = encode_all(policy, examples(5))
    start = policy.reference_sums(items)
    loss = make_loss(name, 0.1).per_sample(policy.log_probs(items), start)
    dense = dense_losses(policy.model, items, name, start.tolist(), 0.1)
    assert torch.allclose(loss.double(), dense, rtol=2e-5, atol=2e-5)
    for k in range(len(items)):
        ours = flat(gradient(policy, make_loss(name, 0.1).per_sample(policy.log_probs(items), start)[k]))
        assert relative(ours, flat(gradient(policy, dense[k] + 0 * dense.sum()))) < 1e-4
        dense = dense_losses(policy.model, items, name, start.tolist(), 0.1)


def test_ga_and_sft_are_opposite_and_npo_starts_as_summed_ga() -> None:
    """At theta_0 NPO's gradient is that of s_i, so T_i times GA's: the first step is the same direction."""
    policy = tiny_policy()
    items = encode_all(policy, examples(1))
    start, log_probs = policy.reference_sums(items), policy.log_probs(items)
    ga = flat(gradient(policy, GA().per_sample(log_probs, None).sum()))
    npo_ = flat(gradient(policy, NPO(0.1).per_sample(policy.log_probs(items), start).sum()))
    sft = flat(gradient(policy, SFT().per_sample(policy.log_probs(items), None).sum()))
    assert relative(sft, -ga) < 1e-6
    assert relative(npo_, items[0].n_answer * ga) < 1e-5


def test_npo_without_its_reference_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="needs reference_sum"):
        NPO().per_sample(answers([[-1.0]]), None)


def test_names_and_unknown_names() -> None:
    assert [make_loss(name, 0.25).name for name in ("ga", "grad_diff", "npo", "sft")] == [
        "ga",
        "grad_diff",
        "npo(beta=0.25)",
        "sft",
    ]
    with pytest.raises(ConfigError, match="'dpo': expected one of ga, grad_diff, npo, sft"):
        make_loss("dpo")


@pytest.mark.parametrize("term", ["none", "proximal"])
def test_grad_diff_needs_a_term_on_retain_rows(term: str) -> None:
    with pytest.raises(ConfigError, match="grad_diff.*conflicts with retain_term"):
        check_retain(GradDiff(), term)
    check_retain(GA(), term)
    check_retain(GradDiff(), "kl")


# --- KL ---------------------------------------------------------------------------------------------


@given(st.integers(0, 2**20), st.floats(0.1, 30))
def test_kl_is_not_negative_and_zero_for_equal_models(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    new, old = (spread * torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    mask = torch.tensor([[True, True, True], [False, True, True]])
    assert (kl_from_reference(new, old, mask) > -1e-6).all()
    assert kl_from_reference(old, old, mask).tolist() == [0.0, 0.0]


def test_kl_against_the_definition_and_its_closed_form_gradient() -> None:
    """Value: sum p log(p/q) over answer positions; gradient in the logits: (q - p) / T at them, 0 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    new.requires_grad_(True)
    mask = torch.tensor([[True, True, True], [False, False, True]])
    kl = kl_from_reference(new, old, mask)
    p, q = old.softmax(-1), new.softmax(-1)
    per_token = torch.tensor(
        [
            [sum(float(p[b, t, v] * torch.log(p[b, t, v] / q[b, t, v])) for v in range(5)) for t in range(3)]
            for b in (0, 1)
        ]
    )
    expected = [float(per_token[0].mean()), float(per_token[1, 2])]
    assert kl.tolist() == pytest.approx(expected, abs=1e-6)
    (slope,) = torch.autograd.grad(kl.sum(), new)
    assert torch.allclose(slope, (q - p) * mask[..., None] / mask.sum(1)[:, None, None], atol=1e-6)


def test_kl_of_the_policy_is_zero_at_the_start_and_positive_after() -> None:
    policy = tiny_policy()
    items = encode_all(policy, examples(3))

    def value() -> torch.Tensor:
        with policy.reference(), torch.no_grad():
            old = policy.log_probs(items)
        new = policy.log_probs(items)
        return kl_from_reference(new.logits, old.logits, new.mask)

    assert value().abs().max() < 1e-6
    changed = tiny_policy(lora_b_sd=0.1)
    policy.restore(changed.snapshot())
    assert (value() > 1e-3).all()


# --- proximal term ----------------------------------------------------------------------------------


def dense_change_sq(policy) -> torch.Tensor:
    """||s B A||_F^2 summed over modules, with B A formed."""
    total, theta = torch.zeros((), dtype=torch.float64), policy.trainable()
    for name, down in theta.items():
        if ".lora_A." in name:
            up = theta[name.replace(".lora_A.", ".lora_B.")]
            total = total + ((8.0 / 4) * (up.double() @ down.double())).square().sum()
    return total


def test_proximal_term_is_the_effective_weight_change() -> None:
    policy = tiny_policy()
    assert policy.change_sq().item() == 0.0
    policy = tiny_policy(lora_b_sd=0.3)
    assert policy.change_sq().item() == pytest.approx(dense_change_sq(policy).item(), rel=1e-5)
    merged = {name: value.clone() for name, value in policy.model.merge_and_unload().named_parameters()}
    start = dict(tiny_policy().model.get_base_model().named_parameters())
    change = sum(
        float((merged[name.replace(".base_layer", "")] - value).double().square().sum())
        for name, value in start.items()
        if ".base_layer" in name
    )
    assert change == pytest.approx(dense_change_sq(tiny_policy(lora_b_sd=0.3)).item(), rel=1e-4)


def test_proximal_gradient_equals_the_dense_one_and_vanishes_at_the_start() -> None:
    policy = tiny_policy(lora_b_sd=0.3)
    ours, dense = (flat(gradient(policy, value)) for value in (policy.change_sq(), dense_change_sq(policy)))
    assert relative(ours, dense) < 1e-5
    start = tiny_policy()
    assert flat(gradient(start, start.change_sq())).abs().max() == 0.0


def test_proximal_term_of_full_fine_tuning_is_the_plain_distance() -> None:
    policy = tiny_policy(adapter=False)
    assert policy.change_sq().item() == 0.0
    step = {name: 0.01 * torch.randn_like(value) for name, value in policy.trainable().items()}
    with torch.no_grad():
        for name, value in policy.trainable().items():
            value.add_(step[name])
    assert policy.change_sq().item() == pytest.approx(float(flat(step).square().sum()), rel=1e-4)
    assert relative(flat(gradient(policy, policy.change_sq())), 2 * flat(step)) < 1e-3


def test_the_dense_oracle_sees_the_end_token() -> None:
    policy = tiny_policy()
    (item,) = encode_all(policy, examples(1))
    assert len(alone(policy.model, item)) == item.n_answer == len("never tea") + 1
