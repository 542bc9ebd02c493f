"""Curvature of the proximal term ||change of the effective weights||^2, in closed form.

With LoRA the term is ||s B A||^2 per adapted module (and expert): its residual s B A is linear in A and in B, and the
only part of its Hessian that is not positive semi-definite couples A with B.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from u2a.adapter import LoraFactors, lora_factors
from u2a.bilevel.vectors import scaled
from u2a.modeling import Params, Policy


def _modules(policy: Policy) -> Iterator[tuple[str, str, LoraFactors]]:
    """Names of A and B, and the factors, of every adapted module."""
    names = {id(value): name for name, value in policy.trainable().items()}
    for module in policy.model.modules():
        if isinstance(module, LoraLayer):
            for each in lora_factors(module):
                yield names[id(each.down)], names[id(each.up)], each


def _wide(value: Tensor) -> Tensor:
    """The value in float32 or wider, without its graph."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def proximal_product(policy: Policy, vector: Params) -> Params:
    """Gauss-Newton product of ||s B A||^2: 2 J'J v with J v = s (V_B A + B V_A); 2 v with full fine-tuning.

    It is the Hessian without the part that couples A with B through the residual, and positive semi-definite.

    Args:
        policy: the policy at theta.
        vector: v, blocks V_A and V_B.

    Returns:
        The product; no matrix of the size of a weight is formed.
    """
    if not policy.has_adapter:
        return scaled(vector, 2.0)
    out: Params = {}
    for down_name, up_name, each in _modules(policy):
        factor = 2.0 * each.scaling**2
        down, up = each.split_down(_wide(each.down)), each.split_up(_wide(each.up))
        v_down, v_up = each.split_down(vector[down_name].to(down)), each.split_up(vector[up_name].to(up))
        out[down_name] = (factor * ((up.mT @ v_up) @ down + (up.mT @ up) @ v_down)).reshape(each.down.shape)
        out[up_name] = each.joined_up(factor * (v_up @ (down @ down.mT) + up @ (v_down @ down.mT)))
    return {name: out[name] for name in vector}


def proximal_diagonal(policy: Policy) -> Params:
    """Exact diagonal of the Hessian of ||s B A||^2: 2 s^2 (B'B)_kk for row k of A, 2 s^2 (AA')_kk for column k of B.

    The Gauss-Newton matrix has the same diagonal.

    Args:
        policy: the policy at theta.

    Returns:
        The diagonal, >= 0; 2 everywhere with full fine-tuning.
    """
    if not policy.has_adapter:
        return {name: torch.full_like(value, 2.0, requires_grad=False) for name, value in policy.trainable().items()}
    out: Params = {}
    for down_name, up_name, each in _modules(policy):
        factor = 2.0 * each.scaling**2
        down, up = each.split_down(_wide(each.down)), each.split_up(_wide(each.up))
        out[down_name] = (factor * up.square().sum(1)[:, :, None].expand_as(down)).reshape(each.down.shape)
        out[up_name] = each.joined_up(factor * down.square().sum(2)[:, None, :].expand_as(up))
    return {name: out[name] for name in policy.trainable()}
