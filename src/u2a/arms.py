"""The arms of a run: the solution, and the controls it is compared with, which unlearn as many answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from u2a.bilevel.outcome import random_weights
from u2a.bilevel.select import ranking
from u2a.config import RunConfig
from u2a.record import derive_seed
from u2a.types import RewardTable
from u2a.unlearn import InnerProblem

SOLUTION_ARM = "u2a"
NOT_UNLEARNED = ("base", "retrain")  # arms that are other models


def arms_of(config: RunConfig) -> Sequence[str]:
    """Names of the arms that unlearn.

    Args:
        config: options.

    Returns:
        ``u2a`` and the controls, without ``base`` and ``retrain``.
    """
    return [SOLUTION_ARM, *(arm for arm in config.evaluation.controls if arm not in NOT_UNLEARNED)]


def control_weights(
    arm: str, solution: Mapping[str, float], inner: InnerProblem, rewards: RewardTable | None, seed: int
) -> dict[str, float]:
    """Weights of a control that unlearns; it has as many samples as the solution.

    Args:
        arm: ``random_k``, ``full``, ``uniform_top_k`` or ``lowest_reward_k``.
        solution: the solution's weights by id, not empty.
        inner: the candidates.
        rewards: their rewards; ``lowest_reward_k`` needs them.
        seed: of the run.

    Returns:
        Weights by id.
    """
    k = len(solution)
    if arm == "random_k":
        return random_weights(inner, k, derive_seed(seed, "random_k control"))
    if arm == "full":
        return inner.uniform()
    if arm == "uniform_top_k":
        return dict.fromkeys(solution, 1.0 / k)
    assert rewards is not None  # the configuration refuses lowest_reward_k without a reward model
    kept = [row for row in rewards.rows if row.kept]
    order = ranking(-torch.tensor([row.reward for row in kept], dtype=torch.float64), [row.id for row in kept])
    return {kept[index].id: 1.0 / k for index in order[:k]}
