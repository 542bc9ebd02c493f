"""Token statistics against an unpadded float64 pass; attacks by hand; AUC against sklearn; coverage by simulation."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from tiny import ask, examples, tiny_policy
from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.evaluation.membership import (
    CONVENTION,
    AttackScores,
    attack_scores,
    auc,
    auc_distance,
    auc_metric,
    check_holdout,
    loss_score,
    mean_variance,
    min_k_plus_score,
    min_k_score,
    placements,
    tpr_at_fpr,
    zlib_score,
)
from u2a.evaluation.token_stats import TokenStats, answer_text, token_stats
from u2a.modeling import Policy
from u2a.types import Example, Metric

torch.set_num_threads(1)
ROWS = examples(6)


def stats(log_prob: Sequence[float], mean: float = 0.0, variance: float = 1.0, text: str = "text") -> TokenStats:
    size = len(log_prob)
    return TokenStats(
        text, np.array(log_prob), np.full(size, mean), np.full(size, variance), np.zeros(size, dtype=bool)
    )


def scores(forget: Sequence[float], holdout: Sequence[float]) -> AttackScores:
    return AttackScores({f"f{i}": v for i, v in enumerate(forget)}, {f"h{i}": v for i, v in enumerate(holdout)})


# --- token statistics ---------------------------------------------------------------------------


@torch.no_grad()
def alone(policy: Policy, row: Example) -> list[tuple[float, float, float, bool]]:
    """The four statistics token by token, from one unpadded row in float64."""
    head = policy.tokenizer(policy.encoder.prompt_text(row.prompt), add_special_tokens=False)["input_ids"]
    ids = head + policy.tokenizer(row.completion, add_special_tokens=False)["input_ids"] + [257]
    out = []
    for place, logits in enumerate(policy.model(torch.tensor([ids])).logits[0].double()):
        if len(head) <= place + 1 < len(ids):
            p = logits.softmax(0).numpy()
            mean = float((p * np.log(p)).sum())
            variance = float((p * np.log(p) ** 2).sum()) - mean**2
            out.append((math.log(p[ids[place + 1]]), mean, variance, int(p.argmax()) == ids[place + 1]))
    return out


@pytest.mark.parametrize("token_budget", [50, 4000])
def test_token_statistics_are_those_of_a_row_alone(token_budget: int) -> None:
    policy = tiny_policy(lora_b_sd=0.1, token_budget=token_budget)
    found = token_stats(policy, ROWS)
    assert list(found) == [row.id for row in ROWS]
    for row in ROWS:
        one = found[row.id]
        expected = np.array(alone(policy, row))
        assert one.text == row.completion
        assert len(one.log_prob) == len(row.completion) + 1  # one token per byte, and the end of the turn
        np.testing.assert_allclose(one.log_prob, expected[:, 0], atol=1e-4)
        np.testing.assert_allclose(one.mean, expected[:, 1], atol=1e-4)
        np.testing.assert_allclose(one.variance, expected[:, 2], atol=1e-3)
        assert one.hit.tolist() == expected[:, 3].astype(bool).tolist()


def test_the_reference_is_the_policy_before_training() -> None:
    policy, start = tiny_policy(lora_b_sd=0.3), tiny_policy()
    with policy.reference():
        before = token_stats(policy, ROWS[:2])
    expected, now = token_stats(start, ROWS[:2]), token_stats(policy, ROWS[:2])
    for row in ROWS[:2]:
        np.testing.assert_allclose(before[row.id].log_prob, expected[row.id].log_prob, atol=1e-5)
        assert abs(now[row.id].mean_log_prob - before[row.id].mean_log_prob) > 0.01


def test_a_token_of_probability_0_leaves_mean_and_variance_finite() -> None:
    policy = tiny_policy()
    head = policy.model.get_output_embeddings()

    class Masked(torch.nn.Module):  # a vocabulary padded with tokens that are ruled out
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            out = self.head(hidden)
            out[..., 3] = -math.inf
            return out

    policy.model.get_base_model().lm_head = Masked()
    one = token_stats(policy, ROWS[:1])[ROWS[0].id]
    assert np.isfinite(one.mean).all() and (one.variance > 0).all()


def test_a_long_answer_is_named_by_what_was_read() -> None:
    policy = tiny_policy(max_length=60)
    head = len(policy.encoder.encode_prompt(ask("q")))
    row = Example(id="long", prompt=ask("q"), completion="abcdefghij" * 10)
    read = token_stats(policy, [row])["long"]
    assert read.text == row.completion[: 60 - head]
    assert len(read.log_prob) == 60 - head
    short = ROWS[0]
    assert answer_text(policy, short, 3) == short.completion[:3]
    assert answer_text(policy, short, len(short.completion)) == short.completion


# --- attacks ------------------------------------------------------------------------------------


def test_hand_computed_attacks() -> None:
    one = stats([-1.0, -4.0, -2.0, -3.0, -0.5], mean=-2.0, variance=4.0, text="abc")
    assert loss_score(one) == pytest.approx(-2.1)
    assert zlib_score(one) == pytest.approx(-10.5 / len(zlib.compress(b"abc")))
    assert min_k_score(one, 0.4) == pytest.approx(-3.5)  # floor(0.4 * 5) = 2 tokens: -4, -3
    assert min_k_score(one, 0.59) == pytest.approx(-3.5)
    assert min_k_score(one, 0.6) == pytest.approx(-3.0)
    assert min_k_plus_score(one, 0.4) == pytest.approx(((-4 + 2) / 2 + (-3 + 2) / 2) / 2)
    assert min_k_score(one, 1.0) == pytest.approx(loss_score(one))


def test_min_k_plus_plus_standardises_before_it_sorts() -> None:
    one = TokenStats("x", np.array([-5.0, -1.0]), np.array([-6.0, 0.0]), np.array([1.0, 0.01]), np.zeros(2, dtype=bool))
    assert min_k_plus_score(one, 0.5) == pytest.approx(-10.0)  # z = 1 and -10: the likelier token is the low one
    sure = stats([-1.0], mean=0.0, variance=0.0)
    assert min_k_plus_score(sure, 0.5) == pytest.approx(-1.0 / 1e-3)  # sigma^2 is held at 1e-6


def test_the_number_of_lowest_tokens_is_exact() -> None:
    hundred = stats([-float(i) for i in range(100)])
    assert min_k_score(hundred, 0.29) == pytest.approx(-np.mean(range(71, 100)))  # 0.29 * 100 < 29 in binary
    assert min_k_score(stats([-7.0, -1.0]), 0.1) == -7.0  # never less than one token
    for k in (0.0, -0.1, 1.01, 40, math.nan):
        with pytest.raises(ConfigError, match="share of the tokens"):
            min_k_score(hundred, k)


def test_reference_attack_and_names() -> None:
    forget, holdout = {"a": stats([-1.0, -3.0])}, {"b": stats([-5.0])}
    reference = {"a": stats([-4.0, -4.0]), "b": stats([-4.5])}
    found = attack_scores(forget, holdout, reference)
    assert list(found) == ["mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus", "mia_reference"]
    assert found["mia_reference"] == AttackScores({"a": 2.0}, {"b": -0.5})
    assert found["mia_loss"] == AttackScores({"a": -2.0}, {"b": -5.0})
    assert found["mia_min_k"].forget["a"] == -3.0
    assert "mia_reference" not in attack_scores(forget, holdout)


def test_memorised_rows_have_auc_above_half_under_every_attack() -> None:
    """Planted memory: a policy trained on the forget rows tells them from equal rows it has not seen."""
    policy, holdout = tiny_policy(adapter=False), examples(6, start=20)
    optimiser = torch.optim.Adam(policy.trainable().values(), lr=3e-3)
    encoded = [policy.encoder.encode(row.prompt, row.completion) for row in ROWS]
    for _ in range(30):
        optimiser.zero_grad()
        (-policy.log_probs(encoded).mean.mean()).backward()
        optimiser.step()
    both = (*ROWS, *holdout)
    now = token_stats(policy, both)
    with policy.reference():
        before = token_stats(policy, both)
    sides = ({row.id: now[row.id] for row in rows} for rows in (ROWS, holdout))
    for name, found in attack_scores(*sides, before).items():
        assert auc(found) > 0.7, name
    assert "1 = memorised" in CONVENTION


# --- AUC ----------------------------------------------------------------------------------------

values = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(values, values)
def test_auc_is_sklearns(forget: list[float], holdout: list[float]) -> None:
    found = scores(forget, holdout)
    expected = roc_auc_score([1] * len(forget) + [0] * len(holdout), [*forget, *holdout])
    assert auc(found) == pytest.approx(expected)
    above, below = placements(found)
    for key, value in found.forget.items():
        assert above[key] == pytest.approx(np.mean([(value > h) + (value == h) / 2 for h in holdout]))
    for key, value in found.holdout.items():
        assert below[key] == pytest.approx(np.mean([(f > value) + (f == value) / 2 for f in forget]))
    assert auc(scores(holdout, forget)) == pytest.approx(1 - expected)


@given(values, values, st.sampled_from([0.01, 0.1, 0.25, 0.5]))
def test_tpr_is_the_best_of_sklearns_curve(forget: list[float], holdout: list[float], fpr: float) -> None:
    found = tpr_at_fpr(scores(forget, holdout), fpr)
    if len(holdout) * fpr < 1:
        assert found.value is None and found.n == 0
        return
    false, true, _ = roc_curve([1] * len(forget) + [0] * len(holdout), [*forget, *holdout], drop_intermediate=False)
    assert found.value == pytest.approx(true[false <= fpr + 1e-9].max())
    assert found.low <= found.value <= found.high


def test_tpr_needs_enough_unseen_texts_and_a_rate() -> None:
    many = scores([1.0, -1.0], np.linspace(-0.5, 0.5, 100).tolist())
    assert tpr_at_fpr(many).value == 0.5
    assert tpr_at_fpr(scores([1.0], [0.0] * 99)).value is None
    assert tpr_at_fpr(scores([], [0.0] * 200)).value is None
    for fpr in (0.0, 1.0):
        with pytest.raises(ConfigError, match="fpr"):
            tpr_at_fpr(many, fpr)


def test_variance_is_delongs() -> None:
    """Hand-written DeLong: S10 / m + S01 / n with sample variances of the placements."""
    rng = np.random.default_rng(3)
    found = scores(rng.normal(0.5, 1, 9).tolist(), rng.normal(0, 1, 7).tolist())
    above, below = placements(found)
    expected = np.var(list(above.values()), ddof=1) / 9 + np.var(list(below.values()), ddof=1) / 7
    assert mean_variance(above, {}) + mean_variance(below, {}) == pytest.approx(expected)
    metric = auc_metric(found, {})
    half = 1.959964 * expected**0.5 / (metric.value * (1 - metric.value))
    assert math.log(metric.high / (1 - metric.high)) - math.log(metric.low / (1 - metric.low)) == pytest.approx(
        2 * half
    )


def test_repeated_rows_of_a_prompt_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(1)
    forget, holdout = rng.normal(0.7, 1, 20).tolist(), rng.normal(0, 1, 20).tolist()
    once, thrice = scores(forget, holdout), scores(forget * 3, holdout * 3)
    groups = {f"{side}{i}": f"{side}{i % 20}" for side in "fh" for i in range(60)}
    single, clustered = auc_metric(once, {}), auc_metric(thrice, groups)
    assert (clustered.value, clustered.low, clustered.high) == pytest.approx((single.value, single.low, single.high))
    assert clustered.n == single.n == 20
    naive = auc_metric(thrice, {})
    assert naive.high - naive.low < 0.7 * (single.high - single.low)


@pytest.mark.parametrize(("shift", "m", "n"), [(0.0, 40, 60), (1.0, 40, 60), (2.0, 60, 60)])
def test_intervals_cover_the_truth(shift: float, m: int, n: int) -> None:
    """Normal scores, two correlated rows per prompt: true AUC = Phi(shift / sqrt 2)."""
    rng = np.random.default_rng(7)
    truth, inside, runs = 0.5 * (1 + math.erf(shift / 2)), 0, 600
    groups = {f"{side}{i}": f"{side}{i // 2}" for side in "fh" for i in range(2 * max(m, n))}
    for _ in range(runs):
        forget, holdout = (
            (0.8**0.5 * np.repeat(rng.normal(0, 1, size), 2) + 0.2**0.5 * rng.normal(0, 1, 2 * size)) for size in (m, n)
        )
        metric = auc_metric(scores((forget + shift).tolist(), holdout.tolist()), groups)
        inside += metric.low <= truth <= metric.high
    assert 0.925 <= inside / runs <= 0.98  # three standard errors of 600 runs around 0.95


@pytest.mark.parametrize(
    ("forget", "holdout", "value"),
    [([2.0] * 9, [1.0] * 9, 1.0), ([0.0] * 9, [1.0] * 9, 0.0), ([1.0] * 9, [1.0] * 9, 0.5)],
)
def test_nine_rows_all_alike_are_not_certainty(forget: list[float], holdout: list[float], value: float) -> None:
    metric = auc_metric(scores(forget, holdout), {})
    assert metric.value == value
    assert metric.low <= value <= metric.high
    assert metric.high - metric.low > 0.15
    assert metric.low >= 0.0 and metric.high <= 1.0
    larger = auc_metric(scores(forget * 10, holdout * 10), {})
    assert larger.high - larger.low < metric.high - metric.low


def test_newcombe_solves_its_equation() -> None:
    """At AUC 1 with m = n = 10 the lower end t has (1 - t)^2 = z^2 V(t)."""
    t = auc_metric(scores([1.0] * 10, [0.0] * 10), {}).low
    variance = t * (1 - t) * (1 + 9 * ((1 - t) / (2 - t) + t / (1 + t))) / 100
    assert (1 - t) ** 2 == pytest.approx(1.959964**2 * variance, rel=1e-4)


def test_too_little_is_undefined() -> None:
    assert auc(scores([], [1.0])) is None
    assert auc_metric(scores([1.0], []), {}) == Metric(value=None, n=0)
    one = auc_metric(scores([1.0], [0.0, 2.0]), {})
    assert (one.value, one.low, one.high, one.n) == (0.5, None, None, 1)
    assert auc_distance(one).value == 0.0


def test_the_placements_in_values_have_the_auc_as_mean() -> None:
    metric = auc_metric(scores([1.0, 3.0, 0.0], [0.5, 2.0]), {})
    assert metric.values == {"f0": 0.5, "f1": 1.0, "f2": 0.0}
    assert np.mean(list(metric.values.values())) == pytest.approx(metric.value)


@pytest.mark.parametrize(
    ("low", "value", "high", "expected"),
    [(0.6, 0.7, 0.9, (0.1, 0.2, 0.4)), (0.1, 0.2, 0.4, (0.1, 0.3, 0.4)), (0.3, 0.6, 0.9, (0.0, 0.1, 0.4))],
)
def test_distance_from_one_half(low: float, value: float, high: float, expected: tuple[float, ...]) -> None:
    found = auc_distance(Metric(value=value, low=low, high=high, n=5))
    assert (found.low, found.value, found.high) == pytest.approx(expected)


@settings(max_examples=30)
@given(values, values, st.floats(0.1, 3), st.floats(-5, 5))
def test_only_the_order_of_scores_counts(forget: list[float], holdout: list[float], scale: float, shift: float) -> None:
    moved = scores([scale * v + shift for v in forget], [scale * v + shift for v in holdout])
    assert auc(moved) == pytest.approx(auc(scores(forget, holdout)))


# --- holdout ------------------------------------------------------------------------------------


def test_no_test_without_a_holdout() -> None:
    with pytest.raises(ConfigError, match=r"data\.holdout"):
        check_holdout(ROWS, [])
    with pytest.raises(ConfigError, match=r"data\.holdout"):
        attack_scores({"a": stats([-1.0])}, {})


def test_the_holdout_shares_no_prompt_with_what_was_trained() -> None:
    holdout = examples(4, start=30)
    check_holdout(ROWS, holdout, trained=examples(3, start=50))
    louder = Example(id="x", prompt=ask(ROWS[2].prompt[-1].content.upper() + " "), completion="other", source="h:9")
    with pytest.raises(DataError, match=r"1 of 5 rows have a prompt of the forget rows \(h:9\)"):
        check_holdout(ROWS, [*holdout, louder])
    with pytest.raises(DataError, match="4 of 4 rows have a prompt of the trained rows"):
        check_holdout(ROWS, holdout, trained=holdout)


def test_a_diverged_model_is_an_error_that_names_its_rows() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[policy.tokenizer("z")["input_ids"][0]] = math.nan
    bad = Example(id="bad", prompt=ask("why"), completion="buzz")
    with pytest.raises(NonFiniteError, match="sample bad") as caught:
        token_stats(policy, [*ROWS, bad])
    assert caught.value.ids == ["bad"]
