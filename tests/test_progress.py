from __future__ import annotations

import io

import pytest

from u2a import progress
from u2a.progress import Console, peak_rss_bytes


class Clock:
    """A clock that moves by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_phases_are_timed_in_order_and_summed_over_repeats(clock: Clock) -> None:
    console = Console(io.StringIO())
    for name, seconds in (("score", 2.0), ("unlearn", 3.0), ("score", 0.5)):
        with console.phase(name):
            clock.now += seconds
    assert console.seconds == {"score": 2.5, "unlearn": 3.0}
    assert list(console.seconds) == ["score", "unlearn"]


def test_only_the_outermost_phase_is_timed(clock: Clock) -> None:
    console = Console(io.StringIO())
    with console.phase("solve"):
        clock.now += 1
        with console.phase("score"):
            clock.now += 2
    assert console.seconds == {"solve": 3.0}


def test_a_failing_phase_is_timed_and_closed(clock: Clock) -> None:
    console = Console(io.StringIO())

    def fail() -> None:
        with console.phase("solve"):
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with console.phase("next"):
        clock.now += 1
    assert console.seconds == {"solve": 1.0, "next": 1.0}


def test_lines_come_at_most_every_ten_seconds_with_the_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    with Console(stream).phase("score", total=10, unit="rows") as bar:
        for _ in range(4):
            clock.now += 4
            bar.advance(note="loss 1.0")
    assert stream.getvalue().splitlines() == [
        "  score: 3/10 rows, about 28 s left loss 1.0",
        "  score: done in 16.0 s",
    ]


def test_without_a_total_no_time_left_is_promised(clock: Clock) -> None:
    stream = io.StringIO()
    with Console(stream).phase("read", unit="rows") as bar:
        clock.now += 11
        bar.advance(5)
    assert stream.getvalue().splitlines()[0] == "  read: 5 rows"


def test_a_terminal_gets_a_bar(clock: Clock) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Console(stream).phase("score", total=2) as bar:
        bar.advance(2, "done")
    assert "2/2" in stream.getvalue()
    assert "score" in stream.getvalue()


def test_quiet_prints_nothing_and_still_times(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(stream, quiet=True)
    with console.phase("score") as bar:
        bar.advance()
        clock.now += 60
        bar.advance()
    console.say("hello")
    assert stream.getvalue() == ""
    assert console.seconds == {"score": 60.0}


def test_say_prints_one_line() -> None:
    stream = io.StringIO()
    Console(stream).say("hello")
    assert stream.getvalue() == "hello\n"


def test_results_have_a_stream_of_their_own_that_quiet_does_not_close() -> None:
    progress, results = io.StringIO(), io.StringIO()
    Console(progress, quiet=True, results=results).result("found\nit")
    assert (progress.getvalue(), results.getvalue()) == ("", "found\nit\n")
    Console(progress).result("found")
    assert progress.getvalue() == "found\n", "without one they are shown with the progress"
    Console(progress, quiet=True).result("again")
    assert progress.getvalue() == "found\n"


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_rss_bytes()
    block = bytearray(b"1") * (64 * 2**20)
    after = peak_rss_bytes()
    assert len(block) == 64 * 2**20
    assert before <= after
    assert 20 * 2**20 < before < 2**40
