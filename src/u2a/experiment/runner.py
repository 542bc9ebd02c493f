"""Runs the cells of a protocol: any number of processes share a folder, and each cell is run once.

Order of work: the settings, the tuning cells of arms with several trials, and the main cells. A cell that waits for
another one is passed over until that is done. What is saved is never run again, so the same command goes on after a
stop.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch

from u2a.errors import U2AError
from u2a.evaluation.arm import Instruments
from u2a.experiment.cell import Bench, Cell, CellResult, run_cell
from u2a.experiment.claims import claimed
from u2a.experiment.frozen import fix
from u2a.experiment.methods import method
from u2a.experiment.plan import Plan, Slot, State
from u2a.experiment.protocol import Protocol, check_held_out, load_protocol
from u2a.experiment.setting import SettingRecord, Workplace, open_instruments, open_setting, prepare
from u2a.progress import Console
from u2a.signals import stopping, stops_on_signals
from u2a.terminal import hush_libraries

WAIT_S = 2.0  # between looks at what other processes have done


@dataclass
class Runner:
    """One process of an experiment.

    Attributes:
        plan: what is to be run.
        console: one line per cell.
        retry: results to be replaced by a new run: when each was written, by its file's name (:func:`failed_results`).
        processes: that work side by side, for the estimate of the time left.
    """

    plan: Plan
    console: Console
    retry: Mapping[str, int] = field(default_factory=dict)
    processes: int = 1
    _seconds: list[float] = field(default_factory=list)
    _instruments: tuple[Path, Instruments] | None = None

    def work(self) -> None:
        """Run until every cell is done, by this process or another one.

        Raises:
            Stopped: a signal asked for it; the cell at hand is run again next time.
        """
        left = self.plan.slots
        for slot in left:
            method(self.plan.protocol.arms[slot.arm].method)  # an unknown one is refused before anything is run
        total = len(left)
        while left:
            for slot in left:
                stopping.check()
                if self._try(slot, total - len(left), total):
                    left.remove(slot)  # and from the first one again: some may have waited for it
                    break
            else:
                time.sleep(WAIT_S)

    def _try(self, slot: Slot, done: int, total: int) -> bool:
        """Do what can be done for a slot; True when its cell is done."""
        cell = self.plan.cell(slot)
        if cell is None:
            return False
        if self._is_done(cell):
            return True
        place = self.plan.place(slot)
        if not place.record.exists() and not self._prepare(place):
            return False
        with claimed(self.plan.claim(cell.name)) as mine:
            if not mine:
                return False
            if not self._is_done(cell):  # else another process was faster
                self._run(cell, place, f"[{done + 1}/{total}]", total - done - 1)
        return True

    def _prepare(self, place: Workplace) -> bool:
        with claimed(self.plan.claim(place.folder.name)) as mine:
            if mine and not place.record.exists():
                self.console.say(f"setting {place.folder.name}")
                record = prepare(place, Console(quiet=True))
                self.console.say(f"setting {place.folder.name}: {sum(record.seconds.values()):.0f} s")
        return mine

    def _run(self, cell: Cell, place: Workplace, count: str, left: int) -> None:
        record = SettingRecord.load(place.record)
        setting = open_setting(place, cell.config, Console(quiet=True))
        bench = Bench(setting, self._opened(place), record.start, record.unit_flops)
        result = run_cell(cell, method(cell.method), bench)
        result.save(self.plan.path(cell))
        self._seconds.append(result.seconds)
        mean = sum(self._seconds) / len(self._seconds)
        state = result.status if result.status == "ok" else f"{result.status}: {result.error}"
        eta = f", about {_duration(mean * left / self.processes)} left" if left else ""
        self.console.say(f"{count} {cell.name} {state} ({result.seconds:.0f} s{eta})")

    def _opened(self, place: Workplace) -> Instruments:
        if self._instruments is None or self._instruments[0] != place.folder:
            self._instruments = place.folder, open_instruments(place)
        return self._instruments[1]

    def _is_done(self, cell: Cell) -> bool:
        path = self.plan.path(cell)
        return path.exists() and path.stat().st_mtime_ns != self.retry.get(path.name)


def failed_results(plan: Plan) -> dict[str, int]:
    """Find the results of cells that did not come through.

    Args:
        plan: names the folder.

    Returns:
        When each was written (nanoseconds), by its file's name; a new result of the cell is a later one.
    """
    files = sorted((plan.folder / "cells").glob("*.json"))
    return {path.name: path.stat().st_mtime_ns for path in files if CellResult.load(path).status != "ok"}


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60.0)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


@dataclass(frozen=True)
class Options:
    """How an experiment is run; none of it decides a number.

    Attributes:
        processes: that work side by side.
        only: names of arms, names of tasks and seeds; empty for all.
        retry_failed: run cells again that did not come through.
        new_protocol: go on although another protocol stands in the folder.
        quiet: print nothing but errors.
    """

    processes: int = 1
    only: tuple[str, ...] = ()
    retry_failed: bool = False
    new_protocol: bool = False
    quiet: bool = False


def run_experiment(path: str | Path, options: Options) -> Protocol:
    """Run every cell of a protocol that is not done yet.

    Args:
        path: the protocol's YAML file.
        options: how.

    Returns:
        The protocol.

    Raises:
        U2AError: a process failed. Errors of the protocol, the data and the models pass through.
    """
    protocol = load_protocol(path)
    check_held_out(protocol)
    fixed = fix(protocol, options.new_protocol)
    console = Console(quiet=options.quiet)
    plan = Plan(protocol, options.only)
    console.say(f"protocol {fixed.hash}, {len(plan.slots)} cells, in {protocol.output_dir}")
    retry = failed_results(plan) if options.retry_failed else {}
    if options.processes <= 1:
        Runner(plan, console, retry).work()
        return protocol
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(str(path), options, retry)) for _ in range(options.processes)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if stopping.requested is not None:
            for worker in workers:
                worker.terminate()
        for worker in workers:
            worker.join(0.2)
    stopping.check()
    if any(worker.exitcode for worker in workers):
        raise U2AError("experiment: a process failed (its message stands above; the same command goes on)")
    return protocol


def _worker(path: str, options: Options, retry: Mapping[str, int]) -> None:
    """What a process of several does; its messages go to the same terminal."""
    hush_libraries()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.processes))
    console = Console(quiet=options.quiet)
    with stops_on_signals():
        try:
            plan = Plan(load_protocol(path), options.only)
            Runner(plan, console, retry, options.processes).work()
        except U2AError as error:
            Console().say(f"u2a experiment: {error}")
            raise SystemExit(error.exit_status) from None


def list_cells(path: str | Path, only: Sequence[str] = ()) -> list[str]:
    """Describe the state of every cell of a protocol.

    Args:
        path: the protocol's YAML file.
        only: names of arms, names of tasks and seeds; empty for all.

    Returns:
        Lines, the last one with the totals.
    """
    found = list(Plan(load_protocol(path), tuple(only)).listed())
    width = max(len(item.name) for item in found)
    lines = []
    for item in found:
        seconds = "" if item.seconds is None else f"{item.seconds:8.0f} s"
        lines.append(f"{item.name:<{width}}  {item.state:<10}{seconds} {item.error}".rstrip())
    counts = {state: sum(item.state == state for item in found) for state in get_args(State)}
    return [*lines, f"{len(found)} cells: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)]
