"""The whole chain from pairs and candidates to gains, against dense linear algebra; and the split into folds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from small import B, candidate_losses, encode, inner_by_hand, loss_by_hand, small_policy, theta_of
from torch import Tensor, nn

from tiny import examples, pairs
from u2a.bilevel.attention import second_order_attention
from u2a.bilevel.gains import Reached, compute_gains, mean_se
from u2a.bilevel.objective import CustomObjective, Margin
from u2a.bilevel.outer_problem import OuterProblem, split_preference
from u2a.config import SolveSection, UnlearnSection
from u2a.errors import NonFiniteError
from u2a.losses import make_loss
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.reference.dense import dense_gradient, dense_hessian, implicit_gains, per_sample_gradients
from u2a.types import Pair
from u2a.unlearn import InnerProblem

QUIET = Console(quiet=True)
ROWS, RETAIN, PAIRS = examples(4), examples(2, start=40), pairs(6)
EXACT = {"cg_steps": 300, "cg_tol": 1e-9, "scorer": "jvp"}


def problem(loss: str = "npo", term: str = "nll") -> InnerProblem:
    section = UnlearnSection(loss=loss, npo_beta=B, retain_term=term, retain_weight=0.7)  # type: ignore[arg-type]
    return InnerProblem(ROWS, RETAIN if term in ("nll", "kl") else (), section=section)


def outer(**options: object) -> OuterProblem:
    return OuterProblem(PAIRS, SolveSection(**{"heldout_frac": 0.0, "folds": 3, **EXACT, **options}))


def margin_of(policy: Policy, fold: tuple[Pair, ...], parameters: dict[str, Tensor]) -> Tensor:
    """Mean margin, from GA's formula by hand (the mean log-probability of an answer)."""
    encoder = policy.encoder
    both = [(encoder.encode(p.prompt, p.chosen), encoder.encode(p.prompt, p.rejected)) for p in fold]
    ga = [[loss_by_hand("ga", policy, row, parameters) for row in rows] for rows in both]
    return torch.stack([good - bad for good, bad in ga]).mean()


@pytest.mark.parametrize(("loss", "term"), [("npo", "nll"), ("ga", "none")])
def test_gains_equal_the_dense_hypergradient_fold_by_fold(loss: str, term: str):
    policy, inner = small_policy(), problem(loss, term)
    weights = dict(zip([row.id for row in ROWS], [0.4, 0.3, 0.2, 0.1], strict=True))
    encoded, theta = encode(policy, ROWS), theta_of(policy)
    f = inner_by_hand(policy, (loss, term), encoded, torch.tensor(list(weights.values())), encode(policy, RETAIN))
    with second_order_attention(policy):
        hessian = dense_hessian(f, theta)
    rho = 1.0 + max(0.0, -2.0 * float(torch.linalg.eigvalsh((hessian + hessian.T) / 2).min()))
    section = inner.section.model_copy(update={"learning_rate": 1.0 / rho, "max_steps": 1})
    inner, settings_ = (
        replace(inner, section=section),
        outer(adjoint="implicit", damping="auto"),
    )  # 1 / (rate x steps) = rho
    folds = split_preference(settings_)
    gradients = per_sample_gradients([lambda p, r=r: loss_by_hand(loss, policy, r, p) for r in encoded], theta)
    found = compute_gains(policy, inner, settings_, folds, Reached(weights), QUIET)
    for index, fold in enumerate(folds.folds):
        slope = dense_gradient(lambda p, fold=fold: margin_of(policy, fold, p), theta)
        exact = implicit_gains(hessian, slope, gradients, rho)
        gains = torch.tensor([row.fold_gains[index] for row in found.table.rows], dtype=torch.float64)
        assert float((gains - exact).norm() / exact.norm()) < 1e-5
        assert torch.equal(gains.sign(), exact.sign())
    assert {status.status for status in found.table.solve} == {"converged"}
    assert [row.id for row in found.table.rows] == [row.id for row in ROWS]


def test_a_step_along_a_positive_gain_raises_the_objective():
    """Ground truth of the sign on the policy itself: unlearn one candidate a little and measure J."""
    policy = small_policy()
    settings_ = outer(adjoint="identity")
    found = compute_gains(policy, problem("ga", "none"), settings_, split_preference(settings_), Reached({}), QUIET)
    theta = theta_of(policy)
    losses = candidate_losses(policy, make_loss("ga", B), ROWS)
    folds = split_preference(settings_)
    before = torch.stack([margin_of(policy, fold, theta) for fold in folds.folds]).mean()
    for k, row in enumerate(found.table.rows):
        slope = torch.autograd.grad(losses.of([k]).sum(), list(policy.trainable().values()))
        moved = {name: value - 1e-4 * g for (name, value), g in zip(theta.items(), slope, strict=True)}
        after = torch.stack([margin_of(policy, fold, moved) for fold in folds.folds]).mean()
        assert float(after - before) / 1e-4 == pytest.approx(row.gain, rel=0.02, abs=1e-3)


def test_central_scorer_agrees_and_reports_how_well():
    policy, inner = small_policy(), problem()
    folds = split_preference(outer())
    exact = compute_gains(policy, inner, outer(), folds, Reached(inner.uniform()), QUIET)
    central = compute_gains(policy, inner, outer(scorer="central"), folds, Reached(inner.uniform()), QUIET)
    assert exact.table.scorer_error is None
    assert central.table.scorer_error < 1e-2
    assert torch.allclose(central.statistics.gain, exact.statistics.gain, rtol=0.05, atol=1e-4)


