"""Weights on the simplex: mirror descent, penalty, certificate; against closed forms, scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from u2a.bilevel.weight import drop_small, frank_wolfe_gap, mirror_step, penalty, penalty_gradient, refine
from u2a.errors import NonFiniteError
from u2a.reference.dense import central_differences, minimise_on_simplex, simplex_grid

SIZES = st.integers(1, 7)


@st.composite
def points(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(omega on the simplex, possibly with zeros; a gradient)."""
    n = draw(SIZES)
    raw = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 10)), min_size=n, max_size=n))
    if not any(raw):
        raw[0] = 1.0
    gradient = draw(st.lists(st.floats(-50, 50), min_size=n, max_size=n))
    weights = torch.tensor(raw, dtype=torch.float64)
    return weights / weights.sum(), torch.tensor(gradient, dtype=torch.float64)


def uniform(n: int) -> Tensor:
    return torch.full((n,), 1.0 / n, dtype=torch.float64)


def on_simplex(weights: Tensor) -> bool:
    return bool((weights >= 0).all()) and abs(float(weights.sum()) - 1.0) < 1e-12


@given(point=points(), rate=st.floats(0, 5))
def test_mirror_step_is_its_closed_form_and_stays_on_the_simplex(point: tuple[Tensor, Tensor], rate: float):
    weights, gradient = point
    raw = weights.numpy() * np.exp(-rate * (gradient.numpy() - gradient.numpy()[weights.numpy() > 0].min()))
    found = mirror_step(weights, gradient, rate)
    assert on_simplex(found)
    assert np.allclose(found.numpy(), raw / raw.sum(), rtol=1e-9, atol=1e-15)
    assert bool((found[weights == 0] == 0).all())


@given(point=points(), shift=st.floats(-100, 100))
def test_mirror_step_ignores_a_constant_in_the_gradient(point: tuple[Tensor, Tensor], shift: float):
    weights, gradient = point
    assert torch.allclose(mirror_step(weights, gradient, 0.3), mirror_step(weights, gradient + shift, 0.3), atol=1e-10)


@given(point=points())
def test_mirror_step_of_rate_zero_or_equal_gradients_changes_nothing(point: tuple[Tensor, Tensor]):
    weights, gradient = point
    assert torch.allclose(mirror_step(weights, gradient, 0.0), weights, atol=1e-14)
    assert torch.allclose(mirror_step(weights, torch.full_like(gradient, 3.0), 2.0), weights, atol=1e-14)


@given(gains=st.lists(st.floats(-5, 5), min_size=2, max_size=6, unique=True))
def test_the_candidate_with_the_largest_gain_gains_weight_and_the_worst_loses_it(gains: list[float]):
    weights, gain = uniform(len(gains)), torch.tensor(gains, dtype=torch.float64)
    found = mirror_step(weights, -gain, 0.5)
    best, worst = int(gain.argmax()), int(gain.argmin())
    if float(gain[best] - gain[worst]) > 1e-6:
        assert float(found[best]) > 1.0 / len(gains) > float(found[worst])
    assert torch.equal(found.argsort(stable=True), gain.argsort(stable=True)) or len(set(found.tolist())) < len(gains)


def test_mirror_step_refuses_a_gradient_that_is_not_finite_on_the_support_only():
    with pytest.raises(NonFiniteError, match="gradient of the weights"):
        mirror_step(uniform(2), torch.tensor([float("nan"), 0.0]).double(), 0.1)
    away = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert mirror_step(away, torch.tensor([float("nan"), 0.0]).double(), 0.1).tolist() == [0.0, 1.0]


def test_mirror_step_survives_gradients_that_overflow_exp():
    found = mirror_step(uniform(3), torch.tensor([-1e6, 0.0, 1e6], dtype=torch.float64), 1.0)
    assert found.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("p", [0.5, 1.0, 0.3])
def test_penalty_gradient_equals_central_differences(p: float):
    weights = torch.tensor([0.05, 0.15, 0.3, 0.5], dtype=torch.float64)
    slope = central_differences(lambda w: penalty(w, 1.7, p), weights, 1e-6)
    assert torch.allclose(penalty_gradient(weights, 1.7, p), slope, rtol=1e-7)


def test_half_power_penalty_is_the_papers():
    weights = torch.tensor([0.04, 0.0, 0.96], dtype=torch.float64)
    assert penalty(weights, 3.0) == pytest.approx(3.0 * (0.2 + 0.96**0.5))
    expected = [1.5 / 0.2, 0.0, 1.5 / 0.96**0.5]
    assert penalty_gradient(weights, 3.0).tolist() == pytest.approx(expected)


@given(point=points(), p=st.floats(0.1, 1.0))
def test_penalty_is_least_at_a_corner(point: tuple[Tensor, Tensor], p: float):
    weights, _ = point
    assert penalty(weights, 2.0, p) >= 2.0 - 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_frank_wolfe_gap_bounds_the_true_gap_of_a_convex_quadratic(seed: int):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    matrix, linear = root @ root.T, torch.randn(4, generator=generator, dtype=torch.float64)

    def value(w: Tensor) -> float:
        return float(0.5 * w @ matrix @ w + linear @ w)

    _, lowest = minimise_on_simplex(value, 4, 24)
    for weights in simplex_grid(4, 6):
        gap = frank_wolfe_gap(weights, matrix @ weights + linear)
        assert gap >= value(weights) - lowest - 1e-12


