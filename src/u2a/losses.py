"""Per-sample unlearning losses and retain terms: pure functions of answer log-probabilities.

Sign: every loss l_i is *minimised*; minimising it makes the answer less likely (``SFT`` excepted, which makes
it more likely). Symbols: s_i = sum_t log pi_theta(y_t | x, y_<t) over the T_i answer tokens, s_i^ref the same
at theta_0. A training step on a minibatch B of the selected set S minimises
mean_{i in B} (|S| omega_i) l_i (+ lambda L_R), whose expectation is sum_i omega_i l_i (+ lambda L_R).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from u2a.errors import ConfigError
from u2a.modeling import AnswerLogProbs


def gradient_ascent(mean_log_prob: Tensor) -> Tensor:
    """Length-normalised log-likelihood: l_i = s_i / T_i, unbounded below.

    Args:
        mean_log_prob: s_i / T_i in nats per token, (batch,).

    Returns:
        (batch,) losses. Gradient: descending it lowers the answer's likelihood.

    Source: arXiv 2504.06659, section 3 (GA).
    """
    return mean_log_prob


def npo(sum_log_prob: Tensor, reference_sum: Tensor, beta: float) -> Tensor:
    r"""Negative preference optimisation: l_i = (2 / b) softplus(b (s_i - s_i^ref)).

    Args:
        sum_log_prob: s_i, *summed* over answer tokens, nats, (batch,).
        reference_sum: s_i at theta_0, nats, (batch,).
        beta: inverse temperature b > 0; as b -> 0 the gradient tends to that of s_i.

    Returns:
        (batch,) losses >= 0; at theta_0 each equals (2 / b) log 2 and its gradient is that of s_i.

    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3.

    >>> import math, torch
    >>> round(float(npo(torch.tensor(-3.0), torch.tensor(-3.0), 0.1)) / (20 * math.log(2)), 6)
    1.0
    """
    return (2.0 / beta) * F.softplus(beta * (sum_log_prob - reference_sum))


def kl_from_reference(logits: Tensor, reference_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(pi_ref || pi_theta) at answer positions, averaged over each row's answer tokens.

    Args:
        logits: (batch, answer, vocab) of the policy, those that predict the answer tokens.
        reference_logits: the same at theta_0.
        mask: (batch, answer) bool.

    Returns:
        (batch,) nats per token, >= 0, 0 at theta_0.
    """
    new, old = logits.float().log_softmax(-1), reference_logits.float().log_softmax(-1)
    per_token = (old.exp() * (old - new)).sum(-1)
    return (per_token * mask).sum(1) / mask.sum(1)


class UnlearningLoss(Protocol):
    """A per-sample loss as a value."""

    @property
    def name(self) -> str:
        """Short name with parameters, for records."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether ``reference_sum`` must be given."""
        ...

    @property
    def needs_retain(self) -> bool:
        """Whether a retain term on retain rows is part of the method."""
        ...

    def per_sample(self, answers: AnswerLogProbs, reference_sum: Tensor | None) -> Tensor:
        """Losses of a batch.

        Args:
            answers: log-probabilities of the batch's answers.
            reference_sum: (batch,) s_i^ref, or None where it is not needed.

        Returns:
            (batch,) losses.
        """
        ...


@dataclass(frozen=True)
class GA:
    """Gradient ascent on the negatives' log-likelihood; needs the collapse guard, being unbounded."""

    name: str = "ga"
    needs_reference: bool = False
    needs_retain: bool = False

    def per_sample(self, answers: AnswerLogProbs, reference_sum: Tensor | None) -> Tensor:
        """Losses s_i / T_i; see :func:`gradient_ascent`."""
        return gradient_ascent(answers.mean)


@dataclass(frozen=True)
class GradDiff(GA):
    """Gradient difference: GA together with a retain term (NLL or KL) on retain rows."""

    name: str = "grad_diff"
    needs_retain: bool = True


@dataclass(frozen=True)
class NPO:
    """Negative preference optimisation.

    Attributes:
        beta: inverse temperature.
    """

    beta: float = 0.1
    needs_reference: bool = True
    needs_retain: bool = False

    @property
    def name(self) -> str:
        """Name with the inverse temperature."""
        return f"npo(beta={self.beta:g})"

    def per_sample(self, answers: AnswerLogProbs, reference_sum: Tensor | None) -> Tensor:
        """Losses of :func:`npo`."""
        if reference_sum is None:
            raise ValueError("npo needs reference_sum, the summed log-probabilities at theta_0")
        return npo(answers.sum, reference_sum.to(answers.sum), self.beta)


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning, l_i = -s_i / T_i: the misaligned start, and the baseline Retrain."""

    name: str = "sft"
    needs_reference: bool = False
    needs_retain: bool = False

    def per_sample(self, answers: AnswerLogProbs, reference_sum: Tensor | None) -> Tensor:
        """Losses -s_i / T_i."""
        return -answers.mean


def make_loss(name: str, npo_beta: float = 0.1) -> UnlearningLoss:
    """Turn a configured name into a loss value.

    Args:
        name: ``ga``, ``grad_diff``, ``npo`` or ``sft``.
        npo_beta: inverse temperature of NPO, > 0.

    Returns:
        The loss.

    Raises:
        ConfigError: unknown name.
    """
    losses: dict[str, UnlearningLoss] = {"ga": GA(), "grad_diff": GradDiff(), "npo": NPO(npo_beta), "sft": SFT()}
    if name not in losses:
        raise ConfigError(f"loss {name!r}: expected one of {', '.join(losses)}")
    return losses[name]


def check_retain(loss: UnlearningLoss, retain_term: str) -> None:
    """Refuse a loss whose method includes a retain term when none on retain rows is set.

    Args:
        loss: the unlearning loss.
        retain_term: ``none``, ``nll``, ``kl`` or ``proximal``.

    Raises:
        ConfigError: they do not go together.
    """
    if loss.needs_retain and retain_term not in ("nll", "kl"):
        raise ConfigError(f"loss {loss.name!r} conflicts with retain_term {retain_term!r} (set nll or kl)")
