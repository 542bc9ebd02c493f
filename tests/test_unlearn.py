"""The inner problem through its one entry: weights, arms, schedule, resume, memory of the last solution."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from inner_oracle import dense_losses, encode_all, flat, relative
from tiny import examples, pairs, tiny_policy
from u2a.config import GuardSection, UnlearnSection
from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.modeling import Params, Policy
from u2a.types import Example, UnlearnResult
from u2a.unlearn import InnerProblem, InnerSolver, unlearn, weighted_rows

MODULE = importlib.import_module("u2a.unlearn")  # u2a.unlearn itself is the function
FORGET, RETAIN = examples(5), examples(6, start=40)
IDS = [row.id for row in FORGET]


def problem(**section) -> InnerProblem:
    settings = {"max_steps": 3, "batch_size": 2, "retain_batch_size": 2, "learning_rate": 1e-3}
    guard = GuardSection(ppl_budget_frac=10.0)
    return InnerProblem(FORGET, RETAIN[:3], RETAIN[3:], UnlearnSection(**(settings | section)), guard, seed=5)


def theta(weights, inner: InnerProblem | None = None) -> torch.Tensor:
    policy = tiny_policy()
    unlearn(policy, inner or problem(), weights)
    return flat(policy.snapshot())


@pytest.mark.parametrize(("loss", "term"), [("ga", "proximal"), ("grad_diff", "kl"), ("npo", "nll"), ("npo", "none")])
def test_every_loss_makes_the_answers_less_likely_and_says_what_it_did(loss: str, term: str, tmp_path: Path) -> None:
    policy = tiny_policy()
    items = encode_all(policy, FORGET)
    before = policy.reference_sums(items)
    inner = problem(loss=loss, retain_term=term, max_steps=6, retain_weight=0.5)
    result = unlearn(policy, inner, inner.uniform(), arm="full")
    assert policy.answer_sums(items).sum() < before.sum()
    name = "npo(beta=0.1)" if loss == "npo" else loss
    assert result.loss == name + ("" if term == "none" else f" + 0.5 {term}")
    assert (result.arm, result.n_samples, result.steps, result.steps_kept) == ("full", 5, 6, 6)
    assert [log.step for log in result.history] == [1, 2, 3, 4, 5, 6]
    assert all(log.loss is not None and log.grad_norm > 0 for log in result.history)
    assert UnlearnResult.load(result.save(tmp_path / "r.json")) == result


def test_the_first_logged_loss_is_the_dense_one() -> None:
    """Whole set in one batch, theta_0: sum omega_i l_i + lambda mean NLL, from single unpadded sequences."""
    policy = tiny_policy()
    items, retain = encode_all(policy, FORGET), encode_all(policy, RETAIN[:3])
    weights = [0.4, 0.3, 0.1, 0.1, 0.1]
    dense = dense_losses(policy.model, items, "ga", [0.0] * 5, 0.1).detach()
    nll = dense_losses(policy.model, retain, "sft", [0.0] * 3, 0.1).detach().mean()
    expected = float((torch.tensor(weights) * dense).sum() + 0.7 * nll)
    inner = problem(loss="grad_diff", retain_weight=0.7, batch_size=5, retain_batch_size=3, max_steps=1)
    result = unlearn(policy, inner, dict(zip(IDS, weights, strict=True)))
    assert result.history[0].loss == pytest.approx(expected, rel=1e-5)


def test_absent_and_zero_weights_are_the_same_and_their_scale_is_nothing() -> None:
    weights = {IDS[0]: 0.5, IDS[3]: 0.25, IDS[4]: 0.25}
    zero = dict.fromkeys(IDS, 0.0) | weights
    scaled = {name: 8 * weight for name, weight in weights.items()}
    removed = replace(problem(), forget=tuple(FORGET[k] for k in (0, 3, 4)))
    one = theta(weights)
    assert torch.equal(one, theta(zero))
    assert torch.equal(one, theta(scaled))
    assert torch.equal(one, theta(weights, removed))
    assert not torch.equal(one, theta(dict.fromkeys(weights, 1 / 3)))


def test_the_order_of_the_candidates_does_not_matter() -> None:
    inner = problem()
    turned = replace(inner, forget=tuple(reversed(FORGET)))
    assert torch.equal(theta(inner.uniform()), theta(turned.uniform(), turned))


def test_every_run_starts_from_theta_0() -> None:
    policy, inner = tiny_policy(), problem()
    unlearn(policy, inner, inner.uniform())
    once = flat(policy.snapshot())
    unlearn(policy, inner, {IDS[0]: 1.0})
    unlearn(policy, inner, inner.uniform())
    assert torch.equal(flat(policy.snapshot()), once)


def test_a_set_smaller_than_the_batch_is_one_full_batch() -> None:
    """One row: a batch of 1 whatever batch_size says, so no row is repeated to fill it."""
    one, two = (theta({IDS[0]: 1.0}, problem(batch_size=size, retain_term="none")) for size in (1, 64))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({}, "no candidate has positive weight"),
        (dict.fromkeys(IDS, 0.0), "no candidate has positive weight"),
        ({"nobody": 1.0}, "'nobody' is no candidate"),
        ({IDS[0]: -0.1}, "has weight -0.1"),
        ({IDS[0]: float("nan")}, "has weight nan"),
        ({IDS[0]: float("inf")}, "has weight inf"),
    ],
)
def test_bad_weights_are_refused_before_anything_is_changed(weights: dict[str, float], said: str) -> None:
    policy = tiny_policy(lora_b_sd=0.1)
    now = flat(policy.snapshot())
    with pytest.raises(ConfigError, match=said):
        unlearn(policy, problem(), weights)
    assert torch.equal(flat(policy.snapshot()), now)


def test_weighted_rows_carry_their_weights() -> None:
    rows = weighted_rows(FORGET, {IDS[2]: 0.25, IDS[0]: 0.75, IDS[1]: 0.0})
    assert {row.id: row.weight for row in rows} == {IDS[0]: 0.75, IDS[2]: 0.25}


# --- learning rate ----------------------------------------------------------------------------------


def rates(monkeypatch: pytest.MonkeyPatch, steps: int | None = None, **section) -> list[float]:
    """Learning rate of every step, of a whole run or of a shortened one."""
    seen: list[float] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(kwargs["optimizer"].param_groups[0]["lr"])
            return control

    real = MODULE.StepReporter

    class Both(Watch, real):  # type: ignore[misc,valid-type]
        pass

    monkeypatch.setattr(MODULE, "StepReporter", Both)
    inner = replace(problem(**{"retain_term": "none", "max_steps": 8} | section), guard_rows=())
    inner = inner if steps is None else inner.shortened(steps)
    unlearn(tiny_policy(), inner, inner.uniform())
    return [rate / 1e-3 for rate in seen]


def test_constant_rate_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(monkeypatch) == [1.0] * 8


def test_warm_up_rises_linearly_also_with_a_constant_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(monkeypatch, warmup_ratio=0.5) == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_a_warm_up_over_the_whole_run_is_not_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(monkeypatch, warmup_ratio=1.0) == pytest.approx([k / 8 for k in range(8)])


def test_a_run_of_one_step_has_no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(monkeypatch, warmup_ratio=0.5, max_steps=1) == [1.0]


@pytest.mark.parametrize("section", [{"warmup_ratio": 0.5}, {"lr_scheduler": "linear"}])
def test_the_short_run_before_scoring_has_the_full_rate(monkeypatch: pytest.MonkeyPatch, section: dict) -> None:
    assert rates(monkeypatch, steps=2, **section) == [1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falling_schedules_end_with_the_run(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    seen = rates(monkeypatch, lr_scheduler=schedule)
    assert seen[0] == 1.0
    assert all(late < early for early, late in zip(seen, seen[1:], strict=False))
    assert 0 < seen[-1] < 0.2


# --- resume -----------------------------------------------------------------------------------------


def test_an_interrupted_run_is_resumed_and_ends_the_same(tmp_path: Path) -> None:
    """Stopped by an error in the fourth step, resumed from the checkpoint of the third: bit for bit the whole run."""
    inner = problem(max_steps=6, save_steps=3, lr_scheduler="linear")
    whole = tiny_policy()
    unlearn(whole, inner, inner.uniform(), output_dir=tmp_path / "whole")

    class Fails:
        steps = 0

        def advance(self, n: int = 1, note: str = "") -> None:
            self.steps += n
            if self.steps == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearn(tiny_policy(), inner, inner.uniform(), output_dir=tmp_path / "cut", advance=Fails())
    (folder,) = (tmp_path / "cut").iterdir()
    assert re.fullmatch("[0-9a-f]{16}", folder.name)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    policy = tiny_policy()
    counted = Fails()
    result = unlearn(policy, inner, inner.uniform(), output_dir=tmp_path / "cut", advance=counted)
    assert counted.steps == 3
    assert result.steps == 6
    assert torch.equal(flat(policy.snapshot()), flat(whole.snapshot()))


@pytest.mark.parametrize("what", ["weights", "rate", "retain", "seed"])
def test_a_checkpoint_of_another_problem_is_not_resumed(tmp_path: Path, what: str) -> None:
    inner = problem(save_steps=1)
    unlearn(tiny_policy(), inner, inner.uniform(), output_dir=tmp_path)
    weights = inner.uniform() | ({IDS[0]: 0.9} if what == "weights" else {})
    other = {
        "weights": inner,
        "rate": problem(save_steps=1, learning_rate=2e-3),
        "retain": replace(inner, retain=RETAIN[:2]),
        "seed": replace(inner, seed=6),
    }[what]
    policy = tiny_policy()
    assert len(unlearn(policy, other, weights, output_dir=tmp_path).history) == 3
    assert torch.equal(flat(policy.snapshot()), theta(weights, other))
    assert len(list(tmp_path.iterdir())) == 2


def test_without_output_dir_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    unlearn(tiny_policy(), problem(), problem().uniform())
    assert list(tmp_path.iterdir()) == []


# --- the solver's memory ----------------------------------------------------------------------------


def test_the_same_problem_is_not_solved_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = MODULE.unlearn
    monkeypatch.setattr(MODULE, "unlearn", lambda *args: calls.append(args[3]) or real(*args))
    policy, inner = tiny_policy(), problem()
    solver = InnerSolver(policy)
    first = solver(inner, inner.uniform(), "u2a")
    once = flat(policy.snapshot())
    policy.reset()
    again = solver(inner, inner.uniform() | {IDS[0]: 0.2}, "copy")  # 1/5, and zeros do not count
    assert calls == ["u2a"]
    assert torch.equal(flat(policy.snapshot()), once)
    assert (first.arm, again.arm) == ("u2a", "copy")
    assert again == first.model_copy(update={"arm": "copy"})
    solver(inner, {IDS[0]: 1.0}, "one")
    solver(inner.shortened(1), {IDS[0]: 1.0}, "short")
    assert calls == ["u2a", "one", "short"]


def test_a_non_finite_loss_names_the_candidate() -> None:
    policy = tiny_policy()
    token = policy.tokenizer("§", add_special_tokens=False)["input_ids"][0]
    spoilt = Example(id="spoilt", prompt=pairs(1)[0].prompt, completion="§")
    policy.model.get_input_embeddings().weight.data[token] = float("nan")
    inner = InnerProblem((*FORGET, spoilt), section=UnlearnSection(loss="ga", retain_term="none", batch_size=6))
    with pytest.raises(NonFiniteError, match="non-finite loss in phase warm-up, step 0, sample spoilt:"):
        unlearn(policy, inner, inner.uniform(), arm="warm-up")
    assert torch.equal(flat(policy.snapshot()), flat(policy.theta0))
    assert relative(flat(policy.snapshot()), flat(policy.theta0)) == 0.0


def test_checkpoints_of_another_model_are_not_taken(tmp_path: Path) -> None:
    """The folder is that of the policy, too: of its weights, its adapter's start and its longest sequence."""
    section = UnlearnSection(retain_term="none", max_steps=4, batch_size=4, save_steps=2, learning_rate=1e-2)
    problem = InnerProblem(forget=examples(4), section=section)

    def solved(policy: Policy, folder: Path | None) -> Params:
        unlearn(policy, problem, problem.uniform(), output_dir=folder)
        return policy.snapshot()

    first = solved(tiny_policy(seed=0), tmp_path)
    alone, shared = solved(tiny_policy(seed=1), None), solved(tiny_policy(seed=1), tmp_path)
    assert all(torch.equal(shared[name], value) for name, value in alone.items())
    assert any(not torch.equal(first[name], value) for name, value in alone.items())
    again = solved(tiny_policy(seed=0), tmp_path)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    short = tiny_policy(seed=0, max_length=40)
    assert len({folder.name for folder in tmp_path.iterdir()}) == 2
    solved(short, tmp_path)
    assert len({folder.name for folder in tmp_path.iterdir()}) == 3


def test_candidates_that_weights_cannot_tell_apart_are_refused() -> None:
    rows = examples(4)
    with pytest.raises(DataError, match=rf"forget: 2 ids stand more than once, such as '{rows[0].id}' .remove"):
        InnerProblem((*rows, rows[0], rows[0], rows[2]))
