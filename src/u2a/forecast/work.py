"""One piece of a run's work: batches that pass the policy in one way, and those that the trainer will see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from u2a.encoding import Encoded
from u2a.record import derive_seed
from u2a.stream import stream_index

Rows = tuple[Encoded, ...]


@dataclass(frozen=True)
class Work:
    """Batches that pass the policy in one way, or texts that a reward model reads.

    Attributes:
        kind: ``forward`` (no gradients), ``gradient`` (of J or a loss), ``step`` (of training), ``score``,
            ``generate``, ``unrolled`` (a step of training, run again and differentiated), ``product`` (with the
            curvature), or ``reward model``, ``eval reward model``, ``second reward model``.
        batches: rows of every batch; of ``generate`` the prompts, with the tokens to draw as their answer length.
        times: how often all of that is done; of a reward model the number of texts.
        graph: batches that follow each other and are in one graph: those of the candidates and of the retain rows.
    """

    kind: str
    batches: tuple[Rows, ...] = ()
    times: float = 1.0
    graph: int = 1


def step_batches(
    rows: Sequence[Encoded], size: int, steps: int, seed: int, retain: Sequence[Encoded] = (), retain_size: int = 0
) -> tuple[Rows, ...]:
    """List the batches that the trainer will see, in order.

    Args:
        rows: the training set in its order.
        size: rows per micro-batch.
        steps: micro-batches.
        seed: the trainer's seed.
        retain: retain rows; may be empty.
        retain_size: retain rows per micro-batch.

    Returns:
        For every micro-batch its rows, followed by its retain rows where there are any.
    """
    first, second = (derive_seed(seed, f"{name} stream") for name in ("sample", "retain"))
    batches: list[Rows] = []
    for step in range(steps):
        places = (stream_index(step * size + k, len(rows), first) for k in range(size))
        batches.append(tuple(rows[place] for place in places))
        if retain and retain_size:
            places = (stream_index(step * retain_size + k, len(retain), second) for k in range(retain_size))
            batches.append(tuple(retain[place] for place in places))
    return tuple(batches)
