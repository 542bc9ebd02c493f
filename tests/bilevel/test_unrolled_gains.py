"""Gains through an unlearning run: against finite differences of the trainer's own runs, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from runs import (
    RETAIN,
    ROWS,
    WEIGHTS,
    central,
    coefficients,
    float64_throughout,
    full_policy,
    run_policy,
    run_problem,
    slope,
    tilt,
    value,
    with_coefficients,
)
from torch import Tensor

from inner_oracle import flat, gradient, relative
from u2a.bilevel.trajectory import plan_of, replay
from u2a.bilevel.unrolled import Unrolled, unrolled_gradients
from u2a.config import GuardSection
from u2a.errors import ConfigError, NonFiniteError
from u2a.modeling import Params, Policy
from u2a.types import UnlearnResult
from u2a.unlearn import InnerProblem, unlearn

H = 1e-5  # step of the differences; see test_unrolled.py


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with float64_throughout():
        yield


def trained(problem: InnerProblem, reached: bool = True) -> tuple[Policy, UnlearnResult]:
    policy = run_policy(reached)
    return policy, unlearn(policy, problem, WEIGHTS)


def trainer_differences(problem: InnerProblem, d: Params, reached: bool, scale: float = 1.0) -> Tensor:
    """Central differences of J after real runs of the trainer, in the unnormalised weights, in the order of ROWS."""
    policy = run_policy(reached)

    def end(weights: Tensor) -> float:
        unlearn(policy, problem, dict(zip(WEIGHTS, weights.tolist(), strict=True)))
        policy.scale_change(scale)
        return value(policy.trainable(), d)

    return central(end, torch.tensor(list(WEIGHTS.values())), H)


def centred(gains: Tensor) -> Tensor:
    """Derivative of the run with normalised weights: omega_i / sum omega."""
    return gains - (torch.tensor(list(WEIGHTS.values())) * gains).sum()


@pytest.mark.parametrize(("optimizer", "reached"), [("adamw", True), ("adamw", False), ("sgd", True)])
def test_gains_equal_differences_of_the_trainers_runs(optimizer: str, reached: bool) -> None:
    """From B != 0 and from LoRA's ordinary start.

    The trainer normalises the weights: its derivative is ours minus the omega-weighted mean of ours.
    """
    problem = run_problem(
        optimizer=optimizer,
        loss="npo",
        retain_term="nll",
        max_grad_norm=0.5,
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    policy, _ = trained(problem, reached)
    d = tilt(policy)
    gains = Unrolled().gains(policy, problem, WEIGHTS, [slope(policy.trainable(), d)], 3)
    differences = trainer_differences(problem, d, reached)
    assert relative(centred(gains[:, 0]), differences) < 1e-6
    assert relative(gains[:, 0], differences) > 1e-3  # the mean matters


def test_gains_go_through_a_scaled_change() -> None:
    problem = run_problem(loss="npo", retain_term="nll", max_grad_norm=0.5)
    policy, _ = trained(problem)
    d = tilt(policy)
    policy.scale_change(0.3)
    gains = Unrolled().gains(policy, problem, WEIGHTS, [slope(policy.trainable(), d)], 4, 0.3)
    assert relative(centred(gains[:, 0]), trainer_differences(problem, d, True, 0.3)) < 1e-6


def test_scaling_is_undone_with_full_fine_tuning() -> None:
    policy = full_policy()
    problem = run_problem(optimizer="sgd", max_steps=2, learning_rate=1e-3)
    unlearn(policy, problem, WEIGHTS)
    d = tilt(policy)
    policy.scale_change(0.3)
    found = policy.snapshot()
    gains = Unrolled().gains(policy, problem, WEIGHTS, [slope(policy.trainable(), d)], 2, 0.3)
    plan = plan_of(policy, problem, WEIGHTS)
    whole = unrolled_gradients(policy, plan, [slope(found, d)], 1)[:, 0]
    order = [plan.ids.index(row.id) for row in ROWS]
    assert torch.allclose(gains[:, 0], 3 * 0.3 * whole[order], rtol=1e-12)


@pytest.mark.parametrize("how", ["rolled back", "scaled down"])
def test_a_run_that_the_guard_settled(how: str) -> None:
    """Steps kept and scale come from the run's own record."""
    back = how == "rolled back"
    budget = GuardSection(ppl_budget_frac=0.03 if back else 0.001, every_steps=int(back), line_search=not back)
    problem = replace(run_problem(loss="ga"), guard_rows=RETAIN, guard=budget)
    policy, result = trained(problem, reached=back)
    assert result.breached
    assert (result.steps_kept, result.scale) == (2, 1.0) if back else (result.steps_kept == 4 and result.scale < 1)
    d = tilt(policy)
    gains = Unrolled().gains(policy, problem, WEIGHTS, [slope(policy.trainable(), d)], result.steps_kept, result.scale)
    plan = plan_of(policy, problem, WEIGHTS, result.steps_kept)

    def end(c: Tensor) -> float:
        policy.restore(replay(policy, with_coefficients(plan, c), 99).theta)
        policy.scale_change(result.scale)
        return value(policy.trainable(), d)

    order = [plan.ids.index(row.id) for row in ROWS]
    assert relative(gains[:, 0], 3 * central(end, coefficients(plan), H)[order]) < 1e-6


