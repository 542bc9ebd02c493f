"""The sections of a protocol: tasks, arms, budgets, measurement, tuning, families of tests and statements."""

from __future__ import annotations

from typing import Literal

from u2a.config_base import Count, Frac, NonNegative, Positive, Section, option

AnsweredName = Literal[
    "reward",
    "second_reward",
    "answer_words",
    "refusal_rate",
    "degenerate_rate",
]
"""Metrics of generated answers, which are made at full levels alone."""

EqualName = Literal["preference_margin_at_equal_ppl", "reward_at_equal_ppl", "scale_at_equal_ppl"]
"""Metrics of the change scaled to the utility budget, at full levels alone."""

MetricName = Literal[
    "preference_margin",
    "preference_accuracy",
    AnsweredName,
    EqualName,
    "retain_ppl",
    "flops",
    "seconds",
    "cpu_seconds",
    "peak_rss_bytes",
]


class TaskSection(Section):
    """One data set with its start."""

    config: str = option("", "configuration file of a run, relative to the protocol's folder")
    set: list[str] = option([], "changes to it, as section.option=value")
    seeds: Count | None = option(None, "run on this many of the seeds, the first ones (null: all)")
    tuned_on: str | None = option(None, "take the trials that were chosen on this task (null: tune here)")


class ArmSection(Section):
    """One row of the tables."""

    method: str = option("", "name of the method")
    set: list[str] = option([], "changes to the task's options, as section.option=value (sections unlearn and solve)")
    tasks: list[str] | None = option(None, "tasks it is run on (null: all)")
    seeds: Count | None = option(None, "run on this many of a task's seeds, the first ones (null: all)")
    trials: list[dict[str, float]] = option([{}], "hyperparameters by name; of several the tuning rule chooses one")
    up_to: Positive | None = option(None, "run it up to this budget level (null: the last one)")
    tuned_by: Literal["preference_margin", "preference_accuracy", "reward"] | None = option(
        None, "choose its trial by this metric (null: tuning.metric)"
    )


class BudgetSection(Section):
    """How much every arm may spend."""

    levels: list[Positive] = option([0.25, 1.0, 4.0], "rising, in units of one GA pass over all candidates")
    full: list[Positive] = option([1.0], "levels at which answers are generated, too")


class MeasureSection(Section):
    """What is measured at a level."""

    prompts: Count = option(48, "evaluation prompts answered at full levels")
    max_new_tokens: Count = option(32, "tokens per answer")
    equal_ppl_frac: NonNegative | None = option(
        0.05, "measure full levels also with the change scaled until retain perplexity rises by no more (null: not)"
    )


class TuningSection(Section):
    """How one of an arm's trials is chosen: on other seeds, and on prompts that no table counts."""

    seeds: list[int] = option([1000], "seeds of the tuning runs")
    level: Positive = option(1.0, "budget level of the choice")
    metric: Literal["preference_margin", "preference_accuracy", "reward"] = option(
        "preference_margin", "highest mean over tuning seeds wins"
    )
    max_ppl_ratio: Positive = option(1.1, "among trials whose retain perplexity is at most this times the start's")
    dev_frac: Frac = option(0.33, "share of evaluation prompts, by hash, that only tuning reads")


class FamilySection(Section):
    """Tests that are corrected together."""

    metric: MetricName = option("preference_margin", "what is compared")
    level: Positive = option(1.0, "at which budget level")
    contrasts: list[tuple[str, str]] = option([], "pairs of arms; the difference is first minus second")
    tasks: list[str] | None = option(None, "tasks it is tested on (null: all)")


class StatementSection(Section):
    """A statement that the experiment is to judge, with the rule of its verdict."""

    text: str = option("", "the statement, in a sentence")
    rule: Literal["better", "not_worse", "cheaper"] = option(
        "better", "better, not_worse: by the contrasts of family; cheaper: by what the first of arms needs for as much"
    )
    family: str = option("", "family of contrasts (better, not_worse)")
    contrasts: list[tuple[str, str]] | None = option(None, "these of the family alone; corrected as in it (null: all)")
    arms: tuple[str, str] = option(("", ""), "cheaper: the arm, and the arm whose end it must reach")
    metric: Literal[
        "preference_margin", "preference_accuracy", "reward", "preference_margin_at_equal_ppl", "reward_at_equal_ppl"
    ] = option("preference_margin", "cheaper: in what")
    at_most: Positive = option(0.1, "cheaper: with at most this share of what the other one has spent")
    spent: Literal["budget", "cpu_seconds"] = option("budget", "cheaper: what is compared")
