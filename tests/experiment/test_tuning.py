"""The tuning rule on results made by hand."""

from __future__ import annotations

import math

import pytest

from u2a.experiment.cell import CellResult, LevelResult
from u2a.experiment.measured import Measured, perplexity
from u2a.experiment.meter import Spent
from u2a.experiment.protocol_sections import TuningSection
from u2a.experiment.tuning import choose_trial

RULE = TuningSection(seeds=[1000, 1001], level=1.0, metric="preference_margin", max_ppl_ratio=1.1)
START = {1000: 10.0, 1001: 20.0}


def cell(trial: int, seed: int, margin: float, ppl_ratio: float | None, status: str = "ok") -> CellResult:
    nll = {} if ppl_ratio is None else {"r": 4 * math.log(ppl_ratio * START[seed])}
    measured = Measured(
        margin={"a": margin - 1.0, "b": margin + 1.0}, hit={"a": 1.0}, retain_nll=nll, retain_tokens={"r": 4.0}
    )
    spent = Spent(flops={"train": 5})
    level = LevelResult(level=1.0, reached=True, steps=3, spent=spent, full=False, untrained=False, measured=measured)
    return CellResult(
        key="k", task="t", arm="a", method="full", track="negatives", seed=seed, split="dev", trial=trial,
        values={"learning_rate": 10.0**-trial}, status=status,
        error="" if status == "ok" else "too large", unit_flops=5, levels=(level,),
        spent=Spent(flops={"train": 7, "select": 1}), seconds=2.0,
    )  # fmt: skip


def both(trial: int, margins: tuple[float, float], ratios: tuple[float | None, float | None]) -> list[CellResult]:
    return [cell(trial, seed, *found) for seed, found in zip(START, zip(margins, ratios, strict=True), strict=True)]


def test_the_best_mean_within_the_bound_wins() -> None:
    cells = both(0, (0.1, 0.3), (1.0, 1.0)) + both(1, (0.9, 0.1), (1.2, 0.9)) + both(2, (5.0, 5.0), (1.3, 1.0))
    found = choose_trial(RULE, cells, START)
    assert found.trial == 1
    assert [score.value for score in found.trials] == pytest.approx([0.2, 0.5, 5.0])
    assert [score.ppl_ratio for score in found.trials] == pytest.approx([1.0, 1.05, 1.15])
    assert [(score.flops, score.seconds) for score in found.trials] == [(16, 4.0)] * 3
    assert "2 of 3" in found.reason


def test_ties_go_to_the_first() -> None:
    cells = both(1, (0.5, 0.5), (1.0, 1.0)) + both(0, (0.5, 0.5), (1.0, 1.0))
    assert choose_trial(RULE, cells, START).trial == 0


def test_without_a_trial_within_the_bound_the_least_damage_wins() -> None:
    cells = both(0, (9.0, 9.0), (2.0, 2.0)) + both(1, (0.0, 0.0), (1.5, 1.5)) + both(2, (9.0, 9.0), (None, 1.0))
    found = choose_trial(RULE, cells, START)
    assert found.trial == 1 and "no trial within" in found.reason
    assert found.trials[2].ppl_ratio is None


def test_a_trial_that_failed_on_one_seed_is_out() -> None:
    cells = [*both(0, (0.1, 0.1), (1.0, 1.0)), cell(1, 1000, 9.0, 1.0), cell(1, 1001, 9.0, 1.0, "diverged")]
    assert choose_trial(RULE, cells, START).trial == 0
    found = choose_trial(RULE, [*cells, *both(2, (9.0, 9.0), (2.0, 2.0))], START)
    assert found.trial == 0 and "1 of 2 trials within" in found.reason and "1 of 3 did not come through" in found.reason
    assert [trial.failed for trial in found.trials] == [(), ("seed 1001: diverged: too large",), ()]
    failed = [cell(trial, seed, 9.0, 1.0, "failed") for trial in (0, 1) for seed in START]
    assert choose_trial(RULE, failed, START).trial == 0
    assert "no trial came through" in choose_trial(RULE, failed, START).reason


def test_without_retain_rows_there_is_no_bound() -> None:
    cells = both(0, (0.1, 0.1), (None, None)) + both(1, (0.9, 0.9), (None, None))
    found = choose_trial(RULE, cells, dict.fromkeys(START))
    assert found.trial == 1 and "among 2 trials (no retain rows)" in found.reason
    assert "overflowed" in choose_trial(RULE, cells, START).reason


def test_a_choice_at_the_edge_of_the_grid_is_named() -> None:
    grid = [cell(trial, seed, -abs(trial - 1), 1.0) for trial in (0, 1, 2) for seed in START]
    assert "edge" not in choose_trial(RULE, grid, START).reason
    rising = [cell(trial, seed, trial, 1.0) for trial in (0, 1, 2) for seed in START]
    assert choose_trial(RULE, rising, START).reason.endswith("learning_rate at the edge of the grid")
    single = [cell(0, seed, 1.0, 1.0) for seed in START]
    assert "edge" not in choose_trial(RULE, single, START).reason


def test_perplexity_weighs_rows_by_tokens() -> None:
    assert perplexity({"a": 2.0, "b": 4.0}, {"a": 1.0, "b": 5.0}) == pytest.approx(math.e)
    assert perplexity({}, {"a": 1.0}) is None
    assert perplexity({"a": 1e4}, {"a": 1.0}) is None
