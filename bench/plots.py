"""The bench's figures as SVG files that stand alone (drawn by the report's own charts)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from u2a.figure_file import save_figure
from u2a.figures import Frame, Series, bar_chart, xy_chart


def draw_all(found: Mapping[str, Any], folder: Path) -> None:
    """Draw every figure of the selection bench.

    Args:
        found: the bench's document.
        folder: where the SVG files go.
    """
    save_figure(_lds(found["lds"]), folder / "selection-lds.svg")
    save_figure(_reliability(found["study"]), folder / "selection-reliability.svg")
    for kind, part in found["study"].items():
        save_figure(_delta_j(kind, part["by_pa_size"]), folder / f"selection-delta-j-{kind}.svg")
    questions = found["questions"]
    save_figure(_single(questions["single_samples"]), folder / "selection-single-samples.svg")
    save_figure(_low_reward(questions["low_reward_groups"]), folder / "selection-low-reward.svg")
    save_figure(_top_k(questions["top_k"]), folder / "selection-top-k.svg")
    save_figure(_sparsity(questions["sparsity"]), folder / "selection-sparsity.svg")


def _lds(lds: Mapping[str, Mapping[str, Any]]) -> str:
    rows = sorted(((name, float(value["mean"])) for name, value in lds.items()), key=lambda row: -row[1])
    return bar_chart("Linear datamodelling score: predicted against measured J", rows, "Spearman correlation")


def _reliability(study: Mapping[str, Any]) -> str:
    series = []
    for colour, (kind, part) in enumerate(study.items(), 1):
        sizes = part["by_pa_size"]
        series.append(
            Series(f"{kind}", [float(size) for size in sizes], [row["split_half"] for row in sizes.values()], colour)
        )
    frame = Frame("Split-half reliability of gains", "PA pairs", "Spearman of two halves")
    return xy_chart(frame, series)


def _delta_j(kind: str, sizes: Mapping[str, Any]) -> str:
    series = []
    x = [float(size) for size in sizes]
    for colour, (control, label) in enumerate(
        {"random": "default - random-k", "full": "default - full set"}.items(), 1
    ):
        means = [row["against"][control]["mean"] for row in sizes.values()]
        errors = [
            (row["against"][control]["interval"][1] - row["against"][control]["interval"][0]) / 2
            for row in sizes.values()
        ]
        series.append(Series(label, x, means, colour, errors))
    oracle = [row["oracle_against_random"]["mean"] for row in sizes.values()]
    series.append(Series("oracle - random-k", x, oracle, 0))
    return xy_chart(Frame(f"Held-out J, {kind}: difference to the controls", "PA pairs", "nats per token"), series)


def _single(rows: Sequence[Mapping[str, Any]]) -> str:
    series = []
    for colour, row in enumerate(rows):
        base = row["pa_j"][list(row["factors"]).index(1.0)]
        changes = [value - base for value in row["pa_j"]]
        series.append(Series(f"gain {row['gain']:+.3f}", list(row["factors"]), changes, colour % 6))
    frame = Frame("J against the weight of one sample", "weight, in units of 1 / n", "change of J, nats per token")
    return xy_chart(frame, series)


def _low_reward(found: Mapping[str, Any]) -> str:
    x = list(found["low_token_frac"])
    series = [Series("PA pairs", x, list(found["pa_j"]), 1), Series("held-out pairs", x, list(found["heldout_j"]), 2)]
    frame = Frame("J after unlearning one group", "proportion of low-reward tokens in the group", "J, nats per token")
    return xy_chart(frame, series, whole=False)


def _top_k(rows: Sequence[Mapping[str, Any]]) -> str:
    x = [float(row["k"]) for row in rows]
    names = [name for name in rows[0] if name not in ("k", "random", "random_sd")]
    series = [Series(name, x, [row[name][1] for row in rows], colour) for colour, name in enumerate(names, 1)]
    random = Series("random K", x, [row["random"][1] for row in rows], 0, [row["random_sd"][1] for row in rows])
    frame = Frame("Held-out J of the top K by gain and of random K", "K", "J, nats per token")
    return xy_chart(frame, [*series, random])


def _sparsity(rows: Sequence[Mapping[str, Any]]) -> str:
    series = []
    for colour, p in enumerate((0.5, 1.0), 1):
        chosen = sorted((row for row in rows if row["p"] == p), key=lambda row: row["support"])
        series.append(
            Series(f"p = {p:g}", [float(row["support"]) for row in chosen], [row["pa_j"] for row in chosen], colour)
        )
    return xy_chart(
        Frame("J against the support of omega", "candidates of positive weight", "J, nats per token"), series
    )
