"""Win rate and its length-controlled variant: hand counts, another library's logistic fit, planted length bias."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.evaluation.arm import ArmResult
from u2a.evaluation.judge import Preference
from u2a.evaluation.pairwise import Compared, rewards_over, win_rate_metrics
from u2a.evaluation.win_rate import (
    RewardPairJudge,
    export_outputs,
    export_preferences,
    lc_win_rate_2term,
    win_rate,
)
from u2a.reward.base import CallableReward
from u2a.types import Metric


def preferred(values: Sequence[float | None]) -> dict[str, Preference]:
    return {f"r{n:04d}": Preference(value=value) for n, value in enumerate(values)}


def test_win_rates_of_few_scored_pairs_are_withheld() -> None:
    """The pairs that a judge could not score are no random part of all: here only equal answers were."""
    names = [f"p{k}" for k in range(10)]
    arm, start = (ArmResult(name=name, metrics={}, answers=dict.fromkeys(names, "a")) for name in ("after", "before"))

    def rates(n_scored: int) -> dict[str, Metric]:
        found = {name: Preference(value=0.5 if k < n_scored else None) for k, name in enumerate(names)}
        return win_rate_metrics(Compared("judge", dict.fromkeys(names, "q"), found), arm, start, {}, (100, 0))

    assert rates(10)["win_rate"].value == 50.0
    for metric in rates(9).values():
        assert metric.value is None and metric.values == {}
        assert "withheld: coverage 0.900 is below 0.95" in metric.note and "1 of 10 unscored" in metric.note


def test_win_rate_by_hand() -> None:
    found = win_rate(preferred([1.0, 0.75, 0.5, 0.0, None]), {})
    assert found.rate.value == pytest.approx(100 * 2.25 / 4)
    assert (found.wins, found.ties, found.losses, found.unscored, found.coverage) == (2, 1, 1, 1, 0.8)
    assert found.rate.n == 4
    assert found.rate.values["r0001"] == 75.0
    assert 0 < (found.rate.low or 0) < 56.25 < (found.rate.high or 0) < 100


def test_rows_of_one_prompt_count_once_for_the_interval() -> None:
    values = [float(n % 3 == 0) for n in range(60)]
    rows = preferred(values)
    once = win_rate(rows, {}, resamples=2000)
    copies = {f"{key}/{copy}": value for key, value in rows.items() for copy in range(10)}
    groups = {key: key.split("/")[0] for key in copies}
    clustered, naive = win_rate(copies, groups, resamples=2000), win_rate(copies, {})
    assert (once.rate.n, clustered.rate.n, naive.rate.n) == (60, 60, 600)
    width = [(item.rate.high or 0) - (item.rate.low or 0) for item in (once, clustered, naive)]
    assert width[1] == pytest.approx(width[0], rel=0.1)
    assert width[2] < 0.4 * width[1]


def test_without_a_scored_pair_there_is_no_rate() -> None:
    found = win_rate(preferred([None, None]), {})
    assert (found.rate.value, found.rate.n, found.coverage, found.unscored) == (None, 0, 0.0, 2)
    assert win_rate({}, {}).coverage is None
    assert lc_win_rate_2term(preferred([None]), {}).rate.value is None


# --- length control ------------------------------------------------------------


def planted(bias: float, liking: float, n: int = 4000, seed: int = 0, shift: float = 150.0):
    """A judge whose log-odds are ``bias`` plus a liking for the longer answer; ours are longer by ``shift``."""
    source = np.random.default_rng(seed)
    ours, theirs = source.normal(500 + shift, 120, n).round(), source.normal(500, 120, n).round()
    gaps = theirs - ours
    chance = expit(bias - liking * np.tanh(gaps / gaps.std()))
    rows = preferred((source.random(n) < chance).astype(float).tolist())
    return rows, {key: (int(a), int(b)) for key, a, b in zip(rows, ours, theirs, strict=True)}


@pytest.mark.parametrize("bias", [-0.8, 0.0, 0.6])
def test_the_unbiased_rate_is_recovered(bias: float) -> None:
    rows, lengths = planted(bias, liking=1.5)
    found = lc_win_rate_2term(rows, lengths)
    truth = 100 * expit(bias)
    assert found.rate.value == pytest.approx(truth, abs=4)
    assert (found.rate.low or 0) < truth < (found.rate.high or 0)
    assert found.length_effect == pytest.approx(-1.5, abs=0.25)
    assert (found.win_rate or 0) > truth + 10  # the plain rate believes the judge
    assert "length moves the win rate by +" in found.warning


def test_without_length_bias_both_rates_agree() -> None:
    found = lc_win_rate_2term(*planted(0.5, liking=0.0))
    assert found.rate.value == pytest.approx(found.win_rate, abs=3)
    assert found.warning == ""


def test_it_is_the_logistic_fit_of_another_library() -> None:
    statsmodels = importlib.import_module("statsmodels.api")  # a development dependency: it must be there
    rows, lengths = planted(0.4, liking=0.9, n=300, seed=5)
    values = {key: Preference(value=0.25 if n % 7 == 0 else rows[key].value) for n, key in enumerate(rows)}
    groups = {key: f"g{n // 3}" for n, key in enumerate(sorted(values))}
    keys = sorted(values)
    gaps = np.array([lengths[key][1] - lengths[key][0] for key in keys], dtype=float)
    design = np.column_stack([np.ones(len(keys)), np.tanh(gaps / gaps.std())])
    target = np.array([values[key].value for key in keys])
    clusters = np.array([int(groups[key][1:]) for key in keys])
    model = statsmodels.GLM(target, design, family=statsmodels.families.Binomial())
    oracle = model.fit(cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False})
    found = lc_win_rate_2term(values, lengths, groups)
    assert found.rate.value == pytest.approx(100 * expit(oracle.params[0]), abs=0.01)
    assert found.length_effect == pytest.approx(oracle.params[1], abs=1e-3)
    half = 1.959964 * oracle.bse[0] * np.sqrt(100 / 99)  # ours corrects for the number of clusters
    assert found.rate.low == pytest.approx(100 * expit(oracle.params[0] - half), abs=0.02)
    assert found.rate.high == pytest.approx(100 * expit(oracle.params[0] + half), abs=0.02)
    assert found.rate.n == 100


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(1, 900), st.integers(1, 900)),
        min_size=2,
        max_size=30,
    )
)
def test_swapping_model_and_baseline_mirrors_the_rate(rows: list[tuple[float, int, int]]) -> None:
    ours = lc_win_rate_2term(preferred([row[0] for row in rows]), {f"r{n:04d}": row[1:] for n, row in enumerate(rows)})
    theirs = lc_win_rate_2term(
        preferred([1 - row[0] for row in rows]), {f"r{n:04d}": (row[2], row[1]) for n, row in enumerate(rows)}
    )
    assert (ours.rate.value or 0) + (theirs.rate.value or 0) == pytest.approx(100, abs=1e-3)


def test_equal_lengths_leave_the_plain_rate() -> None:
    rows = preferred([1.0, 1.0, 1.0, 0.0])
    found = lc_win_rate_2term(rows, dict.fromkeys(rows, (7, 7)))
    assert found.rate.value == pytest.approx(75, abs=0.1)
    assert found.length_effect is None


def test_winning_always_stays_finite() -> None:
    rows = preferred([1.0] * 40)
    found = lc_win_rate_2term(rows, {key: (n, 40 - n) for n, key in enumerate(rows)})
    assert 95 < (found.rate.value or 0) <= 100


def test_lengths_that_never_meet_are_pointed_out() -> None:
    rows = preferred([1.0, 0.0, 1.0, 1.0])
    found = lc_win_rate_2term(rows, {key: (100 + n, 10) for n, key in enumerate(rows)})
    assert "outside the data" in found.warning


# --- a reward model as judge, and exports ---------------------------------------


def test_a_reward_model_prefers_what_it_rates_higher() -> None:
    judge = RewardPairJudge(CallableReward("longer", lambda prompts, answers: [float(len(text)) for text in answers]))
    found = judge.preferences(["p", "q", "r"], ["long one", "b", "xy"], ["short", "bb", "zz"])
    assert [item.value for item in found] == [1.0, 0.0, 0.5]
    assert judge.name == "reward of longer"
    assert judge.preferences([], [], []) == []
    with pytest.raises(ConfigError):
        judge.preferences(["p"], ["a"], [])


def test_equal_answers_are_a_tie_however_their_rewards_round() -> None:
    drift = iter(range(100))
    model = CallableReward("rounds", lambda prompts, answers: [1.0 + 1e-7 * next(drift) for _ in answers])
    found = RewardPairJudge(model).preferences(["p", "q"], ["same", "one"], ["same", "other"])
    assert [item.value for item in found] == [0.5, 0.0]
    arms = [
        ArmResult(name=name, metrics={}, answers={"p": "same", "q": text}, rewards={"p": 1.0 + gap, "q": 2.0 + gap})
        for name, text, gap in (("a", "one", 1e-7), ("b", "other", 0.0))
    ]
    found = rewards_over(arms[0], arms[1], {"p": "?", "q": "?"}, "judge").preferences
    assert {key: item.value for key, item in found.items()} == {"p": 0.5, "q": 1.0}


def test_a_reward_that_is_not_finite_is_an_error() -> None:
    judge = RewardPairJudge(CallableReward("bad", lambda prompts, answers: [float("nan")] * len(answers)))
    with pytest.raises(NonFiniteError):
        judge.preferences(["p"], ["a"], ["b"])


def test_a_reward_judge_sees_each_prompt_with_its_answer() -> None:
    seen: list[tuple[str, str]] = []

    def record(prompts: list[str], answers: list[str]) -> list[float]:
        seen.extend(zip(prompts, answers, strict=True))
        return torch.arange(len(answers)).tolist()

    RewardPairJudge(CallableReward("r", record)).preferences(["p", "q"], ["a", "b"], ["c", "d"])
    assert seen == [("p", "a"), ("q", "b"), ("p", "c"), ("q", "d")]


def test_exports_have_the_official_fields(tmp_path) -> None:
    path = tmp_path / "outputs.json"
    export_outputs(path, {"Say hi.": "Hi \u2019", "Say no.": "No"}, "ours", "toy")
    assert json.loads(path.read_text(encoding="utf-8"))[0] == {
        "dataset": "toy", "instruction": "Say hi.", "output": "Hi \u2019", "generator": "ours",
    }  # fmt: skip
    judged = ("judge", [Preference(value=1.0), Preference(value=0.25), Preference(value=None)])
    export_preferences(path, ["a", "b", "c"], ("ours", ["x", "y", "z"]), ("base", ["u", "v", "w"]), judged)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [row["preference"] for row in rows] == [2.0, 1.25, None]
    assert (rows[0]["output_1"], rows[0]["generator_1"]) == ("u", "base")
    assert (rows[0]["output_2"], rows[0]["generator_2"], rows[0]["annotator"]) == ("x", "ours", "judge")
    with pytest.raises(DataError):
        export_preferences(path, ["a"], ("ours", []), ("base", ["u"]), ("judge", []))


@pytest.mark.parametrize("n", [2, 24])
def test_where_all_preferences_agree_there_is_no_interval(n: int) -> None:
    won = {str(k): Preference(value=1.0) for k in range(n)}
    found = lc_win_rate_2term(won, {str(k): (10 + k, 20 + k % 5) for k in range(n)})
    assert found.rate.value is not None and found.rate.value > 99.0
    assert (found.rate.low, found.rate.high) == (None, None)  # nothing but the ridge bends the likelihood there
