"""Folders that are saved whole or not at all, with a manifest that says what whole means.

A folder is written aside, every file is synced, ``MANIFEST.json`` with the SHA-256 of each comes last, and then the
folder takes its name. A kill between any two of these calls leaves the previous folder or the new one, after
:func:`u2a.disk.recover` at the next start; a folder that does not agree with its manifest is never read.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from u2a import disk
from u2a.errors import ConfigError, RecordError
from u2a.record import Row, one_line, refuse_foreign_link, writing

MANIFEST = "MANIFEST.json"
SCHEMA = 1
REPLACED = ("adapter", "model", "merged", "base", "arms", "checkpoints")  # folders that a run replaces or deletes
_NUMBERED = re.compile(r"checkpoint-(\d+)")


class FileEntry(Row):
    """What a manifest says of one file.

    Attributes:
        sha256: of its content.
        bytes: its size.
    """

    sha256: str
    bytes: int


class Manifest(Row):
    """Content of ``MANIFEST.json``.

    Attributes:
        schema_version: of this file.
        files: every other file of the folder, by its path in it.
    """

    schema_version: int = SCHEMA
    files: dict[str, FileEntry]


_MANIFEST = TypeAdapter(Manifest)


def save_folder(folder: Path, write: Callable[[Path], object]) -> Path:
    """Save a folder whole; one that stands there is replaced.

    Args:
        folder: the folder; whatever is in it is replaced.
        write: writes all files into the folder it is given.

    Returns:
        ``folder``.

    Raises:
        WriteError: the system refused it; the old folder stands.
    """
    part = disk.aside(folder)
    with writing(folder):
        try:
            disk.make(part)
            write(part)
            _seal(part)
            verify(part)
            _put(part, folder)
        except BaseException:
            with suppress(OSError):
                disk.remove_tree(part)
            raise
    return folder


def _seal(folder: Path) -> None:
    """Wait until the disk has every file, then write the manifest."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    for path in files:
        disk.sync(path)
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
        disk.sync(path)
    manifest = Manifest(files={path.relative_to(folder).as_posix(): _entry(path) for path in files})
    with disk.whole_file(folder / MANIFEST) as part:
        disk.write(part, manifest.model_dump_json(indent=1).encode() + b"\n")


def _put(part: Path, folder: Path) -> None:
    """Give a finished folder its name."""
    old = None
    if folder.exists() or folder.is_symlink():
        old = disk.aside(folder, "old")
        disk.rename(folder, old)
    disk.rename(part, folder)
    disk.sync(folder.parent)
    if old is not None:
        disk.remove_tree(old)


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(sha256=digest, bytes=path.stat().st_size)


def delete(folder: Path) -> None:
    """Remove a folder so that no part of it is ever taken for the whole.

    Args:
        folder: the folder; it may be absent.
    """
    if folder.exists():
        with writing(folder):
            gone = disk.aside(folder)
            disk.rename(folder, gone)
            disk.remove_tree(gone)


def delete_saved(folder: Path) -> None:
    """Remove a folder that is exactly what was saved there; anything else stays.

    Args:
        folder: the folder; it may be absent.
    """
    if not (folder / MANIFEST).is_file():
        return
    with suppress(RecordError):
        verify(folder)
        delete(folder)


def verify(folder: Path) -> None:
    """Check that a folder is exactly what was saved.

    Args:
        folder: the folder.

    Raises:
        RecordError: it is missing, or a file is missing, changed, or there besides.
    """
    remedy = "delete it and run again what writes it"
    refuse_foreign_link(folder / MANIFEST)
    try:
        manifest = _MANIFEST.validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise RecordError(f"{folder}: no {MANIFEST} there, so it was not saved whole; {remedy}") from None
    except (OSError, ValidationError) as error:
        reason = one_line("; ".join(str(error).splitlines()))
        raise RecordError(f"{folder / MANIFEST}: unreadable ({reason}); {remedy}") from None
    if manifest.schema_version > SCHEMA:
        raise RecordError(f"{folder}: schema {manifest.schema_version} is newer than {SCHEMA} (upgrade u2a)")
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    different = sorted((found.keys() - {MANIFEST}) ^ manifest.files.keys())
    if different:
        state = "is missing" if different[0] in manifest.files else "is there besides"
        raise RecordError(f"{folder}: {one_line(different[0])!r} {state}; {remedy}")
    for name, entry in manifest.files.items():
        if found[name].is_symlink() or _entry(found[name]) != entry:
            raise RecordError(f"{folder}: {one_line(name)!r} is not the file that was saved; {remedy}")


def refuse_foreign_files(folder: Path) -> None:
    """Refuse to replace a folder that holds more than what was saved there before.

    Args:
        folder: the folder; it may be absent or empty.

    Raises:
        ConfigError: it holds other files.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        verify(folder)
    except RecordError:
        raise ConfigError(f"{folder}: holds files that were not saved there this way (name a new folder)") from None


def refuse_foreign_directory(folder: Path) -> None:
    """Refuse to run where a run would replace or delete what another program has put there.

    Args:
        folder: the directory of a run; it may be absent.

    Raises:
        ConfigError: it holds one of the folders that a run replaces, and no run.
    """
    if any((folder / name).exists() for name in ("run.yaml", "stages.json")):
        return
    found = [name for name in REPLACED if (folder / name).exists()]
    if found:
        what = f"{folder} holds {found[0]}/ of something else, which a run would replace"
        raise ConfigError(f"output_dir: {what} (name a new directory)")


def is_whole(folder: Path) -> bool:
    """Whether a folder is there and exactly what was saved; a warning says why one that is there is not.

    Args:
        folder: the folder; it may be absent.

    Returns:
        True when it can be read.
    """
    if not folder.is_dir():
        return False
    try:
        verify(folder)
    except RecordError as error:
        logging.getLogger(__name__).warning("not used: %s", error)
        return False
    return True


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """List the checkpoints ``checkpoint-N`` in a folder.

    Args:
        folder: the folder; it may be absent.

    Returns:
        (N, path), N ascending.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    matches = [(_NUMBERED.fullmatch(path.name), path) for path in entries if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole; newer ones that are not are passed over with a warning.

    Args:
        folder: where the checkpoints are.

    Returns:
        Its path, or None.
    """
    return next((path for _, path in reversed(numbered(folder)) if is_whole(path)), None)


def prune(folder: Path, keep: int, protected: Collection[Path] = ()) -> None:
    """Remove old checkpoints, after the newest one has been verified.

    Args:
        folder: where the checkpoints are; those of an earlier run may have higher numbers.
        keep: checkpoints that stay, the latest written and the protected ones, >= 1.
        protected: these stay in any case.
    """
    found = sorted(numbered(folder), key=lambda each: (each[1].stat().st_mtime_ns, each[0]), reverse=True)
    latest = [path for _, path in found]
    kept = [path for path in latest if path in protected]
    kept += [path for path in latest if path not in protected][: max(0, keep - len(kept))]
    for path in reversed(latest):
        if path not in kept:
            delete(path)
