"""The objective ``reward`` with answers sampled from the policy and scored by a reward model."""

from __future__ import annotations

from collections.abc import Sequence

from u2a.bilevel.objective import Drawn, ExpectedReward
from u2a.evaluation.generation import generate
from u2a.modeling import Policy
from u2a.reward.base import RewardModel
from u2a.types import Pair


def sampled_reward(model: RewardModel, n_samples: int, max_new_tokens: int, seed: int) -> ExpectedReward:
    """Make the objective J = E[r(x, y)] from a reward model; pairs give prompts only, no answer of theirs is read.

    Args:
        model: scores the sampled answers; its token rewards are used where it has them.
        n_samples: answers per prompt, at least 2.
        max_new_tokens: tokens per answer.
        seed: of the sampling.

    Returns:
        The objective.
    """

    def draw(policy: Policy, pairs: Sequence[Pair]) -> list[Drawn]:
        prompts = [pair.prompt for pair in pairs]
        texts = [generate(policy, prompts, max_new_tokens, 1.0, seed + g) for g in range(n_samples)]
        rewards = [model.score(prompts, column).tolist() for column in texts]
        tokens = [model.token_rewards(prompts, column) for column in texts]
        drawn = []
        for row, pair in enumerate(pairs):
            answers = tuple(policy.encoder.encode(pair.prompt, column[row], pair.source) for column in texts)
            per_token = [None if column is None else tuple(column[row].tolist()) for column in tokens]
            whole = tuple(
                values
                for values, answer in zip(per_token, answers, strict=True)
                if values is not None and len(values) == answer.n_answer
            )
            token_rewards = whole if len(whole) == n_samples else None
            drawn.append(Drawn(answers, tuple(column[row] for column in rewards), token_rewards))
        return drawn

    return ExpectedReward(draw)
