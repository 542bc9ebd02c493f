"""Outer objectives J: values with a per-item formula, and their mean and gradient on a preference set.

Every objective is *higher is better*, is computed per preference pair (or prompt), and is averaged over items,
whatever the batch size. J never enters a loss with another sign: the outer problem minimises g = -J + penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from u2a.batch_size import in_parts
from u2a.bilevel.vectors import norm, zeros_like
from u2a.encoding import Encoded, token_batches
from u2a.errors import NonFiniteError
from u2a.modeling import Params, Policy
from u2a.progress import Advance, Quiet
from u2a.types import Pair


@dataclass(frozen=True)
class Item:
    """One preference pair as the objective sees it.

    Attributes:
        pair: the pair.
        answers: the tokenised answers the objective needs, all to the pair's prompt.
        numbers: one number per answer (reference log-probability, or advantage), or empty.
        token_numbers: one number per answer token and answer (token-level advantages), or empty.
        base: value of the item where the numbers were taken (mean reward), or 0.
    """

    pair: Pair
    answers: tuple[Encoded, ...]
    numbers: tuple[float, ...] = ()
    token_numbers: tuple[tuple[float, ...], ...] = ()
    base: float = 0.0

    @property
    def longest(self) -> Encoded:
        """The longest sequence (it sets the width of a batch)."""
        return max(self.answers, key=lambda answer: len(answer.input_ids))


class Objective(Protocol):
    """An outer objective as a value."""

    @property
    def name(self) -> str:
        """Name with parameters, for records."""
        ...

    def prepare(self, policy: Policy, pairs: Sequence[Pair]) -> list[Item]:
        """Tokenise pairs, and compute what does not depend on theta.

        Args:
            policy: the policy, at the theta where J will be differentiated.
            pairs: preference pairs.

        Returns:
            One item per pair, in order.
        """
        ...

    def per_item(self, policy: Policy, items: Sequence[Item]) -> Tensor:
        """J of each item at the current theta, differentiable.

        Args:
            policy: the policy.
            items: items of one forward batch.

        Returns:
            (items,) values, higher is better.
        """
        ...


def encode_pair(policy: Policy, pair: Pair) -> tuple[Encoded, Encoded]:
    """Tokenise the chosen and the rejected answer of a pair.

    Args:
        policy: gives the encoder.
        pair: the pair.

    Returns:
        (chosen, rejected).
    """
    encode = policy.encoder.encode
    return encode(pair.prompt, pair.chosen, pair.source), encode(pair.prompt, pair.rejected, pair.source)


def columns(values: Tensor, items: Sequence[Item]) -> Tensor:
    """Reshape one value per answer to one row per item.

    Args:
        values: (items x answers,) item by item.
        items: the items.

    Returns:
        (items, answers per item).
    """
    return values.reshape(len(items), -1)


def _log_probs(policy: Policy, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Summed and mean log-probabilities, (items, answers) each."""
    answers = policy.log_probs([answer for item in items for answer in item.answers])
    return columns(answers.sum, items), columns(answers.mean, items)


@dataclass(frozen=True)
class Margin:
    """Preference margin, length-normalised: J_i = s_i^+ / T_i^+ - s_i^- / T_i^-, nats per token.

    Departs: the released code's DPO sum objective; at 370 pairs its gain rankings do not replicate, while this
    one's do (method, section 6b).

    Attributes:
        per_token: divide by the answers' lengths; False takes the summed log-probabilities s_i^+ - s_i^-, nats.
    """

    per_token: bool = True

    @property
    def name(self) -> str:
        """Name for records."""
        return "margin" if self.per_token else "summed_margin"

    def prepare(self, policy: Policy, pairs: Sequence[Pair]) -> list[Item]:
        """Items with chosen and rejected answer."""
        return [Item(pair, encode_pair(policy, pair)) for pair in pairs]

    def per_item(self, policy: Policy, items: Sequence[Item]) -> Tensor:
        """Log-probability of the chosen minus that of the rejected answer."""
        summed, mean = _log_probs(policy, items)
        values = mean if self.per_token else summed
        return values[:, 0] - values[:, 1]


@dataclass(frozen=True)
class DPO:
    """J_i = log sigmoid(b ((s^+ - s_ref^+) - (s^- - s_ref^-))): minus the DPO loss against theta_0.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    Attributes:
        beta: inverse temperature b > 0.
    """

    beta: float = 0.1

    @property
    def name(self) -> str:
        """Name with the inverse temperature."""
        return f"dpo(beta={self.beta:g})"

    def prepare(self, policy: Policy, pairs: Sequence[Pair]) -> list[Item]:
        """Items with both answers and their reference log-probabilities."""
        encoded = [encode_pair(policy, pair) for pair in pairs]
        sums = policy.reference_sums([answer for both in encoded for answer in both]).reshape(-1, 2).tolist()
        return [Item(pair, both, tuple(ref)) for pair, both, ref in zip(pairs, encoded, sums, strict=True)]

    def per_item(self, policy: Policy, items: Sequence[Item]) -> Tensor:
        """Minus the DPO loss of each pair."""
        sums, _ = _log_probs(policy, items)
        ratio = sums - torch.tensor([item.numbers for item in items], dtype=torch.float64).to(sums)
        return F.logsigmoid(self.beta * (ratio[:, 0] - ratio[:, 1]))


@dataclass(frozen=True)
class NLL:
    """Mean log-likelihood of good answers: J_i = s_i^+ / T_i^+, nats per token (minus the NLL)."""

    name: str = "nll"

    def prepare(self, policy: Policy, pairs: Sequence[Pair]) -> list[Item]:
        """Items with the chosen answer."""
        return [Item(pair, (encode_pair(policy, pair)[0],)) for pair in pairs]

    def per_item(self, policy: Policy, items: Sequence[Item]) -> Tensor:
        """Mean log-probability of the chosen answer."""
        _, mean = _log_probs(policy, items)
        return mean[:, 0]


