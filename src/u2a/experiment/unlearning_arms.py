"""Arms of the negatives track: all unlearn by the same trainer, and differ in what they choose and how strongly.

``original`` does nothing and ``retrain`` never saw the candidates; every other arm is a rule that gives the candidates
weights, and then unlearns them from theta_0 with the loss of its options until the budget is spent. The collapse guard
is off in all arms, so that the state at each budget level is what the method itself leads to.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError
from transformers import PrinterCallback

from u2a.bilevel.outcome import random_weights
from u2a.bilevel.outer_problem import OuterProblem
from u2a.bilevel.solve import n_to_select, score, solve
from u2a.config import UnlearnSection
from u2a.errors import ConfigError
from u2a.evaluation.expected_reward import sampled_reward
from u2a.experiment.arm import UNTIL_SPENT, Budget, BudgetCallback, Selection, Track, Trained
from u2a.experiment.by_reward import below_midpoint, lowest, prefiltered, rewards_of
from u2a.experiment.meter import Meter
from u2a.experiment.setting import Setting
from u2a.record import derive_seed
from u2a.reward.cluster import candidate_clusters
from u2a.solution import ScoreTable
from u2a.types import Example, Pair, StepLog
from u2a.unlearn import InnerProblem, InnerSolver, trainer_of, weighted_rows

Choice = Callable[[Setting, InnerProblem, Meter], tuple[Selection, str]]


@dataclass(frozen=True)
class Original:
    """The policy as it is at the start."""

    name: str = "original"
    track: Track = "none"

    def train(self, setting: Setting, trial: Mapping[str, float], meter: Meter, budget: Budget) -> Trained:
        """Do nothing; see :meth:`u2a.experiment.arm.Arm.train`."""
        return Trained(0)


@dataclass(frozen=True)
class Retrain:
    """The base model fine-tuned anew without the candidates: what unlearning them should come near to."""

    name: str = "retrain"
    track: Track = "none"

    def train(self, setting: Setting, trial: Mapping[str, float], meter: Meter, budget: Budget) -> Trained:
        """Fine-tune; see :meth:`u2a.experiment.arm.Arm.train`. No budget stops it."""
        if setting.retrained is None:
            raise ConfigError("arm retrain: needs finetune.enabled (without it the start never saw the candidates)")
        with meter.phase("train"):
            policy = setting.retrained()
        return Trained(0, "another model, trained without the candidates and without a budget", policy=policy)


@dataclass(frozen=True)
class Weighted:
    """Weighted unlearning of what a rule chooses.

    Attributes:
        name: of the rule.
        choose: gives the weights, and a line for the table; it is charged for what it computes.
        track: what the rule may read.
    """

    name: str
    choose: Choice
    track: Track = "negatives"

    def train(self, setting: Setting, trial: Mapping[str, float], meter: Meter, budget: Budget) -> Trained:
        """Choose, then unlearn from theta_0; see :meth:`u2a.experiment.arm.Arm.train`."""
        problem = inner_problem(setting, tuned(setting.config.unlearn, trial))
        selection, note = self.choose(setting, problem, meter)
        setting.policy.reset()
        budget.reached()
        if not selection.weights or not budget.left():
            spent = "the choice alone spent the budget" if selection.weights else "nothing chosen"
            return Trained(0, "; ".join(text for text in (note, spent) if text), selection)
        steps, history = unlearn_until_spent(setting, problem, selection.weights, meter, budget)
        return Trained(steps, note, selection, history)


def tuned(section: UnlearnSection, trial: Mapping[str, float]) -> UnlearnSection:
    """Put a trial's numbers into the options of unlearning.

    Args:
        section: the options.
        trial: values by name of option.

    Returns:
        Changed options.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """
    numbers = {name for name, value in section.model_dump().items() if isinstance(value, int | float)}
    unknown = sorted(set(trial) - numbers)
    if unknown:
        raise ConfigError(f"trial: {unknown[0]!r} is no number of the section unlearn ({', '.join(sorted(numbers))})")
    try:
        return UnlearnSection.model_validate(section.model_dump() | dict(trial))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"trial: {'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']}") from None


def inner_problem(setting: Setting, section: UnlearnSection) -> InnerProblem:
    """The inner problem on all candidates, without the guard.

    Args:
        setting: data and seed.
        section: loss and optimiser.

    Returns:
        The problem; the order of samples depends on the seed alone.
    """
    rows, seed = setting.partition.retain_parts().train, derive_seed(setting.seed, "unlearn")
    return InnerProblem(setting.partition.forget, rows, (), section, setting.config.guard, seed)


def outer_problem(setting: Setting, problem: InnerProblem) -> OuterProblem:
    """The outer problem on the PA pairs.

    Args:
        setting: pairs, options and seed.
        problem: the candidates.

    Returns:
        The problem.

    Raises:
        ConfigError: the objective needs a reward model and there is none.
    """
    section, seed, objective = setting.config.solve, derive_seed(setting.seed, "solve"), None
    if section.objective == "reward":
        if setting.selecting_reward is None:
            raise ConfigError("solve.objective: reward conflicts with reward.model: none (set a reward model)")
        sizes = section.reward_samples, section.reward_max_new_tokens
        objective = sampled_reward(setting.selecting_reward, *sizes, derive_seed(setting.seed, "J"))
    clusters = candidate_clusters(section, problem.forget, seed)
    return OuterProblem(setting.partition.preference, section, objective, seed, None, clusters)


def unlearn_until_spent(
    setting: Setting, problem: InnerProblem, weights: Mapping[str, float], meter: Meter, budget: Budget
) -> tuple[int, tuple[StepLog, ...]]:
    """Unlearn from theta_0 with a constant learning rate until nothing of the budget is left.

    Args:
        setting: gives the policy, which is left as trained.
        problem: retain rows and options.
        weights: omega by candidate id.
        meter: counts the reference and the training.
        budget: stops it.

    Returns:
        Steps taken and what was logged of them.
    """
    endless = problem.section.model_copy(update={"max_steps": UNTIL_SPENT, "lr_scheduler": "constant", "save_steps": 0})
    problem = replace(problem, section=endless.model_copy(update={"warmup_ratio": 0.0}))
    policy = setting.policy
    policy.reset()
    with tempfile.TemporaryDirectory(prefix="u2a-") as folder:
        with meter.phase("reference"):
            rows = weighted_rows(problem.forget, weights)
            trainer = trainer_of(policy, problem, rows, Path(folder), [BudgetCallback(budget)])
        trainer.phase = "train"
        trainer.remove_callback(PrinterCallback)
        with meter.phase("train"):
            trainer.train()
    policy.model.eval()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    history = tuple(
        StepLog(step=int(log["step"]), loss=_finite(log["loss"]), grad_norm=_finite(log.get("grad_norm")))
        for log in logs
    )
    return trainer.state.global_step, history


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- rules ---------------------------------------------------------------------------------------


def _uniform(ids: Sequence[str]) -> Selection:
    return Selection(dict.fromkeys(ids, 1.0 / len(ids)))


def _size(setting: Setting, problem: InnerProblem) -> int:
    """k, the same for every rule that chooses."""
    return n_to_select(problem, OuterProblem((), setting.config.solve))


def choose_all(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """All candidates with equal weights."""
    return _uniform([row.id for row in problem.forget]), ""


def choose_random(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """A random draw of k candidates with equal weights."""
    k = _size(setting, problem)
    return Selection(random_weights(problem, k, derive_seed(setting.seed, "random_k arm"))), ""


def choose_random_late(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """The draw of :func:`choose_random`, charged for a scoring that it does not read: as few steps as u2a has."""
    with meter.phase("select"):
        score(setting.policy, problem, outer_problem(setting, problem), setting.console)
    return choose_random(setting, problem, meter)


def choose_lowest_reward(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """The k candidates of lowest reward under the selecting reward model."""
    with meter.phase("reward"):
        return _uniform(lowest(rewards_of(setting, problem.forget), _size(setting, problem))), ""


def choose_below_midpoint(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """All candidates whose reward lies below the PA set's midpoint: how many is told by the rewards, too."""
    with meter.phase("reward"):
        return _uniform(below_midpoint(setting, rewards_of(setting, problem.forget))), ""


