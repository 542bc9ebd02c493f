"""What do more preference pairs bring on SmolLM2? `python bench/pa_gain.py PROTOCOL [--seeds A,B] [--out FILE]`.

Settings of the experiment, their candidates chosen by the gains on 2, 4, 8 ... of the PA pairs, drawn several times:
how far do two such rankings agree, and where does J on held-out pairs end after a whole unlearning run at equal steps,
beside random draws of the same size and the full set? Runs are kept and found again. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lab import QUIET, SCREENING, Lab
from machine import machine
from selection_smollm2 import RUNS, KeptLab, kept_lab
from torch import Tensor

from u2a.bilevel.adjoint import InnerPoint
from u2a.bilevel.gains import candidate_losses
from u2a.bilevel.hypergrad import Identity
from u2a.bilevel.objective import objective_gradient
from u2a.bilevel.select import spearman
from u2a.progress import Console
from u2a.record import derive_seed, write_whole

AT_MOST = 0.66  # share of the candidates that is chosen at most, as in the comparison
DRAWS = 4


def gains_by_pair(lab: Lab) -> Tensor:
    """Gain of every candidate at theta_0 on every PA pair alone.

    Args:
        lab: the world.

    Returns:
        (n, pairs); their mean over some pairs is the gain on those.
    """
    policy, inner = lab.world.policy, lab.inner
    losses = candidate_losses(policy, inner)
    policy.reset()
    items = lab.objective.prepare(policy, lab.preference)
    directions = [objective_gradient(lab.objective, policy, [item]).gradient for item in items]
    section = SCREENING.model_copy(update={"scorer": "backward"})
    point = InnerPoint(policy, inner, inner.uniform(), losses, section, lab.world.seed)
    return -Identity().derivatives(point, directions, QUIET).values


def chosen(gains: Tensor) -> Tensor:
    """Equal weights on what promises a gain, at most :data:`AT_MOST` of the candidates.

    Args:
        gains: (n,) gains.

    Returns:
        (n,) weights; the single best candidate where none promises a gain.
    """
    most = max(1, round(AT_MOST * len(gains)))
    best = torch.topk(gains, most).indices
    kept = [k for k in best.tolist() if gains[k] > 0] or best[:1].tolist()
    return equal(len(gains), kept)


def equal(n: int, members: Sequence[int]) -> Tensor:
    """(n,) equal weights on some members that sum to 1."""
    omega = torch.zeros(n, dtype=torch.float64)
    omega[list(members)] = 1.0 / len(members)
    return omega


def subsets(pairs: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Draws of so many pairs; a single one where all are taken."""
    count = 1 if size == pairs else DRAWS
    return [torch.randperm(pairs, generator=generator)[:size] for _ in range(count)]


def reliability(gains: Tensor, size: int, generator: torch.Generator, draws: int = 200) -> float | None:
    """Mean Spearman correlation of the gains on two disjoint sets of pairs, or None where there are too few."""
    if 2 * size > gains.shape[1]:
        return None
    values = []
    for _ in range(draws):
        order = torch.randperm(gains.shape[1], generator=generator)
        one, other = (gains[:, part].mean(1) for part in (order[:size], order[size : 2 * size]))
        values.append(spearman(one, other) or 0.0)
    return statistics.fmean(values)


def measured(lab: KeptLab) -> dict[str, Any]:
    """Choose by more and more pairs, and run every choice.

    Args:
        lab: the world; its runs are kept.

    Returns:
        J on held-out pairs by number of pairs, at the start, and of the controls.
    """
    gains, n = gains_by_pair(lab), len(lab.ids)
    generator = torch.Generator().manual_seed(derive_seed(lab.world.seed, "subsets of pairs"))
    sizes = [2**k for k in range(1, 20) if 2**k <= gains.shape[1]]
    drawn = {size: subsets(gains.shape[1], size, generator) for size in sizes}
    most = max(1, round(AT_MOST * n))
    omegas = {f"{size} pairs": [chosen(gains[:, part].mean(1)) for part in drawn[size]] for size in sizes}
    omegas["random"] = [equal(n, torch.randperm(n, generator=generator)[:most].tolist()) for _ in range(DRAWS)]
    omegas["all"] = [lab.uniform()]
    policy = lab.world.policy
    policy.reset()
    start = lab.values()
    with Console().phase("runs", sum(map(len, omegas.values())), "runs", saves=True) as advance:
        kept = replace(lab, advance=advance)
        found = {name: kept.measured(each) for name, each in omegas.items()}
    control = float(found["random"][:, 1].mean())
    return {
        "start_heldout": start[1],
        "by_pairs": [
            {
                "pairs": size,
                "draws": len(drawn[size]),
                "reliability": reliability(gains, size, generator),
                "selected": statistics.fmean(int((omega > 0).sum()) for omega in omegas[f"{size} pairs"]),
                "heldout": found[f"{size} pairs"][:, 1].tolist(),
                "minus_random": float(found[f"{size} pairs"][:, 1].mean()) - control,
            }
            for size in sizes
        ],
        "random_heldout": found["random"][:, 1].tolist(),
        "all_heldout": float(found["all"][0, 1]),
    }


def main() -> None:
    """Run the bench on one seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--task", default="halueval")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--runs", type=Path, default=RUNS, help="keep J of every run here, and go on from there")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    seeds: dict[str, Any] = {}
    for seed in args.seeds:
        lab = kept_lab(args.protocol, args.task, seed, args.runs)
        seeds[str(seed)] = measured(lab)
        print(json.dumps({str(seed): seeds[str(seed)]}), flush=True)
    sizes = {"candidates": len(lab.ids), "heldout": len(lab.world.heldout), "steps": lab.section.max_steps}
    text = json.dumps({"task": args.task, **sizes, "seeds": seeds, "machine": machine("cpu")})
    if args.out:
        write_whole(args.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
