"""Interleaved repetitions: a full round of all works first, then as many rounds as the time allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from u2a.progress import Console

Work = Callable[[], Tensor]


@dataclass
class Timings:
    """Seconds of every repetition, the first result of each work, and what failed.

    Attributes:
        seconds: by work, in the order measured.
        results: what each work returned the first time.
        failures: reason in one line, by work.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds of a work that ran."""
        return statistics.median(self.seconds[name])

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, minimum and number of repetitions of every work."""
        return {
            name: {"median_s": statistics.median(times), "min_s": min(times), "repetitions": len(times)}
            for name, times in self.seconds.items()
        }


@dataclass(frozen=True)
class Budget:
    """How long to go on.

    Attributes:
        until: time (``time.monotonic``) after which no further round begins.
        rounds: most rounds of any work.
        core: works that go on where the time is too short for all.
    """

    until: float
    rounds: int
    core: tuple[str, ...]


def run_once(name: str, work: Work, timings: Timings, console: Console) -> None:
    """Time one work once, waiting for the accelerator before and after."""
    _wait()
    start = time.perf_counter()
    result = work()
    _wait()
    seconds = time.perf_counter() - start
    timings.seconds.setdefault(name, []).append(seconds)
    timings.results.setdefault(name, result)
    forward = timings.seconds.get("forward")
    ratio = f" ({seconds / statistics.median(forward):.2f} forward passes)" if forward and name != "forward" else ""
    console.say(f"  {name}: {seconds:.3f} s{ratio}")


def rounds(ours: dict[str, Work], foreign: dict[str, Work], budget: Budget, timings: Timings, console: Console) -> None:
    """One round of all works; then rounds of all of them, or of the core alone, while time is left.

    Args:
        ours: works of this package by name.
        foreign: works of rivals; one that raises is noted among the failures and left out from there on.
        budget: how long to go on.
        timings: filled in.
        console: progress.
    """
    works = ours | foreign
    for number in range(budget.rounds):
        names = _affordable(list(works), budget, timings) if number > 0 else list(works)
        if not names:
            return
        console.say(f"round {number + 1}: {len(names)} works")
        for name in names:
            try:
                run_once(name, works[name], timings, console)
            except Exception as error:  # whatever a foreign library raises is its result
                if name not in foreign:
                    raise
                timings.failures[name] = reason(error)
                console.say(f"  {name} failed: {timings.failures[name]}")
        works = {name: work for name, work in works.items() if name not in timings.failures}


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _affordable(names: list[str], budget: Budget, timings: Timings) -> list[str]:
    """All works if a round of them fits in the time left, else the core if it fits, else none."""
    left = budget.until - time.monotonic()
    for chosen in (names, list(budget.core)):
        if sum(timings.median(name) for name in chosen) <= left:
            return chosen
    return []


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
