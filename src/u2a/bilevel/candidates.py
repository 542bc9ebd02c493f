"""The vector of all candidates' losses as a function of theta: values, shares of several processes, slopes.

A loss depends on its candidate alone, not on its batch, and no more than one batch is held at a time, so memory does
not grow with the number of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from u2a.adapter import fused_lora
from u2a.batch_size import in_parts
from u2a.bilevel.vectors import dot
from u2a.encoding import Encoded, token_batches
from u2a.errors import NonFiniteError
from u2a.losses import GA, NPO, SFT, GradDiff, UnlearningLoss
from u2a.modeling import AnswerLogProbs, Params, Policy, answer_log_probs
from u2a.parts import Growing, Parts
from u2a.progress import Advance, Quiet


@dataclass(frozen=True)
class CandidateLosses:
    """The vector of unlearning losses (l_1 .. l_n) as a function of theta.

    Attributes:
        policy: the policy.
        loss: the per-sample loss.
        rows: tokenised candidates.
        reference_sums: (n,) s_i^ref in nats; None at theta_0 while they are not known: there they are the s_i of the
            very pass that needs them.
        ids: candidate ids, for errors.
        known: (n,) l_k where the policy stands now, float64, CPU, if they have been computed already; they go out
            of date as soon as the policy moves.
        parts: where numbers found at the theta where the policy stands are kept, for a run that is stopped.
    """

    policy: Policy
    loss: UnlearningLoss
    rows: tuple[Encoded, ...]
    reference_sums: Tensor | None
    ids: tuple[str, ...]
    known: Tensor | None = None
    parts: Parts = Parts()

    def batches(self) -> list[list[int]]:
        """Indices by forward batch, sorted by length and then by id, whatever the candidates' order."""
        order = sorted(range(len(self.rows)), key=lambda index: self.ids[index])
        batches = token_batches([self.rows[index] for index in order], self.policy.token_budget)
        return [[order[place] for place in batch] for batch in batches]

    def of(self, batch: Sequence[int], parameters: Params | None = None) -> Tensor:
        """Losses of one batch, differentiable.

        Args:
            batch: indices.
            parameters: values to use instead of the policy's.

        Returns:
            (batch,) losses.
        """
        return self.with_sums(batch, parameters)[0]

    def with_sums(self, batch: Sequence[int], parameters: Params | None = None) -> tuple[Tensor, Tensor]:
        """Losses of one batch, differentiable, and summed log-probabilities s_i of its answers.

        Args:
            batch: indices.
            parameters: values to use instead of the policy's.

        Returns:
            (batch,) losses, and (batch,) s_i in nats, detached.
        """
        rows = self.policy.collate([self.rows[index] for index in batch])
        answers = answer_log_probs(self.policy.model, rows, parameters)
        sums = answers.sum.detach()
        reference = sums if self.reference_sums is None else self.reference_sums[list(batch)].to(sums)
        return self.loss.per_sample(answers, reference), sums

    def with_references(self) -> CandidateLosses:
        """The same losses with reference sums, at the price of a forward pass where they are not known yet."""
        if self.reference_sums is not None:
            return self
        return replace(self, reference_sums=self.policy.reference_sums(self.rows))

    def filled(
        self, compute: Callable[[list[int]], Tensor], columns: int, advance: Advance, name: str | None = None
    ) -> Tensor:
        """Numbers of every candidate, batch by batch; several processes share the batches and all get all numbers.

        All processes of a distributed run must come here together, with the same candidates and the same theta.

        Args:
            compute: from the indices of a batch to (batch, columns) numbers.
            columns: numbers per candidate.
            advance: progress, told candidates.
            name: what is computed, among all that is computed at this theta: the numbers found are then kept every
                few minutes, and a stopped run goes on from there; None keeps nothing.

        Returns:
            (n, columns) float64 on the CPU.
        """
        rank, count = _process()
        none_yet = torch.zeros(len(self.rows), columns, dtype=torch.float64)
        kept = Growing(self.parts if count == 1 else Parts(), name, none_yet)
        out = kept.values
        for number, batch in enumerate(self.batches()):
            left = [k for k in batch if not kept.done[k]]  # an earlier process may have had other batches
            if left and number % count == rank:
                width = len(self.rows[left[0]].input_ids)
                for part, found in in_parts(left, width, self.policy.limits, compute):
                    out[part] = found.cpu().double()
            if left:
                kept.grown(left)
            advance.advance(len(batch))
        return summed_over_processes(out, self.policy.device)

    @torch.no_grad()
    def values(self, advance: Advance | None = None, name: str | None = None) -> Tensor:
        """All losses at the current theta.

        Args:
            advance: progress, told candidates.
            name: as for :meth:`filled`.

        Returns:
            (n,) float64 on the CPU.
        """
        with fused_lora(self.policy.model):
            out = self.filled(lambda batch: self.of(batch)[:, None], 1, advance or Quiet(), name)[:, 0]
        self.check(out)
        return out

    def check(self, values: Tensor) -> None:
        """Refuse losses that are not finite.

        Args:
            values: (n,) losses.

        Raises:
            NonFiniteError: a loss is not finite; the candidate is named.
        """
        bad = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
        if bad:
            raise NonFiniteError("candidate loss", "score", None, [self.ids[k] for k in bad])

    def base(self, advance: Advance) -> Tensor:
        """All losses at the current theta, without a forward pass where they are known.

        Args:
            advance: progress, told candidates.

        Returns:
            (n,) float64 on the CPU.
        """
        if self.known is None and not self._at_reference():
            return self.values(advance, "base")
        values = losses_at_reference(self) if self.known is None else self.known
        advance.advance(len(self.rows))
        self.check(values)
        return values

    def base_is_known(self) -> bool:
        """Whether :meth:`base` costs no forward pass."""
        there = self.loss.needs_reference and self.reference_sums is not None
        return self.known is not None or (there and self._at_reference())

    def _at_reference(self) -> bool:
        """Whether the policy stands at theta_0 and the loss follows from the summed log-probabilities there."""
        return type(self.loss) in (GA, GradDiff, NPO, SFT) and self.policy.at_start()

    def subset(self, indices: Sequence[int]) -> CandidateLosses:
        """The losses of some candidates only.

        Args:
            indices: which.

        Returns:
            A smaller vector of losses.
        """
        chosen = list(indices)
        return replace(
            self,
            rows=tuple(self.rows[index] for index in chosen),
            reference_sums=None if self.reference_sums is None else self.reference_sums[chosen],
            ids=tuple(self.ids[index] for index in chosen),
            known=None if self.known is None else self.known[chosen],
        )


