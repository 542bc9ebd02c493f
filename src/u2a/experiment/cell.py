"""One cell: an arm on one (task, seed) with one trial, measured at every level of the budget."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from u2a import __version__
from u2a.config import RunConfig
from u2a.environment import code_text, libraries_text, machine_text
from u2a.errors import NonFiniteError, Stopped
from u2a.evaluation.arm import ArmResult, Instruments
from u2a.experiment.arm import Arm, Selection, Track, Trained
from u2a.experiment.measured import (
    AtEqualPpl,
    Measured,
    measure_at_equal_ppl,
    measure_policy,
    measured_of,
    retain_ppl,
)
from u2a.experiment.meter import Meter, Spent
from u2a.experiment.protocol import decisive
from u2a.experiment.setting import Setting, Split
from u2a.modeling import Policy
from u2a.record import Record, Row, content_id, one_line
from u2a.signals import stopping
from u2a.solution import Reliability
from u2a.types import StepLog


class LevelResult(Row):
    """An arm at one level of the budget.

    Attributes:
        level: in units of one GA pass over all candidates.
        reached: whether so much was spent; False where the arm ended by itself before.
        steps: optimiser steps taken.
        spent: compute by phase, evaluation left out; at least the level where ``reached``.
        full: whether answers were generated.
        untrained: whether the policy stood at theta_0.
        measured: what was measured.
        equal: the same with the change scaled to the utility budget; None where not asked for, or not possible.
    """

    level: float
    reached: bool
    steps: int
    spent: Spent
    full: bool
    untrained: bool
    measured: Measured
    equal: AtEqualPpl | None = None

    @property
    def at_equal_ppl(self) -> Measured | None:
        """What was measured at the utility budget, or None."""
        return None if self.equal is None else self.equal.measured or self.measured


class CellResult(Record):
    """What one cell found; a failed one says why, with the levels it had passed before.

    Attributes:
        key: hash of everything it was computed from.
        task, arm, method, track: which cell.
        seed: of everything random.
        split: whose prompts were measured: ``test``, or ``dev`` for tuning.
        trial: number of the trial in the arm's grid.
        values: its hyperparameters.
        status: ``ok``; ``diverged`` (a number was not finite); ``failed`` (anything else).
        error: the error in one line; empty when ok.
        note: what a reader of the table must know; else empty.
        steps: optimiser steps in all.
        unit_flops: FLOPs of one unit of the budget.
        levels: by level, rising.
        spent: compute of the whole cell by phase, evaluation left out.
        weights: weight by selected candidate; None for an arm that selects nothing.
        reliability: of the gains it ranked by, or None.
        fallback: what it did instead of ranking, or ``none``.
        history: logged steps.
        seconds: wall seconds with evaluation.
        version: of u2a.
        machine: that ran it, in one line; empty where that was not recorded.
        libraries: it ran with, likewise.
        code: hash of the package's sources, likewise: a key holds the version, not every change between two versions.
    """

    key: str
    task: str
    arm: str
    method: str
    track: Track
    seed: int
    split: Split
    trial: int
    values: dict[str, float]
    status: Literal["ok", "diverged", "failed"]
    error: str = ""
    note: str = ""
    steps: int = 0
    unit_flops: int
    levels: tuple[LevelResult, ...] = ()
    spent: Spent = Spent()
    weights: dict[str, float] | None = None
    reliability: Reliability | None = None
    fallback: Literal["none", "random_k", "empty"] = "none"
    history: tuple[StepLog, ...] = ()
    seconds: float = 0.0
    version: str = __version__
    machine: str = ""
    libraries: str = ""
    code: str = ""


@dataclass(frozen=True)
class Cell:
    """What is to be run.

    Attributes:
        task: name of the task.
        arm: name of the arm.
        method: name of its method.
        config: the task's options with the arm's changes and the seed.
        split: whose prompts are measured.
        dev_frac: share of evaluation prompts that only tuning reads.
        trial: number of the trial.
        values: its hyperparameters.
        levels: of the budget, rising.
        full: levels at which answers are generated.
        setting: name of the setting's folder, with the hash of all that made it.
        equal_ppl_frac: how far retain perplexity may rise where full levels are measured once more with the change
            scaled down, as a share of the start's; None: not measured.
    """

    task: str
    arm: str
    method: str
    config: RunConfig
    split: Split
    dev_frac: float
    trial: int
    values: Mapping[str, float]
    levels: tuple[float, ...]
    full: tuple[float, ...]
    setting: str = ""
    equal_ppl_frac: float | None = None

    @property
    def name(self) -> str:
        """A readable name without spaces, unique in an experiment."""
        return f"{self.task}.{self.arm}.s{self.config.seed}.t{self.trial}"

    def key(self) -> str:
        """Hash everything the result depends on: data, options, trial, levels and measurement, not the arm's name.

        Returns:
            16 hexadecimal digits.
        """
        rest: list[Any] = [self.method, self.split, self.dev_frac, dict(self.values), self.levels, self.full]
        rest += [self.setting]
        rest += [] if self.equal_ppl_frac is None else [self.equal_ppl_frac]
        return content_id(json.dumps([decisive(self.config), *rest, __version__], sort_keys=True))


@dataclass
class Course:
    """The budget of one cell: it measures the policy whenever a level has been passed.

    Attributes:
        meter: what is spent.
        unit_flops: FLOPs of one unit.
        levels: rising.
        measure: measures the policy; told whether answers are wanted.
        full: levels at which they are.
        measure_equal: measures the setting's policy once more at the utility budget, or None.
        results: levels passed so far.
    """

    meter: Meter
    unit_flops: int
    levels: tuple[float, ...]
    measure: Callable[[Policy | None, bool], tuple[Measured, bool]]
    full: tuple[float, ...] = ()
    measure_equal: Callable[[Measured], AtEqualPpl | None] | None = None
    results: list[LevelResult] = field(default_factory=list)

    def left(self) -> bool:
        """Whether less than the largest level has been spent."""
        return self.meter.flops < self.levels[-1] * self.unit_flops

    def reached(self, steps: int = 0) -> None:
        """Measure the policy where levels were passed; see :meth:`u2a.experiment.arm.Budget.reached`."""
        stopping.check()
        spent = self.meter.flops
        self._measure([level for level in self._open() if spent >= level * self.unit_flops], steps)

    def finish(self, steps: int, policy: Policy | None = None) -> None:
        """Measure the final state for the levels that were not passed.

        Args:
            steps: steps taken.
            policy: what is measured in place of the setting's policy, or None.
        """
        self._measure(self._open(), steps, policy)

    def _open(self) -> list[float]:
        return list(self.levels[len(self.results) :])

    def _measure(self, levels: list[float], steps: int, policy: Policy | None = None) -> None:
        if not levels:
            return
        spent = self.meter.spent()
        with self.meter.paused():
            full = bool(set(levels) & set(self.full))
            measured, untrained = self.measure(policy, full)
            again = self.measure_equal if full and policy is None else None
            equal = None if again is None else again(measured)
        self.results += [
            LevelResult(
                level=level,
                reached=spent.total_flops >= level * self.unit_flops,
                steps=steps,
                spent=spent,
                full=full,
                untrained=untrained,
                measured=measured,
                equal=equal,
            )
            for level in levels
        ]


@dataclass(frozen=True)
class Bench:
    """Where a cell is run.

    Attributes:
        setting: data, options and policy.
        instruments: of the evaluation.
        start: measurement of the policy at theta_0, with answers.
        unit_flops: FLOPs of one unit of the budget.
    """

    setting: Setting
    instruments: Instruments
    start: ArmResult
    unit_flops: int


def run_cell(cell: Cell, arm: Arm, bench: Bench) -> CellResult:
    """Train the arm under its budget and measure it on the way.

    Args:
        cell: what is to be run.
        arm: its method.
        bench: where.

    Returns:
        The result, whether or not the arm came through.

    Raises:
        Stopped: the run was asked to stop; nothing is to be saved.
    """
    begin, meter = time.monotonic(), Meter()

    def measure(policy: Policy | None, full: bool) -> tuple[Measured, bool]:
        return _measure(cell, bench, policy, full)

    def measure_equal(measured: Measured) -> AtEqualPpl | None:
        return _measure_equal(cell, bench, measured)

    course = Course(meter, bench.unit_flops, cell.levels, measure, cell.full, measure_equal)
    outcome: dict[str, Any] = {"status": "ok"}
    try:
        trained = arm.train(bench.setting, cell.values, meter, course)
        outcome |= _outcome(trained)
        course.finish(trained.steps, trained.policy)
    except Stopped:
        raise
    except Exception as error:  # whatever an arm dies of belongs in the table
        status = "diverged" if isinstance(error, NonFiniteError) else "failed"
        outcome |= {"status": status, "error": one_line(f"{type(error).__name__}: {' '.join(str(error).split())}")}
    return CellResult(
        key=cell.key(),
        task=cell.task,
        arm=cell.arm,
        method=cell.method,
        track=arm.track,
        seed=cell.config.seed,
        split=cell.split,
        trial=cell.trial,
        values=dict(cell.values),
        unit_flops=bench.unit_flops,
        levels=tuple(course.results),
        spent=meter.spent(),
        seconds=round(time.monotonic() - begin, 3),
        machine=machine_text(),
        libraries=libraries_text(),
        code=code_text(),
        **outcome,
    )


def _outcome(trained: Trained) -> dict[str, Any]:
    selection = trained.selection or Selection({})
    return {
        "note": trained.note,
        "steps": trained.steps,
        "weights": None if trained.selection is None else selection.weights,
        "reliability": selection.reliability,
        "fallback": selection.fallback,
        "history": trained.history,
    }


def _measure(cell: Cell, bench: Bench, other: Policy | None, full: bool) -> tuple[Measured, bool]:
    """Measure the policy as it is; at theta_0 it is known already."""
    policy, setting = other or bench.setting.policy, bench.setting
    if other is None and float(policy.change_sq().detach()) == 0.0:
        return measured_of(bench.start, full), True
    section = cell.config.evaluation
    return measure_policy(policy, setting.partition, bench.instruments, section, setting.seed, full), False


def _measure_equal(cell: Cell, bench: Bench, measured: Measured) -> AtEqualPpl | None:
    """Measure the policy with its change scaled down to the common utility budget."""
    setting = bench.setting
    if cell.equal_ppl_frac is None or not setting.partition.retain_parts().evaluation:
        return None
    known = {0.0: retain_ppl(measured_of(bench.start, False)) or math.inf, 1.0: retain_ppl(measured) or math.inf}

    def measure(policy: Policy) -> Measured:
        section = cell.config.evaluation
        return measure_policy(policy, setting.partition, bench.instruments, section, setting.seed, True)

    return measure_at_equal_ppl(setting.policy, setting.partition, cell.equal_ppl_frac, known, measure)
