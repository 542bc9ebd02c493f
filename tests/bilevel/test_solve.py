"""Selection and weighting end to end on a tiny policy: limits, fall-backs, stopping, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from scenes import INNER, QUIET, ROWS, noise, outer, run, scripted
from torch import Tensor, nn

from tiny import tiny_policy
from u2a.bilevel.gains import Gains, Reached, compute_gains, search_id
from u2a.bilevel.objective import CustomObjective, objective_values
from u2a.bilevel.outcome import random_weights
from u2a.bilevel.outer_problem import split_preference
from u2a.bilevel.reward_objective import Drawn, ExpectedReward
from u2a.bilevel.select import Shrunken, alike, fold_statistics
from u2a.bilevel.solve import _refined, n_to_select, score, solve
from u2a.bilevel.weight import frank_wolfe_gap, refine, with_block
from u2a.config import SolveSection
from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.modeling import Policy
from u2a.record import derive_seed
from u2a.solution import Round, ScoreTable
from u2a.types import Pair
from u2a.unlearn import InnerProblem, InnerSolver


def likes_the_candidates(policy: Policy) -> CustomObjective:
    """J = log-likelihood of the bad answers: every unlearning step hurts it."""
    encoded = [policy.encoder.encode(row.prompt, row.completion) for row in ROWS]

    def value(model: nn.Module, rows: list[Pair]) -> Tensor:
        return policy.log_probs(encoded).mean.mean().expand(len(rows))

    return CustomObjective(value)


@pytest.mark.parametrize(("k", "rounds"), [(1, 2), (3, 2), (8, 3)])
def test_weights_are_on_the_simplex_and_the_limit_is_never_exceeded(k: int, rounds: int):
    told: list[Round] = []
    found = run(outer(n_selected=k, rounds=rounds, patience=9), on_round=told.append)
    assert math.fsum(found.weights.values()) == pytest.approx(1.0, abs=1e-12)
    assert 1 <= len(found.weights) <= k
    assert [row.id for row in found.rows] == [row.id for row in ROWS]
    assert found.rounds == tuple(told)
    assert [entry.index for entry in told] == list(range(len(told)))
    assert all(entry.n_selected <= k for entry in told)
    assert sum(len(entry.added) for entry in told) <= k
    assert found.fallback == "none"
    assert all(row.reason == "selected" for row in found.rows if row.weight > 0)


def test_the_first_scores_are_told_once_and_before_anything_is_chosen():
    told: list[ScoreTable | Round] = []
    problem = outer(n_selected=3, rounds=2, patience=9)
    found = solve(InnerSolver(tiny_policy()), INNER, problem, QUIET, told.append, told.append)
    assert [type(item) for item in told] == [ScoreTable, *[Round] * len(found.rounds)]
    assert told[0].reliability.split_half == found.rounds[0].split_half
    nothing: list[ScoreTable] = []
    fell_back = solve(
        InnerSolver(tiny_policy()), INNER, outer(noise(1), fallback="random_k"), QUIET, None, nothing.append
    )
    assert (fell_back.fallback, nothing) == ("random_k", [fell_back.scores])


def test_the_last_block_takes_only_what_the_limit_leaves(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [0.0, 1.0])
    found = run(outer(n_selected=3, rounds=2, estimator="mean"))
    assert [len(entry.added) for entry in found.rounds] == [2, 1]
    assert len(found.weights) == 3


def test_first_block_is_the_top_by_estimate_and_follows_the_gains():
    found = run(outer(n_selected=4, rounds=1, estimator="mean"))
    gains = {row.id: row.gain for row in found.scores.rows}
    positive = [name for name in gains if gains[name] > 0]
    best = sorted(positive, key=lambda name: -gains[name])[:4]
    assert set(found.weights) == set(found.rounds[0].added) == set(best)
    by_weight = sorted(best, key=lambda name: -found.weights[name])
    assert by_weight == best  # the larger the gain, the larger the weight
    assert max(found.weights.values()) > 1.0 / len(best)


def test_a_lone_round_that_nothing_judges_has_no_inner_run(monkeypatch: pytest.MonkeyPatch):
    options = {"n_selected": 4, "rounds": 1, "estimator": "mean", "heldout_frac": 0.0, "final_refine": False}
    judged = run(replace(outer(**options), probe=lambda policy: 0.0))
    ran: list[str] = []
    before = InnerSolver.__call__

    def counted(self, problem, weights, *rest):
        ran.append("inner")
        return before(self, problem, weights, *rest)

    monkeypatch.setattr(InnerSolver, "__call__", counted)
    found = run(outer(**options))
    assert not ran and not found.rounds and found.stopped.startswith("one round")
    assert found.weights == judged.weights and found.scores == judged.scores and len(judged.rounds) == 1
    run(replace(outer(**options), probe=lambda policy: 0.0))
    assert ran == ["inner"]


def gains_of(folds: Tensor) -> Gains:
    """Gains as a scoring with the default estimator finds them, without its record."""
    found = fold_statistics(folds, [1] * folds.shape[1])
    return Gains(cast(ScoreTable, None), found, Shrunken().estimate(found), found.gain)


def test_what_shrinking_leaves_of_noise_moves_weights_by_as_little():
    section = SolveSection(sparsity=0.0, drop_below=0.0, mirror_rate=0.1, mirror_steps=5)
    generator = torch.Generator().manual_seed(3)
    noise, signal = torch.randn(40, 8, generator=generator).double(), torch.randn(40, 1, generator=generator).double()
    spreads = {}
    for name, folds in (("noise", noise + 0.1 * signal), ("signal", 0.1 * noise + signal)):
        gains, equal = gains_of(folds), torch.full((40,), 1 / 40, dtype=torch.float64)
        logs = _refined(equal, gains, section).log()
        expected = 0.1 * 5 * gains.estimates / gains.plain.std(correction=0)  # rates are in sd of the plain gains
        torch.testing.assert_close(logs - logs.mean(), expected - expected.mean())
        spreads[name] = float(logs.std(correction=0))
    assert spreads["signal"] == pytest.approx(0.5, rel=0.02) and spreads["noise"] < 0.2


@pytest.mark.parametrize("apart", [0.0, 1e-7])
def test_gains_that_differ_by_rounding_alone_get_equal_weights(apart: float):
    gains = gains_of(torch.tensor([[1.0], [1.0], [1.0], [1.0 + apart]], dtype=torch.float64))
    weights = _refined(torch.full((4,), 0.25, dtype=torch.float64), gains, SolveSection(mirror_rate=1.0))
    assert alike(gains.estimates) and weights.tolist() == pytest.approx([0.25] * 4, abs=1e-5)


def test_one_candidate_gets_all_the_weight_or_none():
    inner = InnerProblem(ROWS[:1], section=INNER.section)
    for fallback in ("none", "random_k"):
        found = run(outer(selected_frac=1.0, fallback=fallback), inner)
        assert list(found.weights.values()) in ([1.0], [])
        assert (len(found.weights) == 1) == (found.fallback != "empty")


def test_more_to_select_than_candidates_no_candidate_and_no_pair_are_refused_before_any_run():
    with pytest.raises(ConfigError, match=r"solve\.n_selected: 9 is more than the 8 candidates"):
        run(outer(n_selected=9))
    with pytest.raises(ConfigError, match="no candidate"):
        run(outer(), InnerProblem((), section=INNER.section))
    with pytest.raises(DataError, match="no pair"):
        run(outer(n_pairs=0))
    assert n_to_select(INNER, outer(selected_frac=0.01)) == 1
    assert n_to_select(INNER, outer(selected_frac=0.5)) == 4
    assert n_to_select(INNER, outer(n_selected=8)) == 8


@pytest.mark.parametrize("fallback", ["none", "random_k"])
def test_all_gains_negative_selects_nothing(fallback: str):
    policy = tiny_policy()
    problem = outer(likes_the_candidates(policy), fallback=fallback)
    found = solve(InnerSolver(policy), INNER, problem, QUIET)
    assert all(row.gain < 0 for row in found.scores.rows)
    assert (found.weights, found.fallback, found.rounds) == ({}, "empty", ())


def test_no_signal_falls_back_to_a_random_draw_of_equal_weights():
    found = run(outer(noise(1), fallback="random_k", n_selected=3, estimator="mean"))
    assert found.fallback == "random_k"
    assert found.weights == random_weights(INNER, 3, derive_seed(2, "fallback"))
    assert set(found.weights.values()) == {1 / 3}
    assert "no signal" in found.stopped


def test_random_weights_depend_on_ids_and_seed_alone():
    other = InnerProblem(ROWS[::-1], section=INNER.section)
    assert random_weights(INNER, 3, 5) == random_weights(other, 3, 5)
    draws = {tuple(sorted(random_weights(INNER, 3, seed))) for seed in range(30)}
    assert len(draws) > 10
    assert random_weights(INNER, 0, 5) == {}
    assert math.fsum(random_weights(INNER, 8, 5).values()) == pytest.approx(1.0)


@pytest.mark.parametrize(("values", "best", "n_rounds"), [([1.0, 0.5], 0, 2), ([0.0, 1.0, 0.5], 1, 3)])
def test_rolls_back_to_the_best_round_when_heldout_j_falls(
    monkeypatch: pytest.MonkeyPatch, values: list[float], best: int, n_rounds: int
):
    scripted(monkeypatch, values)
    found = run(outer(n_selected=8, rounds=4, patience=1, selected_frac=1.0, estimator="mean"))
    assert len(found.rounds) == n_rounds
    assert "rolled back" in found.stopped
    kept = {name for entry in found.rounds[: best + 1] for name in entry.added}
    assert set(found.weights) == kept
    assert found.rounds[best + 1].added  # the later round did add something, and lost it
    assert not kept & set(found.rounds[best + 1].added)


def test_a_rolled_back_round_leaves_neither_its_gains_nor_its_ranking(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [1.0, 0.5])
    told: list[ScoreTable] = []
    problem = outer(n_selected=4, rounds=2, patience=1, estimator="mean")
    found = solve(InnerSolver(tiny_policy()), INNER, problem, QUIET, None, told.append)
    assert [entry.accepted for entry in found.rounds] == [True, False]
    assert found.scores == told[0]  # the selected were chosen by the first scoring
    assert [row.estimate for row in found.rows] == [row.estimate for row in told[0].rows]
    reasons = {row.id: row.reason for row in found.rows}
    assert found.rounds[1].added
    assert {reasons[name] for name in found.rounds[1].added} == {"tried in round 2, rolled back"}
    lowest = min(row.estimate for row in found.rows if row.weight > 0)
    assert all(row.estimate <= lowest for row in found.rows if row.reason == "ranked below the selected")


def test_the_gains_of_an_accepted_later_round_are_the_record(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [0.0, 1.0])
    told: list[ScoreTable] = []
    problem = outer(n_selected=4, rounds=2, estimator="mean")
    found = solve(InnerSolver(tiny_policy()), INNER, problem, QUIET, None, told.append)
    assert found.scores != told[0] and found.scores.reliability.split_half == found.rounds[1].split_half


def test_rising_heldout_j_uses_all_rounds(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [0.0, 1.0])
    found = run(outer(n_selected=4, rounds=2, estimator="mean"))
    assert (len(found.rounds), found.stopped) == (2, "rounds used up")
    assert len(found.weights) == found.rounds[-1].n_selected


@pytest.mark.parametrize(("start", "said"), [(-0.5, False), (0.25, False), (0.3, True)])
def test_a_best_round_below_the_start_is_said(monkeypatch: pytest.MonkeyPatch, start: float, said: bool):
    scripted(monkeypatch, [0.25, 0.1], start)
    found = run(outer(n_selected=4, rounds=2, estimator="mean", heldout_frac=0.3))
    assert found.start_heldout == start
    assert ("by held-out J (0.25, 0.3 before) unlearning nothing is better" in found.stopped) is said
    assert found.weights  # said, not done: whoever asks for unlearning may want it all the same


def test_the_start_is_j_on_the_heldout_pairs_before_anything_is_unlearned():
    problem, policy = outer(n_selected=4, rounds=1, heldout_frac=0.3, warmup_steps=2), tiny_policy()
    items = problem.objective_value().prepare(policy, split_preference(problem).heldout)
    expected = float(objective_values(problem.objective_value(), policy, items).mean())
    assert run(problem).start_heldout == pytest.approx(expected, rel=1e-6)
    assert run(outer(n_selected=4, rounds=1, heldout_frac=0.0)).start_heldout is None  # nothing is held out


def test_patience_counts_stale_rounds_in_a_row(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [1.0, 0.9, 5.0, 4.0, 6.0])
    found = run(outer(n_selected=5, rounds=5, patience=2, estimator="mean"))
    assert [len(entry.added) for entry in found.rounds] == [1] * 5
    assert len(found.weights) == 5


def test_non_finite_heldout_j_stops_instead_of_looking_stale():
    policy = tiny_policy()
    heldout: set[str] = set()

    def value(model: nn.Module, rows: list[Pair]) -> Tensor:
        base = sum(p.sum() for p in model.parameters() if p.requires_grad)
        return torch.stack([base * (math.nan if row.id in heldout else 1.0) for row in rows])

    problem = outer(CustomObjective(value), heldout_frac=0.3)
    heldout |= {row.id for row in split_preference(problem).heldout}
    assert heldout
    with pytest.raises(NonFiniteError) as caught:
        solve(InnerSolver(policy), INNER, problem, QUIET)
    assert set(caught.value.ids) == heldout


def test_same_seed_same_solution_and_another_order_of_candidates_changes_nothing():
    section = INNER.section.model_copy(update={"batch_size": 3, "loss": "npo"})  # batches depend on the order
    inner = InnerProblem(ROWS, section=section, seed=1)
    shuffled = InnerProblem(tuple(ROWS[k] for k in (5, 2, 7, 0, 3, 6, 1, 4)), section=section, seed=1)
    problem = outer(n_selected=4, adjoint="implicit", cg_steps=2, curvature_samples=3, rounds=1)
    first, again, other = run(problem, inner), run(problem, inner), run(problem, shuffled)
    assert again.weights == first.weights
    assert [row.gain for row in again.scores.rows] == [row.gain for row in first.scores.rows]
    assert set(other.weights) == set(first.weights)
    for name, weight in first.weights.items():
        assert other.weights[name] == pytest.approx(weight, rel=1e-3)
    assert [row.id for row in other.rows] == [row.id for row in shuffled.forget]


def test_progress_is_known_by_the_label_of_an_objective_around_a_function():
    policy = tiny_policy()

    def value(model: nn.Module, rows: list[Pair]) -> Tensor:
        return torch.zeros(len(rows))

    def draw(policy: Policy, pairs: Sequence[Pair]) -> list[Drawn]:
        return []

    named = [CustomObjective(value, "one"), CustomObjective(value, "two")]
    named += [ExpectedReward(draw, "one"), ExpectedReward(draw, "two")]
    ids = {search_id(policy, INNER, outer(objective)) for objective in named}
    assert len(ids) == 4
    for unnamed in (CustomObjective(value), ExpectedReward(draw)):
        with pytest.raises(ConfigError, match="label of its own"):
            search_id(policy, INNER, outer(unnamed))


def test_memo_restores_what_a_fresh_run_gives():
    weights = {ROWS[0].id: 0.7, ROWS[3].id: 0.3}
    solver = InnerSolver(tiny_policy())
    first = solver(INNER, weights, "a")
    theta = solver.policy.snapshot()
    solver.policy.reset()
    second = solver(INNER, dict(reversed(weights.items())) | {ROWS[5].id: 0.0}, "b")
    fresh = InnerSolver(tiny_policy())
    fresh(INNER, weights, "a")
    assert second == first.model_copy(update={"arm": "b"})
    for name, value in fresh.policy.snapshot().items():
        assert torch.equal(theta[name], value)
        assert torch.equal(solver.policy.snapshot()[name], value)
    third = solver(INNER, {ROWS[0].id: 0.6, ROWS[3].id: 0.4}, "a")
    assert third.seconds != first.seconds
    assert any(not torch.equal(theta[name], value) for name, value in solver.policy.snapshot().items())


def test_score_uses_all_pairs_and_leaves_the_policy_after_the_warm_up():
    policy = tiny_policy()
    table = score(policy, INNER, outer(heldout_frac=0.5), QUIET)
    assert table.reliability.n_pairs == 8
    assert [row.id for row in table.rows] == [row.id for row in ROWS]
    assert any(not torch.equal(policy.theta0[name], value) for name, value in policy.snapshot().items())


def test_a_strong_penalty_leaves_one_candidate(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [0.0, 1.0, 2.0])
    found = run(outer(n_selected=6, rounds=3, sparsity=100.0, mirror_steps=50, estimator="mean"))
    assert [entry.n_selected for entry in found.rounds] == [1, 1, 1]
    assert list(found.weights.values()) == [pytest.approx(1.0)]


def test_small_weights_are_dropped_and_reported(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [0.0])
    found = run(outer(n_selected=4, rounds=1, estimator="mean", mirror_rate=2.0, mirror_steps=20, drop_below=0.5))
    entry = found.rounds[0]
    assert entry.dropped
    assert set(found.weights) == set(entry.added) - set(entry.dropped)
    assert {row.reason for row in found.rows if row.id in entry.dropped} == {"weight fell to 0 in round 1"}
    assert min(found.weights.values()) >= 0.5 / 4
    assert math.fsum(found.weights.values()) == pytest.approx(1.0)


def test_gap_is_measured_from_the_second_round_on_and_stops_the_search(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [0.0, 1.0])
    found = run(outer(n_selected=4, rounds=2, estimator="mean"))
    assert found.rounds[0].fw_gap is None
    assert found.rounds[1].fw_gap >= 0.0
    scripted(monkeypatch, [0.0, 1.0])
    stopped = run(outer(n_selected=4, rounds=2, gap_tol=1e6, estimator="mean"))
    assert (len(stopped.rounds), stopped.stopped) == (1, "Frank-Wolfe gap below tolerance")
    assert math.fsum(stopped.weights.values()) == pytest.approx(1.0)


def test_with_block_gives_new_members_the_average_weight():
    start = torch.tensor([0.75, 0.25, 0.0, 0.0], dtype=torch.float64)
    assert with_block(start, [3]).tolist() == pytest.approx([0.5, 1 / 6, 0.0, 1 / 3])
    assert with_block(torch.zeros(4).double(), [0, 2]).tolist() == [0.5, 0.0, 0.5, 0.0]
    assert with_block(start, []).tolist() == start.tolist()


def test_final_refinement_scores_the_selected_at_the_best_inner_solution_and_moves_their_weights(
    monkeypatch: pytest.MonkeyPatch,
):
    options = {"n_selected": 4, "rounds": 1, "estimator": "mean", "mirror_steps": 5}
    scripted(monkeypatch, [0.0])
    plain = run(outer(**options))
    scripted(monkeypatch, [0.0, 1.0])
    problem = outer(final_refine=True, **options)
    found = run(problem)
    first, last = found.rounds
    assert (first.added, first.accepted) == (plain.rounds[0].added, True)
    assert (last.index, last.added, last.accepted) == (1, (), True)
    chosen = [k for k, row in enumerate(ROWS) if row.id in plain.weights]
    solver = InnerSolver(tiny_policy())
    solver(INNER, plain.weights)
    inner = replace(INNER, forget=tuple(ROWS[k] for k in chosen))
    gains = compute_gains(
        solver.policy, inner, problem, split_preference(problem), Reached(plain.weights), QUIET
    ).estimates
    weights = torch.tensor([plain.weights[row.id] for row in inner.forget], dtype=torch.float64)
    expected = refine(weights, -gains, 0.1 / float(gains.std(correction=0)), 5)
    assert [found.weights[row.id] for row in inner.forget] == pytest.approx(expected.tolist(), rel=1e-6)
    assert float((expected - weights).abs().max()) > 1e-3
    assert len(found.scores.rows) == len(ROWS)  # the table of the last scoring of all candidates
    assert last.fw_gap == pytest.approx(frank_wolfe_gap(weights, -gains), rel=1e-6)


def test_final_refinement_starts_from_the_best_round_and_is_dropped_when_j_does_not_rise(
    monkeypatch: pytest.MonkeyPatch,
):
    options = {"n_selected": 8, "rounds": 4, "selected_frac": 1.0, "estimator": "mean"}
    scripted(monkeypatch, [1.0, 0.5])
    plain = run(outer(**options))
    used: list[dict[str, float]] = []
    call = InnerSolver.__call__

    def spy(self: InnerSolver, problem: InnerProblem, weights: dict[str, float], *rest: Any, **named: Any):
        used.append(dict(weights))
        return call(self, problem, weights, *rest, **named)

    monkeypatch.setattr(InnerSolver, "__call__", spy)
    scripted(monkeypatch, [1.0, 0.5, 0.9])
    found = run(outer(final_refine=True, **options))
    assert [entry.accepted for entry in found.rounds] == [True, False, False]
    assert found.weights == plain.weights
    assert found.stopped == plain.stopped
    assert used[2] == used[0] == plain.weights
    assert set(used[3]) == set(plain.weights)
    assert used[3] != plain.weights


def test_final_refinement_needs_two_candidates_and_steps():
    assert len(run(outer(n_selected=1, rounds=1, final_refine=True)).rounds) == 1
    assert len(run(outer(n_selected=4, rounds=1, final_refine=True, mirror_steps=0)).rounds) == 1
    assert SolveSection().final_refine


def test_probe_is_measured_once_per_round_at_its_inner_solution(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [0.0, 1.0, 2.0])
    thetas: list[dict[str, Tensor]] = []

    def probe(policy: Policy) -> float:
        thetas.append(policy.snapshot())
        return 10.0 + len(thetas)

    problem = outer(n_selected=4, rounds=2, estimator="mean", final_refine=True)
    found = run(replace(problem, probe=probe))
    assert [entry.reward for entry in found.rounds] == [11.0, 12.0, 13.0]
    solver = InnerSolver(tiny_policy())
    solver(INNER, found.weights)
    assert all(torch.allclose(value, thetas[-1][name]) for name, value in solver.policy.snapshot().items())
    scripted(monkeypatch, [0.0])
    assert [entry.reward for entry in run(outer(rounds=1)).rounds] == [None]


def test_equal_estimates_are_named_when_they_stop_the_search(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [0.0])
    calls: list[int] = []

    def alike_from_the_second_on(*arguments: Any) -> Gains:
        gains = compute_gains(*arguments)
        calls.append(1)
        return gains if len(calls) == 1 else replace(gains, estimates=torch.full_like(gains.estimates, 0.3))

    monkeypatch.setattr("u2a.bilevel.solve.compute_gains", alike_from_the_second_on)
    found = run(outer(n_selected=4, rounds=2, estimator="mean"))
    assert found.stopped == "all candidates look alike (Frank-Wolfe gap 0)"
    assert len(found.rounds) == 1
