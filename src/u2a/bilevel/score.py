"""Scoring: directional derivatives of all candidates' losses, without any per-sample gradient.

u' grad l_k for every k is the directional derivative of the *vector* of losses along u: two no-grad forwards
(central difference), one where the losses at theta are known (one-sided), or one forward-mode pass (exact).
Memory does not grow with the number of candidates; a score depends on its candidate alone, not on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from u2a.bilevel.attention import second_order_attention
from u2a.bilevel.vectors import unit
from u2a.config import SolveSection
from u2a.encoding import Encoded, token_batches
from u2a.errors import NonFiniteError
from u2a.losses import UnlearningLoss
from u2a.modeling import Params, Policy, answer_log_probs
from u2a.progress import Advance, Console, Quiet

MAX_DISAGREEMENT = 0.2  # of differences with exact derivatives, relative; beyond it they are not used


@dataclass(frozen=True)
class CandidateLosses:
    """The vector of unlearning losses (l_1 .. l_n) as a function of theta.

    Attributes:
        policy: the policy.
        loss: the per-sample loss.
        rows: tokenised candidates.
        reference_sums: (n,) s_i^ref in nats.
        ids: candidate ids, for errors.
    """

    policy: Policy
    loss: UnlearningLoss
    rows: tuple[Encoded, ...]
    reference_sums: Tensor
    ids: tuple[str, ...]

    def batches(self) -> list[list[int]]:
        """Indices by forward batch, sorted by length."""
        return token_batches(self.rows, self.policy.token_budget)

    def of(self, batch: Sequence[int], parameters: Params | None = None) -> Tensor:
        """Losses of one batch, differentiable.

        Args:
            batch: indices.
            parameters: values to use instead of the policy's.

        Returns:
            (batch,) losses.
        """
        rows = self.policy.collate([self.rows[index] for index in batch])
        answers = answer_log_probs(self.policy.model, rows, parameters)
        return self.loss.per_sample(answers, self.reference_sums[list(batch)].to(answers.sum))

    @torch.no_grad()
    def values(self, advance: Advance | None = None) -> Tensor:
        """All losses at the current theta.

        Args:
            advance: progress, told candidates.

        Returns:
            (n,) float64 on the CPU.

        Raises:
            NonFiniteError: a loss is not finite; the candidate is named.
        """
        out = torch.zeros(len(self.rows), dtype=torch.float64)
        for number, batch in enumerate(self.batches()):
            losses = self.of(batch).cpu().double()
            if not torch.isfinite(losses).all():
                bad = [self.ids[k] for k, value in zip(batch, losses, strict=True) if not math.isfinite(value)]
                raise NonFiniteError("candidate loss", "score", number, bad)
            out[batch] = losses
            (advance or Quiet()).advance(len(batch))
        return out

    def subset(self, indices: Sequence[int]) -> CandidateLosses:
        """The losses of some candidates only.

        Args:
            indices: which.

        Returns:
            A smaller vector of losses.
        """
        rows = tuple(self.rows[index] for index in indices)
        ids = tuple(self.ids[index] for index in indices)
        return CandidateLosses(self.policy, self.loss, rows, self.reference_sums[list(indices)], ids)


@contextmanager
def shifted(policy: Policy, direction: Params, step: float) -> Iterator[None]:
    """Use theta + step * direction for the duration of a ``with`` block; theta is restored bit for bit.

    Args:
        policy: the policy.
        direction: of the structure of the trainable parameters.
        step: how far.
    """
    saved = {name: value.detach().clone() for name, value in policy.trainable().items()}
    try:
        with torch.no_grad():
            for name, value in policy.trainable().items():
                value.add_(direction[name].to(value), alpha=step)
        yield
    finally:
        with torch.no_grad():
            for name, value in policy.trainable().items():
                value.copy_(saved[name])


@dataclass(frozen=True)
class Slopes:
    """What a scorer found.

    Attributes:
        derivatives: (candidates, directions) d/dt l_k(theta + t u) at t = 0, float64, CPU.
        losses: (candidates,) l_k(theta); for central differences the mean of both sides (equal to second order).
    """

    derivatives: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Scoring:
    """Derivatives and how they were found.

    Attributes:
        slopes: derivatives and losses.
        scorer: name of the scorer that found them.
        error: its disagreement with exact derivatives on a sample, or None.
    """

    slopes: Slopes
    scorer: str
    error: float | None


class Scorer(Protocol):
    """A way to compute directional derivatives, as a value."""

    @property
    def name(self) -> str:
        """Name with parameters, for records."""
        ...

    def derivatives(self, losses: CandidateLosses, directions: Sequence[Params], advance: Advance) -> Slopes:
        """d/dt l_k(theta + t u) at t = 0 for every candidate and direction.

        Args:
            losses: the vector of losses.
            directions: vectors u of any length.
            advance: progress, told candidates per forward pass.

        Returns:
            Derivatives and losses.
        """
        ...

    def passes(self, n_directions: int) -> int:
        """Forward passes over all candidates, for the progress bar.

        Args:
            n_directions: number of directions.

        Returns:
            Passes.
        """
        ...


@dataclass(frozen=True)
class ForwardMode:
    """Exact derivatives by one forward-mode pass per direction (``torch.func.jvp``)."""

    name: str = "jvp"

    def passes(self, n_directions: int) -> int:
        """One per direction."""
        return n_directions

    def derivatives(self, losses: CandidateLosses, directions: Sequence[Params], advance: Advance) -> Slopes:
        """See :class:`Scorer`; attention runs on the kernel that supports forward mode."""
        theta = {name: value.detach() for name, value in losses.policy.trainable().items()}
        out = torch.zeros(len(losses.rows), len(directions), dtype=torch.float64)
        base = torch.zeros(len(losses.rows), dtype=torch.float64)
        with torch.no_grad(), second_order_attention(losses.policy):
            for column, direction in enumerate(directions):
                tangent = {name: direction[name].to(value) for name, value in theta.items()}
                for batch in losses.batches():
                    value, slope = torch.func.jvp(lambda p, rows=batch: losses.of(rows, p), (theta,), (tangent,))[:2]
                    out[batch, column] = slope.cpu().double()
                    base[batch] = value.cpu().double()
                    advance.advance(len(batch))
        return Slopes(out, base)


@dataclass(frozen=True)
class Central:
    """Central differences (l(theta + eps u) - l(theta - eps u)) / 2 eps with ||u|| = 1: two no-grad forwards.

    Attributes:
        step: eps, or None to choose it from a probe (see :func:`choose_step`).
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
        """See :class:`Scorer`."""
        out = torch.zeros(len(losses.rows), len(directions), dtype=torch.float64)
        base: Tensor | None = None
        for column, direction in enumerate(directions):
            u, length = unit(direction)
            if length == 0.0:
                continue
            step = choose_step(losses, u) if self.step is None else self.step
            with shifted(losses.policy, u, step):
                above = losses.values(advance)
            with shifted(losses.policy, u, -step):
                below = losses.values(advance)
            out[:, column] = (above - below) / (2.0 * step) * length
            base = (above + below) / 2.0
        return Slopes(out, losses.values() if base is None else base)


