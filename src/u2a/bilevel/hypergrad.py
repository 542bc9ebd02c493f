"""Adjoints: how H^-1 is applied to the gradient of J, as interchangeable values.

The gradient of the outer problem is dg/d omega_k = u' grad l_k (+ penalty), with u = H^-1 grad J and H the
Hessian of the inner problem at its solution. It is a gradient to *descend*; the gain of candidate k is its
negative, -u' grad l_k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from u2a.bilevel.linsolve import CG, LinearSolution, LinearSolver
from u2a.bilevel.vectors import norm, scaled, zeros_like
from u2a.config import SolveSection, UnlearnSection
from u2a.encoding import Encoded, token_batches
from u2a.losses import UnlearningLoss, kl_from_reference
from u2a.modeling import Params, Policy, answer_log_probs
from u2a.solution import SolveStatus


class Curvature(Protocol):
    """A symmetric operator on parameter space."""

    def product(self, vector: Params) -> Params:
        """Return the operator applied to a vector.

        Args:
            vector: of the structure of the trainable parameters.

        Returns:
            The product, of the same structure.
        """
        ...


class Adjoint(Protocol):
    """How u = H^-1 grad J is computed."""

    @property
    def name(self) -> str:
        """Name with parameters, for records."""
        ...

    @property
    def needs_curvature(self) -> bool:
        """Whether a curvature must be given."""
        ...

    def solve(self, gradient: Params, curvature: Curvature | None) -> LinearSolution:
        """Apply H^-1.

        Args:
            gradient: grad J.
            curvature: H, or None where it is not needed.

        Returns:
            u with the status of the solve.
        """
        ...


@dataclass(frozen=True)
class Identity:
    """H^-1 ~ I / gamma: what the released code really does; cheapest, a baseline.

    Attributes:
        gamma: curvature taken for every direction, > 0.
    """

    gamma: float = 1.0
    needs_curvature: bool = False

    @property
    def name(self) -> str:
        """Name with parameters."""
        return f"identity(gamma={self.gamma:g})"

    def solve(self, gradient: Params, curvature: Curvature | None) -> LinearSolution:
        """Return grad J / gamma."""
        status = SolveStatus(status="closed_form", steps=0, residual=0.0, damping=self.gamma)
        return LinearSolution(scaled(gradient, 1.0 / self.gamma), status)


@dataclass(frozen=True)
class Implicit:
    """u = (H + rho I)^-1 grad J by a matrix-free solve (implicit function theorem).

    Attributes:
        linsolve: the linear solver.
        damping: rho, absolute. 1 / (learning rate x steps) is the natural one: gradient descent stopped after T
            steps of rate eta behaves like a proximal term of that strength.
    """

    linsolve: LinearSolver = CG()
    damping: float = 0.0
    needs_curvature: bool = True

    @property
    def name(self) -> str:
        """Name with parameters."""
        return f"implicit({self.linsolve.name}, damping={self.damping:g})"

    def solve(self, gradient: Params, curvature: Curvature | None) -> LinearSolution:
        """Solve for u; see :class:`~u2a.bilevel.linsolve.CG`."""
        if curvature is None:
            raise ValueError("Implicit needs a curvature")
        return self.linsolve.solve(curvature.product, gradient, self.damping)


def make_adjoint(section: SolveSection, inner: UnlearnSection) -> Adjoint:
    """Turn the configured name into an adjoint value.

    Args:
        section: options of the outer problem.
        inner: options of the inner problem, for ``damping: auto``.

    Returns:
        The adjoint.
    """
    if section.adjoint == "identity":
        return Identity()
    natural = 1.0 / (inner.learning_rate * inner.max_steps)
    damping = natural if section.damping == "auto" else float(section.damping)
    return Implicit(CG(section.cg_steps, section.cg_tol), damping)


@dataclass(frozen=True)
class InnerHessian:
    """Exact Hessian of the inner problem f = sum_i w_i l_i + lambda L_R on the rows given.

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

    def product(self, vector: Params) -> Params:
        """Exact Hessian-vector product by double backward, one token batch at a time.

        Args:
            vector: v.

        Returns:
            H v.
        """
        total = zeros_like(vector)
        with second_order_attention(self.policy):
            for batch in token_batches(self.rows, self.policy.token_budget):
                answers = self.policy.log_probs([self.rows[index] for index in batch])
                losses = self.loss.per_sample(answers, self.reference_sums[batch].to(answers.sum))
                self._add(total, (self.weights[batch].to(losses) * losses).sum(), vector)
            for batch in token_batches(self.retain, self.policy.token_budget) if self._on_rows else ():
                rows = [self.retain[index] for index in batch]
                share = self.retain_weight / len(self.retain)
                self._add(total, share * self._retain_losses(rows).sum(), vector)
            if self.term == "proximal":
                self._add(total, self.retain_weight * self.policy.change_sq(), vector)
        return total

    @property
    def _on_rows(self) -> bool:
        return self.term in ("nll", "kl")

    def _retain_losses(self, rows: Sequence[Encoded]) -> Tensor:
        if self.term == "nll":
            return -self.policy.log_probs(rows).mean
        with torch.no_grad(), self.policy.reference() as start:  # before the graph: it may swap weights
            reference = answer_log_probs(start, self.policy.collate(rows))
        answers = self.policy.log_probs(rows)
        return kl_from_reference(answers.logits, reference.logits, answers.mask)

    def _add(self, total: Params, value: Tensor, vector: Params) -> None:
        """Add the Hessian-vector product of one scalar to ``total``."""
        parameters = self.policy.trainable()
        names = list(parameters)
        first = torch.autograd.grad(value, list(parameters.values()), create_graph=True, allow_unused=True)
        inner = [(g * vector[name].to(g)).sum() for name, g in zip(names, first, strict=True) if g is not None]
        second = torch.autograd.grad(torch.stack(inner).sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(names, second, strict=True):
            if gradient is not None:
                total[name] += gradient.to(total[name])


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


def unit(vector: Params) -> tuple[Params, float]:
    """Return a vector of length 1 and the original length.

    Args:
        vector: any vector.

    Returns:
        (vector / length, length); the zero vector stays as it is.
    """
    length = norm(vector)
    return (vector, 0.0) if length == 0.0 else (scaled(vector, 1.0 / length), length)
