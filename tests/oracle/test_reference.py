"""The oracles themselves, against closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import u2a
from u2a.reference.dense import (
    central_differences,
    dense_gradient,
    dense_hessian,
    flatten,
    implicit_gains,
    matrix_of,
    minimise_on_simplex,
    per_sample_gradients,
    simplex_grid,
    unflatten,
)

A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 3.0, 0.25], [0.0, 0.25, 1.0]], dtype=torch.float64)
THETA = {"x": torch.tensor([[1.0, -2.0]], dtype=torch.float64), "y": torch.tensor([0.5], dtype=torch.float64)}


def quadratic(theta: dict[str, torch.Tensor]) -> torch.Tensor:
    column = torch.cat([theta["x"].flatten(), theta["y"]])
    return 0.5 * column @ A @ column


def test_gradient_and_hessian_of_a_quadratic():
    assert torch.allclose(dense_gradient(quadratic, THETA), A @ flatten(THETA), atol=1e-14)
    assert torch.allclose(dense_hessian(quadratic, THETA), A, atol=1e-14)


def test_hessian_of_a_function_that_ignores_a_block_and_is_linear_in_another():
    hessian = dense_hessian(lambda theta: theta["x"][0, 0] ** 3 + theta["x"][0, 1], THETA)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 0] = 6.0
    assert torch.equal(hessian, expected)


def test_flatten_and_unflatten_are_inverse():
    column = torch.arange(3, dtype=torch.float64)
    assert torch.equal(flatten(unflatten(column, THETA)), column)
    assert unflatten(column, THETA)["x"].shape == (1, 2)


def test_matrix_of_an_operator():
    found = matrix_of(lambda v: unflatten(A @ flatten(v), v), THETA)
    assert torch.equal(found, A)


def test_per_sample_gradients_are_one_row_per_sample():
    rows = per_sample_gradients([quadratic, lambda theta: theta["y"].sum()], THETA)
    assert torch.allclose(rows, torch.stack([A @ flatten(THETA), torch.tensor([0.0, 0, 1]).double()]))


def test_implicit_gains_in_one_dimension():
    # l = 3 theta, H = 2, grad J = 5: theta* moves by -3/2 per unit of omega, J by -15/2
    found = implicit_gains(torch.tensor([[2.0]]), torch.tensor([5.0]), torch.tensor([[3.0]]))
    assert found.tolist() == [-7.5]


def test_central_differences_of_a_cubic():
    found = central_differences(lambda x: float((x**3).sum()), torch.tensor([1.0, -2.0]).double(), 1e-4)
    assert found.tolist() == pytest.approx([3.0, 12.0], rel=1e-7)


def test_simplex_grid_counts_every_point_once():
    grid = simplex_grid(3, 10)
    assert len(grid) == math.comb(12, 2) == len({tuple(row) for row in grid.tolist()})
    assert torch.allclose(grid.sum(1), torch.ones(len(grid)).double())
    assert (grid >= 0).all()


def test_minimise_on_simplex_finds_a_known_corner_and_an_interior_point():
    corner, value = minimise_on_simplex(lambda w: float(w @ torch.tensor([3.0, 1.0, 2.0]).double()), 3, 10)
    assert (corner.tolist(), value) == ([0.0, 1.0, 0.0], 1.0)
    inside, _ = minimise_on_simplex(lambda w: float((w - torch.tensor([0.2, 0.5, 0.3])).square().sum()), 3, 10)
    assert inside.tolist() == pytest.approx([0.2, 0.5, 0.3])


def test_no_stage_imports_the_oracles():
    source = Path(u2a.__file__).parent
    stages = [path for path in source.rglob("*.py") if "reference" not in path.parts]
    assert len(stages) > 20
    assert [path.name for path in stages if "u2a.reference" in path.read_text()] == []
