"""Parts of a long computation that are finished, kept on the disk, so that a stopped one does not begin again.

A part belongs to the hash of what it was computed from. It is a folder that is saved whole; one that is damaged is
computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from u2a.checkpoint import delete, is_whole, save_folder
from u2a.record import content_id
from u2a.signals import stopping
from u2a.tensor_tree import read_tree, write_tree

WORTH_S = 1.0  # what took less time is not kept
EVERY_S = 120.0  # between two saves of a part that is not finished

_NAME = "part"


@dataclass(frozen=True)
class Parts:
    """Where the parts of one computation are kept.

    Attributes:
        folder: a directory, or None to keep nothing.
        key: hash of everything that the computation depends on.
    """

    folder: Path | None = None
    key: str = ""

    def of(self, *texts: str) -> Parts:
        """Return the place for the parts of a computation within this one.

        Args:
            *texts: what tells it apart.

        Returns:
            A changed copy.
        """
        return Parts(self.folder, content_id(self.key, *texts))

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """Read a finished part, or compute and keep it.

        Args:
            name: of the part.
            compute: returns it, as a tree of :mod:`u2a.tensor_tree`.

        Returns:
            The part; what was read equals what was computed, with its tensors on the CPU.

        Raises:
            Stopped: a signal asked for that, after the part was kept.
        """
        found = self.load(name)
        if found is not None:
            return found
        start = time.monotonic()
        found = compute()
        if time.monotonic() - start >= WORTH_S:
            self.save(name, found)
        stopping.check()
        return found

    def load(self, name: str) -> Any | None:
        """Read a part.

        Args:
            name: of the part.

        Returns:
            The part, or None where there is none.
        """
        path = self._path(name)
        return read_tree(path, _NAME) if path is not None and is_whole(path) else None

    def save(self, name: str, tree: Any) -> None:
        """Keep a part; an older one of the same name is replaced.

        Args:
            name: of the part.
            tree: the part.
        """
        path = self._path(name)
        if path is not None:
            save_folder(path, lambda folder: write_tree(folder, _NAME, tree))

    def clear(self) -> None:
        """Remove all parts in the directory, also those of other computations."""
        if self.folder is not None:
            delete(self.folder)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / content_id(self.key, name)


class Growing:
    """A tensor that fills up row by row; what is there is kept every few minutes and when the run is to stop.

    Which rows are there is kept with them, so a process that takes them in other batches goes on with the others.

    Args:
        parts: where.
        name: of the part, or None to keep nothing.
        values: the tensor as it begins.

    Attributes:
        values: (n, columns), with what an earlier process found.
        done: (n,) whether a row is in it already.
    """

    def __init__(self, parts: Parts, name: str | None, values: Tensor) -> None:
        self._parts, self._name = parts, name
        found = None if name is None else parts.load(name)
        self.values: Tensor = values if found is None else found["values"]
        self.done: Tensor = torch.zeros(len(values), dtype=torch.bool) if found is None else found["rows"]
        self._since = time.monotonic()

    def grown(self, rows: Sequence[int]) -> None:
        """Note that rows are there, and keep the tensor when it is time.

        Args:
            rows: indices of those that were filled now.
        """
        self.done[list(rows)] = True
        least = WORTH_S if bool(self.done.all()) else EVERY_S
        spent = time.monotonic() - self._since
        if self._name is None or not (spent >= least or stopping.requested is not None):
            return
        self._parts.save(self._name, {"values": self.values, "rows": self.done})
        self._since = time.monotonic()
