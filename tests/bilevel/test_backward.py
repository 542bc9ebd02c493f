"""The batched backward scorer against dense per-sample gradients, and what it must leave alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from small import candidate_losses, direction, loss_by_hand, small_policy, summed, theta_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tiny import examples, tiny_model, tiny_policy, tiny_tokenizer
from u2a.bilevel import backward
from u2a.bilevel.backward import BatchedBackward, supports
from u2a.bilevel.candidates import CandidateLosses
from u2a.bilevel.forward_mode import ForwardMode
from u2a.bilevel.vectors import plus, scaled
from u2a.config import AdapterConfig
from u2a.errors import ModelError
from u2a.losses import GA, make_loss
from u2a.modeling import Params, Policy
from u2a.progress import Quiet
from u2a.reference.dense import flatten, per_sample_gradients

ROWS = examples(8)


def slopes(losses: CandidateLosses, *directions: Params, chunk: int = 16) -> torch.Tensor:
    return BatchedBackward(chunk=chunk).derivatives(losses, directions, Quiet()).derivatives


def with_exact_reference(policy: Policy, loss: str) -> CandidateLosses:
    """The small policy's losses with reference sums in float64 (the cache keeps float32)."""
    losses = candidate_losses(policy, make_loss(loss, 0.1), ROWS)
    start = {name: value.double() for name, value in policy.theta0.items()}
    with torch.no_grad():
        sums = torch.stack([summed(policy, row, start) for row in losses.rows])
    return CandidateLosses(policy, losses.loss, losses.rows, sums, losses.ids)


@lru_cache
def dense(loss: str) -> torch.Tensor:
    """(8, 80) gradients of the small policy's losses, formula by hand, one sequence at a time, no padding."""
    policy = small_policy()
    rows = candidate_losses(policy, GA(), ROWS).rows
    name, sign = ("ga", -1.0) if loss == "sft" else (loss, 1.0)
    functions = [lambda p, row=row: sign * loss_by_hand(name, policy, row, p) for row in rows]
    return per_sample_gradients(functions, theta_of(policy))


@pytest.mark.parametrize("loss", ["ga", "npo", "sft"])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_slopes_are_inner_products_with_dense_per_sample_gradients(loss: str, budget: int):
    policy = small_policy(token_budget=budget)
    losses = with_exact_reference(policy, loss)
    assert len(losses.batches()) == (8 if budget == 1 else 1)
    directions = [direction(policy, seed, length) for seed, length in ((1, 1.0), (2, 30.0), (3, 1e-3))]
    found = BatchedBackward().derivatives(losses, directions, Quiet())
    expected = dense(loss) @ torch.stack([flatten(u) for u in directions], 1)
    assert torch.allclose(found.derivatives, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.losses, losses.values(), rtol=1e-14)


def test_every_entry_of_a_and_b_is_scored():
    """The 80 unit vectors give the whole matrix of per-sample gradients."""
    policy = small_policy()
    theta = theta_of(policy)
    units = []
    for name, value in theta.items():
        for k in range(value.numel()):
            one = {key: torch.zeros_like(other) for key, other in theta.items()}
            one[name].view(-1)[k] = 1.0
            units.append(one)
    found = slopes(candidate_losses(policy, GA(), ROWS), *units, chunk=7)
    assert found.shape == (8, 80)
    assert torch.allclose(found, dense("ga"), rtol=1e-10, atol=1e-13)


@settings(max_examples=12)
@given(
    order=st.lists(st.integers(0, 7), min_size=1, max_size=10),
    budget=st.sampled_from([1, 90, 300, 10_000]),
    chunk=st.integers(1, 4),
)
def test_order_batches_chunks_and_duplicates_change_nothing(order: list[int], budget: int, chunk: int):
    policy = small_policy(token_budget=budget)
    directions = [direction(policy, seed) for seed in range(3)]
    found = slopes(candidate_losses(policy, GA(), [ROWS[k] for k in order]), *directions, chunk=chunk)
    expected = dense("ga")[order] @ torch.stack([flatten(u) for u in directions], 1)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    for k in order:
        same = found[[place for place, other in enumerate(order) if other == k]]
        assert torch.allclose(same, same[:1].expand_as(same), rtol=1e-12)


def test_scores_add_up_over_candidates_and_are_linear_in_the_direction():
    policy = small_policy()
    losses, u, v = candidate_losses(policy, GA(), ROWS), direction(policy, 6), direction(policy, 7)
    found = slopes(losses, u, v, plus(u, v, -2.0), scaled(u, 0.0))
    assert torch.allclose(found[:, 2], found[:, 0] - 2.0 * found[:, 1], rtol=1e-10, atol=1e-13)
    assert torch.equal(found[:, 3], torch.zeros(8, dtype=torch.float64))
    theta = policy.trainable()
    total = torch.autograd.grad(losses.of(range(8)).sum(), list(theta.values()))
    assert float(found[:, 0].sum()) == pytest.approx(float(flatten(dict(zip(theta, total, strict=True))) @ flatten(u)))


def noisy(policy: Policy, seed: int = 5) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    for value in policy.trainable().values():
        value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return policy


def random_direction(policy: Policy, seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in policy.trainable().items()}


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=257)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


