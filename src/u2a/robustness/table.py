"""The robustness table: values of every arm under every condition, with paired differences, as JSON and Markdown.

One row is one condition and one metric. Beside the values stand paired statistics over the same prompts: the *gap* of
an arm (condition minus none), which the original model shows too (its gap is the control); the *excess* of an arm's
gap over the original's; and the *recovery*, the share of the unlearning's effect that the condition undoes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from u2a.evaluation.stats import Interval, bootstrap_mean, paired_difference
from u2a.record import derive_seed
from u2a.robustness.quantise import SCHEMES
from u2a.robustness.records import NONE, Gap, Kind, RobustnessRow, RobustnessTable
from u2a.robustness.relearn import recovery
from u2a.types import Metric

Measured = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Of one arm: value by item id, by metric name, by condition."""


def table_rows(
    arms: Mapping[str, Measured], original: str, groups: Mapping[str, str], resamples: int, seed: int
) -> Iterator[RobustnessRow]:
    """Compare conditions and arms, metric by metric.

    Args:
        arms: measured values by arm, all under the same conditions, ``none`` among them.
        original: the arm that never unlearned.
        groups: prompt key by item id.
        resamples: bootstrap resamples, >= 1.
        seed: seed of the resampling.

    Yields:
        One row per metric that any arm has under any condition, and condition. What an arm lacks there, as the shares
        of a broken model, is undefined, and so is every comparison with it.
    """
    seed = derive_seed(seed, "bootstrap")
    names = arms[original][NONE], *(found for measured in arms.values() for found in measured.values())
    for metric in dict.fromkeys(metric for found in names for metric in found):
        plain = {name: _finite(measured[NONE].get(metric, {})) for name, measured in arms.items()}
        for condition in arms[original]:
            raw = {name: measured[condition].get(metric, {}) for name, measured in arms.items()}
            now = {name: _finite(values) for name, values in raw.items()}
            row = RobustnessRow(
                condition=condition,
                kind=_kind(condition),
                metric=metric,
                arms={name: _metric(values, groups, resamples, seed) for name, values in now.items()},
                n_undefined={name: len(raw[name]) - len(now[name]) for name in raw},
            )
            paired = {} if condition == NONE else _paired(now, plain, original, (groups, resamples, seed))
            yield row.model_copy(update=paired)


Draws = tuple[Mapping[str, str], int, int]
"""Prompt key by item id, resamples, seed."""


def _paired(
    now: Mapping[str, dict[str, float]], plain: Mapping[str, dict[str, float]], original: str, draws: Draws
) -> dict[str, dict[str, Gap]]:
    """Gaps, excesses and recoveries of one metric under one condition (``now``) against none (``plain``)."""
    changes = {
        name: {key: value - plain[name][key] for key, value in values.items() if key in plain[name]}
        for name, values in now.items()
    }
    others = [name for name in now if name != original]
    return {
        "gaps": {name: _gap(paired_difference(now[name], plain[name], *draws)) for name in now},
        "excess": {name: _gap(paired_difference(changes[name], changes[original], *draws)) for name in others},
        "recovery": {name: _gap(recovery(plain[original], plain[name], now[name], *draws)) for name in others},
    }


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _metric(values: dict[str, float], groups: Mapping[str, str], resamples: int, seed: int) -> Metric:
    found = bootstrap_mean(values, groups, resamples, seed)
    return Metric(value=found.value, low=found.low, high=found.high, n=found.n, values=values)


def _gap(found: Interval) -> Gap:
    return Gap(value=found.value, low=found.low, high=found.high, n=found.n)


def _kind(condition: str) -> Kind:
    if condition in SCHEMES:
        return "quantised"
    if condition == NONE:
        return "none"
    return "prompt" if condition.startswith("prompt ") else "relearned"


def markdown(table: RobustnessTable) -> str:
    """Render the table, one Markdown table per metric.

    Args:
        table: the table.

    Returns:
        Markdown with 95 % intervals in brackets; ``n/a`` where a number is undefined.
    """
    others = [name for name in table.arms if name != table.original]
    header = ["condition", *table.arms, f"gap {table.original} (control)"]
    header += [f"{word} {name}" for name in others for word in ("gap", "excess", "recovery")]
    blocks = []
    for metric in dict.fromkeys(row.metric for row in table.rows):
        lines = [_line(header), _line(["---"] * len(header))]
        for row in (row for row in table.rows if row.metric == metric):
            cells = [_cell(row.arms[name]) for name in table.arms] + [_cell(row.gaps.get(table.original))]
            for name in others:
                cells += [_cell(part.get(name)) for part in (row.gaps, row.excess, row.recovery)]
            lines.append(_line([row.condition, *cells]))
        blocks.append("\n".join([f"### {metric}", "", *lines, *_undefined(table, metric)]))
    return "\n\n".join([*blocks, _notes(table)]) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(number: Metric | Gap | None) -> str:
    if number is None:
        return ""
    if number.value is None:
        return f"n/a ({number.n} prompts)"
    if number.low is None or number.high is None:
        return f"{number.value:.3g}"
    return f"{number.value:.3g} [{number.low:.3g}, {number.high:.3g}]"


def _undefined(table: RobustnessTable, metric: str) -> list[str]:
    left_out = [
        f"{count} of {name} under {row.condition}"
        for row in table.rows
        if row.metric == metric
        for name, count in row.n_undefined.items()
        if count
    ]
    lines = ["", f"Values that are not finite and are left out: {', '.join(left_out)}."] if left_out else []
    missing = [
        f"{name} under {row.condition}"
        for row in table.rows
        if row.metric == metric
        for name, found in row.arms.items()
        if not found.n and not row.n_undefined.get(name)
    ]
    why = "shares of a model most of whose answers are incoherent are withheld"
    return [*lines, "", f"No values of {', '.join(missing)} ({why})."] if missing else lines


def _notes(table: RobustnessTable) -> str:
    notes = [
        f"gap: condition minus none; excess: gap minus the gap of {table.original}; recovery: share of the effect of "
        f"unlearning that the condition undoes (0: none, 1: all; n/a where the arm does not differ from "
        f"{table.original}). 95 % intervals over prompts, paired."
    ]
    if table.quantised_frac is not None:
        notes.append(
            f"Quantised: round to nearest, absmax per {table.group} weights, {100 * table.quantised_frac:.0f} % of the "
            "weights (embeddings and output head are left alone), adapter merged first."
        )
    if table.learning_rate is not None:
        rows = ", ".join(f"{name} {count}" for name, count in table.attack_rows.items())
        notes.append(f"Relearning: learning rate {table.learning_rate:g}, rows of the attacker: {rows}.")
    return "\n\n".join(notes)
