"""``--dry-run``: what a run will do and cost, before it does anything expensive; nothing is written.

The data are read, cut and checked as in the run, so that every error of theirs appears. If the model fits into the
free memory by formula, it is loaded and each way of computing is tried on real rows; else its shapes alone are made,
on the meta device, and no time is told.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from u2a.config import RunConfig
from u2a.config_reward import RewardSection
from u2a.early_checks import VERDICTS
from u2a.encoding import Encoder
from u2a.errors import ConfigError, ModelError
from u2a.evaluation_stage import EvaluationStage
from u2a.forecast.flops import sizes_of
from u2a.forecast.lighter import advice
from u2a.forecast.outputs import files_of
from u2a.forecast.phases import Basis, Forecast, phase_costs, with_formulas
from u2a.forecast.probe import Probe
from u2a.forecast.reward_probe import RewardCost, files_bytes, probe_reward
from u2a.forecast.text import notes_on, size_text
from u2a.forecast.workload import Workload
from u2a.free_memory import device_free_bytes, resident_bytes
from u2a.model_loading import pick_device, shapes_of
from u2a.modeling import Policy
from u2a.packaged import cache_dir, is_converted
from u2a.pipeline import Pipeline
from u2a.progress import Console


def dry_run(config: RunConfig, console: Console) -> Forecast:
    """Tell what a run will cost.

    Args:
        config: all options.
        console: progress, and what is found in the data.

    Returns:
        The forecast; nothing was written, but for temporary files that are gone.

    Raises:
        ConfigError: no model is named. Errors of the data and of the model's files are those of the run.
    """
    if not config.model.name_or_path:
        raise ConfigError("model.name_or_path: not set (a hub id, a directory, or package:NAME)")
    with _aside(config) as elsewhere:
        pipeline = Pipeline(elsewhere, console)
        evaluation = EvaluationStage(pipeline)  # reads and checks all data
        encoder = Encoder(pipeline.tokenizer, config.data.max_length)
        workload = Workload(config, pipeline.partition, encoder, evaluation.prompt_sets, evaluation.holdout)
        shapes = shapes_of(config.model, config.seed)
        sizes = sizes_of(shapes, config.model.load_in_4bit)
        device, why_not = _device(config)
        free = None if device is None else device_free_bytes(str(device))
        if free is not None and device is not None and device.type != "cuda":
            free += resident_bytes()  # what this process holds already is part of the peak
        gpu = config.model.device.startswith("cuda") if device is None else device.type == "cuda"
        basis = Basis(workload, sizes, None, {}, console.seconds, workload.n_directions, gpu)
        needed = with_formulas(basis)
        if not why_not and free is not None and needed > free:
            why_not = f"the model does not fit into the free memory ({size_text(needed)} of {size_text(free)})"
        if not why_not:
            basis = _probed(basis, pipeline, config, console)
        files = files_of(workload, sizes, shapes, pipeline.tokenizer)
    phases = phase_costs(basis)
    measured = basis.measured
    peak = needed if measured is None else max(phase.peak_bytes or 0 for phase in phases)
    fits = None if free is None else peak <= free
    seconds = [phase.seconds for phase in phases if phase.seconds is not None]
    return Forecast(
        model=config.model.name_or_path,
        device=str(device) if device is not None else config.model.device,
        parameters=sizes.parameters,
        trainable=sizes.trainable,
        measured=measured is not None,
        phases=tuple(phases),
        seconds=sum(seconds) if measured is not None else None,
        peak_bytes=peak,
        free_bytes=free,
        fits=fits,
        counted={} if measured is None else {k: u.counted for k, u in measured.units.items() if u.counted is not None},
        advice=() if fits else tuple(advice(basis, shapes)),
        notes=tuple(notes_on(why_not, phases)),
        files=tuple(files),
        output_dir=config.output_dir,
    )


@contextmanager
def _aside(config: RunConfig) -> Iterator[RunConfig]:
    """Options whose output, and whose converted models, go into a folder that vanishes."""
    names = (config.model.name_or_path, config.reward.name_or_path, config.reward.eval_name_or_path)
    with tempfile.TemporaryDirectory(prefix="u2a-") as folder:
        before = os.environ.get("U2A_CACHE")
        if not all(is_converted(name) for name in names):
            cache = Path(folder) / "cache"
            cache.mkdir()
            for known in cache_dir().iterdir() if cache_dir().is_dir() else ():
                (cache / known.name).symlink_to(known.resolve())
            os.environ["U2A_CACHE"] = str(cache)
        aside, verdicts = Path(folder) / "run", Path("cache") / VERDICTS
        if (Path(config.output_dir) / verdicts).exists():  # the judge has replied before: its key is not asked for
            (aside / verdicts).parent.mkdir(parents=True)
            (aside / verdicts).touch()
        try:
            yield config.model_copy(update={"output_dir": str(aside)})
        finally:
            if before is None:
                os.environ.pop("U2A_CACHE", None)
            else:
                os.environ["U2A_CACHE"] = before


def _device(config: RunConfig) -> tuple[torch.device | None, str]:
    """The device of the run, and why nothing can be tried on it (or an empty text)."""
    try:
        device = pick_device(config.model.device)
    except ModelError as error:
        return None, str(error)
    if config.model.load_in_4bit and device.type != "cuda":
        return device, "model.load_in_4bit needs a GPU"
    return device, ""


def _probed(basis: Basis, pipeline: Pipeline, config: RunConfig, console: Console) -> Basis:
    """Load everything as the run does, and try it."""
    rewards: dict[str, RewardCost] = {}
    device, sets = pick_device(config.model.device), pipeline.partition
    read = sets.reward or sets.preference or sets.evaluation  # a pretrained model needs no pairs of its own
    with console.phase("probe of the reward models"):
        for role, section in _reward_models(config).items():
            files = files_bytes(section.name_or_path)
            free = device_free_bytes(str(device))
            if files is not None and (free is None or files < free):
                rewards[role] = probe_reward(section, read, device, config.data.max_length)
    policy = Policy(
        pipeline.base_model(),
        pipeline.tokenizer,
        config.model.adapter,
        config.data.max_length,
        config.token_budget,
        config.seed,
    )
    old = basis.workload
    workload = Workload(config, old.partition, policy.encoder, old.prompt_sets, old.holdout)
    sizes = sizes_of(policy.model)
    with console.phase("probe of the policy"):
        measured = Probe(policy, workload, sizes).measure()
    fixed = dict(console.seconds) | {"reward model": sum(cost.load_s for cost in rewards.values())}
    return replace(basis, workload=workload, sizes=sizes, measured=measured, rewards=rewards, fixed_s=fixed)


def _reward_models(config: RunConfig) -> dict[str, RewardSection]:
    """Reward models of their own, by the kind of work in the workload."""
    section = config.reward
    given = {
        "reward model": (section.model, section.name_or_path),
        "eval reward model": (section.eval_model, section.eval_name_or_path),
        "second reward model": (section.second_model, section.second_name_or_path),
    }
    return {
        role: section.model_copy(update={"model": model, "name_or_path": path})
        for role, (model, path) in given.items()
        if model not in ("none", "implicit")
    }
