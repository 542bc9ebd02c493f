"""Fault F19: one process per run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from u2a import run_lock
from u2a.errors import LockedError, WriteError
from u2a.run_lock import LOCK_FILE, Holder, locked, process_start, this_process

from .kill_harness import HOLD


def holding(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until its input ends."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def write(folder: Path, **changes: object) -> None:
    """A lock file as a process of this machine would have left it, with some fields changed."""
    mine = this_process()
    fields = {"host": mine.host, "pid": mine.pid, "started": mine.started, "boot": mine.boot}
    (folder / LOCK_FILE).write_text(json.dumps(fields | changes), encoding="utf-8")


def refuse_flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_second_process_is_told_who_holds_it_and_the_kernel_frees_it_after_a_kill(tmp_path: Path) -> None:
    process = holding(tmp_path)
    try:
        with pytest.raises(LockedError) as caught, locked(tmp_path):
            pass
        text = str(caught.value)
        assert caught.value.exit_status == 3
        assert f"process {process.pid} on {socket.gethostname()}" in text and "\n" not in text
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK_FILE).exists(), "a killed process cleans nothing up"
    said: list[str] = []
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert said == [
        f"  {tmp_path / LOCK_FILE}: taken over from process {process.pid} on {socket.gethostname()}, which is gone"
    ]
    assert not (tmp_path / LOCK_FILE).exists()


def test_it_is_free_again_after_an_end_and_after_an_error(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "new" / "run", said.append):
            raise ZeroDivisionError
    assert said == [] and list((tmp_path / "new" / "run").iterdir()) == []


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(LockedError, match=str(os.getpid())), locked(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists(), "the refused one deletes nothing"


@pytest.mark.parametrize("by_kernel", [True, False], ids=["flock", "no flock"])
@pytest.mark.parametrize(
    "changes",
    [{"started": "1"}, {"pid": dead_pid()}, {"boot": "another", "pid": 1}],
    ids=["the id is used again", "dead", "before a reboot"],
)
def test_a_stale_lock_is_taken_over(
    changes: dict[str, object], by_kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_kernel:
        monkeypatch.setattr(fcntl, "flock", refuse_flock)
    write(tmp_path, **changes)
    said: list[str] = []
    with locked(tmp_path, said.append):
        pass
    assert len(said) == 1 and "taken over" in said[0]


def test_without_kernel_locks_a_living_holder_is_seen_by_id_and_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse_flock)
    write(tmp_path)
    with pytest.raises(LockedError, match=f"process {os.getpid()} on"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()


def test_a_lock_of_another_machine_is_never_taken_over_unasked(tmp_path: Path) -> None:
    write(tmp_path, host="elsewhere", boot="another", pid=7)
    with pytest.raises(LockedError, match="process 7 on elsewhere") as caught, locked(tmp_path):
        pass
    assert f"delete {tmp_path / LOCK_FILE}" in str(caught.value)


def test_a_container_of_this_machine_that_ended_leaves_no_lock(tmp_path: Path) -> None:
    """Another host name, but the same boot: one kernel, whose word counts."""
    write(tmp_path, host="container")
    with locked(tmp_path, lambda _: None):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": "x"}', "null", "\x00"])
def test_a_lock_file_that_says_nothing_is_free(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    with locked(tmp_path):
        pass


def test_a_foreign_text_stays_on_one_line(tmp_path: Path) -> None:
    write(tmp_path, host="a\nb\x1b[2J", boot="another")
    with pytest.raises(LockedError) as caught, locked(tmp_path):
        pass
    assert str(caught.value).isprintable()


def test_a_lock_deleted_while_one_waits_for_it_is_not_held_by_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder ends between opening and locking: what was opened is no longer the file at the path."""
    path, real = tmp_path / LOCK_FILE, fcntl.flock
    calls = []

    def flock(handle: int, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(handle)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(LockedError), locked(tmp_path):
            pass


def test_many_at_once_let_one_in_at_a_time(tmp_path: Path) -> None:
    inside, most, refused = [], [], []

    def work() -> None:
        for _ in range(50):
            try:
                with locked(tmp_path, lambda _: None):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except LockedError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) + len(refused) == 200


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="Not a directory.* bytes free there"), locked(tmp_path / "file" / "run"):
        pass


def test_the_start_of_a_process_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = process_start(os.getpid())
    assert mine == process_start(os.getpid()) and mine
    later = subprocess.Popen(["sleep", "30"])
    try:
        assert int(process_start(later.pid) or 0) > int(mine)
    finally:
        later.kill()
        assert os.waitid(os.P_PID, later.pid, os.WEXITED | os.WNOWAIT), "it is over, but not collected yet"
        assert process_start(later.pid) is None
        later.wait()
    assert process_start(later.pid) is None
    assert this_process() == Holder(socket.gethostname(), os.getpid(), mine, run_lock._boot())
