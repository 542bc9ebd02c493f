"""Verdicts of the selection bench on planted cells: harm is found, help is found, noise is neither."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from pa_curve import curve
from study import Cell, interval, not_worse, one_sided, summarise

from u2a.solution import Reliability, ScoreRow, ScoreTable


def cells(gap: float, noise: float = 0.01, seeds: int = 20, split_half: float = 0.6) -> list[dict[str, object]]:
    draw = torch.randn(seeds, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    return [
        {
            "n_pa": 64,
            "u2a": 0.02 + gap + noise * draw[k],
            "random": 0.02,
            "full": 0.02,
            "oracle": 0.1 + noise * draw[-k - 1],
            "split_half": split_half,
            "fallback": "none",
            "u2a_ppl": 1.0,
            "random_ppl": 1.0,
            "full_ppl": 1.0,
        }
        for k in range(seeds)
    ]


@pytest.mark.parametrize(("gap", "worse", "better"), [(-0.05, True, False), (0.05, False, True), (0.0, False, False)])
def test_planted_harm_and_help_are_found_and_noise_is_neither(gap: float, worse: bool, better: bool):
    study = {"world": summarise(cells(gap))}
    assert not_worse(study, "random") is not worse
    assert not_worse(study, "full") is not worse
    assert study["world"]["better_where_signal"] is better
    assert study["world"]["signal_sizes"] == ["64"]


def test_where_there_is_no_signal_nothing_is_said_about_being_better():
    assert summarise(cells(0.0, split_half=0.1))["better_where_signal"] is None


def test_one_sided_p_values_and_interval_equal_scipys():
    from scipy import stats

    values = [0.3, -0.1, 0.4, 0.2, 0.15]
    mean, worse, better = one_sided(values)
    assert mean == pytest.approx(sum(values) / 5)
    assert better == pytest.approx(stats.ttest_1samp(values, 0.0, alternative="greater").pvalue)
    assert worse == pytest.approx(stats.ttest_1samp(values, 0.0, alternative="less").pvalue)
    expected = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(values))
    assert interval(values) == pytest.approx(list(expected))
    assert one_sided([0.0, 0.0])[1:] == (1.0, 1.0)


def test_holm_counts_every_test():
    assert not_worse({"a": summarise(cells(-0.004)), "b": summarise(cells(0.0))}, "random") == (
        one_sided([row["u2a"] - row["random"] for row in cells(-0.004)])[1] >= 0.05 / 2  # type: ignore[operator]
    )


def test_a_cell_is_known_by_all_of_its_options():
    cell = Cell("piles", 0, 64, (), ())
    assert cell.key == Cell("piles", 0, 64, (("adjoint", "identity"),), ()).key  # the default, written out
    assert cell.key != Cell("piles", 0, 64, (("adjoint", "implicit"),), ()).key
    assert cell.key != Cell("piles", 1, 64, (), ()).key


def test_reliability_against_pairs_rises_with_them_for_a_planted_signal():
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(60, 1, generator=generator, dtype=torch.float64)
    gains = truth + 3.0 * torch.randn(60, 16, generator=generator, dtype=torch.float64)
    rows = tuple(
        ScoreRow(id=str(k), gain=float(row.mean()), estimate=float(row.mean()), fold_gains=tuple(row.tolist()))
        for k, row in enumerate(gains)
    )
    trust = Reliability(mean_gain=0.0, signal_sd=1.0, noise_sd=1.0, n_pairs=160, n_folds=16, n_candidates=60)
    table = ScoreTable(
        rows=rows, objective="", loss="", adjoint="", scorer="", estimator="", objective_value=0.0, reliability=trust
    )
    found = curve(table)
    assert [row["pairs"] for row in found] == [20, 40, 80, 160]
    values = [float(row["split_half"]) for row in found]  # type: ignore[arg-type]
    assert values == sorted(values)
    half = 8 / (8 + 9)  # reliability of the mean of 8 folds: 1 / (1 + 9 / 8)
    assert values[-1] == pytest.approx(half, abs=0.1)
