"""What a method spends: FLOPs by shape, wall and CPU seconds by phase, peak memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from u2a.progress import peak_rss_bytes, reset_peak_rss
from u2a.record import Row

Phase = Literal["select", "train", "generate", "reward", "reference", "retain", "prepare"]
Shape = Sequence[int]


class Spent(Row):
    """Compute spent up to a moment, evaluation left out.

    Attributes:
        flops: floating-point operations by phase, two per multiply-add, counted by tensor shapes.
        seconds: wall seconds by phase, less what counting the operations takes.
        cpu_seconds: CPU seconds of this process by phase, likewise; a busy machine changes them less.
        peak_rss_bytes: peak resident memory of the process within the phases (elsewhere than on Linux: so far).
    """

    flops: dict[str, int] = {}
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    peak_rss_bytes: int = 0

    @property
    def total_flops(self) -> int:
        """FLOPs of all phases."""
        return sum(self.flops.values())


class Meter:
    """Counts what is done inside its phases, and nothing outside them.

    Matrix products, convolutions and attention are counted; what is done element by element is not. Only the thread
    that opened a phase is watched (a backward pass on the CPU runs in it), and phases must not be closed while another
    dispatch mode of torch is open inside them.
    """

    def __init__(self) -> None:
        self._open: list[Phase | None] = []
        self._flops: defaultdict[str, int] = defaultdict(int)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._cpu: defaultdict[str, float] = defaultdict(float)
        self._counter: _Counter | None = None
        self._since = (0.0, 0.0)
        self._peak = 0

    @property
    def flops(self) -> int:
        """FLOPs of all phases, the open one included."""
        running = 0 if self._counter is None else self._counter.flops
        return sum(self._flops.values()) + running

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count what happens in a ``with`` block. A nested phase is charged to the inner name alone.

        Args:
            name: what the compute is spent on.
        """
        with self._entered(name):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing in a ``with`` block (evaluation)."""
        with self._entered(None):
            yield

    def spent(self) -> Spent:
        """Tell what was spent so far.

        Returns:
            The sums by phase, in the order in which phases were first opened.
        """
        self._switch(lambda: None)
        return Spent(
            flops=dict(self._flops),
            seconds={name: round(value, 4) for name, value in self._seconds.items()},
            cpu_seconds={name: round(value, 4) for name, value in self._cpu.items()},
            peak_rss_bytes=self._peak,
        )

    @contextmanager
    def _entered(self, name: Phase | None) -> Iterator[None]:
        self._switch(lambda: self._open.append(name))
        try:
            yield
        finally:
            self._switch(lambda: self._open.pop())

    def _switch(self, change: Callable[[], object]) -> None:
        """Book what the open phase has used, change which one is open, and start to count for it."""
        if self._counter is not None:
            name = self._open[-1]
            assert name is not None
            self._counter.__exit__(None, None, None)
            wall, cpu = time.perf_counter() - self._since[0], time.process_time() - self._since[1]
            self._flops[name] += self._counter.flops
            self._seconds[name] += max(0.0, wall - self._counter.cost)
            self._cpu[name] += max(0.0, cpu - self._counter.cost)
            self._peak = max(self._peak, peak_rss_bytes())
            self._counter = None
        change()
        if self._open and self._open[-1] is not None:
            reset_peak_rss()
            self._since = time.perf_counter(), time.process_time()
            self._counter = _Counter()
            self._counter.__enter__()


class _Counter(TorchDispatchMode):
    """Adds up torch's own formulas, as its ``FlopCounterMode`` does at three times the cost per operation.

    Attributes:
        flops: counted so far.
        cost: seconds spent in here, the operations themselves left out. It does not hold what torch takes to come in
            here and back: about half of the whole delay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.cost = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        named = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and torch.is_inference_mode_enabled():  # there a linear layer arrives as one operation
            with self:
                parts = func.decompose(*args, **named)
            if parts is not NotImplemented:
                return parts
        start = time.perf_counter()
        out = func(*args, **named)
        end = time.perf_counter()
        if formula is not None:
            self.flops += formula(*args, **named, out_val=out)
        self.cost += start - begin + time.perf_counter() - end
        return out


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Q K' and P V of every head of the query (heads of keys that are shared are computed for each)."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Five products: Q K' again, dO V', P' dO, dS K and dS' Q."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (3 * width + 2 * value[3])


# torch has no formula for its attention kernel of the CPU, which would count as nothing.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}
