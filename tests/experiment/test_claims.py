"""Claims: one holder at a time among many processes, and claims of the dead are taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from u2a.experiment import claims
from u2a.experiment.claims import claimed, is_claimed
from u2a.run_lock import this_process

NAMES = [f"cell{index}" for index in range(60)]


def work_through(folder: Path) -> None:
    """Do every piece of work that is neither done nor claimed, and note it in a common file."""
    for name in NAMES:
        with claimed(folder / "claims" / name) as mine:
            if mine and not (folder / name).exists():
                time.sleep(0.001)
                with (folder / "log").open("a") as log:
                    log.write(f"{name} {os.getpid()}\n")
                (folder / name).touch()


def test_two_processes_do_every_piece_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work_through, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    done = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert Counter(name for name, _ in done) == Counter(NAMES)
    assert len({pid for _, pid in done}) > 1, "one process did everything: nothing was tested"
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_held_claim_is_not_given_out(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "a"
    with claimed(path) as first:
        with claimed(path) as second:
            assert first and not second
        assert path.exists() and is_claimed(path), "the loser must not remove the winner's claim"
    assert not path.exists() and not is_claimed(path)


def test_an_error_gives_the_claim_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path / "a"):
        raise KeyError
    assert not (tmp_path / "a").exists()


def dead_pid() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def left_behind(path: Path, host: str, pid: int, **other: str) -> Path:
    """A claim that its process did not give back; without ``other`` it started when the present one did."""
    path.write_text(json.dumps({**asdict(this_process()), "host": host, "pid": pid, **other}))
    return path


def test_a_claim_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    path = left_behind(tmp_path / "a", socket.gethostname(), dead_pid())
    assert not is_claimed(path)
    with claimed(path) as mine:
        assert mine and json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [{"started": "1"}, {"boot": "an earlier one"}])
def test_a_claim_of_a_dead_process_whose_id_is_in_use_again_is_taken_over(tmp_path: Path, other) -> None:
    """In a container the process has the same id, 1, whenever it starts."""
    path = left_behind(tmp_path / "a", socket.gethostname(), os.getpid())
    assert is_claimed(path)
    left_behind(path, socket.gethostname(), os.getpid(), **other)
    with claimed(path) as mine:
        assert mine


def test_a_claim_from_a_system_that_cannot_tell_when_it_started_is_not_taken_over_at_once(tmp_path: Path) -> None:
    path = left_behind(tmp_path / "a", socket.gethostname(), os.getpid(), started="")
    assert is_claimed(path)


def test_a_process_killed_while_it_takes_over_blocks_nobody(tmp_path: Path) -> None:
    path = left_behind(tmp_path / "a", socket.gethostname(), dead_pid())
    guard = left_behind(tmp_path / "a.takeover", socket.gethostname(), dead_pid())
    with claimed(path) as mine:
        assert not mine and not guard.exists()
    with claimed(path) as mine:
        assert mine


def test_a_claim_of_another_machine_holds_for_half_a_day(tmp_path: Path) -> None:
    path = left_behind(tmp_path / "a", "elsewhere", dead_pid())
    with claimed(path) as mine:
        assert not mine
    os.utime(path, (time.time() - 3600 * (claims.STALE_H + 0.1),) * 2)
    with claimed(path) as mine:
        assert mine


def test_a_half_written_claim_holds_for_a_minute(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    assert is_claimed(path)
    os.utime(path, (time.time() - 70,) * 2)
    assert not is_claimed(path)
