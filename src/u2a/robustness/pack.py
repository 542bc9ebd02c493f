"""The robustness pack: every arm measured as it is, quantised, under changed prompts, and after relearning.

All arms meet the same conditions on the same rows and prompts; the table of them is :mod:`u2a.robustness.table`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError
from u2a.modeling import Params, Policy
from u2a.progress import Console
from u2a.record import derive_seed
from u2a.robustness.attacks import PROMPT_ATTACKS, PromptAttack, Turns
from u2a.robustness.quantise import GROUP, SCHEMES, Scheme, quantised, quantised_frac
from u2a.robustness.records import NONE, RobustnessTable
from u2a.robustness.relearn import Relearning, apart, relearn, split_forget, texts
from u2a.robustness.table import Measured, table_rows
from u2a.types import Example

Values = Mapping[str, Mapping[str, float]]
"""Value by item id, by metric name."""
RowMeasure = Callable[[Policy, Sequence[Example]], Values]
"""Likelihood-based: values by the rows' ids at the current theta."""
AnswerMeasure = Callable[[Policy, Mapping[str, Turns]], Values]
"""Answers-based: values by the prompts' ids. The turns may be changed by an attack; judge against the originals."""

Found = dict[str, dict[str, dict[str, float]]]
"""Value by item id, by metric name, by condition."""
Keep = Callable[[str, Callable[[], Found]], Found]
"""Measures, or reads an earlier measurement of this name back."""


@dataclass(frozen=True)
class RobustnessOptions:
    """What is tried.

    Attributes:
        schemes: quantisations.
        group: weights that share one scale, >= 1.
        attacks: prompt attacks, of different names.
        relearning: steps and learning rate of the relearning attack; None leaves it out.
        attack_rows: rows of each relearning attack, >= 1.
        measured_rows: rows of each set that are measured, >= 1.
        bootstrap: resamples, >= 1.
        seed: which forget rows the attacker gets, and the bootstrap (``relearning.seed`` is the attacker's order).

    Raises:
        ConfigError: a value out of range, or two attacks of one name.
    """

    schemes: tuple[Scheme, ...] = SCHEMES
    group: int = GROUP
    attacks: tuple[PromptAttack, ...] = PROMPT_ATTACKS
    relearning: Relearning | None = Relearning()
    attack_rows: int = 20
    measured_rows: int = 100
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"robustness {name}: {value}, expected at least 1"
            for name, value in (
                ("group", self.group),
                ("attack_rows", self.attack_rows),
                ("measured_rows", self.measured_rows),
                ("bootstrap", self.bootstrap),
            )
            if value < 1
        ]
        names = [attack.name for attack in self.attacks]
        if len(set(names)) < len(names) or len(set(self.schemes)) < len(self.schemes):
            problems.append("robustness: two attacks or schemes of one name (give each a name of its own)")
        problems += [f"robustness scheme {name!r}: unknown" for name in self.schemes if name not in SCHEMES]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class RobustnessData:
    """Whom and on what.

    Attributes:
        arms: trainable parameters by arm (as ``Policy.snapshot`` gives them).
        original: the arm that never unlearned (theta_0), the control.
        forget: the forget set; the attacker gets some rows, others are measured (metric ``NAME/forget``).
        retain: rows that are measured as ``NAME/retain``; may be empty.
        related: further attack ``related``: rows near the forget set; may be empty. Here and in ``unrelated``, rows
            that share a prompt or an answer with what is measured are left out.
        unrelated: further attack ``unrelated``: ordinary rows; may be empty.
        prompts: prompts to answer, by id; may be empty.

    Raises:
        ConfigError: the original is no arm.
    """

    arms: Mapping[str, Params]
    forget: tuple[Example, ...]
    original: str = "before"
    retain: tuple[Example, ...] = ()
    related: tuple[Example, ...] = ()
    unrelated: tuple[Example, ...] = ()
    prompts: Mapping[str, Turns] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.original not in self.arms:
            raise ConfigError(f"robustness: the original {self.original!r} is none of the arms {sorted(self.arms)}")


