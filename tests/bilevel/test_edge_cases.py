"""The edges: one candidate, no gain, no gradient, numbers that are not finite, singular curvature, ties."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scenes import INNER, QUIET, ROWS, outer, run
from torch import Tensor, nn

from tiny import tiny_policy
from u2a.bilevel.linsolve import CG
from u2a.bilevel.objective import CustomObjective
from u2a.bilevel.select import top_block
from u2a.bilevel.solve import score, solve
from u2a.errors import ConfigError, NonFiniteError, NotConverged
from u2a.losses import GA
from u2a.modeling import Params, Policy
from u2a.types import Example, Pair
from u2a.unlearn import InnerProblem, InnerSolver


def flat_objective() -> CustomObjective:
    """J is constant: its gradient is zero."""

    def value(model: nn.Module, rows: list[Pair]) -> Tensor:
        return 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad) + torch.zeros(len(rows))

    return CustomObjective(value)


def likelihood_of(policy: Policy, row: Example, sign: float) -> CustomObjective:
    """J = sign x mean log-probability of one bad answer; with sign -1 unlearning that answer helps."""
    encoded = policy.encoder.encode(row.prompt, row.completion)

    def value(model: nn.Module, rows: list[Pair]) -> Tensor:
        return sign * policy.log_probs([encoded]).mean.expand(len(rows))

    return CustomObjective(value)


def copies(n: int) -> InnerProblem:
    """The same row n times under different ids, so that all gains are equal."""
    rows = tuple(ROWS[0].model_copy(update={"id": f"copy{k}"}) for k in range(n))
    return InnerProblem(rows, section=INNER.section, seed=1)


def solve_with(sign: float, inner: InnerProblem, **options: object):
    """Solve with J = sign x likelihood of the first row."""
    policy = tiny_policy()
    return solve(InnerSolver(policy), inner, outer(likelihood_of(policy, ROWS[0], sign), **options), QUIET)


@pytest.mark.parametrize(("sign", "weights"), [(-1.0, [1.0]), (1.0, [])])
def test_one_candidate_is_taken_whole_if_its_gain_is_positive_and_left_else(sign: float, weights: list[float]):
    found = solve_with(sign, InnerProblem(ROWS[:1], section=INNER.section), n_selected=1, rounds=3, final_refine=True)
    assert list(found.weights.values()) == weights
    assert found.fallback == ("none" if weights else "empty")
    assert found.scores.reliability.split_half is None  # undefined for one candidate, not 0 or 1


def test_one_candidate_with_fallback_counts_as_no_signal_and_is_drawn():
    found = solve_with(-1.0, InnerProblem(ROWS[:1], section=INNER.section), n_selected=1, fallback="random_k")
    assert (found.fallback, list(found.weights.values())) == ("random_k", [1.0])


def test_more_to_select_than_candidates_is_an_error_that_says_how_many_there_are():
    with pytest.raises(ConfigError, match="9 is more than the 8 candidates"):
        run(outer(n_selected=9))


@pytest.mark.parametrize("rounds", [1, 2])
def test_equal_gains_share_the_weight_equally_among_the_first_by_id(rounds: int):
    found = solve_with(-1.0, copies(6), n_selected=4, rounds=rounds, estimator="mean")
    gains = [row.gain for row in found.scores.rows]
    assert max(gains) - min(gains) < 1e-4 * max(gains)
    assert len(found.weights) == (4 if rounds == 1 else 2)
    assert list(found.weights.values()) == pytest.approx([1.0 / len(found.weights)] * len(found.weights), rel=1e-3)
    if rounds == 2:
        assert "Frank-Wolfe gap" in found.stopped


def test_equal_gains_with_fallback_are_no_signal():
    found = solve_with(-1.0, copies(6), n_selected=3, fallback="random_k")
    assert found.fallback == "random_k"
    assert len(found.weights) == 3


@pytest.mark.parametrize("fallback", ["none", "random_k"])
def test_negative_gains_select_nothing_and_say_so(fallback: str):
    found = solve_with(1.0, copies(4), n_selected=2, fallback=fallback)
    assert (found.fallback, found.weights, found.rounds) == ("empty", {}, ())
    assert "nothing is unlearned" in found.stopped
    assert all(row.gain < 0.0 for row in found.scores.rows)


@pytest.mark.parametrize("adjoint", ["identity", "implicit"])
@pytest.mark.parametrize("scorer", ["jvp", "central", "one_sided"])
def test_a_constant_objective_gives_gains_of_exactly_zero(adjoint: str, scorer: str):
    table = score(tiny_policy(), INNER, outer(flat_objective(), adjoint=adjoint, scorer=scorer), QUIET)
    assert [row.gain for row in table.rows] == [0.0] * 8
    assert [row.estimate for row in table.rows] == [0.0] * 8
    assert all(status.residual == 0.0 for status in table.solve)
    assert table.reliability.gradient_cosine is None
    assert table.reliability.split_half is None


@pytest.mark.parametrize(("fallback", "outcome"), [("none", "empty"), ("random_k", "random_k")])
def test_a_constant_objective_is_no_signal(fallback: str, outcome: str):
    found = run(outer(flat_objective(), fallback=fallback, n_selected=3))
    assert (found.fallback, len(found.weights)) == (outcome, 0 if outcome == "empty" else 3)


@pytest.mark.parametrize("scorer", ["jvp", "central", "one_sided", "auto"])
def test_a_candidate_whose_loss_is_not_finite_is_named(scorer: str, monkeypatch: pytest.MonkeyPatch):
    """Both entries refuse it before any weight is set."""
    policy = tiny_policy()
    counts = [policy.encoder.encode(row.prompt, row.completion).n_answer for row in ROWS[:3]]
    assert counts.count(counts[1]) == 1
    inner = InnerProblem(ROWS[:3], section=INNER.section, seed=1)
    per_sample = GA.per_sample

    def poisoned(self: GA, answers: Any, reference: Tensor | None) -> Tensor:
        values = per_sample(self, answers, reference)
        return torch.where(answers.count == counts[1], values * math.nan, values)

    monkeypatch.setattr(GA, "per_sample", poisoned)
    problem = outer(likelihood_of(policy, ROWS[0], -1.0), scorer=scorer, warmup_steps=0, n_selected=1)
    for call in (
        lambda: score(policy, inner, problem, QUIET),
        lambda: solve(InnerSolver(policy), inner, problem, QUIET),
    ):
        with pytest.raises(NonFiniteError) as caught:
            call()
        assert caught.value.ids == [ROWS[1].id]


# A singular operator: diag(0, 0, 1, 2, 3) in one block.
SINGULAR = torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64))


def product(vector: Params) -> Params:
    return {"x": SINGULAR @ vector["x"]}


def test_without_damping_a_singular_system_with_a_solution_is_solved_as_it_is():
    right = {"x": torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)}
    found = CG(max_steps=20, tol=1e-12).solve(product, right, 0.0)
    assert (found.status.status, found.status.damping) == ("converged", 0.0)
    assert found.value["x"].tolist() == pytest.approx([0.0, 0.0, 1.0, 0.5, 1 / 3])


def test_without_damping_a_singular_system_without_a_solution_is_never_reported_as_converged():
    """The part of b in the null space has no solution: the damping is raised, or the steps run out; both are said."""
    right = {"x": torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)}
    found = CG(max_steps=20, tol=1e-12).solve(product, right, 0.0)
    assert found.status.status == "negative_curvature"
    assert found.status.damping > 0.0
    exact = torch.linalg.solve(SINGULAR + found.status.damping * torch.eye(5).double(), right["x"])
    assert torch.allclose(found.value["x"], exact, rtol=1e-6)
    with pytest.raises(NotConverged):
        CG().solve(lambda vector: {"x": 0.0 * vector["x"]}, right, 0.0)


def test_ties_are_broken_by_id():
    estimates = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    ids = ("e", "d", "b", "a", "c")
    assert [ids[k] for k in top_block(estimates, ids, [False] * 5, 4)] == ["b", "c", "d", "a"]
    order = [3, 1, 4, 0, 2]
    shuffled = [ids[k] for k in order]
    assert [shuffled[k] for k in top_block(estimates[order], shuffled, [False] * 5, 4)] == ["b", "c", "d", "a"]


@pytest.mark.parametrize("fallback", ["none", "random_k"])
def test_the_order_of_the_candidates_does_not_matter(fallback: str):
    order = (5, 2, 7, 0, 3, 6, 1, 4)
    shuffled = replace(INNER, forget=tuple(ROWS[k] for k in order))
    options = {"n_selected": 3, "rounds": 1, "fallback": fallback, "mirror_steps": 3}
    first, other = (solve_with(-1.0, inner, **options) for inner in (INNER, shuffled))
    assert (first.fallback, set(first.weights)) == (other.fallback, set(other.weights))
    for name, weight in first.weights.items():
        assert other.weights[name] == pytest.approx(weight, rel=1e-3)
    assert [row.id for row in other.rows] == [ROWS[k].id for k in order]  # reported in the order given
