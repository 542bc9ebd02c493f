"""Does predicted gain equal measured gain? Every adjoint against whole unlearning runs, with controls.

Predicted: g . (omega' - omega) with g = dJ/d omega at uniform omega. Measured: J(theta_T(omega')) - J(theta_T(omega)).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lab import QUIET, Lab
from torch import Tensor

from u2a.bilevel.adjoint import Adjoint
from u2a.bilevel.curvature import make_curvature
from u2a.bilevel.gains import candidate_losses
from u2a.bilevel.hypergrad import Identity, Implicit
from u2a.bilevel.linsolve import CG
from u2a.bilevel.select import spearman
from u2a.bilevel.unrolled import Unrolled
from u2a.config import UnlearnSection
from u2a.record import derive_seed
from u2a.reward.embedding import Embedder, train_embedding_reward

SOLVER = CG(max_steps=30, tol=1e-3)
ADJOINTS: dict[str, Adjoint] = {
    "identity": Identity(),
    "implicit_hessian": Implicit(SOLVER, make_curvature("hessian", UnlearnSection())),
    "implicit_gauss_newton": Implicit(SOLVER, make_curvature("gauss_newton", UnlearnSection())),
    "implicit_fisher": Implicit(SOLVER, make_curvature("fisher", UnlearnSection())),
    "implicit_adam": Implicit(SOLVER, make_curvature("adam", UnlearnSection()), damping=0.01),
    "unrolled": Unrolled(),
}
CONTROLS = ("random", "loss", "gradient_norm", "lowest_reward")


@dataclass(frozen=True)
class Measured:
    """What whole runs did.

    Attributes:
        base: (2,) J on PA and held-out pairs at uniform weights.
        random: (draws, n) random omega; ``random_j`` (draws, 2) J there.
        groups: (groups, n) omega without one random group each; ``groups_j`` J there.
        single: (n, n) omega without one candidate each; ``single_j`` J there.
        seconds_per_run: mean wall time of a run with its two measurements.
    """

    base: Tensor
    random: Tensor
    random_j: Tensor
    groups: Tensor
    groups_j: Tensor
    single: Tensor
    single_j: Tensor
    seconds_per_run: float


def without(omega: Tensor, members: Sequence[int]) -> Tensor:
    """Omega with some weights set to 0, on the simplex again.

    Args:
        omega: (n,) weights.
        members: indices.

    Returns:
        (n,) weights.
    """
    left = omega.clone()
    left[list(members)] = 0.0
    return left / left.sum()


def measure(
    lab: Lab, draws: int, n_groups: int, group_size: int = 4, concentration: float = 16.0, single: bool = True
) -> Measured:
    """Run the inner problem at many omega.

    Args:
        lab: the world.
        draws: random omega, from a symmetric Dirichlet distribution.
        n_groups: random groups left out.
        group_size: candidates per group.
        concentration: of the Dirichlet distribution; its relative standard deviation is about 1 / sqrt of it.
        single: also leave out each candidate alone (otherwise those rows are those of the base run).

    Returns:
        J of each run.
    """
    n, uniform = len(lab.ids), lab.uniform()
    generator = torch.Generator().manual_seed(derive_seed(lab.world.seed, "random omega"))
    gammas = torch._standard_gamma(torch.full((draws, n), concentration, dtype=torch.float64), generator)
    random = gammas / gammas.sum(1, keepdim=True)
    members = [torch.randperm(n, generator=generator)[:group_size].tolist() for _ in range(n_groups)]
    groups = torch.stack([without(uniform, chosen) for chosen in members])
    alone = torch.stack([without(uniform, [k]) for k in range(n)]) if single else uniform[None, :].expand(n, n)
    start = time.monotonic()
    everything = lab.measured([uniform, *random, *groups, *(alone if single else [])])
    seconds = (time.monotonic() - start) / len(everything)
    base, random_j, groups_j, single_j = everything.split([1, draws, n_groups, n if single else 0])
    single_j = single_j if single else base.expand(n, 2)
    return Measured(base[0], random, random_j, groups, groups_j, alone, single_j, seconds)


def interval(predicted: Tensor, measured: Tensor, seed: int, resamples: int = 1000) -> tuple[float, float, float]:
    """Spearman correlation with a 95 % percentile bootstrap interval over runs.

    Args:
        predicted: (m,) predicted changes.
        measured: (m,) measured changes.
        seed: of the resampling.
        resamples: how many.

    Returns:
        (correlation, low, high).
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(resamples):
        chosen = torch.randint(len(predicted), (len(predicted),), generator=generator)
        values.append(spearman(predicted[chosen], measured[chosen]) or 0.0)
    low, high = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.025, 0.975]).double())
    return spearman(predicted, measured) or 0.0, float(low), float(high)


