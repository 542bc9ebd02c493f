"""What every record is made of: frozen, typed, identified by content, saved whole or not at all.

Every record is one JSON file. Undefined statistics are ``None`` with a count beside them,
never a filler number; NaN and infinities are refused on save.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from u2a import disk
from u2a.errors import RecordError, WriteError

SCHEMA = 1


def content_id(*parts: str) -> str:
    """Return a 16-hex-digit id of a text, the same on every machine.

    Args:
        *parts: strings; their boundaries count (``("ab", "c")`` differs from ``("a", "bc")``).

    Returns:
        64 bits of BLAKE2b as hexadecimal digits.

    >>> content_id("a", "b") == content_id("a", "b"), content_id("ab") == content_id("a", "b")
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.hexdigest()


def one_line(text: str, most: int = 400) -> str:
    r"""Return a foreign text as one printable line, for messages.

    Args:
        text: any text; line ends, control characters and halves of surrogate pairs are written as escapes.
        most: characters read; a longer text is cut and ends with three dots.

    Returns:
        The line.

    >>> print(one_line("a\nb\x1b[2J"), one_line("abcd", most=2))
    a\nb\x1b[2J ab...
    """
    shown = text if len(text) <= most else text[:most] + "..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)


def derive_seed(seed: int, purpose: str) -> int:
    """Derive the seed of one generator from the run's one seed.

    Args:
        seed: the run's seed.
        purpose: what the generator is for; different purposes get independent seeds.

    Returns:
        Seed in [0, 2**31).
    """
    return int(content_id(str(seed), purpose), 16) % 2**31


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a mix.

    Args:
        path: target; its parent is created.
        text: content, written as UTF-8.

    Raises:
        WriteError: the system refused it; the old content stands.
    """
    with writing(path), disk.whole_file(path) as part:
        disk.write(part, text.encode("utf-8"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is written into one clear error.

    Args:
        path: the file or directory, for the message.

    Yields:
        Nothing.

    Raises:
        WriteError: the system refused it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise WriteError(path, one_line(said or str(error))) from None


def sweep(folder: Path) -> int:
    """Clear away what killed processes left unfinished below a folder that nobody else writes to now.

    Args:
        folder: a run's directory.

    Returns:
        Files and folders cleared away or put back (see :func:`u2a.disk.recover`).
    """
    with writing(folder):
        return len(disk.recover(folder, deep=True))


class Row(BaseModel):
    """Base of the parts of records: frozen, no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", protected_namespaces=())


class Record(Row):
    """Base of what a stage returns: a row that can be saved to and loaded from one JSON file."""

    def save(self, path: str | Path) -> Path:
        """Save to ``path`` atomically.

        Args:
            path: a ``.json`` file.

        Returns:
            The path written.

        Raises:
            RecordError: a number in the record is NaN or infinite.
        """
        document = {"record": type(self).__name__, "schema": SCHEMA, "data": self.model_dump(mode="json")}
        bad = _non_finite_key(document["data"], type(self).__name__)
        if bad:
            raise RecordError(f"{path}: {bad}: not a finite number (use None for an undefined statistic)")
        write_whole(Path(path), json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a record saved by :meth:`save`.

        Args:
            path: the ``.json`` file.

        Returns:
            The record, equal to the one saved.

        Raises:
            RecordError: missing or damaged file, a link that leaves its folder, another record's file, a newer schema,
                or a number that is not finite.
        """
        refuse_foreign_link(Path(path))
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordError(f"{path}: no {cls.__name__} there (run the stage that writes it first)") from None
        except (OSError, ValueError, RecursionError) as error:
            raise RecordError(f"{path}: unreadable ({error}); delete it and run its stage again") from None
        if not isinstance(document, dict) or document.get("record") != cls.__name__:
            found = document.get("record") if isinstance(document, dict) else type(document).__name__
            raise RecordError(f"{path}: holds {one_line(repr(found), 80)}, expected {cls.__name__!r}")
        schema = document.get("schema")
        if not isinstance(schema, int) or schema < 1:
            raise RecordError(f"{path}: not a valid {cls.__name__}: its schema is {one_line(repr(schema), 80)}")
        if schema > SCHEMA:
            raise RecordError(f"{path}: schema {schema} is newer than {SCHEMA} (upgrade u2a)")
        bad = _non_finite_key(document.get("data"), cls.__name__)
        if bad:
            raise RecordError(f"{path}: {one_line(bad)}: not a finite number; delete it and run its stage again")
        try:
            return cls.model_validate(document["data"])
        except (ValidationError, KeyError) as error:
            reason = one_line("; ".join(str(error).splitlines()))
            raise RecordError(f"{path}: not a valid {cls.__name__}: {reason}") from None


def refuse_foreign_link(path: Path) -> None:
    """Refuse a file that is a link out of its folder: a record is read from where it was written.

    Args:
        path: the file; it need not exist.

    Raises:
        RecordError: the link leads elsewhere.
    """
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise RecordError(f"{path}: a link out of its folder (put the file itself there)")


def _non_finite_key(value: Any, where: str) -> str | None:
    """Return the path of the first NaN or infinity inside nested lists and dicts, or None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found = _non_finite_key(item, f"{where}.{key}")
        if found:
            return found
    return None
