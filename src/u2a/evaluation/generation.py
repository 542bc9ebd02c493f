"""Batched generation whose answers depend on the prompt and the seed, not on the batch.

Prompts are padded on the left with explicit positions. Sampling adds Gumbel noise to the logits from a generator
seeded by the prompt's tokens, so a prompt gets the same noise in any batch. The model's own generation config
(penalties, sampling) is not used: every arm answers under the same rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from u2a.errors import NonFiniteError
from u2a.modeling import Policy
from u2a.progress import Advance, Quiet
from u2a.types import Message


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
        Answers in the order given, without the end-of-turn token and outer white space. Equal prompts get
        equal answers. (Two logits closer than rounding may still fall either way in another batch.)

    Raises:
        NonFiniteError: the model gives a NaN logit.
    """
    bar = bar or Quiet()
    encoded = [policy.encoder.encode_prompt(prompt) for prompt in prompts]
    distinct = sorted(set(encoded), key=lambda ids: (-len(ids), ids))
    answers: dict[tuple[int, ...], str] = {}
    while len(answers) < len(distinct):
        rest = distinct[len(answers) :]
        size = max(1, policy.token_budget // (len(rest[0]) + max_new_tokens))
        batch = rest[:size]
        for ids, tokens in zip(batch, _decode(policy, batch, max_new_tokens, temperature, seed), strict=True):
            answers[ids] = policy.tokenizer.decode(tokens, skip_special_tokens=True).strip()  # type: ignore[union-attr]
        bar.advance(len(batch))
    return [answers[ids] for ids in encoded]


@torch.no_grad()
def _decode(
    policy: Policy, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, temperature: float, seed: int
) -> list[list[int]]:
    """New tokens of each prompt up to, not including, the first end-of-turn token."""
    width = max(len(ids) for ids in prompts)
    pad, device = policy.encoder.pad_id, policy.device
    input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    noise = [_generator(ids, seed) for ids in prompts] if temperature > 0 else []
    answers: list[list[int]] = [[] for _ in prompts]
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
                running.discard(row)
            else:
                answers[row].append(tokens[row])
        if not running:
            break
        input_ids = torch.tensor(tokens, device=device)[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions[:, -1:] + 1
    return answers


def _generator(ids: tuple[int, ...], seed: int) -> torch.Generator:
    raw = hashlib.blake2b(f"{seed}:{','.join(map(str, ids))}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(raw, "big"))


def _gumbel(generators: Sequence[torch.Generator], width: int) -> Tensor:
    """Standard Gumbel noise, one row per generator: argmax(logits + noise) draws from softmax(logits)."""
    uniform = torch.stack([torch.rand(width, generator=generator, dtype=torch.float64) for generator in generators])
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))).float()
