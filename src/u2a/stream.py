"""The order in which an unlearning run sees its samples: endless, balanced, and a function of position alone.

Position p of the stream is entry ``p mod n`` of the permutation number ``p div n``, and a permutation is a function
of the seed and its number. So every batch is full, every sample comes equally often, the retain rows of a batch
follow from the batch's number, and a resumed or distributed run sees exactly the rows it would have seen otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from u2a.encoding import Encoded, collate


@dataclass(frozen=True)
class Sample:
    """One row of the unlearning set, ready for the model.

    Attributes:
        encoded: tokens.
        weight: |S| omega_i: the weight normalised to mean 1 over the set; > 0.
        reference_sum: s_i at theta_0 in nats (0 where the loss needs none).
        index: row number in the set.
    """

    encoded: Encoded
    weight: float
    reference_sum: float
    index: int


@lru_cache(maxsize=8)
def permutation(seed: int, number: int, n: int) -> tuple[int, ...]:
    """Return one permutation of ``range(n)``.

    Args:
        seed: the stream's seed.
        number: which permutation, >= 0.
        n: items.

    Returns:
        The permutation, the same wherever it is computed.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    return tuple(torch.randperm(n, generator=generator).tolist())


def stream_index(position: int, n: int, seed: int) -> int:
    """Return the item at a position of the endless stream.

    Args:
        position: >= 0.
        n: items.
        seed: the stream's seed.

    Returns:
        Index in [0, n).
    """
    return permutation(seed, position // n, n)[position % n]


class SampleStream(Dataset[tuple[int, Sample]]):
    """The samples by stream position.

    Args:
        samples: the unlearning set, at least one.
        epoch_length: positions counted as one epoch.
        seed: the stream's seed.
    """

    def __init__(self, samples: Sequence[Sample], epoch_length: int, seed: int) -> None:
        self.samples, self.epoch_length, self.seed = tuple(samples), epoch_length, seed

    def __len__(self) -> int:
        return self.epoch_length

    def __getitem__(self, position: int) -> tuple[int, Sample]:
        return position, self.samples[stream_index(position, len(self.samples), self.seed)]


class FixedSamples(Dataset[tuple[int, Sample]]):
    """Samples in a fixed order, for evaluation.

    Args:
        samples: any number.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = tuple(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        return index, self._samples[index]


class StreamSampler(Sampler[int]):
    """Positions of one epoch after the other.

    Args:
        epoch_length: positions per epoch.
    """

    def __init__(self, epoch_length: int) -> None:
        self.epoch_length, self.epoch = epoch_length, 0

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch (called by the trainer, also on resume).

        Args:
            epoch: 0-based.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.epoch_length

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.epoch_length
        return iter(range(start, start + self.epoch_length))


@dataclass(frozen=True)
class BatchMaker:
    """Turns stream entries into padded tensors, with the retain rows that belong to the batch.

    Attributes:
        pad_id: padding token.
        batch_size: rows per batch; position // batch_size numbers the batches.
        retain: retain rows; may be empty.
        retain_batch_size: retain rows per batch.
        seed: seed of the retain stream.
    """

    pad_id: int
    batch_size: int
    retain: tuple[Encoded, ...]
    retain_batch_size: int
    seed: int

    def __call__(self, entries: Sequence[tuple[int, Sample]]) -> dict[str, Any]:
        """Collate one batch.

        Args:
            entries: (position, sample) pairs at consecutive positions.

        Returns:
            ``forget`` (the fields of a :class:`~u2a.encoding.Batch`), ``weight``, ``reference_sum``, ``index``, and
            ``retain`` when there are retain rows.
        """
        samples = [sample for _, sample in entries]
        out: dict[str, Any] = {
            "forget": tensors(collate([sample.encoded for sample in samples], self.pad_id)),
            "weight": torch.tensor([sample.weight for sample in samples]),
            "reference_sum": torch.tensor([sample.reference_sum for sample in samples]),
            "index": torch.tensor([sample.index for sample in samples]),
        }
        if self.retain and self.retain_batch_size:
            first = entries[0][0] // self.batch_size * self.retain_batch_size
            rows = [stream_index(first + k, len(self.retain), self.seed) for k in range(self.retain_batch_size)]
            out["retain"] = tensors(collate([self.retain[row] for row in rows], self.pad_id))
        return out


def tensors(batch: Any) -> dict[str, Tensor]:
    """Return a batch's tensors by field name (accelerate moves dictionaries between devices).

    Args:
        batch: a :class:`~u2a.encoding.Batch`.

    Returns:
        Its fields.
    """
    return dict(vars(batch))
