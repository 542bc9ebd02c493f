"""Training of the implicit reward model: one pass of DPO on the reward pairs, kept apart from the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from u2a.batch_size import micro_batch
from u2a.encoding import Encoded
from u2a.errors import DataError, NonFiniteError
from u2a.modeling import Policy
from u2a.progress import Advance, Quiet
from u2a.reward.models import ImplicitReward
from u2a.types import Pair


@dataclass(frozen=True)
class DpoSettings:
    """How the implicit reward is trained.

    Attributes:
        beta: inverse temperature b.
        learning_rate: step of AdamW.
        batch_size: pairs per step.
        epochs: passes over the pairs.
    """

    beta: float = 0.1
    learning_rate: float = 1e-4
    batch_size: int = 8
    epochs: int = 1


def train_implicit_reward(
    policy: Policy,
    pairs: Sequence[Pair],
    seed: int,
    settings: DpoSettings = DpoSettings(),
    bar: Advance | None = None,
) -> ImplicitReward:
    """Train a change of the policy from theta_0 by DPO, keep it as a reward model, and put the policy back as it was.

    loss = -mean log sigma(b [(s_w - s_w^ref) - (s_l - s_l^ref)]) with summed answer log-probabilities s.

    Args:
        policy: the policy; its trainable parameters are unchanged afterwards.
        pairs: training pairs, at least one.
        seed: seed of the order.
        settings: training options.
        bar: told of every pair passed.

    Returns:
        The reward model (it shares the policy's weights; only the change is stored).

    Raises:
        DataError: no pairs.
        NonFiniteError: the loss or its gradient is not finite.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7.
    """
    if not pairs:
        raise DataError("reward pairs: none, and the implicit reward is trained on them (raise partition.reward_frac)")
    bar = bar or Quiet()
    both = [(policy.encoder.encode(p.prompt, p.chosen), policy.encoder.encode(p.prompt, p.rejected)) for p in pairs]
    policy.reference_sums([item for pair in both for item in pair])  # fills the cache in large batches
    before = policy.snapshot()
    policy.reset()
    optimiser = torch.optim.AdamW(policy.trainable().values(), lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    try:
        for epoch in range(settings.epochs):
            order = torch.randperm(len(both), generator=generator).tolist()
            for start in range(0, len(order), settings.batch_size):
                chunk = order[start : start + settings.batch_size]
                ids = [pairs[index].id for index in chunk]
                step = epoch * len(order) + start
                _dpo_step(policy, [both[index] for index in chunk], optimiser, settings.beta, (step, ids))
                bar.advance(len(chunk))
        return ImplicitReward(policy, policy.snapshot(), settings.beta)
    finally:
        policy.restore(before)


def _dpo_step(
    policy: Policy,
    batch: Sequence[tuple[Encoded, Encoded]],
    optimiser: torch.optim.Optimizer,
    beta: float,
    where: tuple[int, list[str]],
) -> None:
    """One optimiser step; ``where`` is the position and the pair ids, for the error message."""
    optimiser.zero_grad()
    values = list(policy.trainable().values())

    def losses(count: int) -> list[Tensor]:
        found = []
        for start in range(count):
            rows = batch[start::count]
            sequences = [item for pair in rows for item in pair]
            reference = policy.reference_sums(sequences).to(policy.device)
            rewards = beta * (policy.log_probs(sequences).sum - reference)
            part = -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean() * (len(rows) / len(batch))
            part.backward()
            found.append(part.detach())
        return found

    loss = micro_batch(len(batch), values, policy.limits, losses)
    norm = torch.nn.utils.clip_grad_norm_(values, 1.0)
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        raise NonFiniteError("loss", "reward (implicit)", where[0], where[1])
    optimiser.step()
