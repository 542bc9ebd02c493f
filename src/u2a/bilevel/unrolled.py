"""The exact derivative of J(theta_T(omega)) through the optimiser steps that an unlearning run really took.

A run is theta_{t+1}, s_{t+1} = step_t(theta_t, s_t, clip(g_t)) with optimiser state s and the step's gradient
g_t = sum_{i in B_t} c_i grad l_i(theta_t) / |B_t| + lambda grad L_R(theta_t), c_i = |S| omega_i. With adjoints
p = dJ/d theta_{t+1} and r = dJ/d s_{t+1}, one step backwards is

    (p', r', q) = (d step / d (theta_t, s_t, g_t))' (p, r)                the optimiser and the clipping, elementwise
    dJ/d c_i   += q . grad l_i(theta_t) / |B_t|                           for the rows of the step's batches
    dJ/d theta_t = p' + H_t q,   dJ/d s_t = r'                            H_t = d g_t / d theta_t

where q . grad l_i and H_t q come out of one double backward pass. It assumes neither convergence nor curvature > 0.

Normalisation: omega_i stands for the normalised weights, and the derivative is that with respect to each of them
alone, the others held. On the simplex only differences between its entries matter. The trainer divides weights by
their sum, so a finite difference of whole runs equals the derivative minus its omega-weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from u2a.batch_size import memory_for
from u2a.bilevel.adjoint import Derivatives, InnerPoint
from u2a.bilevel.attention import second_order_attention
from u2a.bilevel.trajectory import PHASE, Moment, Plan, Replay, State, moment_at, on_device, plan_of, replay, stepped
from u2a.bilevel.vectors import norm, plus, zeros_like
from u2a.errors import ConfigError, NonFiniteError
from u2a.free_memory import host_free_bytes
from u2a.guard import all_finite
from u2a.modeling import Params, Policy
from u2a.progress import Advance, Console, Quiet
from u2a.unlearn import InnerProblem

SAME_RUN = 0.1  # replay and run may differ by this share of the whole change (kernels that are not deterministic)


@dataclass(frozen=True)
class _Adjoint:
    """Derivative of one J with respect to where the run stands at some moment.

    Attributes:
        theta: dJ/d theta.
        state: dJ/d s, one vector per vector of the optimiser's state.
    """

    theta: Params
    state: State


@dataclass(frozen=True)
class Unrolled:
    """Gains dJ/d omega_i through the steps really taken, on candidates of positive weight.

    The scale that the guard's line search put on the change, and the number of steps it kept, are held fixed.

    Attributes:
        checkpoint_every: steps between stored states; between them the run is computed once more. 0: the smallest
            interval whose states fit into half of the free memory of the host.
    """

    checkpoint_every: int = 0

    @property
    def name(self) -> str:
        """Name for records; the interval changes nothing but time and memory."""
        return "unrolled"

    def gains(
        self,
        policy: Policy,
        problem: InnerProblem,
        weights: Mapping[str, float],
        gradients: Sequence[Params],
        steps_kept: int,
        scale: float = 1.0,
        advance: Advance | None = None,
    ) -> Tensor:
        """Differentiate J where the run left the policy; the policy is left bit for bit as found.

        Args:
            policy: the policy, where the run left it.
            problem: the problem that was solved.
            weights: the omega it was solved with; every candidate's must be positive.
            gradients: grad J there, one per objective or fold, at least one.
            steps_kept: optimiser steps between theta_0 and there.
            scale: factor in [0, 1] that the line search put on the change.
            advance: progress, told ``2 * steps_kept`` steps.

        Returns:
            (candidates, gradients) dJ/d omega_i in the order of ``problem.forget``, float64, on the CPU.

        Raises:
            ConfigError: a candidate without weight, or a policy that is not where this run ends.
            NonFiniteError: a gradient, or the derivative, is not finite.
        """
        without = [row.id for row in problem.forget if not weights.get(row.id, 0.0) > 0.0]
        if without:
            raise ConfigError(
                f"unrolled: candidate {without[0]!r} has no weight ({len(without)} in all; the derivative through the "
                "steps covers the selected candidates only: leave the others out)"
            )
        plan = plan_of(policy, problem, weights, steps_kept)
        every = self.checkpoint_every or checkpoint_interval(steps_kept, _moment_bytes(policy, plan), _budget_bytes())
        with _left_as_found(policy) as found:
            run = replay(policy, plan, every, advance)
            policy.scale_change(scale)
            _check_same(policy, found)
            outer = [_before_scaling(policy, gradient, scale) for gradient in gradients]
            values = sweep(policy, plan, run, outer, advance)
        place = {name: number for number, name in enumerate(plan.ids)}
        return len(plan.ids) * values[[place[row.id] for row in problem.forget]]

    def derivatives(self, point: InnerPoint, gradients: Sequence[Params], console: Console) -> Derivatives:
        """See :class:`~u2a.bilevel.adjoint.Adjoint`; covers candidates of positive weight only.

        Args:
            point: the inner problem and its solution.
            gradients: grad J at the solution; each one costs a further backward pass per step.
            console: progress.

        Returns:
            dg/d omega_k, which is minus the gain.
        """
        scale = 1.0 if point.result is None else point.result.scale
        with console.phase("unrolled derivative", 2 * point.steps, "steps") as advance, memory_for(self.name):
            gains = self.gains(point.policy, point.problem, point.weights, gradients, point.steps, scale, advance)
        return Derivatives(-gains, None, (), self.name)


def unrolled_gradients(
    policy: Policy, plan: Plan, outer_gradients: Sequence[Params], every: int, advance: Advance | None = None
) -> Tensor:
    """Differentiate J at the end of a plan with respect to the coefficients c_i of its losses.

    Args:
        policy: the policy; it is left bit for bit as found.
        plan: the run.
        outer_gradients: grad J at the run's end, one or several; they share all forward and first backward passes.
        every: steps between stored states, >= 1: about ``steps / every + every`` states are held.
        advance: progress, told every step twice.

    Returns:
        (rows, gradients) dJ/d c_i, float64, on the CPU; dJ/d omega_i is |S| times it.
    """
    with _left_as_found(policy):
        return sweep(policy, plan, replay(policy, plan, every, advance), outer_gradients, advance)


def checkpoint_interval(steps: int, moment_bytes: int, budget_bytes: float) -> int:
    """Choose the smallest interval of stored states that fits: 1 stores all and computes no step twice.

    Args:
        steps: steps of the run.
        moment_bytes: size of one stored state.
        budget_bytes: memory for all of them.

    Returns:
        Steps between stored states; where nothing fits, the interval that needs the least memory.

    >>> [checkpoint_interval(100, 1, budget) for budget in (100, 51, 19, 5)]
    [1, 2, 10, 10]
    """
    stored = {every: math.ceil(steps / every) + every - 1 for every in range(1, max(1, steps) + 1)}
    fitting = [every for every, count in stored.items() if count * moment_bytes <= budget_bytes]
    return fitting[0] if fitting else min(stored, key=lambda every: stored[every])


def sweep(
    policy: Policy, plan: Plan, run: Replay, outer_gradients: Sequence[Params], advance: Advance | None = None
) -> Tensor:
    """Go back through a run, step by step; the policy's theta moves along.

    Args:
        policy: the policy.
        plan: the run.
        run: its replay.
        outer_gradients: grad J at its end, at least one.
        advance: progress, told one step at a time.

    Returns:
        (rows, gradients) dJ/d c_i, float64, on the CPU.

    Raises:
        NonFiniteError: an adjoint is not finite.
    """
    out = torch.zeros(len(plan.ids), len(outer_gradients), dtype=torch.float64)
    start = plan.optimizer.start(run.theta)
    adjoints = []
    for gradient in outer_gradients:
        theta = {name: gradient[name].to(value) for name, value in run.theta.items()}
        adjoints.append(_Adjoint(theta, start))
    _check_finite(adjoints, "gradient of the objective", len(plan.steps))
    for kept in reversed(run.kept):
        for moment in reversed(_segment(policy, plan, kept, run.every)):
            adjoints = _step_back(policy, plan, moment.on(policy.device), adjoints, out)
            _check_finite(adjoints, "adjoint", moment.number)
            (advance or Quiet()).advance(1)
    if not torch.isfinite(out).all():
        raise NonFiniteError("derivative", PHASE)
    return out


def _segment(policy: Policy, plan: Plan, kept: Moment, every: int) -> list[Moment]:
    """The moments from a kept one up to the next kept one, computed once more, on the CPU."""
    moments = [kept]
    now = kept.on(policy.device)
    for number in range(kept.number + 1, min(kept.number + every, len(plan.steps))):
        theta, state = stepped(plan, now)
        now = moment_at(policy, plan, number, theta, state)
        moments.append(now.on(torch.device("cpu")))
    return moments


def _step_back(policy: Policy, plan: Plan, moment: Moment, adjoints: Sequence[_Adjoint], out: Tensor) -> list[_Adjoint]:
    """Adjoints before a step from those after it; dJ/d c_i of the step's rows is added to ``out``."""
    before, through_gradient = _through_optimizer(plan, moment, adjoints)
    policy.restore(moment.theta)
    products = [zeros_like(moment.theta) for _ in adjoints]
    micro_batches = plan.steps[moment.number].micro_batches
    with second_order_attention(policy):
        for batch in micro_batches:
            inputs = on_device(batch, policy.device)
            parameters = list(policy.trainable().values())
            losses = plan.loss.per_sample(policy.model, inputs)
            coefficients = inputs["weight"].to(losses).requires_grad_()
            loss = plan.loss.total(losses, coefficients, plan.loss.retain(policy.model, inputs)) / len(micro_batches)
            gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            for k, direction in enumerate(through_gradient):
                along = torch.stack([(g * d).sum() for g, d in zip(gradient, direction.values(), strict=True)]).sum()
                more = k + 1 < len(through_gradient)
                *parts, slopes = torch.autograd.grad(
                    along, [*parameters, coefficients], retain_graph=more, materialize_grads=True
                )
                products[k] = plus(products[k], dict(zip(direction, parts, strict=True)))
                out[:, k].index_add_(0, batch["index"], slopes.cpu().double())
    return [
        _Adjoint(plus(adjoint.theta, product), adjoint.state) for adjoint, product in zip(before, products, strict=True)
    ]


