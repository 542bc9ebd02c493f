"""Where a run keeps its records: which are up to date, by key, and the log of what happened."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from u2a.errors import RecordError
from u2a.record import Record, write_whole

AnyRecord = TypeVar("AnyRecord", bound=Record)


class StageStore:
    """Records of one run directory.

    A record belongs to a key, the hash of what it was computed from; ``stages.json`` holds the key of every record
    that was written whole.

    Args:
        folder: the run's directory.
        say: prints one line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self._memory: dict[str, Record] = {}

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
            self._say(f"  {name}: read back from {path}")
            record = kind.load(path)
        else:
            record = compute()
            record.save(path)
            self.mark(name, key)
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
        return self._stages().get(name) == key

    def mark(self, name: str, key: str) -> None:
        """Note that a stage is complete.

        Args:
            name: stage or record.
            key: its key.
        """
        write_whole(self.folder / "stages.json", json.dumps(self._stages() | {name: key}, indent=1) + "\n")

    def log(self, event: str, data: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``.

        Args:
            event: what happened.
            data: its numbers.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **data}, allow_nan=False) + "\n")

    def _stages(self) -> dict[str, str]:
        path = self.folder / "stages.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise RecordError(f"{path}: unreadable ({error}); delete it to run every stage again") from None
