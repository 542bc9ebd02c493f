"""Configuration files: read strictly (defaults < preset < YAML < ``--set``), and printed with each option's meaning."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from u2a.config import PRESETS, SOURCES, RunConfig
from u2a.errors import ConfigError
from u2a.record import one_line
from u2a.yaml_file import parse_yaml, read_yaml

_KINDS = ("str", "int", "float", "bool", "list", "none")  # what pydantic adds to the place of a union's error
_NEXT_CONFLICT = re.compile(r"; (?=\w+\.\w)")


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
    problems: list[str] = []
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"--preset {preset}: unknown preset (expected one of: {', '.join(PRESETS)})")
        tree = _merged(tree, PRESETS[preset])
    if path is not None:
        read, problems = read_yaml(Path(path))
        tree = _merged(tree, _resolved(read, Path(path).parent))
    tree.pop("provenance", None)
    for text in overrides:
        tree = _merged(tree, _override(text))
    wrong = _unusable_texts(tree) | _wrong_switches(tree)
    problems += [*unknown_keys(tree, RunConfig), *wrong.values()]
    config, found = _validated(_without(_without_unknown(tree, RunConfig), wrong), set(wrong))
    problems += found
    if config is None or problems:
        raise ConfigError([one_line(problem) for problem in problems])
    return config


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {one_line(text)}: expected section.option=value")
    try:
        tree, twice = parse_yaml(value, f"--set {key}")
    except ConfigError:
        raise ConfigError(f"--set {one_line(text)}: the value is not valid YAML (quote it)") from None
    if twice:
        raise ConfigError(twice)
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


def _items_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Section that the items of a list are, or None."""
    item = next(iter(get_args(model.model_fields[key].annotation)), None)
    return item if isinstance(item, type) and issubclass(item, BaseModel) else None


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
            section, items = _section_of(model, key), _items_of(model, key)
            if section is not None and isinstance(value, dict):
                problems += unknown_keys(value, section, f"{prefix}{key}.")
            if items is not None and isinstance(value, list):
                for index, item in enumerate(value):
                    problems += _unknown_in_item(item, items, f"{prefix}{key}[{index}]")
            continue
        problems.append(f"{prefix}{key}: unknown option{_nearest(f'{prefix}{key}')}")
    return problems


def _unknown_in_item(item: Any, section: type[BaseModel], where: str) -> list[str]:
    known = list(section.model_fields)
    problems = []
    for key in [key for key in item if key not in known] if isinstance(item, dict) else []:
        close = difflib.get_close_matches(str(key), known, n=1) or [f"one of {', '.join(known)}"]
        problems.append(f"{where}.{key}: unknown option (did you mean {close[0]}?)")
    return problems


