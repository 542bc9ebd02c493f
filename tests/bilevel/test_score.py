"""Scorers against one backward pass per sample, and what a score must not depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import candidate_losses, direction, loss_by_hand, small_policy, theta_of

from tiny import examples, tiny_policy
from u2a.bilevel.score import (
    CandidateLosses,
    Central,
    ForwardMode,
    OneSided,
    Scorer,
    agreement,
    choose_step,
    make_scorer,
    shifted,
)
from u2a.bilevel.vectors import dot, plus, scaled
from u2a.config import SolveSection
from u2a.errors import NonFiniteError
from u2a.losses import GA, make_loss
from u2a.modeling import AnswerLogProbs, Policy
from u2a.progress import Quiet
from u2a.reference.dense import flatten, per_sample_gradients

ROWS = examples(6)
SCORERS = {"central": Central(), "one_sided": OneSided(), "jvp": ForwardMode()}
TOLERANCE = {"central": 1e-3, "one_sided": 2e-2, "jvp": 1e-9}


@lru_cache
def exact(loss: str) -> torch.Tensor:
    """(6, 80) gradients of the small policy's losses, formula by hand, one sequence at a time."""
    policy = small_policy()
    encoded = candidate_losses(policy, make_loss(loss, 0.1), ROWS).rows
    functions = [lambda p, row=row: loss_by_hand(loss, policy, row, p) for row in encoded]
    return per_sample_gradients(functions, theta_of(policy))


def slopes(scorer: Scorer, losses: CandidateLosses, *directions: dict[str, torch.Tensor]) -> torch.Tensor:
    return scorer.derivatives(losses, directions, Quiet()).derivatives


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("loss", ["ga", "npo"])
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_the_inner_products_of_per_sample_gradients(name: str, loss: str):
    policy = small_policy()
    losses = candidate_losses(policy, make_loss(loss, 0.1), ROWS)
    u, v = direction(policy, 1, length=3.0), direction(policy, 2, length=0.01)
    expected = exact(loss) @ torch.stack([flatten(u), flatten(v)], 1)
    found = slopes(SCORERS[name], losses, u, v)
    tolerance = max(TOLERANCE[name], 1e-6 if loss == "npo" else 0.0)  # reference sums are kept in float32
    assert error(found[:, 0], expected[:, 0]) < tolerance
    assert error(found[:, 1], expected[:, 1]) < tolerance


def test_error_of_central_differences_falls_as_step_squared_and_of_one_sided_as_step():
    policy = small_policy()
    losses, u = candidate_losses(policy, GA(), ROWS), direction(policy, 3)
    true = exact("ga") @ flatten(u)
    central = [error(slopes(Central(h), losses, u)[:, 0], true) for h in (1e-2, 1e-3)]
    one_sided = [error(slopes(OneSided(h), losses, u)[:, 0], true) for h in (1e-2, 1e-3)]
    assert central[0] / central[1] == pytest.approx(100.0, rel=0.1)
    assert one_sided[0] / one_sided[1] == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize("name", ["central", "one_sided"])
def test_float32_scores_on_the_two_layer_policy_rank_as_exact_ones(name: str):
    policy = tiny_policy(lora_b_sd=0.05)
    losses = candidate_losses(policy, GA(), examples(12))
    generator = torch.Generator().manual_seed(0)
    u = {key: torch.randn(value.shape, generator=generator) for key, value in policy.trainable().items()}
    true, found = slopes(ForwardMode(), losses, u)[:, 0], slopes(SCORERS[name], losses, u)[:, 0]
    assert error(found, true) < {"central": 0.01, "one_sided": 0.05}[name]
    assert agreement(losses, [u], found[:, None]) == pytest.approx(error(found, true), abs=0.05)


