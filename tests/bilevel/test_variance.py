"""Reductions of the variance of gains: closed forms, planted signals, and what they must leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_policy
from torch import Tensor

from tiny import examples, pairs
from u2a.bilevel.gains import Reached, compute_gains
from u2a.bilevel.outer_problem import OuterProblem, split_preference
from u2a.bilevel.select import spearman
from u2a.bilevel.variance import clip_factors, cross_fold_variance, pooled, without_common
from u2a.config import SolveSection, UnlearnSection
from u2a.errors import ConfigError
from u2a.progress import Console
from u2a.unlearn import InnerProblem

QUIET = Console(quiet=True)
ROWS, PAIRS, RETAIN = examples(6), pairs(8), examples(3, start=30)


def noisy(
    seed: int, n: int = 60, folds: int = 6, groups: int = 6, noise: float = 1.0
) -> tuple[Tensor, Tensor, list[int]]:
    """(fold gains, true gains, clusters): the truth differs between clusters only."""
    generator = torch.Generator().manual_seed(seed)
    clusters = [k % groups for k in range(n)]
    truth = torch.randn(groups, generator=generator, dtype=torch.float64)[clusters]
    return truth[:, None] + noise * torch.randn(n, folds, generator=generator, dtype=torch.float64), truth, clusters


def test_cross_fold_variance_is_unbiased_for_the_signal():
    with_signal = [cross_fold_variance(noisy(seed, groups=60)[0]) for seed in range(300)]
    without = [
        cross_fold_variance(torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)).double())
        for seed in range(300)
    ]
    assert sum(with_signal) / 300 == pytest.approx(1.0, abs=0.05)
    assert sum(without) / 300 == pytest.approx(0.0, abs=0.02)
    assert min(without) < 0.0


def test_pooling_brings_noisy_gains_nearer_to_a_truth_that_differs_between_clusters():
    rises = []
    for seed in range(20):
        gains, truth, clusters = noisy(seed, noise=3.0)
        plain, better = spearman(gains.mean(1), truth), spearman(pooled(gains, clusters).mean(1), truth)
        assert plain is not None and better is not None
        rises.append(better - plain)
    assert min(rises) >= 0.0  # where the folds see no signal between clusters nothing is changed
    assert sum(rises) / 20 > 0.1


def test_pooling_over_meaningless_clusters_or_one_fold_changes_little_or_nothing():
    gains, _, clusters = noisy(3, groups=60)  # every candidate has its own truth
    assert torch.equal(pooled(gains[:, :1], clusters), gains[:, :1])
    assert torch.allclose(pooled(gains, list(range(60))), gains)
    assert torch.allclose(pooled(gains, [0] * 60), gains)  # one cluster: its mean tells nothing about "which"


@settings(max_examples=30)
@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3))
def test_pooling_keeps_cluster_means_and_units(seed: int, scale: float):
    gains, _, clusters = noisy(seed)
    out = pooled(gains, clusters)
    assert torch.allclose(pooled(scale * gains, clusters), scale * out)
    for label in set(clusters):
        inside = torch.tensor([c == label for c in clusters])
        assert torch.allclose(out[inside].mean(0), gains[inside].mean(0))


def test_clip_factors_bound_every_length_by_the_quantile():
    norms = torch.tensor([0.0, 1.0, 3.0, 10.0], dtype=torch.float64)
    factors = clip_factors(norms, 0.5)
    assert float((factors * norms).max()) == pytest.approx(2.0)
    assert factors[:2].tolist() == [1.0, 1.0]
    assert clip_factors(norms, 1.0).tolist() == [1.0] * 4


@settings(max_examples=30)
@given(seed=st.integers(0, 999))
def test_removing_the_common_direction_is_projecting_the_gradient_of_j(seed: int):
    """Against gradients written out: g - (g'c / c'c) c, scored anew."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randn(7, 12, generator=generator, dtype=torch.float64)  # candidate gradients
    g = torch.randn(12, 3, generator=generator, dtype=torch.float64)  # grad J by fold
    c = slopes.mean(0)
    shares = (g.T @ c) / (c @ c)
    found = without_common(-slopes @ g, -slopes @ c, shares)
    expected = -slopes @ (g - c[:, None] * shares[None, :])
    centred = expected - expected.mean(0, keepdim=True)
    assert torch.allclose(found - found.mean(0, keepdim=True), centred)
    assert torch.allclose(found.mean(0), (-slopes @ g).mean(0))