ADAPTERS: dict[str, Any] = {
    "all linear": AdapterConfig(r=3, alpha=5.0),
    "last layer": AdapterConfig(r=3, alpha=5.0, layers=[1]),
    "first layer's query": AdapterConfig(r=3, alpha=5.0, layers=[0], target_modules=["q_proj"]),
    "keys and gates": AdapterConfig(r=2, alpha=1.0, target_modules=["k_proj", "gate_proj"]),
    "with the head": AdapterConfig(r=2, alpha=1.0, target_modules=["v_proj", "lm_head"]),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["o_proj"]),
    "ranks by name": LoraConfig(
        r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9}, target_modules="all-linear"
    ),
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_any_linear_adapter_agrees_with_forward_mode(adapter: AdapterConfig | LoraConfig):
    policy = noisy(Policy(tiny_model(), tiny_tokenizer(), adapter))
    losses, u = candidate_losses(policy, GA(), ROWS), random_direction(policy)
    assert supports(policy)
    true = ForwardMode().derivatives(losses, [u], Quiet()).derivatives
    assert float((slopes(losses, u) - true).norm() / true.norm()) < 2e-5


def test_a_transposed_layer_is_a_linear_layer():
    policy = noisy(Policy(gpt2(), tiny_tokenizer(), AdapterConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"])))
    assert any(isinstance(module, Conv1D) for module in policy.model.modules())
    losses, u = candidate_losses(policy, GA(), ROWS), random_direction(policy)
    assert supports(policy)
    true = ForwardMode().derivatives(losses, [u], Quiet()).derivatives
    assert float((slopes(losses, u) - true).norm() / true.norm()) < 2e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa", "efficient"])
def test_every_attention_kernel_gives_the_same(attention: str):
    policy = tiny_policy(lora_b_sd=0.1, attention="eager" if attention == "eager" else "sdpa")
    losses, u = candidate_losses(policy, GA(), ROWS), random_direction(policy)
    true = ForwardMode().derivatives(losses, [u], Quiet()).derivatives
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if attention == "efficient" else [SDPBackend.MATH]
    with sdpa_kernel(kernels):
        assert float((slopes(losses, u) - true).norm() / true.norm()) < 2e-5


def test_it_is_supported_whatever_the_token_budget():
    assert supports(small_policy(token_budget=1))


# --- what is refused ----------------------------------------------------------------------------

EMBEDDING = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])


def test_other_changes_than_linear_lora_are_not_supported():
    assert not supports(tiny_policy(adapter=False))
    assert not supports(Policy(tiny_model(), tiny_tokenizer(), EMBEDDING))
    policy = tiny_policy()
    assert supports(policy)
    with policy.reference():
        assert not supports(policy), "adapter switched off"


def merge_rows(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].flatten(0, 1),)


def test_a_layer_that_sees_merged_rows_is_not_supported_and_refused():
    policy = tiny_policy()
    head = policy.model.get_base_model().model.layers[1].mlp
    losses, u = candidate_losses(policy, GA(), ROWS[:2]), random_direction(policy)
    shape: list[torch.Size] = []

    def split(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.view(*shape[-1][:2], -1)

    head.register_forward_pre_hook(lambda module, args: shape.append(args[0].shape))
    head.register_forward_pre_hook(merge_rows)
    head.register_forward_hook(split)
    assert not supports(policy)
    with pytest.raises(ModelError, match=r"backward needs \(batch, tokens, features\).* \(use jvp or central\)"):
        slopes(losses, u)


# --- what it costs and leaves behind ------------------------------------------------------------


def test_no_graph_is_built_below_the_lowest_adapted_layer_and_no_parameter_asks_for_a_gradient():
    policy = noisy(Policy(tiny_model(layers=3), tiny_tokenizer(), AdapterConfig(r=2, layers=[1, 2])))
    layers = policy.model.get_base_model().model.layers
    graphs, asked = [], []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    layers[0].register_forward_hook(
        lambda module, args, out: asked.extend(value.requires_grad for value in policy.model.parameters())
    )
    slopes(candidate_losses(policy, GA(), ROWS), random_direction(policy))
    assert graphs == [False, True, True]
    assert not any(asked)
    assert all(value.requires_grad and value.grad is None for value in policy.trainable().values())


def hooks(policy: Policy) -> int:
    return sum(len(module._forward_hooks) for module in policy.model.modules())


@pytest.mark.parametrize("fail", [False, True])
def test_theta_hooks_and_modes_are_as_before_also_after_an_error(fail: bool, monkeypatch: pytest.MonkeyPatch):
    policy = tiny_policy(lora_b_sd=0.1)
    policy.model.train()
    before, count = policy.snapshot(), hooks(policy)

    def broken(*rest: Any) -> torch.Tensor:
        raise RuntimeError("inside")

    losses, u = candidate_losses(policy, GA(), ROWS[:3]), random_direction(policy)
    if fail:
        monkeypatch.setattr(CandidateLosses, "with_sums", broken)
        with pytest.raises(RuntimeError, match="inside"):
            slopes(losses, u)
    else:
        with torch.no_grad():
            assert slopes(losses, u).shape == (3, 1)
    assert hooks(policy) == count
    assert policy.model.training
    assert all(value.requires_grad for value in policy.trainable().values())
    assert all(torch.equal(before[key], value) for key, value in policy.snapshot().items())


def test_values_are_those_without_hooks_bit_for_bit():
    policy = tiny_policy(lora_b_sd=0.1)
    losses = candidate_losses(policy, GA(), ROWS)
    found = BatchedBackward().derivatives(losses, [random_direction(policy)], Quiet())
    assert torch.equal(found.losses, losses.values())


def test_a_forgotten_scaling_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    plain = backward._layers
    monkeypatch.setattr(backward, "_layers", lambda policy: [(m, a, b, 1.0) for m, a, b, _ in plain(policy)])
    policy = small_policy()
    u = direction(policy, 1)
    found, expected = slopes(candidate_losses(policy, GA(), ROWS), u)[:, 0], dense("ga") @ flatten(u)
    assert torch.allclose(2.0 * found, expected, rtol=1e-10), "alpha / r is 2 there"
