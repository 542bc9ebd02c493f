"""One call from data to an aligned model and a report: what a run writes, and the Python entry ``align``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from u2a.arms import arms_of
from u2a.artifacts import begin, save_model, save_result, write_summary
from u2a.batch_size import memory_for, told_to
from u2a.candidates_csv import write_candidates
from u2a.checkpoint import delete, refuse_foreign_directory, refuse_foreign_files
from u2a.config import PartitionSection, RunConfig
from u2a.console import evaluation_table, reliability_text, samples_text, selection_text
from u2a.content_hash import content_hash
from u2a.data import Source
from u2a.early_checks import check_output_dir, check_relearning
from u2a.errors import ConfigError, ModelError, Stopped
from u2a.evaluation_stage import EvaluationStage
from u2a.model_loading import pick_device
from u2a.modeling import Policy
from u2a.pipeline import Pipeline
from u2a.progress import Console
from u2a.record import sweep, write_whole
from u2a.report import write_report
from u2a.robustness.table import markdown as robustness_markdown
from u2a.run_lock import locked
from u2a.run_records import RunRecords
from u2a.shortages import without_retain_rows
from u2a.solution import ScoreTable, Solution


@dataclass(frozen=True)
class Result:
    """What a run gives back.

    Attributes:
        records: every record it wrote.
        policy: the policy, left at the aligned parameters.
        folder: where everything was written.
    """

    records: RunRecords
    policy: Policy
    folder: Path

    @property
    def model(self) -> nn.Module:
        """The aligned model (a PEFT model, unless all weights were trained)."""
        return self.policy.model

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every unlearned answer by id, summing to 1."""
        return self.records.solution.weights if self.records.solution else {}

    @property
    def verdict(self) -> str:
        """Whether selection beat a random draw of equal size."""
        return self.records.evaluation.verdict if self.records.evaluation else ""

    @property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        return self.records.summary

    def report(self, path: str | Path) -> Path:
        """Write the report.

        Args:
            path: an ``.html`` file.

        Returns:
            The path.
        """
        return write_report(self.records, path)

    def save(self, folder: str | Path) -> Path:
        """Save adapter (or model), tokenizer and model card.

        Args:
            folder: a new or empty directory, or one that was saved this way, which is replaced.

        Returns:
            The directory.

        Raises:
            ConfigError: it holds other files.
        """
        refuse_foreign_files(Path(folder))
        return save_model(self.policy, self.records, Path(folder))


def run(config: RunConfig, console: Console | None = None) -> Result:
    """Run all stages, write every output into ``output_dir`` and print the result.

    Args:
        config: all options.
        console: progress; None prints to standard error.

    Returns:
        Records and the aligned model.

    Raises:
        ConfigError: no model is named. Any other :class:`~u2a.errors.U2AError` of a stage passes through.
    """
    if not config.model.name_or_path:
        raise ConfigError("model.name_or_path: not set (a hub id, a directory, or package:NAME)")
    return finish(Pipeline(config, console or Console()))


def align(
    model: str | PreTrainedModel,
    forget: Source | None,
    preferences: Source,
    retain: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: RunConfig | None = None,
    console: Console | None = None,
) -> Result:
    """Align a model by unlearning: three lines from data to an adapter.

    Args:
        model: hub id, directory, ``package:NAME``, or a loaded model of transformers.
        forget: bad answers: a path, ``hub:NAME``, a dataset or a list of dicts in TRL's formats; None takes the
            rejected answers of a share of ``preferences``.
        preferences: preference pairs, cut by prompt into the PA set, pairs for reward heads and held-out pairs.
        retain: ordinary instructions with good answers; None leaves the retain term and the guard out.
        tokenizer: needed with a loaded model, unless it can be loaded from its ``name_or_path``.
        config: further options; None takes the defaults. Without a partition section the cut has the
            shares 0 : 60 : 15 : 25 (35 : 30 : 15 : 20 without ``forget``) for forget, preference, reward, evaluation.
        console: progress; None prints to standard error.

    Returns:
        Records, the aligned model, and ``report(path)``.

    Raises:
        ConfigError: a loaded model together with ``finetune.enabled``.
        ModelError: a loaded model without a tokenizer. Any other :class:`~u2a.errors.U2AError` passes through.
    """
    config = config or RunConfig()
    if "partition" not in config.model_fields_set:
        config = config.model_copy(update={"partition": _shares(forget is not None)})
    if retain is None and config.data.retain is None:
        config = config.model_copy(update={"unlearn": without_retain_rows(config.unlearn, "give `retain`")})
    given = {"pairs": preferences, "forget": forget, "retain": retain}
    paths = {name: str(source) for name, source in given.items() if isinstance(source, str | Path)}  # kept in run.yaml
    sources = {name: source for name, source in given.items() if source is not None and name not in paths}
    config = config.model_copy(update={"data": config.data.model_copy(update=paths)})
    name = model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or "model object")
    config = config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": name})})
    if not isinstance(model, str) and config.finetune.enabled:
        raise ConfigError("finetune.enabled needs a model given by name (the misaligned start changes its weights)")
    if isinstance(model, str):
        return finish(Pipeline(config, console or Console(), sources, tokenizer=tokenizer))
    if tokenizer is None and not Path(name).is_dir():
        raise ModelError("tokenizer is missing (a loaded model needs tokenizer=...)")
    return finish(Pipeline(config, console or Console(), sources, model, tokenizer))


