"""Scoring at theta_0 finds the reference log-probabilities itself: no pass of their own, and the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scenes import INNER, QUIET, ROWS, outer
from torch import Tensor

from tiny import tiny_policy
from u2a.bilevel.solve import score, solve
from u2a.encoding import Encoded
from u2a.modeling import Policy
from u2a.solution import ScoreTable
from u2a.unlearn import InnerProblem, InnerSolver, look_up_references

NPO = replace(INNER, section=INNER.section.model_copy(update={"loss": "npo"}))
AT_START = {"warmup_steps": 0, "scorer": "backward"}


def encoded(policy: Policy, inner: InnerProblem) -> list[Encoded]:
    return [policy.encoder.encode(row.prompt, row.completion, row.source) for row in inner.forget]


def gains(table: ScoreTable) -> dict[str, tuple[float, ...]]:
    return {row.id: row.fold_gains for row in table.rows}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of every call of ``Policy.answer_sums``, without the two that ``backward`` tries itself on."""
    sizes: list[int] = []
    plain = Policy.answer_sums

    def answer_sums(self: Policy, rows: list[Encoded], *args: object) -> Tensor:
        sizes.extend([len(rows)] if max(len(row.input_ids) for row in rows) > 3 else [])
        return plain(self, rows, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Policy, "answer_sums", answer_sums)
    return sizes


@pytest.mark.parametrize("token_budget", [60, 120, 5000])
def test_the_references_are_those_of_a_pass_of_their_own_to_the_last_bit(token_budget: int):
    policy, other = (tiny_policy(token_budget=token_budget) for _ in range(2))
    score(policy, NPO, outer(**AT_START), QUIET)
    assert policy.knows_references(encoded(policy, NPO))
    look_up_references(other, NPO)
    assert torch.equal(policy.reference_sums(encoded(policy, NPO)), other.reference_sums(encoded(other, NPO)))


@pytest.mark.parametrize("scorer", ["backward", "central", "one_sided", "jvp"])
def test_gains_are_those_with_references_looked_up_before(scorer: str):
    policy, other = tiny_policy(), tiny_policy()
    found = gains(score(policy, NPO, outer(warmup_steps=0, scorer=scorer), QUIET))
    look_up_references(other, NPO)
    expected = gains(score(other, NPO, outer(warmup_steps=0, scorer=scorer), QUIET))
    assert found == expected
    assert max(abs(gain) for row in found.values() for gain in row) > 0.0


def test_no_candidate_is_read_once_more_for_its_reference(monkeypatch: pytest.MonkeyPatch):
    sizes = counted(monkeypatch)
    solver = InnerSolver(tiny_policy())
    found = solve(solver, NPO, outer(n_selected=3, rounds=1, heldout_frac=0.0, mirror_steps=1, **AT_START), QUIET)
    solver(NPO, found.weights, "final")
    assert sizes == []
    warm = InnerSolver(tiny_policy())
    solve(warm, NPO, outer(n_selected=3, rounds=1, heldout_frac=0.0, mirror_steps=1, scorer="backward"), QUIET)
    assert sizes == [len(ROWS)]  # after a warm-up the policy no longer stands at theta_0


def test_a_curvature_that_asks_for_some_references_first_gets_them_from_a_pass_over_all(
    monkeypatch: pytest.MonkeyPatch,
):
    sizes = counted(monkeypatch)
    implicit = {"adjoint": "implicit", "curvature": "fisher", "curvature_samples": 3}
    score(tiny_policy(), NPO, outer(**AT_START | implicit), QUIET)
    assert sizes == [len(ROWS)]


def test_a_policy_that_has_moved_takes_the_references_of_its_start():
    policy, other = tiny_policy(), tiny_policy()
    score(policy, NPO, outer(**AT_START), QUIET)
    look_up_references(other, NPO)
    for each in (policy, other):
        with torch.no_grad():
            for value in each.trainable().values():
                value.add_(0.05)
        assert not each.at_start()
    rows = encoded(policy, NPO)
    assert torch.equal(policy.reference_sums(rows), other.reference_sums(rows))
    assert not torch.equal(policy.answer_sums(rows), policy.reference_sums(rows))


def test_the_order_of_the_candidates_changes_no_bit_of_their_gains():
    turned = replace(NPO, forget=tuple(reversed(NPO.forget)))
    assert gains(score(tiny_policy(), NPO, outer(**AT_START), QUIET)) == gains(
        score(tiny_policy(), turned, outer(**AT_START), QUIET)
    )
