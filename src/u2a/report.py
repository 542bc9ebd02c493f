"""The report of a run: one HTML file that holds everything and loads nothing.

The page carries a content security policy that allows its own style and script only (by hash), every text is
escaped by the template, and all it shows is readable with scripts off; the script sorts and filters one table.
"""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from u2a.card_words import in_words
from u2a.console import (
    TONE_WORDS,
    better_direction,
    interval,
    metric_names,
    metric_scale,
    number,
    reliability_sentence,
    selection_words,
    tone,
)
from u2a.content_hash import content_hash
from u2a.evaluation.metrics import info
from u2a.evaluation.verdict import answer_of
from u2a.figures import Frame, Level, Series, bar_chart, histogram, interval_glyph, xy_chart
from u2a.record import write_whole
from u2a.run_records import Candidate, RunRecords, candidates, cautions, flattened, option_rows, what_was_done
from u2a.types import Contrast, EvalTable, Partition, UnlearnResult

__all__ = ["RunRecords", "render_report", "write_report"]

SHOWN_ELSEWHERE = ("metrics", "provenance", "seconds", "peak_rss_bytes", "content_hash")  # of the summary
MAX_ROWS = 5000
ROWS_AT_ONCE = 200  # on a screen; the rest at a click
MAX_CHARS = 4000
SETS = {
    "finetune": "pairs for the misaligned start",
    "forget": "negative candidates",
    "retain": "ordinary instructions that must survive",
    "preference": "PA pairs: they define the objective J",
    "reward": "pairs on which reward heads are trained",
    "evaluation": "held-out pairs: nothing is chosen on them",
}


ARMS = {
    "before": "the model at the start",
    "after": "with the selected answers unlearned",
    "random_k": "with as many answers unlearned, drawn at random",
    "full": "with all answers unlearned",
    "lowest_reward_k": "with as many answers unlearned, those of the lowest reward",
    "uniform_top_k": "with the selected answers unlearned, all equally strongly",
    "retrain": "trained without the candidates from the beginning",
    "base": "the model before the misaligned start",
}
ANSWERS = {
    "yes": "Yes: choosing which answers to unlearn did better than a random choice of as many.",
    "no": "No: a random choice of as many answers did better than the one made here.",
    "not shown": "Not shown: whether the choice made here does better than a random one of as many answers stays open.",
}


@dataclass(frozen=True)
class KindRow:
    """Predicted gains of the candidates of one kind; the interval is the mean's, 95 %."""

    kind: str
    n: int
    selected: int
    mean: float
    low: float | None
    high: float | None
    glyph: Markup


def render_report(records: RunRecords) -> str:
    """Write a run's report.

    Args:
        records: what the run wrote; sections without data say so.

    Returns:
        One HTML document without external assets, the same for the same records.
    """
    table = candidates(records)
    scores = records.last_scores
    environment = _environment()
    return environment.get_template("report.html.j2").render(
        r=records,
        answer=ANSWERS.get(answer_of(records.evaluation.verdict) or "", "") if records.evaluation else "",
        arm_words=ARMS,
        done=what_was_done(records),
        cautions=cautions(records),
        sets=_set_rows(records.partition),
        metrics=_metric_scales(records.evaluation),
        glyphs=[_contrast_glyph(item) for item in records.evaluation.contrasts] if records.evaluation else [],
        scores=scores,
        reliability_sentence=reliability_sentence(scores.reliability) if scores else "",
        charts={name: Markup(svg) for name, svg in charts(records, table).items()},
        unlearn=_u2a_first(records.unlearn),
        kinds=kind_rows(table),
        candidates=table[:MAX_ROWS],
        rows_at_once=ROWS_AT_ONCE,
        n_candidates=len(table),
        largest=_largest(table),
        options=option_rows(records.config),
        provenance=flattened(records.summary.get("provenance", {})),
        content_hash=content_hash(records),
        other={k: v for k, v in records.summary.items() if k not in SHOWN_ELSEWHERE},
    )


def write_report(records: RunRecords, path: str | Path) -> Path:
    """Write a run's report to a file, whole or not at all.

    Args:
        records: what the run wrote.
        path: the HTML file.

    Returns:
        The path written.
    """
    write_whole(Path(path), render_report(records))
    return Path(path)


def kind_rows(table: Sequence[Candidate]) -> list[KindRow]:
    """Average the predicted gains by kind.

    Args:
        table: the candidates.

    Returns:
        Rows by falling mean; empty unless some candidate has a kind and a gain.
    """
    if not any(row.kind for row in table):
        return []
    groups: dict[str, list[Candidate]] = {}
    for row in table:
        if row.gain is not None:
            groups.setdefault(row.kind or "(none)", []).append(row)
    stats = []
    for kind, rows in groups.items():
        gains = [row.gain for row in rows if row.gain is not None]
        half = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
        stats.append((kind, rows, statistics.fmean(gains), half))
    span = max((abs(mean) + (half or 0.0) for _, _, mean, half in stats), default=0.0)
    out = []
    for kind, rows, mean, half in sorted(stats, key=lambda item: -item[2]):
        low, high = (None, None) if half is None else (mean - half, mean + half)
        mood = "unclear" if low is None or high is None or low <= 0 <= high else "good" if low > 0 else "bad"
        selected = sum(1 for row in rows if row.weight)
        out.append(KindRow(kind, len(rows), selected, mean, low, high, _glyph(mean, low, high, mood, span)))
    return out


