"""Intervals against published values, exact enumeration and their own coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2a.evaluation.stats import (
    bootstrap_mean,
    bootstrap_ratio,
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
