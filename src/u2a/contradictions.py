"""When two rows contradict each other: one calls an answer good that the other one calls bad."""

from __future__ import annotations

from collections.abc import Sequence

from u2a.folding import fold
from u2a.record import content_id
from u2a.types import Message


def answer_key(prompt: Sequence[Message], answer: str) -> str:
    """Return the id of an answer to a conversation.

    What stands in a system turn counts: it may be what makes an answer good or bad. Case and spacing do not count, but
    for answers of several lines, in which indents may be all that differs (code).

    Args:
        prompt: turns before the answer.
        answer: the answer.

    Returns:
        Equal for the same answer to the same turns.
    """
    text = answer.strip()
    said = text if "\n" in text else fold(text)
    return content_id(*(part for turn in prompt for part in (turn.role, fold(turn.content))), "answer", said)
