"""The collapse guard: retain perplexity is watched, and unlearning never costs more than the utility budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from u2a.config import GuardSection
from u2a.encoding import Encoded
from u2a.modeling import Params, Policy


@dataclass(frozen=True)
class GuardResult:
    """How the guard ended a run.

    Attributes:
        breached: the budget was exceeded during the run.
        ppl_start: perplexity of the watched rows at theta_0.
        ppl_end: their perplexity in the state the policy was left in.
        ppl_budget: largest perplexity allowed.
        steps_kept: optimiser steps in that state (the breaching ones too when it was scaled down).
        scale: factor put on the change (1 = the whole change).
    """

    breached: bool
    ppl_start: float
    ppl_end: float
    ppl_budget: float
    steps_kept: int
    scale: float


class CollapseGuard(TrainerCallback):
    """Stops a run that exceeds its budget of retain perplexity, and leaves the policy within it.

    Args:
        policy: the policy under training.
        rows: retain rows whose perplexity is watched, at least one.
        section: budget, interval and whether to line-search.

    Attributes:
        measured: retain perplexity by optimiser step.
    """

    def __init__(self, policy: Policy, rows: Sequence[Encoded], section: GuardSection) -> None:
        self.policy, self.rows, self.section = policy, list(rows)[: section.max_rows], section
        nll = -policy.reference_sums(self.rows).double().sum() / sum(row.n_answer for row in self.rows)
        self.ppl_start = float(torch.exp(nll))
        self.ppl_budget = self.ppl_start * (1.0 + section.ppl_budget_frac)
        self.measured: dict[int, float] = {}
        self.breached = False
        self._kept: tuple[int, Params] = (0, policy.theta0)

    def measure(self, step: int) -> bool:
        """Measure the current state and remember it when it is within the budget.

        Args:
            step: optimiser steps taken.

        Returns:
            True when the budget holds.
        """
        ppl = self._perplexity()
        self.measured[step] = ppl if math.isfinite(ppl) else math.inf
        if ppl <= self.ppl_budget:
            self._kept = (step, self.policy.snapshot())
            return True
        self.breached = True
        return False

    def state(self) -> dict[str, Any]:
        """Return what the guard has seen, for a checkpoint.

        Returns:
            Measurements, the breach, and the last state within the budget (None for the start).
        """
        step, kept = self._kept
        return {
            "measured": self.measured,
            "breached": self.breached,
            "kept_step": step,
            "kept": None if step == 0 else kept,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; what was measured is judged by the budget of now.

        Args:
            state: what :meth:`state` gave.
        """
        self.measured = dict(state["measured"])
        self.breached = any(not ppl <= self.ppl_budget for ppl in self.measured.values())
        step, kept = state["kept_step"], state["kept"]
        over = self.measured.get(step, math.inf) > self.ppl_budget
        self._kept = (0, self.policy.theta0) if kept is None or over else (step, kept)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Forget an earlier run, unless this one resumes it."""
        if state.global_step == 0:
            self.measured, self.breached, self._kept = {}, False, (0, self.policy.theta0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Measure at the interval and stop the run on a breach."""
        every = self.section.every_steps
        if every and state.global_step % every == 0 and not self.measure(state.global_step):
            control.should_training_stop = True

    def settle(self, steps: int) -> GuardResult:
        """After the run: measure the end; of a breach keep as large a change as the budget allows.

        That is the final change scaled down, or the last state seen within the budget, whichever changes the
        effective weights more.

        Args:
            steps: optimiser steps taken.

        Returns:
            The state the policy was left in; its perplexity is within the budget.
        """
        if steps not in self.measured:
            self.measure(steps)
        if self.measured[steps] <= self.ppl_budget:
            return GuardResult(self.breached, self.ppl_start, self.measured[steps], self.ppl_budget, steps, 1.0)
        scale = largest_scale(self._breaks_at, self.section.line_search)
        kept, scale = self._keep_larger(steps, scale)
        return GuardResult(True, self.ppl_start, self._perplexity(), self.ppl_budget, kept, scale)

    def _keep_larger(self, steps: int, scale: float) -> tuple[int, float]:
        """Leave the policy in the final state scaled by ``scale`` or in the kept one: (steps, scale) of that state."""
        final = self.policy.snapshot()
        scaled = scale**2 * float(self.policy.change_sq().detach()) if scale > 0.0 else 0.0
        kept, snapshot = self._kept
        self.policy.restore(snapshot)
        if scaled <= float(self.policy.change_sq().detach()) or math.isnan(scaled):
            return kept, 1.0
        self.policy.restore(final)
        self.policy.scale_change(scale)
        return steps, scale

    def _breaks_at(self, scale: float) -> bool:
        """Whether the scaled change exceeds the budget (a non-finite perplexity does)."""
        with self.policy.change_scaled(scale):
            return not self._perplexity() <= self.ppl_budget

    def _perplexity(self) -> float:
        """That of the first process, in all of them: last digits differ, and one that stops alone hangs the rest."""
        found = self.policy.perplexity(self.rows)
        if not (dist.is_available() and dist.is_initialized()):
            return found
        value = torch.tensor([found], dtype=torch.float64, device=self.policy.device)
        dist.broadcast(value, src=0)
        return float(value)


def largest_scale(breaks_at: Callable[[float], bool], search: bool = True, evaluations: int = 6) -> float:
    """Bisect for the largest scale in (0, 1) whose change stays within the budget.

    Args:
        breaks_at: tells whether a scale exceeds the budget; it must hold at 0 and break at 1. Between them the
            budget is taken to break once; where it breaks several times the result is still within the budget.
        search: False returns 0 at once.
        evaluations: calls of ``breaks_at``, which halve the interval each time.

    Returns:
        A scale at which the budget was seen to hold, at most 2**-evaluations under the border; 0 when none was.

    >>> largest_scale(lambda scale: scale > 0.4)
    0.390625
    """
    low, high = 0.0, 1.0
    for _ in range(evaluations if search else 0):
        middle = (low + high) / 2
        if breaks_at(middle):
            high = middle
        else:
            low = middle
    return low


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every entry is finite, with one synchronisation.

    Args:
        tensors: any number.

    Returns:
        True when none is NaN or infinite.
    """
    norms = [tensor.float().abs().sum() for tensor in tensors]
    return not norms or bool(torch.isfinite(torch.stack(norms)).all())
