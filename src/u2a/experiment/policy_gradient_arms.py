"""Arms of the pairs track that learn from their own answers and the selecting reward model: RLOO and GRPO by TRL."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset

from u2a.errors import ConfigError
from u2a.experiment.arm import Budget, Track, Trained
from u2a.experiment.meter import Meter
from u2a.experiment.setting import Setting
from u2a.experiment.trl_run import (
    callbacks,
    check_trial,
    common_options,
    drop_reference_adapter,
    lent,
    own_tokenizer,
    require_trl,
    run_trainer,
)
from u2a.reward.base import RewardModel
from u2a.types import Message

if TYPE_CHECKING:
    from peft import PeftModel

    from u2a.experiment.trl_trainers import MeteredGrpo, MeteredRloo

KNOWN = ("learning_rate", "beta", "num_generations")


@dataclass(frozen=True)
class PolicyGradientArm:
    """RLOO or GRPO by the trainers of TRL.

    A step draws ``num_generations`` answers to each of several prompts, ``unlearn.batch_size`` answers or a few more
    together, at temperature 1 and of at most ``evaluation.max_new_tokens`` tokens, has them scored by the selecting
    reward model and takes one step with the advantages:

    - rloo: R_i - mean of the others' R in the group, R the reward minus beta times the sequence's log-ratio to the
      reference (Ahmadian et al. 2024, arXiv 2402.14740);
    - grpo: (reward - group mean) / (group sd + 1e-4), with beta times a KL estimate per token in the loss
      (Shao et al. 2024, arXiv 2402.03300, equations 3 and 4; ``loss_type="grpo"``).

    Attributes:
        method: which one; also the arm's name.
    """

    method: Literal["rloo", "grpo"]
    track: Track = "pairs"

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.method

    def train(self, setting: Setting, trial: Mapping[str, float], meter: Meter, budget: Budget) -> Trained:
        """Train until the budget is spent.

        Args:
            setting: pairs (their prompts are used), options, reward model and policy at theta_0.
            trial: ``learning_rate``, ``beta`` (>= 0; 0.05 for rloo, 0.04 for grpo), ``num_generations`` (>= 2; 4).
            meter: counts.
            budget: how much may be spent.

        Returns:
            What was done.
        """
        require_trl()
        check_trial(self.name, trial, KNOWN)
        with tempfile.TemporaryDirectory(prefix="u2a-") as folder, lent(setting.policy) as model:
            options = common_options(setting, trial, folder) | group_options(setting, trial)
            options["beta"] = trial.get("beta", 0.05 if self.method == "rloo" else 0.04)
            trainer = make_group_trainer(self.method, setting, model, options, meter)
            for callback in callbacks(self.name, budget):
                trainer.add_callback(callback)
            return run_trainer(self.name, trainer, setting.policy, meter)


def make_group_trainer(
    method: Literal["rloo", "grpo"], setting: Setting, model: PeftModel, options: dict[str, Any], meter: Meter
) -> MeteredRloo | MeteredGrpo:
    """Make the trainer of TRL for one method.

    Args:
        method: rloo or grpo.
        setting: prompts, reward model and policy.
        model: the policy's model, lent.
        options: as :func:`~u2a.experiment.trl_run.common_options` and :func:`group_options` give them, and ``beta``.
        meter: counts.

    Returns:
        The trainer.
    """
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.rloo_config import RLOOConfig

    from u2a.experiment import trl_trainers as ours

    reward = reward_function(selecting_reward(setting, method), meter)
    prompts = Dataset.from_dict({"prompt": [_turns(prompt) for prompt in prompts_of(setting)]})
    tokenizer = own_tokenizer(setting.policy)
    if method == "rloo":
        trainer = ours.MeteredRloo(
            model=model,
            reward_funcs=reward,
            args=RLOOConfig(**options),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    else:
        trainer = ours.MeteredGrpo(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(**options, loss_type="grpo"),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    drop_reference_adapter(model)
    trainer.meter = meter
    return trainer


def group_options(setting: Setting, trial: Mapping[str, float]) -> dict[str, Any]:
    """Options of the groups: answers per prompt, answers per step, their length.

    Args:
        setting: prompts and options.
        trial: ``num_generations`` where it is not 4.

    Returns:
        Keyword arguments.

    Raises:
        ConfigError: a group of fewer than two answers.
    """
    size = int(trial.get("num_generations", 4))
    if size < 2 or size != trial.get("num_generations", 4):
        raise ConfigError(f"num_generations: {trial['num_generations']:g} is not a whole number of at least 2")
    groups = min(max(1, setting.config.unlearn.batch_size // size), len(prompts_of(setting)))
    return {
        "num_generations": size,
        "per_device_train_batch_size": size * groups,
        "max_completion_length": setting.config.evaluation.max_new_tokens,
        "temperature": 1.0,
    }


def prompts_of(setting: Setting) -> list[tuple[Message, ...]]:
    """The distinct prompts of the pairs, in their order.

    Args:
        setting: pairs.

    Returns:
        At least one prompt.

    Raises:
        ConfigError: there are no pairs.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in setting.pairs))
    if not prompts:
        raise ConfigError("the arms of the pairs track need pairs (set data.pairs or data.preferences)")
    return prompts


def selecting_reward(setting: Setting, arm: str) -> RewardModel:
    """The reward model that may be asked in training.

    Args:
        setting: may hold one.
        arm: name for the error message.

    Returns:
        The reward model.

    Raises:
        ConfigError: there is none.
    """
    if setting.selecting_reward is None:
        raise ConfigError(f"arm {arm} needs a reward model (set reward.model, or leave the arm out)")
    return setting.selecting_reward


def reward_function(model: RewardModel, meter: Meter) -> Callable[..., list[float | None]]:
    """Make a reward function of TRL of a reward model.

    Args:
        model: the reward model.
        meter: counts its work.

    Returns:
        ``f(prompts, completions, ...)`` on TRL's conversations; whatever else TRL passes is not used.
    """

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float | None]:
        turns = [tuple(Message(**turn) for turn in prompt) for prompt in prompts]
        answers = [completion[0]["content"].strip() for completion in completions]
        with meter.phase("reward"):
            return [float(value) for value in model.score(turns, answers)]

    return reward


def _turns(prompt: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in prompt]
