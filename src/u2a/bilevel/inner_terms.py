"""The inner problem on a few rows, in parts small enough to differentiate: what a curvature is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from u2a.batch_size import with_less
from u2a.bilevel.vectors import zeros_like
from u2a.encoding import Encoded, token_batches
from u2a.losses import UnlearningLoss, kl_from_reference
from u2a.modeling import AnswerLogProbs, Params, Policy, answer_log_probs


@dataclass(frozen=True)
class Part:
    """A summand of f on the rows of one token batch: a function phi of the logits, which are a function of theta.

    Attributes:
        logits: (batch, answer, vocab) z, those that predict the answer tokens; holds its graph.
        value: scalar phi(z), weights included; holds its graph.
    """

    logits: Tensor
    value: Tensor


@dataclass(frozen=True)
class InnerTerms:
    """The inner problem f = sum_i w_i l_i + lambda L_R on a few rows, from which a curvature is made.

    Attributes:
        policy: the policy at theta*.
        loss: the per-sample loss.
        rows: tokenised unlearning rows.
        weights: (rows,) w_i >= 0, summing to 1.
        reference_sums: (rows,) s_i^ref.
        retain: tokenised retain rows (empty: no retain term on rows).
        term: ``none``, ``nll``, ``kl`` or ``proximal``.
        retain_weight: lambda.
    """

    policy: Policy
    loss: UnlearningLoss
    rows: tuple[Encoded, ...]
    weights: Tensor
    reference_sums: Tensor
    retain: tuple[Encoded, ...] = ()
    term: Literal["none", "nll", "kl", "proximal"] = "none"
    retain_weight: float = 1.0

    @property
    def has_retain_rows(self) -> bool:
        """Whether L_R is a mean over retain rows."""
        return self.term in ("nll", "kl") and len(self.retain) > 0

    def parts(self) -> Iterator[Part]:
        """The terms of f that are functions of logits, one token batch at a time; all but the proximal term.

        Yields:
            Parts; each holds its graph, so use one before asking for the next.
        """
        budget = self.policy.limits.cut(self.policy.token_budget)
        for batch in token_batches(self.rows, budget):
            answers = self.policy.log_probs([self.rows[index] for index in batch])
            losses = self.loss.per_sample(answers, self.reference_sums[batch].to(answers.sum))
            yield Part(answers.logits, (self.weights[batch].to(losses) * losses).sum())
        for batch in token_batches(self.retain, budget) if self.has_retain_rows else ():
            answers, losses = self._retain([self.retain[index] for index in batch])
            yield Part(answers.logits, self.retain_weight / len(self.retain) * losses.sum())

    def scalars(self) -> Iterator[Tensor]:
        """All terms of f, one token batch at a time, differentiable; their sum is f.

        Yields:
            Scalars; each holds its graph, so use one before asking for the next.
        """
        for part in self.parts():
            yield part.value
        if self.term == "proximal":
            yield self.retain_weight * self.policy.change_sq()

    def gradient(self) -> Params:
        """Gradient of f.

        Returns:
            grad f, accumulated in float32 or wider.
        """
        parameters = self.policy.trainable()

        def compute() -> Params:
            total = zeros_like(parameters)
            for value in self.scalars():
                add_gradients(total, torch.autograd.grad(value, list(parameters.values()), allow_unused=True))
            return total

        return self.with_less_memory(compute)

    def with_less_memory(self, compute: Callable[[], Params]) -> Params:
        """Compute a vector from the parts, anew with smaller ones where memory runs out.

        Args:
            compute: goes through :meth:`parts` or :meth:`scalars` and leaves nothing behind.

        Returns:
            Its result.
        """
        return with_less(self.policy.limits, (*self.rows, *self.retain), self.policy.token_budget, compute)

    def _retain(self, rows: Sequence[Encoded]) -> tuple[AnswerLogProbs, Tensor]:
        """Answers and (rows,) retain losses: mean over answer tokens of the NLL, or of KL(reference || policy)."""
        if self.term == "nll":
            answers = self.policy.log_probs(rows)
            return answers, -answers.mean
        with torch.no_grad(), self.policy.reference() as start:  # before the graph: it may swap weights
            reference = answer_log_probs(start, self.policy.collate(rows))
        answers = self.policy.log_probs(rows)
        return answers, kl_from_reference(answers.logits, reference.logits, answers.mask)


def add_gradients(total: Params, gradients: Sequence[Tensor | None]) -> None:
    """Add what ``torch.autograd.grad`` returned to a vector, in place.

    Args:
        total: the vector.
        gradients: one per entry of ``total``, in its order; None counts as zero.
    """
    for name, gradient in zip(total, gradients, strict=True):
        if gradient is not None:
            total[name] += gradient.to(total[name])
