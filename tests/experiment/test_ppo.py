"""PPO of our own: formulas against brute force and autograd, the first pass, shaping, and a toy reward that rises."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arm_kit import StepBudget, distance, first_token_visible, leaves_no_trace, perturb, tiny_setting, visible
from tiny import ask, pairs, tiny_policy
from u2a.encoding import Batch, Encoded
from u2a.errors import ConfigError, NonFiniteError
from u2a.experiment.meter import Meter
from u2a.experiment.ppo import PpoArm, PpoSettings, PpoTrainer, draw, prompt_order
from u2a.experiment.ppo_losses import (
    Answers,
    Pass,
    advantages_of,
    surrogate_loss,
    token_rewards,
    value_loss,
    whitened,
)
from u2a.reward.base import CallableReward
from u2a.types import StepLog

MASK = torch.tensor([[False, False, True, True], [True, True, True, True], [False, True, True, True]])
SIZE = tuple(MASK.shape)


def random(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fake_answers(scores: Tensor, reference: Tensor) -> Answers:
    nothing = torch.zeros(0)
    return Answers(Batch(nothing, nothing, nothing, nothing, MASK), scores, torch.where(MASK, reference, 0.0))


@given(st.integers(0, 1000), st.floats(0.1, 1.0), st.floats(0.0, 1.0))
def test_advantages_are_the_sums_of_the_definition(seed: int, gamma: float, lam: float) -> None:
    rewards, values = random(seed), random(seed + 5000)
    found = advantages_of(rewards, values, gamma, lam)
    for row in range(SIZE[0]):
        for start in range(SIZE[1]):
            following = [*values[row, 1:].tolist(), 0.0]
            surprise = [float(rewards[row, t] + gamma * following[t] - values[row, t]) for t in range(SIZE[1])]
            wanted = sum((gamma * lam) ** (t - start) * surprise[t] for t in range(start, SIZE[1]))
            assert float(found[row, start]) == pytest.approx(wanted, abs=1e-9)


def test_with_lambda_one_an_advantage_is_the_return_minus_the_value() -> None:
    rewards, values = random(1), random(2)
    returns = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(advantages_of(rewards, values, 1.0, 1.0), returns - values)


def test_what_stands_before_the_answer_changes_nothing_in_it() -> None:
    rewards, values = random(3), random(4)
    other = advantages_of(torch.where(MASK, rewards, 9.0), torch.where(MASK, values, -9.0), 0.9, 0.8)
    assert torch.equal(advantages_of(rewards, values, 0.9, 0.8)[MASK], other[MASK])


def test_rewards_of_the_tokens_sum_to_the_score_minus_the_divergence() -> None:
    now, reference, scores = random(5), random(6), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rewards = token_rewards(torch.where(MASK, now, 0.0), fake_answers(scores, reference), 0.3)
    ratio = torch.where(MASK, now - reference, 0.0)
    assert torch.allclose(rewards.sum(1), scores - 0.3 * ratio.sum(1))
    assert torch.allclose(rewards[:, :-1], -0.3 * ratio[:, :-1])  # the score stands at the last token
    assert not rewards[~MASK].any()


def test_whitening() -> None:
    found = whitened(torch.where(MASK, random(7, 5.0) + 3.0, 1e6), MASK)
    assert np.isclose(found[MASK].mean(), 0.0) and np.isclose(found[MASK].var(correction=0), 1.0)
    assert not found[~MASK].any()


def test_the_first_pass_has_ratio_one_and_the_plain_gradient() -> None:
    now = random(8).requires_grad_()
    advantages = random(9)
    found = surrogate_loss(now, now.detach(), advantages, MASK, 0.2)
    assert float(found.clipped_frac) == 0.0
    assert float(found.loss.detach()) == pytest.approx(-float(advantages[MASK].mean()))
    found.loss.backward()
    assert torch.allclose(cast(Tensor, now.grad), torch.where(MASK, -advantages / MASK.sum(), 0.0))


@given(st.integers(0, 1000), st.floats(0.05, 0.5))
def test_the_surrogate_and_its_gradient_are_those_of_the_definition(seed: int, clip: float) -> None:
    now, before, advantages = random(seed, 0.4).requires_grad_(), random(seed + 1, 0.4), random(seed + 2)
    found = surrogate_loss(now, before, advantages, MASK, clip)
    found.loss.backward()
    total, clipped, gradient = 0.0, 0, torch.zeros(SIZE, dtype=torch.float64)
    for row, column in MASK.nonzero().tolist():
        a = float(advantages[row, column])
        ratio = float(torch.exp(now[row, column] - before[row, column]).detach())
        out = (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip)  # where the gain is no longer followed
        bound = 1 + clip if a > 0 else 1 - clip
        total -= bound * a if out else ratio * a
        gradient[row, column] = 0.0 if out else -ratio * a / int(MASK.sum())
        clipped += out
    assert float(found.loss.detach()) == pytest.approx(total / int(MASK.sum()))
    assert float(found.clipped_frac) == pytest.approx(clipped / int(MASK.sum()))
    assert torch.allclose(cast(Tensor, now.grad), gradient)


@given(st.integers(0, 1000))
def test_the_value_loss_is_that_of_the_definition(seed: int) -> None:
    now, before, returns = random(seed).requires_grad_(), random(seed + 1), random(seed + 2)
    found = value_loss(now, before, returns, MASK, 0.5)
    found.loss.backward()
    total, gradient = 0.0, torch.zeros(SIZE, dtype=torch.float64)
    for row, column in MASK.nonzero().tolist():
        v, old, target = (float(x[row, column].detach()) for x in (now, before, returns))
        near = min(max(v, old - 0.5), old + 0.5)
        total += 0.5 * max((v - target) ** 2, (near - target) ** 2)
        follows = (v - target) ** 2 >= (near - target) ** 2
        gradient[row, column] = (v - target if follows else 0.0) / int(MASK.sum())
    assert float(found.loss.detach()) == pytest.approx(total / int(MASK.sum()))
    assert torch.allclose(cast(Tensor, now.grad), gradient)


def test_every_round_takes_all_prompts_in_a_new_order() -> None:
    prompts = [ask(str(number)) for number in range(6)]
    rounds = list(islice(prompt_order(prompts, 2, seed=3), 6))
    flat = [[prompt for group in rounds[start : start + 3] for prompt in group] for start in (0, 3)]
    assert sorted(map(str, flat[0])) == sorted(map(str, flat[1])) == sorted(map(str, prompts))
    assert flat[0] != flat[1] and list(islice(prompt_order(prompts, 2, seed=3), 6)) == rounds
    assert [len(group) for group in islice(prompt_order(prompts, 4, seed=3), 3)] == [4, 4, 4]
    assert len(next(prompt_order(prompts, 99, seed=3))) == 6


def test_answers_are_drawn_from_the_policy_and_looked_up_in_the_reference() -> None:
    setting = tiny_setting(reward=visible())
    policy, prompts = setting.policy, [pair.prompt for pair in setting.pairs[:3]]
    perturb(policy)
    answers = draw(setting, prompts, 0, Meter())
    trainer = PpoTrainer(policy, PpoSettings(), setting.config.unlearn)
    torch.nn.init.normal_(trainer.value_head.weight)
    seen = trainer.look(answers.batch)
    rows = []
    batch = answers.batch
    for ids, real, chosen in zip(batch.input_ids, batch.attention_mask, batch.answer_mask, strict=True):
        rows.append(Encoded(tuple(ids[real.bool()].tolist()), int(chosen.sum())))
    assert [row.input_ids[: -row.n_answer] for row in rows] == [policy.encoder.encode_prompt(item) for item in prompts]
    assert torch.allclose(seen.log_probs.sum(1), policy.answer_sums(rows), atol=1e-4)
    assert torch.allclose(answers.reference.sum(1), tiny_policy().answer_sums(rows), atol=1e-4)
    texts = [cast(str, policy.tokenizer.decode(row.answer_ids, skip_special_tokens=True)).strip() for row in rows]
    assert answers.scores.tolist() == visible().score(prompts, texts).tolist()
    hidden = hidden_states(policy.model, answers.batch)[:, -answers.batch.targets.shape[1] - 1 : -1]
    values = (hidden @ trainer.value_head.weight.T)[..., 0] * answers.batch.answer_mask
    assert torch.allclose(seen.values, values, atol=1e-4) and float(values.detach().abs().max()) > 0.1
    seen.values.sum().backward()
    assert all(value.grad is None for value in policy.trainable().values())  # the policy is not moved by the values


def hidden_states(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The last hidden states, as transformers gives them."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        output_hidden_states=True,
    ).hidden_states[-1]


def test_the_first_update_follows_the_policy_gradient() -> None:
    setting = tiny_setting(reward=visible(), optimizer="sgd", max_grad_norm=1e6)
    policy = setting.policy
    trainer = PpoTrainer(policy, PpoSettings(learning_rate=0.5, beta=0.1), setting.config.unlearn)
    answers = draw(setting, [pair.prompt for pair in setting.pairs[:4]], 0, Meter())
    now = trainer.look(answers.batch)
    mask = answers.batch.answer_mask
    rewards = -0.1 * (now.log_probs - answers.reference).detach()
    rewards[:, -1] += answers.scores
    advantages = whitened(advantages_of(rewards, torch.zeros_like(rewards), 1.0, 0.95), mask)
    objective = (advantages * now.log_probs)[mask].sum() / mask.sum()
    names, values = zip(*policy.trainable().items(), strict=True)
    ascent = dict(zip(names, torch.autograd.grad(objective, values, retain_graph=True), strict=True))
    start = policy.snapshot()
    log = trainer.update(answers, now.detached(), now)
    wanted = {name: start[name] + 0.5 * ascent[name] for name in names}
    assert distance(policy.snapshot(), wanted) < 1e-5 < distance(wanted, start)
    assert log.grad_norm == pytest.approx(float(torch.stack([g.square().sum() for g in ascent.values()]).sum().sqrt()))


def test_a_toy_reward_rises(tmp_path: Path) -> None:
    setting = tiny_setting(rows=pairs(32), tokens=2, reward=visible(2), learning_rate=0.03, batch_size=32)
    before, meter, budget = first_token_visible(setting), Meter(), StepBudget(18)
    with leaves_no_trace(tmp_path):
        done = PpoArm().train(setting, {"epochs": 3, "beta": 0.01}, meter, budget)
    assert first_token_visible(setting) > before + 0.15
    assert done.steps == 18 == len(done.history) and len(budget.seen) == 19
    spent = meter.spent().flops
    assert min(spent["generate"], spent["reference"], spent["train"]) > 0 and "reward" in spent


def test_every_pass_is_compared_with_the_policy_that_drew_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Answers, Pass, float]] = []
    update = PpoTrainer.update

    def watched(self: PpoTrainer, answers: Answers, before: Pass, now: Pass) -> StepLog:
        seen.append((answers, before, float((now.log_probs - before.log_probs).detach().abs().max())))
        return update(self, answers, before, now)

    monkeypatch.setattr(PpoTrainer, "update", watched)
    PpoArm().train(tiny_setting(reward=visible(), learning_rate=0.05), {"epochs": 2}, Meter(), StepBudget(4))
    first, second, third, fourth = seen
    assert first[0] is second[0] and third[0] is fourth[0] and first[0] is not third[0]
    assert first[1] is second[1] and third[1] is fourth[1]
    assert first[2] == third[2] == 0.0 < min(second[2], fourth[2])


def test_the_seed_decides_everything() -> None:
    found = []
    for seed in (1, 1, 2):
        torch.rand(seed)
        setting = tiny_setting(seed, reward=visible(), learning_rate=0.01)
        before = torch.get_rng_state()
        PpoArm().train(setting, {"epochs": 2}, Meter(), StepBudget(3))  # stops within a set of answers
        assert torch.equal(before, torch.get_rng_state()) and not setting.policy.model.training
        found.append(setting.policy.snapshot())
    assert distance(found[0], found[1]) == 0.0 < distance(found[0], found[2])


def test_nothing_is_done_without_a_budget_and_trl_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast(Any, __import__("sys").modules), "trl", None)
    setting = tiny_setting(reward=visible())
    assert PpoArm().train(setting, {}, Meter(), StepBudget(0)).steps == 0
    assert distance(setting.policy.snapshot(), setting.policy.theta0) == 0.0


def test_what_cannot_be_used_ends_the_run() -> None:
    arm, budget = PpoArm(), StepBudget(2)
    with pytest.raises(ConfigError, match="needs a reward model"):
        arm.train(tiny_setting(), {}, Meter(), budget)
    with pytest.raises(ConfigError, match="clip: -1"):
        arm.train(tiny_setting(reward=visible()), {"clip": -1.0, "epochs": 2.5}, Meter(), budget)
    with pytest.raises(ConfigError, match="no hyperparameter 'lambda'"):
        arm.train(tiny_setting(reward=visible()), {"lambda": 1.0}, Meter(), budget)
    nan = CallableReward("nan", lambda prompts, answers: [float("nan")] * len(answers))
    with pytest.raises(NonFiniteError, match="reward"):
        arm.train(tiny_setting(reward=nan), {}, Meter(), budget)
    setting = tiny_setting(reward=visible())
    next(iter(setting.policy.trainable().values())).data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="logit in phase generate"):
        arm.train(setting, {}, Meter(), StepBudget(2))
