"""Numbers that a resumed process computes in another order, or at another theta, and must find the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tiny import examples, pairs, tiny_policy
from u2a.config import UnlearnSection
from u2a.encoding import Encoded
from u2a.modeling import Params, Policy
from u2a.progress import Console
from u2a.record import Record
from u2a.reward.implicit import train_implicit_reward
from u2a.stage_store import StageStore
from u2a.unlearn import InnerProblem, unlearn

torch.set_num_threads(1)
SECTION = UnlearnSection(loss="npo", retain_term="none", max_steps=3, learning_rate=1e-2, batch_size=4)
PROBLEM = InnerProblem(forget=examples(16), section=SECTION)


def subset_after(first: bool) -> Params:
    """Parameters of an arm on five candidates, after an arm on all of them in the same process or without it."""
    policy = tiny_policy(token_budget=256)
    if first:
        unlearn(policy, PROBLEM, PROBLEM.uniform())
    unlearn(policy, PROBLEM, dict.fromkeys((row.id for row in PROBLEM.forget[3:8]), 1.0))
    return policy.snapshot()


def equal(one: Params, other: Params) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a number depend on how many are computed with it, as the last digits do on some machines."""
    plain = Policy.answer_sums

    def answer_sums(self: Policy, encoded: Sequence[Encoded], model: nn.Module | None = None) -> Tensor:
        return plain(self, encoded, model) + 1e-3 * len(encoded)

    monkeypatch.setattr(Policy, "answer_sums", answer_sums)


def test_an_arm_does_not_depend_on_what_its_process_computed_before(uneven: None) -> None:
    assert equal(subset_after(first=True), subset_after(first=False))


def test_without_the_common_batches_it_would(uneven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not fail."""
    monkeypatch.setattr(sys.modules["u2a.unlearn"], "look_up_references", lambda *_: None)
    assert not equal(subset_after(first=True), subset_after(first=False))


def test_the_implicit_reward_does_not_depend_on_where_the_policy_stands() -> None:
    rows, scores = pairs(8), []
    for moved in (0.0, 0.2):
        policy: Policy = tiny_policy()
        for value in policy.trainable().values():
            value.data.add_(moved)
        model = train_implicit_reward(policy, rows, seed=1)
        policy.reset()
        scores.append(model.score([row.prompt for row in rows], [row.chosen for row in rows]))
    assert torch.equal(*scores)


class Number(Record):
    value: int


def test_a_record_whose_saving_was_killed_is_not_taken_for_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options A, then B killed after the record and before its key, then A again."""

    def value_of(key: str, value: int) -> int:
        return StageStore(tmp_path, Console(quiet=True)).saved("n", Number, key, lambda: Number(value=value)).value

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    assert value_of("A", 1) == 1
    with monkeypatch.context() as patch:
        patch.setattr(StageStore, "mark", killed)
        with pytest.raises(KeyboardInterrupt):
            value_of("B", 2)
    assert Number.load(tmp_path / "n.json").value == 2
    assert value_of("A", 1) == 1
    assert value_of("A", 9) == 1, "read back"