def test_one_step_of_descent_in_closed_form() -> None:
    """theta_1 = theta_0 - rate * mean c_i grad l_i, so dJ/d omega_i = -|S| rate / |B| grad J . grad l_i."""
    problem = run_problem(optimizer="sgd", max_steps=1, batch_size=3)
    policy, _ = trained(problem)
    outer = slope(policy.trainable(), tilt(policy))
    gains = Unrolled().gains(policy, problem, WEIGHTS, [outer], 1)[:, 0]
    policy.reset()
    encoded = [policy.encoder.encode(row.prompt, row.completion) for row in ROWS]
    reference = policy.reference_sums(encoded)
    slopes = []
    for k, row in enumerate(encoded):
        loss = problem.loss.per_sample(policy.log_probs([row]), reference[k : k + 1]).sum()
        slopes.append(flat(gradient(policy, loss)) @ flat(outer))
    assert relative(gains, -3 * 1e-2 / 3 * torch.stack(slopes)) < 1e-12


def test_gains_follow_the_candidates_and_not_their_order() -> None:
    problem = run_problem(max_steps=2)
    policy, _ = trained(problem)
    outer = [slope(policy.trainable(), tilt(policy))]
    gains = Unrolled().gains(policy, problem, WEIGHTS, outer, 2)
    turned = replace(problem, forget=tuple(reversed(ROWS)))
    assert torch.equal(Unrolled(2).gains(policy, turned, WEIGHTS, outer, 2), gains.flip(0))
    heavy = {name: 8 * weight for name, weight in WEIGHTS.items()}
    assert torch.allclose(Unrolled().gains(policy, problem, heavy, outer, 2), gains, rtol=1e-12)


def test_no_step_has_no_derivative() -> None:
    policy = run_policy()
    assert Unrolled().gains(policy, run_problem(), WEIGHTS, [tilt(policy)], 0).tolist() == [[0.0]] * 3


def test_theta_is_left_bit_for_bit_as_found() -> None:
    problem = run_problem(retain_term="kl", max_steps=3)
    policy, _ = trained(problem)
    before = flat(policy.snapshot())
    outer = slope(policy.trainable(), tilt(policy))
    given = flat(outer).clone()
    Unrolled().gains(policy, problem, WEIGHTS, [outer], 3)
    assert torch.equal(flat(policy.snapshot()), before)
    assert torch.equal(flat(outer), given)
    assert all(value.requires_grad and value.is_leaf for value in policy.trainable().values())
    bad = {name: torch.full_like(value, float("inf")) for name, value in outer.items()}
    with pytest.raises(NonFiniteError, match="gradient of the objective in phase unrolled derivative"):
        Unrolled().gains(policy, problem, WEIGHTS, [bad], 3)
    assert torch.equal(flat(policy.snapshot()), before)


def test_what_the_derivative_does_not_cover_is_refused() -> None:
    problem = run_problem(max_steps=2)
    policy, _ = trained(problem)
    outer = [slope(policy.trainable(), tilt(policy))]
    before = flat(policy.snapshot())
    for weights in (WEIGHTS | {ROWS[1].id: 0.0}, {ROWS[0].id: 0.5, ROWS[2].id: 0.5}):
        with pytest.raises(ConfigError, match=f"{ROWS[1].id}' has no weight.*covers the selected candidates only"):
            Unrolled().gains(policy, problem, weights, outer, 2)
    policy.reset()
    with pytest.raises(ConfigError, match="the policy is not where this run ends"):
        Unrolled().gains(policy, problem, WEIGHTS, outer, 2)
    policy.restore(trained(problem)[0].snapshot())
    with pytest.raises(ConfigError, match="the policy is not where this run ends"):
        Unrolled().gains(policy, problem, WEIGHTS, outer, 1)
    assert torch.equal(flat(policy.snapshot()), before)
