"""An append-only file of JSON values by key, which outlives a killed process and serves several at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from u2a.errors import RecordError
from u2a.record import content_id, writing


class JsonlCache:
    """JSON values by key, one line each; a batch is on the disk when :meth:`put_many` returns.

    Every line carries a check sum, so a cut or altered line is skipped, whatever else the file holds. Every batch
    is one appended write that begins with a line end, so that it never joins a line which a killed process left
    unfinished. Of equal keys the last line counts. What other processes append is seen when the file is next opened.

    Args:
        path: a ``.jsonl`` file; it and its folder are made by the first batch.

    Attributes:
        path: the file.
        n_damaged: lines that could not be read when the file was opened; a write that was killed leaves one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.n_damaged = 0
        self._values: dict[str, Any] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    key, value, check = json.loads(line)
                    if check != content_id(key, json.dumps(value)):
                        raise ValueError("check sum")
                except (ValueError, TypeError, AttributeError):
                    self.n_damaged += 1
                else:
                    self._values[key] = value

    @property
    def n(self) -> int:
        """Values held (no ``len``: an empty cache is still a cache, and true)."""
        return len(self._values)

    def get(self, key: str) -> Any | None:
        """Look a value up.

        Args:
            key: its key.

        Returns:
            The value as JSON gives it back (lists for tuples), or None when there is none; do not change it.
        """
        return self._values.get(key)

    def put_many(self, values: Mapping[str, Any]) -> None:
        """Add values and wait until the disk has them.

        Args:
            values: JSON values by key. None is allowed and reads like a missing key.

        Raises:
            RecordError: a value is not JSON, or holds a number that is not finite; nothing is added.
        """
        if not values:
            return
        texts: dict[str, str] = {}
        for key, value in values.items():
            try:
                texts[key] = json.dumps(value, allow_nan=False)
            except (ValueError, TypeError) as error:
                raise RecordError(f"{self.path}: the value of {key!r} cannot be kept as JSON ({error})") from None
        lines = [f"[{json.dumps(key)}, {text}, {json.dumps(content_id(key, text))}]\n" for key, text in texts.items()]
        self._append(("\n" + "".join(lines)).encode("ascii"))
        self._values |= {key: json.loads(text) for key, text in texts.items()}

    def _append(self, raw: bytes) -> None:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while raw:  # one turn, unless the system takes less than was given
                    raw = raw[os.write(handle, raw) :]
                os.fsync(handle)
            finally:
                os.close(handle)