@dataclass(frozen=True)
class Measures:
    """How conditions are measured; at least one of the two.

    Attributes:
        rows: likelihood-based measure, or None.
        answers: answers-based measure, or None.

    Raises:
        ConfigError: both are missing.
    """

    rows: RowMeasure | None = None
    answers: AnswerMeasure | None = None

    def __post_init__(self) -> None:
        if self.rows is None and self.answers is None:
            raise ConfigError("robustness: nothing to measure (give rows, answers, or both)")


@dataclass(frozen=True)
class _Plan:
    """What is measured and what the attacker trains on, the same for all arms.

    Attributes:
        measures, options: as given.
        rows: measured rows by set.
        prompts: prompts by id.
        attacks: the attacker's rows by set.
        groups: prompt key by item id.
    """

    measures: Measures
    options: RobustnessOptions
    rows: Mapping[str, tuple[Example, ...]]
    prompts: Mapping[str, Turns]
    attacks: Mapping[str, tuple[Example, ...]]
    groups: Mapping[str, str]

    @property
    def n_conditions(self) -> int:
        """Conditions of one arm."""
        relearning = self.options.relearning
        steps = 0 if relearning is None else len(relearning.steps)
        return 1 + len(self.options.schemes) + len(self.options.attacks) + len(self.attacks) * steps


def robustness(
    policy: Policy,
    data: RobustnessData,
    measures: Measures,
    options: RobustnessOptions,
    progress: Console,
    keep: Keep = lambda _, measure: measure(),
) -> RobustnessTable:
    """Measure every arm under every condition; the policy is afterwards what it was, bit for bit.

    Args:
        policy: the policy that the arms belong to.
        data: arms, rows and prompts.
        measures: callables; they must not change the policy nor ask for its reference. Values that
            are not finite are counted and left out.
        options: what is tried.
        progress: shows a phase ``robustness ARM`` for each arm.
        keep: given the name of something done to an arm and what measures it, returns the same measurement or an
            earlier one; it lets a stopped pack go on.

    Returns:
        The table.

    Raises:
        ConfigError: options in conflict.
        DataError: nothing to measure, too few rows that share no prompt and no answer with the attacker's, or a
            prompt attack that has nothing for the measured prompts.
        NonFiniteError: relearning diverges.
    """
    plan = _plan(data, measures, options)
    theta = policy.snapshot()
    arms: dict[str, Measured] = {}
    try:
        for name, parameters in data.arms.items():
            policy.restore(parameters)
            arms[name] = measured = {}
            with progress.phase(f"robustness {name}", total=plan.n_conditions, unit="conditions") as bar:
                for condition, measure in _conditions(policy, plan):
                    found = keep(f"{name}: {condition}", measure)
                    measured |= found
                    bar.advance(len(found), condition)
    finally:
        policy.restore(theta)
    return RobustnessTable(
        original=data.original,
        arms=tuple(arms),
        rows=tuple(table_rows(arms, data.original, plan.groups, options.bootstrap, options.seed)),
        attack_rows={name: len(rows) for name, rows in plan.attacks.items()},
        learning_rate=options.relearning.learning_rate if options.relearning else None,
        quantised_frac=quantised_frac(policy) if options.schemes else None,
        group=options.group,
    )


def mean_log_probs(policy: Policy, rows: Sequence[Example]) -> dict[str, dict[str, float]]:
    """The likelihood-based measure ``log_prob``: mean log-probability per answer token, nats.

    Args:
        policy: the policy at its current theta.
        rows: rows to score.

    Returns:
        ``{"log_prob": value by row id}``; NaN where the prompt (lengthened by an attack) leaves no room for an answer.
    """
    values, encoded = dict.fromkeys((row.id for row in rows), math.nan), {}
    for row in rows:
        with suppress(DataError):
            encoded[row.id] = policy.encoder.encode(row.prompt, row.completion, row.source or row.id)
    sums = policy.answer_sums(list(encoded.values())).tolist()
    values |= {key: value / encoded[key].n_answer for key, value in zip(encoded, sums, strict=True)}
    return {"log_prob": values}


