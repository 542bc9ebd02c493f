"""RLOO and GRPO by TRL: prompts and answers, advantages by hand, what is metered, and a toy reward that rises."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from arm_kit import StepBudget, distance, first_token_visible, leaves_no_trace, perturb, tiny_setting, visible
from tiny import pairs, tiny_policy
from u2a.encoding import Encoded
from u2a.errors import ConfigError, NonFiniteError
from u2a.experiment import policy_gradient_arms, trl_run
from u2a.experiment.meter import Meter
from u2a.experiment.policy_gradient_arms import (
    PolicyGradientArm,
    group_options,
    make_group_trainer,
    prompts_of,
    reward_function,
)
from u2a.experiment.setting import Setting
from u2a.experiment.trl_run import common_options, lent
from u2a.reward.base import CallableReward
from u2a.types import Message

Method = Literal["rloo", "grpo"]
METHODS: tuple[Method, ...] = ("rloo", "grpo")


@contextmanager
def trainer_of(method: Method, setting: Setting, **options: Any) -> Iterator[Any]:
    """The trainer an arm would use, with the model lent to it."""
    with tempfile.TemporaryDirectory() as folder, lent(setting.policy) as model:
        given = common_options(setting, {}, folder) | group_options(setting, {"num_generations": 3}) | options
        yield make_group_trainer(method, setting, model, given, Meter())


def encoded(prompts: Tensor, prompt_mask: Tensor, answers: Tensor, answer_mask: Tensor) -> list[Encoded]:
    """What TRL drew, row by row."""
    rows = []
    for head, real, tail, drawn in zip(prompts, prompt_mask.bool(), answers, answer_mask.bool(), strict=True):
        answer = tail[drawn].tolist()
        rows.append(Encoded((*head[real].tolist(), *answer), len(answer)))
    return rows


@pytest.mark.parametrize("method", METHODS)
def test_prompts_and_advantages_are_those_of_a_hand_computation(method: Method) -> None:
    beta, setting = 0.2, tiny_setting(reward=visible(), batch_size=6)
    policy, start = setting.policy, tiny_policy()
    prompts = prompts_of(setting)
    with trainer_of(method, setting, beta=beta) as trainer:
        perturb(policy)
        policy.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = [trainer.train_dataset[row] for row in (4, 4, 4, 1, 1, 1)]
        made = trainer._generate_and_score_completions(inputs)
        rows = encoded(made["prompt_ids"], made["prompt_mask"], made["completion_ids"], made["completion_mask"])
        loss = cast(Tensor, trainer._compute_loss(policy.model, made)).detach()
    heads = [policy.encoder.encode_prompt(prompts[row]) for row in (4, 4, 4, 1, 1, 1)]
    assert [row.input_ids[: -row.n_answer] for row in rows] == heads
    assert all(row.n_answer == 6 or row.answer_ids[-1] in policy.encoder.end_ids for row in rows)
    texts = [cast(str, policy.tokenizer.decode(row.answer_ids, skip_special_tokens=True)).strip() for row in rows]
    scores = visible().score([prompts[row] for row in (4, 4, 4, 1, 1, 1)], texts).double()
    now, reference = policy.answer_sums(rows).double(), start.answer_sums(rows).double()
    assert float((now - reference).abs().min()) > 0.1
    if method == "rloo":
        total = scores - beta * (now - reference)
        groups = total.view(2, 3).tolist()
        by_hand = [a - (b + c) / 2 for x, y, z in groups for a, b, c in ((x, y, z), (y, x, z), (z, x, y))]
        assert made["advantages"].tolist() == pytest.approx(by_hand, abs=1e-4)
        assert made["old_logps"].tolist() == pytest.approx(now.tolist(), abs=1e-3)
        assert float(loss) == pytest.approx(-np.mean(by_hand), abs=1e-4)  # the ratio is 1
    else:
        groups = scores.view(2, 3)
        by_hand = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        assert made["advantages"].tolist() == pytest.approx(by_hand.tolist(), abs=1e-3)
        assert made["ref_per_token_logps"].mul(made["completion_mask"]).sum(1).tolist() == pytest.approx(
            reference.tolist(), abs=1e-3
        )
        gap = start.log_probs(rows).token.detach() - policy.log_probs(rows).token.detach()
        estimate = gap.exp() - gap - 1  # of the divergence, per token; 0 outside the answer
        divergence = estimate.sum(1).double() / torch.tensor([row.n_answer for row in rows])
        assert float(loss) == pytest.approx(float((-by_hand + beta * divergence).mean()), rel=1e-3)


def test_a_pass_that_a_sparing_implementation_does_not_need_is_not_charged() -> None:
    setting = tiny_setting(reward=visible(), batch_size=6)
    with trainer_of("rloo", setting) as trainer:
        setting.policy.model.train()
        trainer.current_gradient_accumulation_steps = 1
        made = trainer._generate_and_score_completions([trainer.train_dataset[row] for row in (4, 4, 4, 1, 1, 1)])
        spent = trainer.meter.spent().flops
        assert "train" not in spent and min(spent["generate"], spent["reference"]) > 0
        trainer._compute_loss(setting.policy.model, made)
    assert 1.0 < trainer.meter.spent().flops["train"] / spent["reference"] < 1.5  # one pass, with the adapter


def test_the_reward_function_passes_turns_and_stripped_answers() -> None:
    seen: list[Any] = []

    class Asked:
        name = "asked"

        def score(self, prompts: Any, answers: Any) -> Tensor:
            seen.append((list(prompts), list(answers)))
            return torch.tensor([1.5, -2.0])

        def token_rewards(self, prompts: Any, answers: Any) -> None:
            return None

    turns = [[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], [{"role": "user", "content": "r"}]]
    answers = [[{"role": "assistant", "content": " a\n"}], [{"role": "assistant", "content": ""}]]
    found = reward_function(Asked(), Meter())(prompts=turns, completions=answers, completion_ids=[[1], [2]], more=0)
    assert found == [1.5, -2.0]
    q, r, s = (Message(role=role, content=text) for role, text in (("user", "q"), ("user", "r"), ("system", "s")))
    assert seen == [([(s, q), (r,)], ["a", ""])]


def test_groups_fill_a_step() -> None:
    setting = tiny_setting(batch_size=10)
    assert group_options(setting, {})["per_device_train_batch_size"] == 8  # two groups of four
    assert group_options(setting, {"num_generations": 16})["per_device_train_batch_size"] == 16
    assert group_options(tiny_setting(batch_size=99), {"num_generations": 2})["per_device_train_batch_size"] == 16
    twice = tiny_setting(rows=(*pairs(4), *pairs(4)))
    assert prompts_of(twice) == [pair.prompt for pair in pairs(4)]


@pytest.mark.parametrize(("method", "usual"), [("rloo", 0.05), ("grpo", 0.04)])
def test_the_trial_reaches_the_trainer(method: Method, usual: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(method: Method, setting: Setting, model: Any, options: dict[str, Any], meter: Meter) -> Any:
        seen.append([options[name] for name in ("learning_rate", "beta", "num_generations", "max_completion_length")])
        raise ConfigError("seen")

    monkeypatch.setattr(policy_gradient_arms, "make_group_trainer", stop)
    for trial in ({}, {"learning_rate": 0.5, "beta": 0.0, "num_generations": 2.0}):
        with pytest.raises(ConfigError, match="seen"):
            PolicyGradientArm(method).train(tiny_setting(reward=visible()), trial, Meter(), StepBudget(1))
    assert seen == [[1e-3, usual, 4, 6], [0.5, 0.0, 2, 6]]


@pytest.mark.parametrize("method", METHODS)
def test_a_toy_reward_rises_and_every_part_is_metered(method: Method, tmp_path: Path) -> None:
    answered: list[int] = []

    def toy(prompts: list[str], answers: list[str]) -> list[float]:
        torch.ones(len(answers), 10) @ torch.ones(10, 10)  # 200 operations an answer
        answered.append(len(answers))
        return list(visible(2).function(prompts, answers))

    reward = CallableReward("toy", toy)
    setting = tiny_setting(rows=pairs(32), tokens=2, reward=reward, learning_rate=0.03, batch_size=32)
    before, meter, budget = first_token_visible(setting), Meter(), StepBudget(6)
    with leaves_no_trace(tmp_path):
        trial = {"beta": 0.01, "num_generations": 8.0}
        done = PolicyGradientArm(method).train(setting, trial, meter, budget)
    assert first_token_visible(setting) > before + 0.15
    assert done.steps == 6 == len(done.history) and len(budget.seen) == 7
    spent = meter.spent().flops
    assert min(spent["generate"], spent["reference"], spent["train"]) > 0
    assert set(answered) == {32} and spent["reward"] == 200 * 32 * len(answered) >= 200 * 32 * 6
    assert not setting.policy.model.training
    assert "forward" not in vars(cast(Any, setting.policy.model).get_base_model())
    assert list(cast(Any, setting.policy.model).peft_config) == ["default"]


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_everything(method: Method) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # what was drawn before must not matter
        before = torch.get_rng_state()
        setting = tiny_setting(seed, reward=visible(), learning_rate=0.01)
        PolicyGradientArm(method).train(setting, {}, Meter(), StepBudget(2))
        assert torch.equal(before, torch.get_rng_state())
        found.append(setting.policy.snapshot())
    assert distance(found[0], found[1]) == 0.0 < distance(found[0], found[2])


def test_what_cannot_be_used_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    arm, budget = PolicyGradientArm("rloo"), StepBudget(2)
    with pytest.raises(ConfigError, match="arm rloo needs a reward model"):
        arm.train(tiny_setting(), {}, Meter(), budget)
    for size in (1.0, 2.5):
        with pytest.raises(ConfigError, match=f"num_generations: {size:g} is not"):
            arm.train(tiny_setting(reward=visible()), {"num_generations": size}, Meter(), budget)
    nan = CallableReward("nan", lambda prompts, answers: [float("nan")] * len(answers))
    with pytest.raises(NonFiniteError, match="reward of 'nan'"):
        arm.train(tiny_setting(reward=nan), {}, Meter(), budget)
    setting = tiny_setting(reward=visible())
    next(iter(setting.policy.trainable().values())).data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="logit in phase rloo, generate"):
        arm.train(setting, {}, Meter(), StepBudget(2))

    def absent(name: str) -> str:
        raise trl_run.PackageNotFoundError(name)

    monkeypatch.setattr(trl_run, "version", absent)
    with pytest.raises(ConfigError, match=r"'\.\[experiment\]'"):
        arm.train(cast(Setting, None), {}, Meter(), budget)  # before it looks at anything
