"""Risk bounds against published values, closed forms, mapie and their own error rate."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from mapie.risk_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

from u2a.errors import ConfigError, DataError
from u2a.evaluation.risk import (
    CAVEAT,
    FrocReference,
    PromptOutcome,
    RiskBound,
    RiskControl,
    check_calibration,
    froc_losses,
    hoeffding_bentkus_p,
    learn_then_test,
    risk_bound,
)
from u2a.evaluation.significance import holm


def losses_of(total: int, n: int) -> dict[str, float]:
    """``n`` losses, ``total`` of them 1 and the others 0."""
    return {f"p{k}": float(k < total) for k in range(n)}


@pytest.mark.parametrize(("n", "upper"), [(50, 0.2076), (100, 0.1694), (200, 0.1457), (400, 0.1307), (1000, 0.1185)])
def test_bound_equals_the_known_values_at_risk_one_tenth(n: int, upper: float) -> None:
    for losses in (losses_of(n // 10, n), dict.fromkeys((f"p{k}" for k in range(n)), 0.1)):
        found = risk_bound(losses, used_ids=[], delta=0.1)
        assert found.upper == pytest.approx(upper, abs=5e-5)
        assert found.risk == pytest.approx(0.1)
        assert (found.n, found.delta, found.caveat) == (n, 0.1, CAVEAT)


@given(n=st.integers(1, 200), data=st.data())
def test_bound_is_the_smaller_root_of_both_inequalities(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    delta = data.draw(st.floats(0.01, 0.5))
    upper = risk_bound(losses_of(k, n), [], delta).upper
    bentkus = 1.0 if k == n else scipy.stats.beta.ppf(1 - delta / math.e, k + 1, n - k)  # Clopper-Pearson at delta / e
    assert k / n <= upper <= bentkus + 1e-9
    if k == n:
        assert upper == 1.0
    elif upper < bentkus - 1e-9:  # then it is Hoeffding's root
        risk = k / n
        left = 0.0 if risk == 0 else risk * math.log(risk / upper)
        assert math.exp(-n * (left + (1 - risk) * math.log((1 - risk) / (1 - upper)))) == pytest.approx(delta, rel=1e-6)
    assert risk_bound(losses_of(0, n), [], delta).upper == pytest.approx(1 - delta ** (1 / n), abs=1e-9)


@given(n=st.integers(1, 200), data=st.data())
def test_binary_bound_is_clopper_pearson_and_tighter(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n - 1))
    upper = risk_bound(losses_of(k, n), [], 0.1, binary=True).upper
    assert upper == pytest.approx(scipy.stats.beta.ppf(0.9, k + 1, n - k), abs=1e-9)
    assert upper <= risk_bound(losses_of(k, n), [], 0.1).upper + 1e-12
    assert risk_bound(losses_of(n, n), [], 0.1, binary=True).upper == 1.0


def test_no_attack_in_300_is_the_rule_of_three() -> None:
    assert risk_bound(losses_of(0, 300), [], 0.05, binary=True).upper == pytest.approx(3 / 300, rel=0.01)


@pytest.mark.parametrize("delta", [0.05, 0.9])
def test_more_prompts_more_confidence_and_less_loss_tell_on_the_bound(delta: float) -> None:
    here = risk_bound(losses_of(10, 100), [], delta).upper
    assert risk_bound(losses_of(100, 1000), [], delta).upper < here
    assert risk_bound(losses_of(10, 100), [], delta / 2).upper > here
    assert risk_bound(losses_of(9, 100), [], delta).upper < here


def test_bound_is_too_low_at_most_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    beta = [risk_bound({str(k): v for k, v in enumerate(row)}, [], 0.1).upper for row in rng.beta(1, 4, size=(400, 40))]
    binary = [
        risk_bound({str(k): float(v) for k, v in enumerate(row)}, [], 0.1, binary=True).upper
        for row in rng.random((400, 40)) < 0.2
    ]
    assert np.mean(np.array(beta) < 0.2) <= 0.1
    assert 0.03 < np.mean(np.array(binary) < 0.2) <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 400)


@given(n=st.integers(1, 300), share=st.floats(0, 1), alpha=st.floats(0.01, 0.99), binary=st.booleans())
def test_p_value_equals_mapies(n: int, share: float, alpha: float, binary: bool) -> None:
    k = round(n * share)
    theirs = compute_hoeffding_bentkus_p_value(np.array([k / n]), n, alpha, binary).item()
    if math.ceil(n * (k / n)) != k:  # rounding puts their count one too high
        return
    ours = hoeffding_bentkus_p(float(k), n, alpha, binary)
    # They take the smaller of Hoeffding's and the binomial one for binary losses, too; the latter never is the larger.
    assert ours == pytest.approx(min(theirs, 1.0), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("total", "n", "alpha"), [(2.5, 100, 0.1), (9.5, 200, 0.1), (0.2, 60, 0.05), (30.5, 1000, 0.05)]
)
def test_a_sum_of_losses_that_is_not_whole_is_rounded_up(total: float, n: int, alpha: float) -> None:
    found = hoeffding_bentkus_p(total, n, alpha)
    theirs = compute_hoeffding_bentkus_p_value(np.array([total / n]), n, alpha).item()
    assert found == pytest.approx(min(1.0, theirs), rel=1e-9)
    assert found >= hoeffding_bentkus_p(math.floor(total), n, alpha)


def test_bentkus_is_the_tighter_of_the_two_near_the_level() -> None:
    by_hand = math.e * sum(math.comb(200, k) * 0.1**k * 0.9 ** (200 - k) for k in range(11))  # counts 0 to 10
    assert by_hand < math.exp(-200 * (0.0475 * math.log(0.475) + 0.9525 * math.log(0.9525 / 0.9)))
    assert hoeffding_bentkus_p(9.5, 200, 0.1) == pytest.approx(by_hand, rel=1e-9)


def configurations() -> dict[str, dict[str, float]]:
    """Five configurations of 200 prompts with 8, 14, 9, 30 and 5 failures."""
    return {f"c{total}": losses_of(total, 200) for total in (8, 14, 9, 30, 5)}


@pytest.mark.parametrize("binary", [False, True])
def test_learn_then_test_equals_corrections_by_hand(binary: bool) -> None:
    p = {name: hoeffding_bentkus_p(sum(rows.values()), 200, 0.1, binary) for name, rows in configurations().items()}
    by_hand = {
        "bonferroni": [name for name in p if p[name] <= 0.1 / 5],
        "bonferroni_holm": [name for name, adjusted in holm(p).items() if adjusted <= 0.1],
        "fixed_sequence": [name for k, name in enumerate(p) if all(v <= 0.1 for v in list(p.values())[: k + 1])],
    }
    for correction, names in by_hand.items():
        found = learn_then_test(configurations(), [], 0.1, 0.1, correction, binary)
        assert list(found.controlled) == names
        assert [row.p for row in found.configurations] == list(p.values())
        assert [row.risk for row in found.configurations] == [0.04, 0.07, 0.045, 0.15, 0.025]
        assert found.caveat == CAVEAT
    assert "c30" not in by_hand["bonferroni_holm"]
    assert "c5" in by_hand["bonferroni"]
    assert "c5" not in by_hand["fixed_sequence"]  # behind a failure


def test_p_values_go_through_mapie_unchanged() -> None:
    p = np.array([0.011, 0.02, 0.06, 0.2])
    np.testing.assert_array_equal(control_fwer(p, 0.1, "bonferroni"), [0, 1])
    np.testing.assert_array_equal(control_fwer(p, 0.1, "bonferroni_holm"), [0, 1])
    np.testing.assert_array_equal(control_fwer(p, 0.1, "fixed_sequence"), [0, 1, 2])


def test_false_claims_stay_within_delta_over_many_configurations() -> None:
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(200):
        draws = rng.random((10, 60)) < 0.2  # every configuration is exactly at the forbidden limit
        named = {f"c{j}": {str(k): float(v) for k, v in enumerate(row)} for j, row in enumerate(draws)}
        wrong += bool(learn_then_test(named, [], 0.2, 0.1, binary=True).controlled)
    assert wrong / 200 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)


def test_calibration_prompts_that_were_used_are_refused() -> None:
    with pytest.raises(DataError, match=r"2 calibration prompts .*p0, p3"):
        risk_bound(losses_of(1, 10), used_ids=["p3", "x", "p0"])
    with pytest.raises(DataError, match="p7"):
        learn_then_test({"a": losses_of(0, 3), "b": losses_of(0, 8)}, ["p7"], 0.1)
    check_calibration(["a", "b"], ["c"])


def test_undefined_and_out_of_range() -> None:
    nothing = risk_bound({}, [])
    assert (nothing.risk, nothing.upper, nothing.n) == (None, None, 0)
    found = learn_then_test({"empty": {}, "good": losses_of(0, 100)}, [], 0.1)
    assert [(row.p is None, row.controlled) for row in found.configurations] == [(True, False), (False, True)]
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(DataError, match="prompt q"):
            risk_bound({"q": value}, [])
    with pytest.raises(DataError, match="0 or 1"):
        risk_bound({"q": 0.5}, [], binary=True)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="delta"):
            risk_bound({"q": 0.5}, [], delta)
    with pytest.raises(ConfigError, match="alpha"):
        learn_then_test({"a": {"q": 0.0}}, [], 1.0)
    with pytest.raises(ConfigError, match="no configuration"):
        learn_then_test({}, [], 0.1)
    with pytest.raises(ConfigError, match="expected one of bonferroni"):
        learn_then_test({"a": {"q": 0.0}}, [], 0.1, correction="none")


def test_without_mapie_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def missing(name: str, *arguments: object, **named: object) -> object:
        if name.startswith("mapie"):
            raise ImportError(name)
        return plain(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"\.\[evaluation\]"):
        learn_then_test({"a": {"q": 0.0}}, [], 0.1)
    assert risk_bound(losses_of(20, 200), []).upper == pytest.approx(0.1457, abs=5e-5)


def test_records_survive_saving(tmp_path) -> None:
    bound = risk_bound(losses_of(2, 30), [])
    assert RiskBound.load(bound.save(tmp_path / "bound.json")) == bound
    control = learn_then_test({"empty": {}, "good": losses_of(0, 100)}, [], 0.1)
    assert RiskControl.load(control.save(tmp_path / "control.json")) == control
    assert "exchangeable" in (tmp_path / "control.json").read_text()


def test_froc_loss_by_hand() -> None:
    reference = FrocReference(
        forget_level=-1.0, best_retain_loss=2.0, best_forget_accuracy=0.75, best_retain_accuracy=1.0, forget_weight=0.25
    )
    row = PromptOutcome(forget_loss=math.e, retain_loss=4.0, forget_accuracy=0.5, retain_accuracy=0.9)
    # s = 1 + .75 - .5 = 1.25; z_f = -2.25; r = log 2 + .1; loss = .25 log(1 + e^-2.25) + .75 log(1 + 2 e^.1)
    by_hand = 0.25 * math.log(1 + math.exp(-2.25)) + 0.75 * math.log(1 + 2 * math.exp(0.1))
    assert by_hand < 1
    assert froc_losses({"p": row}, reference) == {"p": pytest.approx(by_hand, abs=1e-12)}


def test_froc_loss_falls_with_forgetting_rises_with_lost_utility_and_stays_in_the_unit_interval() -> None:
    reference = FrocReference(forget_level=0.0, best_retain_loss=1.0)

    def loss(
        forget: float = 5.0, retain: float = 1.0, forget_accuracy: float = 0.5, retain_accuracy: float = 0.9
    ) -> float:
        outcome = PromptOutcome(forget, retain, forget_accuracy, retain_accuracy)
        return froc_losses({"p": outcome}, reference)["p"]

    assert loss(forget=8.0) < loss() < loss(retain=1.5)
    assert loss(forget_accuracy=0.2) < loss() < loss(retain_accuracy=0.5)
    assert loss(retain=math.inf) == 1.0
    assert loss(forget=0.0) == 1.0
    assert loss(forget=math.inf, retain=0.0) == 0.0
    only_utility = FrocReference(forget_level=0.0, best_retain_loss=1.0, forget_weight=0.0)
    kept = froc_losses({"p": PromptOutcome(0.0, 0.0, 1.0, 1.0)}, only_utility)  # nothing forgotten, which has no weight
    assert kept == {"p": 0.0}


def test_froc_refuses_impossible_inputs() -> None:
    for outcome in (PromptOutcome(-1, 1, 0, 0), PromptOutcome(1, math.nan, 0, 0), PromptOutcome(1, 1, 1.5, 0)):
        with pytest.raises(DataError, match="prompt p"):
            froc_losses({"p": outcome}, FrocReference(0.0, 1.0))
    with pytest.raises(ConfigError) as error:
        FrocReference(math.inf, 0.0, 2.0, -1.0, math.nan)
    assert len(error.value.problems) == 5
