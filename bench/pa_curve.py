"""Reliability against PA size, from one scoring: `python bench/pa_curve.py RUN_DIR [--out FILE]`.

A run scored with many folds (`--set solve.folds=16`) holds the gain of every candidate under each of them. Drawing
some folds, and splitting them in two halves, gives the split-half reliability at the size of that many pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from machine import machine

from u2a.bilevel.select import fold_statistics, spearman
from u2a.record import write_whole
from u2a.run_records import RunRecords
from u2a.solution import ScoreTable

DRAWS = 200


def curve(table: ScoreTable, seed: int = 0) -> list[dict[str, object]]:
    """Reliability at 2, 4, 8, ... folds.

    Args:
        table: scores with many folds.
        seed: of the draws of folds.

    Returns:
        One row per number of folds: pairs, mean split-half Spearman with its standard deviation over draws,
        and the share of draws in which the test for signal speaks.
    """
    gains = torch.tensor([row.fold_gains for row in table.rows], dtype=torch.float64)
    folds, generator = gains.shape[1], torch.Generator().manual_seed(seed)
    size = table.reliability.n_pairs / folds
    rows: list[dict[str, object]] = []
    count = 2
    while count <= folds:
        values, signals = [], []
        for _ in range(DRAWS):
            chosen = torch.randperm(folds, generator=generator)[:count]
            halves = gains[:, chosen[: count // 2]].mean(1), gains[:, chosen[count // 2 :]].mean(1)
            values.append(spearman(*halves) or 0.0)
            signals.append(fold_statistics(gains[:, chosen], [1] * count).has_signal)
        mean = statistics.fmean(values)
        rows.append(
            {
                "pairs": round(count * size),
                "pairs_per_half": round(count * size / 2),
                "split_half": mean,
                "sd_over_draws": statistics.stdev(values),
                "predicted_for_all": 2 * mean / (1 + mean) if mean > 0 else None,
                "signal_found": statistics.fmean(signals),
            }
        )
        count *= 2
    return rows


def main() -> None:
    """Print the curve of one run as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that has scored its candidates")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    table = RunRecords.load(args.run).last_scores
    if table is None:
        sys.exit(f"{args.run}: not scored yet (run u2a score or u2a run first)")
    found = {
        "objective": table.objective,
        "loss": table.loss,
        "adjoint": table.adjoint,
        "scorer": table.scorer,
        "candidates": len(table.rows),
        "reliability": table.reliability.model_dump(),
        "curve": curve(table),
        "machine": machine("cpu"),
    }
    text = json.dumps(found, indent=1)
    if args.out:
        write_whole(args.out, text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
