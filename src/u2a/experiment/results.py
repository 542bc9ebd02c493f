"""Files of an experiment's results: ``main.json`` for scripts, ``main.md`` for people, and the figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from u2a.console import interval, number
from u2a.experiment.analysis import ArmFigures, ExperimentFigures, LevelFigures, TaskFigures, break_even
from u2a.experiment.contrasts import ContrastFigures
from u2a.experiment.estimates import Figure
from u2a.experiment.protocol import Protocol
from u2a.experiment.statements import Verdict
from u2a.figure_file import save_figure
from u2a.figures import Frame, Series, bar_chart, xy_chart
from u2a.record import write_whole

COLUMNS = {
    "preference_margin": "preference margin ↑",
    "preference_accuracy": "accuracy ↑",
    "reward": "reward ↑",
    "second_reward": "second reward ↑",
    "retain_ppl": "retain perplexity ↓",
    "scale_at_equal_ppl": "scale within the perplexity budget",
    "preference_margin_at_equal_ppl": "margin at that scale ↑",
    "reward_at_equal_ppl": "reward at that scale ↑",
    "answer_words": "words",
    "degenerate_rate": "degenerate ↓",
}
CURVES = 6  # arms in one figure, one per colour


def write_results(
    protocol: Protocol, found: ExperimentFigures, verdicts: Sequence[Verdict], folder: Path
) -> tuple[Path, ...]:
    """Write tables and figures of an experiment.

    Args:
        protocol: what was declared.
        found: what was found.
        verdicts: on its statements.
        folder: where to; files of the same names are replaced.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "main.json", folder / "main.md"]
    write_whole(files[0], json.dumps(document(protocol, found, verdicts), indent=1, allow_nan=False) + "\n")
    parts = [*_head(protocol, found), *_statements(verdicts)]
    for name, task in found.tasks.items():
        figures = _figures(protocol, name, task, folder)
        files += figures
        parts += _task(protocol, name, task, [path.name for path in figures])
    parts += _contrasts(found.contrasts)
    parts += _tuning(found)
    parts += _failures(found)
    write_whole(files[1], "\n".join(parts) + "\n")
    return tuple(files)


