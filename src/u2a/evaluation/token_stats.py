"""What a model thinks of every token of an answer, from one pass; membership and memorisation are functions of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from u2a.batch_size import forward_batches
from u2a.errors import NonFiniteError
from u2a.modeling import Policy, evaluation_mode, fused_lora
from u2a.progress import Advance, Quiet
from u2a.types import Example


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Statistics of one answer's T tokens, end-of-turn token included, each given the prompt and the tokens before it.

    Attributes:
        text: the answer as far as it was read (an answer over the maximum length is cut).
        log_prob: (T,) log p(y_t), nats.
        mean: (T,) mu_t = sum_v p(v) log p(v) over the vocabulary, nats.
        variance: (T,) sum_v p(v) (log p(v) - mu_t)^2, >= 0.
        hit: (T,) bool, True where y_t is the model's first choice.
    """

    text: str
    log_prob: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    hit: np.ndarray

    @property
    def mean_log_prob(self) -> float:
        """Mean log-probability per token, nats."""
        return float(self.log_prob.mean())


@torch.no_grad()
def token_stats(policy: Policy, rows: Sequence[Example], bar: Advance | None = None) -> dict[str, TokenStats]:
    """Read every answer once with the policy at its current theta.

    Args:
        policy: the policy; inside ``with policy.reference():`` it is theta_0.
        rows: prompts with answers.
        bar: told of every row.

    Returns:
        Statistics by row id, in the order of the rows.

    Raises:
        NonFiniteError: the model gives NaN or infinite log-probabilities for a row.
    """
    bar = bar or Quiet()
    distinct = list({row.id: row for row in rows}.values())
    encoded = [policy.encoder.encode(row.prompt, row.completion, row.source) for row in distinct]
    found: dict[str, TokenStats] = {}

    def compute(batch: list[int]) -> list[TokenStats]:
        out = policy.log_probs([encoded[index] for index in batch])
        return [
            _row_stats(answer_text(policy, distinct[k]), encoded[k].answer_ids, out.logits[place][out.mask[place]])
            for place, k in enumerate(batch)
        ]

    with evaluation_mode(policy.model), fused_lora(policy.model):
        for batch, stats in forward_batches(encoded, policy.token_budget, policy.limits, compute):
            found |= {distinct[index].id: row for index, row in zip(batch, stats, strict=True)}
            bar.advance(len(batch))
    bad = [row.id for row in distinct if not np.isfinite(found[row.id].log_prob).all()]
    bad += [row.id for row in distinct if not np.isfinite(found[row.id].variance).all()]
    if bad:
        raise NonFiniteError("token log-probability", "evaluate", ids=list(dict.fromkeys(bad)))
    return {row.id: found[row.id] for row in distinct}


def answer_text(policy: Policy, row: Example, max_tokens: int | None = None) -> str:
    """The part of a row's answer that is read.

    Args:
        policy: its encoder says how many tokens fit.
        row: prompt and answer.
        max_tokens: tokens at most, or None for all that fit.

    Returns:
        The answer itself when it fits, else the text of its first tokens.
    """
    item = policy.encoder.encode(row.prompt, row.completion, row.source)
    kept = item.answer_ids[:max_tokens]
    content = item.n_answer - (item.answer_ids[-1] in policy.encoder.end_ids)
    if item.n_cut == 0 and len(kept) >= content:
        return row.completion
    return str(policy.tokenizer.decode(list(kept), skip_special_tokens=True))


def _row_stats(text: str, answer_ids: tuple[int, ...], logits: Tensor) -> TokenStats:
    """Statistics from the (T, vocab) logits that predict an answer's T tokens."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0.0)  # a token of probability 0 adds nothing, and 0 times -inf is NaN
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean[:, None]).square()).sum(-1)
    targets = torch.tensor(answer_ids, device=logits.device)
    picked = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    hit = logits.argmax(-1) == targets
    log_prob, mean, variance = (column.double().cpu().numpy() for column in (picked, mean, variance))
    return TokenStats(text, log_prob, mean, variance, hit.cpu().numpy())