def _shares(has_forget: bool) -> PartitionSection:
    """Shares of :func:`align`: with candidates of the caller's own none are cut from the preference pairs."""
    shares = (0.0, 0.60, 0.15, 0.25) if has_forget else (0.35, 0.30, 0.15, 0.20)
    forget, preference, reward, evaluation = shares
    return PartitionSection(
        forget_frac=forget, preference_frac=preference, reward_frac=reward, evaluation_frac=evaluation
    )


def finish(pipeline: Pipeline) -> Result:
    """Run every stage of a pipeline and write what a run writes.

    Args:
        pipeline: the run.

    Returns:
        Records and the aligned model.
    """
    with _at_work(pipeline):
        return _all_stages(pipeline)


@contextmanager
def _at_work(pipeline: Pipeline) -> Iterator[None]:
    """Work in the run's directory alone; a stop says what is saved there."""
    refuse_foreign_directory(pipeline.dir)
    check_output_dir(pipeline.config)
    with locked(pipeline.dir, pipeline.console.say), told_to(pipeline.store.note_smaller_batches):
        sweep(pipeline.dir)
        try:
            with memory_for(str(pipeline.config.model.name_or_path)):
                yield
        except Stopped as error:
            names = pipeline.store.finished()
            saved = f"finished and saved in {pipeline.dir}: {', '.join(names) or 'nothing yet'}"
            raise Stopped(error.signum, saved) from None


def _all_stages(pipeline: Pipeline) -> Result:
    config, console, folder = pipeline.config, pipeline.console, pipeline.dir
    evaluation = EvaluationStage(pipeline)  # reads and checks all data before any model is loaded
    pick_device(config.model.device)
    begin(pipeline)
    pipeline.rewards()
    solution = _solved(pipeline)
    for arm in arms_of(config):  # the solution first: its inner run is often the last one of the selection
        pipeline.unlearn_arm(arm)
    table = evaluation.table()
    write_summary(pipeline, table)
    save_result(pipeline, merged=True)
    records = RunRecords.load(folder)
    with console.phase("report"):
        path = write_report(records, folder / "report.html")
        write_candidates(records, folder / "candidates.csv")
    delete(folder / "checkpoints")  # all of it is in the results now
    for text in (
        selection_text(solution),
        evaluation_table(table),
        samples_text(table, config.evaluation.samples_shown),
        f"Verdict: {table.verdict}",
        f"Report: {path}",
        f"Content hash: {content_hash(records)}",
    ):
        console.result(text)
        console.result()
    return Result(records, pipeline.policy, folder)


def _solved(pipeline: Pipeline) -> Solution:
    """The solution; how far its gains can be believed is said before anything is chosen by them."""
    told: list[ScoreTable] = []

    def tell(table: ScoreTable) -> None:
        pipeline.console.result(reliability_text(table.reliability))
        told.append(table)

    solution = pipeline.solution(tell)
    if not told:  # chosen by an earlier process
        tell(solution.scores)
    return solution


def run_stage(config: RunConfig, stage: str, console: Console, attacked: bool = False) -> None:
    """Run one stage on the records of the earlier ones, and print what it found.

    Args:
        config: all options.
        stage: ``partition``, ``reward``, ``score``, ``solve``, ``unlearn``, ``evaluate`` or ``robustness``.
        console: progress and results.
        attacked: the result is attacked next (``robustness``), so what that needs is checked, too.

    Raises:
        ConfigError: no model is named. A missing record is a :class:`~u2a.errors.RecordError`.
    """
    if not config.model.name_or_path:
        raise ConfigError("model.name_or_path: not set (a hub id, a directory, or package:NAME)")
    pipeline = Pipeline(config, console, only=stage)
    with _at_work(pipeline):
        if attacked:
            check_relearning(config, pipeline.partition)
        _one_stage(pipeline, stage)


def _one_stage(pipeline: Pipeline, stage: str) -> None:
    config, console = pipeline.config, pipeline.console
    if stage in ("unlearn", "evaluate", "robustness"):  # outdated records are refused before anything is changed
        pipeline.solution()
    elif stage in ("score", "solve"):
        pipeline.rewards()
    begin(pipeline)
    if stage == "partition":
        return
    if stage == "reward":
        table = pipeline.rewards()
        console.result("no reward model (reward.model: none)" if table is None else f"{len(table.rows)} rewards")
    elif stage == "score":
        console.result(reliability_text(pipeline.scores().reliability))
    elif stage == "solve":
        console.result(selection_text(_solved(pipeline)))
    elif stage == "unlearn":
        for arm in arms_of(config):
            pipeline.unlearn_arm(arm)
        console.result(f"saved: {save_result(pipeline, merged=True)}")
    elif stage == "robustness":
        table = EvaluationStage(pipeline).robustness()
        text = robustness_markdown(table)
        write_whole(pipeline.dir / "robustness.md", text)
        console.result(text)
        save_result(pipeline)  # its card knows of the attacks now
        write_report(RunRecords.load(pipeline.dir), pipeline.dir / "report.html")
    else:
        table = EvaluationStage(pipeline).table()
        write_summary(pipeline, table)
        save_result(pipeline)  # its card has the results now
        console.result(evaluation_table(table))
        console.result(f"Verdict: {table.verdict}")
