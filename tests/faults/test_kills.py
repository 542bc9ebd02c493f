"""Fault F1: a run that is killed anywhere goes on to the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from .kill_harness import Lab, kill_and_resume, kill_runs


def test_two_unbroken_runs_write_the_same(lab: Lab) -> None:
    """Otherwise the comparison below would say nothing."""
    assert {"solution.json", "metrics.jsonl", "evaluation.json", "summary.json", "run.yaml"} <= set(lab.whole)
    assert {"arms/u2a.safetensors", "arms/random_k.safetensors", "adapter/adapter_model.safetensors"} <= set(lab.whole)
    assert not any("checkpoint" in name for name in lab.whole), "a finished run keeps none"
    lab.fresh()
    assert lab.attempt()["status"] == 0
    assert lab.differences() == []


def test_every_place_to_kill_at_is_met(lab: Lab) -> None:
    names = {"save", "inner loop", "CG", "scoring", "selection", "reward", "evaluation"}
    assert {name for name, calls in lab.points.items() if calls} == names


def test_a_comparison_sees_one_changed_weight_and_one_line_less(lab: Lab) -> None:
    lab.fresh()
    assert lab.attempt()["status"] == 0
    weights, log = lab.run / "arms" / "u2a.safetensors", lab.run / "metrics.jsonl"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert lab.differences() == ["arms/u2a.safetensors", "metrics.jsonl"]


PLACES = [
    ("inner loop", 2), ("reward", 3), ("CG", 9), ("scoring", 2), ("selection", 3), ("save", 60), ("evaluation", 4),
]  # fmt: skip


def test_ten_kills_in_two_runs(lab: Lab) -> None:
    """One run is killed at every place in turn, another at three times; each attempt goes on where the last ended."""
    places = [{"point": point, "call": call, "signals": [9]} for point, call in PLACES]
    shares = sorted(np.random.default_rng(0).uniform(0.1, 0.6, 3))  # the least first: it meets a run's beginning
    times = [{"at": [[share * lab.seconds, 9]]} for share in shares]
    found = [kill_and_resume(lab, kills) for kills in (places, times)]
    for one in found:
        assert (one["different"], one["unreadable"], one["leftovers"]) == ([], [], [])
    assert found[0]["killed"] == len(PLACES)
    assert found[1]["killed"] >= 1, "a resumed run has less left to do, and may end before its kill"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills(lab: Lab) -> None:
    found = kill_runs(lab, 50, seed=1)
    assert found["details"] == []
    assert found["kills"] == found["resumed_identical"] == 50
