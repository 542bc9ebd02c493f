"""PrivLeak, truth ratios and forget quality: signs by construction, golden values, coverage, and no value without a
retrained model.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hmean

from tiny import ask, tiny_policy
from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.evaluation.forget_quality import (
    UTILITY_PARTS,
    TruthRow,
    forget_quality,
    forget_truth_ratio,
    model_utility,
    privleak,
    retain_truth_ratio,
    truth_log_ratios,
)
from u2a.evaluation.membership import AttackScores, auc
from u2a.modeling import Policy

torch.set_num_threads(1)


def scores(forget: list[float], holdout: list[float]) -> AttackScores:
    return AttackScores({f"f{i}": v for i, v in enumerate(forget)}, {f"h{i}": v for i, v in enumerate(holdout)})


# --- PrivLeak -----------------------------------------------------------------------------------


def test_privleak_has_muses_sign() -> None:
    """Retrained 0.5. Still memorised: our AUC 0.75 is MUSE's 0.25, -50 %. Over-unlearned: our 0.25 is +50 %."""
    retrained = scores([1.0, 0.0], [1.0, 0.0])
    memorised, hidden = scores([1.0, 2.0], [1.5, 0.0]), scores([1.5, 0.0], [1.0, 2.0])
    assert (auc(retrained), auc(memorised), auc(hidden)) == (0.5, 0.75, 0.25)
    assert privleak(memorised, retrained, {}).value == pytest.approx(-50.0)
    assert privleak(hidden, retrained, {}).value == pytest.approx(50.0)
    same = privleak(retrained, retrained, {})
    assert (same.value, same.low, same.high, same.note) == (0.0, 0.0, 0.0, "")


def test_privleak_is_not_available_without_a_retrained_model_and_never_0() -> None:
    found = privleak(scores([1.0], [0.0]), None, {})
    assert found.value is None
    assert "retrained" in found.note
    perfect = scores([2.0, 3.0], [0.0, 1.0])
    undefined = privleak(scores([1.0, 2.0], [1.0, 2.0]), perfect, {})
    assert undefined.value is None and "retrained model itself" in undefined.note
    total = privleak(perfect, scores([1.0, 2.0], [1.0, 2.0]), {})
    assert (total.value, total.low, total.high) == (-100.0, None, None)
    assert privleak(scores([], []), scores([], []), {}).value is None


def test_privleak_compares_the_same_texts() -> None:
    with pytest.raises(DataError, match="2 rows were scored for one of the two models only"):
        privleak(scores([1.0], [0.0]), AttackScores({"f0": 1.0}, {"other": 0.0}), {})
    with pytest.raises(DataError, match="1 rows"):
        privleak(scores([1.0], [0.0]), scores([1.0, 2.0], [0.0]), {})


def test_privleak_covers_the_truth() -> None:
    """Two models whose scores correlate; two rows per prompt. True AUCs 0.76 and 0.5."""
    rng, runs, inside, size = np.random.default_rng(3), 600, 0, 50
    groups = {f"{side}{i}": f"{side}{i // 2}" for side in "fh" for i in range(2 * size)}
    truth = 100 * ((1 - 0.5 * (1 + math.erf(0.5))) / 0.5 - 1)
    for _ in range(runs):
        text = {side: np.repeat(rng.normal(0, 0.7**0.5, size), 2) for side in "fh"}
        first, second = ({side: text[side] + rng.normal(0, 0.3**0.5, 2 * size) for side in "fh"} for _ in range(2))
        found = privleak(
            scores((first["f"] + 1).tolist(), first["h"].tolist()),
            scores(second["f"].tolist(), second["h"].tolist()),
            groups,
        )
        inside += found.low <= truth <= found.high
    assert 0.925 <= inside / runs <= 0.98


# --- truth ratio --------------------------------------------------------------------------------

ROWS = [TruthRow(ask(f"Where {k}?"), f"in town {k}", (f"at sea {k}", "nowhere at all", "up")) for k in range(4)]


@torch.no_grad()
def mean_log_prob(policy: Policy, row: TruthRow, answer: str) -> float:
    head = policy.tokenizer(policy.encoder.prompt_text(row.prompt), add_special_tokens=False)["input_ids"]
    ids = head + policy.tokenizer(answer, add_special_tokens=False)["input_ids"] + [257]
    log_p = policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(np.mean([log_p[place - 1, ids[place]] for place in range(len(head), len(ids))]))