def table(labels: dict[str, int] | None = None, **options: object):
    section = SolveSection(**{"adjoint": "identity", "scorer": "jvp", "folds": 3, "heldout_frac": 0.0, **options})
    outer = OuterProblem(PAIRS, section, seed=1, clusters=labels)
    inner = InnerProblem(ROWS, RETAIN, section=UnlearnSection(loss="ga", retain_term="nll", retain_weight=0.5))
    return compute_gains(small_policy(), inner, outer, split_preference(outer), Reached(inner.uniform()), QUIET)


def test_every_reduction_is_applied_through_the_whole_scoring_and_named_in_the_record():
    plain = table()
    assert plain.table.estimator == "shrunken"
    order = sorted(plain.table.rows, key=lambda row: row.gain)
    alike = {row.id: int(k >= 3) for k, row in enumerate(order)}  # clusters that differ, so that their means count
    for options, text in (
        ({"pair_clip": 0.5}, "pairs clipped at the 0.5 quantile"),
        ({"remove_common": True}, "common direction removed"),
        ({"clusters": 2}, "pooled over 2 clusters"),
        ({"damage_weight": 2.0}, "less 2 x damage"),
    ):
        changed = table(alike, **options)
        assert text in changed.table.estimator
        assert not torch.allclose(changed.estimates, plain.estimates, rtol=1e-6, atol=0.0)
    assert table(remove_common=True).table.reliability.mean_gain == pytest.approx(plain.table.reliability.mean_gain)


def test_damage_is_the_slope_of_the_retain_nll_when_a_candidate_is_unlearned():
    """Against a small step: unlearn one candidate a little and measure the NLL of the retain rows."""
    found = table(damage_weight=1.0)
    policy = small_policy()
    retain = [policy.encoder.encode(row.prompt, row.completion) for row in RETAIN]
    row = ROWS[2]
    answers = policy.log_probs([policy.encoder.encode(row.prompt, row.completion)])
    slope = torch.autograd.grad(answers.mean.sum(), list(policy.trainable().values()))
    values = []
    for sign in (1.0, -1.0):
        policy = small_policy()
        for value, g in zip(policy.trainable().values(), slope, strict=True):
            value.data.sub_(sign * 1e-5 * g)
        with torch.no_grad():
            values.append(-float(policy.log_probs(retain).mean.mean()))
    measured = (values[0] - values[1]) / 2e-5
    assert found.table.rows[2].damage == pytest.approx(measured, rel=1e-4)
    assert float(found.estimates[2]) == pytest.approx(float(table().estimates[2]) - measured, rel=1e-4)


def test_damage_is_that_of_a_draw_whatever_the_order_of_the_retain_rows():
    section = SolveSection(adjoint="identity", scorer="jvp", folds=3, damage_weight=1.0, curvature_samples=3)
    rows, found = examples(12, start=200), []
    for retain in (rows, rows[::-1], rows[:3]):
        inner = InnerProblem(ROWS, retain, section=UnlearnSection(loss="npo", retain_term="nll"))
        outer = OuterProblem(PAIRS, section)
        split = split_preference(outer)
        gains = compute_gains(small_policy(), inner, outer, split, Reached(inner.uniform()), QUIET)
        found.append([row.damage for row in gains.table.rows])
    assert found[0] == pytest.approx(found[1], rel=1e-5) != pytest.approx(found[2], rel=1e-2)


def test_damage_without_retain_rows_and_pooling_without_clusters_are_refused():
    section = SolveSection(adjoint="identity", scorer="jvp", damage_weight=1.0)
    inner = InnerProblem(ROWS, section=UnlearnSection(loss="ga", retain_term="none"))
    outer = OuterProblem(PAIRS, section)
    with pytest.raises(ConfigError, match="damage_weight needs retain rows"):
        compute_gains(small_policy(), inner, outer, split_preference(outer), Reached(inner.uniform()), QUIET)
    with pytest.raises(ConfigError, match="needs the clusters"):
        OuterProblem(PAIRS, SolveSection(clusters=2)).clusters_of(inner)
