"""What an adjoint is: from gradients of J at an inner solution to the derivative with respect to each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from u2a.bilevel.candidates import CandidateLosses
from u2a.bilevel.inner_terms import InnerTerms
from u2a.config import SolveSection
from u2a.modeling import Params, Policy
from u2a.parts import Parts
from u2a.progress import Console
from u2a.record import derive_seed
from u2a.solution import SolveStatus
from u2a.stream import permutation
from u2a.types import Example, UnlearnResult
from u2a.unlearn import InnerProblem


@dataclass(frozen=True)
class InnerPoint:
    """An inner problem at its solution, where the policy stands: all that an adjoint may need.

    Attributes:
        policy: the policy at theta*(omega).
        problem: candidates, losses and the options of the run that led here.
        weights: omega by candidate id.
        losses: the vector of candidate losses.
        section: options of the outer problem (scorer, rows of the curvature).
        seed: seed of random draws.
        result: what the run did (steps kept, line search), or None for all its steps.
        parts: where what is found here is kept, for a run that is stopped.
    """

    policy: Policy
    problem: InnerProblem
    weights: Mapping[str, float]
    losses: CandidateLosses
    section: SolveSection
    seed: int = 0
    result: UnlearnResult | None = None
    parts: Parts = Parts()

    @property
    def steps(self) -> int:
        """Optimiser steps of the inner run: those that led here, or, after a warm-up, those it will have."""
        return self.problem.section.max_steps if self.result is None else self.result.steps_kept

    def terms(self) -> InnerTerms:
        """The inner problem on a seeded sample of the weighted candidates and retain rows, for a curvature."""
        inner, most = self.problem, self.section.curvature_samples
        weighted = [row for row in inner.forget if self.weights.get(row.id, 0.0) > 0]
        chosen = sample(weighted, most, self.seed, "curvature")
        encode = self.policy.encoder.encode
        rows = tuple(encode(row.prompt, row.completion) for row in chosen)
        mass = torch.tensor([self.weights[row.id] for row in chosen], dtype=torch.float64)
        term = inner.section.retain_term
        n_retain = max(1, most // 2) if term in ("nll", "kl") else 0
        return InnerTerms(
            policy=self.policy,
            loss=inner.loss,
            rows=rows,
            weights=mass / mass.sum(),
            reference_sums=self.policy.reference_sums(rows) if inner.loss.needs_reference else torch.zeros(len(rows)),
            retain=tuple(
                encode(row.prompt, row.completion) for row in sample(inner.retain, n_retain, self.seed, "retain")
            ),
            term=term,
            retain_weight=inner.section.retain_weight,
        )


def sample(rows: Sequence[Example], most: int, seed: int, purpose: str) -> list[Example]:
    """Draw rows whose order does not matter.

    Args:
        rows: distinct rows.
        most: how many at most.
        seed: of the draw.
        purpose: what for; another purpose is another draw.

    Returns:
        The rows, in random order.
    """
    ordered = sorted(rows, key=lambda row: row.id)
    return [ordered[k] for k in permutation(derive_seed(seed, purpose), 0, len(ordered))[:most]]


@dataclass(frozen=True)
class Derivatives:
    """dg/d omega_k of every candidate under one or several gradients of J.

    Attributes:
        values: (candidates, gradients) float64, CPU, without the penalty; to be descended.
        losses: (candidates,) l_k where they were scored, or None.
        solves: status of the linear solves, one per gradient; empty where there was none.
        scorer: how the inner products were found.
        error: disagreement of the scorer with exact derivatives on a sample, or None.
    """

    values: Tensor
    losses: Tensor | None
    solves: tuple[SolveStatus, ...]
    scorer: str
    error: float | None = None


class Adjoint(Protocol):
    """How gradients of J become derivatives with respect to omega."""

    @property
    def name(self) -> str:
        """Name with parameters, for records."""
        ...

    def derivatives(self, point: InnerPoint, gradients: Sequence[Params], console: Console) -> Derivatives:
        """dg/d omega_k for every candidate.

        Args:
            point: the inner problem and its solution.
            gradients: grad J at the solution, one per fold.
            console: progress.

        Returns:
            The derivatives, in the order of ``point.problem.forget``.
        """
        ...
