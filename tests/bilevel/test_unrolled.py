"""The derivative through an unlearning run: against finite differences of whole runs, and planted errors.

J(theta) = d . theta + |theta|^2 / 2. Central differences with step h have an error of order h^2 f''' + 1e-16 |J| / h;
at h = 1e-5 both were seen below 1e-8 for every case here (1e-3 gives up to 1e-4 with Adam, whose step bends sharply
where a gradient is small, and falls a hundredfold with h down to 1e-5).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import (
    WEIGHTS,
    float64_throughout,
    full_policy,
    replayed_differences,
    run_policy,
    run_problem,
    slope,
    tilt,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import u2a.bilevel.trajectory as trajectory
import u2a.bilevel.unrolled as unrolled
from inner_oracle import flat, relative
from u2a.bilevel.trajectory import SGD, AdamW, Moment, Plan, plan_of, replay
from u2a.bilevel.unrolled import _through_optimizer, checkpoint_interval, sweep, unrolled_gradients
from u2a.errors import NonFiniteError
from u2a.modeling import Params, Policy

H = 1e-5
OPTIMISERS = {"sgd": SGD(), "momentum": SGD(0.9), "adamw": AdamW(), "decay": AdamW(0.8, 0.95, 1e-3, 0.1)}
TERMS = [("ga", "none"), ("npo", "nll"), ("ga", "kl"), ("npo", "proximal")]
CASES = [
    (optimizer, clip, (row + 2 * column + k) % 4)
    for row, optimizer in enumerate(OPTIMISERS)
    for column, clip in enumerate((0.0, 0.3))
    for k in range(2 if optimizer in ("sgd", "adamw") else 1)
]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with float64_throughout():
        yield


def scene(optimizer: str = "adamw", clip: float = 0.0, **section) -> tuple[Policy, Plan, Params]:
    """Policy, plan and the d of J; a clip of 0 does not clip."""
    policy = run_policy()
    plan = plan_of(policy, run_problem(**section), WEIGHTS)
    return policy, replace(plan, optimizer=OPTIMISERS[optimizer], max_norm=clip), tilt(policy)


def derivative(policy: Policy, plan: Plan, d: Params, every: int = 1) -> Tensor:
    """Ours: (rows,) dJ/d c_i."""
    end = replay(policy, plan, 99).theta
    return unrolled_gradients(policy, plan, [slope(end, d)], every)[:, 0]


# --- against finite differences of whole runs -------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "clip", "number"), CASES)
def test_the_derivative_is_that_of_whole_runs(optimizer: str, clip: float, number: int) -> None:
    """Every optimiser free and clipped, SGD and Adam with every retain term, GA and NPO."""
    loss, term = TERMS[number]
    policy, plan, d = scene(optimizer, clip, loss=loss, retain_term=term, max_steps=3)
    ours = derivative(policy, plan, d, every=2)
    norms = [float(flat(moment.gradient).norm()) for moment in replay(policy, plan, 1).kept]
    assert min(norms) > clip  # where it clips, it clips every step
    assert relative(ours, replayed_differences(policy, plan, d, H)) < 1e-6
    assert ours.norm() > 1e-4


def test_the_error_falls_with_the_square_of_the_step() -> None:
    """So what is left at H is the differences' error, not ours."""
    policy, plan, d = scene("adamw", loss="npo", max_steps=3)
    ours = derivative(policy, plan, d)
    errors = [relative(ours, replayed_differences(policy, plan, d, h)) for h in (1e-2, 1e-3, 1e-4)]
    assert errors[1] < 0.02 * errors[0]
    assert errors[2] < 0.02 * errors[1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulation_schedule_and_repeated_rows(optimizer: str) -> None:
    """Two micro-batches a step (so that a row comes twice in one), warm-up and cosine, retain rows, clipping."""
    shape = {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "warmup_ratio": 0.3}
    policy, plan, d = scene(optimizer, 0.3, loss="npo", retain_term="nll", **shape)
    rows = [[k for batch in step.micro_batches for k in batch["index"].tolist()] for step in plan.steps]
    assert all(len(set(step)) < len(step) for step in rows)
    assert relative(derivative(policy, plan, d, 3), replayed_differences(policy, plan, d, H)) < 1e-6


@pytest.mark.parametrize(("optimizer", "step"), [("sgd", 1e-3), ("adamw", H)])
def test_full_fine_tuning(optimizer: str, step: float) -> None:
    """J is large here and SGD's derivative small and smooth: a wider step against round-off."""
    policy = full_policy()
    problem = run_problem(optimizer=optimizer, max_steps=3, learning_rate=1e-3, max_grad_norm=1.0)
    plan, d = plan_of(policy, problem, WEIGHTS), tilt(policy)
    assert relative(derivative(policy, plan, d), replayed_differences(policy, plan, d, step)) < 1e-6


# --- invariances -----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_any_interval_of_checkpoints_gives_the_same(optimizer: str) -> None:
    policy, plan, d = scene(optimizer, 0.3, loss="npo", max_steps=5)
    outer = slope(replay(policy, plan, 99).theta, d)
    first, *others = (unrolled_gradients(policy, plan, [outer], every) for every in (1, 2, 3, 5, 7))
    assert all(torch.allclose(first, other, rtol=1e-12, atol=0.0) for other in others)


def test_several_gradients_are_each_their_own_and_the_derivative_is_linear_in_them() -> None:
    policy, plan, d = scene(max_steps=3, retain_term="nll")
    one, two = d, {name: value.cos() for name, value in d.items()}
    alone = torch.cat([unrolled_gradients(policy, plan, [outer], 2) for outer in (one, two)], 1)
    both = unrolled_gradients(policy, plan, [one, two], 2)
    mixed = unrolled_gradients(policy, plan, [{name: 2 * one[name] - 3 * two[name] for name in one}], 2)
    assert relative(both, alone) < 1e-12
    assert relative(mixed[:, 0], 2 * both[:, 0] - 3 * both[:, 1]) < 1e-12


# --- memory, refusals ----------------------------------------------------------


def test_an_adjoint_that_grows_without_bound_is_refused() -> None:
    """A proximal term far too strong for the learning rate: every step back multiplies the adjoint."""
    policy, plan, d = scene("sgd", retain_term="proximal", retain_weight=1e4, max_steps=2)
    huge = {name: 1e305 * value.sign() for name, value in d.items()}
    with pytest.raises(NonFiniteError, match="adjoint in phase unrolled derivative, step"):
        unrolled_gradients(policy, plan, [huge], 1)


@pytest.mark.parametrize(("every", "most"), [(1, 12), (3, 4 + 2), (4, 3 + 3), (12, 1 + 11)])
def test_the_number_of_stored_states_is_bounded(monkeypatch: pytest.MonkeyPatch, every: int, most: int) -> None:
    """At most ceil(T / every) + every - 1 at any time, and the one at work."""
    policy, plan, d = scene(max_steps=12)
    alive: list[weakref.ref[Moment]] = []
    peak = 0

    def count(moment: Moment) -> None:
        nonlocal peak
        alive.append(weakref.ref(moment))
        alive[:] = [ref for ref in alive if ref() is not None]
        kept = {next(iter(m.theta.values())).data_ptr() for m in (ref() for ref in alive) if m is not None}
        peak = max(peak, len(kept))

    class Counted(Moment):
        def __init__(self, *parts) -> None:
            super().__init__(*parts)
            count(self)

    monkeypatch.setattr(trajectory, "Moment", Counted)
    monkeypatch.setattr(unrolled, "Moment", Counted)
    unrolled_gradients(policy, plan, [d], every)
    assert most <= peak <= most + 1


@pytest.mark.parametrize("term", ["none", "nll", "kl"])
@pytest.mark.parametrize("every", [1, 3])
def test_it_costs_at_most_six_times_the_run(every: int, term: str) -> None:
    """In operations, one gradient of J, states kept at every step or at every third one."""
    policy, plan, d = scene(max_steps=6, loss="npo", retain_term=term)
    with FlopCounterMode(display=False) as run:
        outer = slope(replay(policy, plan, 99).theta, d)
    with FlopCounterMode(display=False) as derivative_of_it:
        unrolled_gradients(policy, plan, [outer], every)
    share = derivative_of_it.get_total_flops() / run.get_total_flops()
    assert 3.0 < share <= 6.0


@given(steps=st.integers(1, 60), size=st.integers(1, 9), budget=st.integers(0, 600))
@settings(deadline=None)
def test_the_interval_is_the_smallest_that_fits(steps: int, size: int, budget: int) -> None:
    def needed(every: int) -> int:
        return (len(range(0, steps, every)) + every - 1) * size

    every = checkpoint_interval(steps, size, budget)
    assert all(needed(smaller) > budget for smaller in range(1, every)) or needed(every) > budget
    assert needed(every) <= budget or needed(every) == min(map(needed, range(1, steps + 1))) > budget


# --- planted errors ---------------------------------------------------------------------------------


class ForgetsMeanSquare(AdamW):
    """Adam whose v does not carry the adjoint from step to step."""

    def step(self, theta, gradient, state, rate, count):
        return super().step(theta, gradient, (state[0], {n: v.detach() for n, v in state[1].items()}), rate, count)


class ForgetsMean(AdamW):
    """Adam whose m does not carry the adjoint from step to step."""

    def step(self, theta, gradient, state, rate, count):
        return super().step(theta, gradient, ({n: v.detach() for n, v in state[0].items()}, state[1]), rate, count)


class ForgetsTheta(AdamW):
    """Adam whose theta does not carry the adjoint from step to step."""

    def step(self, theta, gradient, state, rate, count):
        moved, state = super().step(theta, gradient, state, rate, count)
        return {name: value - theta[name] + theta[name].detach() for name, value in moved.items()}, state


def constant_clipping(found: Params, max_norm: float) -> Params:
    """Clipping whose factor is taken for a constant."""
    factor = min(1.0, max_norm / (float(flat(found).norm()) + 1e-6))
    return {name: value * factor for name, value in found.items()}


def turned(*arguments):
    """Gradients of the steps with the wrong sign."""
    before, through = _through_optimizer(*arguments)
    return before, [{name: -value for name, value in vector.items()} for vector in through]


def test_planted_errors_in_the_state_are_seen() -> None:
    policy, plan, d = scene("adamw", loss="npo")
    truth = replayed_differences(policy, plan, d, H)
    assert relative(derivative(policy, plan, d), truth) < 1e-6
    for planted in (ForgetsMeanSquare(), ForgetsMean(), ForgetsTheta()):
        assert relative(derivative(policy, replace(plan, optimizer=planted), d), truth) > 1e-2


def test_planted_errors_in_the_sweep_are_seen() -> None:
    """No derivative of the clipping, no curvature, a wrong sign, no retain term."""
    policy, plan, d = scene("sgd", 0.3, loss="npo", retain_term="proximal")
    truth, outer = replayed_differences(policy, plan, d, H), slope(replay(policy, plan, 9).theta, d)
    assert relative(unrolled_gradients(policy, plan, [outer], 1)[:, 0], truth) < 1e-6
    planted = [
        (trajectory, "clipped", constant_clipping),
        (unrolled, "plus", lambda vector, product: vector),
        (unrolled, "_through_optimizer", turned),
    ]
    for module, name, wrong in planted:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, wrong)
            assert relative(unrolled_gradients(policy, plan, [outer], 1)[:, 0], truth) > 1e-3, name
    run = replay(policy, plan, 1)
    without = replace(plan, loss=replace(plan.loss, retain_weight=0.0))
    assert relative(sweep(policy, without, run, [outer])[:, 0], truth) > 1e-4