def document(protocol: Protocol, found: ExperimentFigures, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The content of ``main.json``.

    Args:
        protocol: what was declared.
        found: what was found.
        verdicts: on its statements.

    Returns:
        Per task and arm the figures at every level, and at the top those of its largest full level, named ``level``.
    """
    full = {
        arm: [level for level in protocol.levels_of(arm) if level in protocol.budgets.full] for arm in protocol.arms
    }
    tasks = {
        name: {arm.arm: _arm_entry(arm, max(full[arm.arm], default=None)) for arm in task.arms}
        | {"start": _entry(task.start)}
        for name, task in found.tasks.items()
    }
    return {
        "protocol": found.protocol,
        "machines": found.machines,
        "libraries": found.libraries,
        "codes": found.codes,
        "seeds": list(found.seeds),
        "tasks": tasks,
        "contrasts": [row.model_dump(mode="json") for row in found.contrasts],
        "verdicts": {row.name: row.model_dump(mode="json", exclude={"name"}) for row in verdicts},
        "missing": list(found.missing),
        "tuning": [row.model_dump(mode="json") for row in found.tuning],
        "replaced_protocols": [row.model_dump(mode="json") for row in found.replaced],
    }


def _arm_entry(arm: ArmFigures, level: float | None) -> dict[str, Any]:
    """An arm's figures, those at its largest full level at the top."""
    top = next((_entry(found.metrics) for found in arm.levels if found.level == level), {})
    rest = arm.model_dump(mode="json", exclude={"arm", "levels"})
    return {"level": level, **top, **rest, "levels": [found.model_dump(mode="json") for found in arm.levels]}


def _entry(metrics: dict[str, Figure]) -> dict[str, Any]:
    return {name: figure.model_dump(mode="json") for name, figure in metrics.items()}


# --- the page ------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Make a Markdown table.

    Args:
        head: column names.
        rows: cells; vertical bars in them are escaped.

    Returns:
        Its lines, with an empty one at the end.
    """
    lines = [list(head), ["---"] * len(head), *([text.replace("|", "\\|") for text in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def _head(protocol: Protocol, found: ExperimentFigures) -> list[str]:
    budgets = ", ".join(f"{level:g}" for level in protocol.budgets.levels)
    lines = [
        "# Results",
        "",
        f"Protocol `{found.protocol}`; seeds {', '.join(map(str, found.seeds))}. One unit "
        "of the budget is one pass of gradient ascent over all candidates; selection, reference, retain rows, "
        f"generation and reward scoring are charged, evaluation is not. Levels: {budgets}. "
        f"{_ran_by('Machine', found.machines)} {_ran_by('Libraries', found.libraries)} "
        f"{_ran_by('Code', found.codes)}",
        "",
    ]
    lines += [_history(found), ""]
    if found.missing:
        lines += [f"**{len(found.missing)} cells have not been run**; they are listed at the end.", ""]
    return lines


def _ran_by(what: str, counts: Mapping[str, int]) -> str:
    """Where and with what the cells were run, which need not be where the tables are made."""
    if len(counts) == 1 and "" not in counts:
        return f"{what}: {next(iter(counts))}."
    parts = (f"{name or 'not recorded'} ({cells} cells)" for name, cells in counts.items())
    return f"{what}: {'; '.join(parts) or 'none yet'}."


def _history(found: ExperimentFigures) -> str:
    """What a reader must know of a protocol that was changed on the way."""
    if not found.replaced:
        return "The protocol was fixed before the first cell."
    late = [old for old in found.replaced if old.n_main_cells]
    parts = [f"{old.time[:10]} `{old.hash}` ({', '.join(old.changed)}; {old.n_main_cells} main cells)" for old in late]
    if not late:
        return f"The protocol was changed {len(found.replaced)} times, always before the first cell of a main seed."
    return f"**The protocol was changed after main cells had been run**: it was before {'; '.join(parts)}."


def _tuning(found: ExperimentFigures) -> list[str]:
    if not found.tuning:
        return []
    rows = [
        [
            row.task,
            row.arm,
            ", ".join(f"{name} {value:g}" for name, value in row.trials[row.trial].values.items()) or "-",
            str(len(row.trials)),
            f"{sum(trial.flops for trial in row.trials):.2e}",
            row.reason,
        ]
        for row in found.tuning
    ]
    return ["## Tuning", "", *table(["task", "arm", "chosen", "trials", "FLOPs of the search", "why"], rows)]


def _statements(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return []
    rows = [[row.text, f"**{row.finding}**", row.why] for row in verdicts]
    return ["## Verdicts", "", *table(["statement", "at this scale", "figures"], rows)]


def _task(protocol: Protocol, name: str, task: TaskFigures, figures: Sequence[str]) -> list[str]:
    unit = "unknown" if task.unit_flops is None else f"{task.unit_flops:.2e} FLOPs"
    lines = [f"## Task {name}", "", f"One unit of the budget: {unit}.", ""]
    for level in protocol.budgets.levels:
        shown = [(arm, found) for arm in task.arms for found in arm.levels if found.level == level]
        if not shown:
            continue
        columns = [key for key in COLUMNS if any(key in found.metrics for _, found in shown)]
        head = ["arm", "seeds", *(COLUMNS[key] for key in columns), "passes", "CPU s", "remark"]
        start = ["start", "-", *(_cell(task.start.get(key)) for key in columns), "0", "0", ""]
        rows = [start, *(_row(arm, found, columns) for arm, found in shown)]
        lines += [f"### At level {level:g}", "", *table(head, rows)]
    lines += _break_evens(protocol, task)
    lines += [text for path in figures for text in (f"![{path.removesuffix('.svg')}]({path})", "")]
    return lines


def _break_evens(protocol: Protocol, task: TaskFigures) -> list[str]:
    """From which budget on the first arm of each contrast has the higher mean margin."""
    curves = {arm.arm: _points(arm, "preference_margin") for arm in task.arms}
    pairs = dict.fromkeys(pair for family in protocol.families.values() for pair in family.contrasts)
    parts = []
    for first, second in pairs:
        both = curves.get(first, []), curves.get(second, [])
        if protocol.arms[second].method == "original" or not all(both) or both[0][-1][0] != both[1][-1][0]:
            continue
        at = break_even(*both)
        parts.append(f"{first} over {second} " + ("not within these budgets" if at is None else f"from {at:.1f} on"))
    return [f"Break-even of the mean preference margin, in passes: {'; '.join(parts)}.", ""] if parts else []


def _course(arm: ArmFigures, metric: str) -> list[tuple[float, Figure]]:
    """Figures of an arm by budget: it stands at the start until choosing is paid."""
    start, chosen = arm.start.get(metric) or Figure(value=None), arm.chosen_at
    levels = [(found.level, found.metrics.get(metric) or Figure(value=None)) for found in arm.levels]
    waits = [(chosen, start)] if levels and 0.0 < chosen < levels[-1][0] else []
    return [(0.0, start), *sorted([*waits, *levels], key=lambda point: point[0])]


def _points(arm: ArmFigures, metric: str) -> list[tuple[float, float]]:
    """(budget, value) of an arm from the start on; empty where a value is missing."""
    course = [(at, figure.value) for at, figure in _course(arm, metric)]
    known = [(at, value) for at, value in course if value is not None]
    return known if len(known) == len(course) > 1 else []


def _row(arm: ArmFigures, found: LevelFigures, columns: Sequence[str]) -> list[str]:
    remarks = []
    if found.n_untrained:
        remarks.append(f"at the start in {found.n_untrained} of {arm.n_seeds}")
    elif found.n_reached < arm.n_seeds:
        remarks.append(f"level reached by {found.n_reached} of {arm.n_seeds}")
    if found.n_collapsed:
        remarks.append(f"**collapsed in {found.n_collapsed} of {arm.n_seeds}**")
    if arm.selected is not None:
        fewest, mean, most = arm.selected
        remarks.append(f"{fewest} selected" if fewest == most else f"{mean:.1f} selected ({fewest} to {most})")
    remarks += [f"{name} in {count}" for name, count in arm.fallbacks.items() if name != "none"]
    if arm.split_half is not None:
        remarks.append(f"split-half {arm.split_half:.2f}")
    cost = [found.metrics.get("passes"), found.metrics.get("cpu_seconds")]
    return [
        arm.arm,
        str(arm.n_seeds),
        *(_cell(found.metrics.get(key)) for key in columns),
        "-" if cost[0] is None or cost[0].value is None else f"{cost[0].value:.2f}",
        "-" if cost[1] is None else number(cost[1].value),
        "; ".join(remarks),
    ]


def _cell(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "-"
    ends = interval(figure.low, figure.high, figure.value)
    return f"{number(figure.value, figure.low, figure.high)} {ends}".strip()


def _contrasts(rows: Sequence[ContrastFigures]) -> list[str]:
    if not rows:
        return []
    head = ["family", "task", "metric", "level", "contrast", "difference", "p", "p (Holm)", "seeds", "verdict"]
    cells = [
        [
            row.family,
            row.task,
            row.metric,
            f"{row.level:g}",
            f"{row.first} - {row.second}",
            f"{number(row.difference, row.low, row.high, sign=True)} {interval(row.low, row.high, row.difference)}",
            "-" if row.p is None else f"{row.p:.3f}",
            "-" if row.p_holm is None else f"{row.p_holm:.3f}",
            f"{row.n_seeds}" + (f" ({row.n_lost} lost)" if row.n_lost else ""),
            f"**{row.verdict}**",
        ]
        for row in rows
    ]
    alone = all(count == 1 for count in Counter(row.family for row in rows).values())
    held = "; every family here is one test, so that nothing is corrected" if alone else ", corrected within the family"
    note = (
        "Differences over seeds and prompts, both taken as draws; p by flipping the signs of whole seeds (never below "
        f"2^(1 - seeds)){held}. *Better* and *worse* need both the interval and that p, and no collapse of the better "
        "side; *equivalent* means within the margin that was declared beforehand."
    )
    return ["## Contrasts", "", note, "", *table(head, cells)]


def _failures(found: ExperimentFigures) -> list[str]:
    rows = [
        f"- {task}, {arm.arm}: {line}" for task, part in found.tasks.items() for arm in part.arms for line in arm.failed
    ]
    rows += [
        f"- {row.task}, {row.arm}, tuning trial {trial.trial}: {line}"
        for row in found.tuning
        for trial in row.trials
        for line in trial.failed
    ]
    rows += [f"- not run: {name}" for name in found.missing]
    return ["## Cells that failed or are missing", "", *(rows or ["None."])]


# --- figures -------------------------------------------------------------------------------------


def _figures(protocol: Protocol, name: str, task: TaskFigures, folder: Path) -> list[Path]:
    """Curves over the budget for the arms of the task's families, and what every arm spent on what."""
    files = []
    families = [each for each in protocol.families.values() if each.tasks is None or name in each.tasks]
    wanted = {arm for family in families for pair in family.contrasts for arm in pair}
    arms = [arm for arm in task.arms if arm.arm in wanted or not wanted][:CURVES]
    for metric in ("preference_margin", "retain_ppl"):
        series = [_curve(arm, metric, colour) for colour, arm in enumerate(arms)]
        frame = Frame(f"{name}: {COLUMNS[metric]}", "budget (passes over all candidates)", metric.replace("_", " "))
        chart = xy_chart(frame, series, whole=False)
        if chart:
            files.append(folder / f"main-{name}-{metric}.svg")
            save_figure(chart, files[-1])
    cost = [
        (f"{arm.arm}: {phase}", passes) for arm in arms for phase, passes in arm.phase_passes.items() if passes > 0.005
    ]
    chart = bar_chart(f"{name}: compute by phase", cost, "passes")
    if chart:
        files.append(folder / f"main-{name}-cost.svg")
        save_figure(chart, files[-1])
    return files


def _curve(arm: ArmFigures, metric: str, colour: int) -> Series:
    budgets, figures = zip(*_course(arm, metric), strict=True)
    error = [None if f.low is None or f.high is None else (f.high - f.low) / 2 for f in figures]
    return Series(arm.arm, list(budgets), [figure.value for figure in figures], colour % CURVES, error)