UNNAMED = "custom"


@dataclass(frozen=True)
class CustomObjective:
    """Any function of the model and preference pairs.

    Attributes:
        function: ``(model, pairs) -> (pairs,)`` tensor of values, higher is better, differentiable.
        label: name for records; tells it from another one where a search keeps its progress.
    """

    function: Callable[[nn.Module, Sequence[Pair]], Tensor]
    label: str = UNNAMED

    @property
    def name(self) -> str:
        """Name for records."""
        return self.label

    def prepare(self, policy: Policy, pairs: Sequence[Pair]) -> list[Item]:
        """Items with both answers (they set the batch sizes only)."""
        return [Item(pair, encode_pair(policy, pair)) for pair in pairs]

    def per_item(self, policy: Policy, items: Sequence[Item]) -> Tensor:
        """The function's values."""
        return self.function(policy.model, [item.pair for item in items])


def item_batches(items: Sequence[Item], token_budget: int) -> list[list[int]]:
    """Group items of similar length; an item's answers stay together.

    Args:
        items: items with the same number of answers each.
        token_budget: tokens per forward batch, padding included.

    Returns:
        Indices, each exactly once.
    """
    per_item = max((len(item.answers) for item in items), default=1)
    return token_batches([item.longest for item in items], max(1, token_budget // per_item))


@torch.no_grad()
def objective_values(objective: Objective, policy: Policy, items: Sequence[Item]) -> Tensor:
    """J of each item at the current theta.

    Args:
        objective: the outer objective.
        policy: the policy.
        items: prepared items.

    Returns:
        (items,) float64 on the CPU.

    Raises:
        NonFiniteError: a value is not finite; the pair is named.
    """
    out = torch.zeros(len(items), dtype=torch.float64)

    def compute(batch: list[int]) -> Tensor:
        return objective.per_item(policy, [items[index] for index in batch]).cpu().double()

    for number, batch in enumerate(item_batches(items, policy.token_budget)):
        for part, per_item in in_parts(batch, _width(items, batch), policy.limits, compute):
            _check_values(per_item, [items[index] for index in part], number)
            out[part] = per_item
    return out


def _width(items: Sequence[Item], batch: Sequence[int]) -> int:
    """Tokens of the widest item of a batch, all its answers together."""
    first = items[batch[0]]
    return len(first.longest.input_ids) * len(first.answers)


def _check_values(per_item: Tensor, rows: Sequence[Item], number: int) -> None:
    """Refuse a batch with a value that is not finite."""
    if not torch.isfinite(per_item).all():
        bad = [row.pair.id for row, value in zip(rows, per_item, strict=True) if not torch.isfinite(value)]
        raise NonFiniteError("objective", "score", number, bad)


@dataclass(frozen=True)
class ObjectiveGradient:
    """J on a set of items and its gradient.

    Attributes:
        values: (items,) J of each item, float64, CPU.
        gradient: gradient of their mean by trainable parameter.
    """

    values: Tensor
    gradient: Params


def objective_gradient(
    objective: Objective,
    policy: Policy,
    items: Sequence[Item],
    advance: Advance | None = None,
    weights: Tensor | None = None,
) -> ObjectiveGradient:
    """Differentiate the mean of J over items; the mean does not depend on how items are batched.

    Args:
        objective: the outer objective.
        policy: the policy at the theta of interest; its ``.grad`` fields are not touched.
        items: prepared items, at least one.
        advance: progress, told items.
        weights: (items,) factors on the items' gradients (clipping), or None for 1; the values stay as they are.

    Returns:
        Values and gradient sum_i weight_i grad J_i / items.

    Raises:
        NonFiniteError: a value or the gradient is not finite.
    """
    parameters = policy.trainable()
    total = zeros_like(parameters)
    values = torch.zeros(len(items), dtype=torch.float64)
    factors = torch.ones(len(items)) if weights is None else weights

    def compute(batch: list[int]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        rows = [items[index] for index in batch]
        per_item = objective.per_item(policy, rows)
        _check_values(per_item, rows, number)
        weighted = (factors[batch].to(per_item) * per_item).sum()
        gradients = torch.autograd.grad(weighted, list(parameters.values()), allow_unused=True)
        return per_item.detach().cpu().double(), gradients

    for number, batch in enumerate(item_batches(items, policy.token_budget)):  # noqa: B007  # compute names it
        for part, (per_item, gradients) in in_parts(batch, _width(items, batch), policy.limits, compute):
            values[part] = per_item
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.to(total[name]) / len(items)
        (advance or Quiet()).advance(len(batch))
    if not all(bool(torch.isfinite(value).all()) for value in total.values()):
        raise NonFiniteError("gradient of the objective", "score")
    return ObjectiveGradient(values, total)


def gradient_norms(
    objective: Objective, policy: Policy, items: Sequence[Item], advance: Advance | None = None
) -> Tensor:
    """Length of the gradient of each item's J, one backward pass per item.

    Args:
        objective: the outer objective.
        policy: the policy at the theta of interest.
        items: prepared items.
        advance: progress, told items.

    Returns:
        (items,) float64, CPU.

    Raises:
        NonFiniteError: a value or a gradient is not finite.
    """
    out = torch.zeros(len(items), dtype=torch.float64)
    for index, item in enumerate(items):
        out[index] = norm(objective_gradient(objective, policy, [item], advance).gradient)
    return out
