"""Which negatives matter, from plain files: the gain of each, without a run's directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from u2a.bilevel.outer_problem import OuterProblem, split_preference
from u2a.bilevel.solve import score
from u2a.config import RunConfig
from u2a.console import reliability_text
from u2a.doctor import examine
from u2a.early_checks import check_cluster_embedder
from u2a.encoding import Encoder, count_truncated
from u2a.errors import ConfigError, WriteError
from u2a.model_loading import load_model, load_tokenizer
from u2a.modeling import Policy
from u2a.partition import build_partition, left_out, read_inputs
from u2a.progress import Console
from u2a.record import derive_seed, write_whole
from u2a.reward.cluster import candidate_clusters
from u2a.shortages import without_retain_rows
from u2a.solution import ScoreTable
from u2a.types import Partition
from u2a.unlearn import InnerProblem


def score_files(model: str, files: Mapping[str, str], out: Path, config: RunConfig, console: Console) -> Path:
    """Only answer which negatives matter: score them and write one JSON line per negative, best first.

    Args:
        model: hub id, directory, or ``package:NAME``.
        files: paths by name of the option in ``data``: ``forget``, ``preferences``, and optionally ``retain``.
        out: the JSONL file.
        config: further options.
        console: progress.

    Returns:
        ``out``.

    Raises:
        ConfigError: no usable pair or negative, an option that needs what plain files lack, or an ``out`` that is no
            place to write. Any other :class:`~u2a.errors.U2AError` passes through.
    """
    _refuse_output(out, {"forget": config.data.forget, "retain": config.data.retain, **files})
    sets = _read(files, config)
    config = _fitting(config, sets, console)
    section = config.model.model_copy(update={"name_or_path": model})
    tokenizer = load_tokenizer(section)
    encoder = Encoder(tokenizer, config.data.max_length)
    inner, outer = _problems(config, sets)
    n_cut = count_truncated(sets, encoder)
    for line in [*left_out(sets), *examine(sets, encoder, allow_leak=config.data.allow_leak).lines()]:
        console.say(f"  {line}")
    console.say(
        f"{len(sets.forget)} negatives, {len(sets.preference)} pairs; {n_cut} answers cut off at data.max_length"
    )
    if (folds := len(split_preference(outer).folds)) < config.solve.folds:
        console.say(f"the pairs have {folds} prompts, so there are {folds} folds, not solve.folds={config.solve.folds}")
    policy = Policy(
        load_model(section), tokenizer, section.adapter, config.data.max_length, config.token_budget, config.seed
    )
    table = score(policy, inner, outer, console)
    _write(table, sets, out)
    console.result(reliability_text(table.reliability))
    console.result(f"{len(table.rows)} scores: {out}")
    return out


def _refuse_output(out: Path, inputs: Mapping[str, str | None]) -> None:
    """Refuse a place where the scores cannot be written, or would replace what they are made from."""
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a directory (name a file in it)")
    folder = next(place for place in out.absolute().parents if place.exists())
    if not folder.is_dir():
        raise ConfigError(f"--out: {out} cannot be written, {folder} is a file (name another place)")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out: {out} cannot be written, {folder} is read-only (name another place)")
    for name, path in inputs.items():
        if out.exists() and path is not None and Path(path).exists() and out.samefile(path):
            raise ConfigError(f"--out: {out} is the file of data.{name} (name another file)")


def _read(files: Mapping[str, str], config: RunConfig) -> Partition:
    """The sets; rows that were left out are named where nothing is left."""
    inputs = read_inputs(config.data, dict(files))
    sets = build_partition(inputs, config.partition, config.seed, config.data.allow_leak)
    if not sets.preference or not sets.forget:
        lacking = "preference pair" if not sets.preference else "negative"
        reasons = "; ".join(left_out(sets)) or "the files are empty"
        raise ConfigError(f"score: the files hold no usable {lacking} ({reasons})")
    return sets


def _fitting(config: RunConfig, sets: Partition, console: Console) -> RunConfig:
    """Options that plain files can serve; what cannot be served is refused before a model is loaded."""
    if config.solve.objective == "reward":
        raise ConfigError(
            "solve.objective: reward needs a reward model, which plain files do not name "
            "(give a configuration file with reward.model, or another objective)"
        )
    check_cluster_embedder(config)
    if sets.retain:
        return config
    if config.solve.damage_weight > 0.0:
        raise ConfigError(
            f"solve.damage_weight: {config.solve.damage_weight:g} needs retain rows (give --retain, or set it to 0)"
        )
    unlearn = without_retain_rows(config.unlearn, "give --retain")
    if unlearn != config.unlearn:
        console.say(f"no retain rows: the retain term {config.unlearn.retain_term} is left out (give --retain)")
    return config.model_copy(update={"unlearn": unlearn})


def _problems(config: RunConfig, sets: Partition) -> tuple[InnerProblem, OuterProblem]:
    """What is scored, and by what. No pair is held out: nothing is selected here."""
    inner = InnerProblem(
        sets.forget, sets.retain, (), config.unlearn, config.guard, derive_seed(config.seed, "unlearn")
    )
    seed = derive_seed(config.seed, "solve")
    solve = config.solve.model_copy(update={"heldout_frac": 0.0})
    return inner, OuterProblem(sets.preference, solve, None, seed, None, candidate_clusters(solve, sets.forget, seed))


def _write(table: ScoreTable, sets: Partition, out: Path) -> None:
    """Write one line per negative, best first."""
    by_id = {row.id: row for row in sets.forget}
    lines = []
    for row in sorted(table.rows, key=lambda row: (-row.estimate, row.id)):
        example = by_id[row.id]
        document = row.model_dump(mode="json") | {
            "prompt": example.prompt[-1].content,
            "completion": example.completion,
        }
        lines.append(json.dumps(document, ensure_ascii=False, allow_nan=False))
    try:
        write_whole(out, "\n".join(lines) + "\n")
    except WriteError as error:
        raise WriteError(error.path, error.reason, "the scores are lost (score again with another --out)") from None
