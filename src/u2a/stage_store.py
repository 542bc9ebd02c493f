"""Where a run keeps its records: which are up to date, by key, and the log of what happened."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter

from u2a.errors import RecordError
from u2a.metrics_log import MetricsLog
from u2a.progress import Console, peak_rss_bytes
from u2a.record import Record, Row, one_line, refuse_foreign_link, write_whole
from u2a.solution import Round
from u2a.trackers import Tracker

AnyRecord = TypeVar("AnyRecord", bound=Record)
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Entry(Row):
    """What ``stages.json`` holds of one stage.

    Attributes:
        doubted: the options have changed since it was last found up to date; a report leaves it out until it is again.
    """

    key: str
    seconds: dict[str, Seconds]
    peak_rss_bytes: int
    batch_limits: dict[str, int] = {}
    doubted: bool = False


_STAGES = TypeAdapter(dict[str, _Entry])


class StageStore:
    """Records of one run directory.

    A record belongs to a key, the hash of what it was computed from. ``stages.json`` holds the key of every record
    that was written whole, with the seconds and the peak memory it took, so that a resumed run still knows them.

    Args:
        folder: the run's directory.
        console: prints, and times phases.
        tracker: also told what is logged, or None.
    """

    def __init__(self, folder: Path, console: Console, tracker: Tracker | None = None) -> None:
        self.folder, self._console, self._tracker = folder, console, tracker
        self._log = MetricsLog(folder / "metrics.jsonl")
        self._memory: dict[str, Record] = {}
        self._used: dict[str, None] = {}
        self._batch_limits: dict[str, int] = {}

    def saved(self, name: str, kind: type[AnyRecord], key: str, compute: Callable[[], AnyRecord]) -> AnyRecord:
        """Read a record back when its key is the saved one, else compute and save it.

        Args:
            name: file name without ``.json``.
            kind: record class.
            key: what the record must have been computed from.
            compute: makes the record.

        Returns:
            The record.
        """
        path = self.folder / f"{name}.json"
        known = self._memory.get(name)
        if isinstance(known, kind):
            return known
        if self.is_done(name, key) and path.exists():
            self._console.say(f"  {name}: read back from {path}")
            record = kind.load(path)
        else:
            before = dict(self._console.seconds)
            record = compute()
            self.drop(name)  # a kill between the next two lines would else leave a new record under an old key
            record.save(path)
            self.mark(name, key, before)
        self._memory[name] = record
        return record

    def current(self, name: str, kind: type[AnyRecord], key: str, command: str) -> AnyRecord:
        """Read the record of an earlier stage, which must belong to the present options and data.

        Args:
            name: file name without ``.json``.
            kind: record class.
            key: the present key.
            command: stage that writes it, for the message.

        Returns:
            The record.

        Raises:
            RecordError: it is missing, damaged, or was made from other options or data.
        """
        path = self.folder / f"{name}.json"
        record = self._memory.get(name)
        if not path.exists():
            raise RecordError(f"{path}: no {kind.__name__} there (run u2a {command} first)")
        if not isinstance(record, kind):
            record = kind.load(path)
        if not self.is_done(name, key):
            raise RecordError(f"{path}: made from other options or data (run u2a {command} again)")
        self._memory[name] = record
        return record

    def is_done(self, name: str, key: str) -> bool:
        """Whether a stage was completed under this key.

        Args:
            name: stage or record.
            key: its key.

        Returns:
            True when it was.

        Raises:
            RecordError: ``stages.json`` is damaged.
        """
        entry = self._stages().get(name)
        done = entry is not None and entry.key == key
        if done and entry is not None:
            self._used[name] = None
            if entry.doubted:
                self._write(self._stages() | {name: entry.model_copy(update={"doubted": False})})
        return done

    def doubt(self) -> None:
        """Note that the options have changed: no record is shown as this run's until it is found up to date."""
        stages = self._stages()
        if stages:
            self._write({name: entry.model_copy(update={"doubted": True}) for name, entry in stages.items()})

    def finished(self) -> list[str]:
        """Names of what is complete and saved, under whatever key.

        Returns:
            Stages and records in the order they were made; nothing when ``stages.json`` cannot be read.
        """
        try:
            return list(self._stages())
        except RecordError:
            return []

    def mark(self, name: str, key: str, before: Mapping[str, float]) -> None:
        """Note that a stage is complete.

        Args:
            name: stage or record.
            key: its key.
            before: the console's seconds by phase when it began.
        """
        seconds = {
            phase: round(total - before.get(phase, 0.0), 2)
            for phase, total in self._console.seconds.items()
            if total > before.get(phase, 0.0)
        }
        limits = dict(self._batch_limits)
        entry = _Entry(key=key, seconds=seconds, peak_rss_bytes=peak_rss_bytes(), batch_limits=limits)
        self._used[name] = None
        self._write(self._stages() | {name: entry})

    def seconds(self) -> dict[str, float]:
        """Seconds by phase of everything the present result rests on, in this process or an earlier one.

        Returns:
            Seconds; a phase that several records share counts once.
        """
        out: dict[str, float] = {}
        for entry in self._entries_used():
            for phase, value in entry.seconds.items():
                out[phase] = max(out.get(phase, 0.0), value)
        return out

    def peak_rss_bytes(self) -> int:
        """Peak memory of the processes that computed the present result, each up to its last record.

        Returns:
            Bytes. A process that found everything there does not count.
        """
        return max((entry.peak_rss_bytes for entry in self._entries_used()), default=peak_rss_bytes())

    def note_smaller_batches(self, name: str, size: int) -> None:
        """Note that memory ran out and batches are smaller from here on.

        Args:
            name: what got smaller.
            size: its new size.
        """
        self._batch_limits[name] = size
        self._console.say(f"  out of memory: {name} at most {size} from here on")
        self.log("out_of_memory", {"what": name, "at_most": size})

    def batch_limits(self) -> dict[str, int]:
        """The smallest batches that lack of memory led to in what the present result rests on.

        Returns:
            Sizes by name; empty where memory sufficed.
        """
        out = dict(self._batch_limits)
        for entry in self._entries_used():
            for name, size in entry.batch_limits.items():
                out[name] = min(size, out.get(name, size))
        return out

    def drop(self, name: str) -> None:
        """Forget that a record is up to date, so that it is made again; before it is replaced, too.

        Args:
            name: record.
        """
        self._memory.pop(name, None)
        if name not in self._stages():
            return
        self._write({other: entry for other, entry in self._stages().items() if other != name})

    def remove(self, *names: str) -> None:
        """Remove records of what has changed since, with the pages made from them.

        A report, a model card or a gate would take them for this run's.

        Args:
            names: records.
        """
        for name in names:
            self.drop(name)
            for suffix in (".json", ".md"):
                (self.folder / f"{name}{suffix}").unlink(missing_ok=True)

    def log(self, event: str, data: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``, and tell the tracker.

        Args:
            event: what happened.
            data: its numbers.
        """
        self._log.add(event, data)
        if self._tracker is not None:
            self._tracker.log(event, data)

    def log_round(self, record: Round) -> None:
        """Add one round of selection to ``metrics.jsonl``.

        Args:
            record: the round.
        """
        self.log("round", record.model_dump(mode="json"))

    def _entries_used(self) -> list[_Entry]:
        stages = self._stages()
        return [stages[name] for name in self._used if name in stages]

    def _write(self, stages: Mapping[str, _Entry]) -> None:
        write_whole(self.folder / "stages.json", _STAGES.dump_json(dict(stages), indent=1).decode() + "\n")

    def _stages(self) -> dict[str, _Entry]:
        path = self.folder / "stages.json"
        refuse_foreign_link(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            return _STAGES.validate_python(found)
        except (OSError, ValueError, RecursionError) as error:
            reason = one_line("; ".join(str(error).splitlines()))
            raise RecordError(f"{path}: unreadable ({reason}); delete it to run every stage again") from None
