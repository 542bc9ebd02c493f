"""Attention kernels that can be differentiated twice and in forward mode, for the products that need it only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from u2a.modeling import Policy


@contextmanager
def second_order_attention(policy: Policy) -> Iterator[None]:
    """Use an attention kernel that can be differentiated twice and in forward mode, inside a ``with`` block.

    Args:
        policy: the policy; flash attention is replaced by sdpa's plain kernel for the block.
    """
    base: nn.Module = policy.model.get_base_model() if isinstance(policy.model, PeftModel) else policy.model
    with _without_flash(base), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _without_flash(base: nn.Module) -> Iterator[None]:
    """Put sdpa in the place of flash attention, which knows neither double backward nor forward mode."""
    kernel = getattr(getattr(base, "config", None), "_attn_implementation", None)
    if not isinstance(base, PreTrainedModel) or not isinstance(kernel, str) or "flash" not in kernel:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(kernel)
