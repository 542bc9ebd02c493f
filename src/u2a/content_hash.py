"""One hash of everything a run found, to compare runs by: no time, no memory, no machine, no place in a file system."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from u2a.run_records import RunRecords

LEFT_OUT = frozenset({"seconds", "source"})  # wall time, and the file and line of a row


def content_hash(records: RunRecords) -> str:
    """Hash the data's fingerprint and the records of the stages of ``u2a run``.

    Options enter through what they led to. Numbers enter with all their digits, so a run with another number of
    threads, on another machine or with another version of PyTorch has another hash, though it may select the same.

    Args:
        records: what a run wrote.

    Returns:
        SHA-256 as 64 hexadecimal digits; the same for the same options, data and seed.
    """
    stages: dict[str, Any] = {
        "rewards": records.rewards,
        "solution": records.solution,
        "evaluation": records.evaluation,
    } | {f"unlearn {arm}": record for arm, record in records.unlearn.items()}
    found = {name: record.model_dump(mode="json") for name, record in stages.items() if record is not None}
    document = {"data": records.partition.fingerprint, "found": _kept(found)}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(value: Any) -> Any:
    """The value without what differs between two equal runs."""
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items() if key not in LEFT_OUT}
    return [_kept(item) for item in value] if isinstance(value, list) else value
