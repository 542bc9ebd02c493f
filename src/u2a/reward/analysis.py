"""Stage 2: build the configured reward model and analyse the negatives with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from u2a.bilevel.select import ranking
from u2a.config_base import count_of
from u2a.config_reward import RewardSection
from u2a.data import prompt_key
from u2a.errors import ConfigError
from u2a.model_loading import pick_device
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.reward.base import RewardModel, naming
from u2a.reward.card import reward_card
from u2a.reward.embedding import Embedder, train_embedding_reward
from u2a.reward.implicit import train_implicit_reward
from u2a.reward.lm_head import HIDDEN_LENGTH, load_hidden_states, train_language_model_reward
from u2a.reward.loading import load_reward_model
from u2a.reward.models import VALUE_LENGTH
from u2a.types import Example, Pair, RewardRow, RewardTable

TRAINED_HERE = ("embedding", "language_model", "implicit")  # reward models that are fitted on the run's own pairs


def build_reward_model(
    section: RewardSection,
    pairs: Sequence[Pair],
    policy: Policy | None,
    seed: int,
    progress: Console,
    device_name: str = "auto",
    max_length: int = 512,
) -> RewardModel | None:
    """Load or train the reward model of the options.

    Args:
        section: reward options; ``model`` and ``name_or_path`` are read.
        pairs: training pairs of ``embedding``, ``language_model`` and ``implicit``; pretrained models ignore them.
        policy: gives the device, and the model of ``implicit`` (which leaves it unchanged).
        seed: seed of the training order.
        progress: shows the phase ``reward model``.
        device_name: where the model goes without a policy, as in ``model.device``.
        max_length: tokens of prompt and answer that ``language_model`` and ``token_value_head`` read at least
            (``data.max_length``); the former reads 512 and the latter 2048 where that is more.

    Returns:
        The reward model, or None for ``none``.

    Raises:
        ConfigError: ``implicit`` without a policy.
        DataError: too few training pairs, or a prompt that leaves no room for an answer.
        ModelError: a model cannot be loaded.
    """
    device = policy.device if policy is not None else pick_device(device_name)
    if section.model == "none":
        return None
    with progress.phase("reward model", unit="texts") as bar:
        if section.model == "embedding":
            return train_embedding_reward(Embedder(section.name_or_path, device), pairs, bar)
        if section.model == "language_model":
            states = load_hidden_states(section.name_or_path, str(device), max(HIDDEN_LENGTH, max_length), pairs)
            return train_language_model_reward(states, pairs, bar)
        if section.model == "implicit":
            if policy is None:
                raise ConfigError("reward.model: implicit needs the policy, got none")
            return train_implicit_reward(policy, pairs, seed, bar=bar)
        return load_reward_model(section.name_or_path, section.model, device, max(VALUE_LENGTH, max_length))


def split_reward_pairs(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Split the reward pairs for the selecting and the evaluating reward head.

    Args:
        pairs: the partition's reward pairs.

    Returns:
        Two lists without a common prompt, of nearly equal numbers of prompts, whatever the order of the pairs.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.id):
        groups.setdefault(prompt_key(pair.prompt), []).append(pair)
    keys = sorted(groups)
    return [p for key in keys[0::2] for p in groups[key]], [p for key in keys[1::2] for p in groups[key]]


def analyse(
    model: RewardModel,
    forget: Sequence[Example],
    preference: Sequence[Pair],
    section: RewardSection,
    n_train: int = 0,
) -> RewardTable:
    """Score every negative, mark its low-reward tokens, and pre-filter when the options ask for it.

    The low-reward threshold is the ``section.quantile`` of the preference set's chosen answers: of their token
    rewards, pooled, when the model gives them, else of their sequence rewards. rho_i, the proportion of
    low-reward tokens, counts tokens strictly below it.

    Args:
        model: the reward model.
        forget: negative candidates.
        preference: PA pairs: they set the threshold, and the card is measured on them.
        section: quantile and pre-filter; with ``prefilter_frac`` f the ceil(f n) candidates of lowest
            reward are kept, ties by id, and with ``prefilter_below`` those of them below :func:`midpoint`.
        n_train: pairs the model was trained on here, for the card.

    Returns:
        One row per candidate in the order given.

    Raises:
        NonFiniteError: a reward is not finite.
        ConfigError: ``prefilter_below`` without pairs, or no candidate lies below.
    """
    prompts, answers = [row.prompt for row in forget], [row.completion for row in forget]
    with naming([row.id for row in forget]):
        tokens = model.token_rewards(prompts, answers)
        rewards = model.score(prompts, answers).tolist()
    threshold = _threshold(model, preference, section.quantile)
    n_kept = count_of(section.prefilter_frac, len(forget))
    order = ranking(-torch.tensor(rewards, dtype=torch.float64), [row.id for row in forget])
    below = midpoint(model, preference) if section.prefilter_below == "midpoint" else math.inf
    kept = {index for index in order[:n_kept] if rewards[index] < below}
    if forget and not kept:
        raise ConfigError(
            f"reward.prefilter_below: no candidate's reward is below {below:.4g} "
            "(set it to none: this reward model takes all of them for good answers)"
        )
    rows = []
    for index, example in enumerate(forget):
        token = None if tokens is None else tokens[index]
        low = None if token is None or threshold is None else float((token < threshold).double().mean())
        rows.append(
            RewardRow(
                id=example.id,
                reward=rewards[index],
                token_rewards=None if token is None else tuple(token.tolist()),
                low_token_frac=low,
                kept=index in kept,
            )
        )
    card = reward_card(model, preference, n_train)
    return RewardTable(
        card=card,
        threshold=threshold,
        quantile=section.quantile,
        midpoint=below if math.isfinite(below) else None,
        rows=tuple(rows),
    )


def midpoint(model: RewardModel, preference: Sequence[Pair]) -> float:
    """The reward half-way between good and bad answers: what tells them apart best where both spread alike.

    Args:
        model: the reward model.
        preference: PA pairs.

    Returns:
        Mean over the pairs of (r_chosen + r_rejected) / 2.

    Raises:
        ConfigError: there are no pairs.
        NonFiniteError: a reward is not finite.
    """
    if not preference:
        raise ConfigError("reward.prefilter_below: midpoint needs preference pairs (set data.preferences)")
    prompts = [pair.prompt for pair in preference]
    answers = [*(pair.chosen for pair in preference), *(pair.rejected for pair in preference)]
    return float(model.score([*prompts, *prompts], answers).double().mean())


def _threshold(model: RewardModel, preference: Sequence[Pair], quantile: float) -> float | None:
    if not preference:
        return None
    prompts, chosen = [pair.prompt for pair in preference], [pair.chosen for pair in preference]
    tokens = model.token_rewards(prompts, chosen)
    pooled = model.score(prompts, chosen) if tokens is None else torch.cat(tokens)
    return float(np.quantile(pooled.double().numpy(), quantile))
