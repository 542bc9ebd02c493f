"""Statistics of gains over folds: direct formulas, scipy, and simulations with a known signal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from u2a.bilevel.select import (
    LEVEL,
    PRIOR_DOF,
    FoldStatistics,
    LowerBound,
    Mean,
    Shrunken,
    alike,
    decide,
    fold_statistics,
    halves,
    make_estimator,
    reliability,
    spearman,
    top_block,
)
from u2a.config import SolveSection

SMALL = st.integers(-4, 4).map(float)


def table(seed: int, n: int, folds: int, signal: float, noise: float, mean: float = 0.0) -> Tensor:
    """Gains with true values of the given spread, and independent noise of the given spread in each fold."""
    generator = torch.Generator().manual_seed(seed)
    truth = mean + signal * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return truth + noise * torch.randn(n, folds, generator=generator, dtype=torch.float64)


def statistics(
    gain: list[float],
    se: float | None,
    signal_var: float | None,
    p_signal: float | None = 0.0,
    mean_se: float = 0.1,
) -> FoldStatistics:
    values = torch.tensor(gain, dtype=torch.float64)
    errors = None if se is None else torch.full_like(values, se)
    return FoldStatistics(values, errors, signal_var, p_signal, float(values.mean()), mean_se, 8)


@given(rows=st.lists(st.tuples(SMALL, SMALL), min_size=3, max_size=12))
def test_spearman_equals_scipy_with_ties(rows: list[tuple[float, float]]):
    left, right = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    found = spearman(left, right)
    if len(set(left.tolist())) == 1 or len(set(right.tolist())) == 1:
        assert found is None
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(left, right).statistic, abs=1e-12)


def test_spearman_of_fewer_than_three_is_undefined():
    assert spearman(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) is None


@pytest.mark.parametrize("folds", range(1, 9))
def test_halves_lists_every_split_into_nearly_equal_halves_once(folds: int):
    found = halves(folds)
    splits = {frozenset({frozenset(half), frozenset(range(folds)) - frozenset(half)}) for half in found}
    sizes = {folds // 2, folds - folds // 2}
    every = {
        frozenset({frozenset(half), frozenset(range(folds)) - frozenset(half)})
        for size in sizes
        for half in itertools.combinations(range(folds), size)
        if 0 < size < folds
    }
    assert len(found) == len(splits)
    assert splits == every


@pytest.mark.parametrize("folds", [9, 16, 40])
def test_of_many_halves_a_seeded_draw_is_taken_that_spreads_over_all_folds(folds: int):
    found = halves(folds, most=64)
    assert len(set(found)) == len(found) == 64 and found == halves(folds, most=64)
    assert {len(half) for half in found} == {(folds + 1) // 2}
    assert folds % 2 or all(half[0] == 0 for half in found)
    counts = [sum(fold in half for half in found) for fold in range(1, folds)]
    assert min(counts) > 15 and max(counts) < 50  # about half of the splits each, not the first ones in a list


def test_alike_means_equal_but_for_rounding():
    assert alike(torch.tensor([1.0, 1.0 + 1e-7, 1.0])) and alike(torch.tensor([-3.0])) and alike(torch.zeros(4))
    assert not alike(torch.tensor([1.0, 1.0 + 1e-4])) and not alike(torch.tensor([1e-9, -1e-9]))


def test_fold_statistics_equal_the_formulas_written_out():
    gains, sizes = table(0, n=7, folds=4, signal=1.0, noise=0.5, mean=0.3).numpy(), [5, 5, 4, 4]
    found = fold_statistics(torch.from_numpy(gains), sizes)
    weighted = gains @ np.array(sizes) / 18
    assert np.allclose(found.gain, weighted)
    assert found.mean_gain == pytest.approx(weighted.mean())
    assert np.allclose(found.centred, weighted - weighted.mean())
    assert found.mean_gain_se == pytest.approx(scipy.stats.sem(gains.mean(0)))
    centred = gains - gains.mean(0)
    own = centred.var(1, ddof=1) / 4
    pulled = np.sqrt((3 * own + PRIOR_DOF * own.mean()) / (3 + PRIOR_DOF))
    assert np.allclose(found.se, pulled)
    signal = np.mean([np.cov(gains[:, a], gains[:, b])[0, 1] for a, b in itertools.combinations(range(4), 2)])
    assert found.signal_var == pytest.approx(signal)
    beaten = []
    for flips in itertools.product([1, -1], repeat=3):
        flipped = centred * np.array([1, *flips])
        beaten.append(np.mean([flipped[:, a] @ flipped[:, b] for a, b in itertools.combinations(range(4), 2)]))
    assert found.p_signal == pytest.approx(np.mean(np.array(beaten) >= beaten[0] - 1e-12))


def test_folds_of_unequal_size_are_weighted_in_all_statistics():
    gains, sizes = table(0, n=7, folds=4, signal=1.0, noise=0.5, mean=0.3).numpy(), np.array([9, 2, 4, 3])
    found = fold_statistics(torch.from_numpy(gains), sizes.tolist())
    centred = gains - gains.mean(0)

    def variance(values: np.ndarray) -> np.ndarray:
        mean = np.average(values, axis=-1, weights=sizes)[..., None]
        return ((values - mean) ** 2 @ sizes) / 3 / sizes.sum()

    own = variance(centred)
    assert np.allclose(found.se, np.sqrt((3 * own + PRIOR_DOF * own.mean()) / (3 + PRIOR_DOF)))
    assert found.mean_gain_se == pytest.approx(float(variance(gains.mean(0))) ** 0.5)

    def agreement(flips: tuple[int, ...]) -> float:
        flipped = centred * np.array([1, *flips])
        pairs = list(itertools.combinations(range(4), 2))
        weights = [sizes[a] * sizes[b] for a, b in pairs]
        return np.average([flipped[:, a] @ flipped[:, b] / 6 for a, b in pairs], weights=weights)

    assert found.signal_var == pytest.approx(agreement((1, 1, 1)))
    patterns = [agreement(flips) for flips in itertools.product([1, -1], repeat=3)]
    assert found.p_signal == pytest.approx(np.mean(np.array(patterns) >= patterns[0] - 1e-12))


@pytest.mark.parametrize("folds", [2, 5])
def test_equal_folds_have_the_same_statistics_with_and_without_weights(folds: int):
    gains = table(6, 9, folds, 1.0, 1.0)
    plain, weighted = fold_statistics(gains, [4] * folds), fold_statistics(gains, [4] * folds, [0.5] * folds)
    assert torch.allclose(plain.se, weighted.se, rtol=1e-12)
    for name in ("signal_var", "p_signal", "mean_gain", "mean_gain_se"):
        assert getattr(plain, name) == pytest.approx(getattr(weighted, name), rel=1e-12)


def test_one_fold_has_no_uncertainty_and_two_can_only_agree_or_not():
    one = fold_statistics(table(1, 5, 1, 1.0, 1.0), [3])
    assert (one.se, one.signal_var, one.mean_gain_se, one.has_signal) == (None, None, None, False)
    two = fold_statistics(table(1, 5, 2, 1.0, 0.1), [3, 3])
    assert (two.p_signal, two.has_signal) == (0.5, True)
    against = fold_statistics(table(1, 5, 2, 1.0, 0.1) * torch.tensor([1.0, -1.0]).double(), [3, 3])
    assert (against.p_signal, against.has_signal) == (1.0, False)
    assert two.se is not None


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 2.0), (0.5, 0.5), (0.0, 1.0)])
def test_signal_variance_is_unbiased(signal: float, noise: float):
    values = [fold_statistics(table(seed, 30, 4, signal, noise), [4] * 4).signal_var for seed in range(400)]
    error = np.std(values) / math.sqrt(len(values))
    assert np.mean(values) == pytest.approx(signal**2, abs=3 * error)
    assert error < 0.05 * (signal**2 + noise**2)


def test_standard_error_is_that_of_the_centred_gain_in_simulation():
    found = [float(fold_statistics(table(s, 40, 4, 1.0, 0.8), [4] * 4).se.square().mean()) for s in range(50)]
    assert np.mean(found) == pytest.approx(0.8**2 / 4 * (1 - 1 / 40), rel=0.05)


@given(shift=st.floats(-100, 100))
def test_a_common_shift_of_a_fold_changes_neither_noise_nor_signal_of_the_ranking(shift: float):
    gains = table(2, 8, 4, 1.0, 0.5)
    moved = gains.clone()
    moved[:, 1] += shift
    first, second = fold_statistics(gains, [3] * 4), fold_statistics(moved, [3] * 4)
    assert torch.allclose(first.se, second.se, atol=1e-9)
    assert first.signal_var == pytest.approx(second.signal_var, abs=1e-9)
    assert torch.allclose(first.centred, second.centred, atol=1e-9)


def shared_noise(seed: int, n: int, folds: int, signal: float, rank: int = 2) -> Tensor:
    """Gains whose noise is shared by the candidates, as that of a few gradients is: low rank over candidates."""
    generator = torch.Generator().manual_seed(seed)
    truth = signal * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    slopes = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    return truth + slopes @ torch.randn(rank, folds, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("folds", [4, 8])
@pytest.mark.parametrize("draw", [lambda s, k, x: table(s, 40, k, x, 1.0), lambda s, k, x: shared_noise(s, 40, k, x)])
def test_signal_is_claimed_where_it_is_and_as_rarely_as_stated_where_it_is_not(
    folds: int, draw: Callable[[int, int, float], Tensor]
):
    def claims(signal: float) -> float:
        return np.mean([fold_statistics(draw(s, folds, signal), [4] * folds).has_signal for s in range(400)])

    level = max(LEVEL, 0.5 ** (folds - 1))
    assert claims(2.0) > 0.9
    assert claims(0.0) < level + 3 * math.sqrt(level * (1 - level) / 400)


def test_many_folds_are_tested_by_drawn_patterns_and_the_same_each_time():
    first, again = (fold_statistics(table(3, 20, 16, 0.3, 1.0), [2] * 16).p_signal for _ in range(2))
    assert first == again
    assert 1 / 4096 <= first < 0.05


def found_reliability(gains: Tensor, sizes: list[int]):
    folds = gains.shape[1]
    return reliability(gains, sizes, torch.eye(folds, dtype=torch.float64), fold_statistics(gains, sizes))


def test_reliability_of_pure_noise_is_near_zero_and_of_pure_signal_one():
    noise = [found_reliability(table(s, 60, 4, 0.0, 1.0), [4] * 4).split_half for s in range(100)]
    assert abs(np.mean(noise)) < 0.03
    pure = found_reliability(table(0, 60, 4, 1.0, 0.0), [4] * 4)
    assert (pure.split_half, pure.full_set) == (pytest.approx(1.0), pytest.approx(1.0))
    assert pure.noise_sd == pytest.approx(0.0, abs=1e-12)
    assert pure.signal_sd > 0.5


@pytest.mark.parametrize(("candidates", "folds"), [(5, 1), (1, 4), (1, 1)])
def test_what_one_fold_or_one_candidate_cannot_show_is_none(candidates: int, folds: int):
    found = found_reliability(table(0, candidates, folds, 1.0, 1.0), [4] * folds)
    assert (found.signal_sd, found.noise_sd, found.p_signal, found.split_half) == (None, None, None, None)


def test_spearman_brown_predicts_the_correlation_of_two_whole_sets():
    predicted, measured = [], []
    for seed in range(60):
        both = table(seed, 200, 8, 1.0, 2.0)
        first, second = both[:, :4], both[:, 4:]
        predicted.append(found_reliability(first, [4] * 4).full_set)
        measured.append(spearman(first.mean(1), second.mean(1)))
    assert np.mean(predicted) == pytest.approx(np.mean(measured), abs=0.03)


def test_no_prediction_where_the_halves_contradict_each_other():
    gains = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 3.5], [4.0, 1.0]], dtype=torch.float64)
    found = found_reliability(gains, [3, 3])
    assert found.split_half == pytest.approx(-1.0)
    assert found.full_set is None
    mild = found_reliability(torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 0.5]]).double(), [1, 1])
    assert mild.split_half is not None
    assert mild.split_half < 0
    assert mild.full_set is None


def test_gradient_cosine_averages_the_cosines_of_pooled_halves():
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sizes = [3, 3, 2, 2]
    gains = table(4, 5, 4, 1.0, 1.0)
    found = reliability(gains, sizes, gradients @ gradients.T, fold_statistics(gains, sizes)).gradient_cosine
    cosines = []
    for half in ((0, 1), (0, 2), (0, 3)):
        rest = [k for k in range(4) if k not in half]
        a, b = (sum(sizes[k] * gradients[k] for k in part) for part in (half, rest))
        cosines.append(float(a @ b / a.norm() / b.norm()))
    assert found == pytest.approx(np.mean(cosines))


def test_shrinkage_limits():
    gain = [3.0, 1.0, -1.0]
    assert Shrunken().estimate(statistics(gain, 1.0, 0.0)).tolist() == pytest.approx([1.0] * 3)
    assert Shrunken().estimate(statistics(gain, 1.0, -0.5)).tolist() == pytest.approx([1.0] * 3)
    assert Shrunken().estimate(statistics(gain, 1.0, 1e12)).tolist() == pytest.approx(gain)
    assert Shrunken().estimate(statistics(gain, 0.0, 0.7)).tolist() == pytest.approx(gain)
    assert Shrunken().estimate(statistics(gain, 1.0, 1.0)).tolist() == pytest.approx([2.0, 1.0, 0.0])
    assert Shrunken().estimate(statistics(gain, 0.0, 0.0)).tolist() == pytest.approx([1.0] * 3)
    assert Shrunken().estimate(statistics(gain, None, None)).tolist() == gain


def test_shrinkage_lowers_the_error_of_noisy_gains():
    raw, shrunk = [], []
    for seed in range(50):
        truth = torch.randn(40, 1, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
        noise = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = fold_statistics(truth + 3.0 * noise, [4] * 4)
        raw.append(float((found.gain - truth[:, 0]).square().mean()))
        shrunk.append(float((Shrunken().estimate(found) - truth[:, 0]).square().mean()))
    assert np.mean(shrunk) < 0.6 * np.mean(raw)


def test_lower_bound_subtracts_standard_errors_and_mean_does_not():
    found = replace(statistics([3.0, 1.0], 0.5, 1.0), mean_gain_se=0.0)
    assert LowerBound(2.0).estimate(found).tolist() == [2.0, 0.0]
    shaky = replace(found, mean_gain_se=1.2)  # the mean gain may be off as well: 1.3^2 = 0.5^2 + 1.2^2
    assert LowerBound(2.0).estimate(shaky).tolist() == pytest.approx([0.4, -1.6])
    assert LowerBound(2.0).estimate(statistics([3.0, 1.0], None, None)).tolist() == [3.0, 1.0]
    assert Mean().estimate(found).tolist() == [3.0, 1.0]
    assert make_estimator(SolveSection(estimator="lower_bound", confidence=2.0)) == LowerBound(2.0)
    assert make_estimator(SolveSection(estimator="mean")) == Mean()
    assert make_estimator(SolveSection()) == Shrunken()


UP, DOWN = torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -2.0])


@pytest.mark.parametrize(
    ("found", "estimates", "fallback", "expected"),
    [
        (statistics([1.0, -1.0], 0.1, 1.0), UP, "random_k", "none"),  # signal, something to gain
        (statistics([-1.0, -2.0], 0.1, 1.0), DOWN, "random_k", "empty"),  # signal, nothing to gain
        (statistics([1.0, -1.0], 0.1, 0.5, 0.6), UP, "random_k", "random_k"),  # variance within its error
        (statistics([1.0, -1.0], 0.1, -0.5), UP, "random_k", "random_k"),
        (statistics([-0.1, -0.2], 0.1, 0.0), DOWN, "random_k", "random_k"),  # negative mean within two errors
        (statistics([-1.0, -2.0], 0.1, 0.0), DOWN, "random_k", "empty"),  # clearly harmful
        (statistics([1.0, -1.0], None, None), UP, "random_k", "none"),  # one fold: nothing is known of the noise
        (statistics([-1.0, -2.0], None, None), DOWN, "random_k", "empty"),
        (statistics([1.0, -1.0], 0.1, -0.5), UP, "none", "none"),  # rank whatever the noise
        (statistics([-1.0, -2.0], 0.1, 1.0), DOWN, "none", "empty"),
    ],
)
def test_decide(found: FoldStatistics, estimates: Tensor, fallback: str, expected: str):
    assert decide(found, estimates, fallback) == expected


def test_decide_without_signal_counts_the_damage_to_the_retain_rows():
    noise = statistics([0.3, -0.1], 0.1, -0.5)  # no signal, mean gain 0.1
    assert decide(noise, DOWN, "random_k", damage=0.0) == "random_k"
    assert decide(noise, DOWN, "random_k", damage=50.0) == "empty"


def test_top_block_breaks_ties_by_id_and_takes_only_promising_free_ones():
    ids = ["d", "b", "c", "a", "e", "f"]
    estimates = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0, -1.0])
    assert [ids[k] for k in top_block(estimates, ids, [False] * 6, 3)] == ["c", "a", "b"]
    assert [ids[k] for k in top_block(estimates, ids, [False] * 6, 9)] == ["c", "a", "b", "d"]
    assert [ids[k] for k in top_block(estimates, ids, [False, True, True, False, False, False], 9)] == ["a", "d"]
    assert top_block(estimates, ids, [False] * 6, 0) == []


@given(order=st.permutations(range(6)))
def test_top_block_does_not_depend_on_the_order_of_candidates(order: list[int]):
    ids, estimates = list("abcdef"), torch.tensor([1.0, 1.0, 2.0, 1.0, 0.5, -1.0])
    chosen = top_block(estimates[order], [ids[k] for k in order], [False] * 6, 3)
    assert [ids[order[k]] for k in chosen] == ["c", "a", "b"]
