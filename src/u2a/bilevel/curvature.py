"""Curvatures of the inner problem, as interchangeable values.

A curvature is a rule (:class:`Hessian`, ...); applied to the terms of an inner problem at its solution it gives a
symmetric operator on parameter space, of which only products with vectors are ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from u2a.adapter import fused_lora
from u2a.bilevel.attention import second_order_attention
from u2a.bilevel.fisher import AdamMetric, DiagonalFisher
from u2a.bilevel.inner_terms import InnerTerms, Part, add_gradients
from u2a.bilevel.operators import Operator
from u2a.bilevel.proximal import proximal_product
from u2a.bilevel.vectors import plus, zeros_like
from u2a.config import UnlearnSection
from u2a.modeling import Params


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
        policy = self.terms.policy
        with second_order_attention(policy), fused_lora(policy.model):
            return self.terms.with_less_memory(lambda: self._product(vector))

    def _product(self, vector: Params) -> Params:
        leaves = list(self.terms.policy.trainable().values())
        total = zeros_like(vector)
        for value in self.terms.scalars():
            first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            slope = _inner(first, vector)
            add_gradients(total, torch.autograd.grad(slope, leaves, allow_unused=True))
        return total


@dataclass(frozen=True)
class GaussNewton:
    """The generalised Gauss-Newton matrix G = sum J' (d^2 phi / dz^2) J over the terms of f.

    z are the logits at answer positions, J = dz / dtheta, and phi is a term of f as a function of them, weight and
    sign included: the Hessian without the part that stems from the curvature of the network. So G has the sign of
    phi's curvature: positive semi-definite for the retain terms (there it is the Fisher information), *negative*
    semi-definite for gradient ascent (log-likelihood is concave in the logits), and for NPO negative but for one
    positive direction per row. A solver must therefore detect negative curvature; see
    :class:`~u2a.bilevel.linsolve.CG`. The proximal term ||B A||^2 enters with its own Gauss-Newton matrix, positive
    semi-definite, not with its indefinite Hessian.

    Source: Schraudolph 2002; Martens 2020, arXiv 1412.1193.
    """

    name: str = "gauss_newton"

    def at(self, terms: InnerTerms) -> Operator:
        """See :class:`Curvature`."""
        return GaussNewtonOperator(terms)


@dataclass(frozen=True)
class GaussNewtonOperator:
    """Exact Gauss-Newton products, one token batch at a time, with any kernel that can be differentiated twice.

    Attributes:
        terms: the inner problem.
    """

    terms: InnerTerms

    def product(self, vector: Params) -> Params:
        """Return G v.

        Args:
            vector: v.

        Returns:
            The product, accumulated in float32 or wider.
        """
        policy = self.terms.policy
        with second_order_attention(policy), fused_lora(policy.model):
            total = self.terms.with_less_memory(lambda: self._product(vector))
        if self.terms.term == "proximal":
            total = plus(total, proximal_product(self.terms.policy, vector), self.terms.retain_weight)
        return total

    def _product(self, vector: Params) -> Params:
        leaves = list(self.terms.policy.trainable().values())
        total = zeros_like(vector)
        for part in self.terms.parts():
            add_gradients(total, _through_logits(part, leaves, vector))
        return total


def _through_logits(part: Part, leaves: Sequence[Tensor], vector: Params) -> Sequence[Tensor | None]:
    """J' (d^2 phi / dz^2) J v. J'p is linear in p, so J v is the gradient of (J'p)'v with respect to p."""
    probe = torch.zeros_like(part.logits, requires_grad=True)
    pulled = torch.autograd.grad(part.logits, leaves, probe, create_graph=True, allow_unused=True)
    (pushed,) = torch.autograd.grad(_inner(pulled, vector), probe)
    (slope,) = torch.autograd.grad(part.value, part.logits, create_graph=True)
    (bent,) = torch.autograd.grad(slope, part.logits, pushed)
    return torch.autograd.grad(part.logits, leaves, bent, allow_unused=True)


def _inner(gradients: Sequence[Tensor | None], vector: Params) -> Tensor:
    """Inner product of gradients with a vector, differentiable in the gradients."""
    pairs = zip(gradients, vector.values(), strict=True)
    return torch.stack(
        [(gradient * value.to(gradient)).sum() for gradient, value in pairs if gradient is not None]
    ).sum()


def make_curvature(name: str, unlearn: UnlearnSection) -> Curvature:
    """Turn a configured name into a curvature value.

    Args:
        name: ``hessian``, ``gauss_newton``, ``fisher`` or ``adam``.
        unlearn: options of the inner run: Adam's epsilon, and what a step's gradient is taken over.

    Returns:
        The curvature.
    """
    curvatures: dict[str, Curvature] = {
        "hessian": Hessian(),
        "gauss_newton": GaussNewton(),
        "fisher": DiagonalFisher(),
        "adam": AdamMetric(
            batch_size=unlearn.batch_size * unlearn.gradient_accumulation_steps,
            retain_batch_size=unlearn.retain_batch_size * unlearn.gradient_accumulation_steps,
            eps=unlearn.adam_epsilon,
            max_norm=unlearn.max_grad_norm or math.inf,
        ),
    }
    return curvatures[name]
