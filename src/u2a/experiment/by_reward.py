"""Choices that read rewards of the candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from u2a.errors import ConfigError
from u2a.experiment.meter import Meter
from u2a.experiment.setting import Setting
from u2a.reward.analysis import midpoint
from u2a.reward.base import RewardModel
from u2a.types import Example
from u2a.unlearn import InnerProblem


def lowest(values: Mapping[str, float], k: int) -> list[str]:
    """The ids of the k lowest values; ties by id.

    Args:
        values: value by id.
        k: how many.

    Returns:
        Ids, lowest first.

    >>> lowest({"a": 2.0, "b": 1.0, "c": 1.0}, 2)
    ['b', 'c']
    """
    return sorted(values, key=lambda name: (values[name], name))[:k]


def rewards_of(setting: Setting, rows: Sequence[Example]) -> dict[str, float]:
    """Rewards of bad answers under the selecting reward model.

    Args:
        setting: gives the model.
        rows: the answers.

    Returns:
        Reward by id.

    Raises:
        ConfigError: there is no reward model.
    """
    values = _model(setting).score([row.prompt for row in rows], [row.completion for row in rows])
    return {row.id: float(value) for row, value in zip(rows, values, strict=True)}


def below_midpoint(setting: Setting, rewards: Mapping[str, float]) -> list[str]:
    """The candidates whose reward is below the midpoint of the PA set (:func:`u2a.reward.analysis.midpoint`).

    Args:
        setting: gives the model and the pairs.
        rewards: reward by id.

    Returns:
        Ids, lowest reward first.

    Raises:
        ConfigError: there is none, no pair, or no reward model.
    """
    limit = midpoint(_model(setting), setting.partition.preference)
    below = [name for name in lowest(rewards, len(rewards)) if rewards[name] < limit]
    if not below:
        raise ConfigError(f"no candidate's reward is below the midpoint {limit:.4g}")
    return below


def prefiltered(setting: Setting, problem: InnerProblem, meter: Meter) -> InnerProblem:
    """The candidates that the options let through by their rewards; where they let all through, no reward is asked.

    Args:
        setting: options, model and pairs.
        problem: all candidates.
        meter: charged for the rewards.

    Returns:
        The problem with those candidates alone.

    Raises:
        ConfigError: none is left.
    """
    section = setting.config.reward
    if section.prefilter_frac == 1.0 and section.prefilter_below == "none":
        return problem
    with meter.phase("reward"):
        rewards = rewards_of(setting, problem.forget)
        kept = set(lowest(rewards, math.ceil(section.prefilter_frac * len(rewards))))
        kept &= set(rewards if section.prefilter_below == "none" else below_midpoint(setting, rewards))
    return replace(problem, forget=tuple(row for row in problem.forget if row.id in kept))


def _model(setting: Setting) -> RewardModel:
    if setting.selecting_reward is None:
        raise ConfigError("rewards of candidates need a reward model (set reward.model)")
    return setting.selecting_reward
