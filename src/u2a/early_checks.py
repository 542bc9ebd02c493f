"""What would end a run in a late stage and can be told before any model is loaded: reward models, embedder, judge."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from u2a.config import RunConfig
from u2a.data import prompt_key
from u2a.errors import ConfigError, ModelError
from u2a.evaluation.arm import prompts_answered
from u2a.evaluation.chat_endpoint import endpoint_key
from u2a.named_content import MODEL_NAMES
from u2a.packaged import check_installed
from u2a.record import derive_seed, one_line
from u2a.reward.analysis import split_reward_pairs
from u2a.reward.head import check_prompts, load_head
from u2a.reward.loading import refuse_no_head
from u2a.robustness.relearn import split_forget, texts
from u2a.types import Partition

VERDICTS = "verdicts.jsonl"  # below cache/: what the judge replied
HEADS = ("embedding", "language_model")  # a head is fitted on the run's own reward pairs


def check_early(config: RunConfig, sets: Partition) -> None:
    """Check names of models, the pairs that reward heads are fitted on, and the judge's key.

    Args:
        config: options.
        sets: the partition.

    Raises:
        ConfigError: the judge's key is missing.
        DataError: too few prompts for a head.
        ModelError: a name behind which there is no model.
    """
    check_named_models(config)
    check_reward_pairs(config, sets)
    check_judge_key(config)


def check_output_dir(config: RunConfig) -> None:
    """Refuse a run in the folder of one of its models: the run's records would count as the model's files.

    Args:
        config: options.

    Raises:
        ConfigError: the option whose folder it is.
    """
    folder = Path(config.output_dir)
    for section, names in MODEL_NAMES.items():
        for name in names:
            place = getattr(getattr(config, section), name)
            if place and Path(place).is_dir() and folder.exists() and folder.samefile(place):
                raise ConfigError(f"output_dir: {folder} is the folder of {section}.{name} (name another one)")


def check_judge_key(config: RunConfig) -> None:
    """Refuse a judge whose key is missing, which a run would meet in stage 5.

    A run whose judge has replied before is let through: its verdicts are kept, and may be all that it needs.

    Args:
        config: options.

    Raises:
        ConfigError: no usable key where one is needed.
    """
    judge, asked = config.evaluation.judge, Path(config.output_dir) / "cache" / VERDICTS
    if config.evaluation.prompt_sets and judge.rubric != "refusal" and not asked.exists():
        endpoint_key(judge.key_variable)


def check_reward_pairs(config: RunConfig, sets: Partition) -> None:
    """Refuse too few pairs for a reward head, which a run would meet in stage 2 or 5.

    Args:
        config: options.
        sets: the partition.

    Raises:
        DataError: too few prompts, with the option whose head lacks them.
    """
    sides = split_reward_pairs(sets.reward)
    for option, side in (("model", 0), ("eval_model", 1), ("second_model", 1)):
        if getattr(config.reward, option) in HEADS:
            check_prompts([prompt_key(pair.prompt) for pair in sides[side]], f"reward.{option}")


def check_relearning(config: RunConfig, sets: Partition) -> None:
    """Refuse candidates of which the relearning attack leaves none, which it would meet after the evaluation.

    Args:
        config: options.
        sets: the partition.

    Raises:
        DataError: too few candidates with a prompt and an answer of their own.
    """
    section = config.robustness
    if section.relearn_rows:
        measured = sorted(sets.retain_parts().evaluation, key=lambda row: row.id)[: section.measured_rows]
        asked = {("prompt", prompt_key(pair.prompt)) for pair in prompts_answered(sets.evaluation, section.prompts)}
        seed = derive_seed(derive_seed(config.seed, "robustness"), "relearn")
        split_forget(sets.forget, section.relearn_rows, seed, texts(measured) | asked)


def check_named_models(config: RunConfig) -> None:
    """Refuse names of reward models and embedders behind which there is no model.

    Args:
        config: options.

    Raises:
        ModelError: a package that is not installed, a name without a configuration, or a folder without a head.
    """
    reward = config.reward
    check_cluster_embedder(config)
    named = {
        "reward.name_or_path": (reward.model, reward.name_or_path),
        "reward.eval_name_or_path": (reward.eval_model, reward.eval_name_or_path),
        "reward.second_name_or_path": (reward.second_model, reward.second_name_or_path),
        "evaluation.embedder": ("embedding", config.evaluation.embedder),
    }
    for option, (kind, name) in named.items():
        if name and kind not in ("none", "implicit"):
            _check_named(option, kind, name)


def check_cluster_embedder(config: RunConfig) -> None:
    """Refuse the name of an embedder for clusters of candidates behind which there is no model.

    Args:
        config: options.

    Raises:
        ModelError: as for :func:`check_named_models`.
    """
    if config.solve.clusters:
        _check_named("solve.cluster_embedder", "embedding", config.solve.cluster_embedder)


def _check_named(option: str, kind: str, name: str) -> None:
    """Refuse a name, with its option."""
    try:
        _refuse_nameless(kind, name)
    except ModelError as error:
        raise ModelError(f"{option}: {error}") from None


def _refuse_nameless(kind: str, name: str) -> None:
    if kind == "head":  # a folder of u2a reward train, with the name of the model that the head reads
        refuse_no_head(name)
        name = load_head(name)[1].name_or_path
    if name.startswith("package:"):
        check_installed(name)
        return
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # damaged files make the libraries below raise anything
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(one_line(f"{name!r} cannot be loaded ({text})")) from None
