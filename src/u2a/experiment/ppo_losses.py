"""The formulas of PPO for a language model, on tensors alone.

Rewards per token hold the divergence from the reference (Ziegler et al. 2019, arXiv 1909.08593, equation 2); the
advantages are generalised (Schulman et al. 2016, arXiv 1506.02438, equation 16) and whitened; the surrogate is clipped
(Schulman et al. 2017, arXiv 1707.06347, equation 7), and so is the value loss (Huang et al. 2024, arXiv 2403.17031).

Answers end at the last position (see :mod:`u2a.encoding`): in a row of T positions the answer's tokens are the last
ones, which the mask tells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from u2a.encoding import Batch


@dataclass(frozen=True)
class Answers:
    """Answers drawn from the policy, and what is known of them before any update.

    Attributes:
        batch: prompts and answers.
        scores: (n,) rewards of whole answers.
        reference: (n, T) log-probabilities of the answer tokens at theta_0, 0 outside the mask.
    """

    batch: Batch
    scores: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Pass:
    """One pass of the policy and the value head over answers.

    Attributes:
        log_probs: (n, T) log-probabilities of the answer tokens, 0 outside the mask.
        values: (n, T) expected return before each token, 0 outside the mask.
    """

    log_probs: Tensor
    values: Tensor

    def detached(self) -> Pass:
        """The same numbers without gradient."""
        return Pass(self.log_probs.detach(), self.values.detach())


@dataclass(frozen=True)
class Clipped:
    """A clipped loss.

    Attributes:
        loss: mean over the answer tokens, scalar.
        clipped_frac: share of them where clipping decided, scalar.
    """

    loss: Tensor
    clipped_frac: Tensor


def token_rewards(log_probs: Tensor, answers: Answers, beta: float) -> Tensor:
    """Rewards per token: r_t = -beta (log pi(y_t) - log pi_ref(y_t)), plus the answer's score at its last token.

    Args:
        log_probs: (n, T) under the policy that drew the answers.
        answers: scores, reference and mask.
        beta: >= 0.

    Returns:
        (n, T), 0 outside the mask; a row sums to the score minus beta times the log-ratio of the answer.
    """
    rewards = -beta * (log_probs - answers.reference)
    rewards = torch.where(answers.batch.answer_mask, rewards, 0.0)
    rewards[:, -1] += answers.scores
    return rewards


def advantages_of(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantages: A_t = sum_l (gamma lambda)^l d_{t+l} with d_t = r_t + gamma V_{t+1} - V_t.

    Args:
        rewards: (n, T); an answer ends at T - 1, behind which the value is 0.
        values: (n, T).
        gamma: discount.
        gae_lambda: lambda.

    Returns:
        (n, T).
    """
    advantages, running, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0]), 0.0
    for position in reversed(range(rewards.shape[1])):
        surprise = rewards[:, position] + gamma * following - values[:, position]
        running = surprise + gamma * gae_lambda * running
        advantages[:, position] = running
        following = values[:, position]
    return advantages


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the mask.

    Args:
        values: any shape.
        mask: bool of that shape.

    Returns:
        The same shape, 0 outside the mask.
    """
    inside = values[mask]
    scaled = (values - inside.mean()) * torch.rsqrt(inside.var(correction=0) + 1e-8)
    return torch.where(mask, scaled, 0.0)


def surrogate_loss(now: Tensor, before: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Clipped:
    """-mean min(rho A, clamp(rho, 1 - clip, 1 + clip) A) with rho = exp(now - before).

    Args:
        now: (n, T) log-probabilities, differentiable.
        before: (n, T) under the policy that drew the answers.
        advantages: (n, T).
        mask: (n, T).
        clip: epsilon.

    Returns:
        The loss; clipped where the clamped term is the smaller one.
    """
    ratio = torch.exp(now - before)
    plain, clamped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return Clipped(-torch.minimum(plain, clamped)[mask].mean(), (clamped < plain)[mask].float().mean())


def value_loss(now: Tensor, before: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Clipped:
    """1/2 mean max((V - R)^2, (V_before + clamp(V - V_before, -clip, clip) - R)^2).

    Args:
        now: (n, T) values, differentiable.
        before: (n, T) values when the answers were drawn.
        returns: (n, T) advantages plus those values.
        mask: (n, T).
        clip: largest change of a value that is followed.

    Returns:
        The loss; clipped where the second term is the larger one.
    """
    plain = (now - returns).square()
    clamped = (before + (now - before).clamp(-clip, clip) - returns).square()
    return Clipped(0.5 * torch.maximum(plain, clamped)[mask].mean(), (clamped > plain)[mask].float().mean())
