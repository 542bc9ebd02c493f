"""Turn finished runs into one Markdown page: tables, commands, seeds, seconds and machine, all read from the records.

python bench/results_table.py docs/results/saferlhf-smollm2.md "SafeRLHF, SmolLM2-135M" RUN_DIR [RUN_DIR ...]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from u2a.console import interval, metric_names, number
from u2a.evaluation.metrics import info
from u2a.reward.card import card_lines
from u2a.robustness.table import markdown
from u2a.run_records import RunRecords, option_rows
from u2a.types import Agreement

FIRST = ("preference_margin", "preference_accuracy", "reward", "retain_ppl", "asr", "over_refusal")  # shown at once


def command(records: RunRecords) -> str:
    """The options that differ from the defaults, as a reader would set them; data files by name only."""
    lines = []
    for name, value, _, changed in option_rows(records.config):
        if changed and name not in ("output_dir",):
            shown = re.sub(r"(?:/[^\s'/]+)+/([^\s'/]+)", r"\1", value)
            lines.append(f"{name}={shown}")
    return "\n".join(lines)


def commit(origin: dict[str, Any]) -> str:
    """The commit the run was made from."""
    git = origin.get("git")
    return f"commit {git['commit'][:10]}{' with local changes' if git['dirty'] else ''}" if git else "from an archive"


def arm_table(records: RunRecords) -> list[str]:
    """Metrics of every arm with 95 % intervals."""
    table = records.evaluation
    assert table is not None
    arms = list(table.arms)
    lines = ["| metric | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for name in metric_names(table):
        cells = []
        for arm in arms:
            metric = table.arms[arm].get(name)
            text = "" if metric is None else f"{number(metric.value)} {interval(metric.low, metric.high)} n={metric.n}"
            withheld = metric is not None and metric.value is None and metric.note
            cells.append(f"{text}; {metric.note}" if metric and withheld else text)
        found = info(name)
        lines.append(f"| {name} {found.arrow if found else ''} | " + " | ".join(cells) + " |")
    if table.judge:
        lines += ["", table.judge]
    for card in (table.reward_card, table.second_reward_card):
        lines += [""] + [f"    {line}" for line in card_lines(card)] if card else []
    for found in table.agreements:
        lines += ["", _agreement(found)]
    return lines


def _agreement(found: Agreement) -> str:
    over = f"{found.n_ranked} answers of the solution" if found.over == "prompts" else f"{found.n_ranked} arms"
    value = found.spearman
    return f"Both reward models rank {over} alike: Spearman {number(value.value)} {interval(value.low, value.high)}."


def contrast_table(records: RunRecords) -> list[str]:
    """Paired differences with 95 % intervals."""
    table = records.evaluation
    assert table is not None
    head = ["| paired difference | value | 95 % interval | prompts |", "|---|---|---|---|"]
    rows: dict[bool, list[str]] = {True: [], False: []}
    for item in table.contrasts:
        bounds, arms = interval(item.low, item.high), f"{item.first} - {item.second}"
        line = f"| {item.metric}: {arms} | {number(item.difference, sign=True)} | {bounds} | {item.n} |"
        rows[item.metric.split("/")[0] in FIRST].append(line)
    more = ["", "<details><summary>Other differences</summary>", "", *head, *rows[False], "", "</details>"]
    return [*head, *rows[True], *(more if rows[False] else [])]


def attacked(records: RunRecords) -> list[str]:
    """The robustness table, where there is one."""
    if records.robustness is None:
        return []
    return ["<details><summary>Robustness</summary>", "", markdown(records.robustness).rstrip(), "", "</details>", ""]


def section(folder: Path) -> list[str]:
    """One run."""
    records = RunRecords.load(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    origin = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["provenance"]
    result = records.unlearn.get("u2a")
    assert records.solution is not None
    found = records.solution.scores.reliability
    seconds = summary["seconds"]
    done = (
        "nothing was unlearned"
        if result is None
        else (
            f"{result.n_samples} of {summary['n_candidates']} candidates, "
            f"{result.steps_kept} of {result.steps} steps kept, "
            f"scale {number(result.scale)}, budget {'breached and settled' if result.breached else 'kept'}, "
            f"guard perplexity {number(result.retain_ppl_start)} to {number(result.retain_ppl_end)}"
        )
    )
    return [
        f"## {records.config.unlearn.loss}",
        "",
        f"**{summary['verdict']}**",
        "",
        f"- unlearning: {records.config.unlearn.loss}, {done}",
        f"- gains: split-half correlation {number(found.split_half)}, gradient cosine {number(found.gradient_cosine)}, "
        f"mean gain {number(found.mean_gain, sign=True)} +- {number(found.mean_gain_se)}, "
        f"signal sd / noise sd {number(found.signal_sd)} / {number(found.noise_sd)}, "
        f"fallback `{records.solution.fallback}`",
        f"- seed {records.config.seed}; {sum(seconds.values()):.0f} s in all; peak memory "
        f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB; machine {origin['machine']}, {origin['device']}; "
        f"torch {origin['versions']['torch']}, transformers {origin['versions']['transformers']}; {commit(origin)}",
        "",
        *arm_table(records),
        "",
        *contrast_table(records),
        "",
        *attacked(records),
        "<details><summary>Options that differ from the defaults, seconds by phase</summary>",
        "",
        "```text",
        command(records),
        "",
        *(f"{name}: {value:.1f} s" for name, value in seconds.items()),
        "```",
        "",
        "</details>",
        "",
    ]


def main() -> None:
    """Write the page."""
    target, title, *folders = sys.argv[1:]
    lines = [f"# {title}", ""]
    notes = Path(target).with_suffix(".notes.md")
    if notes.exists():
        lines += [notes.read_text(encoding="utf-8").rstrip(), ""]
    for folder in folders:
        lines += section(Path(folder))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
