r"""The offline default: frozen sentence embeddings and a linear Bradley-Terry head (:mod:`u2a.reward.head`).

For a prompt x and an answer y with unit embeddings e(x), e(y) the features are phi = [e(y), 8 e(x) * e(y)]
(elementwise). Features of x alone would cancel in the differences; the products let the head judge an answer in the
light of its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from u2a.batch_size import BatchLimits, in_parts
from u2a.data import prompt_key
from u2a.errors import ModelError
from u2a.model_loading import load_pretrained
from u2a.modeling import weights_fingerprint
from u2a.progress import Advance, Quiet
from u2a.reward.base import Prompts, checked, prompt_text
from u2a.reward.head import BradleyTerryHead, HeadBase, fit_head, load_head, refuse_other_base, save_head
from u2a.types import Pair, RewardCard

PRODUCT_SCALE = 8.0
BATCH = 32  # texts of one forward pass on an accelerator


class Embedder:
    """Unit sentence embeddings: mean over the real tokens of the last hidden state, normalised.

    Each text has a forward pass of its own: in a batch its last bits would hang on the texts beside it, and so on
    which ones an earlier process had embedded.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``; an encoder of sentence-transformers' kind.
        device: device of the model.
        max_length: tokens per text; the rest is not read.

    Raises:
        ModelError: the model cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: torch.device | str = "cpu", max_length: int = 256) -> None:
        self.name = name_or_path
        self._max_length = max_length
        self._limits = BatchLimits(f"embedder {name_or_path}", "texts")
        self._model, self._tokenizer = load_pretrained(
            AutoModel, name_or_path, "embedder", torch.float32, may_lack=("pooler.",)
        )
        self._model.to(device).eval()  # type: ignore[arg-type]  # transformers narrows torch's signature
        self._known: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str], bar: Advance | None = None) -> np.ndarray:
        """Embed texts; each distinct text is computed once in the embedder's life.

        Args:
            texts: any number of texts.
            bar: told of every new text embedded.

        Returns:
            (n, width) float64, rows of unit length.
        """
        bar = bar or Quiet()
        # The last bits of a row depend on its batch: on a CPU, where runs are the same to the byte, a text has its own.
        size = 1 if self._model.device.type == "cpu" else BATCH
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        for start in range(0, len(new), size):
            for batch, rows in in_parts(new[start : start + size], 1, self._limits, self._forward):
                self._known |= zip(batch, rows, strict=True)
                bar.advance(len(batch))
        return np.stack([self._known[text] for text in texts]) if texts else np.zeros((0, 0))

    @torch.no_grad()
    def _forward(self, texts: list[str]) -> np.ndarray:
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt")
        inputs = inputs.to(self._model.device)
        hidden = self._model(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"][..., None].double()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1.0)
        return F.normalize(mean, dim=-1).cpu().numpy()

    def base(self) -> HeadBase:
        """Describe the encoder, for a head that is saved.

        Returns:
            Its name, weights and length.
        """
        fingerprint = weights_fingerprint(self._model)
        return HeadBase(kind="embedding", name_or_path=self.name, fingerprint=fingerprint, max_length=self._max_length)


@dataclass(frozen=True)
class EmbeddingReward:
    """Sentence embeddings with a Bradley-Terry head; make it with :func:`train_embedding_reward`.

    Attributes:
        embedder: the frozen encoder.
        head: the fitted head.
    """

    embedder: Embedder
    head: BradleyTerryHead

    @property
    def name(self) -> str:
        """Encoder and size of the training set."""
        return f"embedding({self.embedder.name.removeprefix('package:')}, {self.head.n_train} pairs)"

    def score(self, prompts: Prompts, answers: Sequence[str]) -> Tensor:
        """Sequence rewards in nats; see :meth:`RewardModel.score`."""
        if not answers:
            return torch.zeros(0)
        rows = features(self.embedder, [prompt_text(prompt) for prompt in prompts], answers)
        return checked(torch.from_numpy(self.head.score(rows)), self.name)

    def token_rewards(self, prompts: Prompts, answers: Sequence[str]) -> None:
        """None: one embedding stands for the whole answer."""

    def save(self, folder: str | Path, card: RewardCard | None = None) -> Path:
        """Save the head (not the encoder); see :func:`u2a.reward.head.save_head`.

        Args:
            folder: absent or empty directory.
            card: what the head is worth.

        Returns:
            The directory.
        """
        return save_head(folder, self.head, self.embedder.base(), card)


def load_embedding_reward(folder: str | Path, device: torch.device | str = "cpu") -> EmbeddingReward:
    """Load what :meth:`EmbeddingReward.save` wrote.

    Args:
        folder: the directory.
        device: device of the encoder.

    Returns:
        A reward model with equal scores.

    Raises:
        ModelError: files missing, damaged or of another kind, or the encoder's weights have changed.
    """
    head, base = load_head(folder)
    if base.kind != "embedding":
        raise ModelError(f"{folder}: a head of kind {base.kind!r}, expected 'embedding'")
    embedder = Embedder(base.name_or_path, device, base.max_length)
    refuse_other_base(folder, base, embedder.base().fingerprint)
    return EmbeddingReward(embedder, head)


def train_embedding_reward(embedder: Embedder, pairs: Sequence[Pair], bar: Advance | None = None) -> EmbeddingReward:
    """Fit a Bradley-Terry head on preference pairs.

    Args:
        embedder: the frozen encoder.
        pairs: training pairs, on at least four prompts.
        bar: told of every text embedded.

    Returns:
        The reward model.

    Raises:
        DataError: too few prompts.
    """
    prompts = [prompt_text(pair.prompt) for pair in pairs]
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    embedder.encode([*prompts, *chosen, *rejected], bar)
    good, bad = features(embedder, prompts, chosen), features(embedder, prompts, rejected)
    return EmbeddingReward(embedder, fit_head(good, bad, [prompt_key(pair.prompt) for pair in pairs]))


def features(embedder: Embedder, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Features [e(y), 8 e(x) * e(y)] of prompts and answers.

    Args:
        embedder: the frozen encoder.
        prompts: texts.
        answers: as many texts.

    Returns:
        (n, 2 width) float64.
    """
    first, second = embedder.encode(prompts), embedder.encode(answers)
    return np.hstack([second, PRODUCT_SCALE * first * second])
