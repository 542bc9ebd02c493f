"""Directional derivatives by finite differences of the losses: no-grad forward passes only, on any kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from u2a.bilevel.candidates import CandidateLosses, Sample, Slopes, exact_sample, shifted
from u2a.bilevel.vectors import unit
from u2a.modeling import Params
from u2a.progress import Advance

TRIAL = 0.02  # step where no loss of the sample changes


@dataclass(frozen=True)
class Central:
    """Central differences (l(theta + eps u) - l(theta - eps u)) / 2 eps with ||u|| = 1: two no-grad forwards.

    Attributes:
        step: eps, or None to choose it (see :func:`choose_step`).
    """

    step: float | None = None

    @property
    def name(self) -> str:
        """Name with parameters."""
        return "central" if self.step is None else f"central(step={self.step:g})"

    def passes(self, n_directions: int) -> int:
        """Two per direction."""
        return 2 * n_directions

    def derivatives(self, losses: CandidateLosses, directions: Sequence[Params], advance: Advance) -> Slopes:
        """See :class:`~u2a.bilevel.score.Scorer`."""
        out = torch.zeros(len(losses.rows), len(directions), dtype=torch.float64)
        base: Tensor | None = None
        sample = exact_sample(losses, directions) if self.step is None else None
        for column, u, length, step in _moves(losses, directions, sample or self.step, 0.003):
            with shifted(losses.policy, u, step):
                above = losses.values(advance, f"{self.name} {column} above")
            with shifted(losses.policy, u, -step):
                below = losses.values(advance, f"{self.name} {column} below")
            out[:, column] = (above - below) / (2.0 * step) * length
            base = (above + below) / 2.0
        return Slopes(out, losses.values() if base is None else base, sample)


@dataclass(frozen=True)
class OneSided:
    """One-sided differences (l(theta + eps u) - l(theta)) / eps: one no-grad forward per direction, one for l(theta).

    Where l(theta) is known (at theta_0, or ``CandidateLosses.known``) its forward is saved.

    Attributes:
        step: eps, or None to choose it.
    """

    step: float | None = None

    @property
    def name(self) -> str:
        """Name with parameters."""
        return "one_sided" if self.step is None else f"one_sided(step={self.step:g})"

    def passes(self, n_directions: int) -> int:
        """One per direction and one for the base, done at once where it is known."""
        return n_directions + 1

    def derivatives(self, losses: CandidateLosses, directions: Sequence[Params], advance: Advance) -> Slopes:
        """See :class:`~u2a.bilevel.score.Scorer`."""
        base = losses.base(advance)
        out = torch.zeros(len(losses.rows), len(directions), dtype=torch.float64)
        sample = exact_sample(losses, directions) if self.step is None else None
        for column, u, length, step in _moves(losses, directions, sample or self.step, 0.001):
            with shifted(losses.policy, u, step):
                above = losses.values(advance, f"{self.name} {column} above")
            out[:, column] = (above - base) / step * length
        return Slopes(out, base, sample)


def _moves(
    losses: CandidateLosses, directions: Sequence[Params], source: Sample | float | None, target: float
) -> Iterator[tuple[int, Params, float, float]]:
    """Column, unit direction, original length and step of every direction but zeros; steps are given or chosen."""
    for column, direction in enumerate(directions):
        u, length = unit(direction)
        if length == 0.0:
            continue
        if isinstance(source, Sample):
            yield column, u, length, choose_step(losses, source.derivatives[:, column] / length, target)
        else:
            yield column, u, length, source or TRIAL


def choose_step(losses: CandidateLosses, slopes: Tensor, target: float = 0.003) -> float:
    """Choose eps so that the losses change by about ``target`` nats per answer token.

    That is large against float32 round-off in a loss (about 1e-6 relative) and small against the scale on which
    the loss bends.

    Args:
        losses: the vector of losses.
        slopes: (m,) derivatives of some candidates along the unit direction.
        target: root mean square change sought, nats per token for length-normalised losses; for losses of summed
            log-probabilities it is multiplied by the mean answer length.

    Returns:
        eps in [1e-4, 1].
    """
    scale = target
    if losses.loss.needs_reference:
        scale *= sum(row.n_answer for row in losses.rows) / len(losses.rows)
    slope = float(slopes.square().mean().sqrt())
    return min(1.0, max(1e-4, scale / slope)) if slope > 0 else TRIAL
