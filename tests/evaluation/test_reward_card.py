"""The reward-model card against hand-computed numbers, scikit-learn, scipy and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, cohen_kappa_score, log_loss

from tiny import ask
from u2a.card_words import in_words
from u2a.evaluation.stats import wilson
from u2a.reward.association import association, kappa, kendall, measured, pearson, spearman
from u2a.reward.base import CallableReward
from u2a.reward.card import calibration, card_lines, reward_card
from u2a.types import Pair

LENGTH = CallableReward("length", lambda prompts, answers: [float(len(answer)) for answer in answers])
CONSTANT = CallableReward("constant", lambda prompts, answers: [1.0] * len(answers))
NUMBER = CallableReward("number", lambda prompts, answers: [float(answer) for answer in answers])


def numbered(margins: list[float], prompts: list[int] | None = None) -> list[Pair]:
    """Pairs whose rewards under ``NUMBER`` differ by the given margins."""
    places = prompts or list(range(len(margins)))
    return [
        Pair(id=f"p{k}", prompt=ask(f"q{place}"), chosen=repr(float(margin)), rejected="0.0")
        for k, (margin, place) in enumerate(zip(margins, places, strict=True))
    ]


def sized(sizes: list[tuple[int, int]]) -> list[Pair]:
    """Pairs with answers of the given lengths, on different prompts."""
    return [Pair(id=str(k), prompt=ask(f"q{k}"), chosen="a" * c, rejected="b" * r) for k, (c, r) in enumerate(sizes)]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# --- the card -----------------------------------------------------------------------------------


def test_card_by_hand() -> None:
    card = reward_card(NUMBER, numbered([2.0, -1.0, 0.0, 3.0]), 7)
    assert (card.name, card.n_train, card.n_pairs, card.n_prompts) == ("number", 7, 4, 4)
    assert card.pair_accuracy == (2 + 0.5) / 4  # the tie counts one half
    expected = wilson(2.5, 4)
    assert (card.pair_accuracy_low, card.pair_accuracy_high) == (expected.low, expected.high)
    given_to_chosen = [sigmoid(margin) for margin in (2.0, -1.0, 0.0, 3.0)]
    assert card.brier == pytest.approx(sum((1 - p) ** 2 for p in given_to_chosen) / 4)
    assert card.log_loss == pytest.approx(sum(-math.log(p) for p in given_to_chosen) / 4)
    assert card.n_bins == 1
    confidence = (sigmoid(2) + sigmoid(1) + 0.5 + sigmoid(3)) / 4
    assert card.ece == pytest.approx(abs(2.5 / 4 - confidence))


def test_card_agrees_with_sklearn_whichever_answer_stands_first() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0.4, 1.5, size=101)
    card = reward_card(NUMBER, numbered(margins.tolist()), 0)
    label = rng.integers(0, 2, 101)  # 1: the chosen answer is put first
    chance = 1 / (1 + np.exp(-np.where(label == 1, margins, -margins)))
    assert card.brier == pytest.approx(brier_score_loss(label, chance), abs=1e-6)
    assert card.log_loss == pytest.approx(log_loss(label, chance), abs=1e-6)


def test_model_that_says_one_half_is_a_coin() -> None:
    card = reward_card(CONSTANT, sized([(3, 1), (5, 2), (1, 4)]), 0)
    assert (card.pair_accuracy, card.brier, card.ece) == (0.5, 0.25, 0.0)
    assert card.log_loss == pytest.approx(math.log(2))
    assert card.length_correlation is None
    assert card.length_rank_correlation is None
    assert in_words(card) == "not shown to be better than a coin"


def test_card_without_pairs_is_undefined_not_zero() -> None:
    card = reward_card(LENGTH, [], 0)
    numbers = card.model_dump(exclude={"name", "n_train", "n_pairs", "n_prompts", "n_trained_on", "n_bins"})
    assert set(numbers.values()) == {None}
    assert (card.n_pairs, card.n_prompts, card.n_bins) == (0, 0, 0)
    assert in_words(card) == "not measured (0 held-out pairs)"
    assert "undefined" in card_lines(card)[1]


def test_pairs_of_one_prompt_widen_the_interval() -> None:
    margins = [1.0, 1.0, -1.0, 1.0] * 30
    each = reward_card(NUMBER, numbered(margins), 0)
    repeated = [margin for margin in margins[:12] for _ in range(10)]  # 12 prompts, ten equal pairs each
    clustered = reward_card(NUMBER, numbered(repeated, [k // 10 for k in range(120)]), 0)
    assert each.pair_accuracy == clustered.pair_accuracy == 0.75
    assert (each.n_pairs, clustered.n_pairs, clustered.n_prompts) == (120, 120, 12)
    for name in ("pair_accuracy", "brier", "log_loss"):
        widths = [getattr(card, f"{name}_high") - getattr(card, f"{name}_low") for card in (each, clustered)]
        assert widths[1] > 2 * widths[0]


def test_length_correlations_are_over_all_answers() -> None:
    pairs = sized([(3, 1), (5, 2), (1, 4), (2, 2), (30, 9)])
    squared = CallableReward("squared", lambda prompts, answers: [-(float(len(answer)) ** 2) for answer in answers])
    card = reward_card(squared, pairs, 0)
    lengths = [3, 5, 1, 2, 30, 1, 2, 4, 2, 9]
    assert card.length_correlation == pytest.approx(np.corrcoef(lengths, [-(x**2) for x in lengths])[0, 1])
    assert card.length_rank_correlation == pytest.approx(-1.0)
    assert card.length_rank_correlation_low == pytest.approx(-1.0)
    assert "it favours short answers" in in_words(card)
    assert "it favours long answers" in in_words(reward_card(LENGTH, pairs, 0))


@settings(max_examples=20)
@given(order=st.permutations(range(30)))
def test_card_does_not_depend_on_the_order_of_the_pairs(order: list[int]) -> None:
    there, back = (reward_card(NUMBER, rows, 1, 100) for rows in (MIXED, [MIXED[index] for index in order]))
    for name, value in there.model_dump().items():
        found = getattr(back, name)
        assert found == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), name


MIXED = numbered(np.random.default_rng(5).integers(-2, 4, 30).astype(float).tolist(), [k // 2 for k in range(30)])


# --- in words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.2, "worse than a coin"), (0.5, "not shown to be"), (0.6, "barely"), (0.7, "better"), (0.8, "clearly better")],
)
def test_words_follow_accuracy_and_its_interval(share: float, words: str) -> None:
    margins = [0.4] * round(400 * share) + [-0.4] * round(400 * (1 - share))
    said = in_words(reward_card(NUMBER, numbered(margins), 0, 100))
    assert said.startswith(words)
    few = in_words(reward_card(NUMBER, numbered([0.4] * 12 + [-0.4] * 8), 0, 100))  # 0.6 again, on 20 pairs
    assert few.startswith("not shown to be better than a coin")
    some = in_words(reward_card(NUMBER, numbered([0.4] * 16 + [-0.4] * 4), 0, 100))  # 0.8 [0.58, 0.92]
    assert some.startswith("better than a coin, perhaps barely")


def test_margins_that_are_no_log_odds_are_named() -> None:
    rows = numbered([50.0] * 320 + [-50.0] * 80)  # ranks 80 % rightly, and is certain when wrong
    card = reward_card(NUMBER, rows, 0, 100)
    assert card.log_loss == pytest.approx(10.0, abs=1e-6)
    assert in_words(card).startswith("clearly better than a coin; its margins are no log odds")
    assert "0.800" in card_lines(card)[1]


# --- calibration --------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    logit = math.log(0.9 / 0.1)
    margins = np.array([0.0] * 2 + [logit] * 3 + [-logit])  # ties at 1/2, then 3 of 4 right at confidence 0.9
    assert calibration(margins, 2).ece == pytest.approx((2 * 0.0 + 4 * 0.15) / 6)
    assert calibration(margins, 1).ece == pytest.approx(abs((1 + 3) / 6 - (2 * 0.5 + 4 * 0.9) / 6))


def test_calibration_error_is_that_of_sklearns_curve_on_quantile_bins() -> None:
    margins = np.random.default_rng(1).normal(0.3, 1.5, 200)
    confidence, hit = 1 / (1 + np.exp(-np.abs(margins))), (margins > 0).astype(int)
    rate, mean = calibration_curve(hit, confidence, n_bins=10, strategy="quantile")
    assert calibration(margins).n_bins == 10
    assert calibration(margins).ece == pytest.approx(np.abs(rate - mean).mean())  # bins of 20 pairs each


@pytest.mark.parametrize(("n", "bins"), [(1, 1), (39, 1), (40, 2), (199, 9), (5000, 10)])
def test_bins_hold_twenty_pairs_at_least(n: int, bins: int) -> None:
    assert calibration(np.linspace(-1, 1, n)).n_bins == bins


def test_small_samples_show_error_without_miscalibration() -> None:
    rng = np.random.default_rng(2)

    def drawn(n: int) -> np.ndarray:
        size = np.abs(rng.normal(0, 1.5, n))
        return np.where(rng.random(n) < 1 / (1 + np.exp(-size)), size, -size)

    few = [calibration(drawn(60), 3) for _ in range(200)]
    assert np.mean([c.ece for c in few]) == pytest.approx(np.mean([c.ece_if_calibrated for c in few]), rel=0.1)
    assert calibration(drawn(20000), 3).ece < 0.02
    assert few[0].ece_if_calibrated > 0.03
    certain = calibration(np.array([40.0] * 50 + [-40.0] * 50), 3)
    assert certain.ece == pytest.approx(0.5)
    assert certain.ece_if_calibrated < 1e-6


@given(margins=st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]), min_size=1, max_size=40), bins=st.integers(1, 6))
def test_calibration_of_ties_does_not_depend_on_order_and_is_bounded(margins: list[float], bins: int) -> None:
    found = calibration(np.array(margins), bins)
    back = calibration(np.array(margins[::-1]), bins)
    assert (found.ece, found.ece_if_calibrated) == pytest.approx((back.ece, back.ece_if_calibrated))
    assert 0 <= found.ece <= sigmoid(2.0) + 1e-12


# --- associations -------------------------------------------------------------------------------


def test_rank_correlations_agree_with_scipy() -> None:
    rng = np.random.default_rng(3)
    first = rng.integers(0, 8, 50).astype(float)  # with ties
    second = first + rng.normal(0, 3, 50)
    assert measured(spearman, first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert measured(kendall, first, second) == pytest.approx(kendalltau(first, second).statistic)
    assert measured(kendall, [1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    for measure in (spearman, kendall, pearson):
        assert measured(measure, [], []) is None
        assert measured(measure, [1.0, 2.0], [1.0, 2.0]) is None
        assert measured(measure, [0.1, 0.1, 0.1], [1.0, 2.0, 3.0]) is None


def test_kappa_agrees_with_sklearn() -> None:
    rng = np.random.default_rng(4)
    first = rng.integers(0, 2, 60)
    second = np.where(rng.random(60) < 0.7, first, 1 - first)
    assert measured(kappa, first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert measured(kappa, [0, 1], [1, 0]) == -1.0
    assert measured(kappa, [], []) is None
    assert measured(kappa, [1, 1], [1, 1]) is None


@pytest.mark.parametrize(
    ("measure", "oracle"),
    [
        (pearson, lambda a, b: np.corrcoef(a, b)[0, 1]),
        (spearman, lambda a, b: spearmanr(a, b).statistic),
        (kendall, lambda a, b: kendalltau(a, b).statistic),
        (kappa, lambda a, b: cohen_kappa_score(a > 2, b > 2)),
    ],
)
def test_a_row_drawn_twice_counts_as_two_rows(measure, oracle) -> None:
    rng = np.random.default_rng(7)
    first = rng.integers(0, 6, 300).astype(float)
    second = np.round(0.5 * first + rng.normal(0, 1, 300))
    times = rng.integers(0, 4, (20, 300))
    columns = (first > 2, second > 2) if measure is kappa else (first, second)
    found = measure(columns[0].astype(float), columns[1].astype(float), times)
    expected = [oracle(np.repeat(first, row), np.repeat(second, row)) for row in times]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_association_resamples_prompts() -> None:
    rng = np.random.default_rng(6)
    first = rng.normal(size=40)
    second = 0.6 * first + 0.8 * rng.normal(size=40)
    keys = [f"k{index}" for index in range(40)]
    alone = association(pearson, first, second, keys, 800, 0)
    assert alone.value == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert alone.n == 40
    fisher = 1.96 / math.sqrt(37)
    assert alone.low == pytest.approx(math.tanh(math.atanh(alone.value) - fisher), abs=0.12)
    assert alone.high == pytest.approx(math.tanh(math.atanh(alone.value) + fisher), abs=0.12)
    # every row four times under its prompt carries no more information
    repeated = association(pearson, np.repeat(first, 4), np.repeat(second, 4), np.repeat(keys, 4).tolist(), 800, 0)
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((alone.value, alone.low, alone.high))
    naive = association(pearson, np.repeat(first, 4), np.repeat(second, 4), [str(k) for k in range(160)], 800, 0)
    assert naive.high - naive.low < 0.7 * (alone.high - alone.low)


def test_association_without_an_interval() -> None:
    one = association(pearson, [1, 2, 3], [1, 2, 4], ["a"] * 3, 100, 0)
    assert (one.low, one.high, one.n) == (None, None, 1)
    # two of three prompts are constant: many resamples have no correlation
    rare = association(pearson, [1, 1, 1, 5], [0, 0, 0, 2], list("abcd"), 200, 0)
    assert rare.value == pytest.approx(1.0)
    assert rare.low is None
    nothing = association(spearman, [], [], [], 10, 0)
    assert (nothing.value, nothing.n) == (None, 0)
