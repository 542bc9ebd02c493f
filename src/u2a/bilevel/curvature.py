"""Curvatures of the inner problem, as interchangeable values.

A curvature is a rule (:class:`Hessian`, ...); applied to the terms of an inner problem at its solution it gives a
symmetric operator on parameter space, of which only products with vectors are ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from u2a.bilevel.attention import second_order_attention
from u2a.bilevel.vectors import dot, zeros_like
from u2a.encoding import Encoded, token_batches
from u2a.errors import NotConverged
from u2a.losses import UnlearningLoss, kl_from_reference
from u2a.modeling import Params, Policy, answer_log_probs


class Operator(Protocol):
    """A symmetric operator on parameter space."""

    def product(self, vector: Params) -> Params:
        """Return the operator applied to a vector.

        Args:
            vector: of the structure of the trainable parameters.

        Returns:
            The product, of the same structure.
        """
        ...


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

    def scalars(self) -> Iterator[Tensor]:
        """Parts of f, one token batch at a time, differentiable; their sum is f.

        Yields:
            Scalars; each holds its graph, so use one before asking for the next.
        """
        for batch in token_batches(self.rows, self.policy.token_budget):
            answers = self.policy.log_probs([self.rows[index] for index in batch])
            losses = self.loss.per_sample(answers, self.reference_sums[batch].to(answers.sum))
            yield (self.weights[batch].to(losses) * losses).sum()
        for batch in token_batches(self.retain, self.policy.token_budget) if self.term in ("nll", "kl") else ():
            rows = [self.retain[index] for index in batch]
            yield self.retain_weight / len(self.retain) * self.retain_losses(rows).sum()
        if self.term == "proximal":
            yield self.retain_weight * self.policy.change_sq()

    def retain_losses(self, rows: Sequence[Encoded]) -> Tensor:
        """Retain losses of a few rows, differentiable.

        Args:
            rows: tokenised retain rows of one batch.

        Returns:
            (rows,) mean over answer tokens of the NLL, or of KL(reference || policy).
        """
        if self.term == "nll":
            return -self.policy.log_probs(rows).mean
        with torch.no_grad(), self.policy.reference() as start:  # before the graph: it may swap weights
            reference = answer_log_probs(start, self.policy.collate(rows))
        answers = self.policy.log_probs(rows)
        return kl_from_reference(answers.logits, reference.logits, answers.mask)


class Curvature(Protocol):
    """How an operator is made of an inner problem."""

    @property
    def name(self) -> str:
        """Name with parameters, for records."""
        ...

    def at(self, terms: InnerTerms) -> Operator:
        """Make the operator at the policy's current theta.

        Args:
            terms: the inner problem on a few rows.

        Returns:
            The operator; it is valid while theta stays.
        """
        ...


@dataclass(frozen=True)
class Hessian:
    """The exact Hessian; indefinite in general (gradient ascent is concave in the NLL)."""

    name: str = "hessian"

    def at(self, terms: InnerTerms) -> Operator:
        """See :class:`Curvature`."""
        return HessianOperator(terms)


@dataclass(frozen=True)
class HessianOperator:
    """Exact Hessian-vector products by double backward, one token batch at a time.

    Attributes:
        terms: the inner problem.
    """

    terms: InnerTerms

    def product(self, vector: Params) -> Params:
        """Return H v.

        Args:
            vector: v.

        Returns:
            The product, accumulated in float32 or wider.
        """
        parameters = self.terms.policy.trainable()
        names, leaves = list(parameters), list(parameters.values())
        total = zeros_like(vector)
        with second_order_attention(self.terms.policy):
            for value in self.terms.scalars():
                first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
                inner = [(g * vector[name].to(g)).sum() for name, g in zip(names, first, strict=True) if g is not None]
                second = torch.autograd.grad(torch.stack(inner).sum(), leaves, allow_unused=True)
                for name, gradient in zip(names, second, strict=True):
                    if gradient is not None:
                        total[name] += gradient.to(total[name])
        return total


@dataclass(frozen=True)
class Diagonal:
    """A diagonal operator with entries >= 0.

    Attributes:
        entries: the diagonal, of the structure of the trainable parameters.
    """

    entries: Params

    def product(self, vector: Params) -> Params:
        """Return D v.

        Args:
            vector: v.

        Returns:
            The product.
        """
        return {name: entry * vector[name].to(entry) for name, entry in self.entries.items()}

    def solve(self, right: Params, damping: float) -> Params:
        """Solve (D + rho I) x = b entry by entry.

        Args:
            right: b.
            damping: rho >= 0, absolute.

        Returns:
            x; 0 where an entry of D + rho I and of b are both 0 (the least solution).

        Raises:
            NotConverged: D + rho I is 0 where b is not.
        """
        out = {}
        for name, entry in self.entries.items():
            bottom, top = entry + damping, right[name].to(entry)
            if bool(((bottom == 0) & (top != 0)).any()):
                raise NotConverged("diagonal curvature: 0 where the gradient is not (set solve.damping above 0)")
            out[name] = torch.where(bottom > 0, top / bottom, 0.0)
        return out


def mean_eigenvalue(operator: Operator, like: Params, seed: int, probes: int = 4) -> float:
    """Mean magnitude |trace| / d of the eigenvalues, the unit of damping, by Hutchinson's estimate.

    Args:
        operator: the operator.
        like: a vector of the space.
        seed: of the random probes.
        probes: products spent, >= 1; a diagonal operator needs none.

    Returns:
        The estimate, >= 0.

    Source: Hutchinson 1990.
    """
    size = sum(value.numel() for value in like.values())
    if isinstance(operator, Diagonal):
        return abs(math.fsum(float(entry.double().sum()) for entry in operator.entries.values())) / size
    generator = torch.Generator().manual_seed(seed)
    traces = []
    for _ in range(probes):
        probe = {
            name: (torch.randint(0, 2, value.shape, generator=generator) * 2 - 1).to(value)
            for name, value in zeros_like(like).items()
        }
        traces.append(dot(probe, operator.product(probe)))
    return abs(math.fsum(traces)) / (probes * size)


def make_curvature(name: str) -> Curvature:
    """Turn a configured name into a curvature value.

    Args:
        name: ``hessian``.

    Returns:
        The curvature.
    """
    curvatures: dict[str, Curvature] = {"hessian": Hessian()}
    return curvatures[name]
