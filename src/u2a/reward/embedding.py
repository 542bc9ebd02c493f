r"""The offline default: frozen sentence embeddings and a linear Bradley-Terry head.

For a prompt x and an answer y with unit embeddings e(x), e(y) the features are phi = [e(y), 8 e(x) * e(y)]
(elementwise), centred on the training answers and divided by their root mean variance - one number for all
features: standardising each one alone raises the noise of those that hardly vary. The head minimises

    (1/m) sum_j log(1 + exp(-w . (phi_j^chosen - phi_j^rejected))) + (l2 / 2) |w|^2,

which is convex; ``l2`` is the largest within one standard error of the best cross-validated log loss, with all
pairs of a prompt in one fold. Features of x alone would cancel in the differences; the products let the head
judge an answer in the light of its prompt.

Source: Bradley & Terry (1952); Christiano et al. 2017, arXiv 1706.03741, eq. 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from u2a.data import prompt_key
from u2a.errors import DataError, ModelError, NonFiniteError
from u2a.packaged import resolve_model
from u2a.progress import Advance, Quiet
from u2a.record import content_id, write_whole
from u2a.reward.base import Prompts, checked, prompt_text
from u2a.types import Pair

L2_GRID = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
PRODUCT_SCALE = 8.0
MIN_PROMPTS = 4
_WEIGHTS, _CARD, _FORMAT = "head.safetensors", "head.json", 1


class Embedder:
    """Unit sentence embeddings: mean over the real tokens of the last hidden state, normalised.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``; an encoder of sentence-transformers' kind.
        device: device of the model.
        max_length: tokens per text; the rest is not read.
        batch_size: texts per forward batch.

    Raises:
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self, name_or_path: str, device: torch.device | str = "cpu", max_length: int = 256, batch_size: int = 32
    ) -> None:
        self.name = name_or_path
        self._max_length, self._batch_size = max_length, batch_size
        try:
            path = resolve_model(name_or_path)
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ModelError(f"reward.name_or_path: cannot load embedder {name_or_path!r} ({reason})") from None
        self._model.to(device).eval()
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
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            self._known |= zip(batch, self._forward(batch), strict=True)
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


@dataclass(frozen=True)
class BradleyTerryHead:
    """A linear head on standardised features.

    Attributes:
        weights: (features,) float64.
        centre: (features,) mean over the training answers.
        scale: (1,) root mean variance of the features over them.
        l2: penalty chosen.
        n_train: pairs it was fitted on.
        cv_log_loss: cross-validated log loss per pair in nats at ``l2`` (log 2 = no better than a coin).
    """

    weights: np.ndarray
    centre: np.ndarray
    scale: np.ndarray
    l2: float
    n_train: int
    cv_log_loss: float

    def score(self, features: np.ndarray) -> np.ndarray:
        """Rewards of feature rows.

        Args:
            features: (n, features).

        Returns:
            (n,) rewards in nats (differences are log odds); the mean training answer has 0.
        """
        return ((features - self.centre) / self.scale) @ self.weights


def fit_bradley_terry(differences: np.ndarray, l2: float) -> np.ndarray:
    """Minimise the penalised Bradley-Terry log loss by L-BFGS.

    Args:
        differences: (pairs, features) float64, chosen minus rejected.
        l2: penalty, > 0.

    Returns:
        (features,) weights.

    Raises:
        NonFiniteError: the features hold NaN or infinities.
    """
    if not np.isfinite(differences).all():
        raise NonFiniteError("features of the reward head", "reward")

    rows = torch.from_numpy(differences)
    weights = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.softplus(-(rows @ weights)).mean() + l2 / 2 * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]  # the closure may return a tensor
    return weights.detach().numpy()


def fit_head(chosen: np.ndarray, rejected: np.ndarray, prompts: Sequence[str], folds: int = 5) -> BradleyTerryHead:
    """Standardise, choose the penalty by prompt-grouped cross-validation, and fit on all pairs.

    Args:
        chosen: (pairs, features) features of the preferred answers.
        rejected: the same of the rejected answers.
        prompts: prompt key of each pair; pairs of one prompt stay in one fold.
        folds: folds, at most the number of prompts.

    Returns:
        The head.

    Raises:
        DataError: fewer than four distinct prompts.
    """
    names = sorted(set(prompts))
    if len(names) < MIN_PROMPTS:
        raise DataError(
            f"reward pairs: {len(prompts)} pairs on {len(names)} prompts, expected at least {MIN_PROMPTS} prompts "
            "(raise partition.reward_frac, set data.reward, or set reward.model: none)"
        )
    both = np.vstack([chosen, rejected])
    centre, scale = both.mean(0), np.sqrt(both.var(0).mean(keepdims=True))
    scale = np.where(scale > 1e-12, scale, 1.0)
    differences = (chosen - rejected) / scale
    order = sorted(names, key=lambda name: (content_id(name), name))
    fold_of = {name: index % min(folds, len(names)) for index, name in enumerate(order)}
    fold = np.array([fold_of[prompt] for prompt in prompts])
    losses = [_cv_log_losses(differences, fold, l2) for l2 in L2_GRID]
    means = [float(loss.mean()) for loss in losses]
    best = int(np.argmin(means))
    bound = means[best] + float(losses[best].std()) / len(prompts) ** 0.5
    chosen_l2 = max(index for index, mean in enumerate(means) if mean <= bound)
    weights = fit_bradley_terry(differences, L2_GRID[chosen_l2])
    return BradleyTerryHead(weights, centre, scale, L2_GRID[chosen_l2], len(prompts), means[chosen_l2])


def _cv_log_losses(differences: np.ndarray, fold: np.ndarray, l2: float) -> np.ndarray:
    """Log loss of every pair under the head fitted on the other folds: (pairs,) nats."""
    losses = np.zeros(len(differences))
    for index in np.unique(fold):
        weights = fit_bradley_terry(differences[fold != index], l2)
        losses[fold == index] = np.logaddexp(0.0, -(differences[fold == index] @ weights))
    return losses


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

    def save(self, folder: str | Path) -> Path:
        """Save the head (not the encoder) as safetensors and JSON.

        Args:
            folder: directory, created when absent.

        Returns:
            The directory.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        head = self.head
        save_file({"weights": head.weights, "centre": head.centre, "scale": head.scale}, folder / _WEIGHTS)
        card = {
            "format": _FORMAT,
            "embedder": self.embedder.name,
            "l2": head.l2,
            "n_train": head.n_train,
            "cv_log_loss": head.cv_log_loss,
        }
        write_whole(folder / _CARD, json.dumps(card, indent=1) + "\n")
        return folder


def load_embedding_reward(folder: str | Path, device: torch.device | str = "cpu") -> EmbeddingReward:
    """Load what :meth:`EmbeddingReward.save` wrote.

    Args:
        folder: the directory.
        device: device of the encoder.

    Returns:
        A reward model with equal scores.

    Raises:
        ModelError: files missing, damaged or of a newer format.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
        tensors = load_file(folder / _WEIGHTS)
        weights, centre, scale = (tensors[name] for name in ("weights", "centre", "scale"))
        loss, version = float(card["cv_log_loss"]), int(card["format"])
        head = BradleyTerryHead(weights, centre, scale, float(card["l2"]), int(card["n_train"]), loss)
        embedder = str(card["embedder"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder}: no readable reward head there ({type(error).__name__}: {error})") from None
    if version > _FORMAT:
        raise ModelError(f"{folder}: reward head of format {version} is newer than {_FORMAT} (upgrade u2a)")
    return EmbeddingReward(Embedder(embedder, device), head)


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
