"""The file-system calls of every save, one function each, and the file that is whole or absent after any kill.

A save writes aside, under a name that :func:`aside` gives, waits until the disk has it, and renames. Only what a killed
save left behind keeps such a name, so :func:`recover` can clear it away at the next start.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<role>tmp|old)-[0-9a-f]{32}", re.DOTALL)


def make(folder: Path) -> None:
    """Make a folder with its parents, where it is not there yet.

    Args:
        folder: the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a new file.

    Args:
        path: the file; its folder exists.
        data: its content.
    """
    path.write_bytes(data)


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's entries.

    Args:
        path: file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(old: Path, new: Path) -> None:
    """Rename; of a file that stood there a reader sees the old one or the new one.

    Args:
        old: what is renamed.
        new: its new name, in the same file system; no folder stands there.
    """
    os.replace(old, new)


def remove(path: Path) -> None:
    """Remove one file, link or empty folder.

    Args:
        path: what is removed.
    """
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with everything in it; links are not followed.

    Args:
        path: what is removed; it may be absent.
    """
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            remove_tree(entry)
    remove(path)


def aside(path: Path, role: str = "tmp") -> Path:
    """Return a name beside a path that nothing else has.

    Args:
        path: what will be replaced.
        role: ``tmp`` for what is being written, ``old`` for what gives way.

    Returns:
        ``.NAME.ROLE-UUID`` in the same folder.
    """
    return path.with_name(f".{path.name}.{role}-{uuid.uuid4().hex}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file so that a reader, and whoever comes after a kill, sees the old or the new content.

    Args:
        path: target; its folder is made.

    Yields:
        The path to write to.
    """
    make(path.parent)
    part = aside(path)
    try:
        yield part
        sync(part)
        rename(part, path)
    except BaseException:
        with suppress(OSError):
            remove_tree(part)
        raise
    sync(path.parent)


def recover(folder: Path, deep: bool = False) -> list[Path]:
    """Undo or clear away what killed saves left behind; no save may be going on in the folder.

    A folder that had been moved away to give place to a new one is put back where the new one never came.

    Args:
        folder: where to look; it may be absent.
        deep: look in its folders, too.

    Returns:
        What was cleared away or put back, by the names they had.
    """
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            match = _ASIDE.fullmatch(name)
            if match is None:
                continue
            path, target = Path(place, name), Path(place, match["name"])
            if match["role"] == "old" and not os.path.lexists(target):
                rename(path, target)
            else:
                remove_tree(path)
            found.append(path)
        folders[:] = [name for name in folders if deep and not _ASIDE.fullmatch(name)]
    return found