@settings(max_examples=8)
@given(order=st.permutations(range(6)), budget=st.sampled_from([1, 90, 1000]), name=st.sampled_from(list(SCORERS)))
def test_scores_do_not_depend_on_order_batches_or_padding(order: list[int], budget: int, name: str):
    policy = small_policy()
    u = direction(policy, 4)
    scorer = {"central": Central(1e-3), "one_sided": OneSided(1e-3), "jvp": ForwardMode()}[name]
    first = slopes(scorer, candidate_losses(policy, GA(), ROWS), u)[:, 0]
    policy.token_budget = budget
    second = slopes(scorer, candidate_losses(policy, GA(), [ROWS[k] for k in order]), u)[:, 0]
    assert torch.allclose(first[order], second, rtol=1e-8, atol=1e-10)


def test_duplicated_candidates_get_identical_scores_and_longer_companions_change_nothing():
    policy = small_policy()
    u = direction(policy, 5)
    long = ROWS[3].model_copy(update={"completion": "very long " * 20, "id": "long"})
    alone = slopes(ForwardMode(), candidate_losses(policy, GA(), ROWS[:1]), u)
    padded = slopes(ForwardMode(), candidate_losses(policy, GA(), [ROWS[0], long, ROWS[0]]), u)
    assert torch.allclose(padded[[0, 2]], alone.expand(2, 1), rtol=1e-9)


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_linear_in_the_direction(name: str):
    policy = small_policy()
    losses, u, v = candidate_losses(policy, GA(), ROWS), direction(policy, 6), direction(policy, 7)
    found = slopes(SCORERS[name], losses, u, v, plus(u, v, -2.0), scaled(u, -1.0))
    size = float(found.norm())
    assert float((found[:, 2] - found[:, 0] + 2 * found[:, 1]).norm()) < 3 * TOLERANCE[name] * size + 1e-9
    assert float((found[:, 3] + found[:, 0]).norm()) < 3 * TOLERANCE[name] * size + 1e-9


@pytest.mark.parametrize("name", SCORERS)
def test_zero_direction_scores_zero_and_still_reports_the_losses(name: str):
    policy = small_policy()
    losses = candidate_losses(policy, GA(), ROWS)
    zero = {key: torch.zeros_like(value) for key, value in policy.trainable().items()}
    found = SCORERS[name].derivatives(losses, [zero], Quiet())
    assert torch.equal(found.derivatives, torch.zeros(6, 1, dtype=torch.float64))
    assert torch.allclose(found.losses, losses.values(), atol=1e-12)


@pytest.mark.parametrize("name", SCORERS)
def test_losses_reported_beside_the_scores_are_those_at_theta(name: str):
    policy = small_policy()
    losses = candidate_losses(policy, make_loss("npo", 0.1), ROWS)
    found = SCORERS[name].derivatives(losses, [direction(policy, 8)], Quiet())
    assert torch.allclose(found.losses, losses.values(), rtol=1e-3)


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("name", SCORERS)
def test_theta_is_restored_bit_for_bit(name: str, adapter: bool):
    policy = tiny_policy(adapter=adapter, lora_b_sd=0.1)
    before = policy.snapshot()
    u = {key: torch.ones_like(value) for key, value in policy.trainable().items()}
    slopes(SCORERS[name], candidate_losses(policy, GA(), ROWS[:3]), u)
    assert all(torch.equal(before[key], value) for key, value in policy.snapshot().items())


def test_theta_is_restored_after_an_error():
    policy = small_policy()
    before = policy.snapshot()

    def fail_while_shifted() -> None:
        with shifted(policy, direction(policy, 9), 0.1):
            assert not torch.equal(next(iter(before.values())), next(iter(policy.snapshot().values())))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_while_shifted()
    assert all(torch.equal(before[key], value) for key, value in policy.snapshot().items())


@dataclass(frozen=True)
class Poisoned(GA):
    """GA that breaks on answers of a given length."""

    length: int = 0

    def per_sample(self, answers: AnswerLogProbs, reference_sum: torch.Tensor | None) -> torch.Tensor:
        return torch.where(answers.count == self.length, torch.nan, answers.mean)


