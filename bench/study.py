"""Is choosing worth it? The product's defaults against random-k and the full set, over seeds and sizes of the PA set.

Every cell (kind of world, seed, PA size) is one call of the product: `u2a.bilevel.solve.solve`, then `unlearn` with
its weights, at equal steps for every arm; J is measured on held-out pairs of other prompts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from corpus import require_data
from lab import QUIET
from scipy import stats
from small_model import Base, ModelOptions, base_model
from small_world import Meter, make_world, uniform

from u2a.bilevel.objective import Margin
from u2a.bilevel.outcome import random_weights
from u2a.bilevel.outer_problem import OuterProblem
from u2a.bilevel.solve import n_to_select, score, solve
from u2a.config import SolveSection, UnlearnSection
from u2a.progress import Console
from u2a.record import content_id, derive_seed, write_whole
from u2a.unlearn import InnerSolver

RANDOM_DRAWS = 3
ALPHA = 0.05


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
        kind: of the world.
        seed: of the world.
        n_pa: PA pairs, or None for all.
        solve: options of stage 3 (changed from the defaults, by name).
        unlearn: options of the inner problem.
    """

    kind: str
    seed: int
    n_pa: int | None
    solve: tuple[tuple[str, object], ...]
    unlearn: tuple[tuple[str, object], ...]

    @property
    def key(self) -> str:
        """Content id of everything the cell depends on but the code: all options, defaults too."""
        options = SolveSection(**dict(self.solve)).model_dump(), UnlearnSection(**dict(self.unlearn)).model_dump()
        document = [self.kind, self.seed, self.n_pa, *options, asdict(ModelOptions()), RANDOM_DRAWS]
        return content_id(json.dumps(document, sort_keys=True))


def run_cell(cell: Cell, base: Base) -> dict[str, object]:
    """Run all arms of one cell.

    Args:
        cell: what to compare.
        base: the trained model.

    Returns:
        Figures by name; changes of held-out J in nats per token.
    """
    start = time.monotonic()
    section, inner_section = SolveSection(**dict(cell.solve)), UnlearnSection(**dict(cell.unlearn))
    world = make_world(base, cell.kind, cell.seed, n_pa=cell.n_pa)
    meter, inner = Meter(world, inner_section), world.inner(inner_section)
    outer = OuterProblem(world.preference, section, Margin(), seed=cell.seed)
    solution = solve(InnerSolver(world.policy), inner, outer, QUIET)
    solve_seconds = time.monotonic() - start
    k = len(solution.weights) or n_to_select(inner, outer)
    chosen = meter.run(solution.weights) if solution.weights else None  # nothing selected: nothing is changed
    draws = [
        meter.run(random_weights(inner, k, derive_seed(cell.seed, f"random control {draw}")))
        for draw in range(RANDOM_DRAWS)
    ]
    full = meter.run(inner.uniform())
    oracle_outer = OuterProblem(
        world.heldout, SolveSection(adjoint="identity", heldout_frac=0.0, folds=4), Margin(), cell.seed
    )
    oracle_rows = sorted(score(world.policy, inner, oracle_outer, QUIET).rows, key=lambda row: (-row.gain, row.id))
    oracle = meter.run(uniform([row.id for row in oracle_rows[:k]]))
    trust = solution.scores.reliability
    return {
        "kind": cell.kind,
        "seed": cell.seed,
        "n_pa": len(world.preference),
        "u2a": 0.0 if chosen is None else chosen.delta_j,
        "u2a_ppl": 1.0 if chosen is None else chosen.ppl_ratio,
        "random": sum(draw.delta_j for draw in draws) / len(draws),
        "random_ppl": sum(draw.ppl_ratio for draw in draws) / len(draws),
        "full": full.delta_j,
        "full_ppl": full.ppl_ratio,
        "oracle": oracle.delta_j,
        "selected": k,
        "fallback": solution.fallback,
        "split_half": trust.split_half,
        "full_set": trust.full_set,
        "gradient_cosine": trust.gradient_cosine,
        "signal_sd": trust.signal_sd,
        "noise_sd": trust.noise_sd,
        "solve_seconds": solve_seconds,
        "seconds": time.monotonic() - start,
    }


def _work(cell: Cell, cache: str) -> dict[str, object]:
    """Run one cell in a process of its own thread, or read it back."""
    torch.set_num_threads(1)
    path = Path(cache) / f"{cell.key}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    found = run_cell(cell, _base())
    write_whole(path, json.dumps(found) + "\n")
    return found


def _base() -> Base:

    return base_model(ModelOptions(), require_data())


