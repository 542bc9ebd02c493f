"""The split of preference pairs into folds: by prompt, balanced by pairs, with errors that are the true ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import pairs
from u2a.bilevel.outer_problem import OuterProblem, split_preference
from u2a.bilevel.select import fold_statistics
from u2a.config import SolveSection
from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError
from u2a.record import content_id
from u2a.types import Pair


def prompts(rows: tuple[Pair, ...]) -> set[str]:
    return {prompt_key(row.prompt) for row in rows}


@settings(max_examples=20)
@given(n=st.integers(1, 12), k=st.integers(1, 6), heldout=st.sampled_from([0.0, 0.2, 0.5, 0.9]), data=st.data())
def test_split_keeps_prompts_together_and_loses_nothing(n: int, k: int, heldout: float, data: st.DataObject):
    rows = [*pairs(n), *(row.model_copy(update={"id": "x" + row.id, "chosen": "another"}) for row in pairs(n)[::2])]
    section = SolveSection(folds=k, heldout_frac=heldout)
    found = split_preference(OuterProblem(tuple(rows), section, seed=3))
    parts = [*found.folds, found.heldout]
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
    sets = [prompts(part) for part in parts]
    assert sum(len(part) for part in sets) == len(set().union(*sets)) == n
    assert min(found.sizes) >= 1
    assert max(found.sizes) - min(found.sizes) <= 2  # the pairs of one prompt
    shuffled = tuple(data.draw(st.permutations(rows)))
    assert split_preference(OuterProblem(shuffled, section, seed=3)) == found


def repeated(counts: list[int]) -> tuple[Pair, ...]:
    """As many pairs on each prompt as said."""
    rows = zip(pairs(len(counts)), counts, strict=True)
    return tuple(
        row.model_copy(update={"id": f"{row.id}-{k}", "chosen": f"yes {k}"}) for row, n in rows for k in range(n)
    )


def test_folds_are_balanced_by_pairs_and_know_their_noise():
    found = split_preference(OuterProblem(repeated([9, 1, 2, 3, 3, 1, 5, 4]), SolveSection(folds=3, heldout_frac=0.0)))
    assert sorted(found.sizes) == [9, 9, 10]
    counts = [Counter(prompt_key(row.prompt) for row in fold).values() for fold in found.folds]
    assert found.noise == pytest.approx([sum(c * c for c in each) / sum(each) ** 2 for each in counts])
    one = split_preference(OuterProblem(repeated([101] + [1] * 23), SolveSection(folds=8, heldout_frac=0.0)))
    assert sorted(one.sizes) == [3] * 5 + [4] * 2 + [101]


@given(n=st.integers(1, 40), k=st.integers(1, 8), seed=st.integers(0, 5), heldout=st.sampled_from([0.0, 0.2]))
def test_prompts_with_as_many_pairs_each_are_dealt_out_in_turn(n: int, k: int, seed: int, heldout: float):
    """The split of runs with one pair per prompt, to the bit; no other test would notice another order."""
    section = SolveSection(folds=k, heldout_frac=heldout)
    found = split_preference(OuterProblem(pairs(n), section, seed=seed))
    rows = sorted(pairs(n), key=lambda row: content_id(str(seed), "fold", prompt_key(row.prompt)))
    rest = rows[len(found.heldout) :]
    count = min(k, len(rest))
    assert found.folds == tuple(tuple(rest[first::count]) for first in range(count))
    assert found.noise is None


@pytest.mark.parametrize(
    ("counts", "within"),
    [
        ([1] * 32, 0.3),
        ([1 + 7 * k % 10 for k in range(32)], 0.3),
        ([1] * 31 + [20], 0.3),
        ([1] * 31 + [100], 0.3),
        ([max(1, 60 // (k + 1)) for k in range(32)], 0.3),
        ([2] * 33, 1.0),
    ],
)
def test_the_standard_error_is_the_true_one_whatever_the_pairs_per_prompt(counts: list[int], within: float):
    """Noise of prompts, shared by their pairs, and of pairs; over 200 draws the reported error has the true size."""
    folds = split_preference(OuterProblem(repeated(counts), SolveSection(folds=8, heldout_frac=0.0)))
    prompts_of = [Counter(prompt_key(row.prompt) for row in fold).values() for fold in folds.folds]
    generator = torch.Generator().manual_seed(0)
    errors, reported, mean_errors, mean_reported, signals = [], [], [], [], []
    for _ in range(200):
        truth = 0.5 * torch.randn(50, generator=generator, dtype=torch.float64)
        columns = []
        for each in prompts_of:
            noise = torch.randn(50, 2 * len(each), generator=generator, dtype=torch.float64)
            common = torch.randn(2 * len(each), generator=generator, dtype=torch.float64)
            scale = torch.tensor([c / sum(each) for c in each] + [within * c**0.5 / sum(each) for c in each])
            columns.append(truth + (noise + common) @ scale.double())
        found = fold_statistics(torch.stack(columns, 1), folds.sizes, folds.noise)
        errors.append(float((found.centred - truth + truth.mean()).square().mean()))
        reported.append(float(found.se.square().mean()))
        mean_errors.append(float(found.mean_gain - truth.mean()) ** 2)
        mean_reported.append(found.mean_gain_se**2)
        signals.append(found.signal_var)
    assert (np.mean(errors) / np.mean(reported)) ** 0.5 == pytest.approx(1.0, abs=0.1)
    assert (np.mean(mean_errors) / np.mean(mean_reported)) ** 0.5 == pytest.approx(1.0, abs=0.2)
    assert np.mean(signals) == pytest.approx(0.25, abs=0.03)


def test_no_pair_and_no_reward_model_are_refused():
    with pytest.raises(DataError, match="no pair"):
        split_preference(OuterProblem((), SolveSection()))
    with pytest.raises(ConfigError, match="reward model"):
        OuterProblem(pairs(6), SolveSection(objective="reward")).objective_value()
