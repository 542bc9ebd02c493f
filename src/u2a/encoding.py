"""From messages to tokens: one chat template for every set, the answer mask, and left-padded batches.

The answer is tokenised behind the rendered generation prompt, exactly as the model would produce it, so the
mask is right by construction: the last ``n_answer`` tokens are the answer and its end-of-turn token.
Sequences are padded on the left; therefore every answer ends at the last position, logits are needed at
the last ``A + 1`` positions only, and no padding enters any mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError
from torch import Tensor

from u2a.errors import DataError, ModelError
from u2a.record import content_id, one_line
from u2a.types import Example, Message, Pair, Partition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """One tokenised prompt and answer.

    Attributes:
        input_ids: prompt tokens followed by answer tokens.
        n_answer: answer tokens (end-of-turn token included unless it was cut), >= 1.
        n_cut: answer tokens cut off by the maximum length.
    """

    input_ids: tuple[int, ...]
    n_answer: int
    n_cut: int = 0

    @cached_property
    def key(self) -> str:
        """Content hash of tokens and mask: the key under which reference log-probs are cached."""
        raw = ",".join(map(str, (self.n_answer, *self.input_ids)))
        return hashlib.blake2b(raw.encode(), digest_size=16).hexdigest()

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.input_ids[-self.n_answer :]


@dataclass(frozen=True)
class Batch:
    """Left-padded sequences.

    Attributes:
        input_ids: (batch, seq) int64.
        attention_mask: (batch, seq) int64, 1 on real tokens.
        position_ids: (batch, seq) int64, 0 at each sequence's first real token.
        targets: (batch, answer) int64, the last ``answer`` tokens.
        answer_mask: (batch, answer) bool, True on answer tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Tensor
    answer_mask: Tensor


