"""Reward models that are language models themselves: sequence classifiers, token value heads, implicit rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from u2a.batch_size import BatchLimits, forward_batches
from u2a.encoding import Encoded, Encoder, collate
from u2a.errors import ModelError
from u2a.model_loading import load_pretrained
from u2a.modeling import Params, Policy
from u2a.reward.base import Prompts, checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALUE_LENGTH = 2048  # tokens of prompt and answer that a value head reads, unless told otherwise


class SequenceClassifierReward:
    """Any ``AutoModelForSequenceClassification`` with one label (Skywork-Reward and its kin).

    The conversation is rendered with the tokenizer's chat template and tokenised without adding special tokens
    again; sequences are padded on the right. The logit is read in float32.

    Args:
        model: the classifier, ``num_labels == 1``.
        tokenizer: its tokenizer, with a chat template.
        name: a readable name.
        max_length: tokens per conversation; the end of a longer one is not read.
        token_budget: tokens per forward batch, padding included.

    Raises:
        ModelError: several labels, or no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_length: int = 2048,
        token_budget: int = 4096,
    ) -> None:
        _check_one_label(model, tokenizer, name)
        self.name = name
        self._model, self._tokenizer = model.eval(), tokenizer
        self._max_length, self._token_budget = max_length, token_budget
        self._limits = BatchLimits(f"reward {name}")
        pad = model.config.pad_token_id
        if pad is None and tokenizer.pad_token_id != tokenizer.eos_token_id:
            pad = tokenizer.pad_token_id  # an end token taken for padding would hide the one that closes the answer
        self._pad = pad if isinstance(pad, int) else None  # without one, a batch holds one conversation
        model.config.pad_token_id = self._pad

    @torch.no_grad()
    def score(self, prompts: Prompts, answers: Sequence[str]) -> Tensor:
        """Sequence rewards: the model's logit; see :meth:`RewardModel.score`."""
        encoded = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        rewards = torch.zeros(len(encoded))
        budget = self._token_budget if self._pad is not None else 1

        def compute(batch: list[int]) -> Tensor:
            return self._forward([encoded[index].input_ids for index in batch])

        for batch, found in forward_batches(encoded, budget, self._limits, compute):
            rewards[batch] = found
        return checked(rewards, self.name)

    def token_rewards(self, prompts: Prompts, answers: Sequence[str]) -> None:
        """None: the classifier reads whole conversations."""

    def _encode(self, prompt: Sequence[Any], answer: str) -> Encoded:
        turns = [{"role": message.role, "content": message.content} for message in prompt]
        turns.append({"role": "assistant", "content": answer})
        text = str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"][: self._max_length]
        return Encoded(tuple(ids), 1)

    def _forward(self, rows: list[tuple[int, ...]]) -> Tensor:
        width = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), width), self._pad or 0, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row)
            attention_mask[index, : len(row)] = 1
        device = self._model.device
        logits = self._model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
        return logits[:, 0].float().cpu()