def _through_optimizer(plan: Plan, moment: Moment, adjoints: Sequence[_Adjoint]) -> tuple[list[_Adjoint], list[Params]]:
    """Back through clipping and the optimiser's step: what reaches theta and state, and what reaches the gradient."""
    leaves = Moment(moment.number, _leaf(moment.theta), tuple(map(_leaf, moment.state)), _leaf(moment.gradient))
    theta, state = stepped(plan, leaves)
    outputs, inputs = _flat(theta, *state), _flat(leaves.theta, *leaves.state, leaves.gradient)
    before, through_gradient = [], []
    for k, adjoint in enumerate(adjoints):
        parts = torch.autograd.grad(
            outputs,
            inputs,
            _flat(adjoint.theta, *adjoint.state),
            retain_graph=k + 1 < len(adjoints),
            materialize_grads=True,
        )
        width = len(moment.theta)
        vectors = [dict(zip(moment.theta, parts[at : at + width], strict=True)) for at in range(0, len(parts), width)]
        before.append(_Adjoint(vectors[0], tuple(vectors[1:-1])))
        through_gradient.append(vectors[-1])
    return before, through_gradient


def _leaf(vector: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in vector.items()}


def _flat(*vectors: Params) -> list[Tensor]:
    return [value for vector in vectors for value in vector.values()]


