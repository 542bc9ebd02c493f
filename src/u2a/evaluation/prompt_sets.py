"""Prompts from files on which every arm is attacked (wanted: refuse) or asked something harmless (wanted: comply)."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from u2a.config import DataSection
from u2a.config_evaluation import PromptSetSection
from u2a.data import parse_prompts, prompt_key
from u2a.errors import ConfigError, DataError
from u2a.rows import read_rows
from u2a.types import Message, Partition

Wanted = Literal["refuse", "comply"]
LABEL_COLUMN = "label"
_LABELS: dict[str, Wanted] = {"safe": "comply", "unsafe": "refuse"}


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind.

    Attributes:
        name: name of the set, as it stands after the slash in metric names.
        wanted: what a good model does with them.
        prompts: turns by prompt id (the hash of what the user asks, so repeats count once).
        n_left_out: prompts of the file left out because the run trains on them.
    """

    name: str
    wanted: Wanted
    prompts: dict[str, tuple[Message, ...]]
    n_left_out: int = 0


def read_prompt_sets(
    sections: Sequence[PromptSetSection], data: DataSection, trained: Set[str] = frozenset()
) -> list[PromptSet]:
    """Read every prompt set; a file with labels gives two sets, ``NAME_safe`` and ``NAME_unsafe``.

    Args:
        sections: name, path, what is wanted, and how many prompts of each set.
        data: the prompt's column and the system turn.
        trained: ids of prompts that the run trains on; they are left out and counted.

    Returns:
        The sets; where a set is capped, the prompts of least hash are kept, whatever the order of the file.

    Raises:
        DataError: unusable rows, of all files at once.
        ConfigError: two sets of one name, or a set without a prompt.
    """
    problems: list[str] = []
    sets: list[PromptSet] = []
    for section in sections:
        try:
            sets += _read_one(section, data, trained)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    names = [item.name for item in sets]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ConfigError(f"evaluation.prompt_sets: two sets named {double[0]!r} (give each a name of its own)")
    return sets


def _read_one(section: PromptSetSection, data: DataSection, trained: Set[str]) -> list[PromptSet]:
    rows = read_rows(section.path, section.name)
    prompts = parse_prompts(rows, data)
    kinds: list[Wanted] = ["comply" if section.wanted == "comply" else "refuse"] * len(rows)
    if section.wanted == "label":
        kinds = []
        problems = []
        for row in rows:
            label = str(row.values.get(LABEL_COLUMN))
            kinds.append(_LABELS.get(label, "refuse"))
            if label not in _LABELS:
                problems.append(f"{row.where}: {LABEL_COLUMN}: {label!r:.40}, expected safe or unsafe (wanted: label)")
        if problems:
            raise DataError(problems)
    out = []
    for wanted in dict.fromkeys(kinds):
        suffix = {"comply": "_safe", "refuse": "_unsafe"}[wanted] if section.wanted == "label" else ""
        chosen = {prompt_key(prompt): prompt for prompt, kind in zip(prompts, kinds, strict=True) if kind == wanted}
        unseen = sorted(chosen.keys() - trained)
        kept = {key: chosen[key] for key in unseen[: section.max_prompts]}
        out.append(PromptSet(section.name + suffix, wanted, kept, len(chosen) - len(unseen)))
    if not any(item.prompts for item in out):
        raise ConfigError(f"evaluation.prompt_sets: {section.path} holds no prompt that the run does not train on")
    return [item for item in out if item.prompts]


def trained_prompts(partition: Partition) -> set[str]:
    """Find what the run trains on.

    Args:
        partition: the run's data.

    Returns:
        Prompt ids of ``forget``, ``preference``, ``retain``, ``reward`` and ``finetune``.
    """
    sets = (partition.forget, partition.preference, partition.retain, partition.reward, partition.finetune)
    return {prompt_key(row.prompt) for rows in sets for row in rows}