def charts(records: RunRecords, table: Sequence[Candidate]) -> dict[str, str]:
    """Draw all charts of a run.

    Args:
        records: what the run wrote.
        table: the candidates, sorted by weight.

    Returns:
        SVG text by chart name; empty text where there is nothing to draw.
    """
    rounds = records.solution.rounds if records.solution and len(records.solution.rounds) > 1 else ()  # 1: no course
    x = [float(item.index + 1) for item in rounds]
    start = [records.solution.start_heldout] if rounds and records.solution else []
    objective = [
        Series("J on the PA pairs", x, [item.objective_pa for item in rounds], 1),
        Series(
            "J on held-out PA pairs", [0.0] * len(start) + x, start + [item.objective_heldout for item in rounds], 2
        ),
    ]
    retain = [Series("retain perplexity", x, [item.retain_ppl for item in rounds], 3)]
    reward = [Series("mean reward of the policy's own answers", x, [item.reward for item in rounds], 5)]
    gap = [Series("Frank-Wolfe gap", x, [item.fw_gap for item in rounds], 4)]
    chosen = [row for row in table if row.weight]
    ranks = [float(rank + 1) for rank in range(len(chosen))]
    weights = [Series("weight", ranks, [row.weight for row in chosen], 1, stems=True, joined=False)]
    gains = [Series("gain", ranks, [row.gain for row in chosen], 2, [row.se for row in chosen], joined=False)]
    groups = [
        ("selected", [row.gain for row in chosen], 1),
        ("not selected", [row.gain for row in table if not row.weight], 0),
    ]
    seconds = records.summary.get("seconds", {})
    return {
        "objective": xy_chart(Frame("Objective J per round (0: start; higher is better)", "round", "J"), objective),
        "retain": xy_chart(Frame("Retain perplexity per round (lower is better)", "round", "perplexity"), retain),
        "reward": xy_chart(Frame("Reward per round (selecting reward model)", "round", "reward"), reward),
        "gap": xy_chart(Frame("Frank-Wolfe gap per round (0 = optimal)", "round", "gap"), gap),
        "unlearn": _unlearn_chart(records),
        "weights": xy_chart(Frame("Weights of the selected candidates", "rank by weight", "weight"), weights),
        "gains": xy_chart(Frame("Their predicted gains, ± 1 standard error", "rank by weight", "gain"), gains),
        "histogram": histogram(Frame("Predicted gains of all candidates", "gain", "candidates"), groups),
        "seconds": bar_chart("Wall time per phase", list(seconds.items()), "s"),
    }


def _unlearn_chart(records: RunRecords) -> str:
    """Draw the retain perplexity of every arm during unlearning, with the budget of the first arm that has one."""
    series = []
    for colour, (arm, result) in enumerate(_u2a_first(records.unlearn).items()):
        measured = [(float(item.step), item.retain_ppl) for item in result.history if item.retain_ppl is not None]
        points = [(0.0, result.retain_ppl_start), *measured]
        series.append(Series(arm, [step for step, _ in points], [ppl for _, ppl in points], 1 + colour % 5))
    budgets = [result.ppl_budget for result in _u2a_first(records.unlearn).values() if result.ppl_budget is not None]
    level = Level("budget", budgets[0]) if budgets else None
    return xy_chart(Frame("Retain perplexity while unlearning", "optimiser step", "perplexity"), series, level)


def _u2a_first(results: dict[str, UnlearnResult]) -> dict[str, UnlearnResult]:
    return dict(sorted(results.items(), key=lambda item: item[0] != "u2a"))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("u2a", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csp_hash"] = _csp_hash
    environment.filters["short"] = _short
    environment.filters["breakable"] = _breakable
    environment.globals |= {
        "better_direction": better_direction,
        "meaning": info,
        "flattened": flattened,
        "in_words": in_words,
        "interval": interval,
        "number": number,
        "selection_words": selection_words,
        "tone": tone,
        "tone_words": TONE_WORDS,
    }
    return environment


def _csp_hash(text: str) -> str:
    """Return the content-security-policy source that allows exactly this inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _breakable(name: str) -> Markup:
    """Let a long name break after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def _short(text: str) -> str:
    """Cut a long text and say by how much."""
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} [... {len(text) - MAX_CHARS} more characters]"


def _set_rows(partition: Partition) -> list[tuple[str, int, int, str]]:
    """Return name, rows, distinct prompts and meaning of every set."""
    out = []
    for name, meaning in SETS.items():
        rows = getattr(partition, name)
        out.append((name, len(rows), len({row.prompt for row in rows}), meaning))
    return out


def _metric_scales(table: EvalTable | None) -> dict[str, list[float]]:
    return {name: metric_scale(table, name) for name in metric_names(table)} if table else {}


def _largest(table: Sequence[Candidate]) -> dict[str, float]:
    """Return the largest number of every column, which sets the decimals of the whole column."""
    columns = ("weight", "gain", "se", "reward")
    return {name: max((abs(getattr(row, name) or 0.0) for row in table), default=0.0) for name in columns}


def _glyph(value: float | None, low: float | None, high: float | None, mood: str, span: float | None = None) -> Markup:
    if value is None or low is None or high is None:
        return Markup("")
    return Markup(interval_glyph(value, low, high, mood, span))


def _contrast_glyph(item: Contrast) -> Markup:
    return _glyph(item.difference, item.low, item.high, tone(item))
