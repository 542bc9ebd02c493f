"""The paper's outer objective: expected reward of the policy's own answers, differentiated by REINFORCE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from u2a.bilevel.objective import Item, columns
from u2a.encoding import Encoded
from u2a.modeling import Policy
from u2a.types import Pair


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantages against the mean of the other samples: A_g = r_g - mean_{h != g} r_h.

    Args:
        rewards: (prompts, samples), at least two samples.

    Returns:
        The same shape; each row sums to 0.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free".

    >>> leave_one_out(torch.tensor([[1.0, 3.0]])).tolist()
    [[-2.0, 2.0]]
    """
    samples = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * samples / (samples - 1)


@dataclass(frozen=True)
class Drawn:
    """Answers sampled to one prompt with their rewards.

    Attributes:
        answers: tokenised samples, at least two.
        rewards: reward of each.
        token_rewards: reward per answer token of each, or None.
    """

    answers: tuple[Encoded, ...]
    rewards: tuple[float, ...]
    token_rewards: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class ExpectedReward:
    """J = E_{x, y ~ pi}[r(x, y)], with REINFORCE and a leave-one-out baseline (paper, eq. 1).

    J_i(theta) = mean_g r_g + mean_g A_g (s_g(theta) - s_g(theta_drawn)): at the theta where the answers were drawn
    its value is the mean reward and its gradient the unbiased policy gradient; elsewhere it is the first-order
    estimate. With token rewards A_g is the reward-to-go of each token, less the mean of the other samples' total.

    Attributes:
        draw: samples answers of the policy to each pair's prompt and scores them.
        label: tells it from another one; a search that was stopped goes on only with an objective of equal label.
    """

    draw: Callable[[Policy, Sequence[Pair]], list[Drawn]]
    label: str = ""

    @property
    def name(self) -> str:
        """Name for records."""
        return "reward"

    def prepare(self, policy: Policy, pairs: Sequence[Pair]) -> list[Item]:
        """Sample and score answers; advantages are fixed from here on."""
        items = []
        for pair, drawn in zip(pairs, self.draw(policy, pairs), strict=True):
            tokens = _token_advantages(drawn)
            sums = policy.answer_sums(drawn.answers) if not tokens else None
            advantages = leave_one_out(torch.tensor([drawn.rewards], dtype=torch.float64))[0].tolist()
            rewards = [sum(row) for row in drawn.token_rewards] if drawn.token_rewards else list(drawn.rewards)
            base = sum(rewards) / len(rewards)
            if tokens:
                base -= self._offset(policy, drawn, tokens)
            elif sums is not None:
                base -= sum(a * float(s) for a, s in zip(advantages, sums, strict=True)) / len(advantages)
            items.append(Item(pair, drawn.answers, tuple(advantages), tokens, base))
        return items

    @staticmethod
    @torch.no_grad()
    def _offset(policy: Policy, drawn: Drawn, tokens: tuple[tuple[float, ...], ...]) -> float:
        answers = policy.log_probs(drawn.answers)
        total = (answers.token * _left_padded(tokens, answers.token)).sum()
        return float(total) / len(drawn.answers)

    def per_item(self, policy: Policy, items: Sequence[Item]) -> Tensor:
        """Mean reward plus the first-order change of the expected reward."""
        flat = [answer for item in items for answer in item.answers]
        answers = policy.log_probs(flat)
        if items[0].token_numbers:
            weights = _left_padded([row for item in items for row in item.token_numbers], answers.token)
            terms = (answers.token * weights).sum(1)
        else:
            terms = answers.sum * torch.tensor([a for item in items for a in item.numbers]).to(answers.sum)
        base = torch.tensor([item.base for item in items]).to(terms)
        return base + columns(terms, items).mean(1)


def _token_advantages(drawn: Drawn) -> tuple[tuple[float, ...], ...]:
    """Reward-to-go of each token minus the mean total of the other samples' rewards; empty without token rewards."""
    if not drawn.token_rewards:
        return ()
    totals = [sum(row) for row in drawn.token_rewards]
    out = []
    for index, row in enumerate(drawn.token_rewards):
        baseline = (sum(totals) - totals[index]) / (len(totals) - 1)
        to_go = torch.tensor(row, dtype=torch.float64).flip(0).cumsum(0).flip(0)
        out.append(tuple((to_go - baseline).tolist()))
    return tuple(out)


def _left_padded(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Stack rows of different length, zeros on the left, in the shape of ``like``."""
    out = torch.zeros(like.shape, dtype=torch.float32)
    for index, row in enumerate(rows):
        out[index, like.shape[1] - len(row) :] = torch.tensor(row, dtype=torch.float32)
    return out.to(like)
