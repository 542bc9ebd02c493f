"""The protocol as it was fixed before the first cell: its hash, and what was changed since."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from u2a import __version__
from u2a.errors import RecordError
from u2a.experiment.protocol import Protocol, decisive, task_config
from u2a.record import Record, Row, content_id

# Options younger than protocols that are kept somewhere: at their defaults they are left out, and change no hash.
_YOUNGER = (("arms", "up_to", None), ("arms", "tuned_by", None), ("statements", "spent", "budget"))
_PLANS = "task_plans"  # a task's own seeds and whose trials it takes; protocols kept from before do not have the part


class Replaced(Row):
    """A protocol that stood in the folder before.

    Attributes:
        hash: of it.
        time: UTC, when another one took its place.
        n_main_cells: cells of main seeds that had been run by then (results that could have been seen).
        changed: parts of the document that differ from the one after it.
    """

    hash: str
    time: str
    n_main_cells: int
    changed: tuple[str, ...]


class FrozenProtocol(Record):
    """What ``protocol.json`` holds.

    Attributes:
        hash: of the document.
        document: the protocol, with the options of every task and the content of its files.
        replaced: those that stood there before, oldest first.
    """

    hash: str
    document: dict[str, Any] = Field(default_factory=dict)
    replaced: tuple[Replaced, ...] = ()


def frozen(protocol: Protocol) -> FrozenProtocol:
    """Resolve a protocol into the document that stands for it.

    Args:
        protocol: the protocol.

    Returns:
        Document and hash; equal on every machine with equal files, whatever the paths.
    """
    document = protocol.model_dump(mode="json", exclude={"output_dir", "tasks"})
    for part, name, default in _YOUNGER:
        for section in document[part].values():
            if section[name] == default:
                del section[name]
    document["tasks"] = {name: decisive(task_config(protocol, name, 0)) for name in protocol.tasks}
    document["version"] = __version__
    document[_PLANS] = {
        name: plan
        for name, section in protocol.tasks.items()
        if (plan := section.model_dump(mode="json", include={"seeds", "tuned_on"}, exclude_none=True))
    }
    hashed = {part: content for part, content in document.items() if part != _PLANS or content}
    return FrozenProtocol(hash=content_id(json.dumps(hashed, sort_keys=True)), document=document)


def protocol_hash(protocol: Protocol) -> str:
    """Hash everything that decides a number.

    Args:
        protocol: the protocol.

    Returns:
        16 hexadecimal digits.
    """
    return frozen(protocol).hash


def fix(protocol: Protocol, replace: bool = False) -> FrozenProtocol:
    """Write ``protocol.json`` before the first cell, or check that it is still the same.

    Args:
        protocol: the protocol.
        replace: put this one in the place of another one, which is kept in ``replaced``; cells that it decides
            otherwise are run anew.

    Returns:
        What is written there. A document from before a task's seeds were part of it gets the part it lacks.

    Raises:
        RecordError: another protocol stands there.
    """
    path, now = file_of(protocol), frozen(protocol)
    if path.exists():
        before = FrozenProtocol.load(path)
        changed = tuple(sorted(key for key in now.document if now.document[key] != before.document.get(key)))
        if before.hash == now.hash and not changed:
            return before
        if changed == (_PLANS,) and _PLANS not in before.document:  # written before there was this part
            now = now.model_copy(update={"replaced": before.replaced})
            now.save(path)
            return now
        if not replace:
            raise RecordError(
                f"{path}: results of another protocol are there ({', '.join(changed) or 'other content'} changed "
                "since; name another output_dir, or give --new-protocol)"
            )
        time = datetime.now(UTC).isoformat(timespec="seconds")
        count = _main_cells(path.parent / "cells", protocol.tuning.seeds)
        old = Replaced(hash=before.hash, time=time, n_main_cells=count, changed=changed)
        now = now.model_copy(update={"replaced": (*before.replaced, old)})
    now.save(path)
    return now


def file_of(protocol: Protocol) -> Path:
    """Where the frozen protocol is kept.

    Args:
        protocol: the protocol.

    Returns:
        ``protocol.json`` in its folder.
    """
    return Path(protocol.output_dir) / "protocol.json"


def _main_cells(folder: Path, tuning: list[int]) -> int:
    """Cells in a folder whose seed is none of the tuning's."""
    seeds = {f"s{seed}" for seed in tuning}
    return sum(path.name.split(".")[2] not in seeds for path in folder.glob("*.json"))