def test_truth_ratios_are_the_papers_equation() -> None:
    policy = tiny_policy(lora_b_sd=0.1, token_budget=200)
    found = truth_log_ratios(policy, ROWS)
    for row in ROWS:
        wrong = np.mean([math.exp(mean_log_prob(policy, row, text)) for text in row.perturbed])
        expected = wrong / math.exp(mean_log_prob(policy, row, row.paraphrase))
        assert math.exp(found[row.id]) == pytest.approx(expected, rel=1e-3)


def test_aggregates_by_hand() -> None:
    logs = {"a": math.log(2.0), "b": math.log(0.25), "c": 0.0}
    assert forget_truth_ratio(logs, {}, 50, 0).value == pytest.approx((0.5 + 0.25 + 1.0) / 3)
    assert retain_truth_ratio(logs, {}, 50, 0).value == pytest.approx((0.0 + 0.75 + 0.0) / 3)
    extreme = {"a": 800.0, "b": -800.0}  # exp overflows
    assert forget_truth_ratio(extreme, {}, 50, 0).value == pytest.approx(0.0, abs=1e-300)
    assert retain_truth_ratio(extreme, {}, 50, 0).values == {"a": 0.0, "b": 1.0}
    assert forget_truth_ratio({}, {}, 50, 0).value is None


def test_rows_without_wrong_answers_and_diverged_models_are_errors() -> None:
    with pytest.raises(DataError, match="1 rows have no wrong answer"):
        truth_log_ratios(tiny_policy(), [*ROWS, TruthRow(ask("why"), "so", ())])
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[policy.tokenizer("3")["input_ids"][0]] = math.nan
    with pytest.raises(NonFiniteError, match=ROWS[3].id):
        truth_log_ratios(policy, ROWS)


# --- forget quality -----------------------------------------------------------------------------


def kolmogorov_p(n: int, distance: float) -> float:
    """Exact two-sample p for equal sizes by counting lattice paths that reach the distance."""
    bound = round(distance * n)
    paths = {0: 1}
    for _ in range(2 * n):
        after: dict[int, int] = {}
        for height, count in paths.items():
            for move in (-1, 1):
                if abs(height + move) < bound:
                    after[height + move] = after.get(height + move, 0) + count
        paths = after
    return 1 - paths.get(0, 0) / math.comb(2 * n, n)


@pytest.mark.parametrize("shift", [1.5, 3.5, 5.5, 20.5])
def test_p_value_against_path_counting(shift: float) -> None:
    n = 8
    first = {str(k): float(k) for k in range(n)}
    second = {str(k): k + shift for k in range(n)}
    distance = max(
        abs(np.mean([v <= at for v in first.values()]) - np.mean([v <= at for v in second.values()]))
        for at in (*first.values(), *second.values())
    )
    found = forget_quality(first, second)
    assert found.value == pytest.approx(kolmogorov_p(n, distance), rel=1e-6)
    assert found.n == n


def test_forget_quality_is_not_available_without_a_retrained_model() -> None:
    found = forget_quality({"a": 1.0}, None)
    assert found.value is None and "retrained" in found.note and found.n == 1
    assert forget_quality({}, {}).value is None
    with pytest.raises(DataError, match="same rows"):
        forget_quality({"a": 1.0}, {"b": 1.0})
    assert forget_quality({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}).value == 1.0


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=10), st.lists(st.floats(-3, 3), min_size=10, max_size=10))
def test_ratios_and_their_logarithms_have_one_p_value(first: list[float], second: list[float]) -> None:
    ours = {str(k): round(v, 3) for k, v in enumerate(first)}
    theirs = {str(k): round(second[k], 3) for k in range(len(first))}
    plain = forget_quality({k: math.exp(v) for k, v in ours.items()}, {k: math.exp(v) for k, v in theirs.items()})
    assert forget_quality(ours, theirs).value == pytest.approx(plain.value)


# --- model utility ------------------------------------------------------------------------------


def test_model_utility_is_the_harmonic_mean_of_nine() -> None:
    parts = {name: 0.1 * (k + 1) for k, name in enumerate(UTILITY_PARTS)}
    assert len(parts) == 9
    found = model_utility(parts)
    assert found.value == pytest.approx(float(hmean(list(parts.values()))))
    assert model_utility(parts | {UTILITY_PARTS[4]: 0.0}).value == 0.0
    missing = model_utility(parts | {"world_facts_probability": None})
    assert missing.value is None and missing.n == 8
    assert missing.note == "not available: world_facts_probability not measured"
    assert model_utility({}).value is None


def test_bad_parts_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        model_utility({"retain_rouge": 0.5, "retain_probability": 1.5, "retain_truth_ratio": math.nan})
    assert len(caught.value.problems) == 3