def sign_accuracy(predicted: Tensor, measured: Tensor) -> float:
    """Share of runs in which J moved in the predicted direction.

    Args:
        predicted: (m,) predicted changes.
        measured: (m,) measured changes.

    Returns:
        In [0, 1].
    """
    return float((predicted.sign() == measured.sign()).double().mean())


def top_precision(predicted: Tensor, measured: Tensor, share: float = 0.25) -> float:
    """Share of the predicted best candidates that are among the measured best.

    Args:
        predicted: (n,) gains.
        measured: (n,) gains.
        share: how many of them count as best.

    Returns:
        In [0, 1]; ``share`` by chance.
    """
    k = max(1, round(share * len(predicted)))
    found, true = (set(torch.topk(values, k).indices.tolist()) for values in (predicted, measured))
    return len(found & true) / k


def judged(gains: Tensor, measured: Measured, uniform: Tensor, seed: int) -> dict[str, object]:
    """Compare one set of gains with the runs.

    Args:
        gains: (n,) predicted dJ / d omega.
        measured: the runs.
        uniform: (n,) omega of the base run.
        seed: of the bootstrap.

    Returns:
        Figures by name; ``heldout`` is the same correlation with J on held-out pairs, which no adjoint has seen.
    """
    predicted = (measured.random - uniform) @ gains
    change = measured.random_j - measured.base
    group_predicted, group_change = (measured.groups - uniform) @ gains, measured.groups_j - measured.base
    single_change = measured.base - measured.single_j  # what having the candidate brings
    lds, low, high = interval(predicted, change[:, 0], seed)
    heldout = interval(predicted, change[:, 1], seed)
    groups = interval(group_predicted, group_change[:, 0], seed)
    return {
        "lds": lds,
        "lds_interval": [low, high],
        "lds_heldout": heldout[0],
        "lds_heldout_interval": list(heldout[1:]),
        "leave_group_out": groups[0],
        "leave_group_out_interval": list(groups[1:]),
        "sign_accuracy": sign_accuracy(predicted, change[:, 0]),
        "sign_base_rate": max(float((side * change[:, 0] > 0).double().mean()) for side in (1.0, -1.0)),
        "sign_accuracy_groups": sign_accuracy(group_predicted, group_change[:, 0]),
        "topk_precision": top_precision(gains, single_change[:, 0]),
    }


def control_scores(lab: Lab, embedder: str | None) -> dict[str, Tensor]:
    """What candidates could be ranked by without any hypergradient.

    Args:
        lab: the world.
        embedder: sentence embedder of the reward model, or None to leave the lowest reward out.

    Returns:
        (n,) scores by control, higher = unlearn first.
    """
    point = lab.point()
    policy, losses = point.policy, candidate_losses(point.policy, point.problem)
    generator = torch.Generator().manual_seed(derive_seed(lab.world.seed, "random score"))
    norms = []
    for k in range(len(lab.ids)):
        slopes = torch.autograd.grad(losses.of([k]).sum(), list(policy.trainable().values()), materialize_grads=True)
        norms.append(sum(float(slope.double().square().sum()) for slope in slopes) ** 0.5)
    out = {
        "random": torch.randn(len(lab.ids), generator=generator, dtype=torch.float64),
        "loss": losses.values(),
        "gradient_norm": torch.tensor(norms, dtype=torch.float64),
    }
    if embedder is not None:
        model = train_embedding_reward(Embedder(embedder), lab.preference)
        rows = lab.world.candidates
        out["lowest_reward"] = -model.score([row.prompt for row in rows], [row.completion for row in rows]).double()
    return out


def validity(lab: Lab, measured: Measured, embedder: str | None) -> dict[str, dict[str, object]]:
    """Judge every adjoint and control on one world.

    Args:
        lab: the world.
        measured: its runs.
        embedder: see :func:`control_scores`.

    Returns:
        Figures by adjoint or control, with the seconds each took.
    """
    out: dict[str, dict[str, object]] = {}
    for name, adjoint in ADJOINTS.items():
        start = time.monotonic()
        point = lab.point()
        found = adjoint.derivatives(point, [lab.gradient()], QUIET)
        seconds = time.monotonic() - start
        figures = judged(-found.values[:, 0], measured, lab.uniform(), lab.world.seed)
        status = found.solves[0].model_dump() if found.solves else None
        out[name] = figures | {"seconds": seconds, "solve": status, "gains": (-found.values[:, 0]).tolist()}
    for name, scores in control_scores(lab, embedder).items():
        out[name] = judged(scores, measured, lab.uniform(), lab.world.seed)
    return out
