"""A Bradley-Terry head on the hidden states of a frozen causal language model, which may be the policy's own base.

The features of an answer are the mean, over its tokens (end-of-turn token included), of the last hidden state, each
of which has read the prompt. The head is linear, so the reward of an answer is the mean of the rewards of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from u2a.batch_size import BatchLimits, forward_batches
from u2a.config import ModelSection
from u2a.data import prompt_key
from u2a.encoding import Encoded, Encoder, collate
from u2a.errors import DataError, ModelError
from u2a.model_loading import load_model, load_tokenizer
from u2a.modeling import end_ids, weights_fingerprint
from u2a.progress import Advance, Quiet
from u2a.reward.base import Prompts, checked
from u2a.reward.head import BradleyTerryHead, HeadBase, fit_head, load_head, refuse_other_base, save_head
from u2a.types import Pair, RewardCard

HIDDEN_LENGTH = 512  # tokens of prompt and answer, unless told otherwise


class HiddenStates:
    """Last hidden states of a frozen causal language model at the answer's tokens.

    Args:
        model: the causal model; its output layer is not used.
        tokenizer: its tokenizer, with a chat template.
        name_or_path: what the model is loaded by.
        max_length: tokens of prompt and answer; a longer answer is cut.
        token_budget: tokens per forward batch, padding included.

    Raises:
        ModelError: no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name_or_path: str,
        max_length: int = HIDDEN_LENGTH,
        token_budget: int = 2048,
    ) -> None:
        self.name = name_or_path
        self._encoder = Encoder(tokenizer, max_length, end_ids(model))
        self._model: nn.Module = model.eval().base_model
        self._device, self._token_budget = model.device, token_budget
        self._limits = BatchLimits(f"reward {name_or_path}")

    def means(self, prompts: Prompts, answers: Sequence[str], bar: Advance | None = None) -> np.ndarray:
        """Mean hidden state of each answer; equal ones are read once.

        Args:
            prompts: turns before each answer.
            answers: one answer per prompt.
            bar: told of every distinct answer read.

        Returns:
            (n, width) float64, in the order given.
        """
        items = list(zip(prompts, answers, strict=True))
        distinct = list(dict.fromkeys(items))
        read = self._read([prompt for prompt, _ in distinct], [answer for _, answer in distinct], bar)
        rows = {distinct[index]: state.mean(0).numpy() for index, state in read}
        return np.stack([rows[item] for item in items]) if items else np.zeros((0, 0))

    def tokens(self, prompts: Prompts, answers: Sequence[str]) -> list[np.ndarray]:
        """Hidden state of every answer token.

        Args:
            prompts: turns before each answer.
            answers: one answer per prompt.

        Returns:
            One (tokens, width) float64 array per answer.
        """
        rows = {index: state.numpy() for index, state in self._read(prompts, answers, None)}
        return [rows[index] for index in range(len(rows))]

    def base(self) -> HeadBase:
        """Describe the model, for a head that is saved.

        Returns:
            Its name, weights and length.
        """
        fingerprint, length = weights_fingerprint(self._model), self._encoder.max_length
        return HeadBase(kind="language_model", name_or_path=self.name, fingerprint=fingerprint, max_length=length)

    @torch.no_grad()
    def _read(self, prompts: Prompts, answers: Sequence[str], bar: Advance | None) -> Iterator[tuple[int, Tensor]]:
        """Position and (tokens, width) hidden states of every answer, in batches of similar length."""
        bar = bar or Quiet()
        encoded: list[Encoded] = [self._encoder.encode(*item) for item in zip(prompts, answers, strict=True)]

        def compute(batch: list[int]) -> Tensor:
            inputs = collate([encoded[index] for index in batch], self._encoder.pad_id, self._device)
            return self._model(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids
            ).last_hidden_state.cpu()

        for batch, hidden in forward_batches(encoded, self._token_budget, self._limits, compute):
            for place, index in enumerate(batch):
                yield index, hidden[place, -encoded[index].n_answer :].double()
            bar.advance(len(batch))


