"""What every way of generating shares: the decoding rule, the answer as token ids, and the batches."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from u2a.batch_size import BatchLimits, in_parts
from u2a.errors import ConfigError
from u2a.progress import Advance
from u2a.types import Message

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn from a model's next-token logits.

    Attributes:
        max_new_tokens: most tokens per answer, the end-of-turn token included, >= 1.
        temperature: divides the logits; 0 takes the most likely token, and then top_k, top_p and seed are not used.
        top_k: draw among the k most likely tokens only, >= 1; None for all.
        top_p: draw among the fewest tokens whose probabilities sum to this, in (0, 1]; None for all. Applied after
            temperature and top_k.
        seed: seed of the sampling.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            f"max_new_tokens: {self.max_new_tokens} is not at least 1": self.max_new_tokens >= 1,
            f"temperature: {self.temperature} is not a finite number >= 0": 0 <= self.temperature < math.inf,
            f"top_k: {self.top_k} is not at least 1 (leave it out for all tokens)": self.top_k is None
            or self.top_k >= 1,
            f"top_p: {self.top_p} is not in (0, 1]": self.top_p is None or 0 < self.top_p <= 1,
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ConfigError(problems)

    @property
    def key(self) -> str:
        """The settings that can change an answer, as text."""
        used = asdict(self) if self.temperature > 0 else {"max_new_tokens": self.max_new_tokens}
        return json.dumps(used)


@dataclass(frozen=True)
class Answer:
    """The token ids of one answer.

    Attributes:
        ids: the tokens before the end-of-turn token; may be empty.
        end_id: the end-of-turn token that was drawn, or None when the answer stopped at the length limit.
    """

    ids: Ids
    end_id: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the model ended the answer itself."""
        return self.end_id is not None

    @property
    def drawn(self) -> Ids:
        """All tokens drawn, >= 1: the end-of-turn token is among them only if the model chose it."""
        return self.ids if self.end_id is None else (*self.ids, self.end_id)


def cut_at_end(tokens: Sequence[int], end_ids: frozenset[int]) -> Answer:
    """Make an answer of generated tokens; what follows the first end-of-turn token is padding.

    Args:
        tokens: generated ids.
        end_ids: the end-of-turn tokens.

    Returns:
        The answer.

    >>> cut_at_end([5, 6, 2, 0, 0], frozenset({2}))
    Answer(ids=(5, 6), end_id=2)
    """
    for position, token in enumerate(tokens):
        if token in end_ids:
            return Answer(tuple(tokens[:position]), token)
    return Answer(tuple(tokens))


class Generator(Protocol):
    """Anything that answers prompts."""

    def generate_ids(
        self, prompts: Sequence[tuple[Message, ...]], decoding: Decoding, bar: Advance | None = None
    ) -> list[Answer]:
        """Answer prompts, in the order given; equal prompts get equal answers."""
        ...

    def text(self, answer: Answer) -> str:
        """Decode an answer without special tokens and outer white space."""
        ...


class Known(Protocol):
    """Answers of one model under one decoding rule that need not be made again."""

    def find(self, prompts: Sequence[Ids]) -> dict[Ids, Answer]:
        """The answers known, by prompt."""
        ...

    def add(self, answers: Mapping[Ids, Answer]) -> None:
        """Keep answers for good."""
        ...


def answer_in_batches(
    prompts: Sequence[Ids],
    decode: Callable[[list[Ids]], list[Answer]],
    batch_size: Callable[[Ids], int],
    known: Known | None,
    bar: Advance,
    limits: BatchLimits | None = None,
) -> list[Answer]:
    """Answer each distinct prompt once, longest first, and keep every batch as soon as it is done.

    Args:
        prompts: token ids.
        decode: answers one batch.
        batch_size: prompts per batch, >= 1, by the longest of them.
        known: answers made before and the place for new ones, or None.
        bar: told of every answer.
        limits: batches that fitted before, in prompts; lowered where memory runs out.

    Returns:
        Answers in the order of the prompts.
    """
    counts = Counter(prompts)
    rest = sorted(counts, key=lambda ids: (-len(ids), ids))
    answers = known.find(rest) if known is not None else {}
    if answers:
        rest = [ids for ids in rest if ids not in answers]
        bar.advance(sum(counts[ids] for ids in answers), "cached answers")
    limits = limits or BatchLimits("generation", "prompts")
    while rest:
        size = batch_size(rest[0])
        batch, rest = rest[:size], rest[size:]
        for part, drawn in in_parts(batch, 1, limits, decode):
            found = dict(zip(part, drawn, strict=True))
            if known is not None:
                known.add(found)
            answers |= found
            bar.advance(sum(counts[ids] for ids in part))
    return [answers[ids] for ids in prompts]
