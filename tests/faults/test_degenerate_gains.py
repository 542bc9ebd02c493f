"""Selection at its edges: each case of the table in docs/reliability.md ends as the table says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import examples, pairs, tiny_policy
from u2a.bilevel.linsolve import CG
from u2a.bilevel.objective import CustomObjective
from u2a.bilevel.outer_problem import OuterProblem
from u2a.bilevel.solve import score, solve
from u2a.config import SolveSection, UnlearnSection
from u2a.errors import ConfigError
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.solution import Solution
from u2a.types import Example, Pair
from u2a.unlearn import InnerProblem, InnerSolver

QUIET = Console(quiet=True)
ROWS = examples(6)
TRAINING = UnlearnSection(loss="ga", retain_term="none", batch_size=6, max_steps=2, learning_rate=1e-2)
ROOT = Path(__file__).resolve().parents[2]


def likelihood(policy: Policy, sign: float) -> CustomObjective:
    """J = sign x mean log-probability of all bad answers; with -1 unlearning any of them helps."""
    encoded = [policy.encoder.encode(row.prompt, row.completion) for row in ROWS]

    def value(model: nn.Module, items: Sequence[Pair]) -> Tensor:
        return sign * policy.log_probs(encoded).mean.mean().expand(len(items))

    return CustomObjective(value)


def constant(_: Policy) -> CustomObjective:
    """J does not depend on the model."""

    def value(model: nn.Module, items: Sequence[Pair]) -> Tensor:
        nothing = torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum()
        return torch.zeros(len(items)) + 0.0 * nothing

    return CustomObjective(value)


def solved(make: Callable[[Policy], CustomObjective], rows: Sequence[Example], **options: Any) -> Solution:
    """Select among rows; both orders of the rows must give the same weights."""
    section = {"adjoint": "identity", "fallback": "none", "rounds": 1, "warmup_steps": 1, "folds": 2, "n_selected": 2}
    section |= {"final_refine": False, "refine_adjoint": "screening", "estimator": "mean", **options}
    found = []
    for order in (rows, rows[::-1]):
        policy = tiny_policy()
        outer = OuterProblem(pairs(6), SolveSection(**section), make(policy), seed=2)
        found.append(solve(InnerSolver(policy), InnerProblem(tuple(order), section=TRAINING, seed=1), outer, QUIET))
    assert set(found[0].weights) == set(found[1].weights), "the order of the candidates does not matter"
    return found[0]


def helps(policy: Policy) -> CustomObjective:
    return likelihood(policy, -1.0)


def harms(policy: Policy) -> CustomObjective:
    return likelihood(policy, 1.0)


def test_negative_curvature_raises_the_damping_and_says_so() -> None:
    matrix = torch.diag(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    right = {"x": torch.ones(3, dtype=torch.float64)}
    found = CG(20, 1e-10).solve(lambda vector: {"x": matrix @ vector["x"]}, right, 0.1)
    assert found.status.status == "negative_curvature" and found.status.damping > 2.0
    wanted = torch.linalg.solve(matrix + found.status.damping * torch.eye(3, dtype=torch.float64), right["x"])
    torch.testing.assert_close(found.value["x"], wanted)


def test_a_candidate_without_gradient_has_gain_zero_and_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is a constant: the others are scored as if it were not there."""
    from u2a.losses import GA

    own, silent = GA.per_sample, tiny_policy().encoder.encode(ROWS[0].prompt, ROWS[0].completion).n_answer

    def per_sample(self: GA, answers: Any, reference: Any) -> Tensor:
        out = own(self, answers, reference)
        return torch.where(answers.count == silent, 0.0 * out + 1.0, out)

    plain = {row.id: row.gain for row in score_of(helps).rows}
    monkeypatch.setattr(GA, "per_sample", per_sample)
    rows = {row.id: row for row in score_of(helps).rows}
    lengths = {row.id: row.n_answer_tokens for row in rows.values()}
    assert 0 < sum(length == silent for length in lengths.values()) < len(ROWS)
    for name, row in rows.items():
        assert row.gain == (0.0 if lengths[name] == silent else pytest.approx(plain[name], rel=1e-5))
    found = solved(helps, ROWS, n_selected=6, warmup_steps=0)
    assert set(found.weights) == {name for name in rows if lengths[name] != silent and rows[name].gain > 0}


def score_of(make: Callable[[Policy], CustomObjective]) -> Any:
    """Gains at theta_0."""
    policy = tiny_policy()
    section = SolveSection(adjoint="identity", scorer="backward", warmup_steps=0, folds=2)
    inner = InnerProblem(ROWS, section=TRAINING, seed=1)
    return score(policy, inner, OuterProblem(pairs(6), section, make(policy), seed=2), QUIET)


@pytest.mark.parametrize("adjoint", ["identity", "implicit"])
@pytest.mark.parametrize(("fallback", "outcome", "taken"), [("none", "empty", 0), ("random_k", "random_k", 2)])
def test_no_gradient_of_the_pairs_is_no_signal(adjoint: str, fallback: str, outcome: str, taken: int) -> None:
    found = solved(constant, ROWS, adjoint=adjoint, fallback=fallback)
    assert (found.fallback, len(found.weights)) == (outcome, taken)
    assert {row.gain for row in found.scores.rows} == {0.0}
    assert found.stopped.startswith("no candidate promises" if outcome == "empty" else "no signal among the gains")


@pytest.mark.parametrize("fallback", ["none", "random_k"])
def test_gains_that_are_all_negative_select_nothing(fallback: str) -> None:
    found = solved(harms, ROWS, fallback=fallback)
    assert max(row.gain for row in found.scores.rows) < 0.0
    assert (found.fallback, found.weights) == ("empty", {})
    assert found.stopped == "no candidate promises a gain: nothing is unlearned"


def test_one_candidate_is_taken_whole_or_not_at_all() -> None:
    assert solved(helps, ROWS[:1], n_selected=1).weights == {ROWS[0].id: 1.0}
    assert solved(harms, ROWS[:1], n_selected=1).weights == {}


def test_more_to_select_than_there_are_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match=r"n_selected: 7 is more than the 6 candidates \(lower it to at most 6\)"):
        solved(helps, ROWS, n_selected=7)


def test_all_equal_gains_are_taken_by_id() -> None:
    copies = [ROWS[0].model_copy(update={"id": name}) for name in ("d", "b", "f", "a", "e", "c")]
    found = solved(helps, copies, n_selected=3)
    assert set(found.weights) == {"a", "b", "c"}
    assert list(found.weights.values()) == pytest.approx([1 / 3] * 3, rel=1e-6)


def test_the_table_lists_them_and_a_singular_system_which_is_tested_with_the_solvers() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = page.split("## Degenerate cases")[1].split("## ")[0]
    assert sum(line.startswith("| ") for line in section.splitlines()) == 1 + 8  # the heading row and the cases
