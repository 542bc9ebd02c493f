"""The one way to load a reward model that is ready for use: a trained head, a classifier, or a value head."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig

from u2a.errors import ModelError
from u2a.model_loading import pick_device
from u2a.packaged import resolve_model
from u2a.reward.base import RewardModel
from u2a.reward.embedding import load_embedding_reward
from u2a.reward.head import is_head, load_head
from u2a.reward.lm_head import load_language_model_reward
from u2a.reward.models import VALUE_LENGTH, load_sequence_classifier, load_token_value_head

Kind = Literal["auto", "head", "sequence_classification", "token_value_head"]


def load_reward_model(
    name_or_path: str,
    kind: Kind = "auto",
    device: torch.device | str = "auto",
    max_length: int = VALUE_LENGTH,
) -> RewardModel:
    """Load a reward model that needs no training.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``; for ``head`` a folder of ``u2a reward train``.
        kind: ``head``, ``sequence_classification``, ``token_value_head``, or ``auto`` to see from the files.
        device: device of the model.
        max_length: tokens of prompt and answer that a value head reads.

    Returns:
        The reward model.

    Raises:
        ModelError: it cannot be loaded, or is no reward model of that kind.
    """
    where = pick_device(str(device))
    found = _kind_of(name_or_path) if kind == "auto" else kind
    if found == "sequence_classification":
        return load_sequence_classifier(name_or_path, where)
    if found == "token_value_head":
        return load_token_value_head(name_or_path, where, max_length)
    refuse_no_head(name_or_path)
    if load_head(name_or_path)[1].kind == "embedding":
        return load_embedding_reward(name_or_path, where)
    return load_language_model_reward(name_or_path, str(where))


def refuse_no_head(folder: str) -> None:
    """Refuse a folder in which there is no trained head.

    Args:
        folder: any path.

    Raises:
        ModelError: no head there.
    """
    if not is_head(folder):
        raise ModelError(f"{folder}: no reward head there (make one with: u2a reward train)")


def _kind_of(name_or_path: str) -> Kind:
    """Kind of a model by its files: a head's folder, or the class named in its configuration."""
    if is_head(name_or_path):
        return "head"
    names = architectures(name_or_path)
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "sequence_classification"
    if any(name.endswith("ForTokenClassification") for name in names):
        return "token_value_head"
    raise ModelError(
        f"{name_or_path}: no reward model ({', '.join(names) or 'no model class named'}; expected a trained head, a "
        "sequence classifier or a token classifier; to train a head on it: u2a reward train)"
    )


def embeds_texts(kind: str, name_or_path: str) -> bool:
    """Tell whether a reward model reads prompts and answers as sentences by themselves, each distinct one once.

    Args:
        kind: as in the option ``reward.model``.
        name_or_path: of the model.

    Returns:
        True for sentence embeddings, fitted or in a trained head.

    Raises:
        ModelError: no readable head there.
    """
    return kind == "embedding" or (kind == "head" and load_head(name_or_path)[1].kind == "embedding")


def architectures(name_or_path: str) -> list[str]:
    """Read the class names in a model's configuration, without its weights.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``.

    Returns:
        Class names, for example ``LlamaForCausalLM``; may be empty.

    Raises:
        ModelError: no readable configuration.
    """
    path = resolve_model(name_or_path)
    try:
        return list(AutoConfig.from_pretrained(path, trust_remote_code=False).architectures or [])
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name_or_path}: no readable model configuration there ({reason})") from None


def is_causal(name_or_path: str) -> bool:
    """Tell whether a model generates text from left to right.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``.

    Returns:
        True for causal language models.
    """
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures(name_or_path))


def absolute(name_or_path: str) -> str:
    """Return a name that holds from every working directory.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``.

    Returns:
        The absolute path of a local directory, anything else unchanged.
    """
    return str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path
