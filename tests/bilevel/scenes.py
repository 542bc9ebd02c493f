"""One small selection problem, with objectives and a held-out J that a test can plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tiny import examples, pairs, tiny_policy
from u2a.bilevel.monitor import Monitor
from u2a.bilevel.objective import CustomObjective, Objective
from u2a.bilevel.outer_problem import OuterProblem
from u2a.bilevel.solve import solve
from u2a.config import SolveSection, UnlearnSection
from u2a.progress import Console
from u2a.record import derive_seed
from u2a.solution import Round, Solution
from u2a.types import Pair
from u2a.unlearn import InnerProblem, InnerSolver

QUIET = Console(quiet=True)
ROWS = examples(8)
INNER = InnerProblem(
    ROWS, section=UnlearnSection(loss="ga", retain_term="none", max_steps=2, learning_rate=1e-2, batch_size=4), seed=1
)
FAST = {
    "adjoint": "identity",
    "warmup_steps": 1,
    "fallback": "none",
    "scorer": "jvp",
    "folds": 3,
    "final_refine": False,
    "refine_adjoint": "screening",
}


def outer(objective: Objective | None = None, n_pairs: int = 8, **options: object) -> OuterProblem:
    return OuterProblem(pairs(n_pairs), SolveSection(**{**FAST, **options}), objective, seed=2)


def run(
    problem: OuterProblem, inner: InnerProblem = INNER, on_round: Callable[[Round], None] | None = None
) -> Solution:
    return solve(InnerSolver(tiny_policy()), inner, problem, QUIET, on_round)


def noise(seed: int) -> CustomObjective:
    """Each pair asks for a random direction of its own: folds have nothing in common."""

    def value(model: nn.Module, rows: list[Pair]) -> Tensor:
        out = []
        for row in rows:
            generator = torch.Generator().manual_seed(derive_seed(seed, row.id))
            parts = [p for p in model.parameters() if p.requires_grad]
            out.append(sum((p * torch.randn(p.shape, generator=generator)).sum() for p in parts))
        return torch.stack(out)

    return CustomObjective(value)


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float], start: float = -1.0) -> None:
    """Let the held-out J take these values, one at the start and one per round."""
    left: Iterator[float] = iter(values)
    monkeypatch.setattr(Monitor, "heldout", lambda self: start)
    monkeypatch.setattr(Monitor, "measure", lambda self: (0.0, next(left)))
