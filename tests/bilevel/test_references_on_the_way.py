"""Scoring at theta_0 finds the reference log-probabilities itself: no pass of their own, and the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scenes import INNER, QUIET, ROWS, outer
from torch import Tensor

from tiny import tiny_policy
from u2a.bilevel.gains import candidate_losses
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
    assert {row.key for row in encoded(policy, NPO)} <= set(policy._reference_sums)
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
    policy, other = tiny_policy(lora_b_sd=0.1), tiny_policy()
    assert not policy.at_start() and other.at_start()
    found = candidate_losses(policy, NPO).reference_sums
    assert found is not None and torch.equal(found, other.reference_sums(encoded(other, NPO)))
    assert not torch.allclose(policy.answer_sums(encoded(policy, NPO)), found)


def test_references_that_are_known_are_kept_and_rows_that_are_alike_are_looked_up():
    """Else a resumed process, which meets them in another order, would go on with other last bits."""
    policy = tiny_policy()
    policy.remember_reference_sums(encoded(policy, NPO)[:1], torch.tensor([-1.5]))
    sums = candidate_losses(policy, NPO).reference_sums
    assert sums is not None and float(sums[0]) == -1.5
    twice = replace(NPO, forget=(*NPO.forget, NPO.forget[0].model_copy(update={"id": "twin"})))
    assert candidate_losses(tiny_policy(), twice).reference_sums is not None
    assert candidate_losses(tiny_policy(), NPO).reference_sums is None


def test_the_order_of_the_candidates_changes_no_bit_of_their_gains():
    turned = replace(NPO, forget=tuple(reversed(NPO.forget)))
    assert gains(score(tiny_policy(), NPO, outer(**AT_START), QUIET)) == gains(
        score(tiny_policy(), turned, outer(**AT_START), QUIET)
    )
