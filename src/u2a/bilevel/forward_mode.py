"""Exact directional derivatives by forward mode: one pass per direction, for any trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from u2a.bilevel.attention import second_order_attention
from u2a.bilevel.candidates import CandidateLosses, Slopes
from u2a.modeling import Params
from u2a.progress import Advance


@dataclass(frozen=True)
class ForwardMode:
    """Exact derivatives by one forward-mode pass per direction (``torch.func.jvp``)."""

    name: str = "jvp"

    def passes(self, n_directions: int) -> int:
        """One per direction."""
        return n_directions

    def derivatives(self, losses: CandidateLosses, directions: Sequence[Params], advance: Advance) -> Slopes:
        """See :class:`~u2a.bilevel.score.Scorer`; attention runs on the kernel that supports forward mode."""
        theta = {name: value.detach() for name, value in losses.policy.trainable().items()}
        out = torch.zeros(len(losses.rows), len(directions), dtype=torch.float64)
        base = torch.zeros(len(losses.rows), dtype=torch.float64)
        with torch.no_grad(), second_order_attention(losses.policy):
            for column, direction in enumerate(directions):
                tangent = {name: direction[name].to(value) for name, value in theta.items()}

                def both(batch: list[int], tangent: Params = tangent) -> Tensor:
                    return torch.stack(torch.func.jvp(lambda p: losses.of(batch, p), (theta,), (tangent,))[:2], 1)

                base, out[:, column] = losses.filled(both, 2, advance, f"{self.name} {column}").T.contiguous()
        return Slopes(out, base)
