"""The protocol of an experiment: everything that decides a number, fixed before the first cell is run."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError, model_validator

from u2a.config import SOURCES, RunConfig
from u2a.config_base import Section, option
from u2a.config_evaluation import EvaluationSection
from u2a.config_file import load_config
from u2a.errors import ConfigError
from u2a.experiment.protocol_sections import (
    AnsweredName,
    ArmSection,
    BudgetSection,
    EqualName,
    FamilySection,
    MeasureSection,
    StatementSection,
    TaskSection,
    TuningSection,
)
from u2a.named_content import SUFFIXES
from u2a.record import content_id, one_line
from u2a.yaml_file import read_yaml

FULL_ONLY = {*get_args(AnsweredName), *get_args(EqualName)}
ARM_SECTIONS = ("unlearn", "solve", "reward.prefilter_frac", "reward.prefilter_below")  # what an arm may set for itself


class Protocol(Section):
    """All of an experiment."""

    output_dir: str = option("runs/experiment", "folder of everything the experiment writes")
    tasks: dict[str, TaskSection] = option({}, "data sets by name")
    seeds: list[int] = option([0, 1], "seeds of the main runs")
    arms: dict[str, ArmSection] = option({}, "arms by name")
    budgets: BudgetSection = option(BudgetSection(), "levels")
    measure: MeasureSection = option(MeasureSection(), "what is measured")
    tuning: TuningSection = option(TuningSection(), "how trials are chosen")
    families: dict[str, FamilySection] = option({}, "tests by family, declared beforehand")
    margins: dict[str, float] = option({}, "margins of equivalence by metric, in its unit")
    statements: dict[str, StatementSection] = option({}, "what is to be judged, by name")

    @model_validator(mode="after")
    def _conflicts(self) -> Protocol:
        problems = [*_arm_problems(self), *_level_problems(self)]
        if not self.tasks or not self.arms or not self.seeds:
            problems.append("tasks, arms and seeds: each needs at least one")
        problems += _tuned_on_problems(self)
        if len(set(self.seeds)) < len(self.seeds) or set(self.seeds) & set(self.tuning.seeds):
            problems.append("seeds: each may stand once, and not in tuning.seeds")
        if self.tunes and (not self.tuning.seeds or not 0.0 < self.tuning.dev_frac < 1.0):
            problems.append("tuning: arms with several trials need tuning.seeds, and a tuning.dev_frac inside (0, 1)")
        for name, family in self.families.items():
            unknown = sorted({arm for pair in family.contrasts for arm in pair} - set(self.arms))
            problems += [f"families.{name}: {arm!r} is no arm" for arm in unknown]
            others = sorted(set(family.tasks or []) - set(self.tasks))
            problems += [f"families.{name}.tasks: {task!r} is no task" for task in others]
            if family.level not in self.budgets.levels:
                problems.append(f"families.{name}.level: {family.level:g} is none of budgets.levels")
        problems += _statement_problems(self)
        names = [name for name in (*self.tasks, *self.arms) if not name.replace("-", "_").replace("_", "a").isalnum()]
        problems += [f"{name!r}: names of tasks and arms are made of letters, digits, _ and -" for name in names]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def tunes(self) -> bool:
        """Whether any arm has a choice of trials."""
        return any(len(arm.trials) > 1 for arm in self.arms.values())

    def seeds_of(self, arm: str, task: str) -> list[int]:
        """The main seeds of an arm on a task.

        Args:
            arm: its name.
            task: its name.

        Returns:
            The first ones of all seeds.
        """
        return self.seeds[: self.tasks[task].seeds][: self.arms[arm].seeds]

    def levels_of(self, arm: str) -> list[float]:
        """The budget levels of an arm.

        Args:
            arm: its name.

        Returns:
            Rising; all, or those up to its ``up_to``.
        """
        most = self.arms[arm].up_to
        return [level for level in self.budgets.levels if most is None or level <= most]

    def tasks_of(self, arm: str) -> list[str]:
        """The tasks of an arm.

        Args:
            arm: its name.

        Returns:
            Names in the order of the protocol.
        """
        chosen = self.arms[arm].tasks
        return [task for task in self.tasks if chosen is None or task in chosen]


def _arm_problems(protocol: Protocol) -> Iterator[str]:
    for name, arm in protocol.arms.items():
        if not arm.method:
            yield f"arms.{name}.method: not set"
        if not arm.trials:
            yield f"arms.{name}.trials: empty (leave it out, or give at least one)"
        yield from (f"arms.{name}.tasks: {task!r} is no task" for task in arm.tasks or [] if task not in protocol.tasks)
        for text in arm.set:
            key = text.partition("=")[0]
            if key not in ARM_SECTIONS and key.partition(".")[0] not in ARM_SECTIONS:
                yield f"arms.{name}.set: {key} is shared by all arms (an arm may set {', '.join(ARM_SECTIONS)})"


def _tuned_on_problems(protocol: Protocol) -> Iterator[str]:
    for name, task in protocol.tasks.items():
        if task.tuned_on is None:
            continue
        other = protocol.tasks.get(task.tuned_on)
        if other is None or other.tuned_on is not None:
            yield f"tasks.{name}.tuned_on: {task.tuned_on!r} is no task that is tuned itself"
            continue
        for arm, section in protocol.arms.items():
            tasks = protocol.tasks_of(arm)
            if len(section.trials) > 1 and name in tasks and task.tuned_on not in tasks:
                yield f"tasks.{name}.tuned_on: arm {arm} is not run on {task.tuned_on}"


def _statement_problems(protocol: Protocol) -> Iterator[str]:
    for name, statement in protocol.statements.items():
        if statement.rule != "cheaper" and statement.family not in protocol.families:
            yield f"statements.{name}.family: {statement.family!r} is no family"
        elif statement.contrasts:
            others = [pair for pair in statement.contrasts if pair not in protocol.families[statement.family].contrasts]
            yield from (f"statements.{name}.contrasts: {pair} is none of the family's" for pair in others)
        if statement.rule == "cheaper":
            unknown = sorted(set(statement.arms) - set(protocol.arms))
            yield from (f"statements.{name}.arms: {arm!r} is no arm" for arm in unknown)
            if not unknown:
                yield from _unanswered(protocol, name, statement)


def _unanswered(protocol: Protocol, name: str, statement: StatementSection) -> Iterator[str]:
    """``cheaper`` reads the first arm's levels and the second one's last level; some metrics have full levels alone."""
    full, (first, second) = set(protocol.budgets.full), statement.arms
    yield from _unscaled(protocol, f"statements.{name}", statement.metric)
    if statement.metric not in FULL_ONLY:
        return
    if not full & set(protocol.levels_of(first)):
        yield f"statements.{name}: arm {first} has no level in budgets.full, so no {statement.metric}"
    if not full & set(protocol.levels_of(second)[-1:]):
        yield (
            f"statements.{name}: the last level of arm {second} is not in budgets.full, so it has no {statement.metric}"
        )


def _unscaled(protocol: Protocol, place: str, metric: str) -> Iterator[str]:
    if metric in get_args(EqualName) and protocol.measure.equal_ppl_frac is None:
        yield f"{place}.metric: {metric} needs measure.equal_ppl_frac"


def _level_problems(protocol: Protocol) -> Iterator[str]:
    levels = protocol.budgets.levels
    if not levels or levels != sorted(set(levels)):
        yield f"budgets.levels: {levels}, expected rising numbers"
    if not set(protocol.budgets.full) <= set(levels):
        yield "budgets.full: each must be one of budgets.levels"
    if protocol.tunes and protocol.tuning.level not in levels:
        yield f"tuning.level: {protocol.tuning.level:g} is none of budgets.levels"
    for name, arm in protocol.arms.items():
        if arm.up_to is not None and arm.up_to not in levels:
            yield f"arms.{name}.up_to: {arm.up_to:g} is none of budgets.levels"
        elif len(arm.trials) > 1 and arm.up_to is not None and arm.up_to < protocol.tuning.level:
            yield f"arms.{name}.up_to: {arm.up_to:g} is below tuning.level"
    for name, family in protocol.families.items():
        yield from _unscaled(protocol, f"families.{name}", family.metric)
        if family.metric in FULL_ONLY and family.level not in protocol.budgets.full:
            yield f"families.{name}.level: {family.metric} is measured at budgets.full alone"
        arms = sorted({arm for pair in family.contrasts for arm in pair} & set(protocol.arms))
        short = [arm for arm in arms if (protocol.arms[arm].up_to or family.level) < family.level]
        yield from (f"families.{name}.level: {family.level:g} is more than arm {arm} is run up to" for arm in short)


def load_protocol(path: str | Path) -> Protocol:
    """Read a protocol strictly and report every problem at once.

    Args:
        path: YAML file.

    Returns:
        The protocol; paths of the tasks' configurations are resolved against the file's folder.

    Raises:
        ConfigError: unreadable, unknown options, wrong values, or options in conflict.
    """
    tree, problems = read_yaml(Path(path))
    tasks = tree.get("tasks")
    for task in tasks.values() if isinstance(tasks, dict) else ():
        if isinstance(task, dict) and isinstance(name := task.get("config"), str):
            task["config"] = str(Path(path).parent / name)
    try:
        protocol = Protocol.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([one_line(text) for text in (*problems, *_sentences(error))]) from None
    if problems:
        raise ConfigError(problems)
    return protocol


def _sentences(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), sorted(set(_names(Protocol))), n=1)
            yield f"{place}: unknown option" + (f" (did you mean {near[0]}?)" if near else "")
        elif item["type"] == "value_error":
            yield item["msg"].removeprefix("Value error, ")
        else:
            yield f"{place}: {item['msg']}, got {item['input']!r}"


def _names(section: type[BaseModel]) -> Iterator[str]:
    """Names of all options of the protocol."""
    for other in (section, TaskSection, ArmSection, BudgetSection, MeasureSection, TuningSection, FamilySection):
        yield from other.model_fields


def task_config(protocol: Protocol, task: str, seed: int, arm: str | None = None) -> RunConfig:
    """Read the options of a task, with the changes of an arm.

    Args:
        protocol: the protocol.
        task: its name.
        seed: of the run.
        arm: its name; None for what all arms share.

    Returns:
        The options.

    Raises:
        ConfigError: they cannot be used.
    """
    section = protocol.tasks[task]
    changes = [*section.set, *(protocol.arms[arm].set if arm is not None else ())]
    try:
        config = load_config(section.config, [*changes, f"seed={seed}"])
    except ConfigError as error:
        where = f"tasks.{task}" + (f", arms.{arm}" if arm else "")
        raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from None
    if config.reward.model == "implicit":
        raise ConfigError(f"tasks.{task}: reward.model: implicit is the policy itself, it cannot be asked by all arms")
    return config.model_copy(update={"evaluation": measurement(protocol)})


def check_held_out(protocol: Protocol) -> None:
    """Refuse tasks of which every seed would measure other prompts, before any cell is run.

    Args:
        protocol: the protocol.

    Raises:
        ConfigError: a task with several seeds cuts its evaluation pairs anew for each.
    """
    problems = []
    for name in protocol.tasks:
        config = task_config(protocol, name, 0)
        several = any(len(protocol.seeds_of(arm, name)) > 1 for arm in protocol.arms if name in protocol.tasks_of(arm))
        if several and config.data.evaluation is None and config.partition.held_out_seed is None:
            problems.append(
                f"tasks.{name}: partition.held_out_seed is not set, so every seed would measure other prompts, and no "
                "table could be made of them (set it in the task's options, such as partition.held_out_seed=0)"
            )
    if problems:
        raise ConfigError(problems)


def measurement(protocol: Protocol) -> EvaluationSection:
    """Options of the evaluation at a full level, the same in every cell.

    Args:
        protocol: the protocol.

    Returns:
        Prompts and greedy decoding; intervals are made later, from the values of single items.
    """
    sizes = protocol.measure
    return EvaluationSection(generate_prompts=sizes.prompts, max_new_tokens=sizes.max_new_tokens, bootstrap=100)


def decisive(config: RunConfig) -> dict[str, Any]:
    """What decides the numbers of a run: all options, with the content of files in the place of their paths.

    Args:
        config: options of a run.

    Returns:
        A document without paths of this machine.

    Raises:
        ConfigError: a file cannot be read.
    """
    document = config.model_dump(mode="json", exclude={"output_dir", "robustness"})
    document["model"]["name_or_path"] = _content(config.model.name_or_path)
    if not config.model.template_options:  # cells from before there was this option keep their names
        del document["model"]["template_options"]
    if config.reward.prefilter_below == "none":  # likewise
        del document["reward"]["prefilter_below"]
    for name in SOURCES:
        source = getattr(config.data, name)
        document["data"][name] = None if source is None else _content(source)
    for name in ("name_or_path", "eval_name_or_path", "second_name_or_path"):
        document["reward"][name] = _content(getattr(config.reward, name))
    return document


def decisive_text(config: RunConfig) -> str:
    """The same as one canonical text, to be hashed.

    Args:
        config: options of a run.

    Returns:
        JSON with sorted keys.
    """
    return json.dumps(decisive(config), sort_keys=True)


def _content(name: str) -> str:
    """Content of a file, or of the files of a folder that a model is loaded from; any other name is what it says."""
    path = Path(name)
    if not name or not path.exists():
        return name
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    try:
        stats = [(file, file.stat()) for file in files]
        return content_id(*(_digest(file, stat.st_mtime_ns, stat.st_size) for file, stat in stats))
    except OSError as error:
        raise ConfigError(f"{one_line(name)}: cannot be read ({error})") from None


@lru_cache(maxsize=256)
def _digest(file: Path, changed_ns: int, size: int) -> str:
    """Hash a file, once as long as it does not change."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
