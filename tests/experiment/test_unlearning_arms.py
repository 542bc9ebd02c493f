"""Every rule of the negatives track against a direct computation, and the budget that stops the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from small_experiment import equal_length, small_setting

from u2a.bilevel.solve import score
from u2a.errors import ConfigError
from u2a.experiment.arm import Trained
from u2a.experiment.by_reward import rewards_of
from u2a.experiment.cell import Course, LevelResult
from u2a.experiment.measured import Measured
from u2a.experiment.meter import Meter
from u2a.experiment.setting import Setting
from u2a.experiment.unlearning_arms import (
    UNLEARNING_ARMS,
    inner_problem,
    losses_of,
    outer_problem,
    retain_gains,
    tuned,
)

NOTHING = Measured(margin={}, hit={}, retain_nll={}, retain_tokens={})


class Steps:
    """A budget of a number of optimiser steps that notes the FLOPs at every call."""

    def __init__(self, meter: Meter, steps: int) -> None:
        self.meter, self.most, self.seen = meter, steps, []

    def left(self) -> bool:
        return not self.seen or self.seen[-1][0] < self.most

    def reached(self, steps: int = 0) -> None:
        self.seen.append((steps, self.meter.flops))


def run(method: str, setting: Setting, steps: int = 2, trial: Mapping[str, float] | None = None):
    meter = Meter()
    budget = Steps(meter, steps)
    trained: Trained = UNLEARNING_ARMS[method].train(setting, trial or {}, meter, budget)
    return trained, meter, budget


def weights(method: str, setting: Setting | None = None) -> dict[str, float]:
    trained, _, _ = run(method, setting or small_setting(), 0)
    assert trained.selection is not None
    return trained.selection.weights


def test_full_and_random_have_equal_weights() -> None:
    ids = {row.id for row in small_setting().partition.forget}
    assert weights("full") == dict.fromkeys(ids, 1 / 12)
    drawn = [weights("random_k", small_setting(seed)) for seed in range(4)]
    assert all(set(each.values()) == {0.25} and len(each) == 4 and set(each) <= ids for each in drawn)
    assert len({frozenset(each) for each in drawn}) > 1
    assert weights("random_k") == drawn[0]


def test_lowest_reward_takes_the_longest_answers() -> None:
    setting = small_setting()  # its reward is minus the length
    by_hand = sorted(setting.partition.forget, key=lambda row: (-len(row.completion), row.id))[:4]
    assert weights("lowest_reward_k", setting) == {row.id: 0.25 for row in by_hand}
    assert rewards_of(setting, by_hand) == {row.id: -float(len(row.completion)) for row in by_hand}


def test_as_many_lowest_rewards_as_u2a_takes_free_of_charge() -> None:
    setting = small_setting(solve={"fallback": "none"})
    taken = len(weights("u2a", setting))
    rewards = rewards_of(setting, setting.partition.forget)
    by_hand = sorted(rewards, key=lambda name: (rewards[name], name))[:taken]
    trained, meter, _ = run("lowest_reward_as_u2a", setting, 2)
    plain, plain_meter, _ = run("lowest_reward_k", setting, 2)
    assert trained.selection is not None and trained.selection.weights == dict.fromkeys(by_hand, 1 / taken)
    assert plain.selection is not None and trained.steps == plain.steps == 2
    assert meter.spent().flops.keys() == plain_meter.spent().flops.keys()
    if taken == len(plain.selection.weights):
        assert meter.spent().flops == plain_meter.spent().flops


def test_as_many_lowest_rewards_as_u2a_takes_pay_for_their_own_references() -> None:
    same = {"solve": {"fallback": "none"}, "unlearn": {"loss": "npo", "retain_term": "none"}}
    spent = {}
    for name in ("lowest_reward_as_u2a", "lowest_reward_k"):
        trained, meter, _ = run(name, small_setting(forget=equal_length(12), **same), 2)
        assert trained.selection is not None
        spent[name] = meter.spent().flops["reference"] / len(trained.selection.weights)
    assert (
        spent["lowest_reward_as_u2a"] == pytest.approx(spent["lowest_reward_k"], rel=0.1)
        and spent["lowest_reward_k"] > 0
    )


def test_highest_loss_takes_the_rows_with_the_largest_loss_of_transformers() -> None:
    setting = small_setting()
    losses = {}
    for row in setting.partition.forget:
        item = setting.policy.encoder.encode(row.prompt, row.completion, row.source)
        ids = torch.tensor([item.input_ids])
        labels = ids.clone()
        labels[:, : ids.shape[1] - item.n_answer] = -100
        with torch.no_grad():
            losses[row.id] = float(setting.policy.model(input_ids=ids, labels=labels).loss)
    assert losses_of(setting, setting.partition.forget) == pytest.approx(losses, rel=1e-5)
    assert set(weights("highest_loss_k", setting)) == set(sorted(losses, key=lambda name: -losses[name])[:4])


def test_top_and_bottom_are_the_two_ends_of_one_ranking() -> None:
    setting = small_setting()
    problem = inner_problem(setting, setting.config.unlearn)
    table = score(setting.policy, problem, outer_problem(setting, problem), setting.console)
    ranked = [row.id for row in sorted(table.rows, key=lambda row: -row.gain)]
    assert set(weights("top_k")) == set(ranked[:4])
    assert set(weights("bottom_k")) == set(ranked[-4:])
    rest = small_setting(solve={"n_selected": 8})
    assert set(weights("bottom_k", rest)) == set(ranked) - set(ranked[:4])


def gradient(setting: Setting, value: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(value, list(setting.policy.trainable().values()), allow_unused=True)
    live = setting.policy.trainable().values()
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, live, strict=True)]
    )


def test_the_guard_rule_ranks_by_the_inner_product_with_the_retain_gradient() -> None:
    setting = small_setting()
    problem = inner_problem(setting, setting.config.unlearn)
    gains = {row.id: row.gain for row in retain_gains(setting, problem).rows}  # the policy stays after the warm-up
    encode = setting.policy.encoder.encode
    retain = [encode(row.prompt, row.completion, row.source) for row in problem.retain]
    utility = torch.stack([setting.policy.log_probs([item]).mean[0] for item in retain]).mean()
    towards = gradient(setting, utility)
    dense = {}
    for row in problem.forget:
        loss = setting.policy.log_probs([encode(row.prompt, row.completion, row.source)]).mean[0]  # GA's, per token
        dense[row.id] = -float(gradient(setting, loss) @ towards)
    size = max(abs(value) for value in dense.values())
    assert gains == pytest.approx(dense, rel=1e-2, abs=1e-2 * size)
    best = sorted(dense, key=lambda name: -dense[name])[:4]
    assert set(weights("guard_k")) == set(best)


def test_u2a_selects_at_most_k_and_says_how_reliable_it_is() -> None:
    trained, meter, _ = run("u2a", small_setting(solve={"fallback": "none"}), 1)
    selection = trained.selection
    assert selection is not None and selection.reliability is not None and selection.fallback == "none"
    assert 0 < len(selection.weights) <= 4
    assert math.fsum(selection.weights.values()) == pytest.approx(1.0)
    assert selection.reliability.n_candidates == 12 and selection.reliability.n_pairs == 8
    assert meter.spent().flops["select"] > 0


def test_u2a_without_signal_says_that_it_drew_at_random() -> None:
    trained, _, _ = run("u2a", small_setting(solve={"fallback": "random_k", "folds": 2}), 1)
    assert trained.selection is not None
    if trained.selection.fallback == "random_k":
        assert "random draw" in trained.note and set(trained.selection.weights.values()) == {0.25}
    elif trained.selection.fallback == "empty":
        assert trained.steps == 0 and "nothing chosen" in trained.note


def test_the_prefilter_scores_only_candidates_of_low_reward() -> None:
    setting = small_setting(reward={"prefilter_frac": 0.5}, solve={"fallback": "none"})
    rewards = rewards_of(setting, setting.partition.forget)
    low = set(sorted(rewards, key=lambda name: (rewards[name], name))[:6])
    trained, meter, _ = run("u2a", setting, 1)
    assert trained.selection is not None and set(trained.selection.weights) <= low
    assert trained.selection.reliability is not None and trained.selection.reliability.n_candidates == 6
    assert "reward" in meter.spent().flops


def test_below_the_midpoint_all_are_unlearned_or_scored() -> None:
    setting = small_setting(reward={"prefilter_below": "midpoint"}, solve={"fallback": "none", "n_selected": 12})
    rewards = rewards_of(setting, setting.partition.forget)
    pairs = setting.partition.preference
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    middle = -sum(map(len, answers)) / len(answers)  # the shortest answer is the best one here
    low = {name for name, reward in rewards.items() if reward < middle}
    assert 0 < len(low) < len(rewards)
    alone, meter, _ = run("below_midpoint", setting, 0)
    assert alone.selection.weights == pytest.approx(dict.fromkeys(low, 1 / len(low)))
    assert meter.spent().flops == {"reward": 0}  # a Python function computes no products
    chosen, _, _ = run("u2a", setting, 1)
    assert set(chosen.selection.weights) <= low and chosen.selection.reliability.n_candidates == len(low)
    every = replace(setting, partition=setting.partition.model_copy(update={"preference": ()}))
    with pytest.raises(ConfigError, match="midpoint needs preference pairs"):
        run("below_midpoint", every, 0)


def test_selections_are_charged_and_free_choices_are_not() -> None:
    charged = {name: run(name, small_setting(), 0)[1].spent().flops for name in UNLEARNING_ARMS if name != "retrain"}
    assert charged["original"] == charged["full"] == charged["random_k"] == {}
    assert charged["lowest_reward_k"] == {"reward": 0}  # a Python function computes no products
    assert charged["highest_loss_k"]["select"] > 0
    assert charged["top_k"] == charged["bottom_k"]
    assert charged["top_k"]["select"] > charged["highest_loss_k"]["select"]


def test_the_late_random_draw_is_the_same_draw_and_pays_for_a_scoring() -> None:
    late, early, scored = (run(name, small_setting(), 0) for name in ("random_k_late", "random_k", "top_k"))
    assert late[0].selection.weights == early[0].selection.weights
    assert late[1].spent().flops["select"] == scored[1].spent().flops["select"] > 0


@pytest.mark.parametrize("loss", ["ga", "npo"])
def test_arms_of_equal_shapes_differ_in_weights_alone(loss: str) -> None:
    rows = equal_length(12)
    spent = {}
    for method in ("random_k", "lowest_reward_k", "highest_loss_k", "top_k", "u2a"):
        setting = small_setting(0, rows, unlearn={"loss": loss}, solve={"fallback": "none"})
        trained, meter, _ = run(method, setting, 3)
        assert trained.selection is not None
        if len(trained.selection.weights) == 4:
            spent[method] = meter.spent().flops["train"]
            assert trained.steps == 3
    assert len(spent) >= 4
    assert max(spent.values()) <= 1.01 * min(spent.values())


def test_full_takes_the_same_steps_as_a_selection_of_the_same_batch_size() -> None:
    rows = equal_length(12)
    flops = {name: run(name, small_setting(0, rows), 3)[1].spent().flops["train"] for name in ("full", "random_k")}
    assert flops["full"] == pytest.approx(flops["random_k"], rel=0.01)


def measured_course(setting: Setting, levels: tuple[float, ...], unit: int, measure=None) -> tuple[Trained, Course]:
    meter = Meter()
    course = Course(meter, unit, levels, measure or (lambda policy, full: (NOTHING, False)))
    trained = UNLEARNING_ARMS["full"].train(setting, {}, meter, course)
    course.finish(trained.steps)
    return trained, course


def test_an_arm_stops_at_the_first_step_past_the_last_level() -> None:
    _, _, budget = run("full", small_setting(), 6)
    per_step = budget.seen[2][1] - budget.seen[1][1]
    trained, course = measured_course(small_setting(), (1.0, 2.0, 3.5), per_step * 2)
    results: list[LevelResult] = course.results
    spent = [result.spent.total_flops for result in results]
    assert [result.level for result in results] == [1.0, 2.0, 3.5] and all(result.reached for result in results)
    assert spent == sorted(spent) and all(a >= r.level * per_step * 2 for a, r in zip(spent, results, strict=True))
    flops = [at for _, at in budget.seen]  # the same steps, seen one by one
    steps = [result.steps for result in results]
    assert steps == sorted(steps) and trained.steps == steps[-1]
    for result in results:
        before = flops[flops.index(result.spent.total_flops) - 1] if result.spent.total_flops in flops else 0
        assert before < result.level * per_step * 2


def test_measuring_on_the_way_leaves_the_training_as_it_was() -> None:
    plain, disturbed = small_setting(), small_setting()

    def measure(policy: object, full: bool) -> tuple[Measured, bool]:
        pairs = disturbed.partition.evaluation
        encode = disturbed.policy.encoder.encode
        disturbed.policy.answer_sums([encode(pair.prompt, pair.chosen, pair.source) for pair in pairs])
        return NOTHING, False

    _, _, budget = run("full", small_setting(), 4)
    unit = budget.seen[-1][1] // 4
    a, first = measured_course(plain, (4.0,), unit)
    b, second = measured_course(disturbed, (1.0, 2.0, 3.0, 4.0), unit, measure)
    assert a.steps == b.steps
    assert first.results[-1].spent.flops == second.results[-1].spent.flops  # what was measured is not charged
    left, right = plain.policy.snapshot(), disturbed.policy.snapshot()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert any(not torch.equal(left[name], plain.policy.theta0[name]) for name in left)


def test_levels_that_a_selection_has_spent_hold_the_start() -> None:
    setting, meter = small_setting(), Meter()
    changed = []

    def measure(policy: object, full: bool) -> tuple[Measured, bool]:
        changed.append(float(setting.policy.change_sq()))
        return NOTHING, changed[-1] == 0.0

    course = Course(meter, 1000, (1.0, 2.0), measure)
    trained = UNLEARNING_ARMS["top_k"].train(setting, {}, meter, course)
    assert trained.steps == 0 and "spent the budget" in trained.note
    assert changed == [0.0] and [result.untrained for result in course.results] == [True, True]
    assert [result.steps for result in course.results] == [0, 0]


def test_an_arm_that_ends_by_itself_is_measured_at_its_end_once() -> None:
    calls = []
    meter = Meter()
    course = Course(meter, 10, (1.0, 2.0), lambda policy, full: (calls.append(full), (NOTHING, True))[1], (2.0,))
    trained = UNLEARNING_ARMS["original"].train(small_setting(), {}, meter, course)
    course.finish(trained.steps)
    assert calls == [True] and [result.reached for result in course.results] == [False, False]


def test_trials_change_numbers_of_the_section_and_nothing_else() -> None:
    section = small_setting().config.unlearn
    assert tuned(section, {"learning_rate": 0.5}) == section.model_copy(update={"learning_rate": 0.5})
    for bad in ({"beta": 0.1}, {"loss": 1.0}, {"learning_rate": -1.0}):
        with pytest.raises(ConfigError, match="trial: "):
            tuned(section, bad)
    slow, fast = small_setting(), small_setting()
    run("full", slow, 2, {"learning_rate": 1e-4})
    run("full", fast, 2, {"learning_rate": 1e-2})
    assert float(fast.policy.change_sq()) > float(slow.policy.change_sq()) > 0


def test_retrain_needs_a_start_that_knew_the_candidates() -> None:
    with pytest.raises(ConfigError, match="finetune"):
        run("retrain", small_setting())
