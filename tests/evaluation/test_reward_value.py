"""Rewards under several models, their agreement, and the length-controlled reward, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from tiny import ask
from u2a.errors import DataError
from u2a.evaluation.reward_value import (
    arm_agreement,
    length_controlled,
    low_token_agreement,
    prompt_agreement,
    reward_values,
)
from u2a.reward.base import CallableReward

LENGTH = CallableReward("length", lambda prompts, answers: [float(len(answer)) for answer in answers])
VOWELS = CallableReward("vowels", lambda prompts, answers: [float(sum(c in "aeiou" for c in a)) for a in answers])
IDS = [f"r{index}" for index in range(12)]
PROMPTS = {key: ask(key) for key in IDS}
ANSWERS = {key: "banana split"[: 1 + index] * (1 + index % 3) for index, key in enumerate(IDS)}
GROUPS = {key: f"g{index // 2}" for index, key in enumerate(IDS)}
NAMES = ("one", "two")


class Bytes:
    """A reward model whose token rewards are given by one function of each character's position and code."""

    def __init__(self, name: str, function, skip: str = "") -> None:
        self.name, self._function, self._skip = name, function, skip

    def score(self, prompts, answers) -> Tensor:
        return torch.stack([row.mean() for row in self.token_rewards(prompts, answers)])

    def token_rewards(self, prompts, answers) -> list[Tensor]:
        return [
            torch.tensor([float(self._function(k, ord(c))) for k, c in enumerate(a) if c != self._skip])
            for a in answers
        ]


# --- means --------------------------------------------------------------------------------------


def test_every_model_gets_its_mean_and_interval() -> None:
    metrics = reward_values([LENGTH, VOWELS], PROMPTS, ANSWERS, GROUPS, 500, 0)
    assert list(metrics) == ["length", "vowels"]
    for name, count in (("length", len), ("vowels", lambda a: sum(c in "aeiou" for c in a))):
        values = {key: float(count(answer)) for key, answer in ANSWERS.items()}
        assert metrics[name].values == values
        assert metrics[name].value == pytest.approx(np.mean(list(values.values())))
        assert metrics[name].n == 6  # prompts, not answers
        assert metrics[name].low < metrics[name].value < metrics[name].high
    with pytest.raises(DataError, match="expected different ones"):
        reward_values([LENGTH, LENGTH], PROMPTS, ANSWERS, GROUPS, 500, 0)


def test_no_answers_are_no_number() -> None:
    metric = reward_values([LENGTH], {}, {}, {}, 100, 0)["length"]
    assert (metric.value, metric.low, metric.n) == (None, None, 0)


# --- agreement ----------------------------------------------------------------------------------


def test_prompt_agreement_is_the_rank_correlation_over_shared_answers() -> None:
    rng = np.random.default_rng(0)
    first = {key: float(value) for key, value in zip(IDS, rng.normal(size=12), strict=True)}
    second = {key: value**3 + float(rng.normal()) for key, value in first.items()}
    found = prompt_agreement(NAMES, {**first, "only": 9.0}, second, GROUPS, 300, 0)
    columns = [first[key] for key in IDS], [second[key] for key in IDS]
    assert found.spearman.value == pytest.approx(spearmanr(*columns).statistic)
    assert found.kendall.value == pytest.approx(kendalltau(*columns).statistic)
    assert (found.n_ranked, found.spearman.n, found.over) == (12, 6, "prompts")
    assert found.spearman.low <= found.spearman.value <= found.spearman.high
    assert (found.first, found.second) == NAMES


@settings(max_examples=20)
@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_agreement_does_not_depend_on_units(scale: float, shift: float) -> None:
    first = {key: float(index * 7 % 12) for index, key in enumerate(IDS)}
    second = {key: scale * value + shift for key, value in first.items()}
    found = prompt_agreement(NAMES, first, second, {}, 50, 0)
    assert (found.spearman.value, found.kendall.value) == pytest.approx((1.0, 1.0))
    reverse = prompt_agreement(NAMES, first, {key: -value for key, value in second.items()}, {}, 50, 0)
    assert (reverse.spearman.value, reverse.kendall.value) == pytest.approx((-1.0, -1.0))


