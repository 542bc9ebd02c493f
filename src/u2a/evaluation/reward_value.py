"""Reward of generated answers under the evaluation's reward model."""

from __future__ import annotations

from collections.abc import Mapping

from u2a.reward.base import RewardModel
from u2a.types import Message


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
