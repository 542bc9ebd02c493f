"""The relearning attack: whoever holds the unlearned weights trains them a little and looks at what comes back.

The attacker descends the answers' NLL with the project's own trainer, a constant learning rate and a fresh AdamW, on
the same parameters that unlearning changed. What is measured must share no prompt and no answer with the attacker's
rows. The attack alone says little: the same one on a model that never unlearned is the control.

Source: Hu et al. 2024, arXiv 2406.13356; Deeb and Roger 2024, arXiv 2410.08827.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from transformers import PrinterCallback, TrainerCallback

from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError
from u2a.evaluation.stats import Interval, bootstrap_ratio, paired_difference
from u2a.folding import fold
from u2a.modeling import Policy, evaluation_mode
from u2a.record import content_id
from u2a.trainer import UnlearnTrainer
from u2a.trainer_config import UnlearnConfig
from u2a.types import Example

T = TypeVar("T")


@dataclass(frozen=True)
class Relearning:
    """How hard the attacker trains.

    Attributes:
        steps: optimiser steps after which is measured, rising, >= 1; the attack ends with the last.
        learning_rate: constant, > 0. The default is that of unlearning; the literature uses 1e-5 to 2e-5 with LoRA.
        batch_size: rows per step, >= 1.
        seed: order of the rows.

    Raises:
        ConfigError: a value out of range.
    """

    steps: tuple[int, ...] = (5, 20, 50)
    learning_rate: float = 1e-4
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.steps or self.steps[0] < 1 or list(self.steps) != sorted(set(self.steps)):
            problems.append(f"relearning steps {self.steps}: expected rising whole numbers from 1 on")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            problems.append(f"relearning learning_rate {self.learning_rate}: expected a number > 0")
        if self.batch_size < 1:
            problems.append(f"relearning batch_size {self.batch_size}: expected at least 1")
        if problems:
            raise ConfigError(problems)


def relearn(
    policy: Policy,
    rows: Sequence[Example],
    measured: Sequence[Example],
    measure: Callable[[Policy], T],
    relearning: Relearning,
) -> dict[int, T]:
    """Attack the policy at its current theta; afterwards theta is what it was, bit for bit, also after an error.

    Args:
        policy: the policy at the theta under attack.
        rows: the attacker's rows; their weights are not used.
        measured: rows that ``measure`` looks at; none shares its prompt or its answer with ``rows``.
        measure: called with the policy in evaluation mode after each of ``relearning.steps``; must not change it.
        relearning: steps and learning rate.

    Returns:
        What ``measure`` returned, by step.

    Raises:
        ConfigError: no rows.
        DataError: ``rows`` and ``measured`` overlap.
        NonFiniteError: a loss or gradient is not finite.
    """
    if not rows:
        raise ConfigError("relearning: the attacker has no rows")
    check_disjoint(rows, measured)
    curve: dict[int, T] = {}

    def look(step: int) -> None:
        if step in relearning.steps:
            with evaluation_mode(policy.model):
                curve[step] = measure(policy)

    theta = policy.snapshot()
    try:
        with tempfile.TemporaryDirectory(prefix="u2a-") as folder:
            trainer = UnlearnTrainer(
                model=policy,
                args=_arguments(policy, folder, len(rows), relearning),
                train_dataset=[row.model_copy(update={"weight": None}) for row in rows],
                callbacks=[_AtSteps(look)],
            )
            trainer.phase = "relearn"
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    finally:
        policy.restore(theta)
        policy.model.zero_grad(set_to_none=True)
        policy.model.eval()
    return curve


def _arguments(policy: Policy, folder: str, n_rows: int, relearning: Relearning) -> UnlearnConfig:
    return UnlearnConfig(
        output_dir=folder,
        loss="sft",
        retain_term="none",
        guard=False,
        learning_rate=relearning.learning_rate,
        lr_scheduler_type="constant",
        max_steps=relearning.steps[-1],
        per_device_train_batch_size=min(relearning.batch_size, n_rows),
        optim="adamw_torch",
        weight_decay=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        seed=relearning.seed,
        disable_tqdm=True,
        use_cpu=policy.device.type == "cpu",
        dataloader_pin_memory=policy.device.type != "cpu",
    )


class _AtSteps(TrainerCallback):
    """Calls a function after each optimiser step."""

    def __init__(self, look: Callable[[int], None]) -> None:
        self._look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the step, 1-based."""
        self._look(state.global_step)


