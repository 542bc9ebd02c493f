"""Plain-text tables of the records: at most 100 columns, ASCII only, safe to print on any terminal.

How a number, an interval and the direction of a metric are written is decided here once; the HTML report and
the model card use the same functions.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Literal

from u2a.evaluation.metrics import info
from u2a.solution import Reliability, Round, Solution
from u2a.types import Contrast, EvalTable, Metric

WIDTH = 100
FOLDS_FOR_A_TEST = 6  # fewer cannot give a p-value below 5 %

Tone = Literal["good", "bad", "unclear", "none"]


def better_direction(metric: str) -> Literal["higher", "lower"] | None:
    """Return which way a metric improves.

    Args:
        metric: metric name as in :class:`u2a.types.EvalTable`.

    Returns:
        ``"higher"``, ``"lower"``, or None for a metric that is neither (answer length, refusals on mixed
        prompts) or is not in :data:`u2a.evaluation.metrics.METRICS`.
    """
    found = info(metric)
    direction = found.direction if found else "none"
    if direction == "none":
        return None
    return "higher" if direction == "up" else "lower"


def tone(contrast: Contrast) -> Tone:
    """Return how a difference reads: does its interval exclude zero, and is that way the better one?

    Args:
        contrast: a paired difference.

    Returns:
        ``good``, ``bad``, ``unclear`` (the interval holds zero or is missing, or so few prompts cannot show it), or
        ``none`` (the metric has no better direction, or the difference is undefined).
    """
    better = better_direction(contrast.metric)
    if better is None or contrast.difference is None:
        return "none"
    if not contrast.excludes_zero or contrast.low is None:
        return "unclear"
    return "good" if (contrast.low > 0) == (better == "higher") else "bad"


TONE_WORDS: dict[str, str] = {"good": "better", "bad": "worse", "unclear": "not shown", "none": "-"}


def decimals_for(*values: float | None) -> int | None:
    """Return the decimals that show the largest value to 3 (below 1) or 4 significant digits.

    Args:
        *values: numbers to be written alike, for example a value and its interval.

    Returns:
        Decimals, or None when the numbers are too large or too small for plain notation.

    >>> decimals_for(0.412, 0.39), decimals_for(14.2), decimals_for(2e-7)
    (3, 2, None)
    """
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest == 0:
        return 0
    power = math.floor(math.log10(largest))
    if not -4 <= power <= 9:
        return None
    return max(0, 2 - power if power < 0 else 3 - power)


def number(value: float | None, *alike: float | None, sign: bool = False) -> str:
    """Write a number for people.

    Args:
        value: the number, or None.
        *alike: numbers shown beside it; all get the same decimals.
        sign: write a plus sign too.

    Returns:
        Text, ``-`` for None.

    >>> number(0.41234), number(12345.6), number(None), number(0.5, 0.0123, sign=True), number(-0.0001, 0.5)
    ('0.412', '12,346', '-', '+0.500', '0.000')
    """
    if value is None:
        return "-"
    decimals = decimals_for(value, *alike)
    plus = "+" if sign else ""
    if decimals is None:
        return f"{value:{plus}.2e}"
    return f"{round(value, decimals) or 0.0:{plus},.{decimals}f}"  # what rounds to zero has no minus


def interval(low: float | None, high: float | None, *alike: float | None) -> str:
    """Write an interval.

    Args:
        low: lower end, or None.
        high: upper end, or None.
        *alike: numbers shown beside it.

    Returns:
        For example ``"[0.390, 0.435]"``; empty without an interval.
    """
    if low is None or high is None:
        return ""
    return f"[{number(low, high, *alike)}, {number(high, low, *alike)}]"


def metric_names(table: EvalTable) -> list[str]:
    """Return the metrics of all arms, in order of first appearance.

    Args:
        table: the evaluation.

    Returns:
        Names without repeats.
    """
    return list(dict.fromkeys(name for metrics in table.arms.values() for name in metrics))


def metric_scale(table: EvalTable, name: str) -> list[float]:
    """Return every number of one metric, so that all arms are written with the same decimals.

    Args:
        table: the evaluation.
        name: metric name.

    Returns:
        Values and interval ends of all arms that have the metric.
    """
    found = [metrics[name] for metrics in table.arms.values() if name in metrics]
    return [value for item in found for value in (item.value, item.low, item.high) if value is not None]


def reliability_sentence(found: Reliability) -> str:
    """Say in plain English whether unlearning helps, and whether the choice of candidates can be trusted.

    Args:
        found: the reliability record.

    Returns:
        Two sentences: "unlearn at all?" and "which?".
    """
    return f"{_mean_sentence(found)} {_ranking_sentence(found)}"


def _mean_sentence(found: Reliability) -> str:
    if found.mean_gain_se is None:
        return "Whether unlearning as such helps is not known (one fold gives no standard error)."
    if abs(found.mean_gain) <= 2 * found.mean_gain_se:
        return "Whether unlearning as such helps is not shown (the mean gain is within two standard errors of 0)."
    verb = "help" if found.mean_gain > 0 else "harm"
    return f"Unlearning as such is predicted to {verb} (the mean gain is beyond two standard errors of 0)."


def _ranking_sentence(found: Reliability) -> str:
    """Which ones? With a warning where there are so few folds that the test for signal cannot be strict."""
    weak = ""
    if found.p_signal is not None and found.n_folds < FOLDS_FOR_A_TEST:
        chance = 0.5 ** (found.n_folds - 1)
        weak = f" With {found.n_folds} folds chance alone passes the test for signal in about {chance:.0%} of cases."
    return _ranking_words(found) + weak


def _ranking_words(found: Reliability) -> str:
    if found.n_candidates < 2:
        return "With one candidate there is nothing to choose."
    if found.signal_sd is None or found.n_folds < 2:
        return "Whether the candidates differ by more than noise is not known (one fold cannot show it)."
    if found.signal_sd <= 0:
        return "No difference between candidates stands out of the noise: which ones are chosen is arbitrary."
    if found.split_half is None:
        return "Whether the ranking would survive other preference pairs is not known."
    if found.split_half <= 0.1:
        return "Other preference pairs would rank the candidates differently: do not trust the choice."
    full = found.split_half if found.full_set is None else found.full_set
    strength = "mostly" if full >= 0.7 else "partly" if full >= 0.4 else "weakly"
    return f"The ranking of the candidates is {strength} reproducible with other preference pairs."


def evaluation_table(table: EvalTable) -> str:
    """Write all metrics of all arms and the paired differences.

    Args:
        table: the evaluation.

    Returns:
        Lines of at most 100 characters, ending in a newline.
    """
    rows = []
    for name in metric_names(table):
        alike = metric_scale(table, name)
        shown = [name, better_direction(name) or "-"]
        for arm, metrics in table.arms.items():
            if name in metrics:
                rows.append([*shown, arm, *_metric_cells(metrics[name], alike)])
                shown = ["", ""]
    text = _grid(["metric", "better", "arm", "value", "95 % interval", "n"], rows, (26, 6, 18, 12, 24, 6), right=(3, 5))
    notes = {note: None for name in metric_names(table) for note in _notes(table, name)}
    text += "".join(_wrapped(note) for note in notes)
    for arm, kind in table.collapsed.items():
        text += _wrapped(f"{arm} has collapsed ({kind.replace('_', ' ')}): its answers are no evidence of safety.")
    text += _wrapped(table.judge) if table.judge else ""
    differences = [_contrast_cells(item) for item in table.contrasts]
    if differences:
        heads = ["difference of", "arms", "value", "95 % interval", "n", "reading"]
        text += "\n" + _grid(heads, differences, (20, 22, 11, 22, 6, 9), right=(2, 4))
    return text


def samples_text(table: EvalTable, n: int) -> str:
    """Write prompts with the answer of every arm.

    Characters outside ASCII and control characters are written as backslash escapes; the report keeps them.

    Args:
        table: the evaluation.
        n: most samples shown.

    Returns:
        Lines of at most 100 characters, ending in a newline; empty without samples.
    """
    blocks = []
    for sample in table.samples[:n]:
        lines = _wrapped(f"Prompt: {_squeezed(sample.prompt, 300)}")
        for arm, answer in sample.answers.items():
            reward = sample.rewards.get(arm)
            mark = "" if reward is None else f" (reward {number(reward)})"
            lines += _wrapped(f"[{arm}]{mark} {_squeezed(answer, 500) or '(empty)'}", "  ")
        blocks.append(lines)
    return "\n".join(blocks)


def reliability_text(found: Reliability) -> str:
    """Write the reliability of the gains.

    Args:
        found: the reliability record.

    Returns:
        Lines of at most 100 characters, ending in a newline.
    """
    mean, error = found.mean_gain, found.mean_gain_se
    shown = number(mean, error, sign=True) + ("" if error is None else f" +- {number(error, mean)}")
    ratio = f"{number(found.signal_sd, found.noise_sd)} / {number(found.noise_sd, found.signal_sd)}"
    rows = [
        ["split-half correlation", number(found.split_half)],
        ["  predicted for all pairs", number(found.full_set)],
        ["gradient cosine of the halves", number(found.gradient_cosine)],
        ["mean gain", shown],
        ["signal sd / noise sd", ratio],
        ["p-value of no signal", number(found.p_signal)],
        ["pairs / folds / candidates", f"{found.n_pairs} / {found.n_folds} / {found.n_candidates}"],
    ]
    return _grid(["reliability of the gains", ""], rows, (34, 40)) + "\n" + _wrapped(reliability_sentence(found))


def selection_text(solution: Solution, top: int = 10) -> str:
    """Write how many candidates were selected, the rounds, and the largest weights.

    Args:
        solution: the weighted set.
        top: most candidates listed.

    Returns:
        Lines of at most 100 characters, ending in a newline.
    """
    text = _wrapped(f"Selected {len(solution.weights)} of {len(solution.rows)} candidates; stopped: {solution.stopped}")
    if solution.fallback != "none":
        text += _wrapped(FALLBACK_SENTENCES[solution.fallback])
    if solution.rounds:
        heads = ["round", "selected", "J (PA)", "J (held-out)", "retain ppl", "FW gap", "split-half", "kept"]
        objectives = [value for item in solution.rounds for value in (item.objective_pa, item.objective_heldout)]
        rows = [_round_cells(item, objectives) for item in solution.rounds]
        if solution.start_heldout is not None:
            rows.insert(0, ["start", "0", "-", number(solution.start_heldout, *objectives), "-", "-", "-", "-"])
        text += "\n" + _grid(heads, rows, (7, 8, 10, 12, 10, 10, 10, 4), right=range(7))
    gains = {row.id: row for row in solution.scores.rows}
    chosen = sorted((row for row in solution.rows if row.weight > 0), key=lambda row: -row.weight)[:top]
    largest = max((abs(gains[row.id].gain) for row in chosen if row.id in gains), default=0.0)
    rows = []
    for row in chosen:
        score = gains.get(row.id)
        cells = [number(score.gain, largest, sign=True), number(score.gain_se, largest)] if score else ["-", "-"]
        rows.append([row.id, number(row.weight, chosen[0].weight), *cells, row.reason])
    if rows:
        text += "\n" + _grid(["id", "weight", "gain", "se", "reason"], rows, (16, 10, 10, 10, 44), right=(1, 2, 3))
    return text


def selection_words(solution: Solution) -> str:
    """Say how many candidates were selected, in how many rounds, and why it ended there.

    Args:
        solution: the weighted set.

    Returns:
        One sentence without a full stop. Only rounds that added candidates are counted; a round without one, such as
        the final refinement, moved weights.
    """
    text = f"{len(solution.weights)} of {len(solution.rows)} candidates "
    adding = [item for item in solution.rounds if item.added]
    back = sum(not item.accepted for item in adding)
    if solution.fallback == "random_k":
        text += "drawn at random"
    elif solution.fallback == "empty" or not solution.weights:
        text += "selected"
    elif not adding:
        text += "selected in 1 round, which was not measured"
    else:
        text += f"selected in {len(adding)} round{'' if len(adding) == 1 else 's'}"
        text += f" ({back} of them rolled back)" if back else ""
    if len(adding) < len(solution.rounds):
        text += ", then weighted anew"
        text += "" if solution.rounds[-1].accepted else " (rolled back)"
    return f"{text}; stopped: {solution.stopped}"


FALLBACK_SENTENCES: dict[str, str] = {
    "random_k": "No signal was found in the gains: the selection is a random draw with uniform weights.",
    "empty": "No candidate promises a gain: nothing was selected.",
}


def _notes(table: EvalTable, name: str) -> list[str]:
    """What must be read beside one metric, once for all arms of which it is said."""
    arms: dict[str, list[str]] = {}
    for arm, metrics in table.arms.items():
        if name in metrics and metrics[name].note:
            arms.setdefault(metrics[name].note, []).append(arm)
    return [f"{name} ({', '.join(names)}): {note}" for note, names in arms.items()]


def _metric_cells(metric: Metric, alike: list[float]) -> list[str]:
    return [number(metric.value, *alike), interval(metric.low, metric.high, *alike), str(metric.n)]


def _contrast_cells(item: Contrast) -> list[str]:
    ends = (item.low, item.high)
    arms = f"{item.first} - {item.second}"
    value = number(item.difference, *ends, sign=True)
    return [item.metric, arms, value, interval(*ends, item.difference), str(item.n), TONE_WORDS[tone(item)]]


def _round_cells(item: Round, objectives: list[float | None]) -> list[str]:
    values = [number(value, *objectives) for value in (item.objective_pa, item.objective_heldout)]
    values += [number(value) for value in (item.retain_ppl, item.fw_gap, item.split_half)]
    return [item.name, str(item.n_selected), *values, "yes" if item.accepted else "no"]


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]], most: Sequence[int], right: Sequence[int] = ()) -> str:
    """Lay out cells in columns as wide as needed, at most ``most`` each; longer cells are cut."""
    table = [
        [_squeezed(cell, limit, strip=False) for cell, limit in zip(row, most, strict=True)] for row in [heads, *rows]
    ]
    widths = [max(len(row[index]) for row in table) for index in range(len(heads))]
    lines = []
    for row in table:
        cells = [
            f"{cell:>{w}}" if i in right else f"{cell:<{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def _squeezed(text: str, limit: int, strip: bool = True) -> str:
    """Return one printable ASCII line of at most ``limit`` characters."""
    line = " ".join(text.split()) if strip else text
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    line = line.encode("ascii", "backslashreplace").decode("ascii")
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _wrapped(text: str, indent: str = "") -> str:
    printable = _squeezed(text, len(text) * 10 + 3)
    return textwrap.fill(printable, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ") + "\n"
