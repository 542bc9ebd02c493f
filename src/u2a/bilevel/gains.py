"""From preference pairs and candidates to a table of gains: gradient of J per fold, adjoint, scorer, statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from u2a.bilevel.hypergrad import InnerPoint, make_adjoint
from u2a.bilevel.objective import DPO, NLL, Margin, Objective, objective_gradient
from u2a.bilevel.score import CandidateLosses
from u2a.bilevel.select import FoldStatistics, fold_statistics, make_estimator, reliability
from u2a.bilevel.vectors import dot
from u2a.config import SolveSection
from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.record import content_id
from u2a.solution import ScoreRow, ScoreTable
from u2a.types import Pair
from u2a.unlearn import InnerProblem


@dataclass(frozen=True)
class OuterProblem:
    """The outer problem: what aligned means, and how gains are computed.

    Attributes:
        preference: the PA pairs.
        section: options of stage 3.
        objective: J; None makes it from the section.
        seed: seed of folds and random draws.
        probe: measured after every inner run (mean reward of the policy's own answers), for the record; None: nothing.
    """

    preference: tuple[Pair, ...]
    section: SolveSection = field(default_factory=SolveSection)
    objective: Objective | None = None
    seed: int = 0
    probe: Callable[[Policy], float] | None = None

    def objective_value(self) -> Objective:
        """Return J.

        Returns:
            The objective.

        Raises:
            ConfigError: ``solve.objective: reward`` without a value (it needs a reward model).
        """
        if self.objective is not None:
            return self.objective
        objectives: dict[str, Objective] = {"margin": Margin(), "dpo": DPO(self.section.dpo_beta), "nll": NLL()}
        if self.section.objective not in objectives:
            raise ConfigError("solve.objective: reward needs a reward model (pass objective=ExpectedReward(...))")
        return objectives[self.section.objective]


@dataclass(frozen=True)
class Folds:
    """PA pairs split by prompt.

    Attributes:
        folds: pairs of each fold, none empty.
        heldout: pairs kept for early stopping; may be empty.
    """

    folds: tuple[tuple[Pair, ...], ...]
    heldout: tuple[Pair, ...]

    @property
    def sizes(self) -> list[int]:
        """Pairs per fold."""
        return [len(fold) for fold in self.folds]


def split_preference(outer: OuterProblem) -> Folds:
    """Split the PA pairs by prompt into held-out pairs and folds of nearly equal size.

    Args:
        outer: pairs, number of folds, held-out share and seed.

    Returns:
        The split; the same whatever the order of the pairs. With fewer prompts than folds there are fewer folds.

    Raises:
        DataError: no pairs.
    """
    if not outer.preference:
        raise DataError("preference set: holds no pair (raise partition.preference_frac or set data.preferences)")
    groups: dict[str, list[Pair]] = {}
    for pair in sorted(outer.preference, key=lambda pair: pair.id):
        groups.setdefault(prompt_key(pair.prompt), []).append(pair)
    keys = sorted(groups, key=lambda key: content_id(str(outer.seed), "fold", key))
    n_heldout = round(outer.section.heldout_frac * len(keys))
    if len(keys) - n_heldout < 2:
        n_heldout = 0
    heldout = tuple(pair for key in keys[:n_heldout] for pair in groups[key])
    rest = keys[n_heldout:]
    count = min(outer.section.folds, len(rest))
    folds = tuple(tuple(pair for key in rest[k::count] for pair in groups[key]) for k in range(count))
    return Folds(folds, heldout)


@dataclass(frozen=True)
class Gains:
    """Everything one scoring found.

    Attributes:
        table: the record.
        statistics: gains with their uncertainty.
        estimates: (n,) what candidates are ranked by.
    """

    table: ScoreTable
    statistics: FoldStatistics
    estimates: Tensor


def compute_gains(
    policy: Policy,
    inner: InnerProblem,
    outer: OuterProblem,
    folds: Folds,
    weights: Mapping[str, float],
    console: Console,
) -> Gains:
    """Score every candidate at the policy's current theta.

    Args:
        policy: the policy at theta*(omega), or after the warm-up.
        inner: candidates and losses.
        outer: objective and options.
        folds: the PA split.
        weights: omega at which the curvature is taken.
        console: progress.

    Returns:
        Gains of all candidates, in the order of ``inner.forget``.

    Raises:
        NonFiniteError: a value, gradient, loss or score is not finite.
    """
    objective = outer.objective_value()
    items = [objective.prepare(policy, fold) for fold in folds.folds]
    with console.phase("gradient of J", sum(folds.sizes), "pairs") as advance:
        parts = [objective_gradient(objective, policy, fold, advance) for fold in items]
    losses = candidate_losses(policy, inner)
    adjoint = make_adjoint(outer.section)
    point = InnerPoint(policy, inner, weights, losses, outer.section, outer.seed)
    found = adjoint.derivatives(point, [part.gradient for part in parts], console)
    slopes = found.values
    values = torch.cat([part.values for part in parts])
    _check(slopes, losses.ids)
    statistics = fold_statistics(-slopes, folds.sizes)
    estimates = make_estimator(outer.section).estimate(statistics)
    gram = torch.tensor([[dot(a.gradient, b.gradient) for b in parts] for a in parts], dtype=torch.float64)
    table = ScoreTable(
        rows=_rows(losses, -slopes, statistics, estimates, found.losses),
        objective=objective.name,
        loss=inner.loss_text,
        adjoint=adjoint.name,
        scorer=found.scorer,
        estimator=make_estimator(outer.section).name,
        objective_value=float(values.mean()),
        objective_se=float(values.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else None,
        reliability=reliability(-slopes, folds.sizes, gram, statistics),
        solve=found.solves,
        scorer_error=found.error,
    )
    return Gains(table, statistics, estimates)


def candidate_losses(policy: Policy, inner: InnerProblem) -> CandidateLosses:
    """Tokenise all candidates and look up their reference log-probabilities.

    Args:
        policy: the policy.
        inner: the candidates and their loss.

    Returns:
        The vector of losses.
    """
    encode = policy.encoder.encode
    rows = tuple(encode(row.prompt, row.completion, row.source or row.id) for row in inner.forget)
    sums = policy.reference_sums(rows) if inner.loss.needs_reference else torch.zeros(len(rows))
    return CandidateLosses(policy, inner.loss, rows, sums, tuple(row.id for row in inner.forget))


def _check(slopes: Tensor, ids: tuple[str, ...]) -> None:
    bad = [ids[k] for k in torch.nonzero(~torch.isfinite(slopes).all(1)).flatten().tolist()]
    if bad:
        raise NonFiniteError("score", "score", None, bad)


def _rows(
    losses: CandidateLosses, gains: Tensor, statistics: FoldStatistics, estimates: Tensor, base: Tensor
) -> tuple[ScoreRow, ...]:
    se = [None] * len(losses.ids) if statistics.se is None else statistics.se.tolist()
    return tuple(
        ScoreRow(
            id=losses.ids[k],
            gain=float(statistics.gain[k]),
            gain_se=se[k],
            estimate=float(estimates[k]),
            fold_gains=tuple(gains[k].tolist()),
            loss=float(base[k]),
            n_answer_tokens=losses.rows[k].n_answer,
        )
        for k in range(len(losses.ids))
    )