def _wrong_switches(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Describe switches that are not true or false, and other options that are (pydantic would convert both)."""
    options = all_options()
    problems: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            problems |= _wrong_switches(value, f"{name}.")
        elif name in options:
            is_switch = isinstance(options[name].default, bool)
            given = [value, *value] if isinstance(value, list) else [value]
            if is_switch != isinstance(value, bool) or any(isinstance(item, bool) for item in given[1:]):
                expected = "one of" if is_switch else "something else than"
                problems[name] = f"{name}: expected {expected} true or false, got {value!r}"
    return problems


def _unusable_texts(tree: Any, name: str = "") -> dict[str, str]:
    """Describe texts that no file or path can hold, and an output directory without a name."""
    if isinstance(tree, dict):
        parts = [(f"{name}.{key}" if name else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        parts = [(name, value) for value in tree]
    else:
        parts = []
    problems: dict[str, str] = {}
    for key, value in parts:
        problems |= _unusable_texts(value, key)
    if isinstance(tree, str) and ("\0" in tree or any("\ud800" <= char <= "\udfff" for char in tree)):
        problems[name] = f"{name}: holds a NUL character or half a surrogate pair, got {tree!r}"
    if name == "output_dir" and isinstance(tree, str) and not tree.strip():
        problems[name] = "output_dir: empty (name a directory)"
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


def _without(tree: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return a tree without the options or sections of these dotted names."""
    out = dict(tree)
    for name in names:
        key, _, rest = name.partition(".")
        if rest and isinstance(out.get(key), dict):
            out[key] = _without(out[key], [rest])
        else:
            out.pop(key, None)
    return out


def _validated(tree: dict[str, Any], wrong: set[str]) -> tuple[RunConfig | None, list[str]]:
    """Validate, and describe what is wrong.

    Conflicts between options are looked for only where every value is right; so the wrong ones are taken out and the
    rest is validated again, and a conflict that names none of them is reported, too.

    Args:
        tree: known options.
        wrong: dotted names of options already found wrong and taken out.

    Returns:
        The configuration, or None, and one sentence per problem.
    """
    problems: list[str] = []
    for _ in range(3):  # values, conflicts inside a section, conflicts between sections
        try:
            config = RunConfig.model_validate(tree)
        except ValidationError as error:
            found = _by_place(error)
        else:
            return (None if problems else config), problems
        for place, sentences in found.items():
            if not place or not any(name.startswith(f"{place}.") for name in wrong):
                problems += [text for text in sentences if not any(name in text for name in wrong)]
        if "" in found:  # conflicts between sections are looked for last
            break
        wrong = wrong | found.keys()
        tree = _without(tree, [place.partition("[")[0] for place in found])
    return None, problems


def _by_place(error: ValidationError) -> dict[str, list[str]]:
    """Sentences by the option or section concerned; several expectations of one value make one sentence."""
    values: dict[str, list[Any]] = {}
    for item in error.errors():
        if item["type"] != "extra_forbidden":  # unknown keys are described by unknown_keys
            values.setdefault(_place(item["loc"]), []).append(item)
    found: dict[str, list[str]] = {}
    for place, items in values.items():
        messages = list(dict.fromkeys(_message(item) for item in items))
        got = items[0]["input"]
        shown = "" if isinstance(got, dict | BaseModel) else f", got {got!r}"
        if place:
            found[place] = [f"{place}: {' or '.join(messages)}{one_line(shown, 80)}"]
        else:
            found[place] = [text for message in messages for text in _NEXT_CONFLICT.split(message)]
    return found


def _message(item: Any) -> str:
    if item["type"] in ("model_type", "model_attributes_type"):
        return "expected options below it"
    return item["msg"].removeprefix("Value error, ")


def _place(loc: tuple[int | str, ...]) -> str:
    """Dotted name of what a validation error is about, without the kinds of value that were tried."""
    name, model = "", RunConfig
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        elif model is None:
            name += f".{part}" if part.isidentifier() and part not in _KINDS else ""
        else:
            name += f".{part}" if name else part
            model = _section_of(model, part)
    return name


def is_path(source: str) -> bool:
    """Tell the path of a data file from what is no path.

    Args:
        source: the value of an option that names data.

    Returns:
        False for ``hub:NAME`` and for addresses; a colon elsewhere may stand in the name of a file.
    """
    return not source.startswith("hub:") and "://" not in source


def _resolved(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make relative data paths of a file relative to its directory and fill in ``~``, ``$VARIABLE`` (not in --set)."""

    def resolved(value: Any) -> Any:
        if not isinstance(value, str) or not value or not is_path(value):
            return value
        path = Path(os.path.expandvars(value))
        with contextlib.suppress(RuntimeError):  # ~ of a user who does not exist: no such file
            path = path.expanduser()
        return str(path if path.is_absolute() else folder / path)

    out = dict(tree)
    if isinstance(data := tree.get("data"), dict):
        out["data"] = data | {name: resolved(data[name]) for name in SOURCES if name in data}
    evaluation = tree.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(sets := evaluation.get("prompt_sets"), list):
        found = [{**item, "path": resolved(item.get("path"))} if isinstance(item, dict) else item for item in sets]
        out["evaluation"] = {**evaluation, "prompt_sets": found}
    if isinstance(robustness := tree.get("robustness"), dict) and "paraphrases" in robustness:
        out["robustness"] = {**robustness, "paraphrases": resolved(robustness["paraphrases"])}
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
