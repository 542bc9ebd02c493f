"""Curvature of the proximal term ||change of the effective weights||^2, in closed form.

With LoRA the term is ||s B A||^2 per adapted module: its residual s B A is linear in A and in B, and the only part
of its Hessian that is not positive semi-definite couples A with B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from u2a.adapter import lora_factors
from u2a.bilevel.vectors import scaled
from u2a.modeling import Params, Policy


@dataclass(frozen=True)
class _Module:
    """One adapted module: its change is scaling * up @ down."""

    down_name: str
    up_name: str
    down: Tensor
    up: Tensor
    scaling: float


def _modules(policy: Policy) -> list[_Module]:
    names = {id(value): name for name, value in policy.trainable().items()}
    found = []
    for module in policy.model.modules():
        if isinstance(module, LoraLayer):
            for adapter, (down, up) in lora_factors(module).items():
                scaling = float(module.scaling[adapter])
                found.append(_Module(names[id(down)], names[id(up)], _wide(down), _wide(up), scaling))
    return found


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
    for module in _modules(policy):
        down, up, factor = module.down, module.up, 2.0 * module.scaling**2
        v_down, v_up = vector[module.down_name].to(down), vector[module.up_name].to(up)
        out[module.down_name] = factor * ((up.T @ v_up) @ down + (up.T @ up) @ v_down)
        out[module.up_name] = factor * (v_up @ (down @ down.T) + up @ (v_down @ down.T))
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
    for module in _modules(policy):
        factor = 2.0 * module.scaling**2
        out[module.down_name] = factor * module.up.square().sum(0)[:, None].expand_as(module.down)
        out[module.up_name] = factor * module.down.square().sum(1)[None, :].expand_as(module.up)
    return {name: out[name] for name in policy.trainable()}