class Encoder:
    """Tokenises prompts and answers with the tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template and an end-of-sequence token.
        max_length: most tokens of prompt and answer together, >= 2.
        end_ids: further end-of-turn token ids (a model's generation config may list several).

    Raises:
        ModelError: no chat template or no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, end_ids: Sequence[int] = ()) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template "
                "(use an instruction-tuned model, or set tokenizer.chat_template)"
            )
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if not isinstance(end, int):
            raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end_id = end
        self.end_ids = frozenset({end, *end_ids})
        self.pad_id = pad if isinstance(pad, int) else end
        self._known: dict[tuple[tuple[Message, ...], str], Encoded] = {}

    @property
    def identity(self) -> str:
        """Content id of how texts become tokens: the chat template, and the tokens of a sentence."""
        tokens = self.tokenizer("A few words, 12 numbers (and so on).\n")["input_ids"]
        return content_id(str(self.tokenizer.chat_template), str(tokens))

    def prompt_text(self, prompt: Sequence[Message]) -> str:
        """Render a prompt up to and including the generation prompt.

        Args:
            prompt: turns, the last one the user's.

        Returns:
            The text after which the model answers.
        """
        return self._render(prompt, add_generation_prompt=True)

    def encode_prompt(self, prompt: Sequence[Message]) -> tuple[int, ...]:
        """Tokenise a prompt up to and including the generation prompt.

        Args:
            prompt: turns, the last one the user's.

        Returns:
            Token ids; the special tokens are those of the template, none is added twice.
        """
        return tuple(self.tokenizer(self.prompt_text(prompt), add_special_tokens=False)["input_ids"])

    def encode(self, prompt: Sequence[Message], completion: str, where: str = "") -> Encoded:
        """Tokenise a prompt and its answer.

        Args:
            prompt: turns, the last one the user's.
            completion: the answer's text.
            where: the row's place, for the error message.

        Returns:
            Tokens with the number of answer tokens.

        Raises:
            DataError: the prompt alone leaves no room for an answer.
        """
        key = (tuple(prompt), completion)
        if key not in self._known:
            self._known[key] = self._encoded(prompt, completion, where)
        return self._known[key]

    def _encoded(self, prompt: Sequence[Message], completion: str, where: str) -> Encoded:
        """Tokenise one row, once in the encoder's life."""
        head = self.encode_prompt(prompt)
        room = self.max_length - len(head)
        if room < 1:
            raise DataError(
                f"{where or 'row'}: prompt: {len(head)} tokens leave no room for an answer within "
                f"max_length {self.max_length} (raise data.max_length or leave the row out)"
            )
        answer = self._answer_ids(prompt, head, completion)
        return Encoded(head + answer[:room], min(len(answer), room), max(0, len(answer) - room))

    def _answer_ids(self, prompt: Sequence[Message], head: tuple[int, ...], completion: str) -> tuple[int, ...]:
        """Tokens of the answer up to and including its end-of-turn token."""
        start = self.prompt_text(prompt)
        full = self._render([*prompt, Message(role="assistant", content=completion)], add_generation_prompt=False)
        tail = full[len(start) :] if full.startswith(start) else completion
        ids = self._ids_after(start, head, tail)
        ends = [position for position, token in enumerate(ids) if token in self.end_ids]
        if ends:
            return tuple(ids[: ends[-1] + 1])
        return (*self._ids_after(start, head, tail.rstrip()), self.end_id)

    def _ids_after(self, start: str, head: tuple[int, ...], tail: str) -> list[int]:
        """Tokens of ``tail`` behind a prompt (alone it might get a space first); alone where a token spans both."""
        whole = list(self.tokenizer(start + tail, add_special_tokens=False)["input_ids"])
        if tuple(whole[: len(head)]) == head:
            return whole[len(head) :]
        return list(self.tokenizer(tail, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
        )


def collate(encoded: Sequence[Encoded], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pad sequences on the left.

    Args:
        encoded: at least one sequence.
        pad_id: token put on padded positions (masked; its value changes nothing).
        device: device of the result.

    Returns:
        The batch.

    >>> batch = collate([Encoded((5, 6, 7), 1), Encoded((8, 9), 1)], pad_id=0)
    >>> batch.input_ids.tolist(), batch.position_ids.tolist(), batch.targets.tolist()
    ([[5, 6, 7], [0, 8, 9]], [[0, 1, 2], [0, 0, 1]], [[7], [9]])
    """
    width = max(len(item.input_ids) for item in encoded)
    answer = max(item.n_answer for item in encoded)
    input_ids = torch.full((len(encoded), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(encoded), width), dtype=torch.long)
    answer_mask = torch.zeros((len(encoded), answer), dtype=torch.bool)
    for row, item in enumerate(encoded):
        input_ids[row, width - len(item.input_ids) :] = torch.tensor(item.input_ids)
        attention_mask[row, width - len(item.input_ids) :] = 1
        answer_mask[row, answer - item.n_answer :] = True
    position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
    tensors = (input_ids, attention_mask, position_ids, input_ids[:, -answer:], answer_mask)
    return Batch(*(tensor.to(device) for tensor in tensors))


def token_batches(encoded: Sequence[Encoded], token_budget: int) -> list[list[int]]:
    """Group sequences of similar length so that each batch holds at most ``token_budget`` tokens, padding included.

    Args:
        encoded: sequences.
        token_budget: tokens per batch, >= 1; a longer sequence forms a batch of its own.

    Returns:
        Indices into ``encoded``, each exactly once, longest sequences first (so that a lack of memory
        shows at once); ties keep their order.
    """
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].input_ids))
    batches: list[list[int]] = []
    width = 0
    for index in order:
        if not batches or (len(batches[-1]) + 1) * width > token_budget:
            batches.append([])
            width = len(encoded[index].input_ids)
        batches[-1].append(index)
    return batches


def count_truncated(sets: Partition, encoder: Encoder) -> int:
    """Tokenise every row before a model is loaded; all prompts that leave no room for an answer are one error.

    Args:
        sets: the partition.
        encoder: around the policy's tokenizer, with the most tokens of prompt and answer.

    Returns:
        Answers that are cut off.

    Raises:
        DataError: prompts that leave no room for an answer, or that the chat template refuses.
        ModelError: the tokenizer has no chat template.
    """
    rows: list[tuple[Example | Pair, str]] = [(row, row.completion) for row in (*sets.forget, *sets.retain)]
    for pair in (*sets.finetune, *sets.preference, *sets.evaluation):
        rows += [(pair, pair.chosen), (pair, pair.rejected)]
    n_cut, problems = 0, []
    for row, text in rows:
        try:
            n_cut += encoder.encode(row.prompt, text, row.source).n_cut > 0
        except DataError as error:
            problems += error.problems
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in row.prompt)
            why = f"the chat template refuses the turns {roles} ({error})"
            problems.append(one_line(f"{row.source or 'row'}: prompt: {why} (leave the row out)"))
    if problems:
        raise DataError(list(dict.fromkeys(problems)))
    return n_cut
