"""Stage 4 and the inner problem: one function runs weighted unlearning, whoever asks for it.

The warm-up, every round of selection, the final run and every control go through :func:`unlearn`, so that arms
differ in their weights alone.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from u2a.callbacks import StepReporter
from u2a.checkpoint import newest_whole
from u2a.config import GuardSection, UnlearnSection
from u2a.errors import ConfigError, DataError
from u2a.guard import CollapseGuard, GuardResult
from u2a.losses import UnlearningLoss, make_loss
from u2a.modeling import Params, Policy
from u2a.progress import Advance, Quiet
from u2a.record import content_id, writing
from u2a.trainer import UnlearnTrainer
from u2a.trainer_config import UnlearnConfig
from u2a.types import Example, StepLog, UnlearnResult


@dataclass(frozen=True)
class InnerProblem:
    """The inner problem theta*(omega) = argmin sum_i omega_i l_i(theta) + lambda L_R(theta), without omega.

    Attributes:
        forget: all candidates.
        retain: rows of the retain term.
        guard_rows: rows whose perplexity the collapse guard watches; none switches it off.
        section: loss, retain term and optimiser.
        guard: the guard's options.
        seed: seed of the order of samples.

    Raises:
        DataError: candidates with one id, which weights could not tell apart.
    """

    forget: tuple[Example, ...]
    retain: tuple[Example, ...] = ()
    guard_rows: tuple[Example, ...] = ()
    section: UnlearnSection = field(default_factory=UnlearnSection)
    guard: GuardSection = field(default_factory=GuardSection)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse repeated candidates."""
        repeated = [name for name, count in Counter(row.id for row in self.forget).items() if count > 1]
        if repeated:
            raise DataError(
                f"forget: {len(repeated)} ids stand more than once, such as {repeated[0]!r} "
                "(remove repeated rows, as u2a.partition does)"
            )

    @property
    def loss(self) -> UnlearningLoss:
        """The per-sample loss."""
        return make_loss(self.section.loss, self.section.npo_beta)

    @property
    def loss_text(self) -> str:
        """Loss and retain term as one name for records."""
        term = self.section.retain_term
        return self.loss.name + ("" if term == "none" else f" + {self.section.retain_weight:g} {term}")

    def uniform(self) -> dict[str, float]:
        """Equal weights on all candidates, summing to 1."""
        return dict.fromkeys((row.id for row in self.forget), 1.0 / len(self.forget))

    def shortened(self, steps: int) -> InnerProblem:
        """The same problem solved with fewer steps at the full learning rate, and without the guard (warm-up).

        Args:
            steps: optimiser steps, >= 1.

        Returns:
            A changed copy.
        """
        constant = {"max_steps": steps, "lr_scheduler": "constant", "warmup_ratio": 0.0}
        return replace(self, section=self.section.model_copy(update=constant), guard_rows=())


def unlearn(
    policy: Policy,
    problem: InnerProblem,
    weights: Mapping[str, float],
    arm: str = "u2a",
    output_dir: str | Path | None = None,
    advance: Advance | None = None,
) -> UnlearnResult:
    """Solve the inner problem from theta_0 by ``section.max_steps`` steps; the policy is left at theta*(omega).

    Args:
        policy: the policy; it is reset to theta_0 first.
        problem: candidates, retain rows and options.
        weights: omega by candidate id, >= 0; zero or absent = not in the set. Their scale does not matter.
        arm: name for the record and for error messages.
        output_dir: checkpoints go (``section.save_minutes``, ``section.save_steps``) into a folder in it that is named
            after policy, problem and weights; a run of the same policy and problem found there is gone on with.
        advance: progress, told one step at a time.

    Returns:
        What was done; its ``retain_ppl_end`` is within the budget.

    Raises:
        ConfigError: weights that are negative, not finite, or of unknown ids; no positive weight.
        NonFiniteError: a loss or gradient is not finite.
    """
    rows = weighted_rows(problem.forget, weights)
    start = time.monotonic()
    policy.reset()
    encode = policy.encoder.encode
    look_up_references(policy, problem)
    guard = None
    if problem.guard_rows:
        guard = CollapseGuard(
            policy, [encode(r.prompt, r.completion, r.source) for r in problem.guard_rows], problem.guard
        )
    with _folder(None if output_dir is None else Path(output_dir) / run_id(policy, problem, rows)) as folder:
        callbacks = [StepReporter(advance or Quiet()), *([guard] if guard else [])]
        trainer = trainer_of(policy, problem if output_dir else _unsaved(problem), rows, folder, callbacks)
        trainer.phase = arm
        trainer.remove_callback(PrinterCallback)
        last = newest_whole(folder)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        steps = trainer.state.global_step
        settled = guard.settle(steps) if guard else None
        return UnlearnResult(
            arm=arm,
            loss=problem.loss_text,
            n_samples=len(rows),
            steps=steps,
            history=_history(trainer, guard),
            seconds=time.monotonic() - start,
            **_settled_fields(settled, steps),
        )


