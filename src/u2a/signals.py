"""Stopping on request: a signal sets a flag, and the work looks at it where it can go on from later.

Only the command line installs the handlers, so that in a notebook Ctrl-C stays Python's own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from u2a.errors import Stopped

GRACE_S = 30.0  # schedulers, too, wait about that long before they kill
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedAtOnce(KeyboardInterrupt):
    """The work was left where it was: a second signal came, or the grace period was over.

    Not an ``Exception``, so that nothing takes it for a failure of the file or model at hand. Whatever was saved
    before is valid: files are replaced whole.

    Args:
        signum: number of the signal.
        why: what made it necessary.
    """

    def __init__(self, signum: int, why: str) -> None:
        self.signum, self.why = signum, why
        super().__init__(why)


@dataclass
class Stopping:
    """Whether the run was asked to stop.

    Attributes:
        requested: number of the signal that asked for it, or None.
    """

    requested: int | None = None

    def check(self) -> None:
        """Stop here if that was asked for; whoever calls this has saved what it needs to go on.

        Raises:
            Stopped: a signal was received.
        """
        if self.requested is not None:
            raise Stopped(self.requested)


stopping = Stopping()


@contextmanager
def stops_on_signals(grace_s: float = GRACE_S) -> Iterator[None]:
    """Let SIGTERM and SIGINT ask the work inside to stop, instead of killing it.

    The first signal sets ``stopping.requested``, at which the work saves and raises ``Stopped``. When it has not done
    so after the grace period, or when a second signal comes, :class:`StoppedAtOnce` is raised in the main thread,
    wherever that is. Python sees signals between two of its own steps: a third one kills at once even inside a long
    computation. Outside the main thread, where Python allows no handlers, nothing changes.

    Args:
        grace_s: seconds from the first signal, > 0.

    Yields:
        Nothing; the handlers of before are back afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def at_once(signum: int, why: str) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise StoppedAtOnce(signum, why)

    def asked(signum: int, _: object) -> None:
        if stopping.requested is not None:
            at_once(signum, f"stopped at once by a second signal ({signal_name(signum)})")
        stopping.requested = signum
        signal.signal(signal.SIGALRM, overdue)
        signal.setitimer(signal.ITIMER_REAL, grace_s)
        _say(f"{signal_name(signum)}: saving and stopping, within {grace_s:g} s (once more: at once)")

    def overdue(_: int, __: object) -> None:
        assert stopping.requested is not None  # the timer is set by the first signal
        name = signal_name(stopping.requested)
        at_once(stopping.requested, f"stopped {grace_s:g} s after {name}, in the middle of its work")

    before = {each: signal.getsignal(each) for each in (*SIGNALS, signal.SIGALRM)}
    stopping.requested = None
    try:
        for each in SIGNALS:
            signal.signal(each, asked)
        yield
    finally:
        for each in SIGNALS:
            signal.signal(each, before[each])
        if stopping.requested is not None:  # else the timer was not touched, and may be somebody else's
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before[signal.SIGALRM])
        stopping.requested = None


def signal_name(signum: int) -> str:
    """Name of a signal.

    Args:
        signum: its number.

    Returns:
        For example ``SIGTERM``.
    """
    return signal.Signals(signum).name


def _say(text: str) -> None:
    """Print a line from within a handler, where the buffered streams may be in the middle of a write."""
    if sys.stderr is not None:
        os.write(2, f"\nu2a: {text}\n".encode())