def test_frank_wolfe_gap_is_zero_at_the_minimum_and_only_there():
    target = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert frank_wolfe_gap(target, 2 * (target - target)) == 0.0
    other = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    assert frank_wolfe_gap(other, 2 * (other - target)) > 0.01


@given(point=points())
def test_frank_wolfe_gap_is_the_largest_slope_towards_a_corner_and_never_negative(point: tuple[Tensor, Tensor]):
    weights, gradient = point
    towards = [float(gradient @ (weights - corner)) for corner in torch.eye(len(weights), dtype=torch.float64)]
    gap = frank_wolfe_gap(weights, gradient)
    assert gap == pytest.approx(max(towards), abs=1e-9)
    assert gap >= -1e-9


def entropic(start: Tensor, gradient: Tensor, rate: float) -> np.ndarray:
    """Minimise <g, w> + KL(w || start) / rate on the simplex with a generic solver."""
    slope, base = gradient.numpy(), start.numpy()

    def value(w: np.ndarray) -> float:
        w = np.maximum(w, 1e-300)
        return float(slope @ w + (w * np.log(w / base)).sum() / rate)

    bounds, total = [(1e-12, 1.0)] * len(base), {"type": "eq", "fun": lambda w: w.sum() - 1.0}
    found = minimize(value, base, method="SLSQP", bounds=bounds, constraints=total, options={"ftol": 1e-14})
    assert found.success
    return found.x


@pytest.mark.parametrize("seed", range(5))
def test_refine_minimises_the_entropic_problem(seed: int):
    """Ten steps of rate eta minimise the linear model with an entropy term of strength 1 / (10 eta)."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    start, gradient = raw / raw.sum(), torch.randn(5, generator=generator, dtype=torch.float64)
    assert np.allclose(refine(start, gradient, 0.1, 10).numpy(), entropic(start, gradient, 1.0), atol=2e-6)
    assert np.allclose(mirror_step(start, gradient, 0.4).numpy(), entropic(start, gradient, 0.4), atol=2e-6)


def test_many_steps_reach_the_minimum_of_a_convex_problem_on_the_simplex():
    target = torch.tensor([0.55, 0.35, 0.1, 0.0], dtype=torch.float64)
    weights = uniform(4)
    for _ in range(3000):
        weights = mirror_step(weights, 2 * (weights - target), 0.5)
    best, _ = minimise_on_simplex(lambda w: float((w - target).square().sum()), 4, 20)
    assert torch.allclose(weights, best, atol=2e-3)


def test_refine_descends_the_penalised_linear_model():
    gains = torch.tensor([1.0, 0.9, 0.2, -0.5], dtype=torch.float64)

    def g(w: Tensor) -> float:
        return float(-gains @ w) + penalty(w, 0.3)

    values = [g(refine(uniform(4), -gains, 0.05, steps, 0.3)) for steps in range(0, 60, 10)]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 0.1


@given(point=points(), steps=st.integers(0, 5), beta=st.floats(0, 2), p=st.sampled_from([0.3, 0.5, 1.0]))
def test_refine_stays_on_the_simplex_and_on_the_support(
    point: tuple[Tensor, Tensor], steps: int, beta: float, p: float
):
    weights, gradient = point
    found = refine(weights, gradient, 0.1, steps, beta, p)
    assert on_simplex(found)
    assert bool((found[weights == 0] == 0).all())


def test_penalty_of_power_one_is_constant_on_the_simplex_and_moves_nothing():
    gradient = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    plain, penalised = refine(uniform(3), gradient, 0.2, 5), refine(uniform(3), gradient, 0.2, 5, 4.0, 1.0)
    assert torch.allclose(plain, penalised, atol=1e-14)


def test_half_power_penalty_concentrates_the_weights():
    start = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = refine(start, torch.zeros(3).double(), 0.05, 40, 1.0, 0.5)
    assert float(found[0]) > 0.6
    assert float(found[2]) < 0.1


@given(point=points(), share=st.floats(0, 1))
def test_drop_small_removes_exactly_the_small_ones(point: tuple[Tensor, Tensor], share: float):
    weights, _ = point
    found = drop_small(weights, share)
    limit = share / int((weights > 0).sum())
    kept = (weights >= limit) & (weights > 0)
    kept[weights.argmax()] = True
    assert on_simplex(found)
    assert torch.equal(found > 0, kept)
    assert torch.allclose(found[kept], weights[kept] / weights[kept].sum())


def test_drop_small_keeps_everything_at_zero():
    weights = torch.tensor([0.999, 0.001, 0.0], dtype=torch.float64)
    assert torch.allclose(drop_small(weights, 0.0), weights)
    assert drop_small(weights, 0.5).tolist() == [1.0, 0.0, 0.0]
