"""Batched generation whose answers depend on the prompt and the seed, not on the batch.

Prompts are padded on the left with explicit positions. Sampling adds Gumbel noise to the logits from a generator
seeded by the prompt's tokens, so a prompt gets the same noise in any batch. The model's own generation config
(penalties, sampling) is not used: every arm answers under the same rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from u2a.errors import NonFiniteError
from u2a.modeling import Policy
from u2a.progress import Advance, Quiet
from u2a.types import Message


@dataclass(frozen=True)
class Answer:
    """The token ids of one answer.

    Attributes:
        ids: the tokens before the end-of-turn token; may be empty.
        end_id: the end-of-turn token that was drawn, or None when the answer stopped at the length limit.
    """

    ids: tuple[int, ...]
    end_id: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the model ended the answer itself."""
        return self.end_id is not None

    @property
    def drawn(self) -> tuple[int, ...]:
        """All tokens drawn, >= 1: the end-of-turn token is among them only if the model chose it."""
        return self.ids if self.end_id is None else (*self.ids, self.end_id)


def generate(
    policy: Policy,
    prompts: Sequence[tuple[Message, ...]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    bar: Advance | None = None,
) -> list[str]:
    """Answer prompts with the current theta.

    Args:
        policy: the policy; batches hold at most its token budget, new tokens included.
        prompts: turns, the last one the user's.
        max_new_tokens: tokens per answer, >= 1.
        temperature: 0 for greedy decoding, else softmax temperature.
        seed: seed of the sampling; unused by greedy decoding.
        bar: told of every answer.

    Returns:
        Texts in the order given, without the end-of-turn token and outer white space. Equal prompts get
        equal answers. (Two logits closer than rounding may still fall either way in another batch.)

    Raises:
        NonFiniteError: the model gives a NaN logit.
    """
    answers = generate_ids(policy, prompts, max_new_tokens, temperature, seed, bar)
    return [answer_text(policy, answer) for answer in answers]


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
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    bar: Advance | None = None,
) -> list[Answer]:
    """Answer prompts with the current theta, as the very tokens that were drawn; arguments as for :func:`generate`.

    Args:
        policy: the policy.
        prompts: turns, the last one the user's.
        max_new_tokens: tokens per answer, the end-of-turn token included, >= 1.
        temperature: 0 for greedy decoding, else softmax temperature.
        seed: seed of the sampling.
        bar: told of every answer.

    Returns:
        Answers in the order given; equal prompts get equal answers.

    Raises:
        NonFiniteError: the model gives a NaN logit.
    """
    bar = bar or Quiet()
    encoded = [policy.encoder.encode_prompt(prompt) for prompt in prompts]
    distinct = sorted(set(encoded), key=lambda ids: (-len(ids), ids))
    answers: dict[tuple[int, ...], Answer] = {}
    while len(answers) < len(distinct):
        rest = distinct[len(answers) :]
        size = max(1, policy.token_budget // (len(rest[0]) + max_new_tokens))
        batch = rest[:size]
        found = _decode(policy, batch, max_new_tokens, temperature, seed)
        answers |= dict(zip(batch, found, strict=True))
        bar.advance(len(batch))
    return [answers[ids] for ids in encoded]


@torch.no_grad()
def _decode(
    policy: Policy, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, temperature: float, seed: int
) -> list[Answer]:
    """New tokens of each prompt up to the first end-of-turn token."""
    width = max(len(ids) for ids in prompts)
    pad, device = policy.encoder.pad_id, policy.device
    input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    noise = [_generator(ids, seed) for ids in prompts] if temperature > 0 else []
    answers: list[list[int]] = [[] for _ in prompts]
    ends: list[int | None] = [None] * len(prompts)
    running = set(range(len(prompts)))
    cache = None
    for _ in range(max_new_tokens):
        out = policy.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float().cpu()
        if torch.isnan(logits).any():
            raise NonFiniteError("logit", "generate")
        if noise:
            logits = logits / temperature + _gumbel(noise, logits.shape[1])
        tokens = logits.argmax(-1).tolist()
        for row in sorted(running):
            if tokens[row] in policy.encoder.end_ids:
                ends[row] = tokens[row]
                running.discard(row)
            else:
                answers[row].append(tokens[row])
        if not running:
            break
        input_ids = torch.tensor(tokens, device=device)[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions[:, -1:] + 1
    return [Answer(tuple(ids), end) for ids, end in zip(answers, ends, strict=True)]


def _generator(ids: tuple[int, ...], seed: int) -> torch.Generator:
    raw = hashlib.blake2b(f"{seed}:{','.join(map(str, ids))}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(raw, "big"))


def _gumbel(generators: Sequence[torch.Generator], width: int) -> Tensor:
    """Standard Gumbel noise, one row per generator: argmax(logits + noise) draws from softmax(logits)."""
    uniform = torch.stack([torch.rand(width, generator=generator, dtype=torch.float64) for generator in generators])
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))).float()
