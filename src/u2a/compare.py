"""Several runs side by side: the same arm of each, with paired intervals against the first run.

Differences are taken on the prompts and rows that both runs measured, so runs may have been made at different times;
where they share none, the difference is undefined, with n = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from u2a.console import TONE_WORDS, better_direction, interval, number, tone
from u2a.errors import ConfigError, RecordError
from u2a.evaluation.arm import ArmResult, item_groups
from u2a.evaluation.evaluate import contrasts_of
from u2a.evaluation.metrics import info
from u2a.record import Record, write_whole
from u2a.reward.analysis import TRAINED_HERE, split_reward_pairs
from u2a.reward.lm_head import HIDDEN_LENGTH
from u2a.run_records import RunRecords
from u2a.types import Contrast, EvalTable, Metric


class Comparison(Record):
    """One arm of several runs.

    Attributes:
        arm: the arm (``after``: the solution).
        runs: names of the runs; the first one is what the others are compared with.
        metrics: metrics by run.
        contrasts: paired differences, run minus the first run.
        collapsed: what prevails in the answers of a run whose arm has collapsed.
        left_out: metrics without a difference between two runs, and why.
        verdicts: verdict of every run on its own control.
    """

    arm: str
    runs: tuple[str, ...]
    metrics: dict[str, dict[str, Metric]]
    contrasts: tuple[Contrast, ...] = ()
    collapsed: dict[str, str] = {}
    left_out: tuple[str, ...] = ()
    verdicts: dict[str, str] = {}


@dataclass(frozen=True)
class _Run:
    name: str
    records: RunRecords
    table: EvalTable
    result: ArmResult


def compare_runs(folders: Sequence[str | Path], arm: str = "after") -> Comparison:
    """Compare one arm of several runs.

    Args:
        folders: output directories of evaluated runs, at least two.
        arm: which arm (``after``, ``before``, or a control).

    Returns:
        Metrics of all runs and paired differences against the first.

    Raises:
        ConfigError: fewer than two runs, or the same run twice.
        RecordError: a folder holds no evaluated run, or the run has no such arm.
    """
    if len(folders) < 2:
        raise ConfigError("compare: needs at least two runs")
    names = _names([Path(folder) for folder in folders])
    runs = [_read(name, Path(folder), arm) for name, folder in zip(names, folders, strict=True)]
    first = runs[0]
    resampling = first.records.config.evaluation.bootstrap, first.records.config.seed
    contrasts: list[Contrast] = []
    left_out: list[str] = []
    for run in runs[1:]:
        barred = _barred(run, first)
        groups = item_groups(run.records.partition) | item_groups(first.records.partition)
        found = contrasts_of(run.result, first.result, (run.name, first.name), groups, resampling)
        never = {name for names in barred.values() for name in names}
        found = [item for item in found if item.metric.split("/")[0] not in never]
        contrasts += found
        measured = [one.table.arms[arm] for one in (run, first)]
        without = barred | {UNPAIRED: _unpaired(measured, never, {item.metric for item in found})}
        there = {name.split("/")[0] for metrics in measured for name in metrics}
        for reason, each in without.items():
            shown = [name for name in each if name.split("/")[0] in there]
            left_out += [f"{run.name}: {', '.join(shown)} ({reason})"] if shown else []
    return Comparison(
        arm=arm,
        runs=tuple(names),
        metrics={run.name: run.table.arms[arm] for run in runs},
        collapsed={run.name: run.table.collapsed[arm] for run in runs if arm in run.table.collapsed},
        left_out=tuple(left_out),
        contrasts=tuple(contrasts),
        verdicts={run.name: run.table.verdict for run in runs},
    )


COHERENCE = ("coherence", "coherence_minilm")
ANSWERS = ("refusal_rate", "degenerate_rate", "answer_words", *COHERENCE, "echo_rate", "distinct_2")
JUDGED = ("asr", "over_refusal", "incoherent_rate")
BY_TOKEN = (
    "preference_accuracy",
    "preference_margin",
    "retain_ppl",
    "verbatim_memorisation",
    "exact_memorisation",
    "extraction_strength",
)
REWARDS = ("reward", "reward_second")
UNPAIRED = "no values in both runs that could be paired"


def _barred(run: _Run, first: _Run) -> dict[str, tuple[str, ...]]:
    """Metrics that mean different things in two runs, by reason."""
    one, other = run.records.config, first.records.config
    drawn = ("max_new_tokens", "temperature", "top_k", "top_p")
    same_seed = one.evaluation.temperature == 0 or one.seed == other.seed
    decoding = same_seed and all(getattr(one.evaluation, name) == getattr(other.evaluation, name) for name in drawn)
    judge = one.evaluation.judge == other.evaluation.judge
    barred: dict[str, tuple[str, ...]] = {}
    if not decoding:
        barred["answers were drawn under another rule"] = (*ANSWERS, *JUDGED, *REWARDS)
    elif one.evaluation.embedder != other.evaluation.embedder:
        barred["another embedder"] = COHERENCE
    if not judge:
        barred["another judge"] = JUDGED
    if not _same_tokens(run, first):
        barred["texts were tokenised or cut in another way"] = BY_TOKEN
    models = zip(REWARDS, _reward_models(run), _reward_models(first), strict=True)
    others = tuple(name for name, left, right in models if left != right)
    if others:
        barred["the reward models were trained on other pairs, or are others"] = others
    return barred


def _same_tokens(run: _Run, first: _Run) -> bool:
    """Whether two runs count the same tokens, by the rows both measured; without such rows by the model's name."""
    one, other = run.records.config, first.records.config
    if one.data.max_length != other.data.max_length:
        return False
    tokens, others = run.result.retain_tokens, first.result.retain_tokens
    shared = tokens.keys() & others.keys()
    if shared:
        return all(tokens[name] == others[name] for name in shared)
    return one.model.name_or_path == other.model.name_or_path