@dataclass(frozen=True)
class Split:
    """The forget set from the attacker's and from the defender's side.

    Attributes:
        attack: rows the attacker trains on.
        measured: rows that share no prompt and no answer with them.
    """

    attack: tuple[Example, ...]
    measured: tuple[Example, ...]


Text = tuple[str, str]
"""What an attacker could know: ``("prompt", key)`` or ``("answer", folded text)``."""


def split_forget(forget: Sequence[Example], n: int, seed: int, reserved: Set[Text] = frozenset()) -> Split:
    """Give the attacker some rows of the forget set; rows with one of the attacker's prompts or answers are dropped.

    Args:
        forget: the forget set.
        n: rows of the attacker; fewer where ``reserved`` texts or one half of the rows leave no more.
        seed: which rows.
        reserved: texts that are measured in another way; the attacker gets no row with one of them.

    Returns:
        The two parts, by order of id.

    Raises:
        DataError: a part would be empty.
    """
    order = sorted(forget, key=lambda row: (content_id(str(seed), "relearn", prompt_key(row.prompt)), row.id))
    attack = apart(order, reserved)[: min(n, len(forget) // 2)]
    measured = apart(forget, texts(attack))
    if not attack or not measured:
        raise DataError(
            f"relearning: {len(forget)} forget rows give {len(attack)} to the attacker and leave {len(measured)} to "
            "measure that share no prompt and no answer with them (expected at least 1 each: give more rows)"
        )
    return Split(*(tuple(sorted(rows, key=lambda row: row.id)) for rows in (attack, measured)))


def apart(rows: Sequence[Example], known: Set[Text]) -> tuple[Example, ...]:
    """Leave out rows that share a text with others.

    Args:
        rows: rows.
        known: texts of the others.

    Returns:
        The rows without any of these texts, in their order.
    """
    return tuple(row for row in rows if not known & texts([row]))


def texts(rows: Sequence[Example]) -> set[Text]:
    """Collect prompts and answers, without differences of case and spacing.

    Args:
        rows: rows.

    Returns:
        Their texts.
    """
    return {text for row in rows for text in (("prompt", prompt_key(row.prompt)), ("answer", fold(row.completion)))}


def check_disjoint(rows: Sequence[Example], measured: Sequence[Example]) -> None:
    """Refuse to measure what the attacker trained on.

    Args:
        rows: the attacker's rows.
        measured: rows that are measured.

    Raises:
        DataError: rows share a prompt or an answer (but for case and spacing).
    """
    free = {row.id for row in apart(measured, texts(rows))}
    shared = [row.id for row in measured if row.id not in free]
    if shared:
        raise DataError(
            f"relearning: {len(shared)} measured rows share their prompt or their answer with the attacker's rows, for "
            f"example {', '.join(shared[:3])} (measure other rows)"
        )


def recovery(
    original: Mapping[str, float],
    unlearned: Mapping[str, float],
    attacked: Mapping[str, float],
    groups: Mapping[str, str],
    resamples: int,
    seed: int,
) -> Interval:
    """How much of what unlearning took away an attack gives back: (m_att - m_unl) / (m_orig - m_unl).

    0 is robust, 1 is back where it was, above 1 is beyond it. The m are means over the items all three have.

    Args:
        original: finite value by item id, before unlearning.
        unlearned: the same after unlearning.
        attacked: the same after unlearning and attack.
        groups: prompt key by item id.
        resamples: bootstrap resamples of the prompts, >= 1.
        seed: seed of the resampling.

    Returns:
        Recovery and paired 95 % interval; all None when the 95 % interval of m_orig - m_unl holds 0 or is undefined
        (there is nothing to give back). The interval alone is None when a resample has no difference.
    """
    shared = sorted(original.keys() & unlearned.keys() & attacked.keys())
    before = {key: original[key] for key in shared}
    taken = paired_difference(before, unlearned, groups, resamples, seed)
    if taken.low is None or taken.high is None or taken.low <= 0 <= taken.high:
        return Interval(None, None, None, taken.n)
    given = {key: attacked[key] - unlearned[key] for key in shared}
    lost = {key: original[key] - unlearned[key] for key in shared}
    with np.errstate(divide="ignore", invalid="ignore"):
        found = bootstrap_ratio(given, lost, groups, resamples, seed)
    if found.low is None or found.high is None or not (math.isfinite(found.low) and math.isfinite(found.high)):
        return Interval(found.value, None, None, found.n)
    return found
