"""Symmetric operators on parameter space, known by their products, and the size of their eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from u2a.bilevel.vectors import dot, norm, plus, scaled, unit, zeros_like
from u2a.errors import NonFiniteError, NotConverged
from u2a.modeling import Params


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
            NonFiniteError: an entry of D or of b is NaN or infinite.
        """
        out = {}
        for name, entry in self.entries.items():
            bottom, top = entry + damping, right[name].to(entry)
            if not bool(bottom.isfinite().all() & top.isfinite().all()):
                raise NonFiniteError(f"diagonal curvature at {name}", "solve")
            if bool(((bottom == 0) & (top != 0)).any()):
                raise NotConverged("diagonal curvature: 0 where the gradient is not (set solve.damping above 0)")
            out[name] = torch.where(bottom > 0, top / bottom, 0.0)
        return out


def random_unit(like: Params, seed: int) -> Params:
    """Draw a direction, all being equally likely.

    Args:
        like: a vector of the space.
        seed: of the draw; it is made on the CPU, so that it is the same on any device.

    Returns:
        A vector of length 1.
    """
    generator = torch.Generator().manual_seed(seed)
    zeros = zeros_like(like)
    return unit({name: torch.randn(zero.shape, generator=generator).to(zero) for name, zero in zeros.items()})[0]


def mean_eigenvalue(operator: Operator, like: Params, seed: int, probes: int = 2) -> float:
    """Mean magnitude (1 / d) sum_k |lambda_k| of the eigenvalues, the unit of damping.

    It is |trace| / d for an operator without eigenvalues of both signs, and, unlike that, not near 0 for one whose
    eigenvalues cancel (gradient ascent with a retain term). The root mean square ||A||_F / sqrt(d) would not do
    either: with few large eigenvalues among millions it is hundreds of times the mean.

    Two Lanczos steps from a random direction z give a 2 x 2 matrix T, and e_1' |T| e_1 stands for z' |A| z. For an
    operator without eigenvalues of both signs this is |z' A z|, so the estimate is Hutchinson's and unbiased; else
    it lies between |z' A z| and ||A z||. It is 0 for the zero operator only.

    Args:
        operator: the operator.
        like: a vector of the space.
        seed: of the random directions.
        probes: directions, >= 1, of two products each; a diagonal operator needs none.

    Returns:
        The estimate, >= 0.

    Source: Hutchinson 1990; Ubaru, Chen and Saad 2017 (stochastic Lanczos quadrature), with two nodes.
    """
    if isinstance(operator, Diagonal):
        size = sum(value.numel() for value in like.values())
        return math.fsum(float(entry.abs().double().sum()) for entry in operator.entries.values()) / size
    return math.fsum(_magnitude(operator, random_unit(like, seed + k)) for k in range(probes)) / probes


def _magnitude(operator: Operator, z: Params) -> float:
    """e_1' |T| e_1 of two Lanczos steps from a vector of length 1: about z' |A| z."""
    image = operator.product(z)
    first = dot(z, image)
    rest = plus(image, z, -first)
    across = norm(rest)
    if across <= torch.finfo(torch.float32).eps * abs(first):  # z is an eigenvector
        return abs(first)
    second_direction = scaled(rest, 1.0 / across)
    second = dot(second_direction, operator.product(second_direction))
    values, vectors = torch.linalg.eigh(torch.tensor([[first, across], [across, second]], dtype=torch.float64))
    return float((values.abs() * vectors[0].square()).sum())
