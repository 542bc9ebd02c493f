"""How a search for weights ends: the record of what it found, or of what is done in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from u2a.bilevel.gains import Gains
from u2a.bilevel.outer_problem import OuterProblem
from u2a.bilevel.search_state import SearchState
from u2a.record import derive_seed
from u2a.solution import Round, Solution, WeightRow
from u2a.stream import permutation
from u2a.unlearn import InnerProblem


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


def solution_of(inner: InnerProblem, state: SearchState, fallback: str) -> Solution:
    """The record of a search that has ended.

    Args:
        inner: the candidates.
        state: where it ended; it has scored once at least.
        fallback: ``none`` or ``empty``.

    Returns:
        The best weights found, with a reason per candidate.
    """
    assert state.scores is not None
    later = _lost(state.rounds)
    rows = []
    for row, score, weight in zip(inner.forget, state.scores.rows, state.best_weights.tolist(), strict=True):
        ranked = "no gain promised" if score.estimate <= 0 else "ranked below the selected"
        reason = "selected" if weight > 0 else later.get(row.id, ranked)
        rows.append(WeightRow(id=row.id, weight=weight, estimate=score.estimate, reason=reason))
    return Solution(
        rows=tuple(rows),
        rounds=tuple(state.rounds),
        scores=state.scores,
        stopped=state.stopped + _lower(state),
        fallback=fallback,  # type: ignore[arg-type]
        start_heldout=state.start_heldout,
    )


def _lost(rounds: Sequence[Round]) -> dict[str, str]:
    """Why candidates that were tried are out, by id: what the last round that touched them did."""
    reasons: dict[str, str] = {}
    for record in rounds:
        number = record.index + 1
        if record.accepted:
            reasons |= dict.fromkeys(record.dropped, f"weight fell to 0 in round {number}")
        else:
            reasons |= dict.fromkeys(record.added, f"tried in round {number}, rolled back")
    return reasons


def _lower(state: SearchState) -> str:
    """What must be said where the best round is worse, by its judge, than unlearning nothing."""
    start, best = state.start_heldout, state.best_value
    if start is None or not state.rounds or best >= start:
        return ""
    return f"; by held-out J ({best:.4g}, {start:.4g} before) unlearning nothing is better"


def fallback_solution(inner: InnerProblem, outer: OuterProblem, gains: Gains, choice: str, most: int) -> Solution:
    """The record of a search that does not trust its gains: uniform weights on a random draw, or nothing at all.

    Args:
        inner: the candidates.
        outer: gives the seed of the draw.
        gains: those that are not trusted.
        choice: ``random_k`` or ``empty``.
        most: candidates to draw.

    Returns:
        The solution.
    """
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