@dataclass(frozen=True)
class LanguageModelReward:
    """Hidden states with a Bradley-Terry head; make it with :func:`train_language_model_reward`.

    Attributes:
        states: the frozen language model.
        head: the fitted head.
    """

    states: HiddenStates
    head: BradleyTerryHead

    @property
    def name(self) -> str:
        """Language model and size of the training set."""
        return f"language_model({self.states.name.removeprefix('package:')}, {self.head.n_train} pairs)"

    def score(self, prompts: Prompts, answers: Sequence[str]) -> Tensor:
        """Sequence rewards in nats: means of the token rewards; see :meth:`RewardModel.score`."""
        if not answers:
            return torch.zeros(0)
        return checked(torch.from_numpy(self.head.score(self.states.means(prompts, answers))), self.name)

    def token_rewards(self, prompts: Prompts, answers: Sequence[str]) -> list[Tensor]:
        """Rewards of the answer tokens; see :meth:`RewardModel.token_rewards`."""
        rows = self.states.tokens(prompts, answers)
        return [checked(torch.from_numpy(self.head.score(row)), self.name) for row in rows]

    def save(self, folder: str | Path, card: RewardCard | None = None) -> Path:
        """Save the head (not the language model); see :func:`u2a.reward.head.save_head`.

        Args:
            folder: absent or empty directory.
            card: what the head is worth.

        Returns:
            The directory.
        """
        return save_head(folder, self.head, self.states.base(), card)


def train_language_model_reward(
    states: HiddenStates, pairs: Sequence[Pair], bar: Advance | None = None
) -> LanguageModelReward:
    """Fit a Bradley-Terry head on preference pairs.

    Args:
        states: the frozen language model.
        pairs: training pairs, on at least four prompts.
        bar: told of every answer read.

    Returns:
        The reward model.

    Raises:
        DataError: too few prompts, or a prompt that leaves no room for an answer.
    """
    prompts = [pair.prompt for pair in pairs]
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows = states.means([*prompts, *prompts], answers, bar)
    keys = [prompt_key(prompt) for prompt in prompts]
    return LanguageModelReward(states, fit_head(rows[: len(pairs)], rows[len(pairs) :], keys))


def load_hidden_states(
    name_or_path: str, device: str, max_length: int = HIDDEN_LENGTH, check: Sequence[Pair] = ()
) -> HiddenStates:
    """Load a causal language model in float32 (safetensors only) to read its hidden states.

    Args:
        name_or_path: hub id, directory, or ``package:NAME``.
        device: ``auto``, ``cpu``, ``cuda``, ...
        max_length: tokens of prompt and answer.
        check: pairs that must fit into it; they are tokenised before the weights are loaded.

    Returns:
        The reader.

    Raises:
        DataError: prompts that leave no room for an answer.
        ModelError: model or tokenizer cannot be loaded.
    """
    section = ModelSection(name_or_path=name_or_path, device=device)
    tokenizer = load_tokenizer(section)
    encoder, problems = Encoder(tokenizer, max_length), []
    for pair in check:
        try:
            encoder.encode(pair.prompt, pair.chosen, pair.source)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return HiddenStates(load_model(section), tokenizer, name_or_path, max_length)


def load_language_model_reward(folder: str | Path, device: str = "auto") -> LanguageModelReward:
    """Load what :meth:`LanguageModelReward.save` wrote.

    Args:
        folder: the directory.
        device: device of the language model.

    Returns:
        A reward model with equal scores.

    Raises:
        ModelError: files missing, damaged or of another kind, or the language model's weights have changed.
    """
    head, base = load_head(folder)
    if base.kind != "language_model":
        raise ModelError(f"{folder}: a head of kind {base.kind!r}, expected 'language_model'")
    states = load_hidden_states(base.name_or_path, device, base.max_length)
    refuse_other_base(folder, base, states.base().fingerprint)
    return LanguageModelReward(states, head)
