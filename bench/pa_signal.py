"""Signal of every task's PA pairs: `python bench/pa_signal.py PROTOCOL... [--tasks A,B] [--seed N] [--out FILE]`.

Before anything is compared: does the ranking of the candidates survive a change of preference pairs, and is it more
than a ranking by length? Settings are those of the experiment, and are found again by it. The last line printed is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine
from pa_curve import curve
from prepared import prepared_settings

from u2a.bilevel.select import spearman
from u2a.bilevel.solve import score
from u2a.experiment.by_reward import rewards_of
from u2a.experiment.setting import Setting, open_setting
from u2a.experiment.unlearning_arms import inner_problem, losses_of, outer_problem
from u2a.progress import Console
from u2a.record import write_whole
from u2a.types import Pair


def main() -> None:
    """Score the candidates of every task once, and print what the gains agree with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", type=Path, nargs="+", metavar="PROTOCOL")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for task, place in prepared_settings(args.protocols, args.tasks, args.seed):
        found[task] = signal(open_setting(place, place.config, Console()))
        print(json.dumps({task: found[task]}), flush=True)
    text = json.dumps({"seed": args.seed, "tasks": found, "machine": machine("cpu")})
    if args.out:
        write_whole(args.out, text + "\n")
    print(text)


def signal(setting: Setting) -> dict[str, Any]:
    """Score all candidates of one task.

    Args:
        setting: data, options and the policy at the start.

    Returns:
        Reliability, its curve over the number of pairs, Spearman correlations of the gain with length, loss and
        reward of the candidate, and how often the good side of a pair is the shorter one.
    """
    inner = inner_problem(setting, setting.config.unlearn)
    losses, rewards = losses_of(setting, inner.forget), rewards_of(setting, inner.forget)
    begin = time.monotonic()
    table = score(setting.policy, inner, outer_problem(setting, inner), setting.console)
    seconds = time.monotonic() - begin
    columns = {
        "characters": [float(len(row.completion)) for row in inner.forget],
        "nll": [losses[row.id] for row in inner.forget],
        "reward": [rewards[row.id] for row in inner.forget],
    }
    gains = torch.tensor([row.gain for row in table.rows], dtype=torch.float64)
    pairs = setting.partition.preference
    return {
        "candidates": len(inner.forget),
        "pairs": len(pairs),
        "objective": table.objective,
        "objective_value": table.objective_value,
        "reliability": table.reliability.model_dump(),
        "curve": curve(table),
        "gain_against": {
            name: spearman(gains, torch.tensor(values, dtype=torch.float64)) for name, values in columns.items()
        },
        "chosen_shorter": statistics.fmean(map(_shorter, pairs)),
        "seconds": round(seconds, 1),
    }


def _shorter(pair: Pair) -> float:
    return 0.5 * ((len(pair.chosen) < len(pair.rejected)) + (len(pair.chosen) <= len(pair.rejected)))


if __name__ == "__main__":
    main()