class TokenValueHead:
    """Any ``AutoModelForTokenClassification`` with one label: a reward at every answer token.

    The reward of token y_t is the head's output at the position of y_t (it has read x and y_1..y_t); the
    end-of-turn token counts. The sequence reward is the mean over the answer's tokens.

    Args:
        model: the token classifier, ``num_labels == 1``.
        tokenizer: its tokenizer, with a chat template.
        name: a readable name.
        max_length: tokens of prompt and answer; a longer answer is cut.
        token_budget: tokens per forward batch, padding included.

    Raises:
        ModelError: several labels, or no chat template.

    Source: arXiv 2504.06659, section 3 (token-level rewards); the mean over tokens is theirs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_length: int = VALUE_LENGTH,
        token_budget: int = 4096,
    ) -> None:
        _check_one_label(model, tokenizer, name)
        self.name = name
        self._model, self._encoder = model.eval(), Encoder(tokenizer, max_length)
        self._token_budget, self._limits = token_budget, BatchLimits(f"reward {name}")

    def score(self, prompts: Prompts, answers: Sequence[str]) -> Tensor:
        """Sequence rewards: means of the token rewards; see :meth:`RewardModel.score`."""
        rows = self.token_rewards(prompts, answers)
        return torch.stack([row.mean() for row in rows]) if rows else torch.zeros(0)

    @torch.no_grad()
    def token_rewards(self, prompts: Prompts, answers: Sequence[str]) -> list[Tensor]:
        """Rewards of the answer tokens; see :meth:`RewardModel.token_rewards`."""
        encoded = [self._encoder.encode(*item) for item in zip(prompts, answers, strict=True)]
        rows: list[Tensor] = [torch.zeros(0)] * len(encoded)

        def compute(batch: list[int]) -> Tensor:
            inputs = collate([encoded[index] for index in batch], self._encoder.pad_id, self._model.device)
            return self._model(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                position_ids=inputs.position_ids,
            ).logits[..., 0]

        for batch, logits in forward_batches(encoded, self._token_budget, self._limits, compute):
            for place, index in enumerate(batch):
                rows[index] = checked(logits[place, -encoded[index].n_answer :], self.name, index)
        return rows


class ImplicitReward:
    """The reward a preference-trained policy carries: b (log pi_theta - log pi_ref) per answer token.

    The sequence reward is the sum over the answer's tokens, as in DPO; the end-of-turn token counts.

    Args:
        policy: model, adapter and reference.
        theta: trainable parameters at which the reward is read, or None for the current ones. They are put
            in for the duration of a call and taken out again.
        beta: b > 0.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 5; per token: arXiv 2404.12358.
    """

    def __init__(self, policy: Policy, theta: Params | None = None, beta: float = 0.1) -> None:
        self._policy, self._theta, self._beta = policy, theta, beta
        self.name = f"implicit(beta={beta:g})"

    def score(self, prompts: Prompts, answers: Sequence[str]) -> Tensor:
        """Sequence rewards: sums of the token rewards; see :meth:`RewardModel.score`."""
        rows = self.token_rewards(prompts, answers)
        return torch.stack([row.sum() for row in rows]) if rows else torch.zeros(0)

    @torch.no_grad()
    def token_rewards(self, prompts: Prompts, answers: Sequence[str]) -> list[Tensor]:
        """Rewards of the answer tokens; see :meth:`RewardModel.token_rewards`."""
        policy = self._policy
        encoded = [policy.encoder.encode(*item) for item in zip(prompts, answers, strict=True)]
        before = policy.snapshot() if self._theta is not None else None
        try:
            if self._theta is not None:
                policy.restore(self._theta)
            new = self._token_log_probs(encoded)
            with policy.reference():
                old = self._token_log_probs(encoded)
        finally:
            if before is not None:
                policy.restore(before)
        return [checked(self._beta * (a - b), self.name, k) for k, (a, b) in enumerate(zip(new, old, strict=True))]

    def _token_log_probs(self, encoded: Sequence[Encoded]) -> list[Tensor]:
        rows: list[Tensor] = [torch.zeros(0)] * len(encoded)
        policy = self._policy

        def compute(batch: list[int]) -> Tensor:
            return policy.log_probs([encoded[index] for index in batch]).token.cpu()

        for batch, token in forward_batches(encoded, policy.token_budget, policy.limits, compute):
            for place, index in enumerate(batch):
                rows[index] = token[place, -encoded[index].n_answer :]
        return rows


def load_sequence_classifier(name_or_path: str, device: torch.device) -> SequenceClassifierReward:
    """Load a sequence classifier (safetensors only); float32 on the CPU, its own dtype elsewhere.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``.
        device: device of the model.

    Returns:
        The reward model.

    Raises:
        ModelError: it cannot be loaded or is no reward model.
    """
    model, tokenizer = _load(AutoModelForSequenceClassification, name_or_path, device)
    return SequenceClassifierReward(model, tokenizer, name_or_path)


def load_token_value_head(name_or_path: str, device: torch.device, max_length: int = VALUE_LENGTH) -> TokenValueHead:
    """Load a token classifier as value head; return and errors as :func:`load_sequence_classifier`.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``.
        device: device of the model.
        max_length: tokens of prompt and answer; a longer answer is cut.

    Returns:
        The reward model.

    Raises:
        ModelError: it cannot be loaded or is no value head.
    """
    model, tokenizer = _load(AutoModelForTokenClassification, name_or_path, device)
    return TokenValueHead(model, tokenizer, name_or_path, max_length)


def _load(kind: Any, name_or_path: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model, tokenizer = load_pretrained(kind, name_or_path, "reward model", dtype)
    model.to(device)  # type: ignore[arg-type]  # transformers narrows torch's signature
    return model, tokenizer


def _check_one_label(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if model.config.num_labels != 1:
        raise ModelError(f"reward model {name!r} has {model.config.num_labels} labels, expected 1")
    if not tokenizer.chat_template:
        raise ModelError(f"reward model {name!r} has no chat template (set tokenizer.chat_template)")
