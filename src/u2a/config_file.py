"""Configuration files: read strictly (defaults < preset < YAML < ``--set``), and printed with each option's meaning."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from u2a.config import PRESETS, SOURCES, RunConfig
from u2a.errors import ConfigError


def load_config(path: str | Path | None, overrides: Sequence[str] = (), preset: str | None = None) -> RunConfig:
    """Read a configuration strictly and report every problem at once.

    Args:
        path: YAML file, or None for the defaults. Its relative data paths are resolved against its directory;
            ``output_dir`` and the paths in ``overrides`` against the working directory.
        overrides: ``section.option=value`` strings, values in YAML notation; they win over the file.
        preset: name in :data:`PRESETS`, applied under the file.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: unreadable file, unknown option (the nearest valid one is named), value of a wrong
            type or out of range, options in conflict.
    """
    tree: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"--preset {preset}: unknown preset (expected one of: {', '.join(PRESETS)})")
        tree = _merged(tree, PRESETS[preset])
    if path is not None:
        tree = _merged(tree, _resolved(_read_yaml(Path(path)), Path(path).parent))
    tree.pop("provenance", None)
    for text in overrides:
        tree = _merged(tree, _override(text))
    problems = unknown_keys(tree, RunConfig) + _wrong_switches(tree)
    try:
        config = RunConfig.model_validate(_without_unknown(tree, RunConfig))
    except ValidationError as error:
        raise ConfigError(problems + [_sentence(item) for item in error.errors()]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, expected sections such as 'model:' and 'data:'")
    return tree


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected section.option=value")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value is not valid YAML (quote it)") from None
    if isinstance(tree, str):  # YAML 1.1 reads 1e-5 as text; a number is meant
        with contextlib.suppress(ValueError):
            tree = float(tree)
    if key == "model" and isinstance(tree, str):  # `--set model=PATH`: the model's name is meant
        key = "model.name_or_path"
    *sections, name = key.split(".")
    out: dict[str, Any] = {name: tree}
    for section in reversed(sections):
        out = {section: out}
    return out


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out


def _section_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    annotation = model.model_fields[key].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def all_options(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """List every option as ``{dotted name: pydantic field}``, in the order of declaration.

    Args:
        model: section to start from.
        prefix: dotted name of that section, with a final dot.

    Returns:
        Options without the section headings.
    """
    out: dict[str, Any] = {}
    for key, field in model.model_fields.items():
        section = _section_of(model, key)
        out |= all_options(section, f"{prefix}{key}.") if section else {f"{prefix}{key}": field}
    return out


def unknown_keys(tree: dict[str, Any], model: type[BaseModel], prefix: str = "") -> list[str]:
    """Describe every key of ``tree`` that is no option, naming the nearest one.

    Args:
        tree: parsed configuration.
        model: section it belongs to.
        prefix: dotted name of that section, with a final dot.

    Returns:
        One sentence per unknown key.
    """
    problems = []
    for key, value in tree.items():
        if key in model.model_fields:
            section = _section_of(model, key)
            if section is not None and isinstance(value, dict):
                problems += unknown_keys(value, section, f"{prefix}{key}.")
            continue
        problems.append(f"{prefix}{key}: unknown option{_nearest(f'{prefix}{key}')}")
    return problems


def _wrong_switches(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Describe switches that are not true or false, and other options that are (pydantic would convert both)."""
    options, problems = all_options(), []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            problems += _wrong_switches(value, f"{name}.")
        elif name in options and isinstance(value, bool) != isinstance(options[name].default, bool):
            expected = "something else than" if isinstance(value, bool) else "one of"
            problems.append(f"{name}: expected {expected} true or false, got {value!r}")
    return problems


def _nearest(name: str) -> str:
    names = list(all_options()) + list(RunConfig.model_fields)
    best = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not best:  # right name under a wrong section
        last = name.rsplit(".", 1)[-1]
        best = [other for other in names if other.rsplit(".", 1)[-1] == last][:1]
        tails = [other.rsplit(".", 1)[-1] for other in names]
        close = difflib.get_close_matches(last, tails, n=1, cutoff=0.75)
        best = best or [names[tails.index(item)] for item in close]
    return f" (did you mean {best[0]}?)" if best else " (u2a config --print lists them)"


def _without_unknown(tree: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        if key in model.model_fields:
            section = _section_of(model, key)
            out[key] = _without_unknown(value, section) if section and isinstance(value, dict) else value
    return out


def _sentence(error: Any) -> str:
    where = ".".join(
        str(part) for part in error["loc"] if not str(part).startswith(("function-", "literal[", "constrained-"))
    )
    message = error["msg"].removeprefix("Value error, ")
    got = error.get("input")
    shown = "" if isinstance(got, dict | BaseModel) else f", got {got!r}"
    return f"{where}: {message}{shown}" if where else message


def _resolved(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make relative data paths of a file relative to its directory and fill in ``~``, ``$VARIABLE`` (not in --set)."""

    def resolved(value: Any) -> Any:
        if not isinstance(value, str) or not value or ":" in value:
            return value
        path = Path(os.path.expandvars(value)).expanduser()
        return str(path if path.is_absolute() else folder / path)

    out = dict(tree)
    if isinstance(data := tree.get("data"), dict):
        out["data"] = data | {name: resolved(data[name]) for name in SOURCES if name in data}
    evaluation = tree.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(sets := evaluation.get("prompt_sets"), list):
        found = [{**item, "path": resolved(item.get("path"))} if isinstance(item, dict) else item for item in sets]
        out["evaluation"] = {**evaluation, "prompt_sets": found}
    return out


def print_options(config: RunConfig | None = None) -> str:
    """Return every option with its value, allowed values and meaning, as commented YAML.

    Args:
        config: values to print; None prints the defaults.

    Returns:
        A valid configuration file.
    """
    lines: list[str] = []
    _print_section(RunConfig, config or RunConfig(), 0, lines)
    return "\n".join(lines) + "\n"


def _print_section(model: type[BaseModel], defaults: BaseModel, depth: int, lines: list[str]) -> None:
    pad = "  " * depth
    for key, field in model.model_fields.items():
        section = _section_of(model, key)
        if section is not None:
            lines.append(f"{pad}{key}:  # {(section.__doc__ or '').splitlines()[0]}")
            _print_section(section, getattr(defaults, key), depth + 1, lines)
            continue
        value = yaml.safe_dump(getattr(defaults, key), default_flow_style=True).strip().removesuffix("\n...")
        lines.append(f"{pad}{key}: {value}  # {field.description}{describe_range(field)}")


def describe_range(field: Any) -> str:
    """Return the allowed values of an option for people, for example ``" [>= 0, <= 1]"``.

    Args:
        field: pydantic field.

    Returns:
        Text in square brackets, or an empty string.
    """
    parts: list[str] = []
    annotations = [field.annotation, *get_args(field.annotation)]
    metadata = list(field.metadata)
    for annotation in annotations:
        metadata += list(getattr(annotation, "__metadata__", ()))
        if getattr(annotation, "__origin__", None) is Literal or str(annotation).startswith("typing.Literal"):
            parts += [str(value) for value in get_args(annotation)]
    for item in metadata:
        for bound in [item, *getattr(item, "metadata", ())]:
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if getattr(bound, name, None) is not None:
                    parts.append(f"{sign} {getattr(bound, name):g}")
    return f" [{', '.join(dict.fromkeys(parts))}]" if parts else ""
