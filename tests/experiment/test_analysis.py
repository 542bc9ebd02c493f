"""Figures and contrasts of an experiment against direct computation on cells made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from statistics import fmean

import numpy as np
import pytest
import scipy.stats

from fake_cells import GROUPS, PROMPTS, SEEDS, cells, found_scale, measured, protocol
from u2a.errors import ConfigError
from u2a.evaluation.equal_utility import EqualUtility
from u2a.experiment.analysis import analyse, area, break_even
from u2a.experiment.cell import CellResult
from u2a.experiment.estimates import Cells, figure_by_prompt, figure_by_seed, t_interval
from u2a.experiment.measured import AtEqualPpl, retain_ppl


def prompt_means(values: dict[str, float]) -> dict[str, float]:
    return {p: fmean(v for item, v in values.items() if GROUPS[item] == p) for p in PROMPTS}


def test_contrast_is_the_mean_over_seeds_and_prompts_with_its_p_value() -> None:
    found = cells({"a": 0.4, "b": 0.1})
    row, back = analyse(protocol(), "h", found).contrasts[:2]
    at = {(c.arm, c.seed): prompt_means(c.levels[1].measured.margin) for c in found.results}
    by_seed = [fmean(at["a", s][p] - at["b", s][p] for p in PROMPTS) for s in SEEDS]
    assert row.difference == pytest.approx(fmean(by_seed), abs=1e-12)
    flips = [abs(fmean(s * d for s, d in zip(signs, by_seed, strict=True))) for signs in product((1, -1), repeat=6)]
    assert row.p == pytest.approx(np.mean([flip >= abs(fmean(by_seed)) - 1e-12 for flip in flips]))
    assert row.p_holm == pytest.approx(min(1.0, 2 * row.p))
    assert (back.difference, back.low, back.high) == pytest.approx((-row.difference, -row.high, -row.low), rel=0.05)
    assert (row.n_seeds, row.n_prompts) == (6, 12)


def test_verdicts_follow_interval_correction_and_direction() -> None:
    main, back, cost = analyse(protocol(), "h", cells({"a": 2.0, "b": 0.0})).contrasts
    assert (main.verdict, back.verdict) == ("not shown", "not shown")  # p 1/32, twice in its family
    single = protocol(families={"main": {"level": 4.0, "contrasts": [["a", "b"]]}})
    assert analyse(single, "h", cells({"a": 2.0, "b": 0.0})).contrasts[0].verdict == "better"
    assert analyse(single, "h", cells({"a": -2.0, "b": 0.0})).contrasts[0].verdict == "worse"
    assert cost.difference is not None and cost.difference > 0 and cost.verdict == "worse"  # a perplexity that rises
    assert analyse(single, "h", cells({"a": 0.0, "b": 0.01})).contrasts[0].verdict == "equivalent"


def replaced(found: Cells, arm: str, change: Callable[[CellResult], dict[str, object]]) -> Cells:
    """The cells with the last level of an arm's cells changed."""
    results = [
        item.model_copy(update={"levels": (*item.levels[:-1], item.levels[-1].model_copy(update=change(item)))})
        if item.arm == arm
        else item
        for item in found.results
    ]
    return Cells(results, found.groups, found.starts)


def test_equivalence_needs_prompts_to_agree_and_arms_that_did_something() -> None:
    single = protocol(families={"main": {"level": 4.0, "contrasts": [["a", "b"]]}})
    found = cells({"a": 0.0, "b": 0.01})
    idle = replaced(found, "a", lambda _: {"untrained": True})
    assert analyse(single, "h", idle).contrasts[0].verdict == "not shown"

    def apart(item: CellResult) -> dict[str, object]:  # every prompt differs by 2, one way or the other, in all seeds
        other = next(each for each in found.results if (each.arm, each.seed) == ("b", item.seed)).levels[-1].measured
        sides = {name: 2.0 if int(group[1:]) % 4 < 2 else -2.0 for name, group in GROUPS.items()}
        margin = {name: value + sides[name] + 0.01 * item.seed for name, value in other.margin.items()}
        return {"measured": other.model_copy(update={"margin": margin})}

    row = analyse(single, "h", replaced(found, "a", apart)).contrasts[0]
    assert abs(row.difference or 9.0) < 0.05 and row.verdict == "not shown"  # seeds alone would call it equivalent


