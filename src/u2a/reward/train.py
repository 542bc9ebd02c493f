"""Training of a reward head from a file of preference pairs, judged on prompts it has not seen."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from u2a.config import DataSection
from u2a.config_base import count_of
from u2a.data import prompt_key, read_pairs
from u2a.errors import ConfigError, DataError
from u2a.model_loading import pick_device
from u2a.progress import Advance, Console
from u2a.record import content_id
from u2a.reward.card import card_lines, reward_card
from u2a.reward.embedding import Embedder, EmbeddingReward, train_embedding_reward
from u2a.reward.head import MIN_PROMPTS, refuse_taken
from u2a.reward.lm_head import LanguageModelReward, load_hidden_states, train_language_model_reward
from u2a.reward.loading import absolute, is_causal
from u2a.rows import Source
from u2a.terminal import escaped
from u2a.types import Pair, RewardCard


@dataclass(frozen=True)
class HeadTraining:
    """How a reward head is trained and judged.

    Attributes:
        kind: ``embedding`` (the base is a sentence encoder), ``language_model`` (a causal model), or ``auto`` to see
            from the base's configuration.
        holdout_frac: share of the prompts that the card is measured on, in (0, 1).
        min_prompts: fewest prompts accepted, at least 8.
        max_length: tokens of prompt and answer that a causal base reads, >= 2 (an encoder reads 256 of each text).
        device: device of the base.
        seed: seed of the split and of the card's intervals.

    Raises:
        ConfigError: a number is out of range.
    """

    kind: Literal["auto", "embedding", "language_model"] = "auto"
    holdout_frac: float = 0.2
    min_prompts: int = 20
    max_length: int = 512
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.holdout_frac < 1:
            problems.append(f"holdout_frac: {self.holdout_frac}, expected a share between 0 and 1")
        if self.min_prompts < 2 * MIN_PROMPTS:
            problems.append(f"min_prompts: {self.min_prompts}, expected at least {2 * MIN_PROMPTS}")
        if self.max_length < 2:
            problems.append(f"max_length: {self.max_length}, expected at least 2")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class TrainedHead:
    """A trained and saved reward head.

    Attributes:
        model: the reward model; :func:`u2a.reward.loading.load_reward_model` gives an equal one from ``folder``.
        card: measured on the held-out prompts, for this very head (it is not fitted again on all pairs).
        folder: where it is.
    """

    model: EmbeddingReward | LanguageModelReward
    card: RewardCard
    folder: Path


def train_reward_head(
    base: str,
    pairs: Source,
    out: str | Path,
    settings: HeadTraining = HeadTraining(),
    data: DataSection = DataSection(),
    console: Console | None = None,
) -> TrainedHead:
    """Fit a linear Bradley-Terry head on a frozen base, measure it on held-out prompts, and save it.

    Rows, prompts and folder are checked before a model is loaded.

    Args:
        base: sentence encoder or causal language model: hub id, directory, or ``package:NAME``.
        pairs: preference pairs (path, ``hub:...`` or rows).
        out: absent or empty folder; it appears whole or not at all.
        settings: kind of base, split, device.
        data: column names and system prompt of the pairs.
        console: progress, and the card as the result.

    Returns:
        Model, card and folder.

    Raises:
        ConfigError: the folder is taken.
        DataError: rows that cannot be used, or too few prompts.
        ModelError: the base cannot be loaded.
    """
    console = console or Console(quiet=True)
    refuse_taken(out)
    train, held_out = split_by_prompt(read_pairs(pairs, data), settings)
    base = absolute(base)
    console.say(f"reward head on {base}: {len(train)} pairs to train on, {len(held_out)} held out")
    with console.phase("reward head", unit="texts") as bar:
        model = _fitted(base, train, held_out, settings, bar)
    with console.phase("reward card"):
        card = reward_card(model, held_out, len(train), seed=settings.seed)
    folder = model.save(out, card)
    console.result("\n".join([*card_lines(card), *how_to_use(folder)]))
    return TrainedHead(model, card, folder)


def how_to_use(folder: Path) -> list[str]:
    """Say where a trained head is and which options of a run take it.

    Args:
        folder: of the head.

    Returns:
        Lines.
    """
    path = escaped(shlex.quote(str(folder)))
    return [
        f"saved: {path}",
        f"to select with it: u2a run config.yaml --set reward.model=head --set reward.name_or_path={path}",
        f"to judge with it:  u2a run config.yaml --set reward.eval_model=head --set reward.eval_name_or_path={path}",
        "one run takes it for one of the two: what judges must be another model than what selects",
    ]


def split_by_prompt(pairs: Sequence[Pair], settings: HeadTraining) -> tuple[list[Pair], list[Pair]]:
    """Hold out whole prompts; a pair that stands there twice counts once.

    Args:
        pairs: all pairs.
        settings: ``holdout_frac``, ``min_prompts`` and ``seed``.

    Returns:
        Training pairs and held-out pairs, without a common prompt, the same for any order of ``pairs``.

    Raises:
        DataError: fewer prompts than ``min_prompts``, or too few on either side.
    """
    distinct = {pair.id: pair for pair in pairs}
    keys = {row_id: prompt_key(pair.prompt) for row_id, pair in distinct.items()}
    names = sorted(set(keys.values()), key=lambda key: (content_id(str(settings.seed), key), key))
    n_held = count_of(settings.holdout_frac, len(names))
    if len(names) < settings.min_prompts or len(names) - n_held < MIN_PROMPTS:
        raise DataError(
            f"pairs: {len(distinct)} pairs on {len(names)} prompts, {n_held} of them held out, expected at least "
            f"{settings.min_prompts} prompts and {MIN_PROMPTS} to train on (give more pairs, or hold out fewer)"
        )
    held = set(names[:n_held])
    rows = [distinct[row_id] for row_id in sorted(distinct)]
    return [row for row in rows if keys[row.id] not in held], [row for row in rows if keys[row.id] in held]


def _fitted(
    base: str, train: Sequence[Pair], held_out: Sequence[Pair], settings: HeadTraining, bar: Advance
) -> EmbeddingReward | LanguageModelReward:
    """Load the base and fit the head of its kind."""
    causal = is_causal(base) if settings.kind == "auto" else settings.kind == "language_model"
    if causal:
        states = load_hidden_states(base, settings.device, settings.max_length, [*train, *held_out])
        return train_language_model_reward(states, train, bar)
    return train_embedding_reward(Embedder(base, pick_device(settings.device)), train, bar)
