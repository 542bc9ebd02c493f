"""A probe of the run's reward models: how long one takes to load, and to read a text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from u2a.config_reward import RewardSection
from u2a.forecast.probe import Meter, Unit, counted_flops
from u2a.packaged import resolve_model
from u2a.reward.base import prompt_text
from u2a.reward.embedding import Embedder, EmbeddingReward
from u2a.reward.lm_head import HIDDEN_LENGTH, LanguageModelReward, load_hidden_states
from u2a.reward.loading import load_reward_model
from u2a.reward.models import VALUE_LENGTH
from u2a.types import Pair

TEXTS = 64  # read by a sentence embedder
ANSWERS = 8  # read by a language model


@dataclass(frozen=True)
class RewardCost:
    """What a reward model costs.

    Attributes:
        load_s: seconds to load it.
        unit: cost of one text.
        model: the model itself, kept so that memory is measured with it.
    """

    load_s: float
    unit: Unit
    model: object


def files_bytes(name_or_path: str) -> int | None:
    """Return the size of a model's weights as files.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``.

    Returns:
        Bytes, or None for a model that is not on this machine.
    """
    folder = Path(resolve_model(name_or_path))
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    return sum(sizes) if sizes else None


def probe_reward(
    section: RewardSection, pairs: Sequence[Pair], device: torch.device, max_length: int = HIDDEN_LENGTH
) -> RewardCost:
    """Load a reward model and let it read a few answers.

    Args:
        section: ``model`` and ``name_or_path`` are read; neither ``none`` nor ``implicit``.
        pairs: whose prompts and answers are read, at least one.
        device: of the model.
        max_length: tokens of prompt and answer, as for the run's reward models.

    Returns:
        Its cost.
    """
    meter = Meter(device)
    start = time.perf_counter()
    model, read, count = _reader(section, list(pairs), device, max_length)
    load_s = time.perf_counter() - start
    read(0)
    flops = counted_flops(lambda: read(1))
    peak = meter.peak_bytes(lambda: read(2))
    seconds = meter.seconds(lambda: read(3))
    return RewardCost(load_s, Unit(seconds / count, flops / count, peak), model)


def _reader(
    section: RewardSection, pairs: list[Pair], device: torch.device, max_length: int
) -> tuple[object, Callable[[int], object], int]:
    """The model, a function that makes it read a sample by number, and the texts of a sample."""
    if section.model == "embedding":
        embedder = Embedder(section.name_or_path, device)
        return embedder, *_embedding(embedder, pairs)
    answers = (pairs * ANSWERS)[:ANSWERS]
    prompts, texts = [pair.prompt for pair in answers], [pair.chosen for pair in answers]
    if section.model == "language_model":
        states = load_hidden_states(section.name_or_path, str(device), max(HIDDEN_LENGTH, max_length))
        return states, lambda _: states.means(prompts, texts), len(set(zip(prompts, texts, strict=True)))
    length = max(VALUE_LENGTH, max_length)
    model = load_reward_model(section.name_or_path, section.model, device, length)  # type: ignore[arg-type]
    if isinstance(model, EmbeddingReward):
        return model, *_embedding(model.embedder, pairs)
    distinct = len(set(zip(prompts, texts, strict=True))) if isinstance(model, LanguageModelReward) else len(answers)
    return model, lambda _: model.score(prompts, texts), distinct


def _embedding(embedder: Embedder, pairs: list[Pair]) -> tuple[Callable[[int], object], int]:
    """Samples of an embedder and their size; each carries its number, since a text is embedded once in its life."""
    texts = list(dict.fromkeys(text for p in pairs for text in (prompt_text(p.prompt), p.chosen, p.rejected)))
    some = texts[:: -(-len(texts) // TEXTS)]
    return lambda k: embedder.encode([f"{k} {text}" for text in some]), len(some)
