"""Outer objectives: values against hand formulas per pair, gradients against finite differences, and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import direction, small_policy, summed, theta_of
from torch import nn

from tiny import pairs, tiny_policy
from u2a.bilevel.candidates import shifted
from u2a.bilevel.objective import (
    DPO,
    NLL,
    CustomObjective,
    Margin,
    Objective,
    item_batches,
    objective_gradient,
    objective_values,
)
from u2a.bilevel.reward_objective import Drawn, ExpectedReward, leave_one_out
from u2a.errors import NonFiniteError
from u2a.modeling import Policy
from u2a.reference.dense import dense_gradient, flatten
from u2a.types import Pair

OBJECTIVES = {"margin": Margin(), "dpo": DPO(0.3), "nll": NLL()}


def by_hand(name: str, policy: Policy, pair: Pair) -> float:
    """J of one pair from its definition, one unpadded sequence at a time."""
    theta = theta_of(policy)
    start = {key: value.double() for key, value in policy.theta0.items()}
    good, bad = (policy.encoder.encode(pair.prompt, text) for text in (pair.chosen, pair.rejected))
    with torch.no_grad():
        s_good, s_bad = float(summed(policy, good, theta)), float(summed(policy, bad, theta))
        r_good, r_bad = float(summed(policy, good, start)), float(summed(policy, bad, start))
    if name == "nll":
        return s_good / good.n_answer
    if name == "margin":
        return s_good / good.n_answer - s_bad / bad.n_answer
    return -math.log(1.0 + math.exp(-0.3 * ((s_good - r_good) - (s_bad - r_bad))))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_equal_the_formula_written_out_for_each_pair(name: str):
    policy, rows = small_policy(), pairs(5)
    objective = OBJECTIVES[name]
    found = objective_values(objective, policy, objective.prepare(policy, rows))
    assert found.tolist() == pytest.approx([by_hand(name, policy, pair) for pair in rows], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_equals_central_differences_of_the_mean(name: str):
    policy, objective = small_policy(), OBJECTIVES[name]
    items = objective.prepare(policy, pairs(5))
    gradient = flatten(objective_gradient(objective, policy, items).gradient)
    for seed in range(3):
        u, step = direction(policy, seed), 1e-5
        with shifted(policy, u, step):
            above = float(objective_values(objective, policy, items).mean())
        with shifted(policy, u, -step):
            below = float(objective_values(objective, policy, items).mean())
        assert float(gradient @ flatten(u)) == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_the_mean_over_pairs_whatever_the_batches(name: str):
    policy, objective, rows = small_policy(), OBJECTIVES[name], pairs(6)
    together = objective_gradient(objective, policy, objective.prepare(policy, rows))
    policy.token_budget = 1  # one pair per batch
    alone = objective_gradient(objective, policy, objective.prepare(policy, rows))
    single = [objective_gradient(objective, policy, objective.prepare(policy, [pair])) for pair in rows]
    mean = torch.stack([flatten(part.gradient) for part in single]).mean(0)
    assert torch.allclose(flatten(together.gradient), mean, atol=1e-10)
    assert torch.allclose(flatten(alone.gradient), mean, atol=1e-10)
    assert torch.allclose(together.values, torch.cat([part.values for part in single]), atol=1e-10)
    assert torch.allclose(together.values, alone.values, atol=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_does_not_depend_on_the_order_of_pairs(name: str):
    policy, objective, rows = small_policy(token_budget=150), OBJECTIVES[name], pairs(6)
    first = objective_gradient(objective, policy, objective.prepare(policy, rows))
    last = objective_gradient(objective, policy, objective.prepare(policy, rows[::-1]))
    assert torch.allclose(flatten(first.gradient), flatten(last.gradient), atol=1e-10)
    assert torch.allclose(first.values.flip(0), last.values, atol=1e-10)


def test_dpo_starts_at_log_half_and_its_reference_does_not_move_with_theta():
    start = small_policy(reached=False)
    objective = DPO(0.5)
    values = objective_values(objective, start, objective.prepare(start, pairs(3)))
    assert values.tolist() == pytest.approx([math.log(0.5)] * 3, abs=1e-5)
    moved = small_policy()
    assert objective.prepare(moved, pairs(3))[0].numbers == pytest.approx(objective.prepare(start, pairs(3))[0].numbers)


def test_margin_changes_its_sign_when_the_answers_are_swapped():
    policy, rows = small_policy(), pairs(6)
    values = objective_values(Margin(), policy, Margin().prepare(policy, rows))
    swapped = [row.model_copy(update={"chosen": row.rejected, "rejected": row.chosen}) for row in rows]
    other = objective_values(Margin(), policy, Margin().prepare(policy, swapped))
    assert float(values.abs().min()) > 1e-3
    assert torch.allclose(other, -values, atol=1e-10)


def test_gradient_leaves_grad_fields_and_theta_alone():
    policy = small_policy()
    before = policy.snapshot()
    objective_gradient(Margin(), policy, Margin().prepare(policy, pairs(3)))
    assert all(value.grad is None for value in policy.trainable().values())
    assert all(torch.equal(before[name], value) for name, value in policy.snapshot().items())


def test_custom_objective_is_used_as_it_is():
    def first_logit(model: nn.Module, rows: list[Pair]) -> torch.Tensor:
        ids = torch.tensor([[65 + len(row.chosen) % 7, 66] for row in rows])
        return model(input_ids=ids).logits[:, -1, 0]

    policy, rows = small_policy(), pairs(4)
    objective = CustomObjective(first_logit, "first logit")
    found = objective_gradient(objective, policy, objective.prepare(policy, rows))
    expected = dense_gradient(
        lambda p: torch.func.functional_call(
            policy.model, p, (), {"input_ids": torch.tensor([[65 + len(row.chosen) % 7, 66] for row in rows])}
        ).logits[:, -1, 0].mean(),
        theta_of(policy),
    )  # fmt: skip
    assert torch.allclose(flatten(found.gradient), expected, atol=1e-10)
    assert objective.name == "first logit"


@pytest.mark.parametrize("evaluate", [objective_values, objective_gradient])
def test_non_finite_value_names_the_pair(evaluate: object):
    policy, rows = small_policy(), pairs(4)

    def spoiled(model: nn.Module, batch: list[Pair]) -> torch.Tensor:
        base = model(input_ids=torch.tensor([[65, 66]])).logits[0, -1, 0]
        return torch.stack([base * (math.nan if row.id == rows[2].id else 1.0) for row in batch])

    objective = CustomObjective(spoiled)
    with pytest.raises(NonFiniteError) as caught:
        evaluate(objective, policy, objective.prepare(policy, rows))  # type: ignore[operator]
    assert caught.value.ids == [rows[2].id]


@given(rewards=st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=4))
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(rewards: list[list[float]]):
    found = leave_one_out(torch.tensor(rewards, dtype=torch.float64))
    for row, advantages in zip(rewards, found.tolist(), strict=True):
        expected = [r - (sum(row) - r) / 2 for r in row]
        assert advantages == pytest.approx(expected, abs=1e-9)
        assert sum(advantages) == pytest.approx(0.0, abs=1e-9)


def test_item_batches_hold_every_item_once_within_the_budget():
    policy = tiny_policy()
    items = Margin().prepare(policy, pairs(9))
    batches = item_batches(items, 300)
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    for batch in batches:
        width = max(len(items[index].longest.input_ids) for index in batch)
        assert len(batch) == 1 or 2 * len(batch) * width <= 300
    assert item_batches([], 300) == []


# --- expected reward ------------------------------------------------------------------------------

TEXTS = ("yes tea", "no", "maybe so")
REWARDS = (1.0, -0.5, 2.5)


def drawn(policy: Policy, row: Pair, token_level: bool) -> Drawn:
    answers = tuple(policy.encoder.encode(row.prompt, text) for text in TEXTS)
    tokens = tuple(tuple(0.1 * (t + 1) * (g - 1) for t in range(a.n_answer)) for g, a in enumerate(answers))
    return Drawn(answers, REWARDS, tokens if token_level else None)


def expected_reward(token_level: bool) -> ExpectedReward:
    return ExpectedReward(lambda policy, rows: [drawn(policy, row, token_level) for row in rows])


def reinforce_by_hand(policy: Policy, row: Pair, token_level: bool) -> torch.Tensor:
    """(1/G) sum_g sum_t A_gt grad log pi(y_t), each gradient by its own backward pass."""
    sample = drawn(policy, row, token_level)
    totals = [sum(r) for r in sample.token_rewards] if sample.token_rewards else list(sample.rewards)
    out = torch.zeros(80, dtype=torch.float64)
    for g, answer in enumerate(sample.answers):
        others = (sum(totals) - totals[g]) / (len(totals) - 1)
        for t in range(answer.n_answer):
            to_go = sum(sample.token_rewards[g][t:]) if sample.token_rewards else totals[g]
            cut = len(answer.input_ids) - answer.n_answer + t + 1
            prefix = type(answer)(answer.input_ids[:cut], 1)
            slope = dense_gradient(lambda p, prefix=prefix: summed(policy, prefix, p), theta_of(policy))
            out += (to_go - others) * slope / len(totals)
    return out


@pytest.mark.parametrize("token_level", [False, True])
def test_expected_reward_gradient_is_the_reinforce_formula(token_level: bool):
    policy, rows = small_policy(), pairs(2)
    objective = expected_reward(token_level)
    found = objective_gradient(objective, policy, objective.prepare(policy, rows))
    expected = torch.stack([reinforce_by_hand(policy, row, token_level) for row in rows]).mean(0)
    assert float((flatten(found.gradient) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("token_level", [False, True])
def test_expected_reward_value_is_the_mean_reward_where_answers_were_drawn(token_level: bool):
    policy, rows = small_policy(token_budget=60), pairs(3)
    objective: Objective = expected_reward(token_level)
    values = objective_values(objective, policy, objective.prepare(policy, rows))
    sample = drawn(policy, rows[0], token_level)
    totals = [sum(r) for r in sample.token_rewards] if sample.token_rewards else list(sample.rewards)
    assert values[0].item() == pytest.approx(sum(totals) / 3, abs=1e-4)


def test_equal_rewards_have_no_gradient():
    policy, rows = small_policy(), pairs(2)
    answers = [tuple(policy.encoder.encode(row.prompt, text) for text in TEXTS) for row in rows]
    objective = ExpectedReward(lambda policy, rows: [Drawn(a, (0.7, 0.7, 0.7)) for a in answers])
    found = objective_gradient(objective, policy, objective.prepare(policy, rows))
    assert float(flatten(found.gradient).norm()) < 1e-12


def one_token_world(policy: Policy, pair: Pair) -> tuple[list, torch.Tensor]:
    """Every answer of one token with its reward: the whole vocabulary."""
    head = policy.encoder.encode_prompt(pair.prompt)
    encoded = type(policy.encoder.encode(pair.prompt, "x"))
    answers = [encoded((*head, token), 1) for token in range(259)]
    return answers, torch.linspace(-1.0, 2.0, 259, dtype=torch.float64).sin()


def exact_slope(policy: Policy, pair: Pair) -> torch.Tensor:
    """Gradient of sum_y pi(y) r(y) over all one-token answers."""
    answers, rewards = one_token_world(policy, pair)
    ids = torch.tensor([answers[0].input_ids[:-1]])

    def value(p: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = torch.func.functional_call(policy.model, p, (), {"input_ids": ids}).logits[0, -1]
        return logits.softmax(-1) @ rewards

    return dense_gradient(value, theta_of(policy))


def test_reinforce_over_all_pairs_of_answers_is_the_exact_gradient_of_the_expected_reward():
    """The mean of the two-sample estimator under pi x pi, summed exactly: it is linear in grad s_y."""
    policy, pair = small_policy(), pairs(1)[0]
    answers, rewards = one_token_world(policy, pair)
    with torch.no_grad():
        chance = torch.stack([policy.log_probs([a]).sum[0] for a in answers]).exp()
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-9)
    # E[A_g | y_g = y] under leave_one_out of two samples, taken from the package's own advantages
    both = torch.stack([rewards.repeat_interleave(259), rewards.repeat(259)], 1)
    advantage = (leave_one_out(both)[:, 0].reshape(259, 259) * chance).sum(1)
    slopes = torch.stack([dense_gradient(lambda p, a=a: summed(policy, a, p), theta_of(policy)) for a in answers])
    expected = (chance * advantage) @ slopes
    exact = exact_slope(policy, pair)
    assert float((expected - exact).norm() / exact.norm()) < 1e-8


def test_sampled_expected_reward_gradient_tends_to_the_exact_one():
    policy, pair = small_policy(), pairs(1)[0]
    answers, rewards = one_token_world(policy, pair)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        chance = torch.cat([policy.log_probs([a]).token[0] for a in answers]).exp()

    def draw(policy: Policy, rows: list[Pair]) -> list[Drawn]:
        picks = torch.multinomial(chance, 2500, replacement=True, generator=generator).tolist()
        return [Drawn(tuple(answers[k] for k in picks), tuple(rewards[picks].tolist()))]

    objective = ExpectedReward(draw)
    found = flatten(objective_gradient(objective, policy, objective.prepare(policy, [pair])).gradient)
    exact = exact_slope(policy, pair)
    cosine = float(found @ exact / found.norm() / exact.norm())
    assert cosine > 0.97
    assert float(found.norm() / exact.norm()) == pytest.approx(1.0, abs=0.2)
