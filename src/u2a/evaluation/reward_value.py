"""Reward of generated answers (Reward-V): under several models, their agreement, and with answer length held fixed.

A mean reward is in its model's own unit and says nothing by itself: two models agree when they rank the same prompts
and the same arms alike, whatever their units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from u2a.errors import DataError
from u2a.evaluation.stats import Interval, bootstrap_mean
from u2a.record import Row
from u2a.reward.association import Measure, association, interval_of, kappa, kendall, measured, spearman
from u2a.reward.base import RewardModel
from u2a.types import Agreement, Message, Metric

REWARD_LENGTH_CONTROLLED = "reward_length_controlled"  # the name under which these values stand in tables
_MIN_ARMS = 3


class TokenAgreement(Row):
    """Whether two models call the same tokens low-reward ones.

    Attributes:
        first, second: the models.
        quantile: a token is low when it is strictly under this quantile of its model's token rewards, pooled.
        kappa: Cohen's kappa over tokens (0 is chance) with a 95 % interval from resampling prompts.
        n_tokens: tokens compared.
        n_answers: answers compared.
        n_left_out: answers that the two models cut into different numbers of tokens.
    """

    first: str
    second: str
    quantile: float
    kappa: Metric
    n_tokens: int
    n_answers: int
    n_left_out: int


@dataclass(frozen=True)
class LengthControlled:
    """Rewards without the part that goes with answer length.

    Attributes:
        values: residual by arm, then id; over all arms they sum to 0, so only differences of arms mean anything.
        slope: reward per character, or None where all answers are equally long (nothing is taken away then).
        n: answers the line was fitted on.
    """

    values: dict[str, dict[str, float]]
    slope: float | None
    n: int


def answer_rewards(
    model: RewardModel, prompts: Mapping[str, tuple[Message, ...]], answers: Mapping[str, str]
) -> dict[str, float]:
    """Score one generated answer per prompt.

    Args:
        model: a reward model other than the one that selected.
        prompts: turns by id.
        answers: answer by the same ids; an empty answer is scored like any other.

    Returns:
        Reward by id, in the model's own unit.

    Raises:
        NonFiniteError: a reward is not finite.
    """
    ids = list(answers)
    rewards = model.score([prompts[key] for key in ids], [answers[key] for key in ids])
    return dict(zip(ids, rewards.tolist(), strict=True))


def reward_values(
    models: Sequence[RewardModel],
    prompts: Mapping[str, tuple[Message, ...]],
    answers: Mapping[str, str],
    groups: Mapping[str, str],
    resamples: int,
    seed: int,
) -> dict[str, Metric]:
    """Mean reward of one arm's answers under each of several models.

    Args:
        models: reward models of different names.
        prompts: turns by id.
        answers: answer by the same ids.
        groups: prompt key by id.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.

    Returns:
        Metric by model name: mean reward, 95 % interval from resampling prompts, and the rewards by id.

    Raises:
        DataError: two models of one name.
        NonFiniteError: a reward is not finite.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise DataError(f"reward models: {', '.join(names)}: expected different ones (the same model agrees always)")
    metrics = {}
    for model in models:
        values = answer_rewards(model, prompts, answers)
        metrics[model.name] = _metric(bootstrap_mean(values, groups, resamples, seed), values)
    return metrics


def prompt_agreement(
    names: tuple[str, str],
    first: Mapping[str, float],
    second: Mapping[str, float],
    groups: Mapping[str, str],
    resamples: int,
    seed: int,
) -> Agreement:
    """Compare how two models rank the answers of one arm.

    Args:
        names: the models' names.
        first: reward by id under the first.
        second: under the second; ids of only one are left out.
        groups: prompt key by id.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.

    Returns:
        Rank correlations over answers.
    """
    shared = sorted(first.keys() & second.keys())
    columns = [first[key] for key in shared], [second[key] for key in shared]
    clusters = [groups.get(key, key) for key in shared]

    def metric(measure: Measure) -> Metric:
        return _metric(association(measure, *columns, clusters, resamples, seed))

    return Agreement(
        first=names[0],
        second=names[1],
        over="prompts",
        spearman=metric(spearman),
        kendall=metric(kendall),
        n_ranked=len(shared),
    )


