r"""A linear Bradley-Terry head on the features of a frozen base, and the folder it is saved in.

With features phi of prompt and answer, centred on the training answers and divided by their root mean variance - one
number for all features: standardising each one alone raises the noise of those that hardly vary - the head minimises

    (1/m) sum_j log(1 + exp(-w . (phi_j^chosen - phi_j^rejected))) + (l2 / 2) |w|^2,

which is convex; ``l2`` is the largest within one standard error of the best cross-validated log loss, with all
pairs of a prompt in one fold.

Source: Bradley & Terry (1952); Christiano et al. 2017, arXiv 1706.03741, eq. 1.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from u2a.errors import ConfigError, DataError, ModelError, NonFiniteError, RecordError
from u2a.record import Row, content_id, one_line, refuse_foreign_link, write_whole
from u2a.types import RewardCard

L2_GRID = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
MIN_PROMPTS = 4
_WEIGHTS, _ABOUT, _CARD, _FORMAT = "head.safetensors", "head.json", "card.json", 2


class HeadBase(Row):
    """The frozen model a head reads.

    Attributes:
        kind: ``embedding`` (sentence encoder) or ``language_model`` (hidden states of a causal model).
        name_or_path: hub id, directory, or ``package:NAME``.
        fingerprint: of its weights; a head is refused on any other ones.
        max_length: tokens read.
    """

    kind: Literal["embedding", "language_model"]
    name_or_path: str
    fingerprint: str
    max_length: int


class _About(Row):
    """What ``head.json`` holds beside the tensors."""

    format: int
    base: HeadBase
    l2: float
    n_train: int
    cv_log_loss: float
    prompts: tuple[str, ...] = ()


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
        prompts: keys of the prompts it was fitted on (hashes); none for a head from before they were kept.
    """

    weights: np.ndarray
    centre: np.ndarray
    scale: np.ndarray
    l2: float
    n_train: int
    cv_log_loss: float
    prompts: frozenset[str] = frozenset()

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


def check_prompts(prompts: Sequence[str], option: str | None = None) -> None:
    """Refuse pairs on which no head can be fitted.

    Args:
        prompts: prompt key of each pair.
        option: of a run, that asks for the head; None where there is none.

    Raises:
        DataError: fewer than four distinct prompts.
    """
    n = len(set(prompts))
    if n < MIN_PROMPTS:
        where = "" if option is None else f"{option}: "
        remedy = f"raise partition.reward_frac, set data.reward, or set {option}: none" if option else "give more pairs"
        raise DataError(
            f"{where}reward pairs: {len(prompts)} pairs on {n} prompts, expected at least {MIN_PROMPTS} prompts "
            f"({remedy})"
        )


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
    check_prompts(prompts)
    names = sorted(set(prompts))
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
    fitted = L2_GRID[chosen_l2], len(prompts), means[chosen_l2], frozenset(names)
    return BradleyTerryHead(weights, centre, scale, *fitted)


def _cv_log_losses(differences: np.ndarray, fold: np.ndarray, l2: float) -> np.ndarray:
    """Log loss of every pair under the head fitted on the other folds: (pairs,) nats."""
    losses = np.zeros(len(differences))
    for index in np.unique(fold):
        weights = fit_bradley_terry(differences[fold != index], l2)
        losses[fold == index] = np.logaddexp(0.0, -(differences[fold == index] @ weights))
    return losses


def is_head(folder: str | Path) -> bool:
    """Tell whether a folder holds a trained head.

    Args:
        folder: any path.

    Returns:
        True when :func:`load_head` would try it.
    """
    return (Path(folder) / _ABOUT).is_file()


def refuse_taken(folder: str | Path) -> None:
    """Refuse a folder that something else is in, before any work is done.

    Args:
        folder: where a head is to be saved.

    Raises:
        ConfigError: it is a file, or holds anything.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path}: not an empty folder (choose another one, or remove it)")


def save_head(folder: str | Path, head: BradleyTerryHead, base: HeadBase, card: RewardCard | None = None) -> Path:
    """Save a head (not its base) as safetensors and JSON; the folder appears whole or not at all.

    Args:
        folder: absent or empty.
        head: the head.
        base: the model it reads.
        card: what it is worth, for the reader of the folder.

    Returns:
        The directory.

    Raises:
        ConfigError: the folder is not empty.
    """
    refuse_taken(folder)
    target = Path(folder).resolve()
    about = _About(
        format=_FORMAT,
        base=base,
        l2=head.l2,
        n_train=head.n_train,
        cv_log_loss=head.cv_log_loss,
        prompts=tuple(sorted(head.prompts)),
    )
    aside = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        save_file({"weights": head.weights, "centre": head.centre, "scale": head.scale}, aside / _WEIGHTS)
        with (aside / _WEIGHTS).open("rb") as file:
            os.fsync(file.fileno())
        write_whole(aside / _ABOUT, about.model_dump_json(indent=1) + "\n")
        if card is not None:
            write_whole(aside / _CARD, card.model_dump_json(indent=1) + "\n")
        os.replace(aside, target)  # gives way to nothing but an empty folder
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Path(folder)


def load_head(folder: str | Path) -> tuple[BradleyTerryHead, HeadBase]:
    """Load what :func:`save_head` wrote.

    Args:
        folder: the directory.

    Returns:
        The equal head, and the base it reads.

    Raises:
        ModelError: files missing, damaged or of another format.
    """
    folder = Path(folder)
    try:
        for name in (_ABOUT, _WEIGHTS):
            refuse_foreign_link(folder / name)
        about = _About.model_validate_json((folder / _ABOUT).read_text(encoding="utf-8"))
        tensors = load_file(folder / _WEIGHTS)
        weights, centre, scale = (tensors.pop(name) for name in ("weights", "centre", "scale"))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, RecordError) as error:
        reason = one_line("; ".join(str(error).splitlines()))
        raise ModelError(f"{folder}: no readable reward head there ({type(error).__name__}: {reason})") from None
    if tensors or any(tensor.dtype != np.float64 for tensor in (weights, centre, scale)):
        raise ModelError(f"{folder}: no readable reward head there (other tensors than three of float64)")
    if about.format != _FORMAT:
        raise ModelError(f"{folder}: reward head of format {about.format}, expected {_FORMAT} (train it again)")
    if weights.ndim != 1 or centre.shape != weights.shape or scale.shape != (1,):
        raise ModelError(f"{folder}: no readable reward head there (tensors of shapes that do not fit)")
    if not all(np.isfinite(tensor).all() for tensor in (weights, centre, scale)) or scale[0] <= 0:
        raise ModelError(f"{folder}: no readable reward head there (weights not finite, or a scale not above 0)")
    fitted = about.l2, about.n_train, about.cv_log_loss, frozenset(about.prompts)
    return BradleyTerryHead(weights, centre, scale, *fitted), about.base


def refuse_other_base(folder: str | Path, base: HeadBase, fingerprint: str) -> None:
    """Refuse a base whose weights are not those the head was trained on.

    Args:
        folder: the head's directory, for the message.
        base: the base it was trained on.
        fingerprint: of the base that was loaded.

    Raises:
        ModelError: they differ.
    """
    if base.fingerprint != fingerprint:
        raise ModelError(
            f"{folder}: the weights of {base.name_or_path!r} are not those this head was trained on (train it again)"
        )
