"""LoRA on the fused weights of experts: the change is measured expert by expert, against the merged weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import MixtralConfig, MixtralForCausalLM

from tiny import tiny_model, tiny_tokenizer
from u2a.bilevel.proximal import proximal_diagonal, proximal_product
from u2a.config import AdapterConfig
from u2a.errors import ModelError
from u2a.modeling import Policy


def mixture(adapter: AdapterConfig | LoraConfig) -> Policy:
    config = MixtralConfig(
        vocab_size=259, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = Policy(MixtralForCausalLM(config).eval(), tiny_tokenizer(), adapter)
    for name, value in policy.trainable().items():
        if ".lora_B." in name:
            value.data.normal_(0.0, 0.3)
    return policy


@pytest.mark.parametrize("adapter", [AdapterConfig(r=2), AdapterConfig(r=1, target_modules=["q_proj"])])
def test_the_change_is_that_of_the_merged_weights(adapter: AdapterConfig) -> None:
    policy = mixture(adapter)
    found = float(policy.change_sq().detach())
    merged = dict(policy.model.merge_and_unload().named_parameters())
    torch.manual_seed(0)
    start = dict(MixtralForCausalLM(policy.model.config).named_parameters())
    true = sum(float((value - start[name]).detach().double().square().sum()) for name, value in merged.items())
    assert found == pytest.approx(true, rel=1e-5)


def test_experts_whose_changes_cancel_have_changed_all_the_same() -> None:
    adapter = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM")
    policy = mixture(adapter)
    (down,) = (value for name, value in policy.trainable().items() if ".lora_A." in name)
    (up,) = (value for name, value in policy.trainable().items() if ".lora_B." in name)
    down.data.view(3, 2, -1)[1] = down.data.view(3, 2, -1)[0]  # expert 1 against expert 0
    columns = up.data.view(len(up), 2, 3)
    columns[:, :, 1], columns[:, :, 2] = -columns[:, :, 0], 0.0
    one = columns[:, :, 0] @ down.data.view(3, 2, -1)[0]
    scaling = adapter.lora_alpha / adapter.r
    assert float(policy.change_sq().detach()) == pytest.approx(2 * scaling**2 * float(one.square().sum()), rel=1e-5)


def test_curvature_of_the_proximal_term_is_that_of_peft_s_own_change() -> None:
    policy = mixture(AdapterConfig(r=2))
    policy.model.double()
    theta = policy.trainable()
    leaves = list(theta.values())
    v = {name: torch.randn_like(value) for name, value in theta.items()}
    layers = [module for module in policy.model.modules() if isinstance(module, LoraLayer)]
    change = [layer.get_delta_weight("default") for layer in layers]
    any_of_it = [torch.zeros_like(each, requires_grad=True) for each in change]
    back = torch.autograd.grad(change, leaves, any_of_it, create_graph=True)
    along = torch.autograd.grad(back, any_of_it, [v[name] for name in theta])  # J v
    exact = torch.autograd.grad(change, leaves, [2.0 * each for each in along])  # 2 J' J v
    found = proximal_product(policy, v)
    for name, value in zip(theta, exact, strict=True):
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name
    diagonal = proximal_diagonal(policy)
    for name, value in theta.items():
        for place in (0, value.numel() // 2, value.numel() - 1):
            unit = {key: torch.zeros_like(x) for key, x in theta.items()}
            unit[name].view(-1)[place] = 1.0
            entry = proximal_product(policy, unit)[name].reshape(-1)[place]
            assert float(entry) == pytest.approx(float(diagonal[name].reshape(-1)[place]), rel=1e-9), name


def test_a_bias_beside_b_is_refused() -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"lora_B.default.bias would be trained beside the LoRA matrices .*lora_bias"):
        Policy(tiny_model(), tiny_tokenizer(), adapter)
