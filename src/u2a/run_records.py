"""Everything a run wrote, read back and joined: what the report and the model card are made from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from u2a.config import RunConfig
from u2a.config_file import all_options, load_config
from u2a.console import FALLBACK_SENTENCES, number
from u2a.errors import RecordError
from u2a.record import Record, one_line, refuse_foreign_link
from u2a.robustness.records import RobustnessTable
from u2a.shortages import count_prompts
from u2a.solution import ScoreTable, Solution
from u2a.types import EvalTable, Partition, RewardTable, UnlearnResult
from u2a.yaml_file import read_yaml

AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class RunRecords:
    """Everything a run has written so far; a stage that has not run is None or empty.

    Attributes:
        config: options of the run.
        partition: the sets.
        rewards: stage 2.
        scores: the first scoring of all candidates.
        solution: stage 3.
        unlearn: stage 4, by arm.
        evaluation: stage 5.
        robustness: the attacks on the result.
        summary: ``seconds`` (wall seconds by phase), ``peak_rss_bytes``, ``provenance`` and whatever else the
            run noted about itself.
    """

    config: RunConfig
    partition: Partition
    rewards: RewardTable | None
    scores: ScoreTable | None
    solution: Solution | None
    unlearn: dict[str, UnlearnResult]
    evaluation: EvalTable | None
    robustness: RobustnessTable | None
    summary: dict[str, Any]

    @classmethod
    def load(cls, run_dir: str | Path) -> RunRecords:
        """Read the records in a run's directory.

        Args:
            run_dir: directory with ``run.yaml``, ``partition.json`` and the records of the stages that ran.

        Returns:
            The records; ``summary`` gains the provenance noted in ``run.yaml`` unless it has its own.

        Raises:
            RecordError: ``run.yaml`` or ``partition.json`` is missing, or a record is damaged.
            ConfigError: ``run.yaml`` is not a valid configuration.
        """
        folder = Path(run_dir)
        if not (folder / "run.yaml").is_file():
            raise RecordError(f"{folder}: no run.yaml there (expected the output directory of a run)")
        noted = read_yaml(folder / "run.yaml")[0]
        config = load_config(folder / "run.yaml")
        names = ["u2a", *config.evaluation.controls]
        doubted = _doubted(folder)
        paths = [folder / f"{name}.json" for arm in names if (name := f"unlearn_{arm}") not in doubted]
        arms = [UnlearnResult.load(path) for path in paths if path.exists()]

        def load(kind: type[AnyRecord], name: str) -> AnyRecord | None:
            return None if name in doubted else _load_if_there(kind, folder / f"{name}.json")

        return cls(
            config=config,
            partition=Partition.load(folder / "partition.json"),
            rewards=None if config.reward.model == "none" else load(RewardTable, "rewards"),
            scores=load(ScoreTable, "scores"),
            solution=load(Solution, "solution"),
            unlearn={record.arm: record for record in arms},
            evaluation=_load_if_there(EvalTable, folder / "evaluation.json"),
            robustness=_load_if_there(RobustnessTable, folder / "robustness.json"),
            summary={"provenance": noted.get("provenance") or {}} | _read_summary(folder / "summary.json"),
        )

    @property
    def last_scores(self) -> ScoreTable | None:
        """The scoring by which the selection was made, or the first one when nothing was selected yet."""
        return self.solution.scores if self.solution else self.scores


def _doubted(folder: Path) -> set[str]:
    """Records of options that have changed since, and that no stage has found up to date again."""
    path = folder / "stages.json"
    refuse_foreign_link(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name for name, entry in found.items() if entry.get("doubted")}
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        reason = one_line("; ".join(str(error).splitlines()))
        raise RecordError(f"{path}: unreadable ({reason}); delete it to run every stage again") from None


@dataclass(frozen=True)
class Candidate:
    """One row of the candidate table."""

    id: str
    kind: str | None
    weight: float | None
    gain: float | None
    se: float | None
    reward: float | None
    prompt: str
    answer: str
    reason: str


def what_was_done(records: RunRecords) -> str:
    """Say in one or two sentences what the run did.

    Args:
        records: what the run wrote.

    Returns:
        Plain text.
    """
    solution, total = records.solution, len(records.partition.forget)
    if solution is None:
        return f"{total} candidates; none selected yet."
    names, n = solution.scores, len(solution.weights)
    effect = f"predicted effect on {names.objective} (adjoint {names.adjoint}, estimator {names.estimator})"
    if solution.fallback == "empty":
        return f"None of {total} candidates selected by their {effect}: nothing is unlearned."
    text = f"{n} of {total} candidates selected and weighted by their {effect}"
    if solution.fallback == "random_k":
        text = f"{n} of {total} candidates drawn at random, with equal weights, for want of a signal in their {effect}"
    result = records.unlearn.get("u2a")
    if result is None:
        return f"{text}; not unlearned yet."
    text += f", then unlearned with {result.loss} for {result.steps_kept} of {result.steps} steps"
    if result.retain_ppl_start is not None and result.retain_ppl_end is not None:
        text += f"; retain perplexity {number(result.retain_ppl_start)} to {number(result.retain_ppl_end)}"
    return f"{text}."


def cautions(records: RunRecords) -> list[str]:
    """List what a reader must know before trusting the numbers.

    Args:
        records: what the run wrote.

    Returns:
        Complete sentences; empty when nothing stands out.
    """
    found = []
    if records.solution and records.solution.fallback != "none":
        found.append(FALLBACK_SENTENCES[records.solution.fallback])
    for arm, result in records.unlearn.items():
        if result.breached:
            remedy = (
                f"its change was scaled by {number(result.scale)}"
                if result.scale < 1
                else f"it was rolled back to step {result.steps_kept}"
            )
            found.append(f"Arm {arm} exceeded the utility budget: {remedy}.")
    table = records.evaluation
    if table:
        found += [f"Arm {arm} has collapsed ({kind.replace('_', ' ')})." for arm, kind in table.collapsed.items()]
        if not table.samples:
            found.append("No answer was generated, so whether a model has collapsed was not checked.")
    sets = records.partition
    if not sets.retain_measured and 0 < count_prompts(sets.retain) < 5:
        found.append("Retain rows on fewer than five prompts: the same ones train, guard and evaluate.")
    for leak in records.partition.leaks:
        found.append(f"{leak.count} rows of {leak.first} stand in {leak.second} too (same {leak.level}).")
    if records.config.data.allow_leak:
        found.append("Copies of evaluation rows in other sets were allowed (data.allow_leak).")
    solves = records.last_scores.solve if records.last_scores else ()
    short = [item for item in solves if item.status in ("max_steps", "negative_curvature")]
    if short:
        found.append(f"{len(short)} of {len(solves)} linear solves did not converge as asked.")
    if records.config.model.trust_remote_code:
        found.append("Code shipped with the model was run (model.trust_remote_code).")
    return found


def candidates(records: RunRecords) -> list[Candidate]:
    """Join the records of every candidate.

    Args:
        records: what the run wrote.

    Returns:
        Rows by falling weight, then falling gain; ties in the order of the forget set.
    """
    weights = {row.id: row for row in records.solution.rows} if records.solution else {}
    gains = {row.id: row for row in records.last_scores.rows} if records.last_scores else {}
    rewards = {row.id: row.reward for row in records.rewards.rows} if records.rewards else {}
    rows = []
    for item in records.partition.forget:
        weight, gain = weights.get(item.id), gains.get(item.id)
        rows.append(
            Candidate(
                id=item.id,
                kind=item.kind,
                weight=weight.weight if weight else None,
                gain=gain.gain if gain else None,
                se=gain.gain_se if gain else None,
                reward=rewards.get(item.id),
                prompt=item.prompt[-1].content if item.prompt else "",
                answer=item.completion,
                reason=weight.reason if weight else "",
            )
        )
    return sorted(rows, key=lambda row: (-(row.weight or 0.0), -math.inf if row.gain is None else -row.gain))


def option_rows(config: RunConfig) -> list[tuple[str, str, str, bool]]:
    """List every option with its value.

    Args:
        config: options of the run.

    Returns:
        Dotted name, value, default and whether they differ, in the order of declaration.
    """
    values, defaults = dict(_leaves(config)), dict(_leaves(RunConfig()))
    names = all_options()
    return [(name, str(values[name]), str(defaults[name]), values[name] != defaults[name]) for name in names]


def flattened(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Turn nested dictionaries into rows.

    Args:
        tree: dictionaries of anything.
        prefix: dotted name of ``tree``.

    Returns:
        Dotted names and values as text.
    """
    if not isinstance(tree, dict):
        return [(prefix, str(tree))]
    return [row for key, value in tree.items() for row in flattened(value, f"{prefix}.{key}" if prefix else str(key))]


def _leaves(section: BaseModel, prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted names and values of all options of a section."""
    out: list[tuple[str, Any]] = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        out += _leaves(value, f"{prefix}{key}.") if isinstance(value, BaseModel) else [(f"{prefix}{key}", value)]
    return out


def _load_if_there(kind: type[AnyRecord], path: Path) -> AnyRecord | None:
    return kind.load(path) if path.exists() else None


def _read_summary(path: Path) -> dict[str, Any]:
    """Return the run's own notes, or nothing when it has not ended."""
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: unreadable ({error}); delete it and run the pipeline again") from None
    if not isinstance(summary, dict):
        raise RecordError(f"{path}: holds a {type(summary).__name__}, expected an object")
    return summary
