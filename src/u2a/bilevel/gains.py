"""From preference pairs and candidates to a table of gains: gradient of J per fold, adjoint, scorer, statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from u2a.batch_size import forward_batches
from u2a.bilevel.adjoint import Adjoint, InnerPoint
from u2a.bilevel.candidates import CandidateLosses, in_several_processes
from u2a.bilevel.fold_gradients import fold_gradients
from u2a.bilevel.hypergrad import make_adjoint
from u2a.bilevel.objective import DPO, NLL, Margin, Objective, ObjectiveGradient
from u2a.bilevel.select import FoldStatistics, alike, fold_statistics, make_estimator, reliability
from u2a.bilevel.variance import pooled, without_common
from u2a.bilevel.vectors import dot, scaled, zeros_like
from u2a.config import SolveSection
from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.losses import SFT
from u2a.modeling import Params, Policy
from u2a.parts import Parts
from u2a.progress import Advance, Console
from u2a.record import content_id
from u2a.solution import ScoreRow, ScoreTable
from u2a.tensor_tree import tensors_id
from u2a.types import Pair, UnlearnResult
from u2a.unlearn import InnerProblem, problem_id


@dataclass(frozen=True)
class OuterProblem:
    """The outer problem: what aligned means, and how gains are computed.

    Attributes:
        preference: the PA pairs.
        section: options of stage 3.
        objective: J; None makes it from the section.
        seed: seed of folds and random draws.
        probe: measured after every inner run (mean reward of the policy's own answers), for the record; None: nothing.
        clusters: cluster number of each candidate by id, for ``solve.clusters``; None where gains are not pooled.
        checkpoints: directory where a search keeps what it has found, so that it goes on after a stop; None: nowhere.
    """

    preference: tuple[Pair, ...]
    section: SolveSection = field(default_factory=SolveSection)
    objective: Objective | None = None
    seed: int = 0
    probe: Callable[[Policy], float] | None = None
    clusters: Mapping[str, int] | None = None
    checkpoints: Path | None = None

    @property
    def inner_checkpoints(self) -> Path | None:
        """Where inner runs keep their checkpoints."""
        return None if self.checkpoints is None else self.checkpoints / "inner"

    def clusters_of(self, inner: InnerProblem) -> list[int] | None:
        """Return the cluster of each candidate.

        Args:
            inner: the candidates.

        Returns:
            Numbers in the order of ``inner.forget``, or None where gains are not pooled.

        Raises:
            ConfigError: ``solve.clusters`` is set and no clusters are given.
        """
        if self.section.clusters == 0:
            return None
        if self.clusters is None:
            raise ConfigError("solve.clusters needs the clusters of the candidates (pass OuterProblem(clusters=...))")
        return [self.clusters[row.id] for row in inner.forget]

    def objective_value(self) -> Objective:
        """Return J.

        Returns:
            The objective.

        Raises:
            ConfigError: ``solve.objective: reward`` without a value (it needs a reward model).
        """
        if self.objective is not None:
            return self.objective
        objectives: dict[str, Objective] = {
            "margin": Margin(),
            "summed_margin": Margin(per_token=False),
            "dpo": DPO(self.section.dpo_beta),
            "nll": NLL(),
        }
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

    def merged(self) -> Folds:
        """All pairs in one fold.

        Returns:
            The same held-out pairs, and one fold with the others.
        """
        return Folds((tuple(pair for fold in self.folds for pair in fold),), self.heldout)


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
        plain: (n,) the same without regard to the noise.
    """

    table: ScoreTable
    statistics: FoldStatistics
    estimates: Tensor
    plain: Tensor

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
    extra = _extra_gradients(policy, inner, section, losses, console)
    point = InnerPoint(policy, inner, reached.weights, losses, section, outer.seed, reached.result, kept)
    found = adjoint.derivatives(point, [*(part.gradient for part in parts), *extra.values()], console)
    _check(found.values, losses.ids)
    columns = dict(zip(extra, found.values[:, len(parts) :].T, strict=True))
    gains = _projected(-found.values[:, : len(parts)], parts, extra, columns)
    statistics, estimator = fold_statistics(gains, folds.sizes), make_estimator(section)
    clusters = outer.clusters_of(inner)  # pooling fits the folds: what tests and ranks their agreement is not pooled
    ranked = statistics if clusters is None else fold_statistics(pooled(gains, clusters), folds.sizes)
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
        objective_se=float(values.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else None,
        reliability=reliability(gains, folds.sizes, gram, statistics),
        solve=found.solves,
        scorer_error=found.error,
    )
    return Gains(table, statistics, estimates, plain)


_LAYOUT = 4  # of parts on the disk: which columns a scorer keeps, and how the rows that are there are noted


def _parts(policy: Policy, inner: InnerProblem, outer: OuterProblem, folds: Folds, reached: Reached) -> Parts:
    """Where what is found at this theta is kept, under the hash of all that it depends on."""
    if outer.checkpoints is None or in_several_processes():
        return Parts()
    pairs = [[pair.id for pair in fold] for fold in (*folds.folds, folds.heldout)]
    document = [
        policy.identity,
        tensors_id(policy.trainable()),
        search_id(inner, outer),
        pairs,
        dict(reached.weights),
        _LAYOUT,
        None if reached.result is None else [reached.result.steps_kept, reached.result.scale],
    ]
    return Parts(outer.checkpoints / "parts", content_id(json.dumps(document, sort_keys=True)))


def search_id(inner: InnerProblem, outer: OuterProblem) -> str:
    """Content id of candidates, preference pairs and options.

    Args:
        inner: candidates and inner options.
        outer: preference pairs and outer options.

    Returns:
        The id; how often checkpoints are saved does not change it.
    """
    pairs = content_id(*(pair.model_dump_json() for pair in outer.preference))
    clusters = json.dumps(outer.clusters_of(inner))
    section = outer.section.model_dump_json()
    return content_id(
        problem_id(inner, inner.forget), pairs, clusters, section, outer.objective_value().name, str(outer.seed)
    )


def _extra_gradients(
    policy: Policy, inner: InnerProblem, section: SolveSection, losses: CandidateLosses, console: Console
) -> dict[str, Params]:
    """Gradients beside those of J: ``common``, that of the mean candidate loss, and ``retain``, minus the utility."""
    out: dict[str, Params] = {}
    if section.remove_common:
        with console.phase("mean candidate gradient", len(losses.rows), "candidates") as advance:
            out["common"] = _mean_gradient(losses, advance)
    if section.damage_weight > 0.0:
        if not inner.retain:
            raise ConfigError("solve.damage_weight needs retain rows (set data.retain, or damage_weight to 0)")
        rows = inner.retain[: section.curvature_samples]
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
