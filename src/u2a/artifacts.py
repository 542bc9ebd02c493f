"""What a run leaves besides its records: the model with its card, the summary, and the options that replay it."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from u2a.arms import SOLUTION_ARM
from u2a.checkpoint import delete_saved, save_folder
from u2a.config import SOURCES, DataSection, RunConfig
from u2a.config_file import is_path
from u2a.console import metric_names
from u2a.content_hash import content_hash
from u2a.errors import ConfigError
from u2a.model_card import model_card
from u2a.model_loading import pick_device
from u2a.modeling import Policy
from u2a.pipeline import Pipeline
from u2a.record import write_whole
from u2a.run_records import RunRecords
from u2a.types import EvalTable, Metric
from u2a.yaml_file import read_yaml

# Values by themselves at the top of summary.json; "metrics" holds all of them with their intervals.
SUMMARY_METRICS = ("preference_accuracy", "preference_margin", "reward", "retain_ppl")
PACKAGES = ("u2a", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pydantic")


def write_summary(pipeline: Pipeline, table: EvalTable) -> Path:
    """Write ``summary.json``: the figures a script wants.

    Args:
        pipeline: the run.
        table: its evaluation.

    Returns:
        The path.
    """
    solution = pipeline.solution()
    weights = solution.weights
    summary: dict[str, Any] = {
        name: {arm: _value(metrics.get(name)) for arm, metrics in table.arms.items()} for name in SUMMARY_METRICS
    }
    summary |= {
        "metrics": {
            name: {arm: _number(metrics[name]) for arm, metrics in table.arms.items() if name in metrics}
            for name in metric_names(table)
        },
        "n_candidates": len(pipeline.partition.forget),
        "n_selected": len(weights),
        "n_truncated": pipeline.n_truncated,
        "weights_sum": sum(weights.values()),
        "fallback": solution.fallback,
        "split_half_reliability": solution.scores.reliability.split_half,
        "scorer_error": solution.scores.scorer_error,
        "seconds": pipeline.store.seconds(),
        "peak_rss_bytes": pipeline.store.peak_rss_bytes(),
        "batch_limits": pipeline.store.batch_limits(),
        "verdict": table.verdict,
        "content_hash": content_hash(RunRecords.load(pipeline.dir)),
    }
    path = pipeline.dir / "summary.json"
    write_whole(path, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return path


def _number(metric: Metric) -> dict[str, float | int | None]:
    return metric.model_dump(include={"value", "low", "high", "n"})


def _value(metric: Metric | None) -> float | None:
    return None if metric is None else metric.value


def save_model(policy: Policy, records: RunRecords, folder: Path) -> Path:
    """Save the trained parameters so that plain transformers and peft load them, with a model card.

    Args:
        policy: the policy.
        records: what the run wrote, for the card.
        folder: directory to write; what is in it is replaced.

    Returns:
        The directory.
    """
    config = records.config
    base = str((Path(config.output_dir) / "base").absolute()) if config.finetune.enabled else config.model.name_or_path
    card = model_card(records, base)

    def write(part: Path) -> None:
        policy.model.save_pretrained(str(part))  # type: ignore[operator]
        policy.tokenizer.save_pretrained(str(part))
        write_whole(part / "README.md", card)

    return save_folder(folder, write)


def save_merged(policy: Policy, folder: Path) -> Path:
    """Save a plain transformers model with the adapter merged into its weights; the policy is not changed.

    Args:
        policy: the policy; its model is copied in memory for the merge.
        folder: directory to write.

    Returns:
        The directory.
    """
    merged = copy.deepcopy(policy.model).merge_and_unload()  # type: ignore[operator]
    return save_folder(folder, lambda part: [each.save_pretrained(str(part)) for each in (merged, policy.tokenizer)])


def save_result(pipeline: Pipeline, merged: bool = False) -> Path:
    """Save the unlearned model of a run, with a card of everything measured so far.

    Args:
        pipeline: the run; its policy is left at the solution.
        merged: also save the merged model where ``model.save_merged`` asks for it.

    Returns:
        The directory: ``adapter``, or ``model`` where all weights were trained.
    """
    pipeline.unlearn_arm(SOLUTION_ARM)
    policy, folder = pipeline.policy, pipeline.dir
    saved, other = (folder / name for name in (("adapter", "model") if policy.has_adapter else ("model", "adapter")))
    save_model(policy, RunRecords.load(folder), saved)
    delete_saved(other)  # of an earlier solution
    if merged and pipeline.config.model.save_merged and policy.has_adapter:
        save_merged(policy, folder / "merged")
    elif merged:
        delete_saved(folder / "merged")
    return saved


PAGES = ("report.html", "candidates.csv")
NEUTRAL = {  # options that change no number
    "": ("output_dir", "token_budget", "provenance"),
    "model": ("device", "save_merged"),
    "unlearn": ("report_to", "save_minutes", "save_steps"),
    "evaluation": ("samples_shown",),
}


def begin(pipeline: Pipeline) -> None:
    """Write ``partition.json`` and ``run.yaml``, from which everything that follows in the directory is made.

    Where others stood there, the results made from them are removed, and records of earlier stages are left out of
    reports until a stage finds them up to date: no page shows options beside numbers of other ones.

    Args:
        pipeline: the run.
    """
    config, folder, fingerprint = pipeline.config, pipeline.dir, pipeline.partition.fingerprint
    path = folder / "run.yaml"
    if path.is_file() and _numbers_in(path) != _numbers(_tree(config, fingerprint)):
        pipeline.store.doubt()
        pipeline.store.remove("evaluation", "robustness", "summary")
        for name in PAGES:
            (folder / name).unlink(missing_ok=True)
    pipeline.partition.save(folder / "partition.json")
    write_run_yaml(config, path, fingerprint)


def _numbers_in(path: Path) -> dict[str, Any] | None:
    """The same of a ``run.yaml``; None where it cannot be read."""
    try:
        return _numbers(read_yaml(path)[0])
    except ConfigError:
        return None


def _numbers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change a number, and the fingerprint of the data."""
    found = {name: value for name, value in tree.items() if name not in NEUTRAL[""]}
    for name, neutral in NEUTRAL.items():
        section = found.get(name)
        if isinstance(section, Mapping):
            found[name] = {option: value for option, value in section.items() if option not in neutral}
    provenance = tree.get("provenance")
    found["data"] = [found.get("data"), provenance.get("data_fingerprint") if isinstance(provenance, Mapping) else None]
    return found


