"""Linear solvers against dense solves, in float64 and on vectors of several blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from u2a.bilevel.linsolve import CG, Neumann, neumann_step
from u2a.errors import NonFiniteError, NotConverged
from u2a.modeling import Params
from u2a.reference.dense import flatten, unflatten

SHAPES = {"w": (2, 3), "b": (4,)}
SIZE = 10


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def symmetric(seed: int, eigenvalues: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(eigenvalues.double()) @ basis.T


def operator(matrix: Tensor) -> Callable[[Params], Params]:
    return lambda vector: unflatten(matrix @ flatten(vector), vector)


def true_residual(matrix: Tensor, damping: float, value: Params, right: Params) -> float:
    rest = matrix @ flatten(value) + damping * flatten(value) - flatten(right)
    return float(rest.norm() / flatten(right).norm())


POSITIVE = torch.linspace(0.5, 8.0, SIZE)


@given(seed=st.integers(0, 10_000), damping=st.sampled_from([0.0, 0.1, 3.0]))
def test_cg_equals_dense_solve_and_reports_the_true_residual(seed: int, damping: float):
    matrix, right = symmetric(seed, POSITIVE), draw(seed)
    found = CG(max_steps=40, tol=1e-11).solve(operator(matrix), right, damping)
    exact = torch.linalg.solve(matrix + damping * torch.eye(SIZE).double(), flatten(right))
    assert torch.allclose(flatten(found.value), exact, rtol=1e-9, atol=1e-10)
    assert found.status.status == "converged"
    assert found.status.damping == damping
    assert found.status.residual == pytest.approx(true_residual(matrix, damping, found.value, right), rel=1e-6)
    assert {name: value.shape for name, value in found.value.items()} == SHAPES


def test_cg_ends_after_as_many_steps_as_there_are_different_eigenvalues():
    matrix = symmetric(1, torch.tensor([1.0, 4.0, 9.0]).repeat(4)[:SIZE])
    found = CG(max_steps=40, tol=1e-9).solve(operator(matrix), draw(1), 0.0)
    assert found.status.steps == 3


def test_cg_stopped_early_says_so_with_its_true_residual():
    matrix, right = symmetric(2, torch.logspace(-3, 3, SIZE)), draw(2)
    found = CG(max_steps=3, tol=1e-8).solve(operator(matrix), right, 0.0)
    assert (found.status.status, found.status.steps) == ("max_steps", 3)
    assert found.status.residual == pytest.approx(true_residual(matrix, 0.0, found.value, right), rel=1e-9)
    assert found.status.residual > 1e-8
    with pytest.raises(NotConverged, match="asked for 1.00e-08"):
        CG(max_steps=3, tol=1e-8, throw=True).solve(operator(matrix), right, 0.0)


@given(seed=st.integers(0, 10_000), damping=st.sampled_from([0.0, 0.2, 1.0]))
def test_negative_curvature_raises_the_damping_and_solves_the_raised_system(seed: int, damping: float):
    eigenvalues = torch.cat([torch.tensor([-5.0, -2.0]), torch.linspace(0.5, 4.0, SIZE - 2)])
    matrix, right = symmetric(seed, eigenvalues), draw(seed)
    found = CG(max_steps=60, tol=1e-10).solve(operator(matrix), right, damping)
    assert found.status.status == "negative_curvature"
    assert found.status.damping > 5.0  # else the system is not positive definite
    exact = torch.linalg.solve(matrix + found.status.damping * torch.eye(SIZE).double(), flatten(right))
    assert torch.allclose(flatten(found.value), exact, rtol=1e-7, atol=1e-9)
    assert found.status.residual <= 1e-10


def test_damping_is_raised_to_twice_the_negative_curvature_of_the_operator_itself():
    found = CG().solve(operator(-5.0 * torch.eye(SIZE).double()), draw(0), 1.0)
    assert found.status.damping == pytest.approx(10.0)
    assert torch.allclose(flatten(found.value), flatten(draw(0)) / 5.0)


def test_indefinite_operator_made_positive_by_its_damping_is_solved_as_asked():
    matrix, right = symmetric(3, torch.linspace(-2.0, 4.0, SIZE)), draw(3)
    found = CG(max_steps=60, tol=1e-10).solve(operator(matrix), right, 2.5)
    assert (found.status.status, found.status.damping) == ("converged", 2.5)


@pytest.mark.parametrize("solver", [CG(), Neumann(0.1)])
def test_zero_right_side_has_the_zero_solution_without_a_product(solver: CG | Neumann):
    right = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}

    def never(vector: Params) -> Params:
        raise AssertionError("a product was taken")

    found = solver.solve(never, right, 0.3)
    assert float(flatten(found.value).abs().max()) == 0.0
    assert (found.status.status, found.status.steps, found.status.residual) == ("converged", 0, 0.0)


def test_singular_operator_without_damping_is_damped_and_says_so():
    eigenvalues = torch.cat([torch.zeros(2), torch.linspace(1.0, 4.0, SIZE - 2)])
    matrix, right = symmetric(4, eigenvalues), draw(4)
    found = CG(max_steps=60, tol=1e-6).solve(operator(matrix), right, 0.0)
    assert found.status.status == "negative_curvature"
    assert 1e-7 < found.status.damping < 1e-3
    assert true_residual(matrix, found.status.damping, found.value, right) <= 1e-6
    again = CG(max_steps=60, tol=1e-6).solve(operator(matrix), right, 0.0)
    assert torch.equal(flatten(again.value), flatten(found.value))


def test_singular_operator_with_a_right_side_in_its_range_needs_no_damping():
    eigenvalues = torch.cat([torch.zeros(2), torch.linspace(1.0, 4.0, SIZE - 2)])
    matrix = symmetric(5, eigenvalues)
    inside = matrix @ flatten(draw(5))
    found = CG(max_steps=60, tol=1e-9).solve(operator(matrix), unflatten(inside, draw(5)), 0.0)
    assert (found.status.status, found.status.damping) == ("converged", 0.0)
    assert torch.allclose(flatten(found.value), torch.linalg.pinv(matrix) @ inside, atol=1e-7)


def test_zero_operator_without_damping_is_refused():
    zero = operator(torch.zeros(SIZE, SIZE).double())
    with pytest.raises(NotConverged, match=r"0 along the gradient .*solve\.damping"):
        CG().solve(zero, draw(6), 0.0)
    found = CG().solve(zero, draw(6), 0.5)
    assert torch.allclose(flatten(found.value), 2.0 * flatten(draw(6)))
    assert (found.status.status, found.status.damping, found.status.steps) == ("converged", 0.5, 1)


def test_damping_that_cancels_the_operator_is_raised():
    found = CG().solve(operator(-torch.eye(SIZE).double()), draw(6), 1.0)
    assert (found.status.status, found.status.damping) == ("negative_curvature", 4.0)
    assert torch.allclose(flatten(found.value), flatten(draw(6)) / 3.0)


def test_right_side_along_which_curvatures_cancel_exactly_is_damped_by_the_size_of_the_operator():
    swap = torch.eye(SIZE).double().flip(0)  # eigenvalues 1 and -1; e_1' A e_1 = 0
    right = unflatten(torch.eye(SIZE).double()[0], draw(0))
    found = CG(max_steps=20, tol=1e-10).solve(operator(swap), right, 0.0)
    assert found.status.status == "negative_curvature"
    assert 1.0 < found.status.damping < 8.0
    assert true_residual(swap, found.status.damping, found.value, right) < 1e-10


@given(seed=st.integers(0, 1000))
def test_negative_curvature_orthogonal_to_the_right_side_does_no_harm(seed: int):
    eigenvalues = torch.cat([torch.tensor([-3.0]), torch.linspace(1.0, 4.0, SIZE - 1)])
    matrix = symmetric(seed, eigenvalues)
    bad = torch.linalg.eigh(matrix).eigenvectors[:, 0]
    column = flatten(draw(seed))
    column -= (bad @ column) * bad
    found = CG(max_steps=40, tol=1e-9).solve(operator(matrix), unflatten(column, draw(seed)), 0.0)
    assert (found.status.status, found.status.damping) == ("converged", 0.0)
    assert torch.allclose(flatten(found.value), torch.linalg.solve(matrix, column), atol=1e-7)


@given(seed=st.integers(0, 1000), share=st.sampled_from([1e-6, 1e-3, 1.0]))
def test_negative_curvature_hidden_in_a_small_part_of_the_right_side_is_found(seed: int, share: float):
    eigenvalues = torch.cat([torch.tensor([-3.0]), torch.linspace(1.0, 4.0, SIZE - 1)])
    matrix = symmetric(seed, eigenvalues)
    bad = torch.linalg.eigh(matrix).eigenvectors[:, 0]
    column = flatten(draw(seed))
    column += (share - bad @ column) * bad
    found = CG(max_steps=40, tol=1e-10).solve(operator(matrix), unflatten(column, draw(seed)), 0.0)
    assert found.status.status == "negative_curvature"
    assert found.status.damping > 3.0


def test_singular_operator_and_a_right_side_outside_of_its_range_in_float32():
    eigenvalues = torch.cat([torch.zeros(3), torch.linspace(1.0, 4.0, SIZE - 3)])
    matrix, right = symmetric(14, eigenvalues), draw(14, torch.float32)
    found = CG(max_steps=60, tol=1e-3).solve(operator(matrix), right, 0.0)
    assert found.status.status == "negative_curvature"
    assert 1e-7 < found.status.damping < 1e-2
    assert found.status.residual == pytest.approx(
        true_residual(matrix, found.status.damping, found.value, right), abs=0.1
    )


@given(exponent=st.integers(-60, 60), seed=st.integers(0, 100))
def test_cg_does_not_depend_on_the_unit_of_the_operator(exponent: int, seed: int):
    unit, matrix, right = 2.0**exponent, symmetric(seed, torch.linspace(-1.0, 6.0, SIZE)), draw(seed)
    plain = CG(60, 1e-9).solve(operator(matrix), right, 0.01)
    scaled = CG(60, 1e-9).solve(operator(unit * matrix), right, unit * 0.01)
    assert scaled.status.status == plain.status.status
    assert scaled.status.damping == pytest.approx(unit * plain.status.damping, rel=1e-6)
    assert torch.allclose(unit * flatten(scaled.value), flatten(plain.value), rtol=1e-6, atol=1e-8)


def test_cg_in_float32_reaches_its_tolerance():
    matrix, right = symmetric(8, POSITIVE), draw(8, torch.float32)
    found = CG(max_steps=40, tol=1e-4).solve(operator(matrix), right, 0.1)
    assert found.value["w"].dtype == torch.float32
    assert true_residual(matrix, 0.1, found.value, right) <= 1.01e-4


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_product_stops_the_solve(poison: float):
    calls = []

    def bad(vector: Params) -> Params:
        calls.append(1)
        out = {name: 2.0 * value for name, value in vector.items()}
        out["w"] = out["w"] + torch.arange(6).reshape(2, 3)  # not a multiple of one, so CG goes on
        if len(calls) == 2:
            out["b"][0] = poison
        return out

    with pytest.raises(NonFiniteError, match="curvature product") as caught:
        CG().solve(bad, draw(9), 1.0)
    assert caught.value.step == 1


def test_neumann_equals_dense_solve_and_reports_the_true_residual():
    matrix, right = symmetric(10, POSITIVE), draw(10)
    found = Neumann(step=0.2, max_steps=2000, tol=1e-10).solve(operator(matrix), right, 0.3)
    exact = torch.linalg.solve(matrix + 0.3 * torch.eye(SIZE).double(), flatten(right))
    assert torch.allclose(flatten(found.value), exact, rtol=1e-8, atol=1e-9)
    assert found.status.status == "converged"
    assert found.status.residual == pytest.approx(true_residual(matrix, 0.3, found.value, right), rel=1e-4)


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neumann_is_the_partial_sum_of_the_series(terms: int):
    matrix, right, step = symmetric(11, POSITIVE), draw(11), 0.1
    found = Neumann(step, max_steps=terms, tol=1e-14).solve(operator(matrix), right, 0.5)
    shrink = torch.eye(SIZE).double() - step * (matrix + 0.5 * torch.eye(SIZE).double())
    powers = [torch.linalg.matrix_power(shrink, k) for k in range(terms + 1)]
    assert torch.allclose(flatten(found.value), step * sum(powers) @ flatten(right), atol=1e-12)
    assert found.status.status == "max_steps"
    assert found.status.residual == pytest.approx(true_residual(matrix, 0.5, found.value, right), rel=1e-9)


@settings(max_examples=12)
@given(exponent=st.integers(-40, 40), seed=st.integers(0, 200), damping=st.sampled_from([0.0, 0.4]))
def test_neumann_finds_a_step_that_converges(exponent: int, seed: int, damping: float):
    unit = 2.0**exponent
    matrix, right = unit * symmetric(seed, POSITIVE), draw(seed)
    step = neumann_step(operator(matrix), right, unit * damping, seed)
    assert 1.0 / (8.0 + damping) <= step * unit * (1 + 1e-9) < 1.5 / (8.0 + damping)
    found = Neumann(max_steps=2000, tol=1e-8).solve(operator(matrix), right, unit * damping)
    exact = torch.linalg.solve(matrix + unit * damping * torch.eye(SIZE).double(), flatten(right))
    assert found.status.status == "converged"
    assert torch.allclose(flatten(found.value), exact, rtol=1e-5, atol=1e-5 * float(exact.norm()))


def test_neumann_counts_the_products_of_its_step():
    matrix, calls = symmetric(15, POSITIVE), []

    def counted(vector: Params) -> Params:
        calls.append(1)
        return operator(matrix)(vector)

    for solver in (Neumann(), Neumann(max_steps=3, tol=1e-12), Neumann(0.1)):
        calls.clear()
        assert solver.solve(counted, draw(15), 0.1).status.steps == len(calls)
    assert [Neumann().name, Neumann(0.1).name] == [
        "neumann(step=auto, max_steps=50, tol=0.01)",
        "neumann(step=0.1, max_steps=50, tol=0.01)",
    ]


@pytest.mark.parametrize(
    "matrix", [-torch.eye(SIZE), torch.zeros(SIZE, SIZE), torch.diag(torch.linspace(-9.0, 4.0, SIZE))]
)
def test_neumann_refuses_curvature_for_which_no_step_converges(matrix: Tensor):
    with pytest.raises(NotConverged, match=r"solve\.damping"):
        Neumann().solve(operator(matrix.double()), draw(16), 0.0)


def test_neumann_refuses_to_diverge():
    with pytest.raises(NotConverged, match="shorten the step"):
        Neumann(step=1.0, max_steps=100).solve(operator(symmetric(12, POSITIVE)), draw(12), 0.0)


def test_neumann_refuses_to_grow_even_where_few_terms_keep_it_small():
    with pytest.raises(NotConverged, match="residual grew"):
        Neumann(step=0.1, max_steps=4).solve(operator(-torch.eye(SIZE).double()), draw(17), 0.0)


def test_solvers_leave_the_right_side_alone():
    matrix, right = symmetric(13, POSITIVE), draw(13)
    before = flatten(right)
    CG().solve(operator(matrix), right, 0.1)
    Neumann(0.1).solve(operator(matrix), right, 0.1)
    assert torch.equal(flatten(right), before)
