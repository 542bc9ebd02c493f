"""One (task, seed): the data, the start, and the models that every arm meets alike."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PrinterCallback

from u2a.config import RunConfig
from u2a.config_reward import RewardSection
from u2a.data import example_id, prompt_key
from u2a.errors import ModelError
from u2a.evaluation.arm import ArmResult, Instruments, evaluate_arm, item_groups
from u2a.experiment.measured import Measured, measured_of
from u2a.experiment.meter import Meter
from u2a.finetune import finetune, mixture
from u2a.model_loading import load_model, pick_device
from u2a.modeling import Policy
from u2a.partition import read_inputs
from u2a.pipeline import Pipeline
from u2a.progress import Console, Quiet
from u2a.record import Record, content_id, derive_seed
from u2a.reward.analysis import TRAINED_HERE, build_reward_model, split_reward_pairs
from u2a.reward.base import RewardModel
from u2a.reward.card import reward_card
from u2a.reward.embedding import EmbeddingReward
from u2a.reward.lm_head import LanguageModelReward
from u2a.reward.loading import absolute, load_reward_model
from u2a.types import Example, Pair, Partition, RewardCard
from u2a.unlearn import InnerProblem, trainer_of, weighted_rows

Split = Literal["test", "dev"]
UNIT_STEPS = 4  # measured of the pass that is the unit of budgets


@dataclass(frozen=True)
class Setting:
    """What an arm works on.

    Attributes:
        config: options of the run, with the arm's own changes.
        partition: the sets; ``evaluation`` holds the pairs that are measured, which no arm may read.
        policy: the policy at theta_0, made anew for every cell.
        selecting_reward: the reward model that may be asked in training and selection, or None. The evaluation uses
            others.
        forget_pairs: the pairs from which candidates were cut, for arms that train on pairs (those candidates that
            came with a good answer).
        seed: seed of everything random.
        console: progress.
        retrained: makes the policy that never saw the candidates (the baseline Retrain).
    """

    config: RunConfig
    partition: Partition
    policy: Policy
    selecting_reward: RewardModel | None
    forget_pairs: tuple[Pair, ...]
    seed: int
    console: Console
    retrained: Callable[[], Policy] | None = None

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """What arms of the pairs track train on: the PA pairs and those the candidates were cut from."""
        return (*self.partition.preference, *self.forget_pairs)


class Start(Record):
    """What analysis reads of a setting: enough to make tables where the setting itself is not kept.

    Attributes:
        groups: prompt key by id of every measured item.
        measured: of the policy at theta_0.
    """

    groups: dict[str, str]
    measured: Measured


class SettingRecord(Record):
    """What was prepared for one (task, seed), once for all arms.

    Attributes:
        task: its name.
        seed: its seed.
        split: whose prompts are measured: ``test``, or ``dev`` for tuning.
        fingerprint: of the partition, with all evaluation prompts.
        sizes: rows by set, the evaluation set after the split.
        forget_pairs: pairs from which candidates were cut.
        unit_flops: FLOPs of one GA pass over all candidates, extrapolated from ``unit_steps`` steps.
        unit_steps: steps that were measured.
        unit_seconds: wall seconds of such a pass on this machine, likewise.
        groups: prompt key by id of every evaluation pair, retain and forget row.
        rewards: cards of the evaluation's reward models, on the measured pairs.
        start: measurement of the policy at theta_0.
        seconds: wall seconds of the preparation by phase.
    """

    task: str
    seed: int
    split: Split
    fingerprint: str
    sizes: dict[str, int]
    forget_pairs: tuple[Pair, ...]
    unit_flops: int
    unit_steps: int
    unit_seconds: float
    groups: dict[str, str]
    rewards: tuple[RewardCard, ...]
    start: ArmResult
    seconds: dict[str, float]

    def kept(self) -> Start:
        """What analysis reads of it."""
        return Start(groups=self.groups, measured=measured_of(self.start, full=True))


@dataclass(frozen=True)
class Workplace:
    """Where one (task, seed) is kept, and how it is cut and measured.

    Attributes:
        task: name of the task.
        folder: its directory.
        config: options that all arms share; ``output_dir`` is ``folder``.
        split: whose prompts are measured.
        dev_frac: share of prompts that only tuning reads.
    """

    task: str
    folder: Path
    config: RunConfig
    split: Split
    dev_frac: float

    @property
    def record(self) -> Path:
        """File of the :class:`SettingRecord`; it is there when all has been prepared."""
        return self.folder / "setting.json"

    def cut(self, partition: Partition) -> Partition:
        """Leave only the evaluation pairs and the measured retain rows of this split.

        Args:
            partition: with all of them.

        Returns:
            A changed copy. Where a prompt belongs depends on its text alone, so that no seed's tuning reads a prompt
            that another seed measures.
        """
        kept = tuple(pair for pair in partition.evaluation if self._measures(pair))
        parts = partition.retain_parts()
        unused = (*parts.guard, *parts.evaluation)  # the guard is off in all arms
        measured = tuple(row for row in dict.fromkeys(unused) if self._measures(row))
        if self.dev_frac == 0.0 or not measured:
            return partition.model_copy(update={"evaluation": kept})
        return partition.model_copy(update={"evaluation": kept, "retain": parts.train, "retain_measured": measured})

    def _measures(self, row: Pair | Example) -> bool:
        return in_dev(row, self.dev_frac) == (self.split == "dev")


def in_dev(row: Pair | Example, dev_frac: float) -> bool:
    """Tell whether an evaluation pair or a measured retain row is kept for tuning.

    Args:
        row: the row.
        dev_frac: share of prompts.

    Returns:
        True for about that share of all prompts.
    """
    return int(content_id("dev", prompt_key(row.prompt)), 16) / 2.0**64 < dev_frac


def prepare(place: Workplace, console: Console) -> SettingRecord:
    """Cut the data, make the start and the reward models, measure the start and the unit of budgets.

    Args:
        place: what and where.
        console: progress.

    Returns:
        The record; also ``setting.json``, written last.

    Raises:
        ModelError: no evaluation pair is left. Other errors of the data, the model and the options pass through.
    """
    pipeline = Pipeline(place.config, console)
    whole = pipeline.partition
    partition = place.cut(whole)
    if not partition.evaluation:
        raise ModelError(f"{place.folder}: no evaluation pair in the {place.split} split (give more evaluation pairs)")
    partition.save(place.folder / "sets.json")
    _train_heads(place, whole, console)
    policy = pipeline.policy
    flops, seconds, steps = _unit(policy, partition, place.config)
    with console.phase("evaluate start"):
        instruments = open_instruments(place)
        start = evaluate_arm(
            policy, partition, instruments, place.config.evaluation, place.config.seed, Console(quiet=True), "start"
        )
    models, n_train = (instruments.reward_model, instruments.second_model), len(split_reward_pairs(whole.reward)[1])
    cards = tuple(reward_card(model, partition.evaluation, n_train) for model in models if model is not None)
    names = ("finetune", "forget", "retain", "preference", "reward", "evaluation")
    record = SettingRecord(
        task=place.task,
        seed=place.config.seed,
        split=place.split,
        fingerprint=whole.fingerprint,
        sizes={name: len(getattr(partition, name)) for name in names},
        forget_pairs=_forget_pairs(place.config, partition),
        unit_flops=flops,
        unit_steps=steps,
        unit_seconds=seconds,
        groups=item_groups(partition),
        rewards=cards,
        start=start,
        seconds={name: round(value, 2) for name, value in console.seconds.items()},
    )
    record.save(place.record)
    return record


def open_setting(place: Workplace, arm_config: RunConfig, console: Console) -> Setting:
    """Make the setting of one cell of what :func:`prepare` left, with a policy of its own.

    Args:
        place: a prepared one.
        arm_config: the task's options with the arm's changes.
        console: progress.

    Returns:
        The setting, its policy at theta_0.
    """
    record = SettingRecord.load(place.record)
    pipeline = Pipeline(place.config, console)
    model = place.config.model
    if place.config.finetune.enabled:
        model = model.model_copy(update={"name_or_path": str(place.folder / "base")})
    partition = Partition.load(place.folder / "sets.json")

    def retrained() -> Policy:
        section, seed = place.config.finetune, derive_seed(place.config.seed, "finetune")
        base = pipeline.policy_around(load_model(place.config.model))
        rows = mixture(partition, section, seed, leave_out_forget=True)
        return pipeline.policy_around(finetune(base, rows, section, seed, Quiet()))

    return Setting(
        config=arm_config,
        partition=partition,
        policy=pipeline.policy_around(load_model(model)),
        selecting_reward=_open_reward(place, "selecting"),
        forget_pairs=record.forget_pairs,
        seed=place.config.seed,
        console=console,
        retrained=retrained if place.config.finetune.enabled else None,
    )


def open_instruments(place: Workplace) -> Instruments:
    """Load the evaluation's reward models.

    Args:
        place: a prepared one, or one whose heads are trained.

    Returns:
        What every arm is measured with.
    """
    return Instruments(reward_model=_open_reward(place, "evaluation"), second_model=_open_reward(place, "second"))


# --- reward models -------------------------------------------------------------------------------


def _sections(section: RewardSection) -> dict[str, RewardSection]:
    """Options of the three reward models, each in the place of the selecting one."""
    others = {
        "evaluation": (section.eval_model, section.eval_name_or_path),
        "second": (section.second_model, section.second_name_or_path),
    }
    changed = {
        name: section.model_copy(update={"model": model, "name_or_path": absolute(path)})
        for name, (model, path) in others.items()
    }
    return {"selecting": section.model_copy(update={"name_or_path": absolute(section.name_or_path)}), **changed}


def _train_heads(place: Workplace, partition: Partition, console: Console) -> None:
    """Fit and keep the heads; the selecting one sees other pairs than those of the evaluation."""
    first, second = split_reward_pairs(partition.reward)
    for name, section in _sections(place.config.reward).items():
        folder = place.folder / "heads" / name
        if section.model not in TRAINED_HERE or folder.exists():
            continue
        pairs = first if name == "selecting" else second
        model = build_reward_model(
            section, pairs, None, derive_seed(place.config.seed, name), console, place.config.model.device
        )
        assert isinstance(model, EmbeddingReward | LanguageModelReward)
        model.save(folder)


def _open_reward(place: Workplace, name: str) -> RewardModel | None:
    section = _sections(place.config.reward)[name]
    device = pick_device(place.config.model.device)
    if section.model == "none":
        return None
    if section.model in TRAINED_HERE:
        return load_reward_model(str(place.folder / "heads" / name), "head", device)
    return build_reward_model(section, (), None, 0, Console(quiet=True), place.config.model.device)


# --- the unit of budgets, and pairs of candidates ------------------------------------------------


def _unit(policy: Policy, partition: Partition, config: RunConfig) -> tuple[int, float, int]:
    """FLOPs and seconds of one GA pass over the candidates, from the first steps of one, and how many those were."""
    rows, batch = len(partition.forget), config.unlearn.batch_size
    steps = min(UNIT_STEPS, -(-rows // batch))
    section = config.unlearn.model_copy(update={"loss": "ga", "retain_term": "none", "max_steps": steps})
    problem = InnerProblem(partition.forget, (), (), section, config.guard, derive_seed(config.seed, "unit"))
    meter = Meter()
    with tempfile.TemporaryDirectory(prefix="u2a-") as folder:
        trainer = trainer_of(policy, problem, weighted_rows(problem.forget, problem.uniform()), Path(folder))
        trainer.remove_callback(PrinterCallback)
        with meter.phase("train"):
            trainer.train()
    policy.model.eval()
    policy.reset()
    share = rows / (steps * min(batch, rows) * section.gradient_accumulation_steps)
    spent = meter.spent()
    return round(share * spent.total_flops), round(share * spent.seconds["train"], 3), steps


def _forget_pairs(config: RunConfig, partition: Partition) -> tuple[Pair, ...]:
    """The pairs whose rejected answers are candidates, one each; one mislabelled on purpose is so here, too."""
    by_id: dict[str, Pair] = {}
    most = config.partition.max_answer_chars or math.inf
    pairs = [pair for pair in read_inputs(config.data, {}).pairs if max(len(pair.chosen), len(pair.rejected)) <= most]
    pairs.sort(key=lambda pair: pair.id)
    swapped = [pair.model_copy(update={"chosen": pair.rejected, "rejected": pair.chosen}) for pair in pairs]
    for pair in pairs + (swapped if config.partition.mislabelled_frac else []):
        by_id.setdefault(example_id(pair.prompt, pair.rejected), pair)
    return tuple(by_id[row.id] for row in partition.forget if row.id in by_id)
