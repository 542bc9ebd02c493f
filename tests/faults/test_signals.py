"""Fault F3, the mechanism: what a signal asks for, when it is granted, and what is back afterwards."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from u2a import cli
from u2a.errors import ConfigError, Stopped
from u2a.progress import Console
from u2a.signals import SIGNALS, StoppedAtOnce, stopping, stops_on_signals

ALL = (*SIGNALS, signal.SIGALRM)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, 0.0)  # the test runner's own
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring it
    before = [signal.getsignal(each) for each in ALL]
    yield
    after = [signal.getsignal(each) for each in ALL]
    signal.signal(signal.SIGINT, own)
    assert after == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0 and stopping.requested is None


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_signal_only_asks(signum: int, capfd: pytest.CaptureFixture[str]) -> None:
    done = []

    def work() -> None:
        stopping.check()
        send(signum)
        assert stopping.requested == signum
        done.append("the work went on")
        stopping.check()

    with pytest.raises(Stopped) as caught, stops_on_signals():
        work()
    assert done and caught.value.exit_status == 128 + signum
    assert capfd.readouterr().err.strip() == (
        f"u2a: {signal.Signals(signum).name}: saving and stopping, within 30 s (once more: at once)"
    )


@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_stops_at_once_past_handlers_of_ordinary_errors(second: int) -> None:
    def work() -> None:
        send(signal.SIGTERM)
        try:
            send(second)
            pytest.fail("nothing was raised")
        except Exception as error:  # as readers of foreign files do
            pytest.fail(f"taken for an ordinary error: {error!r}")
        finally:
            assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_DFL] * 2, "a third one kills"

    with pytest.raises(StoppedAtOnce) as caught, stops_on_signals():
        work()
    assert caught.value.signum == second


def test_after_the_grace_period_it_stops_wherever_it_is() -> None:
    def work() -> None:
        send(signal.SIGTERM)
        time.sleep(20.0)

    begin = time.monotonic()
    with pytest.raises(StoppedAtOnce) as caught, stops_on_signals(grace_s=0.2):
        work()
    assert 0.2 <= time.monotonic() - begin < 5.0
    assert caught.value.signum == signal.SIGTERM and "0.2 s after SIGTERM" in str(caught.value)


def test_work_that_ends_within_the_grace_period_is_left_alone() -> None:
    with stops_on_signals(grace_s=0.2):
        send(signal.SIGINT)
    time.sleep(0.4)  # a timer left behind would raise here, or kill


def test_a_timer_of_somebody_else_is_left_alone() -> None:
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with stops_on_signals():
            pass
        time.sleep(0.4)
        assert fired == [1]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_in_another_thread_nothing_changes() -> None:
    before = [signal.getsignal(each) for each in ALL]
    seen = []

    def work() -> None:
        with stops_on_signals():
            seen.append([signal.getsignal(each) for each in ALL])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_without_the_command_line_control_c_is_pythons_own() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        signal.raise_signal(signal.SIGINT)
    assert type(caught.value) is KeyboardInterrupt


def test_a_phase_stops_between_two_units_of_work_and_one_that_saves_does_not() -> None:
    console, done = Console(io.StringIO()), []

    def work() -> None:
        with console.phase("unlearn", 3, "steps", saves=True) as bar:
            for k in range(3):
                if k == 1:
                    send(signal.SIGTERM)
                done.append(f"step {k}")
                bar.advance()
        with console.phase("score", 3) as bar:
            for k in range(3):
                done.append(f"score {k}")
                bar.advance()

    with pytest.raises(Stopped), stops_on_signals():
        work()
    assert done == ["step 0", "step 1", "step 2", "score 0"]
    assert list(console.seconds) == ["unlearn", "score"], "a stopped phase is timed and closed"


class Terminal(io.StringIO):
    """A terminal on which keys are pressed while it is written to."""

    def __init__(self, signals: list[int], at: int) -> None:
        super().__init__()
        self._signals, self._at, self.written = signals, at, 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written += 1
        if self.written == self._at:
            for each in self._signals:
                send(each)
        return super().write(text)


@pytest.mark.parametrize(("keys", "raised"), [([signal.SIGINT], Stopped), ([signal.SIGINT] * 2, StoppedAtOnce)])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_control_c_while_a_progress_bar_is_drawn(keys: list[int], raised: type[BaseException], at: int) -> None:
    """Fault F20: the bar is drawn in one piece or not at all, and the next one can be drawn."""
    terminal, done = Terminal(keys, at), []
    console = Console(terminal)

    def work() -> None:
        with console.phase("score", 2000) as bar:
            for k in range(2000):
                time.sleep(0.001)
                done.append(k)
                bar.advance()

    with pytest.raises(raised), stops_on_signals():
        work()
    assert len(done) < 2000 and list(console.seconds) == ["score"]
    before = terminal.written
    with console.phase("after", 1) as bar:
        bar.advance()
    assert terminal.written > before and "after" in terminal.getvalue()


def command(act: Callable[[], None], monkeypatch: pytest.MonkeyPatch, name: str = "run") -> int:
    monkeypatch.setattr(cli, f"_{name}", lambda _: act())
    return cli.main([name, "config.yaml"])


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_exits_as_shells_expect(
    signum: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def once() -> None:
        send(signum)
        stopping.check()

    def twice() -> None:
        send(signum)
        send(signum)

    name = signal.Signals(signum).name
    assert command(once, monkeypatch) == status
    assert capsys.readouterr().err == (
        f"u2a run: stopped by {name}; all that was finished is saved; the same command goes on\n"
    )
    assert command(twice, monkeypatch) == status
    said = capsys.readouterr().err
    assert said.startswith(f"u2a run: stopped at once by a second signal ({name});") and said.count("\n") == 1


def test_commands_that_save_nothing_stop_at_the_first_control_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> None:
        send(signal.SIGINT)
        time.sleep(1.0)
        raise ConfigError("went on")

    assert command(act, monkeypatch, "report") == 130
    assert "interrupted" in capsys.readouterr().err
