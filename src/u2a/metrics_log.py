"""``metrics.jsonl``: one line per round of selection and per optimiser step, each of them once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from u2a.record import refuse_foreign_link, write_whole, writing


class MetricsLog:
    """The lines of a run, in the order in which their events first happened.

    A line that tells its place (``step`` or ``index``) replaces an earlier one of the same event and place together
    with those that followed it: the work it stands for is being done again, by a run that was stopped or by one with
    other options. So the log of a resumed run is that of a run that was never stopped.

    Args:
        path: the file; the first line makes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[tuple[str, int | None, str]] | None = None

    def add(self, event: str, data: Mapping[str, Any]) -> None:
        """Add one line.

        Args:
            event: what happened.
            data: its numbers, finite.

        Raises:
            WriteError: the file cannot be written.
        """
        refuse_foreign_link(self.path)
        if self._lines is None:
            self._lines = self._read()
        text = json.dumps({"event": event, **data}, allow_nan=False) + "\n"
        place = _place(data)
        kept = [line for line in self._lines if line[0] != event or _before(line[1], place)]
        again = len(kept) < len(self._lines)
        lines = [*kept, (event, place, text)]
        if again:
            write_whole(self.path, "".join(line for *_, line in lines))
        else:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(text)
        self._lines = lines

    def _read(self) -> list[tuple[str, int | None, str]]:
        """The lines that are there; one that a kill left unfinished is cut off, its work is done again."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        found = []
        for line in text.splitlines(keepends=True):
            try:
                data = json.loads(line)
                found.append((str(data["event"]), _place(data), line))
            except (ValueError, TypeError, KeyError):
                continue
        whole = "".join(line for *_, line in found)
        if whole != text:
            write_whole(self.path, whole)
        return found


def _place(data: Mapping[str, Any]) -> int | None:
    """Which step or round a line is about."""
    place = data.get("step", data.get("index"))
    return place if isinstance(place, int) else None


def _before(one: int | None, other: int | None) -> bool:
    """Whether a line stays where another one of its event is added."""
    return one is None or other is None or one < other
