"""The card of a reward model: what it is worth on pairs it was not trained on, in numbers and in words.

A reward model says "the first answer is better" with probability sigmoid(r_first - r_second). Which answer stands
first is arbitrary, so calibration is measured on the side the model favours: its confidence sigmoid(|margin|) in
[1/2, 1) against whether that side is the chosen one (1), the rejected one (0), or neither (a tie, 1/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from u2a.card_words import in_words
from u2a.data import prompt_key
from u2a.evaluation.stats import Interval, bootstrap_mean, rate_interval
from u2a.reward.association import association, pearson, spearman
from u2a.reward.base import RewardModel
from u2a.reward.head import BradleyTerryHead
from u2a.types import Pair, RewardCard

COIN_BRIER = 0.25  # of a model that says one half of every pair
MAX_BINS, PAIRS_PER_BIN = 10, 20
_SIMULATED = 200


@dataclass(frozen=True)
class Calibration:
    """Calibration error of paired comparisons.

    Attributes:
        ece: expected calibration error, or None without pairs.
        ece_if_calibrated: mean ECE of a calibrated model with the same confidences and as many pairs.
        n_bins: bins asked for.
    """

    ece: float | None
    ece_if_calibrated: float | None
    n_bins: int


def reward_card(
    model: RewardModel, pairs: Sequence[Pair], n_train: int, resamples: int = 1000, seed: int = 0
) -> RewardCard:
    """Measure a reward model on pairs it was not trained on.

    Args:
        model: the reward model; Brier score and log loss take its unit for log odds (nats), as Bradley-Terry does.
        pairs: held-out pairs; a tie counts one half. Those on prompts that a saved head was trained on are left out.
        n_train: pairs it was trained on here (a saved head knows its own).
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.

    Returns:
        The card. The accuracy's interval is Wilson's where every prompt has one pair, else it resamples prompts.
        Correlations are over both answers of every pair. What is undefined is None.

    Raises:
        NonFiniteError: a reward is not finite.
    """
    head = getattr(model, "head", None)
    if isinstance(head, BradleyTerryHead):
        n_train = n_train or head.n_train
        fresh = [pair for pair in pairs if prompt_key(pair.prompt) not in head.prompts]
    else:
        fresh = list(pairs)
    n_trained_on, pairs = len(pairs) - len(fresh), fresh
    n = len(pairs)
    prompts = [pair.prompt for pair in pairs]
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rewards = np.asarray(model.score([*prompts, *prompts], answers).tolist(), dtype=float)
    margins = rewards[:n] - rewards[n:]
    keys = [prompt_key(prompt) for prompt in prompts]
    groups = {str(index): key for index, key in enumerate(keys)}
    columns = np.where(margins == 0, 0.5, margins > 0), _sigmoid(-margins) ** 2, np.logaddexp(0.0, -margins)
    hits, squares, losses = ({str(index): float(v) for index, v in enumerate(column)} for column in columns)
    accuracy = rate_interval(hits, groups, resamples, seed)
    brier = bootstrap_mean(squares, groups, resamples, seed)
    log_loss = bootstrap_mean(losses, groups, resamples, seed)
    lengths = [float(len(answer)) for answer in answers]
    linear, ranked = (
        association(measure, rewards.tolist(), lengths, [*keys, *keys], resamples, seed)
        for measure in (pearson, spearman)
    )
    calibrated = calibration(margins)
    return RewardCard(
        name=model.name,
        n_train=n_train,
        n_pairs=n,
        n_prompts=len(set(keys)),
        n_trained_on=n_trained_on,
        ece=calibrated.ece,
        ece_if_calibrated=calibrated.ece_if_calibrated,
        n_bins=calibrated.n_bins,
        **_named("pair_accuracy", accuracy),
        **_named("brier", brier),
        **_named("log_loss", log_loss),
        **_named("length_correlation", linear),
        **_named("length_rank_correlation", ranked),
    )


def calibration(margins: np.ndarray, n_bins: int | None = None, seed: int = 0) -> Calibration:
    """Expected calibration error of sigmoid(margin), over bins of equal mass.

    ECE = sum_b (n_b / n) |mean confidence in b - share of b ranked rightly|, see the module's text. With few pairs
    it is above 0 for a calibrated model too; how much is simulated, with pairs taken as independent.

    Args:
        margins: (n,) r_chosen - r_rejected in nats.
        n_bins: bins (default: one per 20 pairs, from 1 to 10).
        seed: seed of the simulation.

    Returns:
        The error, what a calibrated model would show, and the number of bins.

    Source: Guo et al. 2017, arXiv 1706.04599, eq. 3; bins of equal mass: Nixon et al. 2019, arXiv 1904.01685.
    """
    n = len(margins)
    if n == 0:
        return Calibration(None, None, 0)
    n_bins = n_bins or max(1, min(MAX_BINS, n // PAIRS_PER_BIN))
    order = np.argsort(np.abs(margins), kind="stable")
    size = np.abs(margins[order])
    confidence, hit = _sigmoid(size), np.where(margins[order] == 0, 0.5, margins[order] > 0)
    middle = (np.searchsorted(size, size, "left") + np.searchsorted(size, size, "right")) / 2
    member = np.eye(n_bins)[np.floor(n_bins * middle / n).astype(int)]
    drawn = np.random.default_rng(seed).random((_SIMULATED, n)) < confidence
    ece = float(np.abs((hit - confidence) @ member).sum() / n)
    return Calibration(ece, float(np.abs((drawn - confidence) @ member).sum(1).mean() / n), n_bins)


def card_lines(card: RewardCard) -> list[str]:
    """Print a card as text.

    Args:
        card: the card.

    Returns:
        Lines, the verdict in words first.
    """

    def number(value: float | None, low: float | None = None, high: float | None = None) -> str:
        if value is None:
            return "undefined"
        return f"{value:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")

    accuracy = number(card.pair_accuracy, card.pair_accuracy_low, card.pair_accuracy_high)
    length = number(card.length_correlation, card.length_correlation_low, card.length_correlation_high)
    ranks = (card.length_rank_correlation, card.length_rank_correlation_low, card.length_rank_correlation_high)
    return [
        f"{card.name}: {in_words(card)}",
        f"held-out pair accuracy  {accuracy} on {card.n_pairs} pairs of {card.n_prompts} prompts (coin 0.5)",
        f"log loss, nats          {number(card.log_loss, card.log_loss_low, card.log_loss_high)} (coin 0.693)",
        f"Brier score             {number(card.brier, card.brier_low, card.brier_high)} (coin 0.25)",
        f"calibration error       {number(card.ece)} in {card.n_bins} bins of equal mass "
        f"(a calibrated model on as many pairs: {number(card.ece_if_calibrated)})",
        f"correlation with length {length} Pearson, {number(*ranks)} Spearman",
    ]


def _named(name: str, interval: Interval) -> dict[str, float | None]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -values))
