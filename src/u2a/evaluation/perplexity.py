"""Perplexity of the retain rows: prompt masked, end-of-turn token scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from u2a.evaluation.stats import bootstrap_ratio
from u2a.modeling import Policy
from u2a.types import Example, Metric


@dataclass(frozen=True)
class RetainNll:
    """Negative log-likelihood of retain rows.

    Attributes:
        nll: summed answer NLL in nats, by row id.
        tokens: answer tokens, by row id.
    """

    nll: dict[str, float]
    tokens: dict[str, float]


def retain_nll(policy: Policy, rows: Sequence[Example]) -> RetainNll:
    """Score the answers of retain rows.

    Args:
        policy: the policy at its current theta.
        rows: retain rows.

    Returns:
        NLL and token counts.
    """
    encoded = [policy.encoder.encode(row.prompt, row.completion, row.source) for row in rows]
    sums = policy.answer_sums(encoded).tolist()
    nll = {row.id: -value for row, value in zip(rows, sums, strict=True)}
    return RetainNll(nll, {row.id: float(item.n_answer) for row, item in zip(rows, encoded, strict=True)})


def perplexity_metric(scored: RetainNll, groups: dict[str, str], resamples: int, seed: int) -> Metric:
    """exp(sum NLL / sum tokens) with a bootstrap interval over prompts.

    Args:
        scored: NLL of the rows.
        groups: prompt key by row id.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        The metric; value None without rows or when the perplexity is beyond floating point (collapse).
    """
    if not all(math.isfinite(value) for value in scored.nll.values()):
        return Metric(value=None, n=len(scored.nll))
    interval = bootstrap_ratio(scored.nll, scored.tokens, groups, resamples, seed)
    return Metric(value=_exp(interval.value), low=_exp(interval.low), high=_exp(interval.high), n=interval.n)


def _exp(value: float | None) -> float | None:
    return None if value is None or value > 700.0 else math.exp(value)
