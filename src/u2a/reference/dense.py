"""Dense linear algebra on parameter space: every matrix is written out, every sample has its own backward pass.

Only for a few hundred parameters: a dense Hessian costs one backward pass per column.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Params = dict[str, Tensor]


def flatten(vector: Params) -> Tensor:
    """Write a vector in parameter space as one column.

    Args:
        vector: tensors by name.

    Returns:
        (d,) float64, blocks in the order of the dictionary.
    """
    return torch.cat([value.detach().double().flatten().cpu() for value in vector.values()])


def unflatten(column: Tensor, like: Params) -> Params:
    """Undo :func:`flatten`.

    Args:
        column: (d,) numbers.
        like: gives names, shapes, dtypes and devices.

    Returns:
        Tensors by name.
    """
    parts = column.split([value.numel() for value in like.values()])
    return {name: part.reshape(value.shape).to(value) for (name, value), part in zip(like.items(), parts, strict=True)}


def matrix_of(operator: Callable[[Params], Params], like: Params) -> Tensor:
    """Write a linear operator out by applying it to each unit vector.

    Args:
        operator: v -> A v.
        like: a vector of the space.

    Returns:
        (d, d) float64, column j is A e_j.
    """
    unit_vectors = torch.eye(flatten(like).numel(), dtype=torch.float64)
    return torch.stack([flatten(operator(unflatten(e, like))) for e in unit_vectors], dim=1)


def dense_gradient(function: Callable[[Params], Tensor], theta: Params) -> Tensor:
    """Gradient of a scalar function by one backward pass.

    Args:
        function: theta -> scalar.
        theta: where.

    Returns:
        (d,) float64.
    """
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in theta.items()}
    function(leaves).backward()
    return flatten({name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in leaves.items()})


def dense_hessian(function: Callable[[Params], Tensor], theta: Params) -> Tensor:
    """Hessian of a scalar function: one backward pass through the gradient per column.

    Args:
        function: theta -> scalar, twice differentiable.
        theta: where.

    Returns:
        (d, d) float64.
    """
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in theta.items()}
    inputs = list(leaves.values())
    first = torch.autograd.grad(function(leaves), inputs, create_graph=True, materialize_grads=True)
    columns = []
    for entry in torch.cat([gradient.flatten() for gradient in first]):
        if not entry.requires_grad:
            columns.append(torch.zeros(sum(value.numel() for value in inputs), dtype=torch.float64))
            continue
        second = torch.autograd.grad(entry, inputs, retain_graph=True, materialize_grads=True)
        columns.append(flatten(dict(zip(leaves, second, strict=True))))
    return torch.stack(columns, dim=1)


def per_sample_gradients(losses: Sequence[Callable[[Params], Tensor]], theta: Params) -> Tensor:
    """One backward pass per sample: the released code's way, exact and slow.

    Args:
        losses: theta -> l_k(theta), one function per sample.
        theta: where.

    Returns:
        (n, d) float64, row k is grad l_k.
    """
    return torch.stack([dense_gradient(loss, theta) for loss in losses])


def implicit_gains(hessian: Tensor, objective_gradient: Tensor, loss_gradients: Tensor, damping: float = 0.0) -> Tensor:
    """Gains by the implicit function theorem with a dense solve: -grad J' (H + rho I)^-1 grad l_k.

    Args:
        hessian: (d, d) H of the inner problem at its solution.
        objective_gradient: (d,) grad J, J higher is better.
        loss_gradients: (n, d) grad l_k.
        damping: rho >= 0.

    Returns:
        (n,) dJ(theta*(omega)) / d omega_k; positive = unlearning more of k raises J.
    """
    damped = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype)
    return -loss_gradients @ torch.linalg.solve(damped, objective_gradient)


def central_differences(function: Callable[[Tensor], float], point: Tensor, step: float) -> Tensor:
    """Gradient of a function of a vector by central differences.

    Args:
        function: (n,) -> number.
        point: (n,) where.
        step: half the distance of the two evaluations.

    Returns:
        (n,) float64; the error is O(step^2) + round-off / step.
    """
    slopes = []
    for shift in step * torch.eye(len(point), dtype=point.dtype):
        slopes.append((function(point + shift) - function(point - shift)) / (2.0 * step))
    return torch.tensor(slopes, dtype=torch.float64)


def simplex_grid(n: int, resolution: int) -> Tensor:
    """All points of the simplex whose coordinates are multiples of 1 / resolution.

    Args:
        n: coordinates, >= 1.
        resolution: >= 1.

    Returns:
        (points, n) float64.

    >>> simplex_grid(2, 2).tolist()
    [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    """
    rows = []
    for bars in itertools.combinations(range(resolution + n - 1), n - 1):
        edges = (-1, *bars, resolution + n - 1)
        rows.append([(right - left - 1) / resolution for left, right in itertools.pairwise(edges)])
    return torch.tensor(rows, dtype=torch.float64)


def minimise_on_simplex(function: Callable[[Tensor], float], n: int, resolution: int = 20) -> tuple[Tensor, float]:
    """Minimise by trying every grid point.

    Args:
        function: (n,) -> number.
        n: coordinates; the grid has (resolution + n - 1 choose n - 1) points.
        resolution: points per edge.

    Returns:
        (best point, its value).
    """
    best, lowest = torch.full((n,), 1.0 / n, dtype=torch.float64), math.inf
    for point in simplex_grid(n, resolution):
        value = function(point)
        if value < lowest:
            best, lowest = point, value
    return best, lowest