def losses_at_reference(losses: CandidateLosses) -> Tensor:
    """All losses at theta_0, from the cached summed log-probabilities of the reference.

    Args:
        losses: losses of the package, functions of s_i and T_i alone: GA s_i^ref / T_i, NPO (2 / b) log 2.

    Returns:
        (n,) float64 on the CPU.
    """
    sums = losses.reference_sums if losses.loss.needs_reference else None
    sums = losses.policy.reference_sums(losses.rows) if sums is None else sums
    counts = torch.tensor([row.n_answer for row in losses.rows])
    mask = torch.arange(int(counts.max())) < counts[:, None]
    token = torch.zeros(mask.shape, dtype=torch.float64)
    token[:, 0] = sums.cpu().double()  # the sum stands on the first token: the losses see sums and counts only
    answers = AnswerLogProbs(token, mask, token.new_zeros(*mask.shape, 0))
    return losses.loss.per_sample(answers, token[:, 0])


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
class Sample:
    """Exact derivatives of a few candidates: from them steps are chosen, against them differences are checked.

    Attributes:
        indices: which candidates.
        derivatives: (chosen, directions) d/dt l_k(theta + t u) at t = 0, float64, CPU.
    """

    indices: list[int]
    derivatives: Tensor


def exact_sample(losses: CandidateLosses, directions: Sequence[Params], size: int | None = None) -> Sample:
    """Differentiate a few candidates exactly: one ordinary backward pass each, which every kernel has.

    Args:
        losses: the vector of losses.
        directions: vectors u.
        size: candidates, spread evenly over all in length order; None: one in 48, at least 2 and at most 8, which
            costs about a twentieth of a forward pass over all.

    Returns:
        Their inner products with every direction.
    """
    n = len(losses.rows)
    size = min(n, max(2, min(8, n // 48)) if size is None else size)
    order = [index for batch in losses.batches() for index in batch]
    chosen = [order[(2 * k + 1) * n // (2 * size)] for k in range(size)]
    theta = losses.policy.trainable()
    rows = []
    for index in chosen:
        with torch.enable_grad():
            gradient = torch.autograd.grad(losses.of([index]).sum(), list(theta.values()), materialize_grads=True)
        one = dict(zip(theta, gradient, strict=True))
        rows.append([dot(one, direction) for direction in directions])
    found = torch.tensor(rows, dtype=torch.float64)
    return Sample(chosen, summed_over_processes(found, losses.policy.device) / _process()[1])


@dataclass(frozen=True)
class Slopes:
    """What a scorer found.

    Attributes:
        derivatives: (candidates, directions) d/dt l_k(theta + t u) at t = 0, float64, CPU.
        losses: (candidates,) l_k(theta); for central differences the mean of both sides (equal to second order).
        sample: exact derivatives of some candidates, where the scorer needed them.
        sums: (candidates,) s_i at theta in nats, where the scorer saw them, or None.
    """

    derivatives: Tensor
    losses: Tensor
    sample: Sample | None = None
    sums: Tensor | None = None


def _process() -> tuple[int, int]:
    """Number of this process and of all of them."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def in_several_processes() -> bool:
    """Whether this process is one of several that share the work.

    Returns:
        True in a distributed run.
    """
    return _process()[1] > 1


def summed_over_processes(values: Tensor, device: torch.device) -> Tensor:
    """Add up a tensor over all processes.

    Args:
        values: of the same shape everywhere, on the CPU.
        device: where the processes exchange tensors.

    Returns:
        The sum, on the CPU, the same everywhere.
    """
    if _process()[1] == 1:
        return values
    total = values.to(device)
    dist.all_reduce(total)
    return total.cpu()
