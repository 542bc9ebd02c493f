"""How much of the forgotten answers a model still writes down: ROUGE-L of its answers, and its first choices.

All four are low also for a model that writes nothing or nonsense: read them beside perplexity and the degenerate rate.

Source: Shi et al. 2024, arXiv 2407.06460 (verbatim and knowledge memorisation); Tirumala et al. 2022,
arXiv 2205.10770 (exact memorisation); Carlini et al. 2021, arXiv 2012.07805, and Wang et al. 2025, arXiv 2406.09179
(extraction strength).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from u2a.errors import ConfigError
from u2a.evaluation.stats import bootstrap_mean
from u2a.evaluation.token_stats import TokenStats
from u2a.types import Metric

VERBATIM_TOKENS = 128
KNOWLEDGE_TOKENS = 32


def exact_memorisation(stats: TokenStats) -> float:
    """Share of an answer's tokens that are the model's first choice, given the true tokens before.

    Args:
        stats: of one answer.

    Returns:
        In [0, 1]; the end-of-turn token counts.
    """
    return float(stats.hit.mean())


def extraction_strength(stats: TokenStats) -> float:
    """1 - k/T, with k the shortest prefix of the answer's T tokens after which every first choice is right.

    Args:
        stats: of one answer.

    Returns:
        In [0, 1]: 1 = the prompt alone gives the whole answer, 0 = even the last token is wrong. Greedy decoding after
        those k tokens would write the rest of the answer, so one pass is enough.

    Departs: open-unlearning gives 1/T instead of 0 when the last token is wrong, and leaves the end-of-turn token out.
    """
    misses = np.flatnonzero(~stats.hit)
    prefix = int(misses[-1]) + 1 if len(misses) else 0
    return 1.0 - prefix / len(stats.hit)


def verbatim_memorisation(truths: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, float | None]:
    """100 x ROUGE-L F1 of a greedy continuation against the true text.

    Args:
        truths: true text by row id, cut to the number of tokens that were generated.
        answers: generated text by the same ids.

    Returns:
        In [0, 100] by row id; None where the true text has no Latin letter or digit, the only words ROUGE knows.
        F1 = 2PR / (P + R) with P, R the length of the longest common subsequence of words over the words of the
        answer and of the truth; an empty answer has 0.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    return _rouge_l(truths, answers, recall=False)


def knowledge_memorisation(truths: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, float | None]:
    """100 x ROUGE-L recall of a short answer to a question, so that words around the true answer cost nothing.

    Args:
        truths: true answer by row id.
        answers: generated answer (at most 32 tokens) by the same ids.

    Returns:
        In [0, 100] by row id; None as for :func:`verbatim_memorisation`.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    return _rouge_l(truths, answers, recall=True)


def _without_home() -> None:
    """Where there is no home directory, name a folder to nltk (which rouge-score imports), else it cannot start."""
    try:
        Path.home()
    except RuntimeError:
        os.environ.setdefault("NLTK_DATA", tempfile.gettempdir())


def _rouge_l(truths: Mapping[str, str], answers: Mapping[str, str], recall: bool) -> dict[str, float | None]:
    try:
        _without_home()
        from rouge_score import rouge_scorer, tokenizers
    except ImportError:
        raise ConfigError("ROUGE needs the package rouge-score (in the clone: pip install '.[evaluation]')") from None
    words = tokenizers.DefaultTokenizer(use_stemmer=False)
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=words)
    scores: dict[str, float | None] = {}
    for key, truth in truths.items():
        score = scorer.score(truth, answers[key])["rougeL"]
        scores[key] = 100.0 * float(score.recall if recall else score.fmeasure) if words.tokenize(truth) else None
    return scores


def mean_metric(values: Mapping[str, float | None], groups: Mapping[str, str], resamples: int, seed: int) -> Metric:
    """Mean over rows with an interval over prompts; undefined rows are left out and lower the count.

    Args:
        values: value by row id, None = undefined.
        groups: prompt key by row id.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        The metric, with a note on rows left out; value None without a defined row.
    """
    known = {key: value for key, value in values.items() if value is not None}
    interval = bootstrap_mean(known, groups, resamples, seed)
    left_out = len(values) - len(known)
    note = f"undefined for {left_out} of {len(values)} rows, which are left out" if left_out else ""
    return Metric(value=interval.value, low=interval.low, high=interval.high, n=interval.n, values=known, note=note)


def memorisation_metrics(
    stats: Mapping[str, TokenStats], groups: Mapping[str, str], resamples: int, seed: int
) -> dict[str, Metric]:
    """Exact memorisation and extraction strength of rows.

    Args:
        stats: statistics by row id.
        groups: prompt key by row id.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        Metrics by name.
    """
    rules: dict[str, Callable[[TokenStats], float]] = {
        "exact_memorisation": exact_memorisation,
        "extraction_strength": extraction_strength,
    }
    return {
        name: mean_metric({key: rule(item) for key, item in stats.items()}, groups, resamples, seed)
        for name, rule in rules.items()
    }
