"""Round-to-nearest quantisation of the weights, in place and for a while: does coarse rounding undo the unlearning?

The weights are *fake-quantised*: replaced by the nearest value that the scheme can store, and computed with as
before. That shows what a quantised copy of the model would answer, without any kernel, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from u2a.errors import ConfigError, ModelError, NonFiniteError
from u2a.modeling import Policy

Scheme = Literal["int8", "int4", "nf4"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
GROUP = 64
_LARGEST = {"int8": 127, "int4": 7}
# Quantiles of the standard normal, scaled to [-1, 1]. Source: Dettmers et al. 2023, arXiv 2305.14314, appendix E.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def fake_quantise(weight: Tensor, scheme: Scheme, group: int = GROUP) -> Tensor:
    """Round every weight to the nearest level of its group; a group's levels span [-absmax, absmax].

    Args:
        weight: (out, in), finite. Groups are ``group`` neighbours along ``in``; a row's last one may be shorter.
        scheme: ``int8`` (absmax * k / 127, |k| <= 127), ``int4`` (absmax * k / 7, |k| <= 7) or ``nf4`` (absmax times
            one of :data:`NF4_LEVELS`).
        group: weights that share one scale, >= 1.

    Returns:
        (out, in) float32 (float64 for a float64 weight). Applied twice it changes nothing more.

    Raises:
        ConfigError: unknown scheme, or a group below 1.
        NonFiniteError: a weight is NaN or infinite.

    Source: Zhang et al. 2025, arXiv 2410.16454 (quantisation brings unlearned knowledge back).

    >>> fake_quantise(torch.tensor([[7.0, -3.4, 0.6]]), "int4").tolist()
    [[7.0, -3.0, 1.0]]
    """
    if scheme not in SCHEMES or group < 1:
        raise ConfigError(f"scheme {scheme!r}, group {group}: expected one of {', '.join(SCHEMES)} and a group >= 1")
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if not torch.isfinite(weight).all():
        raise NonFiniteError("weight", "quantise")
    width = weight.shape[1]
    grouped = nn.functional.pad(weight, (0, -width % group)).unflatten(1, (-1, group))
    absmax = grouped.abs().amax(2, keepdim=True)
    share = grouped / torch.where(absmax == 0, 1.0, absmax)
    if scheme == "nf4":
        levels = torch.tensor(NF4_LEVELS, dtype=weight.dtype, device=weight.device)
        nearest = levels[torch.bucketize(share, (levels[1:] + levels[:-1]) / 2)]
    else:
        nearest = torch.round(share * _LARGEST[scheme]) / _LARGEST[scheme]
    return (nearest * absmax).flatten(1)[:, :width]


@contextmanager
def quantised(policy: Policy, scheme: Scheme, group: int = GROUP) -> Iterator[None]:
    """Quantise the linear layers, with the adapter merged first, for the duration of a ``with`` block.

    Each layer's weight becomes the quantised W + s B A (summed in float32, stored in the layer's own dtype) and its
    B zero. Embeddings and the output head keep their weights and their adapter, as in common 4- and 8-bit formats.
    Afterwards every weight is as it was, bit for bit. Inside, the policy's reference must not be asked for: with the
    adapter merged it is not theta_0.

    Args:
        policy: the policy at the theta to quantise.
        scheme: see :func:`fake_quantise`.
        group: weights that share one scale, >= 1.

    Yields:
        None.

    Raises:
        ModelError: no linear layer, or one that is quantised already.
    """
    saved: list[tuple[Tensor, Tensor]] = []

    def put(live: Tensor, value: Tensor) -> None:
        saved.append((live, live.detach().to("cpu", copy=True)))
        live.copy_(value)

    try:
        with torch.no_grad():
            for layer in _linear_layers(policy.model):
                weight = _base(layer).weight
                put(weight, fake_quantise(_merged(layer), scheme, group))
                for up in layer.lora_B.values() if isinstance(layer, LoraLayer) else ():
                    put(cast(Tensor, up.weight), torch.zeros_like(cast(Tensor, up.weight)))
        yield
    finally:
        with torch.no_grad():
            for live, value in reversed(saved):  # reversed: of a weight that two layers share, the first copy counts
                live.copy_(value)


def quantised_frac(policy: Policy) -> float:
    """Share of the model's weights that :func:`quantised` rounds.

    Args:
        policy: the policy.

    Returns:
        A share in (0, 1]; the adapter's matrices count as no weights of their own.

    Raises:
        ModelError: no linear layer, or one that is quantised already.
    """
    rounded = {id(weight): weight.numel() for weight in (_base(layer).weight for layer in _linear_layers(policy.model))}
    named = policy.model.named_parameters()
    return sum(rounded.values()) / sum(value.numel() for name, value in named if ".lora_" not in name)


def _linear_layers(model: nn.Module) -> list[nn.Linear | LoraLayer]:
    """Linear layers, adapted ones as a whole, without the output head and any other that shares embedding weights."""
    head = model.get_output_embeddings()  # type: ignore[operator]  # of transformers' models, also inside peft's
    head = head.get_base_layer() if isinstance(head, LoraLayer) else head
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    kept = {id(module.weight) for module in (*embeddings, *([] if head is None else [head]))}
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    parts = {id(part) for layer in adapted for part in cast(nn.Module, layer).modules() if part is not layer}
    layers: list[nn.Linear | LoraLayer] = []
    for module in model.modules():
        adapts_linear = isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear)
        plain = isinstance(module, nn.Linear) and id(module) not in parts
        if (adapts_linear or plain) and id(_base(module).weight) not in kept:  # type: ignore[arg-type]
            layers.append(module)  # type: ignore[arg-type]
    if not layers:
        raise ModelError("the model has no linear layer to quantise (it is built of other modules)")
    if any(not _base(layer).weight.is_floating_point() for layer in layers):
        raise ModelError("the model is quantised already (load it with model.load_in_4bit: false)")
    return layers


def _base(layer: nn.Linear | LoraLayer) -> nn.Linear:
    return cast(nn.Linear, layer.get_base_layer() if isinstance(layer, LoraLayer) else layer)


def _merged(layer: nn.Linear | LoraLayer) -> Tensor:
    """W + s B A, in float32 (float64 where W is)."""
    weight = _base(layer).weight
    merged = weight if weight.dtype == torch.float64 else weight.float()
    if isinstance(layer, LoraLayer):
        for name in layer.lora_A:
            down, up = cast(Tensor, layer.lora_A[name].weight), cast(Tensor, layer.lora_B[name].weight)
            merged = merged + layer.scaling[name] * (up.to(merged) @ down.to(merged))
    return merged
