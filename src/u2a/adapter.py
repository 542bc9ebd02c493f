"""The LoRA adapter of a model: its configuration, its start at theta_0, and a model without chance in its passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from u2a.config import AdapterConfig
from u2a.errors import ModelError

LORA_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")
# Numbers that models of transformers hand to kernels or use themselves, beside their dropout modules.
RANDOM_RATES = (
    *("dropout", "attention_dropout", "hidden_dropout", "residual_dropout", "activation_dropout"),
    *("jitter_noise", "input_jitter_noise", "router_jitter_noise"),
)


def lora_config(adapter: AdapterConfig, model: nn.Module) -> LoraConfig:
    """Turn the adapter options into peft's configuration.

    Args:
        adapter: options.
        model: the model, whose linear modules are looked up where ``all-linear`` is limited to some layers.

    Returns:
        A LoRA configuration without dropout (every run must see the same function).
    """
    targets = adapter.target_modules
    if adapter.layers is not None and targets == "all-linear":
        names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        targets = sorted({name.rsplit(".", 1)[-1] for name in names if ".layers." in f".{name}"})
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft takes floats
        lora_dropout=0.0,
        target_modules=targets,
        layers_to_transform=adapter.layers,
        task_type="CAUSAL_LM",
    )


def refuse_adapter(model: nn.Module) -> None:
    """Refuse a model that carries an adapter: peft puts it into the model's own modules, also when it fails later.

    Args:
        model: any model.

    Raises:
        ModelError: it has an adapter.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError("the model carries an adapter already (load the model anew, or merge and unload it first)")