def choose_lowest_reward_as_many(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """The lowest rewards, as many as u2a takes (a control: finding out how many is not charged)."""
    with meter.paused():
        size = len(choose_by_u2a(setting, problem, Meter())[0].weights)
        setting.policy.reset()
        setting.policy.forget_reference_sums()  # this arm pays for its own
    with meter.phase("reward"):
        return _uniform(lowest(rewards_of(setting, problem.forget), size)), ""


def choose_highest_loss(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """The k candidates with the highest NLL per answer token at theta_0: those the model knows least."""
    with meter.phase("select"):
        losses = losses_of(setting, problem.forget)
    return _uniform(lowest({name: -value for name, value in losses.items()}, _size(setting, problem))), ""


def losses_of(setting: Setting, rows: Sequence[Example]) -> dict[str, float]:
    """NLL per answer token at the policy's current theta.

    Args:
        setting: gives the policy.
        rows: the answers.

    Returns:
        Nats per token by id.
    """
    encoded = [setting.policy.encoder.encode(row.prompt, row.completion, row.source) for row in rows]
    sums = setting.policy.answer_sums(encoded).tolist()
    return {row.id: -value / item.n_answer for row, item, value in zip(rows, encoded, sums, strict=True)}


def choose_top(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """The k candidates of largest gain with equal weights, whatever the noise of the gains."""
    return _ranked(setting, problem, meter, sign=-1.0)


def choose_bottom(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """The k candidates of smallest gain with equal weights: the reverse of the above, as a control."""
    return _ranked(setting, problem, meter, sign=1.0)


def _ranked(setting: Setting, problem: InnerProblem, meter: Meter, sign: float) -> tuple[Selection, str]:
    k = _size(setting, problem)
    with meter.phase("select"):
        table = score(setting.policy, problem, outer_problem(setting, problem), setting.console)
    gains = {row.id: sign * row.gain for row in table.rows}
    return replace(_uniform(lowest(gains, k)), reliability=table.reliability), ""


def choose_least_damage(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """The k candidates whose unlearning is predicted to cost retain rows least, with equal weights.

    After GUARD (arXiv 2506.10946), which weighs candidates by the inner product of their gradient with that of the
    retain data. Departs: a selection of k, with the first-order gain of :func:`u2a.bilevel.solve.score` for
    J = -retain loss and the adjoint Identity, after the usual warm-up.

    Args:
        setting: options, policy and seed.
        problem: candidates and retain rows.
        meter: charged for the scoring.

    Returns:
        The selection, and no note.
    """
    k = _size(setting, problem)
    with meter.phase("select"):
        table = retain_gains(setting, problem)
    return replace(_uniform(lowest({row.id: -row.gain for row in table.rows}, k)), reliability=table.reliability), ""


def retain_gains(setting: Setting, problem: InnerProblem) -> ScoreTable:
    """Gains with J = mean log-likelihood per token of the retain rows, adjoint Identity.

    Args:
        setting: options, policy and seed.
        problem: candidates and retain rows.

    Returns:
        The gains; the policy is left after the warm-up.

    Raises:
        ConfigError: there are no retain rows.
    """
    if not problem.retain:
        raise ConfigError("arm guard_k: needs retain rows (set data.retain)")
    plain = {"objective": "nll", "adjoint": "identity", "pair_clip": 1.0, "remove_common": False, "clusters": 0}
    section = setting.config.solve.model_copy(update={**plain, "damage_weight": 0.0})
    rows = [
        Pair(id=row.id, prompt=row.prompt, chosen=row.completion, rejected=row.completion, source=row.source)
        for row in problem.retain
    ]
    outer = OuterProblem(tuple(rows), section, None, derive_seed(setting.seed, "solve"))
    return score(setting.policy, problem, outer, setting.console)


def choose_by_u2a(setting: Setting, problem: InnerProblem, meter: Meter) -> tuple[Selection, str]:
    """Who and how strongly, by the bi-level solver under the options of the section ``solve``."""
    k = _size(setting, problem)
    kept = prefiltered(setting, problem, meter)
    with meter.phase("select"):
        outer = outer_problem(setting, kept)
        options = outer.section.model_copy(update={"n_selected": min(k, len(kept.forget))})
        solver = InnerSolver(setting.policy)
        solution = solve(solver, kept, replace(outer, section=options), setting.console)
    note = "" if solution.fallback == "none" else solution.stopped
    return Selection(solution.weights, solution.scores.reliability, solution.fallback), note


UNLEARNING_ARMS: dict[str, Original | Retrain | Weighted] = {
    arm.name: arm
    for arm in (
        Original(),
        Retrain(),
        Weighted("full", choose_all),
        Weighted("random_k", choose_random),
        Weighted("random_k_late", choose_random_late),
        Weighted("lowest_reward_k", choose_lowest_reward),
        Weighted("lowest_reward_as_u2a", choose_lowest_reward_as_many),
        Weighted("below_midpoint", choose_below_midpoint),
        Weighted("highest_loss_k", choose_highest_loss),
        Weighted("top_k", choose_top),
        Weighted("bottom_k", choose_bottom),
        Weighted("guard_k", choose_least_damage),
        Weighted("u2a", choose_by_u2a),
    )
}
