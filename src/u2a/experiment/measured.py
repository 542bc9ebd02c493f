"""What is measured of one state of a policy in an experiment, as it is and at equal utility."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from u2a.config_evaluation import EvaluationSection
from u2a.evaluation.arm import ArmResult, Instruments, evaluate_arm
from u2a.evaluation.equal_utility import EqualUtility, at_equal_utility, largest_scale
from u2a.modeling import Policy, evaluation_mode
from u2a.progress import Console
from u2a.record import Row
from u2a.types import Partition

SCALE_TOLERANCE = 1 / 32  # five measurements of perplexity where the whole change costs too much


class Measured(Row):
    """What was measured of one state of the policy, item by item.

    Attributes:
        margin: length-normalised preference margin by evaluation pair, nats per token.
        hit: 1, 0 or 1/2 (a tie) by evaluation pair.
        retain_nll: summed NLL by retain row, nats; empty where one was not finite (``collapsed`` says so).
        retain_tokens: answer tokens by retain row.
        answers: generated answer by prompt (the pair's id); this and what follows only at full levels.
        reward: reward of the answer by prompt.
        second_reward: the same under the second reward model.
        words: words of the answer by prompt.
        refusal: 1 where the answer refuses, by prompt.
        degenerate: 1 where its form is broken, by prompt.
        collapsed: what prevails in the answers of a model that has collapsed; else empty.
        seconds: wall seconds of the measurement.
    """

    margin: dict[str, float]
    hit: dict[str, float]
    retain_nll: dict[str, float]
    retain_tokens: dict[str, float]
    answers: dict[str, str] = {}
    reward: dict[str, float] = {}
    second_reward: dict[str, float] = {}
    words: dict[str, float] = {}
    refusal: dict[str, float] = {}
    degenerate: dict[str, float] = {}
    collapsed: str = ""
    seconds: float = 0.0


class AtEqualPpl(Row):
    """What was measured with the change scaled so that retain perplexity stays within a budget.

    Attributes:
        search: the scale, and how it was found.
        measured: what was measured at it; None at scale 1, where it is that of the policy as it is.
    """

    search: EqualUtility
    measured: Measured | None = None


def measure_policy(
    policy: Policy, partition: Partition, instruments: Instruments, section: EvaluationSection, seed: int, full: bool
) -> Measured:
    """Measure the policy as it is, without a trace in the course of its training.

    Args:
        policy: the policy.
        partition: gives the evaluation pairs and the retain rows.
        instruments: reward models.
        section: prompts and decoding.
        seed: of decoding.
        full: generate answers, too.

    Returns:
        Values of single items.
    """
    begin = time.monotonic()
    section = section if full else section.model_copy(update={"generate_prompts": 0})
    with _undisturbed(policy):
        found = evaluate_arm(policy, partition, instruments, section, seed, Console(quiet=True), "")
    return measured_of(found, full, round(time.monotonic() - begin, 3))


def measure_at_equal_ppl(
    policy: Policy,
    partition: Partition,
    budget_frac: float,
    known: dict[float, float],
    measure: Callable[[Policy], Measured],
) -> AtEqualPpl:
    """Scale the policy's change until retain perplexity is within the budget, and measure it there.

    Args:
        policy: the policy; left as it was.
        partition: gives the retain rows.
        budget_frac: how far perplexity may rise, as a share of the start's.
        known: perplexities that are known by scale: 0 is the start, 1 the whole change.
        measure: measures a policy.

    Returns:
        Scale and measurement.
    """
    rows = [
        policy.encoder.encode(row.prompt, row.completion, row.source) for row in partition.retain_parts().evaluation
    ]
    with _undisturbed(policy):
        search = largest_scale(policy, lambda at: at.perplexity(rows), budget_frac, SCALE_TOLERANCE, known)
    if search.scale == 1.0:
        return AtEqualPpl(search=search)
    return AtEqualPpl(search=search, measured=at_equal_utility(policy, search, measure).value)


def measured_of(found: ArmResult, full: bool, seconds: float = 0.0) -> Measured:
    """Keep the values of single items.

    Args:
        found: a measurement.
        full: keep the answers and what is measured on them.
        seconds: it took.

    Returns:
        The values.
    """

    def values(name: str) -> dict[str, float]:
        return found.metrics[name].values if full else {}

    finite = all(math.isfinite(value) for value in found.retain_nll.values())
    return Measured(
        margin=found.metrics["preference_margin"].values,
        hit=found.metrics["preference_accuracy"].values,
        retain_nll=found.retain_nll if finite else {},
        retain_tokens=found.retain_tokens,
        answers=found.answers if full else {},
        reward=found.rewards if full else {},
        second_reward=found.second_rewards if full else {},
        words=values("answer_words"),
        refusal=values("refusal_rate"),
        degenerate=values("degenerate_rate"),
        collapsed=_collapse(found) if full else "",
        seconds=seconds,
    )


def _collapse(found: ArmResult) -> str:
    return str(found.collapse.kind) if found.collapse is not None and found.collapse.flag else ""


def retain_ppl(measured: Measured) -> float | None:
    """Perplexity of the retain rows.

    Args:
        measured: with their NLL and tokens.

    Returns:
        exp(nats per token), or None where it is undefined or overflows (a collapse).
    """
    return perplexity(measured.retain_nll, measured.retain_tokens)


def perplexity(nll: Mapping[str, float], tokens: Mapping[str, float]) -> float | None:
    """exp(sum NLL / sum tokens) over the rows.

    Args:
        nll: summed NLL by row, nats.
        tokens: answer tokens by row.

    Returns:
        Perplexity, or None without rows or beyond floating point.
    """
    if not nll:
        return None
    mean = math.fsum(nll.values()) / math.fsum(tokens[name] for name in nll)
    return math.exp(mean) if mean < 700.0 else None


@contextmanager
def _undisturbed(policy: Policy) -> Iterator[None]:
    """Leave random numbers and the model's mode to the training as they were."""
    devices = [policy.device.index or 0] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluation_mode(policy.model):
        yield
