"""Batches that get smaller where memory runs out, so that a run ends with the same result instead of an error.

A pass without an update computes its batch in halves: every row is computed once, and no result depends on the batch
it came from but for rounding. A training micro-batch is put back, its gradient thrown away, and computed in smaller
parts whose losses carry their share of the mean. The size that fitted is kept, so memory runs out once, not in every
batch, and whoever listens (:func:`told_to`) learns of it.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from u2a.encoding import Encoded, token_batches
from u2a.errors import OutOfMemory

Item = TypeVar("Item")
Found = TypeVar("Found")
Told = Callable[[str, int], None]


def _warn(name: str, size: int) -> None:
    logging.getLogger(__name__).warning("out of memory: %s at most %d from here on", name, size)


_TOLD: ContextVar[Told] = ContextVar("told", default=_warn)


@contextmanager
def told_to(listener: Told) -> Iterator[None]:
    """Report smaller batches to a listener for the duration of a ``with`` block.

    Args:
        listener: called with the name of what got smaller and its new size.

    Yields:
        Nothing.
    """
    token = _TOLD.set(listener)
    try:
        yield
    finally:
        _TOLD.reset(token)


@dataclass
class BatchLimits:
    """The largest batches of one model that fitted, once memory has run out; None before that.

    Attributes:
        model: the model's part in the run, for the record.
        unit: what the batches of a pass without an update are measured in.
        tokens: that many tokens (or other units) of such a batch, padding included.
        rows: unlearning rows of a training micro-batch.
    """

    model: str = "policy"
    unit: str = "tokens"
    tokens: int | None = None
    rows: int | None = None

    def cut(self, tokens: int) -> int:
        """Return a token budget within the limit.

        Args:
            tokens: the budget asked for.

        Returns:
            The smaller of both.
        """
        return tokens if self.tokens is None else min(tokens, self.tokens)

    def lower_tokens(self, tokens: int) -> None:
        """Note that no more tokens than these fit.

        Args:
            tokens: the new limit.
        """
        self.tokens = tokens
        _TOLD.get()(f"{self.model}: {self.unit} per batch", tokens)

    def lower_rows(self, rows: int) -> None:
        """Note that no more rows than these fit into a training micro-batch.

        Args:
            rows: the new limit.
        """
        self.rows = rows
        _TOLD.get()(f"{self.model}: rows per training micro-batch", rows)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device.

    Args:
        error: what was raised.

    Returns:
        True for torch's own error, Python's, and the texts of allocators that raise a plain ``RuntimeError``.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turn a lack of memory into one clear error where no smaller batch can be tried.

    Args:
        what: what the memory is for.

    Yields:
        Nothing.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(what) from None
        raise


def in_parts(
    batch: Sequence[Item], width: int, limits: BatchLimits, compute: Callable[[list[Item]], Found]
) -> Iterator[tuple[list[Item], Found]]:
    """Compute one batch: whole where it fits, else in halves, and their halves.

    Args:
        batch: rows, the longest first.
        width: tokens of the longest row (1 where rows are counted).
        limits: what fitted so far; lowered where memory runs out.
        compute: from some of the rows, in order, to a result; it must leave nothing behind when it fails.

    Yields:
        Rows with their result; every row exactly once, in order.

    Raises:
        OutOfMemory: one row (or pair) alone does not fit.
    """
    rest = list(batch)
    while rest:
        size = len(rest) if limits.tokens is None else max(1, min(len(rest), limits.tokens // width))
        part = rest[:size]
        found = _attempt(lambda part=part: compute(part))
        if found is None:
            if size == 1:
                raise OutOfMemory(f"{limits.model}, the smallest batch ({width} {limits.unit})")
            limits.lower_tokens(size // 2 * width)
            continue
        rest = rest[size:]
        yield part, found[0]


def forward_batches(
    encoded: Sequence[Encoded], token_budget: int, limits: BatchLimits, compute: Callable[[list[int]], Found]
) -> Iterator[tuple[list[int], Found]]:
    """Compute sequences in batches of similar length, smaller ones where memory runs out.

    Args:
        encoded: sequences.
        token_budget: tokens per batch, padding included.
        limits: see :func:`in_parts`.
        compute: from indices into ``encoded`` to a result.

    Yields:
        Indices with their result; every index exactly once.
    """
    for batch in token_batches(encoded, token_budget):
        yield from in_parts(batch, len(encoded[batch[0]].input_ids), limits, compute)


def with_less(limits: BatchLimits, encoded: Sequence[Encoded], tokens: int, compute: Callable[[], Found]) -> Found:
    """Run a whole pass that cuts its batches by ``limits.cut(tokens)``, again with less where memory runs out.

    Args:
        limits: lowered where memory runs out.
        encoded: all sequences of the pass.
        tokens: the token budget.
        compute: the pass; it must leave nothing behind when it fails.

    Returns:
        Its result.

    Raises:
        OutOfMemory: it does not fit with one row per batch either.
    """
    widest = max((len(item.input_ids) for item in encoded), default=1)
    while True:
        found = _attempt(compute)
        if found is not None:
            return found[0]
        most = min(limits.cut(tokens), widest * len(encoded))
        if most < 2 * widest:
            raise OutOfMemory(f"{limits.model}, the smallest batch ({widest} {limits.unit})")
        limits.lower_tokens(max(widest, most // 2))


def micro_batch(
    n: int, parameters: Sequence[Tensor], limits: BatchLimits, losses: Callable[[int], list[Tensor]]
) -> Tensor:
    """Add the gradient of one training micro-batch, in parts where it does not fit whole.

    Args:
        n: its rows.
        parameters: those whose ``grad`` it adds to.
        limits: what fitted so far; lowered where memory runs out.
        losses: from a number of parts to their losses, which sum to that of the micro-batch; forward and backward
            passes, one part after the other.

    Returns:
        The micro-batch's loss, summed over parts in float64.

    Raises:
        OutOfMemory: one row (with its share of the retain rows) does not fit.
    """
    while True:
        size = n if limits.rows is None else min(n, limits.rows)
        count = math.ceil(n / size)
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        found = _attempt(lambda count=count: [loss.detach() for loss in losses(count)])
        for parameter, earlier in zip(parameters, before, strict=True):
            if found is None or parameter.grad is None:
                parameter.grad = earlier
            elif earlier is not None:
                parameter.grad = earlier.add_(parameter.grad)
        if found is not None:
            return torch.stack([loss.double() for loss in found[0]]).sum().to(found[0][0])
        if size == 1:
            raise OutOfMemory(f"{limits.model}, a training micro-batch of one row")
        limits.lower_rows(size // 2)


def split_rows(inputs: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Split a training batch so that the losses of the parts sum to the loss of the whole.

    Weights carry each part's share of the mean over rows, ``retain_share`` its share of the retain term, and ``part``
    its number.

    Args:
        inputs: a batch of :class:`~u2a.stream.BatchMaker` with n unlearning rows.
        count: parts, from 1 to n; their sizes differ by one row at most.

    Returns:
        The parts, or the batch itself for one part.
    """
    if count == 1:
        return [inputs]
    n = len(inputs["weight"])
    m = len(inputs["retain"]["input_ids"]) if "retain" in inputs else 0
    out = []
    for k in range(count):
        rows, kept = slice(k * n // count, (k + 1) * n // count), slice(k * m // count, (k + 1) * m // count)
        share = (rows.stop - rows.start) / n
        part: dict[str, Any] = {name: inputs[name][rows] for name in ("reference_sum", "index")} | {"part": k}
        part |= {"weight": inputs["weight"][rows] * share, "forget": _rows(inputs["forget"], rows)}
        part["retain_share"] = (kept.stop - kept.start) / m if m else share
        if kept.stop > kept.start:
            part["retain"] = _rows(inputs["retain"], kept)
        out.append(part)
    return out


def _rows(fields: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in fields.items()}


def _attempt(compute: Callable[[], Found]) -> tuple[Found] | None:
    """The result, or None when memory ran out; what the failed attempt held is free again then."""
    try:
        return (compute(),)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()
    clear_device_cache()
    return None
