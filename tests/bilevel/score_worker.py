"""Scores a tiny policy's candidates and saves the result; test_score_processes.py starts it as one of two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small import candidate_losses, direction, small_policy

from tiny import examples
from u2a.bilevel.score import score_all
from u2a.config import SolveSection
from u2a.errors import NonFiniteError
from u2a.losses import make_loss
from u2a.progress import Console

SCORERS = ("backward", "central", "one_sided", "jvp")


def score(folder: Path, broken: str | None = None) -> dict[str, torch.Tensor]:
    """Scores of nine candidates by every scorer; the name of a broken candidate goes into a file."""
    policy = small_policy(token_budget=120)
    losses = candidate_losses(policy, make_loss("npo", 0.1), examples(9))
    assert len(losses.batches()) > 3
    directions = [direction(policy, 1, 3.0), direction(policy, 2, 0.1)]
    out = {}
    for name in SCORERS:
        found = score_all(SolveSection(scorer=name), losses, directions, Console(quiet=True))  # type: ignore[arg-type]
        out[name], out[f"{name} losses"] = found.slopes.derivatives, found.slopes.losses
        assert found.scorer == name, "every scorer keeps its name, also where its agreement is measured"
    if broken is not None:
        losses.reference_sums[losses.ids.index(broken)] = torch.nan
        try:
            losses.values()
        except NonFiniteError as error:
            (folder / f"broken{dist.get_rank()}.json").write_text(json.dumps(error.ids), encoding="utf-8")
    return out


def main(rank: int, folder: Path) -> None:
    """Score as process ``rank`` of two."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    save_file(score(folder, examples(9)[4].id), folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