def _check_finite(adjoints: Sequence[_Adjoint], what: str, step: int) -> None:
    """Refuse adjoints that are not finite (an unstable run makes them grow with every step back)."""
    if not all(all_finite(_flat(adjoint.theta, *adjoint.state)) for adjoint in adjoints):
        raise NonFiniteError(what, PHASE, step)


@contextmanager
def _left_as_found(policy: Policy) -> Iterator[Params]:
    """Give copies of theta, and put them back after the ``with`` block."""
    found = {name: value.detach().clone() for name, value in policy.trainable().items()}
    try:
        yield found
    finally:
        policy.restore(found)


def _check_same(policy: Policy, found: Params) -> None:
    """Refuse a policy that stood elsewhere than where its run ends: the derivative would be that of another run."""
    end = {name: value.detach() for name, value in policy.trainable().items()}
    change = norm(plus(end, {name: value.to(end[name]) for name, value in policy.theta0.items()}, -1.0))
    apart = norm(plus(end, found, -1.0))
    if not apart <= SAME_RUN * change:
        raise ConfigError(
            f"unrolled: the policy is not where this run ends ({apart:.3g} away, the run's change is {change:.3g}; "
            "solve the inner problem with these weights first, and pass the steps kept and the scale of its result)"
        )


def _before_scaling(policy: Policy, gradient: Params, scale: float) -> Params:
    """Gradient in the unscaled theta of J at the scaled one; see ``Policy.scale_change``."""
    scaled = {name for name in gradient if not policy.has_adapter or ".lora_B." in name or ".lora_embedding_B." in name}
    return {name: value * scale if name in scaled else value for name, value in gradient.items()}


def _moment_bytes(policy: Policy, plan: Plan) -> int:
    """Size of one stored state: theta, its gradient, and the optimiser's state."""
    theta = policy.theta0
    size = sum(value.numel() * value.element_size() for value in theta.values())
    return size * (2 + len(plan.optimizer.start(theta)))


def _budget_bytes() -> float:
    """Half of the host's free memory; 1 GiB where it does not tell."""
    free = host_free_bytes()
    return 2.0**30 if free is None else 0.5 * free
