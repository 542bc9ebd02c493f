"""Faults F3, F19 and F20 on whole runs: signals, two processes in one directory, late faults."""

from __future__ import annotations

import errno
import signal
import socket

import pytest

from .kill_harness import Lab, leftovers

TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)
STOPS = [
    ("reward", 2, TERM), ("inner loop", 3, INT), ("CG", 5, TERM), ("scoring", 1, INT), ("selection", 2, TERM),
    ("save", 90, INT), ("inner loop", 6, TERM), ("evaluation", 2, INT), ("evaluation", 3, TERM), ("save", 40, TERM),
]  # fmt: skip


def stop(lab: Lab, point: str, call: int, signals: list[int]) -> bool:
    """Send signals at a call; whether the run was there. It must exit as asked, with two lines."""
    status = lab.attempt(point=point, call=call, signals=signals)["status"]
    if status == 0:
        return False
    name = signal.Signals(signals[-1]).name
    assert status == 128 + signals[-1], lab.said
    lines = [line for line in lab.said.splitlines() if line]
    assert len(lines) == 2 and lines[0].startswith(f"u2a: {signal.Signals(signals[0]).name}: saving and stopping")
    if len(signals) == 1:
        assert lines[1].startswith(f"u2a run: stopped by {name}; finished and saved in {lab.run}: ")
        assert lines[1].endswith("; the same command goes on")
        assert leftovers(lab.run) == [], "a stop cleans up after itself"
    else:
        assert lines[1].startswith(f"u2a run: stopped at once by a second signal ({name})")
    return True


def finish(lab: Lab) -> None:
    assert lab.attempt()["status"] == 0, lab.said
    assert lab.differences() == [] and leftovers(lab.run) == []


def test_three_signals_and_a_double_one_in_one_run_change_nothing(lab: Lab) -> None:
    lab.fresh()
    places = [("reward", 2, [TERM]), ("CG", 5, [INT]), ("save", 30, [TERM, INT]), ("evaluation", 2, [TERM])]
    assert [stop(lab, *place) for place in places] == [True] * 4
    finish(lab)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_signals_in_one_run_change_nothing(lab: Lab) -> None:
    lab.fresh()
    assert sum(stop(lab, point, call, [signum]) for point, call, signum in STOPS) >= 6
    finish(lab)


@pytest.mark.parametrize("call", [11, pytest.param(27, marks=pytest.mark.slow)])
def test_no_step_of_an_inner_run_is_lost(call: int, lab: Lab) -> None:
    """The checkpoint written on request is that of the step at which the signal came."""
    lab.fresh()
    assert stop(lab, "inner loop", call, [TERM])
    done = lab.calls["inner loop"]
    assert done == call, "it stopped after that step"
    finish(lab)
    assert done + lab.calls["inner loop"] == lab.points["inner loop"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_second_signals_leave_what_was_saved(lab: Lab) -> None:
    places = [("inner loop", 5), ("save", 40), ("CG", 3), ("save", 70), ("evaluation", 2)]
    lab.fresh()
    pairs = [[INT, INT], [TERM, TERM], [INT, TERM], [TERM, INT], [INT, INT]]
    stopped = [stop(lab, point, call, pair) for (point, call), pair in zip(places, pairs, strict=True)]
    assert sum(stopped) >= 3
    finish(lab)


def test_a_second_process_exits_with_3_and_names_the_first(lab: Lab) -> None:
    lab.fresh()
    with lab.holding() as pid:
        for command in ("run", "solve"):
            assert lab.attempt(arguments=[command, str(lab.config), "--quiet"])["status"] == 3
            assert lab.said.startswith(f"u2a {command}: {lab.run}: process {pid} on {socket.gethostname()} is working")
            assert lab.said.count("\n") == 1
    finish(lab)  # the killed one's lock is taken over


def test_a_report_that_met_a_full_disk_is_made_later_from_the_run(lab: Lab) -> None:
    lab.fresh()
    site = next(site for site in lab.sites if site.startswith("write in report.py"))
    assert lab.attempt(folder=str(lab.run), site=site, errno=errno.ENOSPC, lasting=True)["status"] == 2
    assert not (lab.run / "report.html").exists()
    assert lab.attempt(arguments=["report", str(lab.run)])["status"] == 0, lab.said
    assert (
        lab.results.splitlines()[0] == str(lab.run / "report.html") and "<html" in (lab.run / "report.html").read_text()
    )
    finish(lab)


@pytest.mark.parametrize("clock_s", [-7 * 86400.0, pytest.param(86400.0, marks=pytest.mark.slow)])
def test_a_clock_that_jumps_changes_nothing(clock_s: float, lab: Lab) -> None:
    lab.fresh()
    assert lab.attempt(clock_s=clock_s, clock_after_s=lab.seconds / 4)["status"] == 0, lab.said
    assert lab.differences() == []