def run_cells(cells: Sequence[Cell], cache: Path, processes: int, console: Console) -> list[dict[str, object]]:
    """Run cells on several processes; finished ones are read back from the cache.

    Args:
        cells: what to run.
        cache: folder of results.
        processes: workers.
        console: progress.

    Returns:
        Figures, in the order of the cells.
    """
    cache.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, object]] = {}
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        console.phase("selection study", len(cells), "cells") as advance,
    ):
        waiting = {pool.submit(_work, cell, str(cache)): cell for cell in cells}
        for done in as_completed(waiting):
            found[waiting[done].key] = done.result()
            advance.advance(1)
    return [found[cell.key] for cell in cells]


def one_sided(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences with one-sided p-values (t test).

    Args:
        differences: at least two.

    Returns:
        (mean, p that the mean is not below 0, p that it is not above 0): a small first p says "worse", a small
        second p "better".
    """
    mean = sum(differences) / len(differences)
    if all(value == differences[0] for value in differences):
        certain = 0.0 if mean else 1.0
        return mean, certain if mean < 0 else 1.0, certain if mean > 0 else 1.0
    t = stats.ttest_1samp(list(differences), 0.0)
    below = float(t.pvalue) / 2 if t.statistic < 0 else 1.0 - float(t.pvalue) / 2
    return mean, below, 1.0 - below


def interval(values: Sequence[float]) -> list[float]:
    """95 % t interval of a mean.

    Args:
        values: at least two.

    Returns:
        [low, high].
    """
    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return [mean - half, mean + half]


def summarise(rows: Iterable[Mapping[str, object]]) -> dict[str, object]:
    """Reliability and held-out J against PA size for one kind of world.

    The seeds draw candidates, adapter and order anew; they share the trained model, most held-out pairs, and at the
    largest size all PA pairs. So intervals are over the former, given the latter.

    Args:
        rows: cells of one kind.

    Returns:
        One entry per PA size; split-half is that of a cell's last scoring, the oracle has seen the held-out pairs.
        ``signal_sizes``: sizes where the oracle beats random-k and split-half exceeds 0.3;
        ``better_where_signal``: whether the default beats random-k at each of them (one-sided 5 %), None without any.
    """
    by_size: dict[int, list[Mapping[str, object]]] = {}
    for row in rows:
        by_size.setdefault(int(row["n_pa"]), []).append(row)  # type: ignore[call-overload]
    sizes = {str(n_pa): _at_size(cells) for n_pa, cells in sorted(by_size.items())}
    signal = [
        size
        for size, row in sizes.items()
        if row["oracle_against_random"]["p_better"] < ALPHA and row["split_half"] > 0.3
    ]
    better = all(sizes[size]["against"]["random"]["p_better"] < ALPHA for size in signal)
    return {"by_pa_size": sizes, "signal_sizes": signal, "better_where_signal": better if signal else None}


def _at_size(cells: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """Figures of the cells of one PA size."""

    def column(name: str) -> list[float]:
        return [float(cell[name]) for cell in cells]  # type: ignore[arg-type]

    def against(left: str, right: str) -> dict[str, Any]:
        gaps = [a - b for a, b in zip(column(left), column(right), strict=True)]
        mean, p_worse, p_better = one_sided(gaps)
        return {"mean": mean, "interval": interval(gaps), "p_worse": p_worse, "p_better": p_better}

    halves = [float(cell["split_half"]) for cell in cells if cell["split_half"] is not None]  # type: ignore[arg-type]
    return {
        "seeds": len(cells),
        "split_half": sum(halves) / len(halves) if halves else 0.0,
        "split_half_interval": interval(halves) if len(halves) > 1 else None,
        "delta_j": {name: sum(column(name)) / len(cells) for name in ("u2a", "random", "full", "oracle")},
        "ppl": {name: sum(column(f"{name}_ppl")) / len(cells) for name in ("u2a", "random", "full")},
        "against": {control: against("u2a", control) for control in ("random", "full", "oracle")},
        "oracle_against_random": against("oracle", "random"),
        "fell_back": sum(cell["fallback"] != "none" for cell in cells) / len(cells),
    }


def not_worse(study: Mapping[str, Any], control: str) -> bool:
    """Whether no kind and no PA size is significantly worse than a control: Holm's procedure rejects nothing.

    Args:
        study: summaries by kind.
        control: ``random`` or ``full``.

    Returns:
        True when the smallest one-sided p-value is at least 5 % over the number of tests.
    """
    tests = [row["against"][control]["p_worse"] for part in study.values() for row in part["by_pa_size"].values()]
    return min(tests) >= ALPHA / len(tests)
