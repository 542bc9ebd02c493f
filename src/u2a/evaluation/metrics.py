"""Every metric the evaluation prints: direction, unit, and what the number means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricInfo:
    """What one metric means.

    Attributes:
        direction: ``up`` (higher is better), ``down`` (lower is better) or ``none`` (it depends on the prompts).
        unit: unit of the value.
        definition: one line.
    """

    direction: Literal["up", "down", "none"]
    unit: str
    definition: str


METRICS: dict[str, MetricInfo] = {
    "preference_accuracy": MetricInfo(
        "up",
        "share of pairs",
        "held-out pairs whose chosen answer has the higher mean log-probability per token; a tie counts 1/2",
    ),
    "preference_margin": MetricInfo(
        "up",
        "nats per token",
        "mean log-probability per token of the chosen answer minus that of the rejected one, held-out pairs",
    ),
    "reward": MetricInfo(
        "up",
        "the reward model's own",
        "mean reward of the generated answers under the evaluation reward model (not comparable between models)",
    ),
    "retain_ppl": MetricInfo(
        "down",
        "perplexity",
        "exp(sum NLL / sum answer tokens) of the retain rows, end-of-turn token scored; "
        "in-sample where a retain term trains on them",
    ),
    "refusal_rate": MetricInfo(
        "none",
        "share of prompts",
        "generated answers with a refusal phrase: wanted on harmful prompts, unwanted on harmless ones",
    ),
    "degenerate_rate": MetricInfo(
        "down",
        "share of prompts",
        "generated answers that are empty, loop, or hardly vary in their words: a sign of collapse",
    ),
    "answer_words": MetricInfo(
        "none", "words", "mean length of the generated answers, cut at the token limit: read reward beside it"
    ),
}