def test_a_family_is_tested_on_its_tasks_alone() -> None:
    families = {
        "here": {"level": 4.0, "contrasts": [["a", "b"]], "tasks": ["one"]},
        "there": {"level": 4.0, "contrasts": [["a", "b"]], "tasks": ["two"]},
    }
    declared = protocol(tasks={"one": {"config": "one.yaml"}, "two": {"config": "two.yaml"}}, families=families)
    rows = analyse(declared, "h", cells({"a": 2.0, "b": 0.0})).contrasts
    assert [(row.family, row.task, row.n_seeds) for row in rows] == [("here", "one", 6), ("there", "two", 0)]


def test_nothing_is_shown_where_seeds_were_lost() -> None:
    single = protocol(families={"main": {"level": 4.0, "contrasts": [["a", "b"]]}})
    for arm in ("a", "b"):
        row = analyse(single, "h", cells({"a": 2.0, "b": 0.0}, failed=(arm, 3))).contrasts[0]
        assert (row.verdict, row.n_lost, row.n_seeds) == ("not shown", 1, 5)


def test_an_arm_that_nothing_was_done_to_wins_nothing() -> None:
    single = protocol(families={"main": {"level": 4.0, "contrasts": [["a", "b"], ["b", "a"]]}}, seeds=list(range(8)))
    found = cells({"a": 2.0, "b": 0.0}, seeds=range(8))
    for idle, verdicts in (("a", ["not shown", "not shown"]), ("b", ["better", "worse"])):
        results = [c if c.arm != idle else untrained(c) for c in found.results]
        rows = analyse(single, "h", Cells(results, found.groups, found.starts)).contrasts
        assert [row.verdict for row in rows] == verdicts
        assert rows[0].n_untrained == ((8, 0) if idle == "a" else (0, 8))


def test_a_change_that_was_scaled_to_nothing_wins_nothing_at_equal_utility() -> None:
    metric = "preference_margin_at_equal_ppl"
    single = protocol(families={"main": {"metric": metric, "level": 4.0, "contrasts": [["a", "b"]]}})
    found = cells({"a": 2.0, "b": 0.0})
    for scale, verdict in ((0.0, "not shown"), (0.5, "better")):
        at = found_scale(scale)

        def scaled(item: CellResult, at: EqualUtility = at) -> dict[str, object]:
            return {"equal": AtEqualPpl(search=at, measured=item.levels[-1].measured)}

        both = replaced(replaced(found, "a", scaled), "b", scaled)
        row = analyse(single, "h", both).contrasts[0]
        assert (row.verdict, row.n_untrained) == (verdict, (6, 6) if scale == 0.0 else (0, 0))


@pytest.mark.parametrize(("shift", "arm", "verdict"), [
    (2.0, "a", "not shown"), (2.0, "b", "better"), (-2.0, "b", "not shown"), (-2.0, "a", "worse"),
    (0.0, "b", "not shown"),
])  # fmt: skip
def test_an_arm_that_collapsed_wins_nothing(shift: float, arm: str, verdict: str) -> None:
    single = protocol(families={"main": {"level": 4.0, "contrasts": [["a", "b"]]}})

    def broken(item: CellResult) -> dict[str, object]:
        kind = "empty" if item.seed == 2 else ""
        return {"measured": item.levels[-1].measured.model_copy(update={"collapsed": kind})}

    found = cells({"a": shift, "b": 0.01 if shift == 0.0 else 0.0})
    row = analyse(single, "h", replaced(found, arm, broken)).contrasts[0]
    assert (row.verdict, row.n_seeds, row.n_lost) == (verdict, 6, 0)
    assert row.n_collapsed == ((1, 0) if arm == "a" else (0, 1))


def test_intervals_over_seeds_stay_within_what_a_metric_can_be() -> None:
    assert figure_by_seed([5.0, 400.0], "retain_ppl").low == 1.0
    assert figure_by_seed([0.9, 1.0, 1.0], "scale_at_equal_ppl").high == 1.0
    rates = figure_by_prompt({0: {"p": 0.0, "q": 1.0}, 1: {"p": 1.0, "q": 1.0}}, "preference_accuracy")
    assert (rates.value, rates.high) == (0.75, 1.0)
    free = figure_by_seed([5.0, 400.0])
    assert free.low is not None and free.low < 0.0