def _plan(data: RobustnessData, measures: Measures, options: RobustnessOptions) -> _Plan:
    """Choose rows so that the attacker's share nothing with the measured ones, and check what can be checked now."""
    prompts = dict(data.prompts) if measures.answers else {}
    retain = _by_id(data.retain)[: options.measured_rows] if measures.rows else ()
    forget, attacks = _by_id(data.forget), {}
    if options.relearning:
        reserved = texts(retain) | {("prompt", prompt_key(turns)) for turns in prompts.values()}
        split = split_forget(forget, options.attack_rows, derive_seed(options.seed, "relearn"), reserved)
        forget, attacks = split.measured, {"forget": split.attack}
        reserved |= texts(forget)
        for name, rows in {"related": data.related, "unrelated": data.unrelated}.items():
            if rows:
                attacks[name] = apart(rows, reserved)[: options.attack_rows]
                if not attacks[name]:
                    raise DataError(f"relearning: all {name} rows share a prompt or an answer with what is measured")
    sets = {"forget": forget[: options.measured_rows], "retain": retain} if measures.rows else {}
    measured = {row.id: row.prompt for rows in sets.values() for row in rows} | prompts
    if not measured:
        raise DataError("robustness: there is neither a row nor a prompt to measure")
    for attack in options.attacks:
        if all(attack.apply(turns) is None for turns in measured.values()):
            raise DataError(f"attack {attack.name!r} has nothing for the measured prompts (do they belong together?)")
    groups = {key: prompt_key(turns) for key, turns in measured.items()}
    return _Plan(measures, options, {name: rows for name, rows in sets.items() if rows}, prompts, attacks, groups)


def _conditions(policy: Policy, plan: _Plan) -> Iterator[tuple[str, Callable[[], Found]]]:
    """What is done to one arm, the policy's current theta: names, and what measures the conditions under them."""
    options, relearning = plan.options, plan.options.relearning
    yield NONE, lambda: {NONE: _measure(policy, plan)}
    for scheme in options.schemes:
        yield scheme, lambda scheme=scheme: {scheme: _quantised(policy, plan, scheme)}
    for attack in options.attacks:
        name = f"prompt {attack.name}"
        yield name, lambda name=name, attack=attack: {name: _measure(policy, plan, attack)}
    if relearning is None:
        return
    measured = [row for each in plan.rows.values() for row in each]
    for name, rows in plan.attacks.items():

        def relearned(name: str = name, rows: tuple[Example, ...] = rows) -> Found:
            curve = relearn(policy, rows, measured, lambda now: _measure(now, plan), relearning)
            return {f"relearn {name} @{step}": found for step, found in curve.items()}

        yield f"relearn {name}", relearned


def _quantised(policy: Policy, plan: _Plan, scheme: Scheme) -> dict[str, dict[str, float]]:
    with quantised(policy, scheme, plan.options.group):
        return _measure(policy, plan)


def _measure(policy: Policy, plan: _Plan, attack: PromptAttack | None = None) -> dict[str, dict[str, float]]:
    """All metrics at the current theta; items that an attack has nothing for are left out."""
    found: dict[str, dict[str, float]] = {}
    if plan.measures.rows:
        for name, rows in plan.rows.items():
            changed = [(row, attack.apply(row.prompt) if attack else row.prompt) for row in rows]
            asked = [row.model_copy(update={"prompt": turns}) for row, turns in changed if turns is not None]
            cut = _cut(policy, rows, asked) if attack else frozenset()  # a value of theirs would be of other tokens
            for metric, each in plan.measures.rows(policy, asked).items():
                found[f"{metric}/{name}"] = {key: math.nan if key in cut else value for key, value in each.items()}
    if plan.measures.answers and plan.prompts:
        turns = {key: attack.apply(prompt) if attack else prompt for key, prompt in plan.prompts.items()}
        asked_for = {key: value for key, value in turns.items() if value is not None}
        found |= {metric: dict(each) for metric, each in plan.measures.answers(policy, asked_for).items()}
    return found


def _cut(policy: Policy, rows: Sequence[Example], asked: Sequence[Example]) -> frozenset[str]:
    """Ids of rows of whose answer fewer tokens fit beside the changed prompt than beside their own."""
    before = {row.id: _answer_tokens(policy, row) for row in rows}
    return frozenset(row.id for row in asked if _answer_tokens(policy, row) < before[row.id])


def _answer_tokens(policy: Policy, row: Example) -> int:
    try:
        return policy.encoder.encode(row.prompt, row.completion).n_answer
    except DataError:
        return 0


def _by_id(rows: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(sorted(rows, key=lambda row: row.id))