def look_up_references(policy: Policy, problem: InnerProblem) -> None:
    """Compute the reference log-probabilities of all candidates, where the loss needs them and they are not known.

    In its last bits a sum depends on the rows that are in its batch. Whoever first needs some of them therefore asks
    for all, so that a resumed process, which needs others first, finds the same numbers.

    Args:
        policy: the policy, which keeps them.
        problem: the candidates and their loss.
    """
    if problem.loss.needs_reference:
        rows = sorted(problem.forget, key=lambda row: row.id)
        policy.reference_sums([policy.encoder.encode(row.prompt, row.completion, row.source) for row in rows])


@dataclass
class InnerSolver:
    """Solves inner problems, and does not solve the very same one twice in a row.

    The last round of selection and the final run are often the same problem; the second time the stored solution is
    restored.

    Attributes:
        policy: the policy.
    """

    policy: Policy
    _key: tuple[Any, ...] | None = None
    _result: UnlearnResult | None = None
    _theta: Params = field(default_factory=dict)

    def __call__(
        self,
        problem: InnerProblem,
        weights: Mapping[str, float],
        arm: str = "u2a",
        output_dir: str | Path | None = None,
        advance: Advance | None = None,
    ) -> UnlearnResult:
        """Solve one inner problem; see :func:`unlearn`.

        Args:
            problem: candidates, retain rows and options.
            weights: omega by candidate id.
            arm: name for the record.
            output_dir: where checkpoints go.
            advance: progress.

        Returns:
            What was done; the policy is left at theta*(omega).
        """
        if self._result is not None and self._key == _solved(problem, weights):
            self.policy.restore(self._theta)
            return self._result.model_copy(update={"arm": arm})
        result = unlearn(self.policy, problem, weights, arm, output_dir, advance)
        self.remember(problem, weights, result)
        return result

    def remember(self, problem: InnerProblem, weights: Mapping[str, float], result: UnlearnResult) -> None:
        """Note that the policy stands at the solution of a problem.

        Args:
            problem: the problem.
            weights: omega by candidate id.
            result: what solving it did.
        """
        self._key, self._result, self._theta = _solved(problem, weights), result, self.policy.snapshot()


def _solved(problem: InnerProblem, weights: Mapping[str, float]) -> tuple[Any, ...]:
    """What two runs must have in common to be the same."""
    return problem, tuple(sorted((name, weight) for name, weight in weights.items() if weight > 0))


def weighted_rows(forget: tuple[Example, ...], weights: Mapping[str, float]) -> tuple[Example, ...]:
    """Return the candidates of positive weight, each carrying its weight.

    Args:
        forget: candidates.
        weights: weight by id.

    Returns:
        Changed copies sorted by id, so that a run does not depend on the order in which candidates were given.

    Raises:
        ConfigError: an id that is no candidate, a negative or non-finite weight, or no positive weight.
    """
    unknown = sorted(set(weights) - {row.id for row in forget})
    if unknown:
        raise ConfigError(f"weights: {unknown[0]!r} is no candidate ({len(unknown)} unknown ids; use Example.id)")
    bad = [name for name, weight in weights.items() if not 0.0 <= weight < float("inf")]
    if bad:
        raise ConfigError(f"weights: {bad[0]!r} has weight {weights[bad[0]]} (expected a finite number >= 0)")
    chosen = sorted((row for row in forget if weights.get(row.id, 0.0) > 0.0), key=lambda row: row.id)
    rows = tuple(row.model_copy(update={"weight": weights[row.id]}) for row in chosen)
    if not rows:
        raise ConfigError("weights: no candidate has positive weight (unlearning nothing changes nothing)")
    return rows