@dataclass(frozen=True)
class OneSided:
    """One-sided differences (l(theta + eps u) - l(theta)) / eps: one no-grad forward per direction, one for l(theta).

    Attributes:
        step: eps, or None to choose it from a probe.
    """

    step: float | None = None

    @property
    def name(self) -> str:
        """Name with parameters."""
        return "one_sided" if self.step is None else f"one_sided(step={self.step:g})"

    def passes(self, n_directions: int) -> int:
        """One per direction and one for the base."""
        return n_directions + 1

    def derivatives(self, losses: CandidateLosses, directions: Sequence[Params], advance: Advance) -> Slopes:
        """See :class:`Scorer`."""
        base = losses.values(advance)
        out = torch.zeros(len(losses.rows), len(directions), dtype=torch.float64)
        for column, direction in enumerate(directions):
            u, length = unit(direction)
            if length == 0.0:
                continue
            step = choose_step(losses, u, target=0.001) if self.step is None else self.step
            with shifted(losses.policy, u, step):
                above = losses.values(advance)
            out[:, column] = (above - base) / step * length
        return Slopes(out, base)


def choose_step(losses: CandidateLosses, direction: Params, target: float = 0.005, probe: int = 8) -> float:
    """Choose eps so that a probe's losses change by about ``target`` nats per answer token.

    That is large against float32 round-off in a loss (about 1e-6 relative) and small against the scale on which
    the loss bends. The probe is spread evenly over the candidates in length order.

    Args:
        losses: the vector of losses.
        direction: unit vector.
        target: root mean square change sought, nats per token for length-normalised losses; for losses of summed
            log-probabilities it is multiplied by the mean answer length.
        probe: candidates used.

    Returns:
        eps in [1e-4, 1].
    """
    order = [index for batch in losses.batches() for index in batch]
    chosen = order[:: max(1, len(order) // probe)][:probe]
    part = losses.subset(chosen)
    scale = target
    if losses.loss.needs_reference:
        scale *= sum(row.n_answer for row in part.rows) / len(part.rows)
    trial = 0.02
    with shifted(losses.policy, direction, trial):
        above = part.values()
    with shifted(losses.policy, direction, -trial):
        below = part.values()
    slope = float((((above - below) / (2 * trial)) ** 2).mean().sqrt())
    return min(1.0, max(1e-4, scale / slope)) if slope > 0 else trial


def agreement(losses: CandidateLosses, directions: Sequence[Params], found: Tensor, sample: int = 6) -> float | None:
    """Relative disagreement of a scorer with exact forward-mode derivatives on a sample of candidates.

    Args:
        losses: the vector of losses.
        directions: the directions scored; the first is checked.
        found: (n, directions) the scorer's derivatives.
        sample: candidates checked, spread over the set by id.

    Returns:
        ||found - exact|| / ||exact||, or None when the exact ones are all 0 or a kernel has no forward mode (4-bit).

    Raises:
        RuntimeError: out of memory.
    """
    order = sorted(range(len(losses.rows)), key=lambda index: losses.ids[index])
    chosen = order[:: max(1, len(order) // sample)][:sample]
    try:
        exact = ForwardMode().derivatives(losses.subset(chosen), directions[:1], Quiet()).derivatives[:, 0]
    except RuntimeError as error:  # torch's own word for a kernel without forward mode, and for too little memory
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    size = float(exact.norm())
    return float((found[chosen, 0] - exact).norm()) / size if size > 0 else None


def make_scorer(section: SolveSection, policy: Policy) -> Scorer:
    """Turn the configured name into a scorer value.

    Args:
        section: options of the outer problem.
        policy: the policy whose losses are scored.

    Returns:
        The scorer; exact derivatives whatever was asked for where differences would be rounding noise.
    """
    if section.scorer != "jvp" and rounds_to_16_bits(policy):
        return ForwardMode("jvp (16-bit base)")
    scorers: dict[str, Scorer] = {"central": Central(), "one_sided": OneSided(), "jvp": ForwardMode()}
    return scorers[section.scorer]


def rounds_to_16_bits(policy: Policy) -> bool:
    """Whether losses move in steps of 16-bit rounding, so that their differences are noise.

    Args:
        policy: the policy.

    Returns:
        True when a weight is float16 or bfloat16, or autocast is on; False for a quantised base, whose kernels have
        no forward mode.
    """
    base: nn.Module = policy.model.get_base_model() if isinstance(policy.model, PeftModel) else policy.model
    if getattr(base, "is_quantized", False) or getattr(base, "is_loaded_in_4bit", False):
        return False
    if torch.is_autocast_enabled(policy.device.type):
        return True
    return any(value.dtype in (torch.float16, torch.bfloat16) for value in base.parameters())


def score_all(
    section: SolveSection, losses: CandidateLosses, directions: Sequence[Params], console: Console
) -> Scoring:
    """Score all candidates with the configured scorer, and once more exactly where it turns out too far off.

    Args:
        section: options of the outer problem.
        losses: the vector of losses.
        directions: vectors u.
        console: progress.

    Returns:
        Derivatives with the scorer that found them.
    """
    scorer = make_scorer(section, losses.policy)
    slopes = _run(scorer, losses, directions, console)
    error = None if isinstance(scorer, ForwardMode) else agreement(losses, directions, slopes.derivatives)
    if error is None or error <= MAX_DISAGREEMENT:
        return Scoring(slopes, scorer.name, error)  # None: not checked
    exact = ForwardMode(f"jvp ({scorer.name} was off by {error:.0%})")
    return Scoring(_run(exact, losses, directions, console), exact.name, None)


def _run(scorer: Scorer, losses: CandidateLosses, directions: Sequence[Params], console: Console) -> Slopes:
    with console.phase("score candidates", scorer.passes(len(directions)) * len(losses.rows), "candidates") as advance:
        return scorer.derivatives(losses, directions, advance)
