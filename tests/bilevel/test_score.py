"""Scorers against one backward pass per sample, and what a score must not depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import candidate_losses, direction, loss_by_hand, small_policy, theta_of
from torch.overrides import TorchFunctionMode

from tiny import examples, pairs, tiny_model, tiny_policy, tiny_tokenizer
from u2a.bilevel.backward import BatchedBackward
from u2a.bilevel.candidates import CandidateLosses, Sample, Slopes, exact_sample, losses_at_reference, shifted
from u2a.bilevel.differences import Central, OneSided, choose_step
from u2a.bilevel.forward_mode import ForwardMode
from u2a.bilevel.objective import Margin, objective_gradient, objective_values
from u2a.bilevel.score import Scorer, agreement, make_scorer, score_all
from u2a.bilevel.vectors import dot, plus, scaled
from u2a.config import AdapterConfig, SolveSection
from u2a.errors import ConfigError, NonFiniteError
from u2a.losses import GA, make_loss
from u2a.modeling import AnswerLogProbs, Policy
from u2a.progress import Console, Quiet
from u2a.reference.dense import flatten, per_sample_gradients

QUIET = Console(quiet=True)
ROWS = examples(6)
SCORERS = {"backward": BatchedBackward(), "central": Central(), "one_sided": OneSided(), "jvp": ForwardMode()}
TOLERANCE = {"backward": 1e-9, "central": 5e-3, "one_sided": 2e-2, "jvp": 1e-9}


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
    assert agreement(exact_sample(losses, [u]), found[:, None]) == pytest.approx(error(found, true), abs=0.02)


@settings(max_examples=8)
@given(order=st.permutations(range(6)), budget=st.sampled_from([1, 90, 1000]), name=st.sampled_from(list(SCORERS)))
def test_scores_do_not_depend_on_order_batches_or_padding(order: list[int], budget: int, name: str):
    policy = small_policy()
    u = direction(policy, 4)
    scorer = SCORERS | {"central": Central(1e-3), "one_sided": OneSided(1e-3)}
    first = slopes(scorer[name], candidate_losses(policy, GA(), ROWS), u)[:, 0]
    policy.token_budget = budget
    second = slopes(scorer[name], candidate_losses(policy, GA(), [ROWS[k] for k in order]), u)[:, 0]
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
    assert torch.allclose(found.losses, losses.values(), rtol=2e-3)


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("name", ["central", "one_sided", "jvp"])
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


@pytest.mark.parametrize("name", ["backward", "central", "one_sided"])
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
    true = slopes(ForwardMode(), losses, u, direction(policy, 12))
    sample = Sample([4, 0, 2], true[[4, 0, 2]])
    everything = Sample([5, 4, 3, 2, 1, 0], true.flip(0))
    assert agreement(sample, true) == 0.0
    assert agreement(everything, -true) == pytest.approx(2.0)
    assert agreement(everything, true * torch.tensor([1.0, 1.3])) == pytest.approx(0.3 / 1.3)
    assert agreement(Sample([0], 0.0 * true[:1]), true) is None


def test_a_direction_along_which_the_sample_hardly_moves_is_measured_against_all_candidates():
    true = torch.tensor([[1.0], [1.0], [1e-9]], dtype=torch.float64)
    found = torch.tensor([[1.0], [1.0], [1e-3]], dtype=torch.float64)
    assert agreement(Sample([2], true[2:]), found) == pytest.approx(1e-3 * (3 / 2) ** 0.5, rel=1e-3)


@settings(max_examples=8)
@given(n=st.integers(1, 6), size=st.integers(1, 8))
def test_sample_holds_different_candidates_and_their_inner_products(n: int, size: int):
    policy = small_policy()
    u, v = direction(policy, 1), direction(policy, 2, length=4.0)
    sample = exact_sample(candidate_losses(policy, GA(), ROWS[:n]), [u, v], size)
    assert len(set(sample.indices)) == len(sample.indices) == min(n, size)
    expected = exact("ga")[sample.indices] @ torch.stack([flatten(u), flatten(v)], 1)
    assert torch.allclose(sample.derivatives, expected, rtol=1e-9, atol=1e-12)


class Rows:
    """Counts the sequences that pass through a policy's model."""

    def __init__(self, policy: Policy) -> None:
        self.count = 0
        policy.model.get_base_model().lm_head.register_forward_hook(self.add)  # type: ignore[operator]

    def add(self, module: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        self.count += out.shape[0]


def test_choosing_steps_and_checking_them_costs_two_sequences_of_96():
    policy = small_policy()
    losses = candidate_losses(policy, GA(), examples(96))
    directions, seen = [direction(policy, 1), direction(policy, 2)], Rows(policy)
    scoring = score_all(SolveSection(scorer="central"), losses, directions, QUIET)
    assert seen.count == 4 * 96 + 2
    assert scoring.error is not None and 0.0 < scoring.error < 1e-2


# --- losses known already -----------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ga", "npo", "sft"])
def test_losses_at_theta_0_follow_from_the_reference(loss: str):
    policy = small_policy(reached=False)
    losses = candidate_losses(policy, make_loss(loss, 0.1), ROWS)
    assert torch.allclose(losses_at_reference(losses), losses.values(), rtol=1e-6)
    if loss == "npo":
        assert torch.allclose(losses_at_reference(losses), torch.tensor(20.0 * math.log(2.0)).double(), rtol=1e-7)


@pytest.mark.parametrize("loss", ["ga", "npo"])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_one_sided_differences_from_the_reference_need_one_forward_and_are_as_exact(loss: str, budget: int):
    """The reference was summed in other batches, in float32: its round-off stays far below the difference."""
    policy = tiny_policy()
    rows = examples(12)
    losses = candidate_losses(policy, make_loss(loss, 0.1), rows)
    policy.reference_sums(losses.rows)
    policy.token_budget = budget
    generator = torch.Generator().manual_seed(0)
    u = {key: torch.randn(value.shape, generator=generator) for key, value in policy.trainable().items()}
    true = slopes(ForwardMode(), losses, u)
    seen = Rows(policy)
    found = OneSided().derivatives(losses, [u], Quiet())
    assert seen.count == 12 + 2
    again = OneSided().derivatives(replace(losses, known=losses.values()), [u], Quiet())
    assert error(found.derivatives, true) < 0.05
    assert error(found.derivatives, again.derivatives) < 2e-3
    assert torch.allclose(found.losses, again.losses, rtol=1e-5)


def test_known_losses_are_used_as_they_are_and_follow_their_candidates():
    policy = small_policy()
    values = torch.arange(6.0, dtype=torch.float64)
    losses = replace(candidate_losses(policy, GA(), ROWS), known=values)
    assert torch.equal(losses.base(Quiet()), values)
    assert torch.equal(losses.subset([3, 1]).base(Quiet()), values[[3, 1]])
    assert losses.base_is_known() and not candidate_losses(policy, GA(), ROWS).base_is_known()


def test_away_from_theta_0_and_for_a_loss_of_the_users_own_nothing_is_known():
    moved, start = small_policy(), small_policy(reached=False)
    npo = make_loss("npo", 0.1)
    assert candidate_losses(start, npo, ROWS).base_is_known()
    assert not candidate_losses(moved, npo, ROWS).base_is_known()
    assert not candidate_losses(start, Poisoned(), ROWS).base_is_known()
    with shifted(start, direction(start, 1), 1e-6):
        losses = candidate_losses(start, npo, ROWS)
        assert not losses.base_is_known()
        assert torch.equal(losses.base(Quiet()), losses.values())


def test_losses_out_of_date_show_as_disagreement_and_all_is_scored_exactly():
    policy = small_policy()
    u = direction(policy, 3)
    losses = replace(candidate_losses(policy, GA(), ROWS), known=candidate_losses(policy, GA(), ROWS).values() + 0.01)
    scoring = score_all(SolveSection(scorer="one_sided"), losses, [u], QUIET)
    assert scoring.scorer.startswith("backward (one_sided was off by ")
    assert error(scoring.slopes.derivatives[:, 0], exact("ga") @ flatten(u)) < 1e-9


# --- steps, kernels, names ----------------------------------------------------------------------


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
    step = choose_step(losses, exact_sample(losses, [u], size=6).derivatives[:, 0], target=0.005)
    with shifted(policy, u, step):
        above = losses.values()
    change = float((above - losses.values()).square().mean().sqrt())
    per_token = 1.0 if loss == "ga" else sum(row.n_answer for row in losses.rows) / len(losses.rows)
    assert change == pytest.approx(0.005 * per_token, rel=0.3)


class NoForwardMode(torch.autograd.Function):
    """Stands for a kernel such as a 4-bit product: it has a backward, and no forward mode."""

    @staticmethod
    def forward(ctx, x):  # noqa: ANN001, ANN205
        return x.clone()

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        return g


def test_differences_are_checked_on_a_kernel_without_forward_mode():
    policy = small_policy()
    losses, u = candidate_losses(policy, GA(), ROWS), direction(policy, 11)
    policy.model.get_base_model().lm_head.register_forward_hook(lambda module, args, out: NoForwardMode.apply(out))
    with pytest.raises(RuntimeError):
        slopes(ForwardMode(), losses, u)
    for name in ("central", "backward"):
        scoring = score_all(SolveSection(scorer=name), losses, [u], QUIET)  # type: ignore[arg-type]
        assert scoring.scorer == name
        assert (scoring.error is None) == (name == "backward")
        assert error(scoring.slopes.derivatives[:, 0], exact("ga") @ flatten(u)) < 5e-3


def sixteen_bit_policy() -> Policy:
    policy = Policy(tiny_model(2).bfloat16(), tiny_tokenizer(), AdapterConfig(r=4, alpha=8.0), seed=2)
    generator = torch.Generator().manual_seed(3)
    for name, value in policy.trainable().items():
        if ".lora_B." in name:
            value.data.copy_(0.05 * torch.randn(value.shape, generator=generator))
    return policy


@pytest.mark.parametrize("name", ["central", "one_sided"])
def test_a_16_bit_base_is_scored_exactly_since_differences_would_be_rounding_noise(name: str):
    policy = sixteen_bit_policy()
    rows = examples(10)
    losses = candidate_losses(policy, GA(), rows)
    generator = torch.Generator().manual_seed(0)
    u = {key: torch.randn(value.shape, generator=generator) for key, value in policy.trainable().items()}
    scoring = score_all(SolveSection(scorer=name), losses, [u], QUIET)  # type: ignore[arg-type]
    assert (scoring.scorer, scoring.error) == ("backward (16-bit base)", None)
    wide = Policy(tiny_model(2).bfloat16().float(), tiny_tokenizer(), AdapterConfig(r=4, alpha=8.0), seed=2)
    wide.restore(policy.snapshot())
    true = slopes(ForwardMode(), candidate_losses(wide, GA(), rows), u)[:, 0]
    off = error(scoring.slopes.derivatives[:, 0], true)
    assert off < 0.02
    assert error(slopes(SCORERS[name], losses, u)[:, 0], true) > 5 * off


def test_autocast_counts_as_16_bits_and_a_quantised_base_does_not():
    central = SolveSection(scorer="central")
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(central, small_policy()) == BatchedBackward("backward (16-bit base)")
        assert chosen(central, tiny_policy(adapter=False)) == ForwardMode("jvp (16-bit base)")
    policy = sixteen_bit_policy()
    assert chosen(SolveSection(scorer="jvp"), policy) == ForwardMode()
    policy.model.get_base_model().is_loaded_in_4bit = True
    assert chosen(central, policy) == Central()


def test_differences_far_off_are_replaced_by_exact_derivatives(monkeypatch: pytest.MonkeyPatch):
    policy = small_policy()
    losses, u = candidate_losses(policy, GA(), ROWS), direction(policy, 3)
    plain = Central.derivatives
    noise = torch.tensor([[3.0], [-2.0], [1.0], [-1.0], [2.0], [-3.0]], dtype=torch.float64)

    def noisy(self: Central, *rest: Any) -> Slopes:
        found = plain(self, *rest)
        return Slopes(found.derivatives * (1.0 + size * noise), found.losses, found.sample)

    monkeypatch.setattr(Central, "derivatives", noisy)
    central = SolveSection(scorer="central")
    size = 0.01
    kept = score_all(central, losses, [u], QUIET)
    assert kept.scorer == "central"
    assert kept.error is not None and 0.0 < kept.error < 0.2
    size = 1.0
    redone = score_all(central, losses, [u], QUIET)
    assert redone.scorer.startswith("backward (central was off by ")
    assert redone.error is None
    assert error(redone.slopes.derivatives[:, 0], exact("ga") @ flatten(u)) < 1e-9


class CpuFirst(TorchFunctionMode):
    """Refuses ``.double()`` on a tensor not yet brought to the CPU, as Apple's mps does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            out.was_moved = True
        if func is torch.Tensor.double:
            assert getattr(args[0], "was_moved", False), "float64 on the device"
        return out


def test_float64_is_used_on_the_cpu_only():
    policy = tiny_policy(lora_b_sd=0.1)
    losses = candidate_losses(policy, GA(), ROWS)
    u = {name: torch.ones_like(value) for name, value in policy.trainable().items()}
    items = Margin().prepare(policy, pairs(3))
    with CpuFirst():
        losses.values()
        ForwardMode().derivatives(losses, [u], Quiet())
        BatchedBackward().derivatives(losses, [u], Quiet())
        objective_values(Margin(), policy, items)
        objective_gradient(Margin(), policy, items)


class OnMps(torch.Tensor):
    """Pretends to live on a device without float64."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("mps")

    def double(self) -> torch.Tensor:  # type: ignore[override]
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


def test_inner_products_work_on_a_device_without_float64():
    v = {"a": torch.tensor([3.0, 4.0]).as_subclass(OnMps)}
    assert dot(v, v) == 25.0


def chosen(section: SolveSection, policy: Policy, n_directions: int = 1, **changes: Any) -> Scorer:
    losses = replace(candidate_losses(policy, GA(), ROWS[:2]), **changes)
    return make_scorer(section, losses, n_directions)


def test_sections_name_their_scorers():
    for name, scorer in SCORERS.items():
        assert chosen(SolveSection(scorer=name), small_policy()) == scorer  # type: ignore[arg-type]
    assert (Central(0.1).name, OneSided(0.2).name) == ("central(step=0.1)", "one_sided(step=0.2)")


def test_automatic_choice_is_the_cheapest_and_exact_where_that_costs_little_more():
    auto, lora, full = SolveSection(scorer="auto"), small_policy(), tiny_policy(adapter=False)
    known: dict[str, Any] = {"known": torch.zeros(2, dtype=torch.float64)}
    backward, one_sided, central = BatchedBackward(), OneSided(), Central()
    # passes: backward 3; central 2, 4, 8; one-sided 2, 3, 5, or 1, 2, 4 from known losses
    assert [chosen(auto, lora, k) for k in (1, 2, 4)] == [backward, backward, backward]
    assert [chosen(auto, lora, k, **known) for k in (1, 2, 4)] == [one_sided, backward, backward]
    assert [chosen(auto, full, k) for k in (1, 2, 4)] == [central, central, one_sided]
    assert [chosen(auto, full, k, **known) for k in (1, 2, 4)] == [one_sided, one_sided, one_sided]


def test_automatic_choice_is_exact_on_16_and_4_bits():
    auto = SolveSection(scorer="auto")
    known: dict[str, Any] = {"known": torch.zeros(2, dtype=torch.float64)}
    policy = sixteen_bit_policy()
    assert chosen(auto, policy, **known) == BatchedBackward()
    policy.model.get_base_model().is_loaded_in_4bit = True
    assert chosen(auto, policy, **known) == BatchedBackward()
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(auto, tiny_policy(adapter=False)) == ForwardMode()


def test_backward_is_refused_by_name_where_it_is_not_available():
    with pytest.raises(ConfigError, match=r"solve\.scorer: backward needs an adapter .* \(use auto\)"):
        chosen(SolveSection(scorer="backward"), tiny_policy(adapter=False))


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
