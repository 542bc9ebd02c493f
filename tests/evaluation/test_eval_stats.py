"""Intervals against published values, exact enumeration and their own coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from u2a.errors import DataError
from u2a.evaluation.stats import (
    bootstrap_mean,
    bootstrap_ratio,
    crossed_mean,
    paired_difference,
    paired_perplexity_difference,
    pearson,
    rate_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Stat. Med. 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_newcombes_published_values(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)
    assert interval.value == successes / n


@given(n=st.integers(1, 500), data=st.data())
def test_wilson_mirrors_and_holds_the_rate(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    here, there = wilson(k, n), wilson(n - k, n)
    assert 0.0 <= here.low <= here.value + 1e-12
    assert here.value - 1e-12 <= here.high <= 1.0
    assert here.low == pytest.approx(1 - there.high, abs=1e-12)


@given(n=st.integers(1, 500), data=st.data(), level=st.floats(0.5, 0.999))
def test_wilson_equals_statsmodels(n: int, data: st.DataObject, level: float) -> None:
    k = data.draw(st.integers(0, n))
    found = wilson(k, n, level)
    assert (found.low, found.high) == pytest.approx(proportion_confint(k, n, 1 - level, method="wilson"), abs=1e-12)
    assert found.method == "wilson"


def test_nothing_counted_is_undefined() -> None:
    assert wilson(0, 0).value is None
    assert bootstrap_mean({}, {}, 100, 0).value is None
    assert rate_interval({}, {}, 100, 0).value is None
    assert paired_difference({"a": 1.0}, {"b": 1.0}, {}, 100, 0).value is None


def test_bootstrap_covers_the_mean_of_a_normal_sample() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        sample = {str(index): float(value) for index, value in enumerate(rng.normal(2.0, 1.0, size=60))}
        interval = bootstrap_mean(sample, {}, 400, trial)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98  # 95 % nominal; 3 binomial standard errors are 0.038


def test_cluster_bootstrap_covers_where_rows_share_their_prompt() -> None:
    rng = np.random.default_rng(1)
    clustered = naive = 0
    for trial in range(200):
        effect = rng.normal(size=40)
        values = {f"{c}.{r}": float(effect[c]) for c in range(40) for r in range(5)}  # rows repeat their prompt's value
        groups = {key: key.split(".")[0] for key in values}
        inside = bootstrap_mean(values, groups, 300, trial)
        clustered += inside.low <= 0.0 <= inside.high
        rows = bootstrap_mean(values, {}, 300, trial)
        naive += rows.low <= 0.0 <= rows.high
    assert clustered / 200 > 0.88
    assert naive / 200 < 0.75  # what treating rows as independent would cost


def test_bootstrap_equals_the_enumerated_distribution_of_two_clusters() -> None:
    # Two clusters: means 0 and 1 with equal rows; resamples give 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    interval = bootstrap_mean({"a": 0.0, "b": 1.0}, {}, 4000, 0, level=0.4)
    assert (interval.value, interval.low, interval.high, interval.n) == (0.5, 0.5, 0.5, 2)
    wide = bootstrap_mean({"a": 0.0, "b": 1.0}, {}, 4000, 0, level=0.6)
    assert (wide.low, wide.high) == (0.0, 1.0)


@given(order=st.permutations(range(8)), seed=st.integers(0, 5))
def test_bootstrap_does_not_depend_on_row_order(order: list[int], seed: int) -> None:
    values = {f"r{index}": math.sin(index) for index in range(8)}
    groups = {key: f"g{index // 2}" for index, key in enumerate(values)}
    shuffled = {f"r{index}": values[f"r{index}"] for index in order}
    assert bootstrap_mean(values, groups, 300, seed) == bootstrap_mean(shuffled, groups, 300, seed)


def test_one_cluster_has_no_interval() -> None:
    interval = bootstrap_mean({"a": 1.0, "b": 3.0}, {"a": "p", "b": "p"}, 100, 0)
    assert (interval.value, interval.low, interval.high, interval.n) == (2.0, None, None, 1)


def test_ratio_is_of_sums_not_of_means() -> None:
    interval = bootstrap_ratio({"a": 10.0, "b": 1.0}, {"a": 5.0, "b": 1.0}, {}, 500, 0)
    assert interval.value == pytest.approx(11 / 6)
    assert (interval.low, interval.high) == (1.0, 2.0)


def test_paired_difference_removes_what_the_arms_share() -> None:
    rng = np.random.default_rng(3)
    base = {str(index): float(10 * value) for index, value in enumerate(rng.normal(size=50))}
    better = {key: value + 0.5 for key, value in base.items()}
    interval = paired_difference(better, base | {"only here": 1e6}, {}, 500, 0)
    assert interval.value == pytest.approx(0.5)
    assert interval.high - interval.low < 1e-9
    assert interval.n == 50


def test_paired_perplexity_difference_is_exact_and_signed() -> None:
    tokens = {"a": 4.0, "b": 6.0}
    first, second = {"a": 4.0, "b": 6.0}, {"a": 8.0, "b": 12.0}
    interval = paired_perplexity_difference(first, second, tokens, {}, 200, 0)
    assert interval.value == pytest.approx(math.e - math.e**2)
    assert interval.high < 0
    assert paired_perplexity_difference({"a": 1e5}, {"a": 1.0}, {"a": 1.0}, {}, 100, 0).value is None


def test_rate_uses_wilson_when_prompts_are_single_or_all_agree() -> None:
    singles = {str(index): float(index < 3) for index in range(10)}
    assert rate_interval(singles, {}, 200, 0) == wilson(3, 10)
    agreeing = {str(index): 1.0 for index in range(12)}
    groups = {str(index): f"p{index // 4}" for index in range(12)}
    assert rate_interval(agreeing, groups, 200, 0) == wilson(3, 3)  # three prompts, not twelve rows
    mixed = agreeing | {"0": 0.0}
    assert rate_interval(mixed, groups, 200, 0) == bootstrap_mean(mixed, groups, 200, 0)


def test_pearson_of_a_line_and_of_nothing() -> None:
    assert pearson([1.0, 2.0, 4.0], [-2.0, -4.0, -8.0]) == pytest.approx(-1.0)
    assert pearson([1.0, 2.0, 3.0], [1.0, 0.0, 1.0]) == pytest.approx(0.0, abs=1e-12)
    assert pearson([1.0, 2.0], [1.0, 2.0]) is None
    assert pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def skewed(n: int, seed: int) -> dict[str, float]:
    """Log-normal values, on which percentile and BCa intervals differ."""
    return {f"{k:03}": float(v) for k, v in enumerate(np.random.default_rng(seed).lognormal(0.0, 1.0, size=n))}


@pytest.mark.parametrize(("seed", "level"), [(0, 0.95), (1, 0.9), (2, 0.8)])
def test_bca_of_a_mean_equals_scipys(seed: int, level: float) -> None:
    values = skewed(40, seed)
    found = bootstrap_mean(values, {}, 40000, 0, level, "bca")
    drawn = np.array(list(values.values()))
    theirs = scipy.stats.bootstrap(
        (drawn,), np.mean, n_resamples=40000, confidence_level=level, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    plain = bootstrap_mean(values, {}, 40000, 0, level)
    width = plain.high - plain.low
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * width)
    assert found.high > plain.high + 0.03 * width  # so that the agreement above means something
    assert (found.method, plain.method, found.value, found.n) == ("bca", "percentile", plain.value, 40)


def test_bca_of_a_ratio_of_whole_clusters_equals_scipys() -> None:
    rng = np.random.default_rng(4)
    losses = {f"{c:02}.{r}": float(v) for c in range(30) for r, v in enumerate(rng.lognormal(size=c % 3 + 1))}
    tokens = {key: float(rng.integers(1, 9)) for key in losses}
    groups = {key: key.split(".")[0] for key in losses}
    found = bootstrap_ratio(losses, tokens, groups, 40000, 0, 0.9, "bca")
    columns = [
        [sum(v for k, v in column.items() if groups[k] == f"{c:02}") for c in range(30)] for column in (losses, tokens)
    ]
    theirs = scipy.stats.bootstrap(
        columns,
        lambda a, b, axis=-1: a.sum(axis) / b.sum(axis),
        paired=True,
        n_resamples=40000,
        confidence_level=0.9,
        method="BCa",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * (found.high - found.low))
    assert (found.method, found.n) == ("bca", 30)


def test_bca_mirrors_and_shifts_with_the_data() -> None:
    values = skewed(25, 3)
    here = bootstrap_mean(values, {}, 2000, 0, method="bca")
    mirrored = bootstrap_mean({key: 7 - value for key, value in values.items()}, {}, 2000, 0, method="bca")
    assert (mirrored.low, mirrored.high) == pytest.approx((7 - here.high, 7 - here.low), abs=1e-9)
    zeros = dict.fromkeys(values, 0.0)
    assert paired_difference(values, zeros, {}, 2000, 0, method="bca") == here


def test_bca_falls_back_where_it_is_undefined_and_says_so() -> None:
    constant = bootstrap_mean({str(k): 0.1 for k in range(9)}, {}, 200, 0, method="bca")
    assert constant.method == "percentile"
    assert (constant.low, constant.high) == pytest.approx((0.1, 0.1))
    one_draw = bootstrap_mean(skewed(9, 0), {}, 1, 0, method="bca")  # it lies on one side of the estimate
    assert one_draw.method == "percentile"
    single = bootstrap_mean({"a": 1.0}, {}, 100, 0, method="bca")
    assert (single.value, single.low, single.method) == (1.0, None, None)


def crossed(rng: np.random.Generator, seeds: int, prompts: int, sizes: tuple[float, float, float]) -> dict:
    """Differences around 0 with an effect of each seed, of each prompt and of each pair, of given deviations."""
    by_seed, by_prompt = sizes[0] * rng.normal(size=(seeds, 1)), sizes[1] * rng.normal(size=(1, prompts))
    table = by_seed + by_prompt + sizes[2] * rng.normal(size=(seeds, prompts))
    return {f"s{i}": {f"p{j}": float(v) for j, v in enumerate(row)} for i, row in enumerate(table)}


@pytest.mark.parametrize(
    ("seeds", "sizes", "least"),
    [
        (20, (0.5, 1.0, 0.5), 0.92),
        (6, (0.7, 0.9, 1.0), 0.92),  # as between arms of the comparison
        (3, (0.16, 0.29, 0.13), 0.88),
        (2, (0.3, 0.3, 0.2), 0.82),  # two seeds tell little of their own spread
        (6, (0.0, 1.0, 0.2), 0.92),
    ],
)
def test_crossed_mean_covers(seeds: int, sizes: tuple[float, float, float], least: float) -> None:
    rng = np.random.default_rng(7)
    intervals = [crossed_mean(crossed(rng, seeds, 30, sizes)) for _ in range(600)]
    assert least <= np.mean([found.low <= 0.0 <= found.high for found in intervals]) <= 0.99
    assert {found.method for found in intervals} == {"t"}


def test_seeds_alone_or_prompts_alone_would_be_too_narrow() -> None:
    rng = np.random.default_rng(8)
    by_prompts = by_seeds = 0
    for trial in range(100):
        table = crossed(rng, 12, 30, (0.3, 2.0, 0.0))  # mostly a matter of prompts
        over_seeds = bootstrap_mean({s: float(np.mean(list(row.values()))) for s, row in table.items()}, {}, 200, trial)
        by_seeds += over_seeds.low <= 0.0 <= over_seeds.high
        table = crossed(rng, 12, 30, (1.5, 1.0, 0.0))  # mostly a matter of seeds
        means = {p: float(np.mean([row[p] for row in table.values()])) for p in table["s0"]}
        over_prompts = bootstrap_mean(means, {}, 200, trial)
        by_prompts += over_prompts.low <= 0.0 <= over_prompts.high
    assert by_seeds / 100 < 0.75
    assert by_prompts / 100 < 0.75


def test_crossed_mean_is_the_t_interval_over_seeds_where_prompts_do_not_differ() -> None:
    means = [0.3, -0.1, 0.8, 0.45]
    found = crossed_mean({f"s{k}": dict.fromkeys("abc", mean) for k, mean in enumerate(means)}, level=0.9)
    oracle = scipy.stats.t.interval(0.9, 3, np.mean(means), scipy.stats.sem(means))
    assert (found.low, found.high) == pytest.approx(oracle)
    turned = {f"s{k}": dict(zip("abcd", means, strict=True)) for k in range(3)}  # and over prompts where seeds do not
    assert (crossed_mean(turned, 0.9).low, crossed_mean(turned, 0.9).high) == pytest.approx(oracle)
    assert crossed_mean({"s0": {"a": 0.1, "b": 0.1}, "s1": {"a": 0.1, "b": 0.1}}).low == pytest.approx(0.1)


def test_crossed_mean_has_the_variance_of_drawing_both_kinds() -> None:
    sizes, rng = (1.0, 2.0, 0.5), np.random.default_rng(9)
    truth = 1.0 / 40 + 4.0 / 50 + 0.25 / 2000  # of a mean over 40 seeds and 50 prompts
    level = 0.6827  # one standard deviation each side of a normal mean
    halves = []
    for _ in range(100):
        found = crossed_mean(crossed(rng, 40, 50, sizes), level)
        halves.append((found.high - found.low) / 2)
    assert np.mean(np.square(halves)) == pytest.approx(truth, rel=0.08)
    assert found.n == 50


def test_crossed_mean_does_not_depend_on_order_and_needs_two_of_each() -> None:
    table = crossed(np.random.default_rng(1), 4, 6, (1.0, 1.0, 1.0))
    turned = {seed: dict(reversed(row.items())) for seed, row in reversed(table.items())}
    assert crossed_mean(table) == crossed_mean(turned)
    one_seed = crossed_mean({"s0": table["s0"]})
    assert (one_seed.low, one_seed.n, one_seed.method) == (None, 6, None)
    assert one_seed.value == pytest.approx(np.mean(list(table["s0"].values())))
    one_prompt = crossed_mean({seed: {"p0": row["p0"]} for seed, row in table.items()})
    assert (one_prompt.low, one_prompt.n) == (None, 1)
    assert crossed_mean({}).value is None
    with pytest.raises(DataError, match="seed s1: 1 of 6 prompts"):
        crossed_mean(table | {"s1": {p: v for p, v in table["s1"].items() if p != "p3"}})
