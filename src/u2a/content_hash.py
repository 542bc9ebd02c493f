"""One hash of everything a run found, to compare runs by: no time, no memory, no machine, no place in a file system."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from u2a.run_records import RunRecords

LEFT_OUT = frozenset({"seconds", "source"})  # wall time, and the file and line of a row
NAMED = frozenset({"name", "first", "second", "note"})  # where a reward model stands, which is called by its folder


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
    document = {"data": records.partition.fingerprint, "found": _kept(found, _reward_names(records))}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _reward_names(records: RunRecords) -> frozenset[str]:
    """Names of the run's reward models."""
    cards = [None if records.rewards is None else records.rewards.card]
    if records.evaluation is not None:
        cards += [records.evaluation.reward_card, records.evaluation.second_reward_card]
    return frozenset(card.name for card in cards if card is not None)


def _kept(value: Any, names: frozenset[str]) -> Any:
    """The value without what differs between two equal runs."""
    if isinstance(value, dict):
        return {
            key: _unnamed(item, names) if key in NAMED and isinstance(item, str) else _kept(item, names)
            for key, item in value.items()
            if key not in LEFT_OUT
        }
    return [_kept(item, names) for item in value] if isinstance(value, list) else value


def _unnamed(text: str, names: frozenset[str]) -> str:
    """A text without the names of reward models: what they found tells them apart."""
    if text in names:
        return ""
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(f"reward of {name}", "reward of")
    return text
