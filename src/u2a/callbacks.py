"""Callbacks of the trainer: where the stream stands, which gradients are refused, and what the display is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from u2a.errors import NonFiniteError
from u2a.guard import all_finite
from u2a.progress import Advance
from u2a.stream import StreamSampler


class StepReporter(TrainerCallback):
    """Reports each optimiser step to a progress display.

    Args:
        advance: the display.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report one step."""
        self._advance.advance(1)


class FiniteGradients(TrainerCallback):
    """Refuses an update with a NaN or infinite gradient.

    With float16 an infinite gradient is how the gradient scaler finds its scale, and it leaves such a step out
    itself; there nothing is checked.

    Args:
        where: tells the phase and the ids of the samples of the step, for the message.
    """

    def __init__(self, where: Callable[[], tuple[str, list[str]]]) -> None:
        self._where = where

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients of one step."""
        if args.fp16:
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not all_finite(gradients):
            phase, ids = self._where()
            raise NonFiniteError("gradient", phase, state.global_step, ids)


class StreamPosition(TrainerCallback):
    """Tells the sampler its epoch at the start of every epoch.

    In a distributed run that is resumed within an epoch the sampler lies below several wrappers, which do not pass
    the epoch on.

    Args:
        sampler: the stream's sampler.
        rows_per_step: rows of one optimiser step, all processes together.
    """

    def __init__(self, sampler: StreamSampler, rows_per_step: int) -> None:
        self._sampler, self._rows_per_step = sampler, rows_per_step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compute the epoch from the steps taken."""
        self._sampler.set_epoch(state.global_step * self._rows_per_step // self._sampler.epoch_length)
