"""Stage 5: measure every arm in the same way, then set them side by side with paired intervals.

Nothing here is chosen or tuned on the held-out pairs. All arms answer the same prompts under the same decoding,
and every interval resamples prompts, not rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from u2a.config import EvaluationSection
from u2a.data import prompt_key
from u2a.evaluation.degenerate import degeneration
from u2a.evaluation.generation import generate
from u2a.evaluation.perplexity import RetainNll, perplexity_metric, retain_nll
from u2a.evaluation.preference import preference_hits, preference_margins
from u2a.evaluation.refusal import is_refusal
from u2a.evaluation.reward_value import answer_rewards
from u2a.evaluation.stats import (
    Interval,
    bootstrap_mean,
    paired_difference,
    paired_perplexity_difference,
    rate_interval,
)
from u2a.evaluation.verdict import BEFORE, SOLUTION, verdict
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.record import Record, derive_seed
from u2a.reward.base import RewardModel
from u2a.solution import Solution
from u2a.types import Contrast, EvalTable, Metric, Pair, Partition, RewardCard, Sample


class ArmResult(Record):
    """Everything measured on one arm; it can be saved, so that a stopped evaluation goes on arm by arm.

    Attributes:
        name: the arm (``before``, ``after``, ``random_k``, ...).
        metrics: metric by name; see :data:`u2a.evaluation.metrics.METRICS`.
        answers: generated answer by pair id.
        rewards: reward of it by pair id (empty without a reward model).
        retain_nll: summed NLL in nats by retain row id.
        retain_tokens: answer tokens by retain row id.
    """

    name: str
    metrics: dict[str, Metric]
    answers: dict[str, str] = {}
    rewards: dict[str, float] = {}
    retain_nll: dict[str, float] = {}
    retain_tokens: dict[str, float] = {}


def evaluate_arm(
    policy: Policy,
    partition: Partition,
    reward_model: RewardModel | None,
    section: EvaluationSection,
    seed: int,
    progress: Console,
    name: str = SOLUTION,
) -> ArmResult:
    """Measure the policy at its current theta.

    Args:
        policy: the policy; it is not changed.
        partition: ``evaluation`` pairs and ``retain`` rows are read.
        reward_model: the evaluation's reward model, or None to leave ``reward`` out.
        section: prompts answered, decoding, resamples.
        seed: the run's seed; arms of one table must share it.
        progress: shows the phase ``evaluate NAME``.
        name: name of the arm.

    Returns:
        The arm's metrics. A metric without data has value None and n = 0.

    Raises:
        NonFiniteError: log-probabilities of the pairs, logits or rewards are not finite.
    """
    prompts = prompts_answered(partition.evaluation, section.generate_prompts)
    kept = partition.retain_parts().evaluation
    total = len(partition.evaluation) + len(kept) + len(prompts)
    with progress.phase(f"evaluate {name}", total=total, unit="rows") as bar:
        margins = preference_margins(policy, partition.evaluation)
        bar.advance(len(partition.evaluation), "preference")
        retained = retain_nll(policy, kept)
        bar.advance(len(kept), "perplexity")
        texts = generate(
            policy,
            [pair.prompt for pair in prompts],
            section.max_new_tokens,
            section.temperature,
            derive_seed(seed, "evaluation answers"),
            bar,
        )
        answers = {pair.id: text for pair, text in zip(prompts, texts, strict=True)}
        rewards: dict[str, float] = {}
        if reward_model is not None:
            rewards = answer_rewards(reward_model, {pair.id: pair.prompt for pair in prompts}, answers)
    values = {
        "preference_accuracy": preference_hits(margins),
        "preference_margin": margins,
        "reward": rewards,
        "refusal_rate": {key: float(is_refusal(text)) for key, text in answers.items()},
        "degenerate_rate": {key: float(degeneration(text) is not None) for key, text in answers.items()},
        "answer_words": {key: float(len(text.split())) for key, text in answers.items()},
    }
    return ArmResult(
        name=name,
        metrics=_metrics(values, retained, partition, section, seed),
        answers=answers,
        rewards=rewards,
        retain_nll=retained.nll,
        retain_tokens=retained.tokens,
    )


def prompts_answered(pairs: Sequence[Pair], n: int) -> list[Pair]:
    """Choose the prompts that every arm answers: distinct ones, by the hash of the prompt.

    Args:
        pairs: held-out pairs.
        n: prompts at most.

    Returns:
        One pair per prompt (that of least id), the same for any order of ``pairs``.
    """
    first: dict[str, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: pair.id):
        first.setdefault(prompt_key(pair.prompt), pair)
    return [first[key] for key in sorted(first)[:n]]


def build_table(
    arms: Mapping[str, ArmResult],
    partition: Partition,
    section: EvaluationSection,
    seed: int,
    reward_card: RewardCard | None = None,
    solution: Solution | None = None,
) -> EvalTable:
    """Compare the arms.

    Args:
        arms: results by arm; ``after`` is the solution, ``before`` the start, any others are controls.
        partition: the one the arms were measured on.
        section: bootstrap resamples.
        seed: the run's seed.
        reward_card: what is known of the evaluation's reward model.
        solution: gives the verdict the reliability of the gains and whether selection fell back.

    Returns:
        Metrics, paired differences of ``after`` against every other arm, all generated answers, and the verdict.
    """
    contrasts: list[Contrast] = []
    if SOLUTION in arms:
        others = sorted((name for name in arms if name != SOLUTION), key=lambda name: name != BEFORE)
        for other in others:
            contrasts += _contrasts(arms[SOLUTION], arms[other], (SOLUTION, other), partition, (section, seed))
    by_id = {pair.id: pair for pair in partition.evaluation}
    ids = dict.fromkeys(key for arm in arms.values() for key in arm.answers)
    samples = tuple(
        Sample(
            id=key,
            prompt=by_id[key].prompt[-1].content,
            answers={name: arm.answers[key] for name, arm in arms.items() if key in arm.answers},
            rewards={name: arm.rewards[key] for name, arm in arms.items() if key in arm.rewards},
        )
        for key in ids
    )
    return EvalTable(
        arms={name: arm.metrics for name, arm in arms.items()},
        contrasts=tuple(contrasts),
        samples=samples,
        reward_card=reward_card,
        verdict=verdict(contrasts, solution),
    )


def _metrics(
    values: Mapping[str, Mapping[str, float]],
    retained: RetainNll,
    partition: Partition,
    section: EvaluationSection,
    seed: int,
) -> dict[str, Metric]:
    """Attach intervals; metrics without values stay in the table as undefined."""
    groups, bootstrap_seed = _groups(partition), derive_seed(seed, "bootstrap")
    metrics = {}
    for name, items in values.items():
        is_rate = name in ("preference_accuracy", "refusal_rate", "degenerate_rate")
        interval = (rate_interval if is_rate else bootstrap_mean)(items, groups, section.bootstrap, bootstrap_seed)
        metrics[name] = Metric(
            value=interval.value, low=interval.low, high=interval.high, n=interval.n, values=dict(items)
        )
    metrics["retain_ppl"] = perplexity_metric(retained, groups, section.bootstrap, bootstrap_seed)
    return metrics


def _groups(partition: Partition) -> dict[str, str]:
    """Prompt key of every evaluation pair and retain row by its id."""
    return {row.id: prompt_key(row.prompt) for row in (*partition.evaluation, *partition.retain)}


def _contrasts(
    first: ArmResult,
    second: ArmResult,
    names: tuple[str, str],
    partition: Partition,
    options: tuple[EvaluationSection, int],
) -> list[Contrast]:
    """Paired differences of all metrics both arms have."""
    groups, resamples, seed = _groups(partition), options[0].bootstrap, derive_seed(options[1], "bootstrap")
    rows: dict[str, Interval] = {}
    for metric, value in first.metrics.items():
        other = second.metrics.get(metric)
        if other is not None and value.values and other.values:
            rows[metric] = paired_difference(value.values, other.values, groups, resamples, seed)
    if first.retain_nll and first.retain_nll.keys() == second.retain_nll.keys():
        rows["retain_ppl"] = paired_perplexity_difference(
            first.retain_nll, second.retain_nll, first.retain_tokens, groups, resamples, seed
        )
    return [
        Contrast(metric=metric, first=names[0], second=names[1], difference=d.value, low=d.low, high=d.high, n=d.n)
        for metric, d in rows.items()
    ]
