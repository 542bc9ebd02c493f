"""Stage 3, the entry: which negatives to unlearn, and how strongly.

Warm-up from theta_0, then rounds: score all candidates at theta*(omega), add a block of the best, move the weights
by mirror descent, solve the inner problem again, and stop when J on held-out pairs no longer rises. At the end the
weights are re-optimised once more on the selected set alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from u2a.bilevel.gains import Gains, Reached, compute_gains, search_id
from u2a.bilevel.hypergrad import make_refining_adjoint
from u2a.bilevel.monitor import Monitor
from u2a.bilevel.outcome import fallback_solution, solution_of
from u2a.bilevel.outer_problem import Folds, OuterProblem, split_preference
from u2a.bilevel.search_state import SearchState, load_state, save_state
from u2a.bilevel.select import alike, decide, top_block
from u2a.bilevel.unrolled import Unrolled
from u2a.bilevel.weight import drop_small, frank_wolfe_gap, refine, with_block
from u2a.checkpoint import delete
from u2a.config import SolveSection
from u2a.errors import ConfigError, NonFiniteError, OutOfMemory
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.signals import stopping
from u2a.solution import Round, ScoreTable, Solution
from u2a.types import UnlearnResult
from u2a.unlearn import InnerProblem, InnerSolver, look_up_references, unlearn

__all__ = ["OuterProblem", "n_to_select", "score", "solve"]


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
    _references(policy, inner, outer, console)
    _warm_up(policy, inner, outer, console)
    return compute_gains(policy, inner, outer, split_preference(outer), Reached(inner.uniform()), console).table


def solve(
    inner_solver: InnerSolver,
    inner: InnerProblem,
    outer: OuterProblem,
    console: Console,
    on_round: Callable[[Round], None] | None = None,
    on_scores: Callable[[ScoreTable], None] | None = None,
) -> Solution:
    """Find the weights omega that minimise g(omega) = -J(theta*(omega)) + beta sum omega^p on the simplex.

    Args:
        inner_solver: solves the inner problems of its policy, which is left at some theta (reset it, or unlearn
            with the solution's weights).
        inner: candidates, retain rows and inner options.
        outer: PA pairs and outer options.
        console: progress.
        on_round: told each round as it ends.
        on_scores: told the first scores before anything is chosen by them.

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
    _references(policy, inner, outer, console)
    monitor = Monitor(policy, outer.objective_value(), folds)
    steps = outer.section.inner_steps or inner.section.max_steps
    shortened = replace(inner, section=inner.section.model_copy(update={"max_steps": steps}))
    search = _Search(inner_solver, shortened, outer, folds, monitor, console, on_round)
    state = _resumed(search)
    if state is None:
        start = _start(search)
        _warm_up(policy, inner, outer, console)
        zero = torch.zeros(len(inner.forget), dtype=torch.float64)
        state = SearchState(zero, zero, start_heldout=start)
    while state.searching:
        fallback = _round(search, state, most, on_scores)
        if fallback is not None:
            return fallback
        save_state(state, policy, outer.checkpoints, search.id)
        _forget_parts(outer)
        stopping.check()
    _refine_on_selected(search, state)
    return solution_of(inner, state, "none" if bool(state.best_weights.any()) else "empty")


def _forget_parts(outer: OuterProblem) -> None:
    """Remove what was kept within a round, which is over."""
    if outer.checkpoints is not None:
        delete(outer.checkpoints / "inner")
        delete(outer.checkpoints / "parts")


def _resumed(search: _Search) -> SearchState | None:
    """Where a search that was stopped stands, with the policy put there, or None."""
    state = load_state(search.solver.policy, search.outer.checkpoints, search.id)
    if state is None:
        return None
    look_up_references(search.solver.policy, search.inner)
    search.console.say(f"  search for weights: goes on after {len(state.rounds)} rounds")
    if state.result is not None:
        search.solver.remember(search.inner, _mapping(search.inner, state.weights), state.result)
    if search.on_round:
        for record in state.rounds:
            search.on_round(record)
    return state


def _round(
    search: _Search, state: SearchState, most: int, on_scores: Callable[[ScoreTable], None] | None
) -> Solution | None:
    """One round; returns the solution of a search that falls back in its first."""
    inner, outer, start = search.inner, search.outer, time.monotonic()
    reached = Reached(_mapping(inner, state.weights) or inner.uniform(), state.result)
    gains = compute_gains(search.solver.policy, inner, outer, search.folds, reached, search.console)
    if not state.rounds:
        if on_scores:
            on_scores(gains.table)
        choice = decide(gains.statistics, gains.estimates, outer.section.fallback, gains.damage)
        if choice != "none":
            return fallback_solution(inner, outer, gains, choice, most)
    gap = frank_wolfe_gap(state.weights, -gains.estimates) if bool(state.weights.any()) else None
    certified = _certified(gains, gap, outer)
    if certified:
        state.ended(certified)
        return None
    state.scores = state.scores or gains.table
    added, dropped = _update(state, gains, inner, outer, most)
    if not bool(state.weights.any()):
        state.ended("no candidate promises a gain")
        return None
    if search.judges:
        if search.try_weights(state, _Step(start, gains, gap, added, dropped)):
            state.scores = gains.table
        _stop(state, outer, bool(added))
    else:
        state.best_weights = state.weights
        state.ended("one round, and nothing to judge it by: its inner run is left out")
    return None


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
    monitor: Monitor
    console: Console
    on_round: Callable[[Round], None] | None

    @property
    def id(self) -> str:
        """Hash of what the search depends on."""
        if self.outer.checkpoints is None:
            return ""  # nothing is kept
        return search_id(self.solver.policy, self.inner, self.outer)

    @property
    def judges(self) -> bool:
        """Whether anything depends on what the trial weights do."""
        return self.outer.section.judges_rounds(bool(self.folds.heldout) or self.outer.probe is not None)

    def inner_run(self, weights: Tensor, label: str) -> UnlearnResult:
        """Bring the policy to theta*(omega)."""
        with self.console.phase(f"inner run, {label}", self.inner.section.max_steps, "steps", saves=True) as advance:
            return self.solver(self.inner, _mapping(self.inner, weights), label, self.outer.inner_checkpoints, advance)

    def try_weights(self, state: SearchState, step: _Step) -> bool:
        """Solve the inner problem at the trial weights, judge them by J there, and record the round; True: accepted."""
        label = f"round {len(state.rounds) + 1}" if step.added else "final weights"
        state.result = result = self.inner_run(state.weights, label)
        with self.console.phase("measure round"):
            value_pa, value_heldout = self.monitor.measure()
            reward = self.outer.probe(self.solver.policy) if self.outer.probe else None
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
            reward=reward,
            seconds=time.monotonic() - step.start,
        )
        state.rounds.append(record)
        if self.on_round:
            self.on_round(record)
        return record.accepted


