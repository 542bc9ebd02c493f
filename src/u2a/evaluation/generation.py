"""Batched generation whose answers depend on the prompt and the seed, not on the batch.

transformers' ``generate`` does the decoding, on prompts padded on the left. A logits processor does the sampling: it
adds Gumbel noise to the warped logits, from a generator seeded by the prompt's tokens, so a prompt gets the same noise
in any batch. The model's own generation config (penalties, sampling) is not used: every arm answers under the same
rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from u2a.adapter import fused_lora
from u2a.errors import NonFiniteError
from u2a.evaluation.answer_cache import AnswerCache
from u2a.evaluation.decoding import Answer, Decoding, Ids, answer_in_batches, cut_at_end
from u2a.modeling import Policy, evaluation_mode
from u2a.progress import Advance, Quiet
from u2a.types import Message


def generate(
    policy: Policy,
    prompts: Sequence[tuple[Message, ...]],
    decoding: Decoding,
    bar: Advance | None = None,
    cache: AnswerCache | None = None,
) -> list[str]:
    """Answer prompts with the current theta.

    Args:
        policy: the policy; batches hold at most its token budget, new tokens included.
        prompts: turns, the last one the user's.
        decoding: how to draw tokens.
        bar: told of every answer.
        cache: answers found there are not made again; new ones are kept, batch by batch.

    Returns:
        Texts in the order given, without the end-of-turn token and outer white space. Equal prompts get
        equal answers. (Two logits closer than rounding may still fall either way in another batch.)

    Raises:
        NonFiniteError: the model gives a NaN or infinite logit, or rules every token out.
    """
    return [answer_text(policy, answer) for answer in generate_ids(policy, prompts, decoding, bar, cache)]


def answer_text(policy: Policy, answer: Answer) -> str:
    """Decode an answer.

    Args:
        policy: gives the tokenizer.
        answer: the answer's tokens.

    Returns:
        Its text without special tokens and outer white space.
    """
    return policy.tokenizer.decode(list(answer.ids), skip_special_tokens=True).strip()  # type: ignore[union-attr]


def generate_ids(
    policy: Policy,
    prompts: Sequence[tuple[Message, ...]],
    decoding: Decoding,
    bar: Advance | None = None,
    cache: AnswerCache | None = None,
) -> list[Answer]:
    """Answer prompts with the current theta, as the very tokens that were drawn; arguments as for :func:`generate`.

    Args:
        policy: the policy.
        prompts: turns, the last one the user's.
        decoding: how to draw tokens.
        bar: told of every answer.
        cache: answers made before and the place for new ones.

    Returns:
        Answers in the order given; equal prompts get equal answers.

    Raises:
        NonFiniteError: the model gives a NaN or infinite logit, or rules every token out.
    """
    return answer_in_batches(
        [policy.encoder.encode_prompt(prompt) for prompt in prompts],
        decode=lambda batch: _decode(policy, batch, decoding),
        batch_size=lambda longest: max(1, policy.token_budget // (len(longest) + decoding.max_new_tokens)),
        known=cache.for_policy(policy, decoding) if cache is not None else None,
        bar=bar or Quiet(),
        limits=policy.answer_limits,
    )


class PolicyGenerator:
    """Answers prompts with a policy at its current theta.

    Args:
        policy: the policy.
        cache: answers made before and the place for new ones, or None.
    """

    def __init__(self, policy: Policy, cache: AnswerCache | None = None) -> None:
        self._policy, self._cache = policy, cache

    def generate_ids(
        self, prompts: Sequence[tuple[Message, ...]], decoding: Decoding, bar: Advance | None = None
    ) -> list[Answer]:
        """Answer prompts; see :func:`generate_ids`.

        Args:
            prompts: turns, the last one the user's.
            decoding: how to draw tokens.
            bar: told of every answer.

        Returns:
            Answers in the order given; equal prompts get equal answers.
        """
        return generate_ids(self._policy, prompts, decoding, bar, self._cache)

    def text(self, answer: Answer) -> str:
        """Decode an answer.

        Args:
            answer: the answer's tokens.

        Returns:
            Its text without special tokens and outer white space.
        """
        return answer_text(self._policy, answer)


def _decode(policy: Policy, prompts: Sequence[Ids], decoding: Decoding) -> list[Answer]:
    """Answer one batch."""
    encoder, device = policy.encoder, policy.device
    base = policy.model.get_base_model() if isinstance(policy.model, PeftModel) else policy.model
    model = cast(PreTrainedModel, base)  # carries the adapter's layers, enabled or not
    width = max(len(ids) for ids in prompts)
    input_ids = torch.tensor([[encoder.pad_id] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,  # the processor draws, so that the likeliest token is the one drawn
        eos_token_id=sorted(encoder.end_ids),
        pad_token_id=encoder.pad_id,
    )
    draw = _Draw(prompts, decoding, torch.tensor(sorted(encoder.end_ids), device=device))
    with evaluation_mode(policy.model), fused_lora(policy.model), _no_own_settings(model):
        out = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([draw]),
        )
    return [cut_at_end(row, encoder.end_ids) for row in cast(Tensor, out)[:, width:].tolist()]


@contextmanager
def _no_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation config: ``generate`` fills from it whatever ours leaves open (penalties)."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Draw(LogitsProcessor):
    """Turns logits into scores whose largest one is the token drawn, and refuses logits that are not finite.

    Args:
        prompts: token ids of the batch's rows.
        decoding: the decoding rule.
        end_ids: the tokens that end an answer, on the model's device.
    """

    def __init__(self, prompts: Sequence[Ids], decoding: Decoding, end_ids: Tensor) -> None:
        self._width = max(len(ids) for ids in prompts)
        self._temperature = decoding.temperature
        self._warpers: list[LogitsProcessor] = []
        if decoding.top_k is not None:
            self._warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p is not None and decoding.top_p < 1:
            self._warpers.append(TopPLogitsWarper(decoding.top_p))
        self._noise = [_generator(ids, decoding.seed) for ids in prompts]
        self._end_ids = end_ids
        self._running = torch.ones(len(prompts), dtype=torch.bool, device=end_ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Warp the logits of one step and add the noise; rows that have ended are left alone.

        Args:
            input_ids: (batch, seq) prompts and the tokens drawn so far.
            scores: (batch, vocab) float32 logits.

        Returns:
            (batch, vocab) scores.

        Raises:
            NonFiniteError: a running row holds NaN or +infinity, or -infinity everywhere.
        """
        if input_ids.shape[1] > self._width:
            self._running &= ~torch.isin(input_ids[:, -1], self._end_ids)
        top = scores.amax(-1, keepdim=True)  # NaN if any is
        if not torch.isfinite(top[self._running]).all():
            raise NonFiniteError("logit", "generate")
        if self._temperature == 0:
            return scores
        warped = (scores - top) / self._temperature  # the shift changes no probability and keeps the quotient finite
        for warper in self._warpers:
            warped = warper(cast(torch.LongTensor, input_ids), cast(torch.FloatTensor, warped))
        rows = self._running.nonzero()[:, 0]
        noise = _gumbel([self._noise[row] for row in rows.tolist()], scores.shape[1])
        return warped.index_add(0, rows, noise.to(warped))


def _generator(ids: Ids, seed: int) -> torch.Generator:
    raw = hashlib.blake2b(f"{seed}:{','.join(map(str, ids))}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(raw, "big"))


def _gumbel(generators: Sequence[torch.Generator], width: int) -> Tensor:
    """Standard Gumbel noise, one row per generator: argmax(logits + noise) draws from softmax(logits)."""
    uniform = torch.stack([torch.rand(width, generator=generator, dtype=torch.float64) for generator in generators])
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))).float()
