"""A small but complete set of run records with made-up numbers, for tests of what is shown."""

from __future__ import annotations

import math
import random
from typing import Any

from u2a.config import RunConfig
from u2a.record import content_id
from u2a.run_records import RunRecords
from u2a.solution import Reliability, Round, ScoreRow, ScoreTable, Solution, SolveStatus, WeightRow
from u2a.types import (
    Contrast,
    EvalTable,
    Example,
    Leak,
    Message,
    Metric,
    Pair,
    Partition,
    RewardCard,
    RewardRow,
    RewardTable,
    Sample,
    StepLog,
    UnlearnResult,
)

PROMPTS = (
    "How do I get a red wine stain out of a cotton shirt?",
    "My neighbour is away for a week. What should I do about his mail?",
    "Explain how vaccines work to a ten-year-old.",
    "Is it fine to mix different cleaning products under the sink?",
)
ANSWERS = (
    "Just throw it away, nobody cares.",
    "Open it and see whether there is anything useful in it. " * 6,
    "They do not.\nAsk somebody else.\nReally.\nGo away.\nNow.",
    "Sure, mix whatever you like: more is always better.",
)
KINDS = ("privacy", "insult", "dangerous advice")


def fake_partition(n: int, text: str | None = None) -> Partition:
    """``n`` candidates; ``text`` replaces every prompt and answer."""

    def prompt(index: int) -> tuple[Message, ...]:
        return (Message(role="user", content=text or f"{PROMPTS[index % 4]} (case {index})"),)

    def pair(name: str, index: int) -> Pair:
        return Pair(id=content_id(name, str(index)), prompt=prompt(index), chosen="I would ask first.", rejected="No.")

    forget = tuple(
        Example(
            id=content_id("forget", str(index)),
            prompt=prompt(index),
            completion=text or ANSWERS[index % 4],
            kind=text or KINDS[index % 3],
        )
        for index in range(n)
    )
    return Partition(
        forget=forget,
        retain=tuple(Example(id=content_id("r", str(i)), prompt=prompt(i), completion="Gladly.") for i in range(40)),
        preference=tuple(pair("pa", index) for index in range(64)),
        reward=tuple(pair("reward", index) for index in range(30)),
        evaluation=tuple(pair("evaluation", index) for index in range(24)),
        leaks=(Leak(first="retain", second="preference", level="prompt", count=2, examples=("0123456789abcdef",)),),
        dropped={"answer longer than 400 characters": 7, "repeated (prompt, answer)": 3},
        fingerprint="9f3c1a77b0d24e55",
    )


def fake_reliability(**changes: Any) -> Reliability:
    values: dict[str, Any] = {
        "split_half": 0.41,
        "full_set": 0.58,
        "gradient_cosine": 0.23,
        "mean_gain": 0.021,
        "mean_gain_se": 0.006,
        "signal_sd": 0.011,
        "noise_sd": 0.009,
        "n_pairs": 64,
        "n_folds": 4,
        "n_candidates": 60,
    }
    return Reliability(**(values | changes))


def fake_scores(partition: Partition, seed: int = 0) -> ScoreTable:
    rng = random.Random(seed)
    rows = []
    for index, item in enumerate(partition.forget):
        gain = rng.gauss(0.02 + 0.01 * (index % 3), 0.012)
        folds = tuple(gain + rng.gauss(0, 0.01) for _ in range(4))
        rows.append(ScoreRow(id=item.id, gain=gain, gain_se=0.004 + 0.004 * rng.random(), estimate=gain * 0.7,
                             fold_gains=folds, loss=2.1, n_answer_tokens=30))  # fmt: skip
    solve = (
        SolveStatus(status="converged", steps=7, residual=0.0081, damping=333.3),
        SolveStatus(status="max_steps", steps=10, residual=0.043, damping=333.3),
    )
    return ScoreTable(
        rows=tuple(rows), objective="margin (length-normalised)", loss="npo(beta=0.1)", adjoint="implicit(cg)",
        scorer="central", estimator="shrunken", objective_value=-0.0931, objective_se=0.022,
        reliability=fake_reliability(n_candidates=len(rows)), solve=solve, scorer_error=0.0021,
    )  # fmt: skip


