"""A bi-level problem with a known answer: quadratic losses, so that theta*(omega) is the solution of a linear system.

The inner problem is f(theta, omega) = sum_k omega_k l_k(theta) + (lambda / 2) ||theta - theta_0||^2 with
l_k = (theta - a_k)' A_k (theta - a_k) / 2, and J(theta) = -||theta - t||^2 / 2, higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuadraticProblem:
    """The problem's data, all float64.

    Attributes:
        curvatures: (n, d, d) symmetric A_k; need not be positive definite.
        centres: (n, d) a_k.
        start: (d,) theta_0.
        target: (d,) t.
        strength: lambda; large enough that every H(omega) on the simplex is positive definite.
    """

    curvatures: Tensor
    centres: Tensor
    start: Tensor
    target: Tensor
    strength: float

    def hessian(self, weights: Tensor) -> Tensor:
        """H(omega) = sum_k omega_k A_k + lambda I.

        Args:
            weights: (n,) omega.

        Returns:
            (d, d).
        """
        identity = torch.eye(len(self.start), dtype=torch.float64)
        return torch.einsum("k,kij->ij", weights, self.curvatures) + self.strength * identity

    def solution(self, weights: Tensor) -> Tensor:
        """theta*(omega), by a dense solve.

        Args:
            weights: (n,) omega.

        Returns:
            (d,).
        """
        right = torch.einsum("k,kij,kj->i", weights, self.curvatures, self.centres) + self.strength * self.start
        return torch.linalg.solve(self.hessian(weights), right)

    def objective(self, theta: Tensor) -> Tensor:
        """J(theta).

        Args:
            theta: (d,).

        Returns:
            Scalar.
        """
        return -0.5 * (theta - self.target).square().sum()

    def value(self, weights: Tensor) -> float:
        """J(theta*(omega)): the inner problem solved anew.

        Args:
            weights: (n,) omega.

        Returns:
            The value.
        """
        return float(self.objective(self.solution(weights)))

    def loss_gradients(self, theta: Tensor) -> Tensor:
        """Gradients of all losses.

        Args:
            theta: (d,).

        Returns:
            (n, d).
        """
        return torch.einsum("kij,kj->ki", self.curvatures, theta - self.centres)

    def gains(self, weights: Tensor) -> Tensor:
        """dJ(theta*(omega)) / d omega_k, in closed form.

        Args:
            weights: (n,) omega.

        Returns:
            (n,); positive = more weight on k raises J.
        """
        theta = self.solution(weights)
        return self.loss_gradients(theta) @ torch.linalg.solve(self.hessian(weights), theta - self.target)


def random_quadratic(seed: int, n: int = 5, d: int = 4, concave: int = 1) -> QuadraticProblem:
    """Draw a problem in which some losses are concave, as gradient ascent's are.

    Args:
        seed: of the draw.
        n: losses.
        d: parameters.
        concave: how many A_k are negative definite.

    Returns:
        A problem whose H(omega) has eigenvalues of at least 0.5 wherever omega is on the simplex.
    """
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(n, d, d, generator=generator, dtype=torch.float64) / d**0.5
    curvatures = roots @ roots.transpose(1, 2)
    curvatures[:concave] *= -1.0
    lowest = float(torch.linalg.eigvalsh(curvatures).min())
    draw = torch.randn(n + 2, d, generator=generator, dtype=torch.float64)
    return QuadraticProblem(curvatures, draw[:n], draw[n], draw[n + 1], strength=0.5 + max(0.0, -lowest))