def test_table_records_what_was_done():
    policy, inner = small_policy(), problem()
    found = compute_gains(policy, inner, outer(), split_preference(outer()), Reached(inner.uniform()), QUIET)
    table = found.table
    assert (table.objective, table.loss, table.scorer) == ("margin", "npo(beta=0.1) + 0.7 nll", "jvp")
    items = Margin().prepare(policy, PAIRS)
    with torch.no_grad():
        values = Margin().per_item(policy, items)
    assert table.objective_value == pytest.approx(float(values.mean()))
    assert table.objective_se == pytest.approx(float(values.std()) / math.sqrt(6))
    losses = candidate_losses(policy, make_loss("npo", B), ROWS)
    assert [row.loss for row in table.rows] == pytest.approx(losses.values().tolist())
    assert [row.n_answer_tokens for row in table.rows] == [row.n_answer for row in losses.rows]
    for row in table.rows:
        assert row.gain == pytest.approx(sum(row.fold_gains) / 3)


def test_the_standard_error_of_j_takes_the_pairs_of_a_prompt_for_one_draw() -> None:
    rng = np.random.default_rng(3)
    groups = [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4]
    values = rng.normal(size=5)[groups] + 0.1 * rng.normal(size=len(groups))
    oracle = sm.OLS(values, np.ones((len(groups), 1))).fit(cov_type="cluster", cov_kwds={"groups": np.array(groups)})
    found = mean_se(torch.from_numpy(values), [str(group) for group in groups])
    assert found == pytest.approx(float(oracle.bse[0]), rel=1e-12)
    assert found > 1.3 * float(values.std(ddof=1)) / math.sqrt(len(values)), "more than of as many draws"
    alone = mean_se(torch.from_numpy(values), [str(k) for k in range(len(values))])
    assert alone == pytest.approx(float(values.std(ddof=1)) / math.sqrt(len(values)), rel=1e-12)
    assert mean_se(torch.from_numpy(values), ["one"] * len(values)) is None


@pytest.mark.parametrize(("order", "budget"), [([3, 1, 0, 2], 200), ([2, 3, 1, 0], 1)])
def test_gains_belong_to_ids_whatever_the_order_and_the_batches(order: list[int], budget: int):
    options = outer(adjoint="implicit", curvature_samples=3, damping=5.0, cg_tol=1e-7)
    inner = problem("npo", "none")
    folds = split_preference(options)
    first = compute_gains(small_policy(), inner, options, folds, Reached(inner.uniform()), QUIET).table
    other = InnerProblem(tuple(ROWS[k] for k in order), section=inner.section)
    policy = small_policy(token_budget=budget)
    second = compute_gains(policy, other, options, folds, Reached(inner.uniform()), QUIET).table
    gains = {row.id: row.gain for row in second.rows}
    assert [gains[row.id] for row in first.rows] == pytest.approx([row.gain for row in first.rows], rel=1e-5)


def test_a_sample_of_the_candidates_stands_for_all_in_the_curvature():
    """Of identical candidates any two have the curvature of all four, if their weights are made to sum to 1."""
    policy = small_policy()
    same = tuple(ROWS[0].model_copy(update={"id": f"copy{k}"}) for k in range(4))
    inner = InnerProblem(same, section=problem("npo", "none").section)
    few, every = (
        compute_gains(policy, inner, settings_, split_preference(settings_), Reached(inner.uniform()), QUIET)
        for settings_ in (outer(adjoint="implicit", damping=5.0, curvature_samples=size) for size in (2, 16))
    )
    assert torch.allclose(few.statistics.gain, every.statistics.gain, rtol=1e-5)


def test_more_folds_than_prompts_gives_one_prompt_per_fold():
    policy, inner = small_policy(), problem("ga", "none")
    few = OuterProblem(pairs(3), SolveSection(folds=8, heldout_frac=0.0, adjoint="identity"))
    folds = split_preference(few)
    assert folds.sizes == [1, 1, 1]
    found = compute_gains(policy, inner, few, folds, Reached(inner.uniform()), QUIET)
    assert found.table.reliability.n_folds == 3
    one = OuterProblem(pairs(1), few.section)
    single = compute_gains(policy, inner, one, split_preference(one), Reached(inner.uniform()), QUIET)
    assert single.table.rows[0].gain_se is None
    assert single.table.reliability.split_half is None
    assert single.table.objective_se is None


def test_objective_without_gradient_gives_zero_gains():
    policy, inner = small_policy(), problem("ga", "none")

    def flat(model: nn.Module, rows: list[Pair]) -> Tensor:
        return torch.stack([0.0 * next(p for p in model.parameters() if p.requires_grad).sum() for _ in rows])

    zero = OuterProblem(PAIRS, SolveSection(folds=3), CustomObjective(flat))
    found = compute_gains(policy, inner, zero, split_preference(zero), Reached(inner.uniform()), QUIET)
    assert [row.gain for row in found.table.rows] == [0.0] * 4
    assert found.table.scorer_error is None
    assert {status.steps for status in found.table.solve} == {0}


@pytest.mark.parametrize("scorer", ["central", "one_sided", "jvp"])
def test_non_finite_candidate_is_named(scorer: str, monkeypatch: pytest.MonkeyPatch):
    policy, inner = small_policy(), problem("ga", "none")
    counts = [row.n_answer for row in encode(policy, ROWS)]
    assert counts.count(counts[1]) == 1
    per_sample = type(inner.loss).per_sample

    def poisoned(self: object, answers: object, reference: object) -> Tensor:
        values = per_sample(self, answers, reference)
        return torch.where(answers.count == counts[1], values * math.nan, values)

    monkeypatch.setattr(type(inner.loss), "per_sample", poisoned)
    options = outer(scorer=scorer, adjoint="identity")
    with pytest.raises(NonFiniteError) as caught:
        compute_gains(policy, inner, options, split_preference(options), Reached(inner.uniform()), QUIET)
    assert caught.value.ids == [ROWS[1].id]
