"""The objective ``reward`` with answers sampled from the policy and scored by a reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from u2a.bilevel.reward_objective import Drawn, ExpectedReward
from u2a.encoding import Encoded
from u2a.evaluation.generation import Answer, Decoding, answer_text, generate_ids
from u2a.modeling import Policy
from u2a.reward.base import RewardModel
from u2a.types import Message, Pair


def sampled_reward(model: RewardModel, n_samples: int, max_new_tokens: int, seed: int) -> ExpectedReward:
    """Make the objective J = E[r(x, y)] from a reward model; pairs give prompts only, no answer of theirs is read.

    Args:
        model: scores the sampled answers. Its token rewards belong to its own encoding of the texts; they are used
            only if in a call every one of them is as long as the answer, and shifted so that they sum to its score.
        n_samples: answers per prompt, at least 2.
        max_new_tokens: tokens per answer.
        seed: of the sampling.

    Returns:
        The objective.
    """

    def draw(policy: Policy, pairs: Sequence[Pair]) -> list[Drawn]:
        prompts = [pair.prompt for pair in pairs]
        columns = []
        for sample in range(n_samples):
            answers = generate_ids(policy, prompts, Decoding(max_new_tokens, 1.0, seed=seed + sample))
            columns.append(_scored(model, policy, prompts, answers))
        with_tokens = all(column.tokens is not None for column in columns)
        return [
            Drawn(
                answers=tuple(column.encoded[row] for column in columns),
                rewards=tuple(column.scores[row] for column in columns),
                token_rewards=tuple(column.tokens[row] for column in columns if column.tokens) if with_tokens else None,
            )
            for row in range(len(pairs))
        ]

    return ExpectedReward(draw, f"{model.name}, {n_samples} x {max_new_tokens} tokens, seed {seed}")


@dataclass(frozen=True)
class _Column:
    """One sample to every prompt.

    Attributes:
        encoded: prompt and drawn tokens.
        scores: sequence rewards.
        tokens: token rewards that sum to the scores, or None unless they fit every answer.
    """

    encoded: list[Encoded]
    scores: list[float]
    tokens: list[tuple[float, ...]] | None


def _scored(
    model: RewardModel, policy: Policy, prompts: Sequence[tuple[Message, ...]], answers: Sequence[Answer]
) -> _Column:
    """Score answers. An answer of no text consists of its end-of-turn token, which was drawn like any other."""
    texts = [answer_text(policy, answer) for answer in answers]
    encoded = [
        Encoded((*policy.encoder.encode_prompt(prompt), *answer.drawn), len(answer.drawn))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    scores = [float(value) for value in model.score(prompts, texts).tolist()]
    rows = model.token_rewards(prompts, texts)
    if rows is None or any(len(row) != answer.n_answer for row, answer in zip(rows, encoded, strict=True)):
        return _Column(encoded, scores, None)
    return _Column(encoded, scores, [summing_to(row.tolist(), score) for row, score in zip(rows, scores, strict=True)])


def summing_to(values: Sequence[float], total: float) -> tuple[float, ...]:
    """Shift values by a common amount so that they have a given sum.

    Args:
        values: at least one number.
        total: the sum wanted.

    Returns:
        The shifted values.

    >>> summing_to([1.0, 3.0], 10.0)
    (4.0, 6.0)
    """
    shift = (total - math.fsum(values)) / len(values)
    return tuple(value + shift for value in values)