def arm_agreement(
    names: tuple[str, str],
    first: Mapping[str, Mapping[str, float]],
    second: Mapping[str, Mapping[str, float]],
    groups: Mapping[str, str],
    resamples: int,
    seed: int,
) -> Agreement:
    """Compare how two models rank the arms by mean reward, on the prompts which all arms have.

    Args:
        names: the models' names.
        first: reward by arm, then id, under the first model.
        second: under the second; arms of only one are left out.
        groups: prompt key by id.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.

    Returns:
        Rank correlations over arms, None with fewer than three arms. The interval resamples prompts: it covers the
        choice of prompts, not of arms.
    """
    arms = sorted(first.keys() & second.keys())
    shared = sorted(set.intersection(*(first[arm].keys() & second[arm].keys() for arm in arms))) if arms else []
    clusters = np.array([groups.get(key, key) for key in shared], dtype=str)
    n = len(set(clusters.tolist()))
    if len(arms) < _MIN_ARMS or n == 0:
        undefined = Metric(value=None, n=n)
        return Agreement(
            first=names[0], second=names[1], over="arms", spearman=undefined, kendall=undefined, n_ranked=len(arms)
        )
    # (prompts, arms) sums of both models; a resampled mean is a resampled sum over the resampled number of answers,
    # and that number is the same for every arm, so the order of the sums is the order of the means
    keys, place = np.unique(clusters, return_inverse=True)
    tables = [_sums(model, arms, shared, place, len(keys)) for model in (first, second)]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=resamples)
    sums = [np.vstack([table.sum(0), draws @ table]) for table in tables]

    def metric(measure: Measure) -> Metric:
        values = [measured(measure, a.tolist(), b.tolist()) for a, b in zip(*sums, strict=True)]
        return _metric(interval_of(values[0], np.array(values[1:], dtype=float), n))

    return Agreement(
        first=names[0],
        second=names[1],
        over="arms",
        spearman=metric(spearman),
        kendall=metric(kendall),
        n_ranked=len(arms),
    )


def low_token_agreement(
    models: tuple[RewardModel, RewardModel],
    prompts: Mapping[str, tuple[Message, ...]],
    answers: Mapping[str, str],
    groups: Mapping[str, str],
    quantile: float = 0.25,
    resamples: int = 1000,
    seed: int = 0,
) -> TokenAgreement | None:
    """Compare which tokens of the answers two models give low rewards.

    Args:
        models: the two models.
        prompts: turns by id.
        answers: answer by the same ids.
        groups: prompt key by id.
        quantile: share of tokens that count as low, in (0, 1).
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.

    Returns:
        The agreement, or None when a model has no token rewards. Answers that the models' tokenizers cut into
        different numbers of tokens are left out and counted.

    Raises:
        NonFiniteError: a reward is not finite.
    """
    ids = sorted(answers)
    texts = [prompts[key] for key in ids], [answers[key] for key in ids]
    first, second = models[0].token_rewards(*texts), models[1].token_rewards(*texts)
    if first is None or second is None:
        return None
    matched = [(key, a, b) for key, a, b in zip(ids, first, second, strict=True) if len(a) == len(b)]
    pooled = [
        np.array([value for row in rows for value in row.tolist()])
        for rows in ([a for _, a, _ in matched], [b for _, _, b in matched])
    ]
    clusters = [groups.get(key, key) for key, row, _ in matched for _ in range(len(row))]
    low = [(side < np.quantile(side, quantile)).astype(float).tolist() if len(side) else [] for side in pooled]
    return TokenAgreement(
        first=models[0].name,
        second=models[1].name,
        quantile=quantile,
        kappa=_metric(association(kappa, low[0], low[1], clusters, resamples, seed)),
        n_tokens=len(clusters),
        n_answers=len(matched),
        n_left_out=len(ids) - len(matched),
    )


def length_controlled(
    rewards: Mapping[str, Mapping[str, float]], answers: Mapping[str, Mapping[str, str]]
) -> LengthControlled:
    """Take out of the rewards what a straight line in answer length explains, one line for all arms pooled.

    residual = r - (a + b characters), by least squares. If an arm's answers are better *because* they are longer,
    this takes that away too: read it beside the plain reward, not instead of it.

    Args:
        rewards: reward by arm, then id, under one model.
        answers: answer by the same arms and ids.

    Returns:
        Residuals by arm and id.
    """
    items = [(arm, key) for arm in rewards for key in rewards[arm]]
    if not items:
        return LengthControlled({arm: {} for arm in rewards}, None, 0)
    reward = np.array([rewards[arm][key] for arm, key in items])
    length = np.array([float(len(answers[arm][key])) for arm, key in items])
    reward, length = reward - reward.mean(), length - length.mean()
    slope = float(reward @ length / (length @ length)) if length.any() else None
    residual = reward - (slope or 0.0) * length
    values: dict[str, dict[str, float]] = {arm: {} for arm in rewards}
    for (arm, key), value in zip(items, residual.tolist(), strict=True):
        values[arm][key] = value
    return LengthControlled(values, slope, len(items))


def _sums(
    rewards: Mapping[str, Mapping[str, float]], arms: Sequence[str], ids: Sequence[str], place: np.ndarray, n: int
) -> np.ndarray:
    """Sum of rewards by prompt and arm: (n, arms)."""
    table = np.zeros((n, len(arms)))
    np.add.at(table, place, np.array([[rewards[arm][key] for arm in arms] for key in ids]))
    return table


def _metric(interval: Interval, values: Mapping[str, float] | None = None) -> Metric:
    return Metric(value=interval.value, low=interval.low, high=interval.high, n=interval.n, values=dict(values or {}))