def _certified(gains: Gains, gap: float | None, outer: OuterProblem) -> str:
    """Why the Frank-Wolfe gap says that the search is over, or an empty text."""
    if gap is None:
        return ""
    if len(gains.estimates) > 1 and alike(gains.estimates):
        return "all candidates look alike (Frank-Wolfe gap 0)"
    return "Frank-Wolfe gap below tolerance" if gap <= outer.section.gap_tol * gains.unit else ""


def _refine_on_selected(search: _Search, state: SearchState) -> None:
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
    adjoint, policy = make_refining_adjoint(section, inner.section), search.solver.policy
    if isinstance(adjoint, Unrolled) and folds.heldout:  # J on other pairs decides, so one sweep for all will do
        folds = folds.merged()
    try:
        gains = compute_gains(policy, inner, search.outer, folds, reached, search.console, adjoint)
    except (ConfigError, NonFiniteError, OutOfMemory) as error:  # the run cannot be differentiated
        state.stopped += f"; the weights were not refined ({error})"
        return
    refined = _refined(best[chosen], gains, section)
    if torch.allclose(refined, best[chosen], rtol=0.0, atol=1e-12):
        return
    state.weights = torch.zeros_like(best)
    state.weights[chosen] = refined
    dropped = tuple(row.id for row, weight in zip(inner.forget, refined, strict=True) if float(weight) == 0.0)
    search.try_weights(state, _Step(start, gains, frank_wolfe_gap(best[chosen], -gains.estimates), (), dropped))


def _references(policy: Policy, inner: InnerProblem, outer: OuterProblem, console: Console) -> None:
    """Look references up, unless the scoring at theta_0 finds them on the way (no warm-up, and no curvature)."""
    section = outer.section
    with console.phase("reference"):
        if section.warmup_steps or section.adjoint != "identity":
            look_up_references(policy, inner)
        if section.objective == "dpo":  # the pairs' references, too, in one order whichever folds are read back
            outer.objective_value().prepare(policy, sorted(outer.preference, key=lambda pair: pair.id))


def _start(search: _Search) -> float | None:
    """J on the held-out pairs at theta_0, which tells whether any round was worth it, or None."""
    if not search.judges or not search.folds.heldout:
        return None
    search.solver.policy.reset()
    with search.console.phase("measure start"):
        return search.monitor.heldout()


def _warm_up(policy: Policy, inner: InnerProblem, outer: OuterProblem, console: Console) -> None:
    """A few uniform steps, since at LoRA's start (B = 0) the gradient with respect to A vanishes."""
    steps = outer.section.warmup_steps
    if steps == 0:
        policy.reset()
        return
    with console.phase("warm-up", steps, "steps", saves=True) as advance:
        unlearn(policy, inner.shortened(steps), inner.uniform(), "warm-up", outer.inner_checkpoints, advance)


def _update(
    state: SearchState, gains: Gains, inner: InnerProblem, outer: OuterProblem, most: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Try a block: add it, refine the weights, drop small ones; returns ids. What J does then decides on it."""
    section = outer.section
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
    rate, beta = section.mirror_rate / gains.unit, section.sparsity * gains.unit
    moved = refine(weights, -gains.estimates, rate, section.mirror_steps, beta, section.sparsity_p)
    return drop_small(moved, section.drop_below)


def _judge(state: SearchState, value: float) -> bool:
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


def _stop(state: SearchState, outer: OuterProblem, added: bool) -> None:
    """End the rounds when J has been stale for too long, no candidate was left to add, or they are used up."""
    if state.stale >= outer.section.patience:
        judge = "J on the PA pairs" if state.start_heldout is None else "held-out J"
        state.ended(f"{judge} no longer rises (rolled back to the best round)")
    elif not added:
        state.ended("no acceptable candidate")
    elif len(state.rounds) >= outer.section.rounds:
        state.ended("rounds used up")


def _mapping(inner: InnerProblem, weights: Tensor) -> dict[str, float]:
    return {row.id: float(w) for row, w in zip(inner.forget, weights, strict=True) if float(w) > 0}
