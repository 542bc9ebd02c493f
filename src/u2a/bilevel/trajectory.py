"""An unlearning run as data and pure functions: what every step sees, and the optimisers as functions of their state.

The plan of a run is read off the run's own trainer, so its batches, learning rates and options cannot differ from
those of the run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from u2a.errors import ConfigError, NonFiniteError
from u2a.guard import all_finite
from u2a.inner_loss import InnerLoss
from u2a.modeling import Params, Policy
from u2a.progress import Advance, Quiet
from u2a.trainer import UnlearnTrainer
from u2a.unlearn import InnerProblem, trainer_of, weighted_rows

State = tuple[Params, ...]
PHASE = "unrolled derivative"


class Optimizer(Protocol):
    """An optimiser as a value: its step is a pure, elementwise, differentiable function."""

    def start(self, theta: Params) -> State:
        """State before the first step.

        Args:
            theta: gives structure, types and devices.

        Returns:
            Vectors of zeros.
        """
        ...

    def step(self, theta: Params, gradient: Params, state: State, rate: float, count: int) -> tuple[Params, State]:
        """One step.

        Args:
            theta: parameters before it.
            gradient: the (clipped) gradient.
            state: state before it.
            rate: learning rate of this step.
            count: number of this step, from 1.

        Returns:
            Parameters and state after it; the arguments are not changed.
        """
        ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, as ``torch.optim.SGD``: b <- momentum * b + g; theta <- theta - rate * b.

    Attributes:
        momentum: in [0, 1).
    """

    momentum: float = 0.0

    def start(self, theta: Params) -> State:
        """No state without momentum, else one vector; see :class:`Optimizer`."""
        return (_zeros(theta),) if self.momentum else ()

    def step(self, theta: Params, gradient: Params, state: State, rate: float, count: int) -> tuple[Params, State]:
        """See :class:`Optimizer`."""
        if not self.momentum:
            return {name: torch.add(value, gradient[name], alpha=-rate) for name, value in theta.items()}, ()
        (old,) = state
        moved = {name: self.momentum * old[name] + gradient[name] for name in theta}
        return {name: torch.add(value, moved[name], alpha=-rate) for name, value in theta.items()}, (moved,)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, operation by operation as ``torch.optim.AdamW``.

    m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2;
    theta <- (1 - rate * decay) theta - rate m^ / (sqrt(v^) + eps), with m^ and v^ corrected for their start at 0.

    The square root has no derivative where v = 0. There the gradient was 0 in every step so far (LoRA's A while B is
    0), so m = 0 too, and the step is g / eps to first order: the derivative in v is left out, that in m is exact.

    Attributes:
        beta1: decay of the mean, in [0, 1).
        beta2: decay of the mean square, in [0, 1).
        eps: added to the root, > 0.
        weight_decay: >= 0.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def start(self, theta: Params) -> State:
        """The vectors m and v; see :class:`Optimizer`."""
        return _zeros(theta), _zeros(theta)

    def step(self, theta: Params, gradient: Params, state: State, rate: float, count: int) -> tuple[Params, State]:
        """See :class:`Optimizer`."""
        size, root = rate / (1 - self.beta1**count), (1 - self.beta2**count) ** 0.5
        mean, square, moved = {}, {}, {}
        for name, value in theta.items():
            g = gradient[name]
            mean[name] = torch.lerp(state[0][name], g, 1 - self.beta1)
            square[name] = torch.addcmul(state[1][name] * self.beta2, g, g, value=1 - self.beta2)
            denominator = _root(square[name]) / root + self.eps
            kept = value * (1 - rate * self.weight_decay)
            moved[name] = torch.addcdiv(kept, mean[name], denominator, value=-size)
        return moved, (mean, square)


