"""From preference pairs and candidates to a table of gains: gradient of J per fold, adjoint, scorer, statistics."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from u2a.batch_size import forward_batches
from u2a.bilevel.adjoint import Adjoint, InnerPoint, sample
from u2a.bilevel.candidates import CandidateLosses, in_several_processes
from u2a.bilevel.fold_gradients import fold_gradients
from u2a.bilevel.hypergrad import make_adjoint
from u2a.bilevel.objective import UNNAMED, CustomObjective, Objective, ObjectiveGradient
from u2a.bilevel.outer_problem import Folds, OuterProblem
from u2a.bilevel.reward_objective import ExpectedReward
from u2a.bilevel.select import FoldStatistics, alike, fold_statistics, make_estimator, reliability
from u2a.bilevel.variance import pooled, without_common
from u2a.bilevel.vectors import dot, scaled, zeros_like
from u2a.config import SolveSection
from u2a.data import prompt_key
from u2a.errors import ConfigError, NonFiniteError
from u2a.losses import SFT
from u2a.modeling import Params, Policy
from u2a.parts import Parts
from u2a.progress import Advance, Console
from u2a.record import content_id
from u2a.solution import ScoreRow, ScoreTable
from u2a.tensor_tree import tensors_id
from u2a.types import UnlearnResult
from u2a.unlearn import InnerProblem, run_id


@dataclass(frozen=True)
class Gains:
    """Everything one scoring found.

    Attributes:
        table: the record.
        statistics: gains with their uncertainty.
        estimates: (n,) what candidates are ranked by.
        plain: (n,) the same without regard to the noise.
        damage: mean over the candidates of what the estimates subtract for the retain rows, 0 without.
    """

    table: ScoreTable
    statistics: FoldStatistics
    estimates: Tensor
    plain: Tensor
    damage: float = 0.0

    @property
    def unit(self) -> float:
        """The unit of rates and tolerances: sd of the plain gains (1 when alike); noise moves weights little."""
        return 1.0 if alike(self.plain) else float(self.plain.std(correction=0))


@dataclass(frozen=True)
class Reached:
    """How the policy came to the theta where it stands.

    Attributes:
        weights: omega by candidate id, for the curvature and the unrolled derivative.
        result: what the inner run did; None after a warm-up.
    """

    weights: Mapping[str, float]
    result: UnlearnResult | None = None


def compute_gains(
    policy: Policy,
    inner: InnerProblem,
    outer: OuterProblem,
    folds: Folds,
    reached: Reached,
    console: Console,
    adjoint: Adjoint | None = None,
) -> Gains:
    """Score every candidate at the policy's current theta.

    Args:
        policy: the policy at theta*(omega), or after the warm-up.
        inner: candidates and losses.
        outer: objective and options.
        folds: the PA split.
        reached: how the policy came there.
        console: progress.
        adjoint: how gradients of J reach the candidates; None takes the configured one.

    Returns:
        Gains of all candidates, in the order of ``inner.forget``.

    Raises:
        NonFiniteError: a value, gradient, loss or score is not finite.
        ConfigError: a damage weight without retain rows.
    """
    section = outer.section
    adjoint = make_adjoint(section, inner.section) if adjoint is None else adjoint
    objective = outer.objective_value()
    kept = _parts(policy, inner, outer, folds, reached).of(adjoint.name)
    parts = fold_gradients(policy, objective, folds.folds, section.pair_clip, kept, console)
    losses = replace(candidate_losses(policy, inner), parts=kept)
    extra = _extra_gradients(policy, inner, outer, losses, console)
    point = InnerPoint(policy, inner, reached.weights, losses, section, outer.seed, reached.result, kept)
    found = adjoint.derivatives(point, [*(part.gradient for part in parts), *extra.values()], console)
    _check(found.values, losses.ids)
    columns = dict(zip(extra, found.values[:, len(parts) :].T, strict=True))
    gains = _projected(-found.values[:, : len(parts)], parts, extra, columns)
    statistics, estimator = fold_statistics(gains, folds.sizes, folds.noise), make_estimator(section)
    clusters = outer.clusters_of(inner)  # pooling fits the folds: what tests and ranks their agreement is not pooled
    ranked = statistics if clusters is None else fold_statistics(pooled(gains, clusters), folds.sizes, folds.noise)
    estimates = estimator.estimate(ranked)
    damage, plain = columns.get("retain"), ranked.gain
    if damage is not None:
        estimates, plain = estimates - section.damage_weight * damage, plain - section.damage_weight * damage
    _check(estimates[:, None], losses.ids, "estimate")
    gram = torch.tensor([[dot(a.gradient, b.gradient) for b in parts] for a in parts], dtype=torch.float64)
    values = torch.cat([part.values for part in parts])
    table = ScoreTable(
        rows=_rows(losses, gains, statistics, estimates, (found.losses, damage)),
        objective=objective.name,
        loss=inner.loss_text,
        adjoint=adjoint.name,
        scorer=found.scorer,
        estimator=_estimator_text(section, estimator.name),
        objective_value=float(values.mean()),
        objective_se=mean_se(values, [prompt_key(pair.prompt) for fold in folds.folds for pair in fold]),
        reliability=reliability(gains, folds.sizes, gram, statistics),
        solve=found.solves,
        scorer_error=found.error,
    )
    mean_damage = 0.0 if damage is None else section.damage_weight * float(damage.mean())
    return Gains(table, statistics, estimates, plain, mean_damage)


def mean_se(values: Tensor, groups: Sequence[str]) -> float | None:
    """Standard error of a mean whose items come in groups that share their noise (cluster-robust).

    se^2 = G/(G - 1) sum_g (sum_{i in g} (v_i - mean))^2 / n^2; with one item per group the usual one.

    Args:
        values: (n,) float64.
        groups: group of each, G in all.

    Returns:
        The standard error, in the unit of the values; None with fewer than two groups.

    Source: Liang & Zeger (1986), for a mean.
    """
    totals: dict[str, float] = defaultdict(float)
    for group, excess in zip(groups, (values - values.mean()).tolist(), strict=True):
        totals[group] += excess
    count = len(totals)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * math.fsum(total**2 for total in totals.values())) / len(values)


_LAYOUT = 4  # of parts on the disk: which columns a scorer keeps, and how the rows that are there are noted


def _parts(policy: Policy, inner: InnerProblem, outer: OuterProblem, folds: Folds, reached: Reached) -> Parts:
    """Where what is found at this theta is kept, under the hash of all that it depends on."""
    if outer.checkpoints is None or in_several_processes():
        return Parts()
    pairs = [[pair.id for pair in fold] for fold in (*folds.folds, folds.heldout)]
    document = [
        tensors_id(policy.trainable()),
        search_id(policy, inner, outer),
        pairs,
        dict(reached.weights),
        _LAYOUT,
        None if reached.result is None else [reached.result.steps_kept, reached.result.scale],
    ]
    return Parts(outer.checkpoints / "parts", content_id(json.dumps(document, sort_keys=True)))


def search_id(policy: Policy, inner: InnerProblem, outer: OuterProblem) -> str:
    """Content id of the policy at theta_0, candidates, preference pairs and options.

    Args:
        policy: the policy.
        inner: candidates and inner options.
        outer: preference pairs and outer options.

    Returns:
        The id; how often checkpoints are saved does not change it. What a function computes cannot be told, so an
        objective around one is known by its label.

    Raises:
        ConfigError: an objective without a label of its own.
    """
    pairs = content_id(*(pair.model_dump_json() for pair in outer.preference))
    clusters = json.dumps(outer.clusters_of(inner))
    section = outer.section.model_dump_json()
    options = (clusters, section, _identity_of(outer.objective_value()), str(outer.seed))
    return content_id(run_id(policy, inner, inner.forget), pairs, *options)


def _identity_of(objective: Objective) -> str:
    unnamed = {CustomObjective: UNNAMED, ExpectedReward: ""}
    if isinstance(objective, CustomObjective | ExpectedReward):
        if objective.label == unnamed[type(objective)]:
            kind = type(objective).__name__
            raise ConfigError(f"checkpoints: give the {kind} a label of its own (its progress is known by it)")
        return f"{objective.name}: {objective.label}"
    return objective.name


def _extra_gradients(
    policy: Policy, inner: InnerProblem, outer: OuterProblem, losses: CandidateLosses, console: Console
) -> dict[str, Params]:
    """Gradients beside those of J: ``common``, that of the mean candidate loss, and ``retain``, minus the utility."""
    section = outer.section
    out: dict[str, Params] = {}
    if section.remove_common:
        with console.phase("mean candidate gradient", len(losses.rows), "candidates") as advance:
            out["common"] = _mean_gradient(losses, advance)
    if section.damage_weight > 0.0:
        if not inner.retain:
            raise ConfigError("solve.damage_weight needs retain rows (set data.retain, or damage_weight to 0)")
        rows = sample(inner.retain, section.curvature_samples, outer.seed, "damage")
        encoded = tuple(policy.encoder.encode(row.prompt, row.completion, row.source or row.id) for row in rows)
        utility = CandidateLosses(policy, SFT(), encoded, torch.zeros(len(rows)), tuple(row.id for row in rows))
        with console.phase("retain gradient", len(rows), "rows") as advance:
            out["retain"] = scaled(_mean_gradient(utility, advance), -1.0)  # of -NLL: higher is better, as J is
    return out


def _mean_gradient(losses: CandidateLosses, advance: Advance) -> Params:
    """Gradient of the mean of a vector of losses."""
    parameters = losses.policy.trainable()
    total = zeros_like(parameters)

    def compute(batch: list[int]) -> tuple[Tensor | None, ...]:
        value = losses.of(batch).sum() / len(losses.rows)
        return torch.autograd.grad(value, list(parameters.values()), allow_unused=True)

    policy = losses.policy
    for batch, gradients in forward_batches(losses.rows, policy.token_budget, policy.limits, compute):
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.to(total[name])
        advance.advance(len(batch))
    return total


def _projected(
    gains: Tensor, parts: Sequence[ObjectiveGradient], extra: Mapping[str, Params], columns: Mapping[str, Tensor]
) -> Tensor:
    """Gains by fold, without the common direction where that is asked for."""
    if "common" not in extra:
        return gains
    common = extra["common"]
    shares = torch.tensor([dot(part.gradient, common) for part in parts], dtype=torch.float64)
    size = dot(common, common)
    return without_common(gains, -columns["common"], shares / size) if size > 0.0 else gains


def _estimator_text(section: SolveSection, name: str) -> str:
    """The estimator with the reductions of variance in force."""
    parts = [name]
    parts += [f"pairs clipped at the {section.pair_clip:g} quantile"] if section.pair_clip < 1.0 else []
    parts += ["common direction removed"] if section.remove_common else []
    parts += [f"pooled over {section.clusters} clusters"] if section.clusters else []
    parts += [f"less {section.damage_weight:g} x damage"] if section.damage_weight > 0.0 else []
    return ", ".join(parts)


def candidate_losses(policy: Policy, inner: InnerProblem) -> CandidateLosses:
    """Tokenise all candidates and look up their reference log-probabilities.

    Args:
        policy: the policy; at theta_0 unknown references are left to the pass that scores.
        inner: the candidates and their loss.

    Returns:
        The vector of losses.
    """
    encode = policy.encoder.encode
    rows = tuple(encode(row.prompt, row.completion, row.source or row.id) for row in inner.forget)
    sums: Tensor | None = torch.zeros(len(rows))
    if inner.loss.needs_reference:
        sums = None if policy.knows_none_of(rows) and policy.at_start() else policy.reference_sums(rows)
    return CandidateLosses(policy, inner.loss, rows, sums, tuple(row.id for row in inner.forget))


def _check(numbers: Tensor, ids: tuple[str, ...], what: str = "score") -> None:
    bad = [ids[k] for k in torch.nonzero(~torch.isfinite(numbers).all(1)).flatten().tolist()]
    if bad:
        raise NonFiniteError(what, "score", None, bad)


def _rows(
    losses: CandidateLosses,
    gains: Tensor,
    statistics: FoldStatistics,
    estimates: Tensor,
    beside: tuple[Tensor | None, Tensor | None],
) -> tuple[ScoreRow, ...]:
    """One row per candidate; ``beside`` holds the losses and the damage, where they are known."""
    se = [None] * len(losses.ids) if statistics.se is None else statistics.se.tolist()
    base, damage = beside
    return tuple(
        ScoreRow(
            id=losses.ids[k],
            gain=float(statistics.gain[k]),
            gain_se=se[k],
            estimate=float(estimates[k]),
            fold_gains=tuple(gains[k].tolist()),
            loss=None if base is None else float(base[k]),
            damage=None if damage is None else float(damage[k]),
            n_answer_tokens=losses.rows[k].n_answer,
        )
        for k in range(len(losses.ids))
    )
