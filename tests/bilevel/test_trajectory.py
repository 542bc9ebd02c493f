"""The run as data: the replay is the trainer's run, and the optimisers are torch's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from runs import ROWS, WEIGHTS, coefficients, float64_throughout, full_policy, run_policy, run_problem
from torch import Tensor

import u2a.bilevel.trajectory as trajectory
from inner_oracle import flat, relative
from tiny import tiny_policy
from u2a.bilevel.trajectory import SGD, AdamW, Optimizer, clipped, moment_at, plan_of, replay, start_of, stepped
from u2a.bilevel.vectors import norm
from u2a.config import UnlearnSection
from u2a.errors import ConfigError, NonFiniteError
from u2a.modeling import Params
from u2a.unlearn import unlearn

SHAPE = {
    "max_steps": 5,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.4,
    "max_grad_norm": 0.4,
}


@pytest.fixture
def exact() -> Iterator[None]:
    with float64_throughout():
        yield


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("loss", "term"), [("ga", "none"), ("npo", "nll"), ("grad_diff", "kl"), ("npo", "proximal")])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_replay_is_the_trainers_run(optimizer: str, loss: str, term: str) -> None:
    """Accumulation, warm-up and cosine, clipping in every step: the same theta_T to 14 digits, the same norms."""
    problem = run_problem(optimizer=optimizer, loss=loss, retain_term=term, **SHAPE)
    trained, replayed = run_policy(), run_policy()
    result = unlearn(trained, problem, WEIGHTS)
    plan = plan_of(replayed, problem, WEIGHTS)
    run = replay(replayed, plan, every=1)
    assert relative(flat(run.theta), flat(trained.snapshot())) < 1e-14
    assert torch.equal(flat(replayed.snapshot()), flat(run.theta))
    assert relative(flat(run.theta), flat(trained.theta0)) > 1e-4
    norms = [norm(moment.gradient) for moment in run.kept]
    assert [log.grad_norm for log in result.history] == pytest.approx(norms, rel=1e-5)  # logged as float32
    assert min(norms) > 0.4  # clipped
    assert [step.rate for step in plan.steps] == pytest.approx([0, 0.005, 0.01, 0.0075, 0.0025])


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_the_replay_is_the_trainers_run_in_float32_from_the_ordinary_start(adapter: bool) -> None:
    problem = run_problem(retain_term="nll", learning_rate=1e-3, max_steps=4)
    trained, replayed = tiny_policy(adapter=adapter), tiny_policy(adapter=adapter)
    unlearn(trained, problem, WEIGHTS)
    run = replay(replayed, plan_of(replayed, problem, WEIGHTS), every=2)
    change = flat(trained.snapshot()) - flat(trained.theta0)
    assert float((flat(run.theta) - flat(trained.snapshot())).norm() / change.norm()) < 1e-4


def test_adamw_is_the_default_and_the_option_reaches_the_trainer() -> None:
    assert UnlearnSection().optimizer == "adamw"
    policy = tiny_policy()
    kinds = [plan_of(policy, run_problem(optimizer=name), WEIGHTS).optimizer for name in ("adamw", "sgd")]
    assert kinds == [AdamW(), SGD()]


def test_a_plan_holds_normalised_weights_full_batches_and_the_schedule_of_the_whole_run() -> None:
    policy = tiny_policy()
    problem = run_problem(lr_scheduler="linear")
    plan = plan_of(policy, problem, {name: 8 * weight for name, weight in WEIGHTS.items()})
    assert plan.ids == tuple(sorted(WEIGHTS))
    assert coefficients(plan).tolist() == pytest.approx([3 * WEIGHTS[name] for name in plan.ids])
    rows = [batch["index"].tolist() for step in plan.steps for batch in step.micro_batches]
    assert [len(batch) for batch in rows] == [2, 2, 2, 2]
    assert sorted(sum(rows, [])[:6]) == [0, 0, 1, 1, 2, 2]  # two whole passes
    part = plan_of(policy, problem, WEIGHTS, steps=2)
    assert [step.rate for step in part.steps] == [step.rate for step in plan.steps][:2]
    assert len(plan_of(policy, run_problem(batch_size=64), WEIGHTS).steps[0].micro_batches[0]["index"]) == 3


def test_making_a_plan_changes_nothing() -> None:
    policy = tiny_policy(lora_b_sd=0.1)
    before = flat(policy.snapshot())
    plan_of(policy, run_problem(retain_term="kl"), WEIGHTS)
    assert torch.equal(flat(policy.snapshot()), before)


def test_plans_that_cannot_be_made_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no candidate has positive weight"):
        plan_of(tiny_policy(), run_problem(), {ROWS[0].id: 0.0})
    several = SimpleNamespace(args=SimpleNamespace(world_size=2))
    monkeypatch.setattr(trajectory, "trainer_of", lambda *given: several)
    with pytest.raises(ConfigError, match="got 2 processes"):
        plan_of(tiny_policy(), run_problem(), WEIGHTS)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    policy = tiny_policy()
    plan = plan_of(policy, run_problem(), WEIGHTS)
    theta, state = start_of(policy, plan)
    next(iter(theta.values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="gradient in phase unrolled derivative, step 2"):
        moment_at(policy, plan, 2, theta, state)


# --- optimisers and clipping ------------------------------------------------------------------------


def numbers(seed: int, size: float = 1.0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": size * torch.randn(3, 2, generator=generator, dtype=torch.float64),
        "b": size * torch.randn(4, generator=generator, dtype=torch.float64),
    }


OPTIMISERS = [
    (SGD(), torch.optim.SGD, {}),
    (SGD(0.9), torch.optim.SGD, {"momentum": 0.9}),
    (AdamW(), torch.optim.AdamW, {"weight_decay": 0.0}),
    (AdamW(0.8, 0.95, 1e-3, 0.1), torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("ours", "theirs", "settings"), OPTIMISERS)
def test_optimisers_are_torchs(ours: Optimizer, theirs: type, settings: dict) -> None:
    """Eight steps at changing rates, with entries whose gradient is 0 for the first three."""
    theta, rates = numbers(0), [0.1, 0.0, 0.05, 0.2, 0.1, 0.01, 0.3, 0.1]
    live = {name: value.clone().requires_grad_() for name, value in theta.items()}
    optimizer = theirs(list(live.values()), lr=1.0, **settings)
    state = ours.start(theta)
    for count, rate in enumerate(rates, 1):
        gradient = numbers(count)
        if count <= 3:
            gradient["b"].zero_()
        for name, value in live.items():
            value.grad = gradient[name].clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        given = flat(theta).clone()
        after, state = ours.step(theta, gradient, state, rate, count)
        assert torch.equal(flat(theta), given)  # not changed in place
        theta = after
        assert relative(flat(theta), flat(live)) < 1e-15


@pytest.mark.parametrize("size", [10.0, 1.0, 1e-3, 0.0])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 3.0])
def test_clipping_is_torchs(size: float, max_norm: float) -> None:
    gradient = numbers(3, size)
    live = {name: torch.zeros_like(value, requires_grad=True) for name, value in gradient.items()}
    for name, value in live.items():
        value.grad = gradient[name].clone()
    if max_norm:
        torch.nn.utils.clip_grad_norm_(live.values(), max_norm)
    expected = flat({name: value.grad for name, value in live.items()})
    assert torch.allclose(flat(clipped(gradient, max_norm)), expected, rtol=1e-15, atol=0.0)


def test_clipping_and_steps_are_differentiable_where_the_gradient_is_zero() -> None:
    """All zeros: SGD's derivative is -rate, Adam's first one -rate / eps to first order, and nothing is NaN."""
    for optimizer, expected in ((SGD(), -0.1), (AdamW(eps=1e-2), -0.1 / 1e-2)):
        theta = {"a": torch.zeros(3, dtype=torch.float64)}
        g = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        after, _ = optimizer.step(theta, clipped({"a": g}, 1.0), optimizer.start(theta), 0.1, 1)
        (found,) = torch.autograd.grad(after["a"].sum(), g)
        assert found.tolist() == pytest.approx([expected] * 3)


def test_adamws_step_has_the_derivatives_of_its_formula() -> None:
    """torch's gradcheck compares them with finite differences, in theta, gradient, m and v."""

    def function(theta: Tensor, g: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, ...]:
        optimizer = AdamW(0.9, 0.99, 1e-3, 0.1)
        after, state = optimizer.step({"a": theta}, clipped({"a": g}, 0.7), ({"a": mean}, {"a": square}), 0.1, 3)
        return after["a"], state[0]["a"], state[1]["a"]

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(4, generator=generator, dtype=torch.float64).add(0.1).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.usefixtures("exact")
def test_full_fine_tuning_is_replayed_too() -> None:
    problem = run_problem(optimizer="sgd", max_grad_norm=1.0)
    trained, replayed = full_policy(), full_policy()
    unlearn(trained, problem, WEIGHTS)
    assert relative(flat(replay(replayed, plan_of(replayed, problem, WEIGHTS), 3).theta), flat(trained.snapshot())) == 0


def test_kept_moments_lead_to_one_another() -> None:
    policy = tiny_policy()
    plan = plan_of(policy, run_problem(max_steps=5), WEIGHTS)
    run = replay(policy, plan, every=2)
    assert [moment.number for moment in run.kept] == [0, 2, 4]
    assert len(run.kept) == math.ceil(5 / 2)
    theta, state = stepped(plan, run.kept[0])
    theta, _ = stepped(plan, moment_at(policy, plan, 1, theta, state))
    assert torch.equal(flat(theta), flat(run.kept[1].theta))