def _root(value: Tensor) -> Tensor:
    """Square root of numbers >= 0, with derivative 0 at 0."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)


def _zeros(theta: Params) -> Params:
    return {name: torch.zeros_like(value, requires_grad=False) for name, value in theta.items()}


def clipped(gradient: Params, max_norm: float) -> Params:
    """Scale a gradient down to a norm, as ``torch.nn.utils.clip_grad_norm_`` does; differentiable.

    Args:
        gradient: the gradient.
        max_norm: largest norm; 0 does not clip.

    Returns:
        min(1, max_norm / (norm + 1e-6)) times the gradient.
    """
    if max_norm <= 0.0:
        return gradient
    norms = torch.stack([torch.linalg.vector_norm(value) for value in gradient.values()])
    factor = torch.clamp(max_norm / (torch.linalg.vector_norm(norms) + 1e-6), max=1.0)
    return {name: value * factor for name, value in gradient.items()}


@dataclass(frozen=True)
class Step:
    """What one optimiser step sees.

    Attributes:
        micro_batches: batches of :class:`~u2a.stream.BatchMaker`, on the CPU; their losses are averaged.
        rate: learning rate.
    """

    micro_batches: tuple[dict[str, Any], ...]
    rate: float


@dataclass(frozen=True)
class Plan:
    """An unlearning run, before it is run.

    Attributes:
        loss: loss of a micro-batch.
        optimizer: the optimiser.
        steps: the steps, in order.
        max_norm: gradients are clipped to this norm (0: never).
        ids: ids of the weighted rows, by row number (``index`` of the batches).
    """

    loss: InnerLoss
    optimizer: Optimizer
    steps: tuple[Step, ...]
    max_norm: float
    ids: tuple[str, ...]


def plan_of(policy: Policy, problem: InnerProblem, weights: Mapping[str, float], steps: int | None = None) -> Plan:
    """Write down what :func:`u2a.unlearn.unlearn` does for the same arguments.

    Args:
        policy: the policy; its theta is not changed.
        problem: candidates, retain rows and options.
        weights: omega by candidate id; the coefficients of the losses are omega normalised to mean 1.
        steps: optimiser steps, at most ``problem.section.max_steps``; None: all. The schedule is that of all.

    Returns:
        The plan.

    Raises:
        ConfigError: unusable weights, or a run on several processes (its batches are spread over them).
    """
    rows = weighted_rows(problem.forget, weights)
    with tempfile.TemporaryDirectory(prefix="u2a-") as folder:
        trainer = trainer_of(policy, problem, rows, Path(folder))
        if trainer.args.world_size > 1:
            raise ConfigError(f"{PHASE}: got {trainer.args.world_size} processes (start it in one process)")
        rates = _rates(trainer, problem.section.max_steps)
        return Plan(
            loss=trainer.inner_loss,
            optimizer=_optimizer(trainer),
            steps=tuple(Step(_micro_batches(trainer, number), rate) for number, rate in enumerate(rates[:steps])),
            max_norm=trainer.args.max_grad_norm,
            ids=tuple(row.id for row in rows),
        )


def _optimizer(trainer: UnlearnTrainer) -> Optimizer:
    args = trainer.args
    if args.optim == "sgd":
        return SGD()
    return AdamW(args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay)


def _rates(trainer: UnlearnTrainer, steps: int) -> list[float]:
    """Learning rate of every step, from the trainer's scheduler on an optimiser of one number."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=trainer.args.learning_rate)
    scheduler = trainer.create_scheduler(steps, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


def _micro_batches(trainer: UnlearnTrainer, number: int) -> tuple[dict[str, Any], ...]:
    """The micro-batches of one step: consecutive positions of the trainer's stream, put together by its collator."""
    size, parts = trainer.args.train_batch_size, trainer.args.gradient_accumulation_steps
    stream: Any = trainer.train_dataset
    first = number * size * parts
    starts = range(first, first + size * parts, size)
    return tuple(trainer.data_collator([stream[place + k] for k in range(size)]) for place in starts)  # type: ignore[arg-type]


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a micro-batch.

    Args:
        inputs: tensors and dictionaries of tensors.
        device: where to.

    Returns:
        The same on the device.
    """
    return {
        name: on_device(value, device) if isinstance(value, Mapping) else value.to(device)
        for name, value in inputs.items()
    }


@dataclass(frozen=True)
class Moment:
    """Where a run stands before one of its steps.

    Attributes:
        number: steps taken, >= 0.
        theta: parameters.
        state: the optimiser's state.
        gradient: the gradient that the next step will use, not yet clipped.
    """

    number: int
    theta: Params
    state: State
    gradient: Params

    def on(self, device: torch.device) -> Moment:
        """Move all vectors.

        Args:
            device: where to.

        Returns:
            The moment on the device (the very same tensors where they are there already).
        """
        state = tuple(_moved(part, device) for part in self.state)
        return Moment(self.number, _moved(self.theta, device), state, _moved(self.gradient, device))


def _moved(vector: Params, device: torch.device) -> Params:
    return {name: value.to(device) for name, value in vector.items()}


def start_of(policy: Policy, plan: Plan) -> tuple[Params, State]:
    """Parameters and state of a run before its first step.

    Args:
        policy: gives theta_0 and the device; not changed.
        plan: gives the optimiser.

    Returns:
        theta_0 and the optimiser's first state.
    """
    theta = {name: value.detach().to(policy.device, copy=True) for name, value in policy.theta0.items()}
    return theta, plan.optimizer.start(theta)


def moment_at(policy: Policy, plan: Plan, number: int, theta: Params, state: State) -> Moment:
    """Compute the gradient of one step; the policy is left at that theta.

    Args:
        policy: the policy.
        plan: the run.
        number: which step, from 0.
        theta: parameters before it.
        state: the optimiser's state before it.

    Returns:
        The moment before the step.

    Raises:
        NonFiniteError: the gradient is not finite.
    """
    policy.restore(theta)
    parameters = policy.trainable()
    total = _zeros(parameters)
    micro_batches = plan.steps[number].micro_batches
    for batch in micro_batches:
        inputs = on_device(batch, policy.device)
        losses = plan.loss.per_sample(policy.model, inputs)
        loss = plan.loss.total(losses, inputs["weight"], plan.loss.retain(policy.model, inputs)) / len(micro_batches)
        parts = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        total = {name: value + part for (name, value), part in zip(total.items(), parts, strict=True)}
    if not all_finite(list(total.values())):
        raise NonFiniteError("gradient", PHASE, number)
    return Moment(number, theta, state, total)


def stepped(plan: Plan, moment: Moment) -> tuple[Params, State]:
    """Take the step that a moment stands before; differentiable in its vectors.

    Args:
        plan: gives optimiser, learning rate and clipping.
        moment: before the step.

    Returns:
        Parameters and state after the step.
    """
    rate = plan.steps[moment.number].rate
    gradient = clipped(moment.gradient, plan.max_norm)
    return plan.optimizer.step(moment.theta, gradient, moment.state, rate, moment.number + 1)


@dataclass(frozen=True)
class Replay:
    """A run that was run again.

    Attributes:
        theta: parameters after the last step.
        kept: the moments before every ``every``-th step, on the CPU.
        every: steps between kept moments.
    """

    theta: Params
    kept: tuple[Moment, ...]
    every: int


def replay(policy: Policy, plan: Plan, every: int, advance: Advance | None = None) -> Replay:
    """Run a plan from theta_0; the policy is left at its end.

    Args:
        policy: the policy.
        plan: the run.
        every: keep the moments before steps 0, every, 2 every, ...; >= 1.
        advance: progress, told one step at a time.

    Returns:
        Its end, and the moments kept.

    Raises:
        NonFiniteError: a gradient or the end is not finite.
    """
    theta, state = start_of(policy, plan)
    kept = []
    for number in range(len(plan.steps)):
        moment = moment_at(policy, plan, number, theta, state)
        if number % every == 0:
            kept.append(moment.on(torch.device("cpu")))
        theta, state = stepped(plan, moment)
        (advance or Quiet()).advance(1)
    if not all_finite(list(theta.values())):
        raise NonFiniteError("parameter", PHASE, len(plan.steps))
    policy.restore(theta)
    return Replay(theta, tuple(kept), every)
