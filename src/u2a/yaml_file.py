"""YAML of people's hands: plain data only, keys that stand twice are named, and no alias can make a small file huge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from u2a.errors import ConfigError
from u2a.record import one_line

MAX_VALUES = 10_000  # in one text, repetitions by aliases counted


def read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a YAML file of sections and options.

    Args:
        path: the file.

    Returns:
        The tree, empty for an empty file, and one sentence per key that stands twice.

    Raises:
        ConfigError: it cannot be read, is not YAML, or holds no sections.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{one_line(str(path))}: cannot be read ({error})") from None
    tree, twice = parse_yaml(text, str(path))
    if tree is None:
        return {}, []
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, expected sections such as 'model:' and 'data:'")
    return tree, twice


class _Loader(yaml.SafeLoader):
    """Plain data only, and a note of every key that stands twice (of which YAML keeps the last one in silence)."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[tuple[int, str]] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    self.twice.append((key.start_mark.line + 1, key.value))
                seen.add(key.value)
        return node


def parse_yaml(text: str, name: str) -> tuple[Any, list[str]]:
    """Parse one YAML document.

    Args:
        text: the document.
        name: what it is called in messages.

    Returns:
        Plain data, and one sentence per key that stands twice.

    Raises:
        ConfigError: it is not YAML, names Python objects, or grows without end through aliases.
    """
    try:
        loader = _Loader(text)
        try:
            tree = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        where = f"{name}:{error.problem_mark.line + 1}" if error.problem_mark else name
        raise ConfigError(one_line(f"{where}: not valid YAML ({error.problem or error.context})")) from None
    except Exception as error:  # values of a wrong form, for example !!int '', make PyYAML raise anything
        reason = " ".join(str(error).split())
        raise ConfigError(one_line(f"{name}: not valid YAML ({type(error).__name__}: {reason})")) from None
    left, size = [tree], 0
    while left:
        item, size = left.pop(), size + 1
        if size > MAX_VALUES:
            raise ConfigError(f"{name}: more than {MAX_VALUES} values (do aliases repeat each other?)")
        left += [*item.keys(), *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else []
    return tree, [f"{name}:{line}: {key}: stands twice (keep one of them)" for line, key in loader.twice]
