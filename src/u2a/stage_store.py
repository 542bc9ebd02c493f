"""Where a run keeps its records: which are up to date, by key, and the log of what happened."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from u2a.errors import RecordError
from u2a.progress import Console, peak_rss_bytes
from u2a.record import Record, write_whole
from u2a.solution import Round

AnyRecord = TypeVar("AnyRecord", bound=Record)


class StageStore:
    """Records of one run directory.

    A record belongs to a key, the hash of what it was computed from. ``stages.json`` holds the key of every record
    that was written whole, with the seconds and the peak memory it took, so that a resumed run still knows them.

    Args:
        folder: the run's directory.
        console: prints, and times phases.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self._console = folder, console
        self._memory: dict[str, Record] = {}
        self._used: dict[str, None] = {}

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
        done = self._stages().get(name, {}).get("key") == key
        if done:
            self._used[name] = None
        return done

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
        entry = {"key": key, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}
        self._used[name] = None
        write_whole(self.folder / "stages.json", json.dumps(self._stages() | {name: entry}, indent=1) + "\n")

    def seconds(self) -> dict[str, float]:
        """Seconds by phase of everything the present result rests on, in this process or an earlier one.

        Returns:
            Seconds; a phase that several records share counts once.
        """
        out: dict[str, float] = {}
        stages = self._stages()
        for name in self._used:
            for phase, value in stages.get(name, {}).get("seconds", {}).items():
                out[phase] = max(out.get(phase, 0.0), value)
        return out

    def peak_rss_bytes(self) -> int:
        """Peak memory of the processes that computed the present result.

        Returns:
            Bytes.
        """
        stages = self._stages()
        return max([peak_rss_bytes(), *(stages.get(name, {}).get("peak_rss_bytes", 0) for name in self._used)])

    def log(self, event: str, data: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``.

        Args:
            event: what happened.
            data: its numbers.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **data}, allow_nan=False) + "\n")

    def log_round(self, record: Round) -> None:
        """Append one round of selection to ``metrics.jsonl``.

        Args:
            record: the round.
        """
        self.log("round", record.model_dump(mode="json"))

    def _stages(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "stages.json"
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise RecordError(f"{path}: unreadable ({error}); delete it to run every stage again") from None
        return {name: entry for name, entry in found.items() if isinstance(entry, dict)}
