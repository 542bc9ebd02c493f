"""PPO for a language model, our own and compact: no kept library has it any more.

TRL 1.7 still had it, 1.15 and 1.16 have not. OpenRLHF and verl need Ray and older versions of transformers; aligntune
needs TRL 1.7.1 with vLLM. What stands here is the usual recipe (Huang et al. 2024, arXiv 2403.17031) and nothing else;
its formulas are in :mod:`u2a.experiment.ppo_losses`.

Departs: the value head reads the policy's last hidden states without passing a gradient to them, so that the policy
moves by the surrogate alone; its bias starts at the mean score of the first answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from u2a.config import UnlearnSection
from u2a.encoding import Batch, Encoded
from u2a.errors import ConfigError, NonFiniteError
from u2a.evaluation.decoding import Decoding
from u2a.evaluation.generation import answer_text, generate_ids
from u2a.experiment.arm import UNTIL_SPENT, Budget, Track, Trained
from u2a.experiment.meter import Meter
from u2a.experiment.policy_gradient_arms import prompts_of, selecting_reward
from u2a.experiment.ppo_losses import (
    Answers,
    Pass,
    advantages_of,
    surrogate_loss,
    token_rewards,
    value_loss,
    whitened,
)
from u2a.experiment.setting import Setting
from u2a.experiment.trl_run import check_trial
from u2a.guard import all_finite
from u2a.modeling import Policy, answer_log_probs
from u2a.record import derive_seed
from u2a.types import Message, StepLog


@dataclass(frozen=True)
class PpoSettings:
    """Hyperparameters.

    Attributes:
        learning_rate: of the policy, > 0.
        value_learning_rate: of the value head, > 0.
        beta: weight of the divergence from the reference in the rewards, >= 0.
        epochs: optimiser steps per set of answers, >= 1.
        clip: largest change of a ratio, and of a value, that is followed, > 0.
        gamma: discount, in (0, 1].
        gae_lambda: in [0, 1]; 1 takes whole returns.

    Raises:
        ConfigError: a value is out of range.
    """

    learning_rate: float = 1e-4
    value_learning_rate: float = 1e-3
    beta: float = 0.05
    epochs: int = 4
    clip: float = 0.2
    gamma: float = 1.0
    gae_lambda: float = 0.95

    def __post_init__(self) -> None:
        ranges = {
            "learning_rate": self.learning_rate > 0,
            "value_learning_rate": self.value_learning_rate > 0,
            "beta": self.beta >= 0,
            "epochs": self.epochs >= 1 and self.epochs == int(self.epochs),
            "clip": self.clip > 0,
            "gamma": 0 < self.gamma <= 1,
            "gae_lambda": 0 <= self.gae_lambda <= 1,
        }
        problems = [
            f"arm ppo: {name}: {getattr(self, name)} is out of range" for name, fine in ranges.items() if not fine
        ]
        if problems:
            raise ConfigError(problems)


class PpoTrainer:
    """The policy, the value head and their optimiser.

    Args:
        policy: the policy, at theta_0.
        settings: hyperparameters.
        section: optimiser options, equal for all arms.

    Attributes:
        value_head: one linear layer on the last hidden states, 0 at the start.
        steps: optimiser steps taken.
    """

    def __init__(self, policy: Policy, settings: PpoSettings, section: UnlearnSection) -> None:
        self.policy, self.settings, self.section, self.steps = policy, settings, section, 0
        width = _plain(policy).get_input_embeddings().weight.shape[1]  # type: ignore[union-attr]
        self.value_head = cast(nn.Linear, nn.utils.skip_init(nn.Linear, cast(int, width), 1, device=policy.device))
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        groups: list[dict[str, Any]] = [
            {"params": list(policy.trainable().values()), "lr": settings.learning_rate},
            {"params": list(self.value_head.parameters()), "lr": settings.value_learning_rate},
        ]
        self.optimizer = (
            torch.optim.SGD(groups)
            if section.optimizer == "sgd"
            else torch.optim.AdamW(groups, eps=section.adam_epsilon, weight_decay=0.0)
        )

    def look(self, batch: Batch) -> Pass:
        """Pass over answers.

        Args:
            batch: prompts and answers.

        Returns:
            Log-probabilities and values, differentiable.
        """
        with _head_input(_plain(self.policy)) as seen:
            token = answer_log_probs(self.policy.model, batch).token
        width = batch.targets.shape[1]
        hidden = seen[-1][:, -(width + 1) : -1].detach().float()
        return Pass(token, torch.where(batch.answer_mask, self.value_head(hidden)[..., 0], 0.0))

    def update(self, answers: Answers, before: Pass, now: Pass) -> StepLog:
        """Take one optimiser step.

        Args:
            answers: answers of the present set.
            before: the pass with the policy that drew them.
            now: the present pass, differentiable.

        Returns:
            Its loss and gradient norm.

        Raises:
            NonFiniteError: a gradient is not finite; nothing is updated with it.
        """
        options, mask = self.settings, answers.batch.answer_mask
        rewards = token_rewards(before.log_probs, answers, options.beta)
        advantages = advantages_of(rewards, before.values, options.gamma, options.gae_lambda)
        policy = surrogate_loss(now.log_probs, before.log_probs, whitened(advantages, mask), mask, options.clip)
        value = value_loss(now.values, before.values, advantages + before.values, mask, options.clip)
        self.optimizer.zero_grad(set_to_none=True)
        (policy.loss + value.loss).backward()
        parameters, head = list(self.policy.trainable().values()), list(self.value_head.parameters())
        if not all_finite([item.grad for item in (*parameters, *head) if item.grad is not None]):
            raise NonFiniteError("gradient", "ppo", self.steps)
        norm = nn.utils.clip_grad_norm_(parameters, self.section.max_grad_norm)
        nn.utils.clip_grad_norm_(head, self.section.max_grad_norm)
        self.optimizer.step()
        self.steps += 1
        return StepLog(step=self.steps, loss=float(policy.loss.detach()), grad_norm=float(norm))


@dataclass(frozen=True)
class PpoArm:
    """PPO with the selecting reward model.

    One answer is drawn to each of ``unlearn.batch_size`` prompts, at temperature 1 and of at most
    ``evaluation.max_new_tokens`` tokens; each set of answers serves ``epochs`` steps.
    """

    name: str = "ppo"
    track: Track = "pairs"

    def train(self, setting: Setting, trial: Mapping[str, float], meter: Meter, budget: Budget) -> Trained:
        """Train until the budget is spent.

        Args:
            setting: pairs (their prompts are used), options, reward model and policy at theta_0.
            trial: the names of :class:`PpoSettings`.
            meter: counts.
            budget: how much may be spent.

        Returns:
            What was done; the logged loss is the surrogate's.

        Raises:
            NonFiniteError: a logit, reward, gradient or weight is not finite.
        """
        section = setting.config.unlearn
        options = {"learning_rate": section.learning_rate} | dict(trial)
        check_trial(self.name, trial, tuple(PpoSettings.__dataclass_fields__))
        selecting_reward(setting, self.name)
        trainer = PpoTrainer(setting.policy, PpoSettings(**options), section)  # type: ignore[arg-type]
        order = prompt_order(prompts_of(setting), section.batch_size, derive_seed(setting.seed, "ppo"))
        history: list[StepLog] = []
        budget.reached()
        while budget.left() and trainer.steps < UNTIL_SPENT:
            answers, before = draw(setting, next(order), trainer.steps, meter), None
            if trainer.steps == 0:
                trainer.value_head.bias.data.fill_(float(answers.scores.mean()))
            for _ in range(int(trainer.settings.epochs)):
                with meter.phase("train"):
                    now = trainer.look(answers.batch)
                    before = before or now.detached()  # the first pass is by the policy that drew the answers
                    history.append(trainer.update(answers, before, now))
                budget.reached(trainer.steps)
                if not budget.left():
                    break
        setting.policy.model.zero_grad(set_to_none=True)
        if not all_finite(list(setting.policy.trainable().values())):
            raise NonFiniteError("weight", "ppo", trainer.steps)
        note = "stopped at the most steps a run may take" if trainer.steps >= UNTIL_SPENT else ""
        return Trained(trainer.steps, note, None, tuple(history))


def draw(setting: Setting, prompts: Sequence[tuple[Message, ...]], step: int, meter: Meter) -> Answers:
    """Draw one answer to each prompt, score it and look it up in the reference.

    Args:
        setting: policy, options, reward model and seed.
        prompts: distinct prompts.
        step: optimiser step, which the drawing is seeded with.
        meter: counts ``generate``, ``reward`` and ``reference``.

    Returns:
        The answers.
    """
    policy = setting.policy
    seed = derive_seed(setting.seed, f"ppo answers {step}")
    decoding = Decoding(setting.config.evaluation.max_new_tokens, temperature=1.0, seed=seed)
    with meter.phase("generate"):
        drawn = generate_ids(policy, prompts, decoding)
    with meter.phase("reward"):
        texts = [answer_text(policy, answer) for answer in drawn]
        scores = selecting_reward(setting, "ppo").score(prompts, texts)
    heads = [policy.encoder.encode_prompt(prompt) for prompt in prompts]
    rows = [Encoded(head + item.drawn, len(item.drawn)) for head, item in zip(heads, drawn, strict=True)]
    batch = policy.collate(rows)
    with meter.phase("reference"), torch.no_grad(), policy.reference() as model:
        reference = answer_log_probs(model, batch).token
    return Answers(batch, scores.to(policy.device), reference)


def prompt_order(prompts: Sequence[tuple[Message, ...]], size: int, seed: int) -> Iterator[list[tuple[Message, ...]]]:
    """Go through the prompts again and again, each time in a new order.

    Args:
        prompts: distinct prompts.
        size: prompts at a time; at most all of them. What is left over at the end of a round is dropped.
        seed: seed of the orders.

    Yields:
        The next prompts.
    """
    generator, size = torch.Generator().manual_seed(seed), min(size, len(prompts))
    while True:
        order = torch.randperm(len(prompts), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield [prompts[index] for index in order[start : start + size]]


@contextmanager
def _head_input(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what the LM head is given: the last hidden states of the positions whose logits are computed."""
    seen: list[Tensor] = []
    head = cast(nn.Module, model.get_output_embeddings())
    handle = head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _plain(policy: Policy) -> PreTrainedModel:
    model = policy.model
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
