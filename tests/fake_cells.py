"""Cells of an experiment made by hand, for the tests of its analysis."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np

from u2a.evaluation.equal_utility import EqualUtility
from u2a.experiment.cell import CellResult, LevelResult
from u2a.experiment.estimates import Cells
from u2a.experiment.measured import Measured
from u2a.experiment.meter import Spent
from u2a.experiment.protocol import Protocol

SEEDS = (0, 1, 2, 3, 4, 5)
PROMPTS = [f"p{k}" for k in range(12)]
GROUPS = {f"{prompt}-{copy}": prompt for prompt in PROMPTS for copy in range(1 + int(prompt[1:]) % 2)}


def protocol(**more) -> Protocol:
    return Protocol.model_validate(
        {
            "tasks": {"one": {"config": "one.yaml"}},
            "seeds": list(SEEDS),
            "arms": {"a": {"method": "full"}, "b": {"method": "random_k"}},
            "budgets": {"levels": [1.0, 4.0], "full": [4.0]},
            "families": {
                "main": {"metric": "preference_margin", "level": 4.0, "contrasts": [["a", "b"], ["b", "a"]]},
                "cost": {"metric": "retain_ppl", "level": 4.0, "contrasts": [["a", "b"]]},
            },
            "margins": {"preference_margin": 0.5},
            **more,
        }
    )


def measured(rng: np.random.Generator, shift: float, full: bool = True) -> Measured:
    margin = {item: float(rng.normal(shift)) for item in GROUPS}
    return Measured(
        margin=margin,
        hit={item: float(value > 0) for item, value in margin.items()},
        retain_nll={"r0": 20.0 + shift, "r1": 10.0},
        retain_tokens={"r0": 10.0, "r1": 6.0},
        reward={item: float(rng.normal()) for item in list(GROUPS)[:5]} if full else {},
    )


def cell(arm: str, seed: int, shift: float, status: str = "ok", up_to: float = 4.0, speed: float = 1.0) -> CellResult:
    rng = np.random.default_rng([seed, int(100 * shift) + 1000])
    levels = tuple(
        LevelResult(
            level=level,
            reached=True,
            steps=int(level),
            spent=Spent(
                flops={"train": int(100 * level), "select": 7},
                seconds={"train": level},
                cpu_seconds={"train": level / speed},
                peak_rss_bytes=5,
            ),
            full=level == 4.0,
            untrained=False,
            measured=measured(rng, shift * level, level == 4.0),
        )
        for level in (1.0, 4.0)
        if level <= up_to
    )
    return CellResult(
        key="k",
        task="one",
        arm=arm,
        method=arm,
        track="negatives",
        seed=seed,
        split="test",
        trial=0,
        values={},
        status=status,
        error="" if status == "ok" else "broke",
        unit_flops=100,
        levels=levels,
        spent=levels[-1].spent,
        weights={"x": 1.0},
        fallback="random_k" if seed == 0 else "none",
    )


def cells(shifts: dict[str, float], failed: tuple[str, int] | None = None, seeds: Iterable[int] = SEEDS) -> Cells:
    results = [
        cell(arm, seed, shift, "diverged" if (arm, seed) == failed else "ok")
        for (arm, shift), seed in product(shifts.items(), seeds)
    ]
    starts = {("one", seed): measured(np.random.default_rng(seed), 0.0) for seed in seeds}
    return Cells(results, {("one", seed): GROUPS for seed in seeds}, starts)


def found_scale(scale: float) -> EqualUtility:
    """A search within the perplexity budget that ended at a scale of the change."""
    return EqualUtility(
        scale=scale,
        cost=1.0,
        start=1.0,
        budget=1.1,
        budget_frac=0.1,
        tolerance=0.1,
        evaluations=1,
        path=(),
        monotone=True,
    )