def _reward_models(run: _Run) -> tuple[object, object]:
    """What decides the reward models of a run's evaluation, the first one and the second."""
    section, pairs = run.records.config.reward, split_reward_pairs(run.records.partition.reward)[1]
    named = (section.eval_model, section.eval_name_or_path), (section.second_model, section.second_name_or_path)
    ids = [pair.id for pair in pairs]
    read = max(HIDDEN_LENGTH, run.records.config.data.max_length)  # tokens, of models that read so many
    first, second = ((*names, read, ids if names[0] in TRAINED_HERE else None) for names in named)
    return first, second


def _unpaired(measured: Sequence[dict[str, Metric]], barred: set[str], paired: set[str]) -> tuple[str, ...]:
    """Metrics of both runs that have no paired difference, although nothing bars it."""
    one, other = measured
    return tuple(name for name in one if name in other and name not in paired and name.split("/")[0] not in barred)


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names, or their paths where two are called alike."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("compare: the same run twice")
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _read(name: str, folder: Path, arm: str) -> _Run:
    records = RunRecords.load(folder)
    if records.evaluation is None:
        raise RecordError(f"{folder}: no evaluation.json there (run u2a evaluate first)")
    if arm not in records.evaluation.arms:
        raise RecordError(f"{folder}: no arm {arm!r} (there are {', '.join(records.evaluation.arms)})")
    return _Run(name, records, records.evaluation, ArmResult.load(folder / "arms" / f"{arm}.json"))


def comparison_markdown(found: Comparison) -> str:
    """Write a comparison as Markdown tables.

    Args:
        found: the comparison.

    Returns:
        Two tables and the verdicts; cells hold no pipe or line break of their own.
    """
    lines = [
        f"Arm {_cell(found.arm)}; in brackets 95 % intervals.",
        "",
        "| metric | " + " | ".join(_cell(run) for run in found.runs) + " |",
    ]
    lines += ["| --- |" + " --- |" * len(found.runs)]
    for name, alike in _rows(found):
        cells = [_metric_cell(found.metrics[run].get(name), alike) for run in found.runs]
        lines.append(f"| {_head(name)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| difference of | runs | value | 95 % interval | n | reading |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for item in found.contrasts:
        ends = (item.low, item.high)
        cells = [number(item.difference, *ends, sign=True), interval(*ends, item.difference), str(item.n)]
        arms = f"{_cell(item.first)} − {_cell(item.second)}"
        lines.append(f"| {_head(item.metric)} | {arms} | " + " | ".join(cells) + f" | {TONE_WORDS[tone(item)]} |")
    lines += [""] + [f"- not compared: {_cell(text)}" for text in found.left_out]
    lines += [f"- {_cell(run)} has collapsed ({_cell(kind)})" for run, kind in found.collapsed.items()]
    lines += [f"- {_cell(run)}: {_cell(text)}" for run, text in found.verdicts.items()]
    return "\n".join(lines) + "\n"


def comparison_html(found: Comparison) -> str:
    """Write a comparison as one HTML page that loads nothing.

    Args:
        found: the comparison.

    Returns:
        The page; every text is escaped.
    """
    environment = Environment(
        loader=PackageLoader("u2a", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"head": _head, "interval": interval, "number": number, "tone": tone, "words": TONE_WORDS}
    template = environment.get_template("compare.html.j2")
    return template.render(found=found, rows=_rows(found), metric_cell=_metric_cell)


def check_ending(path: Path) -> None:
    """Refuse a file that :func:`write_comparison` would refuse, before anything is compared.

    Args:
        path: where a comparison is to be written.

    Raises:
        ConfigError: another ending than ``.html``, ``.md`` or ``.json``.
    """
    if path.suffix not in (".html", ".md", ".json"):
        raise ConfigError(f"--out {path}: expected .html, .md or .json")


def write_comparison(found: Comparison, path: Path) -> Path:
    """Write a comparison to a file.

    Args:
        found: the comparison.
        path: ``.html``, ``.md`` or ``.json``.

    Returns:
        The path.

    Raises:
        ConfigError: another ending.
    """
    check_ending(path)
    if path.suffix == ".json":
        return found.save(path)
    write_whole(path, comparison_html(found) if path.suffix == ".html" else comparison_markdown(found))
    return path


def _rows(found: Comparison) -> list[tuple[str, list[float]]]:
    """Metric names in order of first appearance, each with all its numbers, which fix the decimals."""
    names = list(dict.fromkeys(name for metrics in found.metrics.values() for name in metrics))
    rows = []
    for name in names:
        items = [metrics[name] for metrics in found.metrics.values() if name in metrics]
        numbers = [value for item in items for value in (item.value, item.low, item.high) if value is not None]
        rows.append((name, numbers))
    return rows


def _metric_cell(metric: Metric | None, alike: list[float]) -> str:
    if metric is None:
        return "-"
    text = f"{number(metric.value, *alike)} {interval(metric.low, metric.high, *alike)}".strip()
    return f"{text} (n = {metric.n})" + (f"; {_cell(metric.note)}" if metric.note else "")


def _head(name: str) -> str:
    found = info(name)
    return f"{_cell(name)} {found.arrow}".strip() if found and better_direction(name) else _cell(name)


def _cell(text: str) -> str:
    """One line in which nothing starts Markdown or HTML."""
    line = " ".join(text.split())
    for mark in "\\`*[]<>|":
        line = line.replace(mark, "\\" + mark)
    return line