def trainer_of(
    policy: Policy,
    problem: InnerProblem,
    rows: tuple[Example, ...],
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> UnlearnTrainer:
    """Make the trainer of one run; whatever wants to know what a run does, asks this trainer.

    Args:
        policy: the policy; its theta is not changed.
        problem: retain rows and options.
        rows: candidates that carry their weights, as :func:`weighted_rows` returns them.
        folder: its output directory.
        callbacks: further callbacks.

    Returns:
        The trainer, ready to train.
    """
    with writing(folder):  # the base class makes the folder
        return UnlearnTrainer(
            model=policy,
            args=_arguments(problem, policy, folder, len(rows)),
            train_dataset=rows,
            retain_dataset=problem.retain,
            callbacks=list(callbacks),
        )


def _arguments(problem: InnerProblem, policy: Policy, folder: Path, n_rows: int) -> UnlearnConfig:
    section = problem.section
    return UnlearnConfig(
        output_dir=str(folder),
        loss=section.loss,
        npo_beta=section.npo_beta,
        retain_term=section.retain_term,
        retain_weight=section.retain_weight,
        retain_batch_size=section.retain_batch_size,
        guard=False,  # the caller's guard watches rows that are not trained on
        learning_rate=section.learning_rate,
        lr_scheduler_type="constant_with_warmup" if section.lr_scheduler == "constant" else section.lr_scheduler,
        warmup_steps=warmup_steps(section),  # "constant" alone would ignore them
        max_steps=section.max_steps,
        per_device_train_batch_size=min(section.batch_size, n_rows),
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        max_grad_norm=section.max_grad_norm,
        optim="sgd" if section.optimizer == "sgd" else "adamw_torch",
        adam_epsilon=section.adam_epsilon,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="steps" if section.save_steps else "no",
        save_steps=section.save_steps or 500,
        save_minutes=section.save_minutes,
        save_total_limit=2,
        report_to="none",  # the run's tracker is told what metrics.jsonl is told
        seed=problem.seed,
        disable_tqdm=True,
        use_cpu=policy.device.type == "cpu",
        dataloader_pin_memory=policy.device.type != "cpu",
    )


def warmup_steps(section: UnlearnSection) -> int:
    """Steps over which the learning rate rises from 0.

    Args:
        section: ``warmup_ratio`` and ``max_steps``.

    Returns:
        ceil(ratio x steps); none in a run of one step, which would have rate 0.
    """
    return math.ceil(section.warmup_ratio * section.max_steps) if section.max_steps > 1 else 0


def problem_id(problem: InnerProblem, rows: tuple[Example, ...]) -> str:
    """Content id of an inner problem and its weights.

    Args:
        problem: retain rows and options.
        rows: candidates that carry their weights.

    Returns:
        The id; how often checkpoints are saved does not change it.
    """
    sets = (rows, problem.retain, problem.guard_rows)
    texts = [content_id(*(row.model_dump_json() for row in each)) for each in sets]
    section = problem.section.model_dump_json(exclude={"report_to", "save_minutes", "save_steps"})
    options = (section, problem.guard.model_dump_json(), str(problem.seed))
    return content_id(*texts, *options)


def run_id(policy: Policy, problem: InnerProblem, rows: tuple[Example, ...]) -> str:
    """Content id of a run of unlearning.

    Args:
        policy: the policy.
        problem: retain rows and options.
        rows: candidates that carry their weights.

    Returns:
        The id; another model, adapter, chat template or longest sequence has another one.
    """
    return content_id(policy.identity, policy.encoder.identity, problem_id(problem, rows))


def _unsaved(problem: InnerProblem) -> InnerProblem:
    """The same problem, solved without checkpoints."""
    return replace(problem, section=problem.section.model_copy(update={"save_minutes": 0.0, "save_steps": 0}))


def _settled_fields(settled: GuardResult | None, steps: int) -> dict[str, Any]:
    """The guard's part of the record."""
    if settled is None:
        return {"steps_kept": steps}
    return {
        "steps_kept": settled.steps_kept,
        "breached": settled.breached,
        "retain_ppl_start": settled.ppl_start,
        "retain_ppl_end": settled.ppl_end,
        "ppl_budget": settled.ppl_budget,
        "scale": settled.scale,
    }


def _history(trainer: UnlearnTrainer, guard: CollapseGuard | None) -> tuple[StepLog, ...]:
    """Logged steps; an infinite perplexity (a collapse) is recorded as missing, the breach says it."""
    measured = {} if guard is None else {step: ppl for step, ppl in guard.measured.items() if ppl < float("inf")}
    logs = {int(entry["step"]): entry for entry in trainer.state.log_history if "loss" in entry}
    return tuple(
        StepLog(
            step=step,
            loss=logs.get(step, {}).get("loss"),
            grad_norm=logs.get(step, {}).get("grad_norm"),
            retain_ppl=measured.get(step),
        )
        for step in sorted(set(logs) | set(measured))
    )


@contextmanager
def _folder(output_dir: Path | None) -> Iterator[Path]:
    """The given directory, or one that vanishes afterwards."""
    if output_dir is not None:
        yield output_dir
        return
    with tempfile.TemporaryDirectory(prefix="u2a-") as name:
        yield Path(name)
