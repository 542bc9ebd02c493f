"""Fake quantisation against a brute-force search of the nearest level, and the weights it must leave behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from scipy.stats import norm
from torch import Tensor, nn

from tiny import examples, tiny_model, tiny_policy, tiny_tokenizer
from u2a.errors import ConfigError, ModelError, NonFiniteError
from u2a.modeling import Policy
from u2a.robustness.quantise import NF4_LEVELS, SCHEMES, fake_quantise, quantised, quantised_frac

torch.set_num_threads(1)
LEVELS = {
    "int8": [k / 127 for k in range(-127, 128)],
    "int4": [k / 7 for k in range(-7, 8)],
    "nf4": list(NF4_LEVELS),
}
HALF_STEP = {name: max(b - a for a, b in zip(levels, levels[1:], strict=False)) / 2 for name, levels in LEVELS.items()}


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def nearest_by_search(weight: Tensor, scheme: str, group: int) -> Tensor:
    out = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group].double()
            absmax = max(abs(float(value)) for value in part)
            for offset, value in enumerate(part):
                choices = [level * absmax for level in LEVELS[scheme]]
                out[row, start + offset] = min(choices, key=lambda choice: abs(choice - float(value)))
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("columns", "group"), [(12, 4), (13, 4), (3, 64), (7, 1)])
def test_every_weight_goes_to_its_groups_nearest_level(scheme, columns: int, group: int) -> None:
    weight = matrix(5, columns, seed=columns)
    weight[2] = 0.0
    found = fake_quantise(weight, scheme, group)
    assert found.shape == weight.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), nearest_by_search(weight, scheme, group), rtol=1e-5, atol=1e-7)
    assert torch.equal(found[2], torch.zeros(columns))


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6), columns=st.integers(1, 40), group=st.integers(1, 16),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)  # fmt: skip
def test_invariances(scheme, seed: int, columns: int, group: int, scale: float) -> None:
    weight = matrix(3, columns, seed) * scale
    found = fake_quantise(weight, scheme, group)
    assert torch.equal(fake_quantise(found, scheme, group), found)
    for start in range(0, columns, group):
        part, rounded = weight[:, start : start + group], found[:, start : start + group]
        absmax = part.abs().amax(1, keepdim=True)
        assert torch.equal(rounded.abs().amax(1, keepdim=True), absmax)
        assert bool(((rounded - part).abs() <= HALF_STEP[scheme] * absmax * (1 + 1e-4)).all())
        assert torch.equal(fake_quantise(part, scheme, group), rounded)  # a group knows nothing of the others
    if scheme != "nf4":  # symmetric levels
        assert torch.equal(fake_quantise(-weight, scheme, group), -found)


def test_nf4_levels_are_the_published_quantiles() -> None:
    offset = (2 - 1 / 30 - 1 / 32) / 2
    negative, positive = norm.ppf(np.linspace(offset, 0.5, 8)[:-1]), norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    levels = np.sort(np.concatenate([-negative, [0.0], positive])) / norm.ppf(offset)
    np.testing.assert_allclose(NF4_LEVELS, levels, atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(NonFiniteError):
        fake_quantise(torch.tensor([[1.0, float("nan")]]), "int8")
    with pytest.raises(ConfigError, match="int2"):
        fake_quantise(torch.ones(1, 1), "int2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="group 0"):
        fake_quantise(torch.ones(1, 1), "int8", 0)


def test_int8_agrees_with_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(48, 8, bias=False)
    weight = layer.weight.detach().clone()
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    theirs = layer.weight.dequantize().detach()
    step = weight.abs().amax(1, keepdim=True) / 127  # one scale per row, theirs over 127.5
    assert bool(((fake_quantise(weight, "int8", group=48) - theirs).abs() <= 1.01 * step).all())
    assert bool(((theirs - weight).abs() <= 1.01 * step).all())


# --- the model ----------------------------------------------------------------------------------


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.model.named_parameters()}


def logits(policy: Policy, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return policy.model(input_ids=ids).logits


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_model_inside_is_the_merged_one_with_rounded_layers(adapter: bool, scheme) -> None:
    policy = tiny_policy(seed=3, adapter=adapter, lora_b_sd=0.2)
    before, ids = weights(policy), torch.arange(1, 20)[None]
    full = logits(policy, ids)
    with quantised(policy, scheme, group=24):
        found = logits(policy, ids)
        sums = policy.answer_sums([policy.encoder.encode(row.prompt, row.completion) for row in examples(3)])
    assert same(before, weights(policy))
    merged = tiny_policy(seed=3, adapter=adapter, lora_b_sd=0.2)
    plain = merged.model.merge_and_unload() if adapter else merged.model  # type: ignore[operator]
    rounded = 0
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(fake_quantise(module.weight, scheme, 24))
                rounded += module.weight.numel()
        torch.testing.assert_close(found, plain(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, full, atol=1e-3)
    assert torch.isfinite(sums).all()
    assert quantised_frac(policy) == rounded / sum(value.numel() for value in plain.parameters())


def test_weights_come_back_after_an_error_and_a_half_done_change() -> None:
    policy = tiny_policy(lora_b_sd=0.2)
    before = weights(policy)
    with pytest.raises(KeyError), quantised(policy, "int4"):
        raise KeyError
    assert same(before, weights(policy))
    last = [value for name, value in policy.model.named_parameters() if "base_layer" in name][-1]
    last.data[0, 0] = float("inf")
    before = weights(policy)
    with pytest.raises(NonFiniteError), quantised(policy, "int4"):
        pass
    assert same(before, weights(policy))


def test_a_layer_that_shares_its_weight_and_16_bit_weights_come_back_too() -> None:
    policy = tiny_policy(lora_b_sd=0.2)
    layers = [module for module in policy.model.modules() if isinstance(module, LoraLayer)]
    gate, up, down = layers[4:7]
    assert gate.base_layer.weight.shape == up.base_layer.weight.shape
    up.base_layer.weight = gate.base_layer.weight
    down.base_layer.weight.data = down.base_layer.weight.data.bfloat16()
    before = weights(policy)
    with quantised(policy, "int8"):
        assert down.base_layer.weight.dtype == torch.bfloat16
        assert not same(before, weights(policy))
    assert same(before, weights(policy))


def test_head_and_embeddings_are_left_alone_even_with_an_adapter_of_their_own() -> None:
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    policy = Policy(tiny_model(), tiny_tokenizer(), config)
    for name, value in policy.trainable().items():
        if ".lora_B." in name:
            value.data.fill_(0.1)
    before = weights(policy)
    with quantised(policy, "int4"):
        inside = weights(policy)
    changed = {name for name in before if not torch.equal(before[name], inside[name])}
    assert any("q_proj.lora_B" in name for name in changed) and any("v_proj" in name for name in changed)
    assert not any("lm_head" in name or "embed" in name or "norm" in name or "lora_A" in name for name in changed)


def test_a_model_that_is_quantised_already_is_refused() -> None:
    policy = tiny_policy()
    layer = next(module for module in policy.model.modules() if type(module) is nn.Linear)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="already"), quantised(policy, "int8"):
        pass
