"""What is measured of a state: at equal utility the change is scaled until perplexity is within its budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_experiment import small_setting

from fake_cells import measured
from u2a.config_evaluation import EvaluationSection
from u2a.evaluation.arm import Instruments
from u2a.experiment.cell import LevelResult
from u2a.experiment.estimates import EQUAL, PROMPT_METRICS, values_of
from u2a.experiment.measured import AtEqualPpl, Measured, measure_at_equal_ppl, measure_policy, retain_ppl
from u2a.experiment.meter import Spent
from u2a.modeling import Policy

SECTION = EvaluationSection(generate_prompts=2, max_new_tokens=4, bootstrap=100)


def moved(setting, size: float) -> Policy:
    """The setting's policy, moved up the loss of its retain rows (perplexity rises)."""
    policy = setting.policy
    rows = [policy.encoder.encode(row.prompt, row.completion) for row in setting.partition.retain_parts().evaluation]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in policy.trainable().values():
            value += size * torch.randn(value.shape, generator=generator)
    loss = policy.log_probs(rows).mean.mean()
    for value, gradient in zip(
        policy.trainable().values(), torch.autograd.grad(loss, list(policy.trainable().values())), strict=True
    ):
        with torch.no_grad():
            value -= size * gradient / gradient.norm().clamp_min(1e-9)
    return policy


def at_equal(size: float, budget: float) -> tuple[AtEqualPpl, Measured, float, list[float]]:
    setting = small_setting()
    start = measure_policy(setting.policy, setting.partition, Instruments(), SECTION, 0, False)
    policy = moved(setting, size)
    whole = measure_policy(policy, setting.partition, Instruments(), SECTION, 0, True)
    seen: list[float] = []

    def measure(at: Policy) -> Measured:
        found = measure_policy(at, setting.partition, Instruments(), SECTION, 0, True)
        seen.append(retain_ppl(found) or math.inf)
        return found

    before = policy.change_sq().item()
    known = {0.0: retain_ppl(start) or math.inf, 1.0: retain_ppl(whole) or math.inf}
    result = measure_at_equal_ppl(policy, setting.partition, budget, known, measure)
    assert policy.change_sq().item() == before
    return result, whole, known[0.0], seen


def test_a_change_that_costs_too_much_is_scaled_to_the_budget() -> None:
    found, whole, start, seen = at_equal(size=0.5, budget=0.05)
    assert (retain_ppl(whole) or math.inf) > 1.05 * start
    assert 0.0 <= found.search.scale < 1.0 and found.measured is not None
    assert seen == [pytest.approx(found.search.cost, rel=1e-4)] and seen[0] <= 1.05 * start * (1 + 1e-6)
    over = [point for point in found.search.path if point.scale > found.search.scale]
    assert over[0].scale - found.search.scale <= 1 / 8 and (over[0].cost or math.inf) > 1.05 * start
    assert found.measured.answers and found.measured.margin.keys() == whole.margin.keys()


def test_a_change_within_the_budget_is_measured_once() -> None:
    found, _, _, seen = at_equal(size=0.5, budget=1e6)
    assert found.search.scale == 1.0 and found.measured is None and not seen and found.search.evaluations == 0


def level(equal: AtEqualPpl | None, shift: float) -> LevelResult:
    here = measured(np.random.default_rng(0), shift)
    return LevelResult(
        level=1.0, reached=True, steps=1, spent=Spent(), full=True, untrained=False, measured=here, equal=equal
    )


def test_metrics_at_equal_perplexity_are_those_of_the_scaled_change() -> None:
    found, whole, _, _ = at_equal(size=0.5, budget=0.05)
    scaled, plain = level(found, 1.0), level(AtEqualPpl(search=found.search), 1.0)
    assert found.measured is not None
    assert values_of(f"preference_margin{EQUAL}", scaled) == found.measured.margin != whole.margin
    assert (
        values_of(f"preference_margin{EQUAL}", plain) == plain.measured.margin == values_of("preference_margin", plain)
    )
    assert values_of(f"reward{EQUAL}", plain) == plain.measured.reward
    assert values_of(f"reward{EQUAL}", level(None, 1.0)) == {}
    assert {f"preference_margin{EQUAL}", f"reward{EQUAL}"} <= set(PROMPT_METRICS)
