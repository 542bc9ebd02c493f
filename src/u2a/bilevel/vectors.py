"""Vectors in parameter space: dictionaries of tensors of equal structure, with reductions in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from u2a.modeling import Params


def zeros_like(parameters: Params) -> Params:
    """Return the zero vector, in float32 or wider.

    Args:
        parameters: gives structure, shapes and devices.

    Returns:
        Zeros.
    """
    return {
        name: torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32), requires_grad=False)
        for name, value in parameters.items()
    }


def dot(left: Params, right: Params) -> float:
    """Inner product over all parameters.

    Args:
        left: a vector.
        right: a vector of equal structure.

    Returns:
        The product, accumulated in float64.

    >>> dot({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0])})
    11.0
    """
    parts = [float((_float64(left[name]) * _float64(right[name])).sum()) for name in left]
    return math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)  # fsum refuses infinities of both signs


def _float64(value: Tensor) -> Tensor:
    """The values in float64, on the CPU where the device has no such type (Apple's mps)."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def norm(vector: Params) -> float:
    """Euclidean norm.

    Args:
        vector: a vector.

    Returns:
        Its length; NaN when an entry is.
    """
    return math.sqrt(dot(vector, vector))


def scaled(vector: Params, factor: float) -> Params:
    """Return ``factor * vector``.

    Args:
        vector: a vector; not changed.
        factor: a number.

    Returns:
        A new vector.
    """
    return {name: value * factor for name, value in vector.items()}


def plus(vector: Params, other: Params, factor: float = 1.0) -> Params:
    """Return ``vector + factor * other``.

    Args:
        vector: a vector; not changed.
        other: a vector of equal structure.
        factor: a number.

    Returns:
        A new vector.
    """
    return {name: torch.add(value, other[name], alpha=factor) for name, value in vector.items()}


def mean(vectors: Sequence[Params], weights: Sequence[float]) -> Params:
    """Return the weighted mean of vectors.

    Args:
        vectors: at least one.
        weights: one non-negative number each, not all 0.

    Returns:
        sum_k w_k v_k / sum_k w_k.
    """
    total = math.fsum(weights)
    out = scaled(vectors[0], weights[0] / total)
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        out = plus(out, vector, weight / total)
    return out


def is_finite(vector: Params) -> bool:
    """Whether every entry is finite.

    Args:
        vector: a vector.

    Returns:
        False when a NaN or an infinity is found.
    """
    return all(bool(torch.isfinite(value).all()) for value in vector.values())


def unit(vector: Params) -> tuple[Params, float]:
    """Return a vector of length 1 and the original length.

    Args:
        vector: any vector.

    Returns:
        (vector / length, length); the zero vector stays as it is.
    """
    length = norm(vector)
    return (vector, 0.0) if length == 0.0 else (scaled(vector, 1.0 / length), length)