def test_how_many_candidates_an_arm_took_and_by_which_code_cells_were_made() -> None:
    found = cells({"a": 0.4, "b": 0.1})
    taken = [
        item.model_copy(update={"weights": {f"n{k}": 1.0 for k in range(item.seed + 3)}, "code": "c0ffee"})
        if item.arm == "a"
        else item.model_copy(update={"weights": None})
        for item in found.results
    ]
    figures = analyse(protocol(), "h", Cells(taken, found.groups, found.starts))
    arms = {arm.arm: arm.selected for arm in figures.tasks["one"].arms}
    assert arms["a"] == (3 + min(SEEDS), fmean(SEEDS) + 3, 3 + max(SEEDS)) and arms["b"] is None
    assert figures.codes == {"": 6, "c0ffee": 6}


def untrained(cell: CellResult) -> CellResult:
    return cell.model_copy(update={"levels": tuple(x.model_copy(update={"untrained": True}) for x in cell.levels)})


def test_a_failed_cell_is_listed_and_enters_no_mean() -> None:
    whole, found = cells({"a": 0.4, "b": 0.1}), cells({"a": 0.4, "b": 0.1}, failed=("a", 3))
    task = analyse(protocol(), "h", found).tasks["one"]
    first = task.arms[0]
    assert first.failed == ("seed 3: diverged: broke",) and first.n_seeds == 5
    kept = [c for c in whole.results if c.arm == "a" and c.seed != 3]
    margin = fmean(fmean(prompt_means(c.levels[1].measured.margin).values()) for c in kept)
    assert first.levels[1].metrics["preference_margin"].value == pytest.approx(margin)
    assert analyse(protocol(), "h", found).contrasts[0].n_seeds == 5


def test_figures_of_an_arm() -> None:
    found = cells({"a": 0.4, "b": 0.1})
    arm = analyse(protocol(), "h", found).tasks["one"].arms[0]
    metrics = arm.levels[1].metrics
    assert metrics["flops"].value == 407.0 and metrics["seconds"].value == 4.0
    assert metrics["retain_ppl"].value == pytest.approx(math.exp((20.0 + 1.6 + 10.0) / 16.0))
    assert metrics["reward"].n_prompts == len({GROUPS[item] for item in list(GROUPS)[:5]})
    assert arm.fallbacks == {"random_k": 1, "none": 5}
    rises = []
    for c in [c for c in found.results if c.arm == "a"]:
        base = fmean(prompt_means(found.starts["one", c.seed].margin).values())
        one, four = (fmean(prompt_means(level.measured.margin).values()) - base for level in c.levels)
        rises.append(((1.0 - 0.07) * one / 2 + 3 * (one + four) / 2) / 4)  # at the start until choosing is paid
    assert arm.area == pytest.approx(fmean(rises))
    assert arm.chosen_at == pytest.approx(0.07)
    assert arm.levels[1].metrics["passes"].value == pytest.approx(4.07)


def test_seeds_with_other_prompts_are_refused() -> None:
    found = cells({"a": 0.4, "b": 0.1})
    groups = {**found.groups, ("one", 2): {item: f"other {item}" for item in GROUPS}}
    with pytest.raises(ConfigError, match="held_out_seed"):
        analyse(protocol(), "h", Cells(found.results, groups, found.starts))


def test_t_interval_against_scipy() -> None:
    values = [1.0, 2.5, -0.5, 3.0]
    found = t_interval(values)
    low, high = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert t_interval([2.0]).low is None and t_interval([]).value is None


def test_perplexity_of_a_collapse_is_undefined() -> None:
    rng = np.random.default_rng(0)
    found = measured(rng, 0.0).model_copy(update={"retain_nll": {"r0": 1e6, "r1": 0.0}})
    assert retain_ppl(found) is None
    assert retain_ppl(found.model_copy(update={"retain_nll": {}})) is None


def test_curves() -> None:
    assert area([(0.0, 1.0), (2.0, 1.0)]) == 1.0
    late, early = [(0.0, 0.0), (1.0, 0.0), (3.0, 4.0)], [(0.0, 0.0), (1.0, 1.0), (3.0, 2.0)]
    assert break_even(late, early) == pytest.approx(1.0 + 2.0 / 3.0)
    assert break_even(early, late) is None
    assert break_even(late, late) is None
    waits = [(0.0, 0.0), (1.4, 0.0), (2.4, 1.0), (4.0, 2.0)]  # chooses until 1.4
    plain = [(0.0, 0.0), (2.4, 0.8), (4.0, 1.0)]
    assert break_even(waits, plain) == pytest.approx(2.1)
    assert break_even(plain, waits) is None