@pytest.mark.parametrize("name", ["central", "one_sided"])
def test_non_finite_candidate_is_named(name: str):
    policy = small_policy()
    encoded = candidate_losses(policy, GA(), ROWS).rows
    counts = [row.n_answer for row in encoded]
    unique = next(k for k in range(6) if counts.count(counts[k]) == 1)
    losses = candidate_losses(policy, Poisoned(length=counts[unique]), ROWS)
    with pytest.raises(NonFiniteError) as caught:
        slopes(SCORERS[name], losses, direction(policy, 10))
    assert caught.value.ids == [ROWS[unique].id]


def test_agreement_is_zero_for_exact_scores_large_for_a_flipped_sign_and_none_for_no_direction():
    policy = small_policy()
    losses, u = candidate_losses(policy, GA(), ROWS), direction(policy, 11)
    true = slopes(ForwardMode(), losses, u)
    assert agreement(losses, [u], true) == pytest.approx(0.0, abs=1e-12)
    assert agreement(losses, [u], -true) == pytest.approx(2.0)
    assert agreement(losses, [scaled(u, 0.0)], true) is None


@given(counts=st.tuples(st.integers(1, 3), st.integers(0, 3)))
@settings(max_examples=6)
def test_progress_adds_up_to_the_announced_passes(counts: tuple[int, int]):
    class Count(Quiet):
        done = 0

        def advance(self, n: int = 1, note: str = "") -> None:
            self.done += n

    policy = small_policy()
    losses = candidate_losses(policy, GA(), ROWS[: 2 + counts[1]])
    directions = [direction(policy, k) for k in range(counts[0])]
    for scorer in SCORERS.values():
        count = Count()
        scorer.derivatives(losses, directions, count)
        assert count.done == scorer.passes(len(directions)) * len(losses.rows)


@pytest.mark.parametrize("loss", ["ga", "npo"])
def test_chosen_step_changes_the_probed_losses_by_about_the_target_per_token(loss: str):
    policy = small_policy()
    losses, u = candidate_losses(policy, make_loss(loss, 0.1), ROWS), direction(policy, 12)
    step = choose_step(losses, u, target=0.005)
    with shifted(policy, u, step):
        above = losses.values()
    change = float((above - losses.values()).square().mean().sqrt())
    per_token = 1.0 if loss == "ga" else sum(row.n_answer for row in losses.rows) / len(losses.rows)
    assert change == pytest.approx(0.005 * per_token, rel=0.3)


def test_sections_name_their_scorers():
    for name, scorer in SCORERS.items():
        assert make_scorer(SolveSection(scorer=name)) == scorer  # type: ignore[arg-type]
    assert (Central(0.1).name, OneSided(0.2).name) == ("central(step=0.1)", "one_sided(step=0.2)")


def lora_gradients(policy: Policy) -> dict[str, float]:
    losses = candidate_losses(policy, GA(), ROWS)
    values = losses.of(range(len(ROWS)))
    gradients = torch.autograd.grad(values.mean(), list(policy.trainable().values()))
    return {name: float(g.norm()) for name, g in zip(policy.trainable(), gradients, strict=True)}


def test_at_the_start_of_lora_only_b_has_a_gradient():
    norms = lora_gradients(tiny_policy())
    assert all((value == 0.0) == (".lora_A." in name) for name, value in norms.items())


def test_score_along_a_block_equals_the_blocks_own_inner_product():
    policy = small_policy()
    losses, u = candidate_losses(policy, GA(), ROWS), direction(policy, 13)
    parts = []
    for chosen in u:
        only = {name: value if name == chosen else torch.zeros_like(value) for name, value in u.items()}
        assert dot(only, only) > 0
        parts.append(slopes(ForwardMode(), losses, only)[:, 0])
    assert torch.allclose(sum(parts), slopes(ForwardMode(), losses, u)[:, 0], rtol=1e-9)