def add_adapter(model: PreTrainedModel, adapter: AdapterConfig | LoraConfig, seed: int) -> nn.Module:
    """Put a LoRA adapter into a model.

    Args:
        model: model without an adapter; it is changed.
        adapter: options, or peft's own configuration.
        seed: seed of the adapter's initial weights.

    Returns:
        The PEFT model.

    Raises:
        ModelError: peft refuses the configuration, or it trains more than LoRA matrices.
    """
    config = adapter if isinstance(adapter, LoraConfig) else lora_config(adapter, model)
    devices = sorted({value.device.index for value in model.parameters() if value.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            generator.manual_seed(seed)  # torch.manual_seed would leave a trace in the generators of other devices
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"model.adapter: {str(error).strip()}") from None
    for name, value in adapted.named_parameters():
        matrix = any(part in name for part in LORA_PARTS) and not name.endswith(".bias")  # lora_bias adds one to B
        if value.requires_grad and not matrix:
            raise ModelError(
                f"model.adapter: {name} would be trained beside the LoRA matrices and survive in the reference "
                "(leave out modules_to_save, bias, lora_bias, use_dora and trainable tokens, or use full fine-tuning)"
            )
    return adapted


def remove_chance(model: nn.Module) -> None:
    """Set every dropout and noise rate to 0: each pass must see the same function, in training mode, too.

    Args:
        model: any model; it is changed.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in RANDOM_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@dataclass(frozen=True)
class LoraFactors:
    """The factors of one LoRA layer, whose change is scaling * B_e A_e for each expert e (one, but for fused experts).

    Attributes:
        down: (experts * r, in) A; the experts stand one below the other.
        up: (out, r * experts) B; the experts alternate from column to column.
        scaling: s.
        experts: how many.
    """

    down: Tensor
    up: Tensor
    scaling: float
    experts: int

    def split_down(self, value: Tensor) -> Tensor:
        """A, or whatever has its shape, as (experts, r, in)."""
        return value.reshape(self.experts, -1, value.shape[-1])

    def split_up(self, value: Tensor) -> Tensor:
        """B, or whatever has its shape, as (experts, out, r)."""
        return value.reshape(value.shape[0], -1, self.experts).permute(2, 0, 1)

    def joined_up(self, value: Tensor) -> Tensor:
        """Undo :meth:`split_up`."""
        return value.permute(1, 2, 0).reshape(self.up.shape)


def lora_factors(module: LoraLayer) -> list[LoraFactors]:
    """The factors of a LoRA layer on a linear module, an embedding or the fused weights of experts.

    Args:
        module: the layer.

    Returns:
        One pair per adapter; of an embedding the change is transposed.
    """
    linear = {name: (cast(Tensor, part.weight), module.lora_B[name].weight) for name, part in module.lora_A.items()}
    embedding = {name: (part, module.lora_embedding_B[name]) for name, part in module.lora_embedding_A.items()}
    factors = cast(dict[str, tuple[Tensor, Tensor]], linear | embedding)
    experts = module.num_experts if isinstance(module, ParamWrapper) else 1
    return [LoraFactors(down, up, float(module.scaling[name]), experts) for name, (down, up) in factors.items()]


def lora_change_sq(model: nn.Module) -> Tensor:
    """Sum over adapted modules, and their experts, of ||scaling * B A||_F^2.

    Args:
        model: a PEFT model.

    Returns:
        Scalar tensor, differentiable in A and B.

    Raises:
        ModelError: no LoRA layer is found.
    """
    terms = []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for each in lora_factors(module):
                down, up = each.split_down(each.down.float()), each.split_up(each.up.float())
                terms.append(each.scaling**2 * ((up.mT @ up) * (down @ down.mT)).sum())
    if not terms:
        raise ModelError("model.adapter: it has no LoRA layer (see model.adapter.target_modules)")
    return torch.stack(terms).sum()


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Add the LoRA products into the output of the base layers directly, for the duration of a ``with`` block.

    The values, gradients and second derivatives are those of the layers' own forward; what is saved is a temporary of
    the output's size, two elementwise passes over it (each has several in a second derivative) and the matrix
    product's second dispatch. Without gradients the output is written in place. Layers that are
    more than plain LoRA in one precision (merged, disabled, several adapters, quantised, hooked) keep their forward.

    Args:
        model: any model.
    """
    changed = [module for module in model.modules() if _plain_lora(module)]
    for module in changed:
        module.forward = _fused_forward(cast(LoraLinear, module))
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _plain_lora(module: nn.Module) -> bool:
    """Whether a module is base(x) + scaling * B A x with plain matrices of one floating type, and nothing else."""
    if type(module) is not LoraLinear or "forward" in vars(module):
        return False
    if module.merged or module.disable_adapters or len(module.active_adapters) != 1:
        return False
    name = module.active_adapters[0]
    if name not in module.lora_A or module.lora_variant:
        return False
    if module.training and not isinstance(module.lora_dropout[name], nn.Identity):
        return False
    down, up, base = module.lora_A[name], module.lora_B[name], module.base_layer
    parts = (base, down, up)
    if any(type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks for part in parts):
        return False
    weights = [cast(nn.Linear, part).weight for part in parts]
    return down.bias is None and up.bias is None and len({(item.dtype, item.device) for item in weights}) == 1


def _fused_forward(module: LoraLinear) -> Callable[[Tensor], Tensor]:
    name = module.active_adapters[0]
    down, up = cast(nn.Linear, module.lora_A[name]), cast(nn.Linear, module.lora_B[name])
    base, scaling = cast(nn.Linear, module.base_layer), module.scaling[name]

    def forward(x: Tensor) -> Tensor:
        if module.disable_adapters:  # inside the block: for the reference of a retain term, say
            return base(x.to(base.weight.dtype))
        rows = x.reshape(-1, x.shape[-1]).to(base.weight.dtype)
        out = base(rows)
        if torch.is_grad_enabled() or out.dtype != up.weight.dtype:  # another type under autocast, which casts this one
            out = torch.addmm(out, down(rows) * scaling, up.weight.t())
        else:  # torch counts its operations, not addmm_'s
            torch.addmm(out, down(rows), up.weight.t(), alpha=scaling, out=out)
        return out.view(*x.shape[:-1], -1)

    return forward
