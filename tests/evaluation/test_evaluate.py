"""Arms, paired table and verdict: planted differences must be found, chance must not."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import examples, pairs, tiny_policy
from u2a.config_evaluation import EvaluationSection
from u2a.console import tone
from u2a.evaluation.arm import ArmResult, Instruments, evaluate_arm, prompts_answered
from u2a.evaluation.degenerate import collapse
from u2a.evaluation.evaluate import build_table, contrasts_of
from u2a.evaluation.verdict import verdict
from u2a.progress import Console
from u2a.reward import CallableReward
from u2a.solution import Reliability, ScoreTable, Solution, WeightRow
from u2a.types import Contrast, Metric, Partition

torch.set_num_threads(1)
QUIET = Console(quiet=True)
SECTION = EvaluationSection(generate_prompts=4, max_new_tokens=6, bootstrap=300)
PARTITION = Partition(evaluation=(*pairs(6), *pairs(2, start=20)), retain=examples(25, start=50))
LENGTH = Instruments(CallableReward("length", lambda prompts, answers: [float(len(answer)) for answer in answers]))
ALWAYS = {
    "preference_accuracy", "preference_margin", "reward", "retain_ppl", "refusal_rate", "degenerate_rate",
    "answer_words",
}  # fmt: skip


def solution(fallback: str = "none", split_half: float | None = 0.4) -> Solution:
    reliability = Reliability(
        split_half=split_half, full_set=0.57, mean_gain=0.1, signal_sd=1.0, noise_sd=1.0, n_pairs=9, n_folds=2,
        n_candidates=3,
    )  # fmt: skip
    names = {"objective": "margin", "loss": "npo", "adjoint": "identity", "scorer": "jvp", "estimator": "mean"}
    scores = ScoreTable(rows=(), **names, objective_value=0.0, reliability=reliability)
    return Solution(rows=(WeightRow(id="a", weight=1.0),), scores=scores, stopped="budget", fallback=fallback)


def contrast(metric: str, low: float | None, high: float | None, second: str = "random_k") -> Contrast:
    middle = 0.1 if low is None or high is None else (low + high) / 2
    return Contrast(metric=metric, first="after", second=second, difference=middle, low=low, high=high, n=30)


# --- arms ---------------------------------------------------------------------------------------


def test_an_arm_has_every_metric_and_leaves_the_policy_alone(tmp_path) -> None:
    policy = tiny_policy(lora_b_sd=0.1)
    theta = policy.snapshot()
    arm = evaluate_arm(policy, PARTITION, LENGTH, SECTION, 0, QUIET)
    assert set(arm.metrics) == ALWAYS
    assert all(torch.equal(value, theta[name]) for name, value in policy.snapshot().items())
    margins = arm.metrics["preference_margin"]
    assert margins.value == pytest.approx(sum(margins.values.values()) / 8)
    assert margins.low < margins.value < margins.high
    assert arm.metrics["preference_accuracy"].value == sum(v > 0 for v in margins.values.values()) / 8
    assert len(arm.answers) == 4
    assert arm.metrics["reward"].value == pytest.approx(sum(len(text) for text in arm.answers.values()) / 4)
    words = sum(len(text.split()) for text in arm.answers.values()) / 4
    assert arm.metrics["answer_words"].value == pytest.approx(words)
    rows = [policy.encoder.encode(row.prompt, row.completion) for row in PARTITION.retain_parts().evaluation]
    assert arm.metrics["retain_ppl"].value == pytest.approx(policy.perplexity(rows), rel=1e-5)
    assert ArmResult.load(arm.save(tmp_path / "arm.json")) == arm


def test_membership_inference_says_nothing_of_the_libraries_below() -> None:
    policy = tiny_policy(lora_b_sd=0.1)
    sides = Partition(forget=examples(6)), Instruments(holdout=examples(6, start=80))
    torch.set_warn_always(True)  # PyTorch says it once per process
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*requires_grad=True to a scalar")
            arm = evaluate_arm(policy, *sides, EvaluationSection(forget_rows=6, bootstrap=100), 0, QUIET)
    finally:
        torch.set_warn_always(False)
    assert arm.metrics["mia_loss"].value is not None


def test_an_arm_without_data_is_undefined_not_zero() -> None:
    arm = evaluate_arm(tiny_policy(), Partition(), Instruments(), SECTION, 0, QUIET)
    assert all(metric.value is None and metric.n == 0 for metric in arm.metrics.values())
    assert build_table({"after": arm, "before": arm}, Partition(), SECTION, 0).contrasts == ()


@given(order=st.permutations(range(8)), n=st.integers(0, 9))
def test_answered_prompts_are_distinct_and_free_of_file_order(order: list[int], n: int) -> None:
    twins = [pair.model_copy(update={"id": f"{pair.id}x", "rejected": "worse"}) for pair in PARTITION.evaluation]
    rows = [*PARTITION.evaluation, *twins]
    chosen = prompts_answered(rows, n)
    assert chosen == prompts_answered([twins[index] for index in order] + list(PARTITION.evaluation), n)
    assert len({pair.prompt for pair in chosen}) == len(chosen) == min(n, 8)
    assert prompts_answered(rows, 3) == prompts_answered(rows, 8)[:3]


# --- table --------------------------------------------------------------------------------------


def test_table_pairs_the_solution_with_every_other_arm() -> None:
    policy = tiny_policy(lora_b_sd=0.1)
    after = evaluate_arm(policy, PARTITION, LENGTH, SECTION, 0, QUIET)
    policy.reset()
    before = evaluate_arm(policy, PARTITION, LENGTH, SECTION, 0, QUIET, name="before")
    table = build_table({"before": before, "random_k": before, "after": after}, PARTITION, SECTION, 0)
    assert [item.second for item in table.contrasts] == ["before"] * 8 + ["random_k"] * 8
    found = {item.metric: item for item in table.contrasts if item.second == "before"}
    assert set(found) == ALWAYS | {"reward_length_controlled"}
    for name, item in found.items():
        expected = table.arms["after"][name].value - table.arms["before"][name].value
        assert item.difference == pytest.approx(expected, abs=1e-6), name
        assert item.low <= item.difference <= item.high
    assert {sample.id for sample in table.samples} == set(after.answers)
    assert all(set(sample.answers) == {"before", "random_k", "after"} for sample in table.samples)
    assert table.samples[0].rewards["after"] == len(table.samples[0].answers["after"])


def test_an_arm_does_not_differ_from_itself() -> None:
    arm = evaluate_arm(tiny_policy(), PARTITION, LENGTH, SECTION, 0, QUIET)
    table = build_table({"after": arm, "random_k": arm}, PARTITION, SECTION, 0)
    assert all((item.difference, item.low, item.high) == (0.0, 0.0, 0.0) for item in table.contrasts)
    assert table.verdict.startswith("selection beat random-k: not shown")


@pytest.mark.parametrize(("shift", "expected"), [(0.2, "yes"), (-0.2, "no"), (0.0, "not shown")])
def test_a_planted_difference_decides_the_verdict(shift: float, expected: str) -> None:
    rows = pairs(40)
    base = {row.id: math.sin(7.0 * index) for index, row in enumerate(rows)}
    moved = {key: value + shift + 0.3 * math.cos(5.0 * index) for index, (key, value) in enumerate(base.items())}
    arms = {
        name: ArmResult(
            name=name, metrics={"preference_margin": Metric(value=0.0, n=40, values=values)}, collapse=collapse([])
        )
        for name, values in (("random_k", base), ("after", moved))
    }
    table = build_table(arms, Partition(evaluation=rows), SECTION, 0, solution=solution())
    assert table.verdict.startswith(f"selection beat random-k: {expected} (")
    assert "split-half reliability of the gains 0.40, 0.57 predicted" in table.verdict


def test_a_favourable_result_without_any_answer_is_not_believed() -> None:
    rows = pairs(40)
    arms = {
        name: ArmResult(
            name=name, metrics={"preference_margin": Metric(value=0.0, n=40, values={row.id: at for row in rows})}
        )
        for name, at in (("random_k", 0.0), ("after", 1.0))
    }
    found = build_table(arms, Partition(evaluation=rows), SECTION, 0, solution=solution()).verdict
    assert found.startswith("selection beat random-k: not shown (") and "no answer was generated" in found


@pytest.mark.parametrize(("prompts", "expected"), [(2, "not shown"), (5, "not shown"), (6, "yes"), (30, "yes")])
def test_a_few_prompts_show_nothing_however_narrow_their_interval(prompts: int, expected: str) -> None:
    rows = pairs(prompts)
    values = {row.id: 0.02 + 0.001 * index for index, row in enumerate(rows)}  # all of one sign
    arms = {
        name: ArmResult(
            name=name,
            metrics={
                "preference_margin": Metric(value=0.0, n=prompts, values={key: sign * v for key, v in values.items()})
            },
            collapse=collapse([]),
        )
        for name, sign in (("random_k", 0.0), ("after", 1.0))
    }
    table = build_table(arms, Partition(evaluation=rows), SECTION, 0, solution=solution())
    margin = next(item for item in table.contrasts if item.metric == "preference_margin")
    assert margin.low is not None and margin.low > 0 and margin.p == pytest.approx(2.0 ** (1 - prompts), abs=2e-4)
    assert table.verdict.startswith(f"selection beat random-k: {expected} (")
    assert ("flipping the signs of prompts gives p" in table.verdict) is (expected == "not shown")
    assert tone(margin) == ("good" if expected == "yes" else "unclear")


def test_perplexities_over_other_tokens_are_not_compared() -> None:
    one, other = (
        ArmResult(name=name, metrics={}, retain_nll={"r": nll}, retain_tokens={"r": tokens})
        for name, nll, tokens in (("a", 100.0, 40.0), ("b", 110.0, 60.0))
    )
    assert contrasts_of(one, other, ("a", "b"), {}, (100, 0)) == []
    alike = other.model_copy(update={"retain_tokens": {"r": 40.0}})
    assert [item.metric for item in contrasts_of(one, alike, ("a", "b"), {}, (100, 0))] == ["retain_ppl"]


def test_perplexities_of_few_prompts_need_a_p_value_as_everything_else() -> None:
    tokens = {f"r{k}": 10.0 for k in range(9)}
    one, other = (
        ArmResult(
            name=name,
            metrics={},
            retain_nll={key: 20.0 + rise + k for k, key in enumerate(tokens)},
            retain_tokens=tokens,
        )
        for name, rise in (("a", 1.0), ("b", 0.0))
    )
    by_prompt = {key: str(int(key[1:]) // 3) for key in tokens}  # nine rows under three prompts
    (few,) = contrasts_of(one, other, ("a", "b"), by_prompt, (200, 0))
    assert few.low is not None and few.low > 0 and few.p == pytest.approx(0.25) and not few.excludes_zero
    (many,) = contrasts_of(one, other, ("a", "b"), {}, (200, 0))
    assert many.p == pytest.approx(2.0**-8, abs=2e-4) and many.excludes_zero


def test_a_solution_that_is_the_start_has_not_won() -> None:
    """The guard may take the whole change back; then a harmful random draw alone makes the difference."""
    rows = pairs(40)
    start = {row.id: math.sin(7.0 * index) for index, row in enumerate(rows)}
    harmed = {key: value - 0.2 for key, value in start.items()}
    arms = {
        name: ArmResult(
            name=name, metrics={"preference_margin": Metric(value=0.0, n=40, values=values)}, collapse=collapse([])
        )
        for name, values in (("before", start), ("after", start), ("random_k", harmed))
    }
    found = build_table(arms, Partition(evaluation=rows), SECTION, 0, solution=solution()).verdict
    assert found.startswith("selection beat random-k: not shown (") and "nothing was unlearned" in found
    moved = {"after": arms["after"].model_copy(update={"metrics": arms["random_k"].metrics})}
    moved["random_k"] = arms["before"]
    found = build_table({**arms, **moved}, Partition(evaluation=rows), SECTION, 0, solution=solution()).verdict
    assert found.startswith("selection beat random-k: no ("), "a loss is told as it is"


# --- verdict ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.2, "yes"),
        (-0.2, -0.01, "no"),
        (-0.1, 0.2, "not shown"),
        (0.0, 0.2, "not shown"),
        (-0.2, 0.0, "not shown"),
    ],
)
def test_verdict_follows_the_interval_of_the_margin(low: float, high: float, expected: str) -> None:
    text = verdict([contrast("reward", -9.0, -8.0), contrast("preference_margin", low, high)])
    assert text.startswith(f"selection beat random-k: {expected} (held-out preference margin")
    assert "30 prompts" in text


def test_accuracy_can_veto_but_not_make_a_yes() -> None:
    better, worse = contrast("preference_margin", 0.1, 0.2), contrast("preference_accuracy", -0.2, -0.1)
    assert verdict([better, worse]).startswith("selection beat random-k: not shown")
    assert "they disagree" in verdict([better, worse])
    unclear = contrast("preference_margin", -0.1, 0.2)
    assert verdict([unclear, contrast("preference_accuracy", 0.1, 0.2)]).startswith(
        "selection beat random-k: not shown"
    )


@pytest.mark.parametrize(
    ("fallback", "reason"), [("random_k", "itself a random draw"), ("empty", "nothing was selected")]
)
def test_a_fallback_never_claims_a_win(fallback: str, reason: str) -> None:
    text = verdict([contrast("preference_margin", 0.1, 0.2)], solution(fallback))
    assert text.startswith("selection beat random-k: not shown")
    assert reason in text


def test_missing_control_interval_or_reliability_is_said() -> None:
    assert "no random-k arm" in verdict([contrast("preference_margin", 0.1, 0.2, second="full")])
    assert "too few for an interval" in verdict([contrast("preference_margin", None, None)])
    assert "reliability of the gains undefined" in verdict([], solution(split_half=None))