def arms(n: int, seed: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(seed)
    return {f"arm{k}": {key: float(rng.normal(0.3 * k)) for key in IDS} for k in range(n)}


def test_arm_agreement_ranks_means_on_shared_prompts() -> None:
    first, second = arms(5, 0), arms(5, 1)
    first["arm4"].pop("r0")  # an answer which one arm lacks counts for none
    second["other"] = second["arm0"]
    found = arm_agreement(NAMES, first, second, GROUPS, 400, 0)
    kept = [key for key in IDS if key != "r0"]
    means = [[np.mean([model[f"arm{k}"][key] for key in kept]) for k in range(5)] for model in (first, second)]
    assert found.spearman.value == pytest.approx(spearmanr(*means).statistic)
    assert found.kendall.value == pytest.approx(kendalltau(*means).statistic)
    assert (found.n_ranked, found.spearman.n, found.over) == (5, 6, "arms")
    assert found.kendall.low <= found.kendall.value <= found.kendall.high
    assert found.kendall.low < found.kendall.high


def test_arm_agreement_draws_the_same_prompts_for_both_models() -> None:
    first = arms(4, 2)
    found = arm_agreement(NAMES, first, first, GROUPS, 200, 0)  # resampled apart, the two would differ
    assert (found.spearman.value, found.spearman.low, found.spearman.high) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("n", [0, 2])
def test_fewer_than_three_arms_have_no_agreement(n: int) -> None:
    found = arm_agreement(NAMES, arms(n, 0), arms(n, 1), GROUPS, 100, 0)
    assert (found.spearman.value, found.kendall.value, found.n_ranked) == (None, None, n)


def test_arms_without_a_common_prompt_have_no_agreement() -> None:
    split = {f"arm{k}": {IDS[k]: 1.0} for k in range(3)}
    assert arm_agreement(NAMES, split, split, GROUPS, 100, 0).spearman.value is None


# --- tokens -------------------------------------------------------------------------------------


def test_low_token_agreement_is_kappa_of_tokens_under_each_models_quantile() -> None:
    models = Bytes("code", lambda k, code: code + 0.01 * k), Bytes("place", lambda k, code: -k + 0.001 * code)
    found = low_token_agreement(models, PROMPTS, ANSWERS, GROUPS, 0.4, 200, 0)
    rows = [torch.cat(model.token_rewards(PROMPTS, [ANSWERS[k] for k in sorted(IDS)])).numpy() for model in models]
    low = [row < np.quantile(row, 0.4) for row in rows]
    assert found.kappa.value == pytest.approx(cohen_kappa_score(*low))
    assert (found.n_answers, found.n_left_out, found.n_tokens) == (12, 0, len(rows[0]))
    assert found.kappa.n == 6
    same = low_token_agreement((models[0], Bytes("twin", lambda k, code: 2 * code + 0.02 * k)), PROMPTS, ANSWERS, {})
    assert same.kappa.value == pytest.approx(1.0)


def test_answers_cut_into_other_tokens_are_left_out_and_counted() -> None:
    models = Bytes("code", lambda k, code: code), Bytes("skips", lambda k, code: code, skip="p")
    with_p = sum("p" in answer for answer in ANSWERS.values())
    found = low_token_agreement(models, PROMPTS, ANSWERS, GROUPS, 0.4, 100, 0)
    assert 0 < with_p < 12
    assert (found.n_left_out, found.n_answers) == (with_p, 12 - with_p)
    assert found.n_tokens == sum(len(answer) for answer in ANSWERS.values() if "p" not in answer)
    assert low_token_agreement((models[0], LENGTH), PROMPTS, ANSWERS, GROUPS) is None
    empty = low_token_agreement(models, {}, {}, {})
    assert (empty.kappa.value, empty.n_tokens) == (None, 0)


# --- length control -----------------------------------------------------------------------------


def test_length_controlled_reward_is_the_residual_of_one_pooled_regression() -> None:
    rng = np.random.default_rng(1)
    answers = {arm: {key: "x" * int(rng.integers(1, 80)) for key in IDS} for arm in ("before", "after")}
    rewards = {arm: {key: float(rng.normal()) + 0.05 * len(a) for key, a in answers[arm].items()} for arm in answers}
    found = length_controlled(rewards, answers)
    items = [(arm, key) for arm in rewards for key in rewards[arm]]
    design = sm.add_constant([len(answers[arm][key]) for arm, key in items])
    fit = sm.OLS([rewards[arm][key] for arm, key in items], design).fit()
    assert found.slope == pytest.approx(fit.params[1])
    assert [found.values[arm][key] for arm, key in items] == pytest.approx(list(fit.resid), abs=1e-9)
    assert found.n == 24


@given(bias=st.floats(-2, 2))
def test_a_planted_length_bias_is_taken_out(bias: float) -> None:
    # quality is 1 better in one arm and has nothing to do with length, of which that arm has as much
    lengths = [3, 8, 13, 18, 23, 28, 3, 8, 13, 18, 23, 28]
    answers = {arm: {key: "x" * n for key, n in zip(IDS, lengths, strict=True)} for arm in ("good", "bad")}
    rewards = {arm: {key: (arm == "good") + bias * len(a) for key, a in answers[arm].items()} for arm in answers}
    found = length_controlled(rewards, answers)
    assert found.slope == pytest.approx(bias, abs=1e-9)
    assert list(found.values["good"].values()) == pytest.approx([0.5] * 12, abs=1e-9)
    assert list(found.values["bad"].values()) == pytest.approx([-0.5] * 12, abs=1e-9)


def test_answers_of_one_length_are_only_centred() -> None:
    answers = {"a": {"x": "abc", "y": "abd"}, "b": {"x": "abe"}}
    found = length_controlled({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 6.0}}, answers)
    assert found.slope is None
    assert found.values == {"a": {"x": -2.0, "y": -1.0}, "b": {"x": 3.0}}
    nothing = length_controlled({"a": {}}, {})
    assert (nothing.values, nothing.slope, nothing.n) == ({"a": {}}, None, 0)
