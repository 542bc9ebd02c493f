"""Signs of collapse in a generated answer: nothing said, the same thing said for ever, or hardly any variety."""

from __future__ import annotations

import re
from typing import Literal

MIN_WORDS = 20
DISTINCT_2 = 0.3
LOOP_REPEATS = 4
LOOP_CHARS = 24
_READ_CHARS = 4000
_LOOP = re.compile(rf"(.{{1,80}}?)\1{{{LOOP_REPEATS - 1},}}", re.DOTALL)


def degeneration(answer: str) -> Literal["empty", "looping", "repetitive"] | None:
    """Name what is wrong with an answer's form.

    Args:
        answer: generated text; the first 4,000 characters are read.

    Returns:
        ``empty`` without a letter or digit; ``looping`` when one block of at most 80 characters stands at least
        4 times in a row and those repeats make up at least 24 characters and half of the answer;
        ``repetitive`` when at least 20 words have a distinct-2 below 0.3; None for an ordinary answer.

    >>> degeneration(" ..."), degeneration("no no no no no no no no no no"), degeneration("A cup of tea.")
    ('empty', 'looping', None)
    """
    text = " ".join(answer.split())[:_READ_CHARS]
    longest = max((match.end() - match.start() for match in _LOOP.finditer(text)), default=0)
    if longest >= LOOP_CHARS and 2 * longest >= len(text):
        return "looping"
    if not any(letter.isalnum() for letter in text):
        return "empty"
    words = text.casefold().split()
    if len(words) >= MIN_WORDS and distinct_n(words, 2) < DISTINCT_2:
        return "repetitive"
    return None


def distinct_n(words: list[str], n: int) -> float:
    """Share of distinct n-grams among all n-grams of a text.

    Args:
        words: the text's words.
        n: length of the n-grams, >= 1.

    Returns:
        A share in (0, 1], or 1 for a text without n-grams.

    Source: Li et al. 2016, arXiv 1510.03055.

    >>> distinct_n("a b a b a".split(), 2)
    0.5
    """
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
