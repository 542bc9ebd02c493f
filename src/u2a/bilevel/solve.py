"""Stage 3, the entry: which negatives to unlearn, and how strongly.

Warm-up from theta_0, then rounds: score all candidates at theta*(omega), add a block of the best, move the weights
by mirror descent, solve the inner problem again, and stop when J on held-out pairs no longer rises. At the end the
weights are re-optimised once more on the selected set alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from u2a.bilevel.gains import Folds, Gains, OuterProblem, Reached, compute_gains, split_preference
from u2a.bilevel.hypergrad import make_refining_adjoint
from u2a.bilevel.objective import Objective, objective_values
from u2a.bilevel.select import decide, top_block
from u2a.bilevel.weight import drop_small, frank_wolfe_gap, refine, with_block
from u2a.config import SolveSection
from u2a.errors import ConfigError, NonFiniteError
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.record import derive_seed
from u2a.solution import Round, ScoreTable, Solution, WeightRow
from u2a.stream import permutation
from u2a.types import UnlearnResult
from u2a.unlearn import InnerProblem, InnerSolver, unlearn

__all__ = ["OuterProblem", "n_to_select", "random_weights", "score", "solve"]


def n_to_select(inner: InnerProblem, outer: OuterProblem) -> int:
    """Return the most candidates the options allow to select.

    Args:
        inner: the candidates.
        outer: ``n_selected``, or ``selected_frac`` of the candidates.

    Returns:
        Between 1 and the number of candidates.

    Raises:
        ConfigError: ``n_selected`` is larger than the number of candidates, or there is no candidate.
    """
    n = len(inner.forget)
    if n == 0:
        raise ConfigError("no candidate to score (the forget set is empty)")
    wanted = outer.section.n_selected
    if wanted is not None and wanted > n:
        raise ConfigError(f"solve.n_selected: {wanted} is more than the {n} candidates (lower it to at most {n})")
    return wanted if wanted is not None else max(1, round(outer.section.selected_frac * n))


def random_weights(inner: InnerProblem, k: int, seed: int) -> dict[str, float]:
    """Draw k candidates at random with equal weights (the control of every selection).

    Args:
        inner: the candidates.
        k: how many, at most all.
        seed: of the draw; it depends on the candidates' ids, not on their order.

    Returns:
        Weights by id, summing to 1; empty for k = 0.
    """
    ids = sorted(row.id for row in inner.forget)
    return {ids[index]: 1.0 / k for index in permutation(seed, 0, len(ids))[:k]}


def score(policy: Policy, inner: InnerProblem, outer: OuterProblem, console: Console) -> ScoreTable:
    """Only score: predict for every candidate how much unlearning it would raise J.

    Args:
        policy: the policy; it is left after the warm-up.
        inner: candidates and inner options.
        outer: PA pairs and outer options.
        console: progress.

    Returns:
        Gains with their uncertainty. All PA pairs are used, none is held out.
    """
    outer = replace(outer, section=outer.section.model_copy(update={"heldout_frac": 0.0}))
    _warm_up(policy, inner, outer, console)
    return compute_gains(policy, inner, outer, split_preference(outer), Reached(inner.uniform()), console).table


@dataclass
class _State:
    """What changes from round to round. ``weights`` is (candidates,) float64, all 0 before the first block."""

    weights: Tensor
    best_weights: Tensor
    best_value: float = -math.inf
    stale: int = 0
    rounds: list[Round] = field(default_factory=list)
    last: Gains | None = None
    result: UnlearnResult | None = None
    stopped: str = "rounds used up"


def solve(
    inner_solver: InnerSolver,
    inner: InnerProblem,
    outer: OuterProblem,
    console: Console,
    on_round: Callable[[Round], None] | None = None,
) -> Solution:
    """Find the weights omega that minimise g(omega) = -J(theta*(omega)) + beta sum omega^p on the simplex.

    Args:
        inner_solver: solves the inner problems of its policy, which is left at some theta (reset it, or unlearn
            with the solution's weights).
        inner: candidates, retain rows and inner options.
        outer: PA pairs and outer options.
        console: progress.
        on_round: told each round as it ends.

    Returns:
        Weights, rounds, scores, why it stopped and whether it fell back.

    Raises:
        ConfigError: more to select than candidates.
        NonFiniteError: a number is not finite.

    Source: arXiv 2504.06659, algorithm 1 (greedy selection, eq. 8, and multiplicative weights, eq. 10).
    Departs: block-greedy; gains carry standard errors and may be refused; held-out stop; guard in every inner run.
    """
    policy = inner_solver.policy
    most = n_to_select(inner, outer)
    folds = split_preference(outer)
    monitor = _Monitor(policy, outer.objective_value(), folds)
    _warm_up(policy, inner, outer, console)
    zero = torch.zeros(len(inner.forget), dtype=torch.float64)
    state = _State(zero, zero)
    steps = outer.section.inner_steps or inner.section.max_steps
    inner = replace(inner, section=inner.section.model_copy(update={"max_steps": steps}))
    search = _Search(inner_solver, inner, outer, folds, monitor, console, on_round)
    for index in range(outer.section.rounds):
        start = time.monotonic()
        reached = Reached(_mapping(inner, state.weights) or inner.uniform(), state.result)
        gains = compute_gains(policy, inner, outer, folds, reached, console)
        if index == 0:
            choice = decide(gains.statistics, gains.estimates, outer.section.fallback)
            if choice != "none":
                return _fallback(inner, outer, gains, choice, most)
        gap = frank_wolfe_gap(state.weights, -gains.estimates) if bool(state.weights.any()) else None
        certified = _certified(gains, gap, outer)
        if certified:
            state.stopped = certified
            break
        state.last = gains
        added, dropped = _update(state, inner, outer, most)
        if not bool(state.weights.any()):
            state.stopped = "no candidate promises a gain"
            break
        search.try_weights(state, _Step(start, gains, gap, added, dropped))
        if _stop(state, outer, bool(added)):
            break
    _refine_on_selected(search, state)
    return _solution(inner, state, "none" if bool(state.best_weights.any()) else "empty")


@dataclass(frozen=True)
class _Step:
    """What led to trial weights: start time, the gains, the gap before the change, and ids added and dropped."""

    start: float
    gains: Gains
    gap: float | None
    added: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class _Search:
    """What stays the same from round to round."""

    solver: InnerSolver
    inner: InnerProblem
    outer: OuterProblem
    folds: Folds
    monitor: _Monitor
    console: Console
    on_round: Callable[[Round], None] | None

    def inner_run(self, weights: Tensor, label: str) -> UnlearnResult:
        """Bring the policy to theta*(omega)."""
        with self.console.phase(f"inner run, {label}", self.inner.section.max_steps, "steps") as advance:
            return self.solver(self.inner, _mapping(self.inner, weights), label, advance=advance)

    def try_weights(self, state: _State, step: _Step) -> None:
        """Solve the inner problem at the trial weights, judge them by J there, and record the round."""
        state.result = result = self.inner_run(
            state.weights, f"round {len(state.rounds) + 1}" if step.added else "final weights"
        )
        value_pa, value_heldout = self.monitor.measure()
        record = Round(
            index=len(state.rounds),
            objective_pa=value_pa,
            objective_heldout=value_heldout,
            retain_ppl=result.retain_ppl_end,
            fw_gap=step.gap,
            n_selected=int((state.weights > 0).sum()),
            added=step.added,
            dropped=step.dropped,
            accepted=_judge(state, value_pa if value_heldout is None else value_heldout),
            split_half=step.gains.table.reliability.split_half,
            reward=self.outer.probe(self.solver.policy) if self.outer.probe else None,
            seconds=time.monotonic() - step.start,
        )
        state.rounds.append(record)
        if self.on_round:
            self.on_round(record)


def _certified(gains: Gains, gap: float | None, outer: OuterProblem) -> str:
    """Why the Frank-Wolfe gap says that the search is over, or an empty text."""
    if gap is None:
        return ""
    if len(gains.estimates) > 1 and bool((gains.estimates == gains.estimates[0]).all()):
        return "all candidates look alike (Frank-Wolfe gap 0)"
    return "Frank-Wolfe gap below tolerance" if gap <= outer.section.gap_tol * _unit(gains) else ""


def _refine_on_selected(search: _Search, state: _State) -> None:
    """Re-optimise omega on the selected set S at its own inner solution; kept only if J, measured again, rises."""
    section, best = search.outer.section, state.best_weights
    chosen = [k for k in range(len(best)) if float(best[k]) > 0]
    if not section.final_refine or section.mirror_steps == 0 or len(chosen) < 2:
        return
    start = time.monotonic()
    result = search.inner_run(best, "best round")
    if result.steps_kept == 0:
        return
    inner = replace(search.inner, forget=tuple(search.inner.forget[k] for k in chosen))
    folds, reached = search.folds, Reached(_mapping(inner, best[chosen]), result)
    if section.refine_adjoint == "unrolled" and folds.heldout:  # J on other pairs decides, so one sweep for all will do
        folds = folds.merged()
    adjoint, policy = make_refining_adjoint(section), search.solver.policy
    try:
        gains = compute_gains(policy, inner, search.outer, folds, reached, search.console, adjoint)
    except (ConfigError, NonFiniteError) as error:  # a run that cannot be differentiated: the search stands as it is
        state.stopped += f"; the weights were not refined ({error})"
        return
    refined = _refined(best[chosen], gains, section)
    if torch.allclose(refined, best[chosen], rtol=0.0, atol=1e-12):
        return
    state.weights = torch.zeros_like(best)
    state.weights[chosen] = refined
    dropped = tuple(row.id for row, weight in zip(inner.forget, refined, strict=True) if float(weight) == 0.0)
    search.try_weights(state, _Step(start, gains, frank_wolfe_gap(best[chosen], -gains.estimates), (), dropped))


class _Monitor:
    """J on the PA folds and on the held-out pairs."""

    def __init__(self, policy: Policy, objective: Objective, folds: Folds) -> None:
        self._policy, self._objective = policy, objective
        self._pairs = [pair for fold in folds.folds for pair in fold]
        self._heldout = list(folds.heldout)

    def measure(self) -> tuple[float, float | None]:
        """(J on the PA pairs, J on the held-out pairs or None) at the policy's current theta.

        An objective that draws answers draws them anew at each call, since its value holds where they were drawn.

        Returns:
            The two means.
        """
        sets = [self._objective.prepare(self._policy, pairs) for pairs in (self._pairs, self._heldout)]
        values = [objective_values(self._objective, self._policy, items) for items in sets]
        return float(values[0].mean()), float(values[1].mean()) if len(values[1]) else None


def _warm_up(policy: Policy, inner: InnerProblem, outer: OuterProblem, console: Console) -> None:
    """A few uniform steps, since at LoRA's start (B = 0) the gradient with respect to A vanishes."""
    steps = outer.section.warmup_steps
    if steps == 0:
        policy.reset()
        return
    with console.phase("warm-up", steps, "steps") as advance:
        unlearn(policy, inner.shortened(steps), inner.uniform(), arm="warm-up", advance=advance)


def _unit(gains: Gains) -> float:
    """The unit of rates and tolerances: the sd of the estimates (1 when they are all equal)."""
    spread = float(gains.estimates.std(correction=0))
    return spread if spread > 0 else 1.0


def _update(
    state: _State, inner: InnerProblem, outer: OuterProblem, most: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Try a block: add it, refine the weights, drop small ones; returns ids. What J does then decides on it."""
    gains, section = state.last, outer.section
    assert gains is not None
    ids = [row.id for row in inner.forget]
    taken = (state.weights > 0).tolist()
    size = min(math.ceil(most / section.rounds), most - sum(taken))
    block = top_block(gains.estimates, ids, taken, size)
    trial = with_block(state.weights, block)
    if not bool(trial.any()):
        return (), ()
    refined = _refined(trial, gains, section)
    dropped = tuple(ids[k] for k in range(len(ids)) if bool(trial[k] > 0) and not bool(refined[k] > 0))
    state.weights = refined
    return tuple(ids[k] for k in block), dropped


def _refined(weights: Tensor, gains: Gains, section: SolveSection) -> Tensor:
    """Move weights by mirror descent and drop small ones; rates and the penalty are in units of the gains' sd."""
    unit = _unit(gains)
    rate, beta = section.mirror_rate / unit, section.sparsity * unit
    moved = refine(weights, -gains.estimates, rate, section.mirror_steps, beta, section.sparsity_p)
    return drop_small(moved, section.drop_below)


def _judge(state: _State, value: float) -> bool:
    """Accept the trial weights when J, measured at their inner solution, is the best so far; remember them then.

    The finite step is measured instead of predicted: linear gains alone would always prefer the one best candidate,
    since the weights share a sum of 1. The sparsity penalty acts in the mirror steps, not here.

    Returns:
        True when they are accepted.
    """
    if value > state.best_value:
        state.best_value, state.best_weights, state.stale = value, state.weights, 0
        return True
    state.stale += 1
    return False


def _stop(state: _State, outer: OuterProblem, added: bool) -> bool:
    """True when J has been stale for too long (the best round is returned) or no candidate was left to add."""
    if state.stale >= outer.section.patience:
        state.stopped = "held-out J no longer rises (rolled back to the best round)"
        return True
    if not added:
        state.stopped = "no acceptable candidate"
        return True
    return False


def _mapping(inner: InnerProblem, weights: Tensor) -> dict[str, float]:
    return {row.id: float(w) for row, w in zip(inner.forget, weights, strict=True) if float(w) > 0}


def _solution(inner: InnerProblem, state: _State, fallback: str) -> Solution:
    assert state.last is not None
    estimates = state.last.estimates
    rows = []
    for k, row in enumerate(inner.forget):
        weight = float(state.best_weights[k])
        reason = (
            "selected"
            if weight > 0
            else "no gain promised"
            if float(estimates[k]) <= 0
            else "ranked below the selected"
        )
        rows.append(WeightRow(id=row.id, weight=weight, estimate=float(estimates[k]), reason=reason))
    return Solution(
        rows=tuple(rows),
        rounds=tuple(state.rounds),
        scores=state.last.table,
        stopped=state.stopped,
        fallback=fallback,  # type: ignore[arg-type]
    )


def _fallback(inner: InnerProblem, outer: OuterProblem, gains: Gains, choice: str, most: int) -> Solution:
    """Uniform weights on a random draw, or nothing at all."""
    weights: Mapping[str, float] = {}
    stopped = "no candidate promises a gain: nothing is unlearned"
    if choice == "random_k":
        weights = random_weights(inner, most, derive_seed(outer.seed, "fallback"))
        stopped = "no signal among the gains: a random draw with equal weights"
    rows = tuple(
        WeightRow(
            id=row.id,
            weight=weights.get(row.id, 0.0),
            estimate=float(gains.estimates[k]),
            reason="random draw (no signal)" if row.id in weights else stopped.split(":")[0],
        )
        for k, row in enumerate(inner.forget)
    )
    return Solution(rows=rows, scores=gains.table, stopped=stopped, fallback=choice)  # type: ignore[arg-type]