def write_run_yaml(config: RunConfig, path: Path, fingerprint: str) -> None:
    """Write the resolved options with their provenance; ``u2a run run.yaml`` replays the run.

    Args:
        config: all options.
        path: where to.
        fingerprint: of the partition.
    """
    write_whole(path, yaml.safe_dump(_tree(config, fingerprint), sort_keys=False, allow_unicode=True))


def _tree(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    sets = [item.model_copy(update={"path": _absolute_path(item.path)}) for item in config.evaluation.prompt_sets]
    evaluation = config.evaluation.model_copy(update={"prompt_sets": sets})
    changes = {"data": _absolute(config.data), "evaluation": evaluation}
    tree = config.model_copy(update=changes).model_dump(mode="json")
    tree["provenance"] = {
        "versions": versions(),
        "git": _git(),
        "device": str(pick_device("auto")) if config.model.device == "auto" else config.model.device,
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, {platform.system()}",
        "seed": config.seed,
        "data_fingerprint": fingerprint,
    }
    return tree


def versions() -> Mapping[str, str]:
    """Versions of Python and of the packages a result depends on.

    Returns:
        Version by name.
    """
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _absolute(data: DataSection) -> DataSection:
    """Paths that mean the same from the run's directory."""
    changes = {name: _absolute_path(value) for name in SOURCES if (value := getattr(data, name))}
    return data.model_copy(update=changes)


def _absolute_path(value: str) -> str:
    return str(Path(value).absolute()) if is_path(value) else value


def _processor() -> str:
    """Name of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit of the working copy u2a runs from, or None when it is installed without one."""
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, check=True)
        return done.stdout.decode("utf-8", "replace").strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