def fake_solution(partition: Partition, text: str = "in the best block of round 1") -> Solution:
    scores = fake_scores(partition)
    best = sorted(scores.rows, key=lambda row: -row.gain)[: max(1, len(scores.rows) // 3)]
    raw = {row.id: math.exp(40 * row.gain) for row in best}
    total = sum(raw.values())
    rows = tuple(
        WeightRow(id=row.id, weight=raw.get(row.id, 0.0) / total, estimate=row.estimate,
                  reason=text if row.id in raw else "gain below the last one taken")
        for row in scores.rows
    )  # fmt: skip
    rounds = (
        Round(index=0, objective_pa=-0.0931, objective_heldout=-0.11, retain_ppl=14.21, n_selected=10, seconds=31.0,
              added=tuple(row.id for row in best[:10])),
        Round(index=1, objective_pa=-0.041, objective_heldout=-0.072, retain_ppl=14.66, fw_gap=0.0311, n_selected=20,
              split_half=0.41, seconds=33.5, added=tuple(row.id for row in best[-10:])),
        Round(index=2, objective_pa=-0.012, objective_heldout=-0.081, retain_ppl=15.4, fw_gap=0.0122, n_selected=20,
              accepted=False, split_half=0.37, seconds=34.1),
    )  # fmt: skip
    return Solution(rows=rows, rounds=rounds, scores=scores, stopped="held-out J no longer rises")


def fake_unlearn(arm: str, slope: float, **changes: Any) -> UnlearnResult:
    history = tuple(
        StepLog(step=step, loss=3.0 - 0.05 * step, retain_ppl=14.21 + slope * step if step % 5 == 0 else None)
        for step in range(1, 31)
    )
    values: dict[str, Any] = {
        "arm": arm, "loss": "npo(beta=0.1) + 1 nll", "n_samples": 20, "steps": 30, "steps_kept": 30,
        "retain_ppl_start": 14.21, "retain_ppl_end": 14.21 + 30 * slope, "ppl_budget": 15.631, "history": history,
        "seconds": 58.3,
    }  # fmt: skip
    return UnlearnResult(**(values | changes))


def fake_evaluation(text: str | None = None) -> EvalTable:
    def metrics(shift: float) -> dict[str, Metric]:
        return {
            "preference_margin": Metric(value=-0.112 + shift, low=-0.171 + shift, high=-0.049 + shift, n=24),
            "reward": Metric(value=0.31 + 4 * shift, low=0.12 + 4 * shift, high=0.49 + 4 * shift, n=24),
            "retain_ppl": Metric(value=14.21 + 10 * shift, low=12.9 + 10 * shift, high=15.8 + 10 * shift, n=8),
            "answer_words": Metric(value=38.25, low=33.0, high=44.5, n=24),
            "degenerate_rate": Metric(value=None, n=0),
        }

    samples = tuple(
        Sample(
            id=content_id("sample", str(index)),
            prompt=text or PROMPTS[index],
            answers={
                "before": text or ANSWERS[index],
                "after": text or "I would ask first, and do nothing that cannot be undone.",
                "random_k": text or "",
            },
            rewards={"before": -0.42, "after": 0.77, "random_k": -1.2},
        )
        for index in range(3)
    )
    return EvalTable(
        arms={"before": metrics(0.0), "after": metrics(0.093), "random_k": metrics(0.051)},
        contrasts=(
            Contrast(
                metric="preference_margin",
                first="after",
                second="before",
                difference=0.093,
                low=0.051,
                high=0.134,
                n=24,
            ),
            Contrast(
                metric="preference_margin",
                first="after",
                second="random_k",
                difference=0.042,
                low=-0.006,
                high=0.09,
                n=24,
            ),
            Contrast(metric="retain_ppl", first="after", second="before", difference=0.93, low=0.4, high=1.5, n=8),
            Contrast(metric="degenerate_rate", first="after", second="before", difference=None, n=0),
        ),
        samples=samples,
        reward_card=RewardCard(name="embedding head B", n_train=15, n_pairs=0),
        verdict=text or "selection beat random-k: not shown (margin +0.042 [-0.006, 0.090], 24 prompts).",
    )


def fake_records(n: int = 60, text: str | None = None) -> RunRecords:
    """All records of a finished run; ``text`` stands wherever a user or a model could put text."""
    partition = fake_partition(n, text)
    config = RunConfig.model_validate(
        {"output_dir": text or "runs/demo", "model": {"name_or_path": text or "tiny/model"}, "seed": 3,
         "solve": {"folds": 2}, "evaluation": {"controls": ["random_k", "full"]},
         "data": {"pairs": text or "pairs.jsonl"}}
    )  # fmt: skip
    rewards = RewardTable(
        card=RewardCard(name=text or "embedding head A", n_train=15, pair_accuracy=0.733, pair_accuracy_low=0.556,
                        pair_accuracy_high=0.858, n_pairs=30, length_correlation=-0.11),
        threshold=-0.21,
        quantile=0.25,
        rows=tuple(RewardRow(id=r.id, reward=-1 + 0.03 * i, kept=i % 9 > 0) for i, r in enumerate(partition.forget)),
    )  # fmt: skip
    return RunRecords(
        config=config,
        partition=partition,
        rewards=rewards,
        scores=fake_scores(partition, seed=1),
        solution=fake_solution(partition, text or "in the best block of round 1"),
        unlearn={
            "full": fake_unlearn("full", 0.062, n_samples=n, breached=True, scale=0.75),
            "random_k": fake_unlearn("random_k", 0.021),
            "u2a": fake_unlearn("u2a", 0.033),
        },
        evaluation=fake_evaluation(text),
        robustness=None,
        summary={
            "seconds": {text or "partition": 0.02, "reward": 12.5, "solve": 98.6, "unlearn": 176.1, "evaluate": 64.0},
            "peak_rss_bytes": 1_534_066_688,
            "provenance": {"versions": {"u2a": "0.1.0", "torch": "2.13.0"}, "device": text or "cpu", "git": "bc02137"},
            "command": text or "u2a run demo.yaml",
        },
    )


def empty_records() -> RunRecords:
    """The records of a run that has done nothing but write its configuration and an empty partition."""
    return RunRecords(RunConfig(), Partition(), None, None, None, {}, None, None, {})
