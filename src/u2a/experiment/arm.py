"""What an arm of the experiment is: a way to change the policy that spends a given budget.

An arm is handed a :class:`~u2a.experiment.setting.Setting` (the data, the policy at theta_0, the reward model that
may be asked), a :class:`~u2a.experiment.meter.Meter` (it names what it spends compute on) and a :class:`Budget` (it
says after every optimiser step that it took one). It trains with a constant learning rate until nothing is left, so
that its state at every level of the budget is a point of one and the same run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from transformers import TrainerCallback

from u2a.experiment.meter import Meter
from u2a.experiment.setting import Setting
from u2a.modeling import Policy
from u2a.solution import Reliability
from u2a.types import StepLog

Track = Literal["none", "negatives", "pairs"]
UNTIL_SPENT = 100_000  # steps given to a trainer that the budget stops


class Budget(Protocol):
    """The compute an arm may spend, and who looks at the policy when a level of it has been passed."""

    def left(self) -> bool:
        """Whether less than the largest level has been spent.

        Returns:
            False when the arm must stop.
        """
        ...

    def reached(self, steps: int = 0) -> None:
        """Say that a step was taken, or that training is about to begin: the policy is in a state to be measured.

        Pauses the meter and measures the policy when one or several levels have been passed since the last call.

        Args:
            steps: optimiser steps taken so far, 0 before the first one.
        """
        ...


@dataclass(frozen=True)
class Selection:
    """What an arm chose to unlearn, and how far the choice can be trusted.

    Attributes:
        weights: weight by candidate id, positive, summing to 1; empty when it chose nothing.
        reliability: of the gains it ranked by, or None for an arm that ranks by something else.
        fallback: ``none``, or what it did instead of ranking (``random_k``: no signal; ``empty``: nothing promised a
            gain).
    """

    weights: dict[str, float]
    reliability: Reliability | None = None
    fallback: Literal["none", "random_k", "empty"] = "none"


@dataclass(frozen=True)
class Trained:
    """What an arm did.

    Attributes:
        steps: optimiser steps of the training (those of a selection are not counted).
        note: what a reader of the table must know, in one line; else empty.
        selection: what it selected, or None for an arm that selects nothing.
        history: logged steps.
        policy: another policy to be measured in place of the setting's (Retrain is another model), or None.
    """

    steps: int
    note: str = ""
    selection: Selection | None = None
    history: tuple[StepLog, ...] = ()
    policy: Policy | None = None


class Arm(Protocol):
    """A method, as a value."""

    @property
    def name(self) -> str:
        """Name of the method, as the protocol calls it."""
        ...

    @property
    def track(self) -> Track:
        """What it may read: ``negatives`` (candidates, PA pairs, retain rows), ``pairs`` (pairs alone)."""
        ...

    def train(self, setting: Setting, trial: Mapping[str, float], meter: Meter, budget: Budget) -> Trained:
        """Change the policy until the budget is spent; ``setting.policy`` is left at the trained parameters.

        Everything costly happens inside ``with meter.phase(...)``. The budget is told by :class:`BudgetCallback` in a
        trainer's callbacks, else by ``budget.reached(steps)`` before the first step and after every one.

        Args:
            setting: data, options and policy, which stands at theta_0.
            trial: hyperparameters by name, such as ``learning_rate`` or ``beta``; what is not there keeps the value
                of the options.
            meter: counts what is spent.
            budget: how much may be.

        Returns:
            What was done.

        Raises:
            U2AError: a number that is not finite, or options that cannot be used; the cell is listed as failed.
        """
        ...


class BudgetCallback(TrainerCallback):
    """Tells the budget of every step of a trainer of transformers or TRL, and stops it when nothing is left.

    Args:
        budget: the budget.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the start measured where the preparation has passed a level; with nothing left, ask for a stop."""
        self._budget.reached()
        self._stop_if_spent(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have a passed level measured, and stop at the first step past the largest one."""
        self._budget.reached(state.global_step)
        self._stop_if_spent(control)

    def _stop_if_spent(self, control: Any) -> None:
        if not self._budget.left():
            control.should_training_stop = True
