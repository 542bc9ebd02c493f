"""The collapse guard: a breach stops the run, and the policy is left within the budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState

from inner_oracle import alone, encode_all, flat, quiet
from tiny import examples, tiny_policy
from u2a.config import GuardSection, UnlearnSection
from u2a.guard import CollapseGuard, all_finite, largest_scale
from u2a.trainer import UnlearnTrainer
from u2a.unlearn import InnerProblem, unlearn

RETAIN = examples(4, start=40)


def reckless(**guard) -> InnerProblem:
    """GA at a rate that ruins the model within a few steps."""
    section = UnlearnSection(loss="ga", retain_term="none", learning_rate=3e-2, max_steps=8, batch_size=4)
    return InnerProblem(examples(4), (), RETAIN, section, GuardSection(**({"every_steps": 1} | guard)))


def careful(**guard) -> InnerProblem:
    """A run that changes next to nothing."""
    section = UnlearnSection(loss="npo", retain_term="none", learning_rate=1e-6, max_steps=4, batch_size=4)
    return InnerProblem(examples(4), (), RETAIN, section, GuardSection(**({"every_steps": 2} | guard)))


@given(st.floats(0.001, 0.999), st.integers(1, 12))
def test_bisection_stays_under_the_border_and_comes_near_it(border: float, evaluations: int) -> None:
    scale = largest_scale(lambda value: value > border, evaluations=evaluations)
    assert border - 2.0**-evaluations <= scale <= border


@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_bisection_returns_only_scales_seen_to_hold(answers: list[bool]) -> None:
    seen = {0.0: False}

    def breaks(scale: float) -> bool:
        seen[scale] = answers[len(seen) - 1]
        return seen[scale]

    assert not seen[largest_scale(breaks)]
    assert len(seen) == 7


def test_without_search_nothing_is_tried() -> None:
    assert largest_scale(pytest.fail, search=False) == 0.0  # type: ignore[arg-type]


def test_finite_check() -> None:
    assert all_finite([])
    assert all_finite([torch.ones(3), torch.full((2,), 1e30, dtype=torch.bfloat16)])
    for bad in ("nan", "inf", "-inf"):
        assert not all_finite([torch.ones(3), torch.tensor([1.0, float(bad)])])


def test_start_and_budget_are_perplexities_of_the_watched_rows() -> None:
    policy = tiny_policy()
    items = encode_all(policy, RETAIN)
    guard = CollapseGuard(policy, items, GuardSection(ppl_budget_frac=0.25, max_rows=3))
    tokens = torch.cat([alone(policy.model, item).detach() for item in items[:3]])
    assert guard.ppl_start == pytest.approx(float((-tokens.mean()).exp()), rel=1e-5)
    assert guard.ppl_budget == pytest.approx(1.25 * guard.ppl_start)


def test_the_start_is_theta_0_also_for_a_changed_policy() -> None:
    items = encode_all(tiny_policy(), RETAIN)
    changed, fresh = tiny_policy(lora_b_sd=0.2), tiny_policy()
    assert CollapseGuard(changed, items, GuardSection()).ppl_start == pytest.approx(fresh.perplexity(items), rel=1e-6)
    assert changed.perplexity(items) != pytest.approx(fresh.perplexity(items), rel=1e-2)


def test_line_search_lands_within_the_budget_and_near_its_border() -> None:
    policy = tiny_policy()
    result = unlearn(policy, reckless(line_search=True), reckless().uniform())
    items = encode_all(policy, RETAIN)
    assert result.breached
    assert result.steps < 8  # the run was stopped
    assert 0 < result.scale < 1
    assert result.steps_kept == result.steps
    assert result.retain_ppl_end == pytest.approx(policy.perplexity(items), rel=1e-6)
    assert result.retain_ppl_end <= result.ppl_budget == pytest.approx(1.1 * result.retain_ppl_start)
    with policy.change_scaled((result.scale + 2**-5) / result.scale):  # a little more breaks it
        assert policy.perplexity(items) > result.ppl_budget


def test_roll_back_returns_to_the_last_state_within_the_budget() -> None:
    """Without line search: bit for bit the parameters of the last good step, which a shorter run gives, too."""
    policy = tiny_policy()
    problem = reckless(line_search=False, ppl_budget_frac=0.3)
    problem = replace(problem, section=problem.section.model_copy(update={"learning_rate": 2e-3}))
    result = unlearn(policy, problem, problem.uniform())
    assert result.breached
    assert result.steps_kept >= 2
    assert result.scale == 1.0
    assert result.steps_kept == result.steps - 1
    assert policy.perplexity(encode_all(policy, RETAIN)) <= result.ppl_budget
    shorter = tiny_policy()
    unlearn(shorter, problem.shortened(result.steps_kept), problem.uniform())
    assert torch.equal(flat(policy.snapshot()), flat(shorter.snapshot()))


def test_a_budget_of_zero_undoes_a_harmful_run() -> None:
    policy = tiny_policy()
    problem = reckless(line_search=False, ppl_budget_frac=0.0)
    result = unlearn(policy, problem, problem.uniform())
    assert (result.breached, result.steps_kept) == (True, 0)
    assert torch.equal(flat(policy.snapshot()), flat(policy.theta0))
    assert result.retain_ppl_end == pytest.approx(result.retain_ppl_start)


def test_a_run_within_the_budget_is_left_alone() -> None:
    policy = tiny_policy()
    result = unlearn(policy, careful(), careful().uniform())
    assert (result.breached, result.scale, result.steps, result.steps_kept) == (False, 1.0, 4, 4)
    assert [log.step for log in result.history if log.retain_ppl is not None] == [2, 4]
    free = tiny_policy()
    unlearn(free, careful().shortened(4), careful().uniform())
    assert torch.equal(flat(policy.snapshot()), flat(free.snapshot()))


def test_the_end_is_measured_also_between_intervals() -> None:
    for every in (0, 3):
        result = unlearn(tiny_policy(), careful(every_steps=every), careful().uniform())
        assert result.history[-1].retain_ppl == result.retain_ppl_end


def test_a_breach_seen_only_at_the_end_counts() -> None:
    problem = reckless(every_steps=0)
    policy = tiny_policy()
    result = unlearn(policy, problem, problem.uniform())
    assert (result.breached, result.steps) == (True, 8)
    assert policy.perplexity(encode_all(policy, RETAIN)) <= result.ppl_budget


def test_a_total_collapse_is_a_breach_and_not_a_number_in_the_record(tmp_path: Path) -> None:
    """An infinite perplexity is recorded as missing; the record can still be saved."""
    policy = tiny_policy()
    guard = CollapseGuard(policy, encode_all(policy, RETAIN), GuardSection())
    policy.perplexity = lambda rows: float("nan")  # type: ignore[method-assign]
    assert not guard.measure(1)
    assert guard.breached
    assert guard.measured == {1: float("inf")}
    problem = reckless()
    broken = tiny_policy()
    real = broken.perplexity
    broken.perplexity = lambda rows: float("inf") if float(broken.change_sq()) > 0.05 else real(rows)  # type: ignore
    result = unlearn(broken, problem, problem.uniform())
    assert result.breached
    assert result.history[-1].retain_ppl is None
    result.save(tmp_path / "result.json")


def test_the_trainer_guards_by_itself_with_a_retain_set(tmp_path: Path) -> None:
    def run(**changes) -> UnlearnTrainer:
        args = quiet(tmp_path, loss="ga", learning_rate=3e-2, max_steps=8, guard_steps=1, **changes)
        trainer = UnlearnTrainer(tiny_policy(), None, args, list(examples(4)), RETAIN)
        trainer.train()
        return trainer

    guarded = run()
    assert guarded.guard_result is not None
    assert guarded.guard_result.breached
    assert guarded.guard_result.ppl_end <= guarded.guard_result.ppl_budget
    items = encode_all(guarded.policy, RETAIN)
    assert guarded.policy.perplexity(items) == pytest.approx(guarded.guard_result.ppl_end, rel=1e-6)
    free = run(guard=False)
    assert free.guard_result is None
    assert free.policy.perplexity(items) > guarded.guard_result.ppl_budget


def with_b(value: float) -> tuple[CollapseGuard, dict[str, torch.Tensor]]:
    """A guard whose perplexity is a made-up function of the change, and a direction of the adapter."""
    policy = tiny_policy()
    direction = {name: torch.full_like(v, value) if ".lora_B." in name else v for name, v in policy.theta0.items()}
    guard = CollapseGuard(policy, encode_all(policy, RETAIN), GuardSection())
    policy.perplexity = lambda rows: guard.ppl_start * (1.0 + (not state_is_fine(policy)))  # type: ignore
    return guard, direction


def state_is_fine(policy) -> bool:
    """Within the budget: B not positive (any size), or positive up to 0.01."""
    return max(float(v.max()) for name, v in policy.trainable().items() if ".lora_B." in name) <= 0.01


@pytest.mark.parametrize(("kept_b", "wins"), [(-0.02, True), (-0.005, False)], ids=["kept", "scaled"])
def test_of_the_kept_and_the_scaled_state_the_larger_change_stays(kept_b: float, wins: bool) -> None:
    """The final change is 0.016 and breaks above 0.01; scaled down it is 0.00975."""
    guard, kept = with_b(kept_b)
    policy = guard.policy
    policy.restore(kept)
    assert guard.measure(4)
    size = float(policy.change_sq())
    policy.restore(with_b(0.016)[1])
    whole = float(policy.change_sq())
    assert not guard.measure(5)
    result = guard.settle(5)
    assert result.breached
    assert result.ppl_end <= result.ppl_budget
    assert (result.steps_kept, result.scale) == ((4, 1.0) if wins else (5, 0.609375))
    assert float(policy.change_sq()) == pytest.approx(size if wins else whole * 0.609375**2, rel=1e-5)
    assert float(policy.change_sq()) >= min(size, whole * 0.609375**2)


def test_a_fresh_run_forgets_the_last_one_and_a_resumed_run_does_not(tmp_path: Path) -> None:
    guard, direction = with_b(0.016)
    guard.policy.restore(direction)
    guard.measure(3)
    assert (guard.breached, list(guard.measured)) == (True, [3])
    state = TrainerState(global_step=3)
    guard.on_train_begin(quiet(tmp_path), state, TrainerControl())
    assert (guard.breached, list(guard.measured)) == (True, [3])
    state.global_step = 0
    guard.on_train_begin(quiet(tmp_path), state, TrainerControl())
    assert (guard.breached, guard.measured) == (False, {})


def test_a_second_training_is_judged_by_itself(tmp_path: Path) -> None:
    args = quiet(tmp_path, loss="ga", learning_rate=3e-2, max_steps=8, guard_steps=1)
    trainer = UnlearnTrainer(tiny_policy(), None, args, list(examples(4)), RETAIN)
    trainer.train()
    assert trainer.guard_result is not None
    assert trainer.guard_result.breached
    trainer.policy.reset()
    args.learning_rate, args.max_steps = 1e-7, 2
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert (trainer.guard_result.breached, trainer.guard_result.steps_kept) == (False, 2)
