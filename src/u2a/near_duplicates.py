"""Near-duplicate texts: Jaccard similarity of word 3-shingles of at least 0.9, found exactly.

Two sets that similar share one of their rarest shingles, so only texts that meet in an index of these are compared.
The result is that of comparing all pairs, without the misses and the random seed of MinHash.

Source: Bayardo, Ma & Srikant (2007), "Scaling up all pairs similarity search" (prefix and size filters).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat

PARTS, OF = 9, 10  # the threshold 0.9 in whole numbers, so that no rounding decides

_UNSPACED = re.compile(r"([\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff])")  # scripts written without spaces
_WORD = re.compile(r"\w+")

Shingle = tuple[int | str, ...]


@dataclass(frozen=True)
class Fingerprint:
    """What of a prompt with its answers is compared.

    Attributes:
        prompt_key: equal for equal prompts.
        answers: shingles of each answer.
        whole: shingles of prompt and answers.
    """

    prompt_key: str
    answers: tuple[frozenset[Shingle], ...]
    whole: frozenset[Shingle]


def fingerprint(prompt_key: str, prompt: str, answers: Sequence[str]) -> Fingerprint:
    """Cut a prompt and its answers into shingles of three words; punctuation does not count.

    Args:
        prompt_key: id of the prompt.
        prompt: its text, folded by :func:`u2a.folding.fold`.
        answers: one answer, or the chosen and the rejected one (which are told apart), folded.

    Returns:
        The fingerprint. A text of fewer than three words has one shingle, a text without words none.
    """
    parts = tuple(_shingles(slot, answer) for slot, answer in enumerate(answers))
    return Fingerprint(prompt_key, parts, frozenset().union(_shingles(0, prompt), *parts))


def _shingles(slot: int, text: str) -> frozenset[Shingle]:
    words = _WORD.findall(text if text.isascii() else _UNSPACED.sub(r" \1 ", text))
    if len(words) < 3:
        return frozenset([(slot, *words)]) if words else frozenset()
    return frozenset(zip(repeat(slot), words, words[1:], words[2:], strict=False))


def alike(first: Fingerprint, second: Fingerprint) -> bool:
    """Tell whether two texts are near-duplicates; under one prompt every answer must be so by itself, too.

    Args:
        first: one text.
        second: another one.

    Returns:
        True when the Jaccard similarity is at least 0.9.
    """
    same_prompt = first.prompt_key == second.prompt_key
    if same_prompt and not all(map(_similar, first.answers, second.answers)):
        return False
    return _similar(first.whole, second.whole)


def _similar(first: frozenset[Shingle], second: frozenset[Shingle]) -> bool:
    shared = len(first & second)
    return shared > 0 and OF * shared >= PARTS * (len(first) + len(second) - shared)


def near_labels(texts: Sequence[Fingerprint], labels: Sequence[int]) -> list[int]:
    """Find for every text which labels stand on its near-duplicates.

    Args:
        texts: fingerprints of distinct texts.
        labels: one bit mask per text, for example of the sets it stands in.

    Returns:
        Per text the union of the masks of all other texts that are near-duplicates of it; 0 without any.
    """
    frequency = Counter(shingle for text in texts for shingle in text.whole)
    ranks = {shingle: rank for rank, shingle in enumerate(sorted(frequency, key=frequency.__getitem__))}
    join = _Join(texts, labels, [0] * len(texts))
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i].whole)):
        rare = sorted(ranks[shingle] for shingle in texts[i].whole)
        size = len(rare)
        for rank in rare[: size - _ceil(PARTS * size, OF) + 1]:
            join.meet(i, rank)
        for rank in rare[: size - _ceil(2 * PARTS * size, PARTS + OF) + 1]:  # enough for texts that are no shorter
            join.add(i, rank)
    return join.found


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@dataclass(frozen=True)
class _Join:
    """The index of rare shingles, in groups of texts that bring the same news.

    A pair is compared only while it can tell one of both something new, so that thousands of copies of one text
    cost little more than thousands of different ones.

    Attributes:
        texts, labels: as given.
        found: the result so far.
        index: by shingle and by (label, what was found for it) the texts.
    """

    texts: Sequence[Fingerprint]
    labels: Sequence[int]
    found: list[int]
    index: dict[int, dict[tuple[int, int], list[int]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, i: int, rank: int) -> None:
        self.index[rank].setdefault((self.labels[i], self.found[i]), []).append(i)

    def meet(self, i: int, rank: int) -> None:
        """Compare a text with those before it that share a shingle."""
        groups, found = self.index[rank], self.found
        for label, known in list(groups):
            for j in groups[label, known]:
                if not (label & ~found[i] or self.labels[i] & ~known):
                    break
                news = label & ~found[i] or self.labels[i] & ~found[j]
                if news and alike(self.texts[i], self.texts[j]):
                    found[i] |= label
                    found[j] |= self.labels[i]
            else:
                for j in groups.pop((label, known)):
                    groups.setdefault((label, found[j]), []).append(j)
