"""Exact directional derivatives by one batched backward pass for all directions, where LoRA carries the change.

A linear LoRA layer computes y = W x + s B A x. Along a direction u = (U_A, U_B) it changes by
dy = s (U_B A x + B U_A x), so its share of u' grad l_i is sum_t <d l_i / d y_it, dy_it>. A hook therefore adds
sum_k c_ik dy^k to the layer's output, with numbers c_ik that are 0: no value changes, and the derivative of
sum_i l_i with respect to c_ik is u_k' grad l_i, for every candidate and direction at once. No gradient of a
parameter is computed and none is stored per sample; everything added has the rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from u2a.bilevel.candidates import CandidateLosses, Slopes
from u2a.encoding import Encoded
from u2a.errors import ModelError
from u2a.modeling import Params, Policy, answer_log_probs, evaluation_mode
from u2a.progress import Advance

# peft's layers whose change is s B A x and no more; the last two exist with bitsandbytes only.
PLAIN_LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")


@dataclass(frozen=True)
class BatchedBackward:
    """Exact derivatives along all directions by one forward and one backward pass (see the module's text).

    Attributes:
        name: name with remarks, for records.
        chunk: directions per pass; each holds rank x 4 bytes per token and adapted layer.
    """

    name: str = "backward"
    chunk: int = 16

    def passes(self, n_directions: int) -> int:
        """One for every ``chunk`` directions."""
        return -(-n_directions // self.chunk)

    def derivatives(self, losses: CandidateLosses, directions: Sequence[Params], advance: Advance) -> Slopes:
        """See :class:`~u2a.bilevel.score.Scorer`.

        Args:
            losses: the vector of losses; the policy must be one that :func:`supports` approves.
            directions: vectors u of any length, at least one.
            advance: progress, told candidates per pass.

        Returns:
            Derivatives and losses.
        """
        parts = []
        for start in range(0, len(directions), self.chunk):
            chosen = directions[start : start + self.chunk]
            with _taps(losses.policy, chosen) as taps, torch.enable_grad():
                name = f"{self.name} {start}"
                measure = partial(taps.measure, losses)
                parts.append(losses.filled(measure, taps.n + 2, advance, name))
        base, sums = parts[0][:, 0].contiguous(), parts[0][:, 1].contiguous()
        losses.check(base)
        return Slopes(torch.cat([part[:, 2:] for part in parts], 1), base, sums=sums)


@dataclass
class _Taps:
    """The numbers c that the hooks multiply with, for the batch in hand."""

    n: int
    device: torch.device
    dtype: torch.dtype
    zeros: Tensor

    def measure(self, losses: CandidateLosses, batch: list[int]) -> Tensor:
        """(batch, 2 + n) losses, summed log-probabilities and derivatives of one batch."""
        self.zeros = torch.zeros(len(batch), self.n, dtype=self.dtype, device=self.device, requires_grad=True)
        values, sums = losses.with_sums(batch)
        (slopes,) = torch.autograd.grad(values.sum(), self.zeros)
        return torch.cat([values.detach()[:, None], sums[:, None], slopes], 1)


@dataclass(frozen=True)
class _Tap:
    """Forward hook of one LoRA layer: adds sum_k c_ik dy^k to its output.

    Attributes:
        taps: holds c.
        down: ((n + 1) rank, in) the rows of A, U_A^1 .. U_A^n.
        up: (out, (n + 1) rank) the columns of B, U_B^1 .. U_B^n.
        scaling: s.
    """

    taps: _Taps
    down: Tensor
    up: Tensor
    scaling: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output plus zeros that know their derivatives."""
        x, c = args[0], self.taps.zeros
        if not _has_rows(x, len(c)):
            raise ModelError(
                f"solve.scorer: backward needs (batch, tokens, features) as the input of {type(module).__name__}, "
                f"got {tuple(x.shape)} for {len(c)} sequences (use jvp or central)"
            )
        with torch.autocast(x.device.type, enabled=False):
            c = c.to(x.device)[:, None, :, None]  # (batch, 1, n, 1)
            inside = F.linear(x.detach().to(self.down.dtype), self.down).unflatten(-1, (self.taps.n + 1, -1))
            ax, ux = inside[:, :, :1], inside[:, :, 1:]  # A x: (batch, tokens, 1, rank); U_A^k x: (batch, tokens, n, r)
            rows = torch.cat([(c * ux).sum(2, keepdim=True), c * ax], 2).flatten(2)
            change = self.scaling * F.linear(rows, self.up)
        return output + change.to(output.dtype)


def supports(policy: Policy) -> bool:
    """Whether the derivatives of a policy's losses can be found this way.

    Args:
        policy: the policy; it answers two sequences of a few tokens.

    Returns:
        True when every trainable parameter is A or B of a plain linear LoRA layer (not of an embedding, a
        convolution or a variant such as DoRA) that sees its input as (batch, tokens, features).
    """
    layers = list(_layers(policy))
    found = {id(value) for _, down, up, _ in layers for value in (down, up)}
    if not all(id(value) in found for value in policy.trainable().values()):
        return False
    shapes: list[bool] = []
    end = policy.encoder.end_id
    with ExitStack() as stack:
        for module, *_ in layers:
            hook = module.register_forward_pre_hook(lambda _, args: shapes.append(_has_rows(args[0], 2)))
            stack.callback(hook.remove)
        with evaluation_mode(policy.model), torch.no_grad():  # in one batch, whatever the token budget
            answer_log_probs(policy.model, policy.collate([Encoded((end, end, end), 1)] * 2))
    return all(shapes)


def _has_rows(x: Tensor, count: int) -> bool:
    """Whether a layer's input is (batch, tokens, features) for ``count`` sequences."""
    return x.dim() == 3 and x.shape[0] == count


def _layers(policy: Policy) -> Iterator[tuple[nn.Module, Tensor, Tensor, float]]:
    """Plain linear LoRA layers in use, with A (rank, in), B (out, rank) and the scaling."""
    for module in policy.model.modules():
        if not isinstance(module, LoraLayer) or type(module).__name__ not in PLAIN_LAYERS:
            continue
        if module.merged or module.disable_adapters:
            continue
        for name in module.active_adapters:
            if name in module.lora_A and name not in module.lora_variant:
                down, up = module.lora_A[name].weight, module.lora_B[name].weight
                yield cast(nn.Module, module), cast(Tensor, down), cast(Tensor, up), float(module.scaling[name])


@contextmanager
def _taps(policy: Policy, directions: Sequence[Params]) -> Iterator[_Taps]:
    """Hook every LoRA layer; inside, no parameter asks for a gradient. Undone at the end, also after an error."""
    theta = policy.trainable()
    names = {id(value): name for name, value in theta.items()}
    dtype = next(iter(theta.values())).dtype
    taps = _Taps(len(directions), policy.device, dtype, torch.zeros(0, len(directions)))
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(policy.model))
        for module, down, up, scaling in list(_layers(policy)):
            downs = [down.detach(), *(u[names[id(down)]].to(down) for u in directions)]
            ups = [up.detach(), *(u[names[id(up)]].to(up) for u in directions)]
            hook = module.register_forward_hook(_Tap(taps, torch.cat(downs), torch.cat(ups, 1), scaling))
            stack.callback(hook.remove)
        for value in theta.values():
            stack.callback(value.requires_grad_, True)
            value.requires_grad_(False)
        yield taps
