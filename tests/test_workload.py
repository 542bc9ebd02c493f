"""What a forecast says of each phase is what the run then does, wherever options change the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.conftest import tiny_config, tiny_files  # noqa: F401  # fixtures
from forecast_kit import BARE, Both, both


@pytest.fixture
def configure(tiny_config: Callable[..., Path]) -> Callable[..., Path]:  # noqa: F811
    return tiny_config


def told(done: Both, phase: str) -> float:
    """Operations of a phase by the forecast."""
    return sum(cost.flops or 0.0 for cost in done.forecast.phases if cost.name == phase)


def test_a_lone_round_that_nothing_judges_leaves_all_of_its_training_to_stage_4(configure: Callable[..., Path]) -> None:
    done = both(configure(**BARE), "solve.heldout_frac=0", "model.attention=eager")
    assert [phase.name for phase in done.forecast.phases] == list(done.console.seconds)
    assert "inner run, round 1" not in done.console.seconds
    assert told(done, "unlearn u2a") == pytest.approx(done.console.flops["unlearn u2a"], rel=0.10)


def test_too_few_prompts_to_hold_any_out_leave_nothing_to_judge_a_round_by(configure: Callable[..., Path]) -> None:
    done = both(configure(**BARE), "solve.heldout_frac=0.01", "model.attention=eager")
    assert [phase.name for phase in done.forecast.phases] == list(done.console.seconds)
    assert told(done, "unlearn u2a") == pytest.approx(done.console.flops["unlearn u2a"], rel=0.10)
