"""The README.md saved beside a model or adapter: what was done, with which data, with what result."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from u2a.console import better_direction, interval, metric_names, metric_scale, number, reliability_sentence
from u2a.robustness.records import RobustnessTable
from u2a.run_records import RunRecords, cautions, what_was_done
from u2a.types import EvalTable, Metric

PACKAGES = ("u2a", "torch", "transformers", "peft")
_BLOCK_START = re.compile(r"^(|\d+)([-+=~]|[.)](?=\s|$))")  # a list item, a rule or a fence, at the start of a line
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
ATTACKS = {"relearned": "fine-tuning", "quantised": "quantisation", "prompt": "other prompts"}
LIMITATIONS = (
    "The interval of a metric covers the sampling of prompts only, not another seed, other data or another model.",
    "Unlearning lowers the probability of the candidates' answers. It is no proof that knowledge is gone: "
    "fine-tuning, quantisation or other prompts can bring behaviour back{tried}.",
    "Reward models and preference pairs are imperfect stand-ins for what people want; errors in them are learned.",
    "Utility was guarded by perplexity on the retain rows; abilities those rows do not exercise may have suffered.",
    "Not checked for safety in use. The limits of the base model remain.",
)


def model_card(records: RunRecords, base_model: str) -> str:
    """Write the model card of a run's result.

    Args:
        records: what the run wrote; parts without data say so.
        base_model: hub id or path of the model that was changed.

    Returns:
        Markdown with YAML front matter as peft writes it. It holds no text of any candidate, prompt or answer.
    """
    adapter = records.config.model.adapter.enabled
    front: dict[str, Any] = {"base_model": base_model, "library_name": "peft" if adapter else "transformers"}
    front["tags"] = ["u2a", "unlearning", *(["lora"] if adapter else [])]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {_inline(base_model)}, aligned by unlearning\n",
        f"{_text(what_was_done(records))}\n",
        "## Result\n",
        _result(records.evaluation),
        *_reliability(records),
        "## How to load\n",
        _loading(base_model, adapter),
        "## Data\n",
        _data(records),
        "## How it was made\n",
        _training(records),
        "## Limitations\n",
        _bullets([*cautions(records), *(text.replace("{tried}", _tried(records.robustness)) for text in LIMITATIONS)]),
        "## Versions\n",
        _bullets([f"{name} {number_}" for name, number_ in _versions(records.summary).items()]),
    ]
    return "\n".join(parts)


def _result(table: EvalTable | None) -> str:
    if table is None:
        return "Not evaluated.\n"
    arms = list(table.arms)
    lines = ["| metric | " + " | ".join(_text(arm) for arm in arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for name in metric_names(table):
        alike = metric_scale(table, name)
        cells = [_cell(table.arms[arm].get(name), alike) for arm in arms]
        lines.append(f"| {_text(name)}{ARROWS[better_direction(name)]} | " + " | ".join(cells) + " |")
    note = "↑ higher is better, ↓ lower is better, no arrow: neither. Brackets: 95 % interval."
    return f"{_text(table.verdict or 'No verdict.')}\n\n" + "\n".join(lines) + f"\n\n{note}\n"


def _cell(metric: Metric | None, alike: list[float]) -> str:
    if metric is None:
        return "-"
    if metric.value is None:
        return f"undefined (n = {metric.n})"
    ends = interval(metric.low, metric.high, *alike)
    return f"{number(metric.value, *alike)} {ends} (n = {metric.n})".replace("  ", " ")


def _reliability(records: RunRecords) -> list[str]:
    scores = records.last_scores
    if scores is None:
        return []
    found = scores.reliability
    numbers = (
        f"Split-half rank correlation of the gains {number(found.split_half)}, gradient cosine of the halves "
        f"{number(found.gradient_cosine)}, {found.n_pairs} preference pairs in {found.n_folds} folds."
    )
    return [f"{reliability_sentence(found)} {numbers}\n"]


def _loading(base_model: str, adapter: bool) -> str:
    """Write the code that loads the result; names are written as JSON strings, which are Python strings too."""
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    body = ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    if adapter:
        imports.insert(0, "from peft import PeftModel")
        base = json.dumps(base_model)
        if base_model.startswith("package:"):  # a file inside an installed package, not known to transformers
            imports.append("from u2a.packaged import resolve_model")
            base = f"resolve_model({base})"
        body = [
            f"base = AutoModelForCausalLM.from_pretrained({base})",
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    opening = ['folder = "PATH_OF_THIS_DIRECTORY"', "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    return "\n".join(["```python", *imports, "", *opening, *body, "```"]) + "\n"


def _data(records: RunRecords) -> str:
    data = records.partition
    sizes = [
        f"{len(data.forget)} negative candidates",
        f"{len(data.preference)} preference (PA) pairs",
        f"{len(data.retain)} retain rows",
        f"{len(data.reward)} pairs for reward heads",
        f"{len(data.evaluation)} held-out pairs, on which nothing was chosen",
    ]
    if data.finetune:
        sizes.insert(0, f"{len(data.finetune)} pairs for the misaligned start")
    return f"Fingerprint {_inline(data.fingerprint or 'none')}. The sets are split by prompt.\n\n{_bullets(sizes)}"


def _training(records: RunRecords) -> str:
    result = records.unlearn.get("u2a")
    if result is None:
        return "No unlearning run was recorded.\n"
    section = records.config.unlearn
    lines = [
        f"loss: {result.loss}",
        f"samples with positive weight: {result.n_samples}",
        f"steps: {result.steps_kept} kept of {result.steps}",
        f"optimiser: {OPTIMIZERS[section.optimizer]}, peak learning rate {section.learning_rate:g}",
        f"seed: {records.config.seed}",
    ]
    if result.retain_ppl_start is not None:
        budget = "" if result.ppl_budget is None else f", budget {number(result.ppl_budget)}"
        ends = f"{number(result.retain_ppl_start)} to {number(result.retain_ppl_end)}"
        lines.append(f"perplexity of the guard's retain rows: {ends}{budget}")
    if result.scale < 1:
        lines.append(f"scale of the change: {number(result.scale)} (already contained in the saved weights)")
    return _bullets(lines)


def _tried(table: RobustnessTable | None) -> str:
    """Which attacks were tried: the end of a sentence that names all."""
    kinds = {row.kind for row in table.rows} if table else set()
    tried = [words for kind, words in ATTACKS.items() if kind in kinds]
    left = [words for kind, words in ATTACKS.items() if kind not in kinds]
    if not tried:
        return ", and none of them was tried here"
    rest = f"; not tried: {', '.join(left)}" if left else ""
    return f" (tried here, with the results in the run's report: {', '.join(tried)}{rest})"


def _versions(summary: dict[str, Any]) -> dict[str, str]:
    """Return the versions the run noted, or those installed now when it noted none."""
    provenance = summary.get("provenance")
    noted = provenance.get("versions") if isinstance(provenance, dict) else None
    if isinstance(noted, dict) and noted:
        return {str(name): str(number_) for name, number_ in noted.items()}
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines) + "\n"


def _text(text: str) -> str:
    """Return one line in which no character starts Markdown or HTML."""
    line = " ".join(text.split())
    for mark in "\\`*[]<>|#":
        line = line.replace(mark, "\\" + mark)
    return _BLOCK_START.sub(r"\1\\\2", line)


def _inline(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
