"""Short unlearning runs in float64 throughout, for finite differences of whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from small import small_policy
from torch import Tensor

from tiny import examples, tiny_tokenizer
from u2a.bilevel.trajectory import Plan, replay
from u2a.config import AdapterConfig, UnlearnSection
from u2a.modeling import Params, Policy
from u2a.unlearn import InnerProblem

ROWS, RETAIN = examples(3), examples(4, start=40)
WEIGHTS = {row.id: weight for row, weight in zip(ROWS, (0.5, 0.2, 0.3), strict=True)}


@contextmanager
def float64_throughout() -> Iterator[None]:
    """No rounding to float32 anywhere (weights of batches, KL and proximal term), so that differences can be small."""
    plain = torch.Tensor.float
    torch.Tensor.float = lambda value: value if value.dtype == torch.float64 else plain(value)  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = plain  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)


def run_policy(reached: bool = True) -> Policy:
    """A small policy whose theta_0 has B != 0 (or, not ``reached``, LoRA's ordinary start)."""
    policy = small_policy(reached=reached)
    policy._theta0 = policy.snapshot()
    return policy


def full_policy() -> Policy:
    """The same model, all weights trained."""
    base = small_policy(reached=False).model.unload()  # type: ignore[operator]
    return Policy(base, tiny_tokenizer(), AdapterConfig(enabled=False))


def run_problem(**section) -> InnerProblem:
    """Four steps on three rows in batches of two."""
    settings = {
        "max_steps": 4,
        "batch_size": 2,
        "retain_batch_size": 2,
        "learning_rate": 1e-2,
        "retain_term": "none",
        "max_grad_norm": 1e6,
    }
    return InnerProblem(ROWS, RETAIN, (), UnlearnSection(**(settings | section)), seed=5)


def tilt(policy: Policy) -> Params:
    """A fixed direction d of J(theta) = d . theta + |theta|^2 / 2."""
    generator = torch.Generator().manual_seed(9)
    return {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in policy.trainable().items()}


def value(theta: Params, d: Params) -> float:
    """J(theta) = d . theta + |theta|^2 / 2."""
    return float(torch.stack([(d[n] * v + 0.5 * v * v).sum() for n, v in theta.items()]).sum().detach())


def slope(theta: Params, d: Params) -> Params:
    """Gradient of J."""
    return {n: d[n] + v.detach() for n, v in theta.items()}


def coefficients(plan: Plan) -> Tensor:
    """c_i of a plan's rows, read off its batches."""
    out = torch.zeros(len(plan.ids))
    for step in plan.steps:
        for batch in step.micro_batches:
            out[batch["index"]] = batch["weight"]
    return out


def with_coefficients(plan: Plan, c: Tensor) -> Plan:
    """The plan with other c_i."""
    steps = (
        replace(step, micro_batches=tuple(batch | {"weight": c[batch["index"]]} for batch in step.micro_batches))
        for step in plan.steps
    )
    return replace(plan, steps=tuple(steps))


def central(f: Callable[[Tensor], float], at: Tensor, step: float) -> Tensor:
    """Central differences of f, one coordinate after the other."""
    units = torch.eye(len(at))
    return torch.tensor([(f(at + step * unit) - f(at - step * unit)) / (2 * step) for unit in units])


def replayed_differences(policy: Policy, plan: Plan, d: Params, step: float) -> Tensor:
    """Central differences of J(theta_T(c)), each value from a whole run."""
    return central(lambda c: value(replay(policy, with_coefficients(plan, c), 99).theta, d), coefficients(plan), step)
