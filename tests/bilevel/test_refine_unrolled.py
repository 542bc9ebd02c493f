"""The final refinement through the optimiser's steps: what it computes, when it is left out, what it must raise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scenes import INNER, QUIET, ROWS, outer, run, scripted

from tiny import examples, tiny_policy
from u2a.bilevel.adjoint import Adjoint
from u2a.bilevel.gains import Reached, compute_gains
from u2a.bilevel.hypergrad import Identity, make_refining_adjoint
from u2a.bilevel.objective import Margin, objective_values
from u2a.bilevel.outer_problem import split_preference
from u2a.bilevel.unrolled import Unrolled
from u2a.bilevel.weight import mirror_step, refine
from u2a.config import GuardSection, SolveSection, UnlearnSection
from u2a.unlearn import InnerProblem, InnerSolver, unlearn

UNROLLED = {"final_refine": True, "refine_adjoint": "unrolled", "n_selected": 4, "rounds": 1, "estimator": "mean"}


def test_the_configured_refinement_is_unrolled_and_screening_repeats_the_first_adjoint():
    rough = UnlearnSection()
    assert make_refining_adjoint(SolveSection(refine_adjoint="unrolled"), rough) == Unrolled()
    assert make_refining_adjoint(SolveSection(adjoint="identity", refine_adjoint="screening"), rough) == Identity()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Identity()),  # AdamW at a constant rate: its first steps have the size of the rate whatever the gradient
        ({"warmup_ratio": 0.25}, Identity()),
        ({"warmup_ratio": 0.5}, Unrolled()),
        ({"optimizer": "sgd"}, Unrolled()),
    ],
)
def test_by_default_the_exact_derivative_is_taken_only_where_the_run_is_smooth(changes: dict, expected: Adjoint):
    section = UnlearnSection.model_validate(changes)
    assert make_refining_adjoint(SolveSection(adjoint="identity"), section) == expected


def test_weights_of_the_selected_follow_the_exact_derivative_of_the_run_on_all_pairs(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [0.0, 1.0, 0.0])
    problem = outer(mirror_steps=5, **UNROLLED)
    found = run(problem)
    plain = dict.fromkeys(found.rounds[0].added, 1 / 4)
    solver = InnerSolver(tiny_policy())
    first = run(replace(problem, section=problem.section.model_copy(update={"final_refine": False})))
    result = solver(INNER, first.weights)
    inner = replace(INNER, forget=tuple(row for row in ROWS if row.id in plain))
    folds, reached = split_preference(problem).merged(), Reached(first.weights, result)
    gains = compute_gains(solver.policy, inner, problem, folds, reached, QUIET, Unrolled())
    assert gains.statistics.se is None  # one fold: the whole PA set
    weights = torch.tensor([first.weights[row.id] for row in inner.forget], dtype=torch.float64)
    expected = refine(weights, -gains.estimates, 0.1 / float(gains.estimates.std(correction=0)), 5)
    assert [found.weights[row.id] for row in inner.forget] == pytest.approx(expected.tolist(), rel=1e-6)
    assert gains.table.adjoint == gains.table.scorer == "unrolled"
    assert all(row.loss is None for row in gains.table.rows)


def test_following_the_unrolled_gain_raises_j_of_the_whole_run_and_reversing_it_lowers_j():
    problem, policy = outer(), tiny_policy()
    inner = replace(INNER, section=INNER.section.model_copy(update={"max_steps": 4}))
    pairs = split_preference(problem).merged()
    items = Margin().prepare(policy, pairs.folds[0])

    def j(weights: torch.Tensor) -> float:
        unlearn(policy, inner, {row.id: float(w) for row, w in zip(ROWS, weights, strict=True)})
        return float(objective_values(Margin(), policy, items).mean())

    uniform = torch.full((len(ROWS),), 1 / len(ROWS), dtype=torch.float64)
    base = j(uniform)
    gains = compute_gains(policy, inner, problem, pairs, Reached(inner.uniform()), QUIET, Unrolled()).estimates
    rate = 0.1 / float(gains.abs().max())
    assert j(mirror_step(uniform, -gains, rate)) > base > j(mirror_step(uniform, gains, rate))


def test_a_run_rolled_back_to_its_start_is_not_refined(monkeypatch: pytest.MonkeyPatch):
    """With nothing left of the run its derivative is 0."""
    scripted(monkeypatch, [0.0, 1.0])
    guarded = InnerProblem(
        ROWS,
        guard_rows=examples(3, start=50),
        section=INNER.section.model_copy(update={"learning_rate": 1.0}),
        guard=GuardSection(ppl_budget_frac=0.0, every_steps=1, line_search=False),
        seed=1,
    )
    found = run(outer(**UNROLLED), guarded)
    assert len(found.rounds) == 1
