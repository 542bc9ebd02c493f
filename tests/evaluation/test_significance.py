"""Tests of hypotheses against brute force, statsmodels, scipy and hand computation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from u2a.errors import ConfigError, NonFiniteError
from u2a.evaluation.significance import (
    Equivalence,
    equivalence,
    holm,
    mcnemar,
    rank_agreement,
    sign_flip_test,
    within_margin,
)
from u2a.evaluation.stats import Interval, bootstrap_mean


def outcomes(first_only: int, second_only: int, both: int = 3, neither: int = 2) -> tuple[dict, dict]:
    """Binary outcomes of two arms with given counts."""
    cells = [(1, 0)] * first_only + [(0, 1)] * second_only + [(1, 1)] * both + [(0, 0)] * neither
    return {str(k): a for k, (a, _) in enumerate(cells)}, {str(k): b for k, (_, b) in enumerate(cells)}


@pytest.mark.parametrize(("first_only", "second_only"), [(6, 1), (1, 6), (3, 0), (10, 4), (5, 5), (1, 1)])
def test_mcnemar_mid_p_equals_enumeration_and_statsmodels(first_only: int, second_only: int) -> None:
    found = mcnemar(*outcomes(first_only, second_only))
    assert (found.first_only, found.second_only, found.n) == (first_only, second_only, first_only + second_only + 5)
    n, gap = first_only + second_only, abs(first_only - second_only)
    gaps = [abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=n)]
    by_hand = (sum(g > gap for g in gaps) + 0.5 * sum(g == gap for g in gaps)) / 2**n
    assert found.p == pytest.approx(by_hand, abs=1e-12)
    if first_only != second_only:  # the exact p takes in the whole chance of the split found, on both sides
        exact = statsmodels_mcnemar([[3, first_only], [second_only, 2]], exact=True).pvalue
        point = scipy.stats.binom.pmf(first_only, n, 0.5)
        assert found.p == pytest.approx(exact - point, abs=1e-12)


def test_mcnemar_counts_shared_prompts_and_is_undefined_without_a_difference() -> None:
    found = mcnemar({"a": 1, "b": 1, "only first": 1}, {"a": 1, "b": 1, "only second": 0})
    assert (found.first_only, found.second_only, found.n, found.p) == (0, 0, 2, None)
    assert mcnemar({}, {}).n == 0
    with pytest.raises(ConfigError, match="leave ties out"):
        mcnemar({"a": 0.5}, {"a": 1})


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_sign_flip_equals_brute_force(values: list[int]) -> None:
    found = sign_flip_test({str(k): float(value) for k, value in enumerate(values)})
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    assert found.p == pytest.approx(sum(total >= abs(sum(values)) for total in sums) / len(sums), abs=1e-15)
    assert found.exact
    assert found.difference == pytest.approx(np.mean(values))
    mirrored = sign_flip_test({str(k): -float(value) for k, value in enumerate(values)})
    assert mirrored.p == found.p


@pytest.mark.parametrize(("seeds", "smallest"), [(5, 0.0625), (6, 0.03125), (8, 0.0078125), (10, 0.001953125)])
def test_the_smallest_sign_flip_p_is_set_by_the_number_of_seeds(seeds: int, smallest: float) -> None:
    assert sign_flip_test({str(k): 0.1 * (k + 1) for k in range(seeds)}).p == smallest


def test_sign_flip_equals_scipys_permutation_test() -> None:
    values = np.random.default_rng(0).normal(0.4, 1.0, size=11)
    theirs = scipy.stats.permutation_test(
        (values, np.zeros(11)),
        lambda a, b, axis: (a - b).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip_test({f"{k:02}": v for k, v in enumerate(values)}).p == pytest.approx(theirs.pvalue, abs=1e-12)


def test_random_sign_flips_agree_with_exact_ones_and_are_never_zero() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, size=17)
    named = {f"{k:02}": float(v) for k, v in enumerate(values)}
    found = sign_flip_test(named, draws=20000, seed=3)
    bits = np.arange(2**17)[:, None] >> np.arange(17)[None, :] & 1
    exact = (np.abs((1 - 2 * bits) @ values) >= abs(values.sum()) - 1e-9).mean()
    assert not found.exact
    assert 0.01 < exact < 0.5
    assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20000))
    assert found == sign_flip_test(dict(reversed(named.items())), draws=20000, seed=3)
    assert sign_flip_test({str(k): 1.0 for k in range(60)}, draws=499).p == 1 / 500


def test_sign_flip_of_nothing_of_zeros_and_of_nan() -> None:
    assert sign_flip_test({}).p is None
    assert sign_flip_test({"a": 0.0, "b": 0.0}).p == 1.0
    assert sign_flip_test({"a": 3.0}).p == 1.0
    with pytest.raises(NonFiniteError, match="sample b"):
        sign_flip_test({"a": 1.0, "b": math.nan})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_statsmodels_and_lies_between_raw_and_bonferroni(values: list[float]) -> None:
    named = {f"t{k}": p for k, p in enumerate(values)}
    found = holm(named)
    assert list(found) == list(named)
    np.testing.assert_allclose(list(found.values()), multipletests(values, method="holm")[1], atol=1e-12)
    for name, p in named.items():
        assert p <= found[name] <= min(1.0, len(values) * p) + 1e-12


def test_holm_counts_undefined_tests_in_the_family() -> None:
    assert holm({"a": 0.01, "b": None, "c": 0.02}) == {"a": 0.03, "b": None, "c": 0.04}
    assert holm({}) == {}
    with pytest.raises(ConfigError, match="'b' is 1.5"):
        holm({"a": 0.1, "b": 1.5})
    with pytest.raises(ConfigError):
        holm({"a": math.nan})


@pytest.mark.parametrize(("shift", "margin"), [(0.0, 0.3), (0.1, 0.3), (-0.1, 0.3), (0.5, 0.3), (-0.5, 0.3)])
def test_equivalence_equals_statsmodels_tost(shift: float, margin: float) -> None:
    values = np.random.default_rng(5).normal(shift, 0.8, size=60)
    found = equivalence({f"{k:02}": float(v) for k, v in enumerate(values)}, margin)
    p, *_ = ttost_paired(values, np.zeros(60), -margin, margin)
    assert found.p == pytest.approx(p, abs=1e-12)
    low, high = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.n == 60


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20), st.floats(0.05, 1.0), st.floats(0.01, 0.4))
def test_equivalence_by_p_is_equivalence_by_interval(values: list[float], margin: float, alpha: float) -> None:
    found = equivalence({str(k): v for k, v in enumerate(values)}, margin, alpha)
    if found.p is None or abs(found.p - alpha) < 1e-9:
        return
    assert found.equivalent == (found.p < alpha)
    assert found.equivalent == within_margin(Interval(found.difference, found.low, found.high, found.n), margin)
    mirrored = equivalence({str(k): -v for k, v in enumerate(values)}, margin, alpha)
    assert (mirrored.p, mirrored.low, mirrored.high) == pytest.approx((found.p, -found.high, -found.low), abs=1e-9)


def test_equivalence_is_not_absence_of_a_significant_difference() -> None:
    noisy = equivalence({"a": -2.0, "b": 2.5, "c": -0.4}, margin=0.1)
    assert noisy.equivalent is False
    assert equivalence({"a": 0.0, "b": 0.0}, 0.1) == Equivalence(
        difference=0.0, low=None, high=None, margin=0.1, alpha=0.05, p=None, equivalent=None, n=2
    )
    assert equivalence({"a": 0.1}, 0.5).equivalent is None
    assert equivalence({}, 0.5).difference is None
    for margin in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="margin"):
            equivalence({"a": 1.0, "b": 2.0}, margin)
    with pytest.raises(ConfigError, match="alpha"):
        equivalence({"a": 1.0, "b": 2.0}, 1.0, alpha=0.5)


def test_within_margin_of_a_bootstrap_interval() -> None:
    values = {str(k): 0.01 * (k % 5 - 2) for k in range(50)}
    interval = bootstrap_mean(values, {}, 500, 0, level=0.9)
    assert within_margin(interval, 0.01) is True
    assert within_margin(interval, interval.high) is False
    assert within_margin(Interval(0.0, -0.02, 0.001, 9), 0.01) is False
    assert within_margin(Interval(0.0, None, None, 1), 0.01) is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_rank_agreement_equals_scipy(rows: list[tuple[int, int]]) -> None:
    first, second = (
        {str(k): float(a) for k, (a, _) in enumerate(rows)},
        {str(k): float(b) for k, (_, b) in enumerate(rows)},
    )
    found = rank_agreement(first, second | {"other": 1.0})
    left, right = zip(*rows, strict=True)
    assert found.n == len(rows)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert (found.spearman, found.kendall) == (None, None)
    else:
        assert found.spearman == pytest.approx(scipy.stats.spearmanr(left, right).statistic, abs=1e-9)
        assert found.kendall == pytest.approx(scipy.stats.kendalltau(left, right).statistic, abs=1e-9)


def test_rank_agreement_has_a_sign_and_a_least_size() -> None:
    up, down = {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 9.0, "b": 5.0, "c": 4.0}
    assert (rank_agreement(up, down).spearman, rank_agreement(up, down).kendall) == pytest.approx((-1.0, -1.0))
    few = rank_agreement({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0})
    assert (few.spearman, few.kendall, few.n) == (None, None, 2)
