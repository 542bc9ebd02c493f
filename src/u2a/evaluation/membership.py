r"""Membership inference: can forgotten texts still be told from texts that the model has never seen?

Each attack gives every text a score, higher = more like a training text. Over the tokens y_1..y_T of an answer:

    loss       (1/T) sum_t log p(y_t)
    zlib       sum_t log p(y_t) / (bytes of the compressed text)
    min-K %    mean of the max(1, floor(K T)) lowest log p(y_t)
    min-K %++  the same of z_t = (log p(y_t) - mu_t) / sigma_t, over the vocabulary, sigma_t^2 >= 1e-6
    reference  loss score minus that of a reference model

The result is AUC = P(score(F) > score(H)) + P(tie) / 2 for forget rows F against a holdout H that was never trained on.
Without a holdout there is no test: retain rows are training texts themselves.

Source: Yeom et al. 2018, arXiv 1709.01604 (loss); Carlini et al. 2021, arXiv 2012.07805 (zlib, reference); Shi et al.
2024, arXiv 2310.16789 (Min-K %); Zhang et al. 2025, arXiv 2404.02936 (Min-K %++).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.optimize import brentq
from scipy.stats import rankdata

from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError
from u2a.evaluation.stats import Interval, wilson
from u2a.evaluation.token_stats import TokenStats
from u2a.types import Example, Metric, Pair

CONVENTION = (
    "AUC of membership attacks, forget rows against unseen texts: 1 = memorised, 0.5 = ideal, "
    "below 0.5 = over-unlearned (forgotten so hard that it shows); other papers turn it round"
)
MIN_K = 0.4  # share of tokens, as in MUSE
_MIN_VARIANCE = 1e-6


@dataclass(frozen=True)
class AttackScores:
    """Scores of one attack; higher = more like a training text.

    Attributes:
        forget: score by id of the forget row.
        holdout: score by id of the holdout row.
    """

    forget: dict[str, float]
    holdout: dict[str, float]


def loss_score(stats: TokenStats) -> float:
    """Mean log-probability per token.

    Args:
        stats: of one answer.

    Returns:
        Nats, <= 0.
    """
    return stats.mean_log_prob


def zlib_score(stats: TokenStats) -> float:
    """Summed log-probability per byte of the compressed text, which allows for texts that are easy for anyone.

    Args:
        stats: of one answer.

    Returns:
        Nats per byte, <= 0.
    """
    return float(stats.log_prob.sum()) / len(zlib.compress(stats.text.encode("utf-8", "surrogatepass")))


def min_k_score(stats: TokenStats, k: float = MIN_K) -> float:
    """Mean of the lowest K % of the token log-probabilities.

    Args:
        stats: of one answer.
        k: share of tokens in (0, 1]; at least one token is read.

    Returns:
        Nats, <= 0.

    Raises:
        ConfigError: ``k`` is out of range.
    """
    return _lowest_mean(stats.log_prob, k)


def min_k_plus_score(stats: TokenStats, k: float = MIN_K) -> float:
    """Mean of the lowest K % of the log-probabilities standardised over the vocabulary.

    Args:
        stats: of one answer.
        k: share of tokens in (0, 1]; at least one token is read.

    Returns:
        Standard deviations, real.

    Raises:
        ConfigError: ``k`` is out of range.
    """
    return _lowest_mean((stats.log_prob - stats.mean) / np.sqrt(np.maximum(stats.variance, _MIN_VARIANCE)), k)


def _lowest_mean(values: np.ndarray, k: float) -> float:
    if not 0.0 < k <= 1.0:
        raise ConfigError(f"k: {k} is not in (0, 1] (it is a share of the tokens: 0.4 for Min-40 %)")
    count = max(1, math.floor(k * len(values) + 1e-9))  # 0.29 * 100 is 28.999999999999996
    return float(np.sort(values)[:count].mean())


def attack_scores(
    forget: Mapping[str, TokenStats],
    holdout: Mapping[str, TokenStats],
    reference: Mapping[str, TokenStats] | None = None,
    k: float = MIN_K,
) -> dict[str, AttackScores]:
    """Score all texts with every attack.

    Args:
        forget: statistics of the forget rows by id.
        holdout: statistics of the holdout rows by id; see :func:`check_holdout`.
        reference: statistics of both under the reference model, or None to leave that attack out.
        k: share of tokens of the Min-K attacks.

    Returns:
        Scores by metric name (``mia_loss``, ``mia_zlib``, ``mia_min_k``, ``mia_min_k_plus``, ``mia_reference``).

    Raises:
        ConfigError: no holdout, or ``k`` is out of range.
    """
    if not holdout:
        raise ConfigError(_NO_HOLDOUT)
    attacks = {
        "mia_loss": lambda key, stats: loss_score(stats),
        "mia_zlib": lambda key, stats: zlib_score(stats),
        "mia_min_k": lambda key, stats: min_k_score(stats, k),
        "mia_min_k_plus": lambda key, stats: min_k_plus_score(stats, k),
    }
    if reference is not None:
        attacks["mia_reference"] = lambda key, stats: loss_score(stats) - loss_score(reference[key])
    return {
        name: AttackScores(
            {key: attack(key, stats) for key, stats in forget.items()},
            {key: attack(key, stats) for key, stats in holdout.items()},
        )
        for name, attack in attacks.items()
    }


_NO_HOLDOUT = (
    "data.holdout: not set, and membership cannot be tested without texts that were never trained on "
    "(retain rows are training texts; give a holdout of the same kind as the forget rows)"
)


def check_holdout(
    forget: Sequence[Example], holdout: Sequence[Example], trained: Iterable[Example | Pair] = ()
) -> None:
    """Refuse a holdout that is missing or that shares a prompt with anything trained on.

    Args:
        forget: forget rows.
        holdout: rows said to be unseen.
        trained: further rows that were trained on (retain, fine-tuning, preference).

    Raises:
        ConfigError: no holdout.
        DataError: a prompt of the holdout stands in the forget or trained rows, up to case and spacing.
    """
    if not holdout:
        raise ConfigError(_NO_HOLDOUT)
    for name, rows in (("forget", forget), ("trained", trained)):
        seen = {prompt_key(row.prompt) for row in rows}
        shared = [row for row in holdout if prompt_key(row.prompt) in seen]
        if shared:
            examples = ", ".join(row.source or row.id for row in shared[:3])
            raise DataError(
                f"holdout: {len(shared)} of {len(holdout)} rows have a prompt of the {name} rows ({examples}); "
                "they are no unseen texts (split the data by prompt)"
            )


def auc(scores: AttackScores) -> float | None:
    """P(score(F) > score(H)) + P(tie) / 2.

    Args:
        scores: of one attack.

    Returns:
        In [0, 1]; None when a side is empty.

    >>> auc(AttackScores({"a": 2.0, "b": 1.0}, {"c": 1.0, "d": 0.0}))
    0.875
    """
    wins = list(placements(scores)[0].values())
    return float(np.mean(wins)) if wins and scores.holdout else None


def placements(scores: AttackScores) -> tuple[dict[str, float], dict[str, float]]:
    """Share of the other side that each text beats; both sides have the mean AUC.

    Args:
        scores: of one attack.

    Returns:
        For each forget row the share of holdout rows below it, for each holdout row the share of forget rows above
        it, ties counting one half; empty when a side is.
    """
    first, second = list(scores.forget.values()), list(scores.holdout.values())
    m, n = len(first), len(second)
    if not m or not n:
        return {}, {}
    ranks = rankdata([*first, *second])
    above = (ranks[:m] - rankdata(first)) / n
    below = 1.0 - (ranks[m:] - rankdata(second)) / m
    return dict(zip(scores.forget, above.tolist(), strict=True)), dict(zip(scores.holdout, below.tolist(), strict=True))


def auc_metric(scores: AttackScores, groups: Mapping[str, str], level: float = 0.95) -> Metric:
    """AUC with DeLong's interval on the logit scale, rows of one prompt counted as one cluster.

    Where every text is placed alike (perfect separation, one score for all) that interval has no width; then it is
    Newcombe's with the number of prompts in place of the number of rows.

    Args:
        scores: of one attack.
        groups: prompt key by row id; ids that are missing form clusters of their own.
        level: coverage in (0, 1).

    Returns:
        The AUC; see :data:`CONVENTION`. ``values`` holds the placement of each forget row (their mean is the AUC),
        ``n`` counts forget prompts. No interval with fewer than two prompts on a side; None when a side is empty.

    Source: DeLong et al. 1988, Biometrics 44; Obuchowski 1997, Biometrics 53 (clusters); Newcombe 2006, Stat. Med. 25,
    method 5.
    """
    above, below = placements(scores)
    n_forget, n_holdout = (len({groups.get(key, key) for key in side}) for side in (scores.forget, scores.holdout))
    if not above:
        return Metric(value=None, n=0)
    value = float(np.mean(list(above.values())))
    if min(n_forget, n_holdout) < 2:
        return Metric(value=value, n=n_forget, values=above)
    variance = mean_variance(above, groups) + mean_variance(below, groups)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    if variance < 1e-12 or not 0.0 < value < 1.0:
        low, high = _newcombe(value, n_forget, n_holdout, z)
    else:
        logit, half = math.log(value / (1 - value)), z * variance**0.5 / (value * (1 - value))
        low, high = (1.0 / (1.0 + math.exp(-max(-700.0, end))) for end in (logit - half, logit + half))
    return Metric(value=value, low=low, high=high, n=n_forget, values=above)


def mean_variance(values: Mapping[str, float], groups: Mapping[str, str]) -> float:
    """Variance of a mean whose items come in clusters.

    Args:
        values: value by item id, in at least two clusters.
        groups: cluster by item id; ids that are missing form clusters of their own.

    Returns:
        I / (I - 1) sum over the I clusters of (sum over items of (value - mean))^2, over the squared number of items.
    """
    mean = float(np.mean(list(values.values())))
    sums: dict[str, float] = {}
    for key, value in values.items():
        name = groups.get(key, key)
        sums[name] = sums.get(name, 0.0) + value - mean
    count = len(sums)
    return count / (count - 1) * sum(total * total for total in sums.values()) / len(values) ** 2


def _newcombe(value: float, m: int, n: int, z: float) -> tuple[float, float]:
    """Values t at distance z standard errors from the estimate, with the standard error of an AUC of t."""
    middle = (m + n) / 2 - 1

    def excess(t: float) -> float:
        variance = t * (1 - t) * (1 + middle * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n)
        return abs(t - value) - z * variance**0.5

    low = 0.0 if value <= 0.0 else float(brentq(excess, 0.0, value - 1e-9))  # type: ignore[arg-type]
    high = 1.0 if value >= 1.0 else float(brentq(excess, value + 1e-9, 1.0))  # type: ignore[arg-type]
    return low, high


def auc_distance(metric: Metric) -> Metric:
    """|AUC - 0.5|, the headline: 0 = forget rows cannot be told from unseen texts.

    Args:
        metric: an AUC.

    Returns:
        The distance in [0, 0.5]; its interval is that of the AUC folded at 0.5.
    """
    if metric.value is None or metric.low is None or metric.high is None:
        return Metric(value=None if metric.value is None else abs(metric.value - 0.5), n=metric.n)
    ends = sorted(abs(end - 0.5) for end in (metric.low, metric.high))
    low = 0.0 if metric.low <= 0.5 <= metric.high else ends[0]
    return Metric(value=abs(metric.value - 0.5), low=low, high=ends[1], n=metric.n)


def tpr_at_fpr(scores: AttackScores, fpr: float = 0.01) -> Interval:
    """Share of forget rows that an attacker finds who accuses at most a share ``fpr`` of the unseen texts.

    Args:
        scores: of one attack.
        fpr: false-positive rate allowed, in (0, 1).

    Returns:
        True-positive rate (``fpr`` itself is ideal) with Wilson's interval, which leaves out that the threshold is
        estimated; all None when the holdout has fewer than 1 / ``fpr`` rows or there is no forget row.

    Raises:
        ConfigError: ``fpr`` is out of range.
    """
    if not 0.0 < fpr < 1.0:
        raise ConfigError(f"fpr: {fpr} is not in (0, 1)")
    allowed = math.floor(fpr * len(scores.holdout) + 1e-9)
    if allowed < 1 or not scores.forget:
        return Interval(None, None, None, 0)
    threshold = sorted(scores.holdout.values(), reverse=True)[allowed]
    found = sum(score > threshold for score in scores.forget.values())
    return wilson(found, len(scores.forget))
