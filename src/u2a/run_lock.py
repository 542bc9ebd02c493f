"""One process per run directory: whoever works in it holds its lock, and a dead holder's lock is taken over.

The lock is the kernel's (``flock``), which goes away with its process, however that ends, and which NFS passes on to
the server. The file beside it says who holds it. That text decides only where the kernel cannot: on a file system
without locks, and when another machine wrote it, since some network mounts keep locks to themselves.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from u2a.errors import LockedError
from u2a.record import one_line, writing

LOCK_FILE = "run.lock"


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: name of the machine.
        pid: process id there.
        started: when that process started, as the system tells it; ids of processes are used again, this is not.
        boot: the boot of the machine; it tells machines of one name apart. Empty where the system has none.
    """

    host: str
    pid: int
    started: str
    boot: str

    @property
    def text(self) -> str:
        """The holder in words."""
        return f"process {self.pid} on {self.host}"


def this_process() -> Holder:
    """Describe the present process.

    Returns:
        It as the holder of a lock.
    """
    return Holder(socket.gethostname(), os.getpid(), process_start(os.getpid()) or "", _boot())


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the lock of a run's directory.

    Args:
        folder: the directory; it is created.
        say: told when a dead holder's lock is taken over.

    Yields:
        Nothing; the lock is held inside, and its file is gone afterwards.

    Raises:
        LockedError: another process holds it, or another machine's process may.
        WriteError: the directory or the file cannot be written.
    """
    path = folder / LOCK_FILE
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        handle, by_kernel = _open_locked(path)
    try:
        holder = _read(handle)
        if holder is not None:
            _refuse_live(path, holder, by_kernel)
            say(f"  {path}: taken over from {holder.text}, which is gone")
        with writing(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, holder_text(this_process()).encode(), 0)
            os.fsync(handle)
    except BaseException:
        os.close(handle)
        raise
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes: who waits for the file would else delete a new one
        os.close(handle)


def _open_locked(path: Path) -> tuple[int, bool]:
    """Open the file and lock it: (descriptor, whether the kernel holds the lock)."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(handle)
            os.close(handle)
            raise _locked(path, holder) from None
        except OSError:  # a file system without locks
            return handle, False
        if _is_file_at(handle, path):
            return handle, True
        os.close(handle)  # its holder ended, and deleted it, between the two steps


def _is_file_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _refuse_live(path: Path, holder: Holder, by_kernel: bool) -> None:
    """Refuse a lock whose holder lives, or may live where this process cannot see it."""
    here = this_process()
    if holder.boot != here.boot if holder.boot else holder.host != here.host:
        same_host = holder.host == here.host  # it was booted again: what ran before is gone
        if not same_host:
            raise _locked(path, holder, f"; if it is gone, delete {path}")
    elif not by_kernel and process_start(holder.pid) == holder.started != "":
        raise _locked(path, holder)


def _locked(path: Path, holder: Holder | None, remedy: str = "") -> LockedError:
    who = "another process" if holder is None else holder.text
    return LockedError(f"{path.parent}: {who} is working there (wait for it, or use another output_dir{remedy})")


def _read(handle: int) -> Holder | None:
    return read_holder(os.pread(handle, 4096, 0))


def holder_text(holder: Holder) -> str:
    """Write a holder down.

    Args:
        holder: who holds something.

    Returns:
        A line of JSON with its end.
    """
    return json.dumps(asdict(holder)) + "\n"


def read_holder(text: str | bytes) -> Holder | None:
    """Read what :func:`holder_text` wrote.

    Args:
        text: content of a lock's file.

    Returns:
        Who wrote it; None when nobody did, or not to the end.
    """
    try:
        found = json.loads(text)
        names = {name: one_line(str(found[name]), 80) for name in ("host", "started", "boot")}
        return Holder(pid=int(found["pid"]), **names)
    except (ValueError, TypeError, KeyError):
        return None


def process_start(pid: int) -> str | None:
    """When a process of this machine started.

    Args:
        pid: its id.

    Returns:
        A text that no later process of the same id shares, clock changes or not where the system counts from its
        boot (Linux); None when there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            words = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if words[0] in "ZX" else words[19]  # a process that is over, but was not collected, holds nothing
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, check=False)
    return done.stdout.decode("utf-8", "replace").strip() or None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
