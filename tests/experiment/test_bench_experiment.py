"""The benches around the comparison: signal of the PA pairs, kept runs of the validity bench, low tokens."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from pa_signal import signal
from reward_agreement import low_tokens
from selection_smollm2 import KeptLab, world_of
from small_experiment import small_setting

from u2a.bilevel.solve import score
from u2a.config import UnlearnSection
from u2a.experiment.unlearning_arms import inner_problem, outer_problem
from u2a.types import Pair

SECTION = UnlearnSection(loss="ga", retain_term="none", max_steps=2, batch_size=4, learning_rate=1e-3)


def test_signal_tells_what_the_gains_agree_with() -> None:
    found = signal(small_setting())
    setting = small_setting()
    inner = inner_problem(setting, setting.config.unlearn)
    table = score(setting.policy, inner, outer_problem(setting, inner), setting.console)
    lengths = [len(row.completion) for row in inner.forget]
    expected = scipy.stats.spearmanr([row.gain for row in table.rows], lengths).statistic
    assert found["gain_against"]["characters"] == pytest.approx(expected, abs=1e-9)
    assert found["gain_against"]["reward"] == pytest.approx(-expected, abs=1e-9)  # the reward is minus the length
    assert (found["candidates"], found["pairs"]) == (12, 8)
    assert found["reliability"] == table.reliability.model_dump()
    shorter = [len(pair.chosen) - len(pair.rejected) for pair in setting.partition.preference]
    assert found["chosen_shorter"] == pytest.approx(sum((d < 0) + 0.5 * (d == 0) for d in shorter) / len(shorter))


def test_runs_are_kept_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = KeptLab(world_of(small_setting()), SECTION, n_pa=4, file=tmp_path / "runs.json")
    omegas = [lab.uniform(), torch.nn.functional.one_hot(torch.tensor(2), 12).double()]
    first = lab.measured(omegas)
    assert first.shape == (2, 2) and not torch.equal(first[0], first[1])
    lab.run(omegas[1])
    assert lab.values() == pytest.approx(first[1].tolist(), rel=1e-6)
    monkeypatch.setattr(KeptLab, "run", lambda *_: pytest.fail("a kept run was run again"))
    assert torch.equal(lab.measured(list(reversed(omegas))), first.flip(0))
    with pytest.raises(pytest.fail.Exception):  # the same weights in another setting are another run
        replace(lab, made_of="another setting").measured(omegas)


class TwoTokens:
    """Token rewards 0, 1, 2, ... of every answer's characters."""

    def token_rewards(self, prompts: list[object], answers: list[str]) -> list[torch.Tensor]:
        return [torch.arange(len(answer), dtype=torch.float32) for answer in answers]


def test_low_tokens_are_those_below_the_quantile_of_good_answers() -> None:
    setting = small_setting()
    chosen = [pair.model_copy(update={"chosen": "x" * 11}) for pair in setting.partition.preference]
    assert all(isinstance(pair, Pair) for pair in chosen)
    marks = low_tokens(TwoTokens(), setting.partition.forget, chosen)  # type: ignore[arg-type]
    assert [mark.tolist() for mark in marks] == [
        [1.0] + [0.0] * (len(row.completion) - 1) for row in setting.partition.forget
    ]  # the 0.1 quantile of 0..10 is 1, and only 0 is strictly below
