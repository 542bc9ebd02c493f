"""Bench results to pages: `python bench/pages.py` writes docs/results/NAME.md from bench/results/NAME.json.

What the figures mean is written by hand in bench/results/NAME.notes.md and put first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown_table import cell, table
from pages_smollm2 import pa_gain, pa_signal, reward_agreement, selection_smollm2

from u2a.record import write_whole

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs" / "results"


def scoring(found: dict[str, Any]) -> str:
    """Tables of the scoring bench.

    Args:
        found: its document.

    Returns:
        Markdown.
    """
    forward = found["seconds"]["forward"]["median_s"]
    machine, rows = found["machine"], []
    for name, row in found["agreement"].items():
        seconds = found["seconds"][name]["median_s"]
        times = found["seconds"][name]["repetitions"]
        rows.append((name, seconds, times, seconds / forward, row["spearman"], row["rel_error"]))
    loop, times = (found["seconds"]["per_sample_backward"][key] for key in ("median_s", "repetitions"))
    rows.append(("one backward per sample (the truth)", loop, times, loop / forward, 1.0, 0.0))
    if "released_way" in found["seconds"]:
        loop, times = (found["seconds"]["released_way"][key] for key in ("median_s", "repetitions"))
        error = found["released_way_rel_error"]
        rows.append(("the released code's way", loop, times, loop / forward, None, error))
    rivals = [
        (name, row.get("version"), row["status"], row.get("seconds"), row.get("ratio_to_central"), row.get("spearman"))
        for name, row in found["rivals"].items()
    ]
    targets = [(row["figure"], row["value"], row["target"], row["met"]) for row in found["targets"]]
    return "\n".join(
        [
            f"{found['n']} candidates, {found['tokens']} tokens in {found['n_batches']} batches, {found['dtype']}; "
            f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, torch "
            f"{found['versions']['torch']}. One no-grad forward over the batches: {forward:.1f} s.\n",
            table(("scorer", "seconds", "repetitions", "forwards", "Spearman to the truth", "relative error"), rows),
            f"Four directions at once: central {cell(found['ratio_central_4_directions'])} forwards, backward "
            f"{cell(found['ratio_backward_4_directions'])}. Hessian-vector product over gradient: "
            f"{cell(found['hvp_ratio'])} (same attention kernel: {cell(found['hvp_ratio_same_kernel'])}). Growth of "
            f"peak memory from 64 to 4,096 candidates: {cell(found['peak_rss_growth'])}.\n",
            "## Other libraries, the same products\n",
            "One that makes the gradient of J itself is compared with our scorer and that gradient together.\n",
            table(("library", "version", "status", "seconds", "x our central scorer", "Spearman to the truth"), rivals),
            "## Targets\n",
            table(("figure", "measured", "target", "met"), targets),
        ]
    )


def selection(found: dict[str, Any]) -> str:
    """Tables and figures of the selection bench.

    Args:
        found: its document.

    Returns:
        Markdown.
    """
    parts = [_validity(found)] if "validity" in found else []
    parts += [make(found[name]) for name, make in SECTIONS.items() if name in found]
    machine, model = found["machine"], found["model"]
    intro = (
        f"A transformer of {model['weights']:,} weights trained for {model['seconds']:.0f} s on real text "
        f"({model['rows']} answers; NLL {model['train_nll_nats']} on them, {model['unseen_nll_nats']} on unseen text); "
        f"{machine['processor']}, {machine['cores']} cores. Verdicts: nowhere significantly worse than "
        f"random-k: **{cell(found['noninferior_to_random'])}**, than the full set: "
        f"**{cell(found['noninferior_to_full'])}** (one-sided 5 %, Holm); better than random-k where there is signal: "
        f"**{cell(found['better_where_signal'])}**.\n"
    )
    return "\n".join([intro, *parts])


def _validity(found: dict[str, Any]) -> str:
    names = list(found["lds"])
    rows = [
        (
            name,
            found["lds"][name]["mean"],
            *(world["by"][name]["lds_interval"] for world in found["validity"].values()),
            found["lds_heldout"][name],
            found["leave_group_out"][name],
            found["sign_accuracy"][name],
            found["sign_base_rate"][name],
            found["topk_precision"][name],
            found["seconds"].get(name),
        )
        for name in names
    ]
    head = ["", "LDS, mean", *(f"95 % interval, {name}" for name in found["validity"])]
    head += ["LDS, held-out J", "leave-group-out", "sign accuracy", "its base rate", "top-quarter precision", "seconds"]
    return "\n".join(
        [
            "## Does predicted gain equal measured gain?\n",
            "Spearman correlation of predicted with measured changes of J over random omega (LDS), each a whole run.\n",
            table(head, rows),
            "![LDS](selection-lds.svg)\n",
        ]
    )


def _roughness(rows: list[dict[str, Any]]) -> str:
    cells = [(r["setting"], r["relative_sd"], r["adjoint"], r["lds"], r["lds_interval"]) for r in rows]
    return "\n".join(
        [
            "## How smooth is J in the weights?\n",
            table(("AdamW", "relative sd of omega", "adjoint", "LDS", "95 % interval"), cells),
        ]
    )


def _study(study: dict[str, Any]) -> str:
    out = [
        "## When is choosing worth it?\n",
        "Changes of held-out J, nats per token; differences with 95 % intervals.\n",
    ]
    for kind, part in study.items():
        rows = [
            (
                size,
                row["seeds"],
                row["split_half"],
                row["fell_back"],
                row["delta_j"]["u2a"],
                row["delta_j"]["random"],
                row["delta_j"]["full"],
                row["delta_j"]["oracle"],
                row["against"]["random"]["mean"],
                row["against"]["random"]["interval"],
                row["against"]["full"]["interval"],
                row["against"]["random"]["p_worse"],
                row["against"]["random"]["p_better"],
            )
            for size, row in part["by_pa_size"].items()
        ]
        head = ["PA pairs", "seeds", "split-half", "fell back", "default", "random-k", "full set", "in-sample oracle"]
        head += ["default - random-k", "interval", "default - full set", "p worse", "p better"]
        out += [f"### {kind}\n", table(head, rows), f"![J, {kind}](selection-delta-j-{kind}.svg)\n"]
    return "\n".join([*out, "![reliability](selection-reliability.svg)\n"])


def _questions(found: dict[str, Any]) -> str:
    stress = [
        (
            r["adjoint"],
            r["curvature"],
            r["damping"],
            r["status"],
            r.get("damping_used"),
            r.get("residual"),
            r.get("spearman_to_exact"),
            r.get("top_overlap"),
            r.get("heldout_j"),
        )
        for r in found["curvature_stress"]
    ]
    sparse = [(r["p"], r["beta"], r["support"], r["effective"], r["pa_j"], r["heldout_j"]) for r in found["sparsity"]]
    remedies = [
        (
            r["remedy"],
            r["n_pa"],
            r["seeds"],
            r["split_half"],
            r["agreement_with_heldout"],
            r["gradient_cosine"],
            r["signal_to_noise"],
        )
        for r in found["remedies"]
    ]
    low = found["low_reward_groups"]
    return "\n".join(
        [
            "## Damaged curvature\n",
            table(
                ("adjoint", "curvature", "damping", "status", "damping used", "residual", "Spearman to exact")
                + ("overlap of the selected", "held-out J of the selected"),
                stress,
            ),
            "## Sparsity\n",
            table(("p", "beta", "support", "effective support", "J on PA", "held-out J"), sparse),
            "![sparsity](selection-sparsity.svg)\n",
            "## Remedies against noise\n",
            table(
                ("remedy", "PA pairs", "seeds", "split-half", "ranking against unseen pairs")
                + ("gradient cosine", "signal / noise"),
                remedies,
            ),
            "## The paper's figures 2 and 4\n",
            f"J after unlearning groups against their proportion of low-reward tokens: Spearman "
            f"{cell(low['spearman'])} on PA pairs, {cell(low['spearman_heldout'])} on held-out pairs.\n",
            "![single samples](selection-single-samples.svg)\n",
            "![low reward](selection-low-reward.svg)\n",
            "![top K](selection-top-k.svg)\n",
        ]
    )


SECTIONS = {"roughness": _roughness, "study": _study, "questions": _questions}
PAGES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "scoring": ("Scoring: cost and accuracy", "make bench-scoring", scoring),
    "selection": ("Selection: validity, and when choosing pays", "make bench-selection", selection),
    "selection_smollm2": ("Selection: validity on SmolLM2", "make experiment-validity", selection_smollm2),
    "pa_gain": ("What more preference pairs bring on SmolLM2", "make bench-pa-gain", pa_gain),
    "pa_signal": ("What the preference pairs of every task say", "make experiment-signal", pa_signal),
    "pa_signal_openings": (
        "What the preference pairs say where length tells no side apart",
        "make experiment-signal",
        pa_signal,
    ),
    "reward_agreement": ("Do two reward models agree?", "make experiment-rewards", reward_agreement),
}


def main() -> None:
    """Write the pages of all results that are there."""
    for name, (title, command, make) in PAGES.items():
        source = RESULTS / f"{name}.json"
        if not source.is_file():
            continue
        notes = RESULTS / f"{name}.notes.md"
        text = notes.read_text(encoding="utf-8") if notes.is_file() else ""
        head = f"# {title}\n\nFrom `bench/results/{name}.json`, written by `{command}`.\n"
        found = json.loads(source.read_text(encoding="utf-8"))
        write_whole(DOCS / f"{name}.md", "\n".join([head, text, make(found)]))


if __name__ == "__main__":
    main()
