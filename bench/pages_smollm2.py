"""Pages of the benches that use settings of the comparison; see pages.py."""

from __future__ import annotations

import statistics
from typing import Any

from markdown_table import cell, table


def pa_signal(found: dict[str, Any]) -> str:
    """Table of what the preference pairs of every task say.

    Args:
        found: its document.

    Returns:
        Markdown.
    """
    head = ("task", "candidates", "PA pairs", "split-half", "predicted for all pairs", "p of no signal")
    head += ("signal sd", "noise sd", "gain against length", "against NLL", "against reward", "chosen is shorter")
    rows = []
    for task, row in found["tasks"].items():
        says, against = row["reliability"], row["gain_against"]
        rows.append(
            (task, row["candidates"], row["pairs"], says["split_half"], says["full_set"], says["p_signal"])
            + (says["signal_sd"], says["noise_sd"], against["characters"], against["nll"], against["reward"])
            + (row["chosen_shorter"],)
        )
    curves = [
        (task, point["pairs"], point["split_half"], point["sd_over_draws"], point["signal_found"])
        for task, row in found["tasks"].items()
        for point in row["curve"]
    ]
    return "\n".join(
        [
            f"Seed {found['seed']}; {found['machine']['processor']}, {found['machine']['cores']} cores. Correlations "
            "are Spearman's, over candidates.\n",
            table(head, rows),
            "## By number of pairs\n",
            table(("task", "PA pairs", "split-half", "sd over draws of folds", "draws that claim signal"), curves),
        ]
    )


def reward_agreement(found: dict[str, Any]) -> str:
    """Table of how far two reward models agree on the candidates of every task.

    Args:
        found: its document.

    Returns:
        Markdown.
    """

    def with_ends(row: dict[str, Any]) -> str:
        return f"{cell(row['value'])} {cell([row['low'], row['high']])}"

    head = (
        "task",
        "candidates",
        "prompts",
        "other features",
        "same features, other pairs",
        "low-reward tokens (kappa)",
    )
    head += ("MiniLM head against shortness", "SmolLM2 head against shortness")
    rows = [
        (task, row["candidates"], row["rewards_spearman"]["prompts"], with_ends(row["rewards_spearman"]))
        + (with_ends(row["rewards_spearman_same_features"]), with_ends(row["low_tokens_kappa"]))
        + tuple(with_ends(row["shortness_spearman"][name]) for name in ("embedding", "language_model"))
        for task, row in found["tasks"].items()
    ]
    return "\n".join(
        [
            f"Seed {found['seed']}; {found['machine']['processor']}, {found['machine']['cores']} cores. Spearman's "
            "correlation over candidates, with 95 % bootstrap intervals over prompts.\n",
            table(head, rows),
        ]
    )


def selection_smollm2(found: dict[str, Any]) -> str:
    """Table of predicted against measured gain on SmolLM2.

    Args:
        found: its document.

    Returns:
        Markdown.
    """
    rows = [
        (name, row["lds"], row["lds_interval"], row["lds_heldout"], row["leave_group_out"], row["sign_accuracy"])
        + (row["sign_base_rate"], row.get("seconds"))
        for name, row in found["by"].items()
    ]
    head = ("by", "LDS", "95 %", "LDS, held-out J", "groups left out", "sign accuracy", "base rate", "seconds")
    return "\n".join(
        [
            f"Task {found['task']}, seed {found['seed']}: {found['candidates']} candidates, {found['pairs']} PA pairs, "
            f"{found['heldout']} held-out pairs, {found['steps']} steps of NPO; {found['draws']} random omega, "
            f"{found['groups']} groups left out. {found['machine']['processor']}, {found['machine']['cores']} cores.\n",
            table(head, rows),
        ]
    )


def pa_gain(found: dict[str, Any]) -> str:
    """Table of held-out J against the number of preference pairs on SmolLM2.

    Args:
        found: its document.

    Returns:
        Markdown.
    """
    rows: list[tuple[object, ...]] = []
    for seed, row in found["seeds"].items():
        random = statistics.fmean(row["random_heldout"])
        rows += [
            (
                seed,
                each["pairs"],
                each["draws"],
                each["reliability"],
                each["selected"],
                statistics.fmean(each["heldout"]),
            )
            + (min(each["heldout"]), max(each["heldout"]), each["minus_random"])
            for each in row["by_pairs"]
        ]
        rows += [
            (seed, "random draws", len(row["random_heldout"]), None, None, random)
            + (min(row["random_heldout"]), max(row["random_heldout"]), 0.0),
            (seed, "all candidates", 1, None, found["candidates"], row["all_heldout"], None, None)
            + (row["all_heldout"] - random,),
            (seed, "start", 1, None, 0, row["start_heldout"], None, None, row["start_heldout"] - random),
        ]
    head = ("seed", "PA pairs", "draws", "split-half", "selected", "held-out J", "lowest", "highest", "minus random")
    return "\n".join(
        [
            f"Task {found['task']}: {found['candidates']} candidates, {found['heldout']} held-out pairs, "
            f"{found['steps']} steps of NPO for every choice. "
            f"{found['machine']['processor']}, {found['machine']['cores']} cores.\n",
            table(head, rows),
        ]
    )
