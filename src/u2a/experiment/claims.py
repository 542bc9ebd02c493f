"""Who works on what, when several processes or machines share a folder: one file per piece of work."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from u2a.run_lock import holder_text, process_start, read_holder, this_process

STALE_H = 12.0  # a claim of another machine that old is taken for one of a process that died


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Claim a piece of work for the duration of a ``with`` block.

    The file is made by the one process for which it was not there. A process that is killed leaves it behind; it is
    then taken over, on the same machine at once (also where its process id is in use again), from another one after
    half a day (or delete it).

    Args:
        path: the claim's file.

    Yields:
        True for the process that holds the claim, False where another one does.
    """
    mine = _made(path) or (_is_stale(path) and _taken_over(path))
    try:
        yield mine
    finally:
        if mine:
            path.unlink(missing_ok=True)


def is_claimed(path: Path) -> bool:
    """Tell whether a living process works on something.

    Args:
        path: the claim's file.

    Returns:
        True when there is a claim that nobody may take over.
    """
    return path.exists() and not _is_stale(path)


def _made(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(holder_text(this_process()))
    return True


def _is_stale(path: Path) -> bool:
    """Whether the claim's process is known to be gone; an unreadable claim is being written just now, or is old."""
    try:
        age_h = (time.time() - path.stat().st_mtime) / 3600.0
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    holder, here = read_holder(text), this_process()
    if holder is None:
        return age_h > 1.0 / 60.0
    if holder.host != here.host or not holder.started:  # neither can be looked at from here
        return age_h > STALE_H
    return holder.boot != here.boot or process_start(holder.pid) != holder.started


def _taken_over(path: Path) -> bool:
    """Remove a stale claim and make a new one; of several processes that try, one at most succeeds."""
    with_guard = path.with_name(f"{path.name}.takeover")
    if not _made(with_guard):
        if _is_stale(with_guard):  # of a process that was killed right here; the next attempt finds the way free
            with_guard.unlink(missing_ok=True)
        return False
    try:
        if not _is_stale(path):  # another process was faster, and holds it now
            return False
        path.unlink(missing_ok=True)
        return _made(path)
    finally:
        with_guard.unlink(missing_ok=True)
