"""Shortages that are told before any model is loaded, against what the search really does with such data."""

from __future__ import annotations

import re

import pytest

from tiny import pairs
from u2a.bilevel.outer_problem import OuterProblem, split_preference
from u2a.config import RunConfig, SolveSection, UnlearnSection
from u2a.errors import ConfigError
from u2a.shortages import shortages, without_retain_rows
from u2a.types import Partition


def of_pairs(n: int, section: SolveSection) -> list[str]:
    """What is said of the preference pairs, where there are so many."""
    found = shortages(Partition(preference=pairs(n)), RunConfig(solve=section))
    return [line for line in found if line.startswith("preference")]


@pytest.mark.parametrize("share", [0.0, 0.002, 0.02, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("folds", [1, 4, 8])
def test_the_preference_prompts_asked_for_are_the_fewest_that_fill_all_folds_and_the_held_out_share(
    share: float, folds: int
) -> None:
    section = SolveSection(folds=folds, heldout_frac=share)

    def suffice(n: int) -> bool:
        found = split_preference(OuterProblem(pairs(n), section))
        return len(found.folds) == folds and (bool(found.heldout) or share == 0.0)

    said = of_pairs(1, section)
    assert bool(said) != suffice(1)
    if said:
        needed = int(re.findall(r"preference: 1 prompts, (\d+) needed", said[0])[0])
        assert suffice(needed) and not suffice(needed - 1)
        assert of_pairs(needed, section) == [] != of_pairs(needed - 1, section)


def test_a_retain_term_is_left_out_only_where_it_needs_rows_and_the_loss_can_do_without() -> None:
    for term, left in (("none", "none"), ("nll", "none"), ("kl", "none"), ("proximal", "proximal")):
        assert without_retain_rows(UnlearnSection(retain_term=term), "give them").retain_term == left
    with pytest.raises(ConfigError, match=r"unlearn.loss: grad_diff needs retain rows \(give them, or"):
        without_retain_rows(UnlearnSection(loss="grad_diff"), "give them")
