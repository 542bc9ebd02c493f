"""What a protocol asks to be run, where each result is kept, and which trial tuning has chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from u2a import __version__
from u2a.errors import ConfigError
from u2a.experiment.cell import Cell, CellResult
from u2a.experiment.claims import is_claimed
from u2a.experiment.measured import retain_ppl
from u2a.experiment.protocol import Protocol, decisive_text, task_config
from u2a.experiment.protocol_sections import TuningSection
from u2a.experiment.setting import SettingRecord, Split, Start, Workplace
from u2a.experiment.tuning import Tuned, choose_trial
from u2a.record import content_id

State = Literal["ok", "diverged", "failed", "running", "open", "waits for tuning"]


@dataclass(frozen=True)
class Slot:
    """A place in the tables; which trial stands there may depend on the tuning.

    Attributes:
        task: name of the task.
        arm: name of the arm.
        seed: seed.
        trial: its number, or None for the one that tuning chooses.
    """

    task: str
    arm: str
    seed: int
    trial: int | None


@dataclass(frozen=True)
class Listed:
    """One line of ``--list``.

    Attributes:
        name: of the cell.
        state: of it.
        seconds: it took, or None.
        error: why it failed; else empty.
    """

    name: str
    state: State
    seconds: float | None = None
    error: str = ""


def slots(protocol: Protocol, only: Sequence[str] = ()) -> list[Slot]:
    """List everything to be run, task by task: first its tuning, then seed by seed all arms.

    Args:
        protocol: the protocol.
        only: names of arms, names of tasks and seeds; a kind of which there is none is not restricted. Tuning that
            what is left depends on stays.

    Returns:
        The slots in order of work.

    Raises:
        ConfigError: something in ``only`` is no arm, no task and no seed.
    """
    arms = [arm for arm in protocol.arms if arm in only] or list(protocol.arms)
    tasks = [task for task in protocol.tasks if task in only] or list(protocol.tasks)
    seeds = [seed for seed in protocol.seeds if str(seed) in only] or list(protocol.seeds)
    unknown = [name for name in only if name not in {*arms, *tasks, *(str(seed) for seed in seeds)}]
    if unknown:
        names = ", ".join([*protocol.arms, *protocol.tasks, *(str(seed) for seed in protocol.seeds)])
        raise ConfigError(f"--only {unknown[0]}: no such arm, task or seed (expected some of: {names})")
    tuned_for = {protocol.tasks[task].tuned_on or task for task in tasks}
    out: list[Slot] = []
    for task in protocol.tasks:
        here = [arm for arm in arms if task in protocol.tasks_of(arm)]
        grids = {arm: len(protocol.arms[arm].trials) for arm in here}
        tuned = [arm for arm in here if grids[arm] > 1]
        out += [
            Slot(task, arm, seed, trial)
            for seed in protocol.tuning.seeds
            for arm in (tuned if task in tuned_for else [])
            for trial in range(grids[arm])
        ]
        out += [
            Slot(task, arm, seed, None if arm in tuned else 0)
            for seed in (seeds if task in tasks else [])
            for arm in here
            if seed in protocol.seeds_of(arm, task)
        ]
    return out


@dataclass
class Plan:
    """The cells of a protocol and their files.

    Attributes:
        protocol: the protocol.
        only: names of arms, names of tasks and seeds (see :func:`slots`); empty for all.
    """

    protocol: Protocol
    only: tuple[str, ...] = ()
    _places: dict[tuple[str, int], Workplace] = field(default_factory=dict)
    _cells: dict[Slot, Cell] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The experiment's directory."""
        return Path(self.protocol.output_dir)

    @property
    def slots(self) -> list[Slot]:
        """Everything to be run, in order of work."""
        return slots(self.protocol, self.only)

    def place(self, slot: Slot) -> Workplace:
        """The folder of a slot's setting.

        Args:
            slot: the slot.

        Returns:
            The workplace; another content of data or options has another folder.
        """
        where = slot.task, slot.seed
        if where in self._places:
            return self._places[where]
        config = task_config(self.protocol, slot.task, slot.seed)
        split: Split = "dev" if slot.seed in self.protocol.tuning.seeds else "test"
        dev_frac = self.protocol.tuning.dev_frac if self.protocol.tunes else 0.0
        key = content_id(decisive_text(config), split, f"{dev_frac:g}", __version__)
        folder = self.folder / "settings" / f"{slot.task}.s{slot.seed}.{key}"
        config = config.model_copy(update={"output_dir": str(folder)})
        self._places[where] = Workplace(slot.task, folder, config, split, dev_frac)
        return self._places[where]

    def cell(self, slot: Slot) -> Cell | None:
        """The cell of a slot.

        Args:
            slot: the slot.

        Returns:
            The cell, or None while its tuning is not done.
        """
        if slot in self._cells:
            return self._cells[slot]
        trial = slot.trial
        if trial is None:
            tuned = self.tuned(self.protocol.tasks[slot.task].tuned_on or slot.task, slot.arm)
            if tuned is None:
                return None
            trial = tuned.trial
        protocol, arm, place = self.protocol, self.protocol.arms[slot.arm], self.place(slot)
        levels = protocol.levels_of(slot.arm)
        full = [level for level in protocol.budgets.full if level in levels]
        if place.split == "dev":  # no more than the choice needs
            levels = [level for level in levels if level <= protocol.tuning.level]
            full = [protocol.tuning.level] if self._tuning(slot.arm).metric == "reward" else []
        self._cells[slot] = Cell(
            task=slot.task,
            arm=slot.arm,
            method=arm.method,
            config=task_config(protocol, slot.task, slot.seed, slot.arm),
            split=place.split,
            dev_frac=place.dev_frac,
            trial=trial,
            values=arm.trials[trial],
            levels=tuple(levels),
            full=tuple(full),
            setting=place.folder.name,
            equal_ppl_frac=None if place.split == "dev" else protocol.measure.equal_ppl_frac,
        )
        return self._cells[slot]

    def path(self, cell: Cell) -> Path:
        """The file of a cell's result.

        Args:
            cell: the cell.

        Returns:
            A path that depends on all that decides the result.
        """
        return self.folder / "cells" / f"{cell.name}.{cell.key()}.json"

    def start_file(self, setting: str) -> Path:
        """Where the start of a setting is kept that was prepared elsewhere.

        Args:
            setting: name of the setting's folder.

        Returns:
            The path.
        """
        return self.folder / "starts" / f"{setting}.json"

    def start(self, place: Workplace) -> Start | None:
        """The measured start of a setting.

        Args:
            place: the setting.

        Returns:
            The start, or None while it is known neither here nor from elsewhere (:mod:`u2a.experiment.kept`).
        """
        if place.record.exists():
            return SettingRecord.load(place.record).kept()
        path = self.start_file(place.folder.name)
        return Start.load(path) if path.exists() else None

    def tuned(self, task: str, arm: str) -> Tuned | None:
        """The trial that tuning chose for an arm.

        Args:
            task: name of the task.
            arm: name of the arm.

        Returns:
            The choice, also ``tuning/TASK.ARM.json``; None while a tuning cell is missing.
        """
        found: list[CellResult] = []
        starts: dict[int, float | None] = {}
        for seed in self.protocol.tuning.seeds:
            for slot in (Slot(task, arm, seed, trial) for trial in range(len(self.protocol.arms[arm].trials))):
                cell, place = self.cell(slot), self.place(slot)
                start = self.start(place)
                if cell is None or start is None or not self.path(cell).exists():
                    return None
                found.append(CellResult.load(self.path(cell)))
                starts[seed] = retain_ppl(start.measured)
        choice = choose_trial(self._tuning(arm), found, starts)
        path = self.folder / "tuning" / f"{task}.{arm}.json"
        if not path.exists() or Tuned.load(path) != choice:
            choice.save(path)
        return choice

    def _tuning(self, arm: str) -> TuningSection:
        """The rule that chooses an arm's trial."""
        metric = self.protocol.arms[arm].tuned_by
        section = self.protocol.tuning
        return section if metric is None else section.model_copy(update={"metric": metric})

    def claim(self, name: str) -> Path:
        """The file that says who works on something.

        Args:
            name: of a cell or of a setting's folder.

        Returns:
            The path.
        """
        return self.folder / "claims" / name

    def listed(self) -> Iterator[Listed]:
        """Tell the state of every cell.

        Yields:
            One line per slot, in order of work.
        """
        for slot in self.slots:
            cell = self.cell(slot)
            if cell is None:
                yield Listed(f"{slot.task}.{slot.arm}.s{slot.seed}", "waits for tuning")
            elif self.path(cell).exists():
                result = CellResult.load(self.path(cell))
                yield Listed(cell.name, result.status, result.seconds, result.error)
            else:
                yield Listed(cell.name, "running" if is_claimed(self.claim(cell.name)) else "open")
