"""Preference of the policy between the two answers of held-out pairs, free of answer length."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from u2a.errors import NonFiniteError
from u2a.modeling import Policy
from u2a.types import Pair


def preference_margins(policy: Policy, pairs: Sequence[Pair]) -> dict[str, float]:
    """Length-normalised log-probability margins: log pi(chosen|x)/T_chosen - log pi(rejected|x)/T_rejected.

    Args:
        policy: the policy at its current theta.
        pairs: held-out pairs.

    Returns:
        Nats per token by pair id. Equal token sequences give exactly 0, whatever the batches.

    Raises:
        NonFiniteError: a log-probability is not finite.
    """
    encode = policy.encoder.encode
    chosen = [encode(pair.prompt, pair.chosen, pair.source) for pair in pairs]
    rejected = [encode(pair.prompt, pair.rejected, pair.source) for pair in pairs]
    distinct = list({item.key: item for item in (*chosen, *rejected)}.values())
    sums = policy.answer_sums(distinct)
    if not torch.isfinite(sums).all():
        bad = {item.key for item, value in zip(distinct, sums, strict=True) if not torch.isfinite(value)}
        rows = zip(pairs, chosen, rejected, strict=True)
        ids = [pair.id for pair, good, poor in rows if good.key in bad or poor.key in bad]
        raise NonFiniteError("log-probability", "evaluate", ids=ids)
    mean = {item.key: float(value) / item.n_answer for item, value in zip(distinct, sums, strict=True)}
    rows = zip(pairs, chosen, rejected, strict=True)
    return {pair.id: mean[good.key] - mean[poor.key] for pair, good, poor in rows}


def preference_hits(margins: dict[str, float]) -> dict[str, float]:
    """Whether each pair is ranked rightly.

    Args:
        margins: margin by pair id.

    Returns:
        1 for a positive margin, 0 for a negative one, 1/2 for a tie, by pair id.

    >>> preference_hits({"a": 0.3, "b": -0.1, "c": 0.0})
    {'a': 1.0, 'b': 0.0, 'c': 0.5}
    """
    return {key: 0.5 if margin == 0 else float(margin > 0) for key, margin in margins.items()}
