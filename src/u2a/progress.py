"""Progress that people can read: bars on a terminal, plain lines elsewhere, and the time of every phase."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from tqdm import tqdm

from u2a.signals import stopping


class Advance(Protocol):
    """Anything that can be told how far the work has got."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more items done; ``note`` is shown beside the bar."""
        ...


class Quiet:
    """Counts nothing and prints nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Do nothing."""


class _Bar:
    """A tqdm bar on a terminal."""

    def __init__(self, name: str, total: int | None, unit: str, stream: TextIO) -> None:
        self._bar = tqdm(total=total, desc=f"{name:<24}", unit=unit, file=stream, dynamic_ncols=True, leave=True)

    def advance(self, n: int = 1, note: str = "") -> None:
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """At most one plain line every few seconds, with the time left."""

    every_s = 10.0

    def __init__(self, name: str, total: int | None, unit: str, stream: TextIO) -> None:
        self._name, self._total, self._unit, self._stream = name, total, unit, stream
        self._done, self._start, self._printed = 0, time.monotonic(), time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done += n
        now = time.monotonic()
        if now - self._printed < self.every_s:
            return
        self._printed = now
        of = f"/{self._total}" if self._total else ""
        left = (now - self._start) / self._done * (self._total - self._done) if self._total and self._done else None
        eta = "" if left is None else f", about {left:.0f} s left"
        print(f"  {self._name}: {self._done}{of} {self._unit}{eta} {note}".rstrip(), file=self._stream, flush=True)

    def close(self) -> None:
        seconds = time.monotonic() - self._start
        print(f"  {self._name}: done in {seconds:.1f} s", file=self._stream, flush=True)


class _Stoppable:
    """Counts work, and stops between two units of it when that was asked for."""

    def __init__(self, shown: Advance) -> None:
        self._shown = shown

    def advance(self, n: int = 1, note: str = "") -> None:
        self._shown.advance(n, note)
        stopping.check()


class Console:
    """Shows phases and keeps their wall time.

    Args:
        stream: where to print; standard error by default.
        quiet: show no progress (times are still kept).
        results: where what was found is printed, also when quiet (the command line gives standard output); None
            treats it as progress.

    Attributes:
        seconds: wall seconds by phase name, summed over repeats, in the order phases began.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False, results: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._results = results
        self._quiet = quiet
        self.seconds: dict[str, float] = {}
        self._depth = 0

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "items", saves: bool = False) -> Iterator[Advance]:
        """Time and show one phase.

        Args:
            name: phase name; nested phases are shown but only the outermost is timed.
            total: items to do, if known.
            unit: what an item is.
            saves: the work saves on the way and stops itself after a save; any other stops where it advances.

        Yields:
            The object to advance, between two units of work and never within a save: it raises ``Stopped`` when a
            signal asked for that.
        """
        self._depth += 1
        start = time.monotonic()
        shown = None
        try:
            if not self._quiet:
                shown = (_Bar if self._stream.isatty() else _Lines)(name, total, unit, self._stream)
            yield (shown or Quiet()) if saves else _Stoppable(shown or Quiet())
        finally:
            self._depth -= 1
            if shown:
                shown.close()
            if self._depth == 0:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def say(self, text: str = "") -> None:
        """Print one line of progress.

        Args:
            text: the line.
        """
        if not self._quiet:
            print(text, file=self._stream, flush=True)

    def result(self, text: str = "") -> None:
        """Print what was found: a table, a verdict, the path of a file.

        Args:
            text: one or more lines.
        """
        if self._results is None:
            self.say(text)
        else:
            print(text, file=self._results, flush=True)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, on Linux since :func:`reset_peak_rss` was called last.

    Returns:
        Bytes.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Let Linux forget the peak of this process's memory; elsewhere nothing happens."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
