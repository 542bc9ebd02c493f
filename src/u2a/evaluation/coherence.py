"""Does an answer speak of what was asked? Cosine of sentence embeddings, with the echo that would fake it beside it.

Coherence rewards repeating the prompt: an echo has cosine 1. Therefore the echo rate and distinct-2 stand beside it.

Source: Gao et al. 2021, arXiv 2104.08821 (embeddings); Li et al. 2016, arXiv 1510.03055 (distinct-n).
Departs: texts are read whole, in windows of tokens, not cut at 512 characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from u2a.errors import NonFiniteError
from u2a.evaluation.degenerate import distinct_n
from u2a.evaluation.stats import bootstrap_mean
from u2a.folding import fold
from u2a.packaged import resolve_model
from u2a.progress import Advance
from u2a.reward.embedding import Embedder
from u2a.types import Metric

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Coherence:
    """Values by answer id; ids without a value are undefined, not 0.

    Attributes:
        cosine: cosine of the embeddings of prompt and answer, in [-1, 1]; without empty answers.
        echo: share of the answer's bigrams that stand in the prompt, in [0, 1]; without answers of less than two words.
        distinct_2: distinct bigrams over bigrams of the answer, in (0, 1]; without answers of less than two words.
        n_empty: answers without a letter or digit.
        n_short: other answers of less than two words.
    """

    cosine: dict[str, float]
    echo: dict[str, float]
    distinct_2: dict[str, float]
    n_empty: int
    n_short: int


class LongTextEncoder:
    """Sentence embeddings of texts of any length: windows of whole words, averaged by their number of tokens.

    Args:
        name_or_path: as for :class:`~u2a.reward.embedding.Embedder`.
        device: device of the model.
        window: tokens per window, special tokens included, > 8. A text that fits has its plain embedding.

    Raises:
        ModelError: the model cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: str = "cpu", window: int = 256) -> None:
        self._embedder = Embedder(name_or_path, device, max_length=window)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(name_or_path), trust_remote_code=False)
        self._room = window - self._tokenizer.num_special_tokens_to_add()

    @property
    def metric(self) -> str:
        """Name of the cosine: ``coherence_minilm`` for a MiniLM, whose numbers no other encoder's compare with."""
        letters = re.sub(r"[^a-z]", "", self._embedder.name.casefold())
        return "coherence_minilm" if "minilm" in letters else "coherence"

    def encode(self, texts: Sequence[str], bar: Advance | None = None) -> np.ndarray:
        """Embed texts.

        Args:
            texts: any number of texts, each with at least one token.
            bar: told of every new window.

        Returns:
            (n, width) float64, rows of unit length.
        """
        split = [self.windows(text) for text in texts]
        parts = self._embedder.encode([part for windows in split for part, _ in windows], bar)
        rows, start = [], 0
        for windows in split:
            sizes = np.array([size for _, size in windows], dtype=float)
            mean = sizes @ parts[start : start + len(windows)]
            rows.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
            start += len(windows)
        return np.stack(rows) if rows else np.zeros((0, 0))

    def windows(self, text: str) -> list[tuple[str, int]]:
        """Cut a text before words, so that each piece fits the window; only a word longer than a window is divided.

        Args:
            text: any text.

        Returns:
            Pieces with their numbers of tokens, in order; together they hold every word of the text.
        """
        spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: list[tuple[int, int]] = spans["offset_mapping"]
        if len(offsets) <= self._room:
            return [(text, max(1, len(offsets)))]
        is_start = [low == 0 or text[low].isspace() or text[low - 1].isspace() for low, _ in offsets]
        cuts = [0]
        while len(offsets) - cuts[-1] > self._room:
            last = cuts[-1] + self._room
            cuts.append(next((place for place in range(last, cuts[-1], -1) if is_start[place]), last))
        ends = [*cuts[1:], len(offsets)]
        pieces = [
            (text[offsets[cut][0] : offsets[end - 1][1]].strip(), end - cut)
            for cut, end in zip(cuts, ends, strict=True)
        ]
        return [(piece, size) for piece, size in pieces if piece]


def coherence(
    encoder: LongTextEncoder, prompts: Mapping[str, str], answers: Mapping[str, str], bar: Advance | None = None
) -> Coherence:
    """Compare answers with their prompts.

    Args:
        encoder: the sentence embeddings.
        prompts: what was asked, by answer id.
        answers: generated text by answer id.
        bar: told of every new window.

    Returns:
        Values by answer id.

    Raises:
        NonFiniteError: an embedding is not finite.
    """
    words = {key: _words(answer) for key, answer in answers.items()}
    full = [key for key in answers if words[key]]
    first = encoder.encode([prompts[key] for key in full], bar)
    second = encoder.encode([answers[key] for key in full], bar)
    cosines = (first * second).sum(1) if full else np.zeros(0)
    bad = [key for key, value in zip(full, cosines, strict=True) if not np.isfinite(value)]
    if bad:
        raise NonFiniteError("sentence embedding", "evaluate", ids=bad)
    long = [key for key in full if len(words[key]) >= 2]
    return Coherence(
        cosine={key: float(np.clip(value, -1.0, 1.0)) for key, value in zip(full, cosines, strict=True)},
        echo={key: echo_rate(prompts[key], answers[key]) or 0.0 for key in long},
        distinct_2={key: distinct_n(words[key], 2) for key in long},
        n_empty=len(answers) - len(full),
        n_short=len(full) - len(long),
    )


def echo_rate(prompt: str, answer: str, n: int = 2) -> float | None:
    """Share of an answer's n-grams of words that stand in the prompt, repeats counted, case and punctuation not.

    Args:
        prompt: what was asked.
        answer: generated text.
        n: words per n-gram, >= 1.

    Returns:
        In [0, 1]; None for an answer of less than ``n`` words.

    >>> echo_rate("How do I brew tea?", "You ask: how do I brew tea")
    0.6666666666666666
    """
    known, own = set(_grams(_words(prompt), n)), _grams(_words(answer), n)
    return sum(gram in known for gram in own) / len(own) if own else None


def coherence_metrics(
    encoder: LongTextEncoder, values: Coherence, groups: Mapping[str, str], resamples: int, seed: int
) -> dict[str, Metric]:
    """Means with intervals over prompts.

    Args:
        encoder: gives the cosine its name.
        values: per answer.
        groups: prompt key by answer id.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        The cosine, ``echo_rate`` and ``distinct_2``; ``n`` counts prompts with a defined value, the note the others.
    """
    columns = {encoder.metric: values.cosine, "echo_rate": values.echo, "distinct_2": values.distinct_2}
    total, metrics = len(values.cosine) + values.n_empty, {}
    for name, items in columns.items():
        found = bootstrap_mean(items, groups, resamples, seed)
        note = "" if len(items) == total else f"undefined for {total - len(items)} of {total} answers, too short for it"
        metrics[name] = Metric(value=found.value, low=found.low, high=found.high, n=found.n, values=items, note=note)
    return metrics


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(fold(text)) if any(letter.isalnum() for letter in word)]


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
