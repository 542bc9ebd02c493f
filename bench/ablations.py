"""Questions around selection: damaged curvature, sparsity, single samples, top-K, and what lowers the variance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lab import QUIET, Lab
from torch import Tensor
from validity import SOLVER, top_precision, without

from u2a.bilevel.adjoint import Adjoint
from u2a.bilevel.curvature import make_curvature
from u2a.bilevel.hypergrad import Identity, Implicit
from u2a.bilevel.outer_problem import OuterProblem
from u2a.bilevel.select import spearman
from u2a.bilevel.solve import score
from u2a.bilevel.unrolled import Unrolled
from u2a.bilevel.weight import drop_small, refine
from u2a.config import SolveSection, UnlearnSection
from u2a.config_reward import RewardSection
from u2a.errors import NotConverged
from u2a.record import derive_seed
from u2a.reward.analysis import analyse
from u2a.reward.implicit import DpoSettings, train_implicit_reward


def top_uniform(scores: Tensor, k: int) -> Tensor:
    """Equal weights on the k best.

    Args:
        scores: (n,) higher = first.
        k: how many.

    Returns:
        (n,) omega.
    """
    omega = torch.zeros_like(scores)
    omega[torch.topk(scores, k).indices] = 1.0 / k
    return omega


def random_uniform(n: int, k: int, seed: int) -> Tensor:
    """Equal weights on k random candidates.

    Args:
        n: candidates.
        k: how many.
        seed: of the draw.

    Returns:
        (n,) omega.
    """
    omega = torch.zeros(n, dtype=torch.float64)
    omega[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]] = 1.0 / min(k, n)
    return omega


def curvature_stress(lab: Lab, truth: Tensor, k: int) -> list[dict[str, object]]:
    """What happens to selection when H is indefinite, misspecified or badly damped.

    Args:
        lab: the world.
        truth: (n,) exact unrolled gains.
        k: candidates selected by each.

    Returns:
        One row per curvature and damping (in mean eigenvalues): agreement with the truth, overlap of the selected,
        held-out J of the selected, and how the solve ended.
    """
    cases: list[tuple[str, str, float | str]] = [("identity", "", 0.0)]
    for name in ("hessian", "gauss_newton", "fisher", "adam"):
        dampings = (0.0, 0.01, 1.0, 100.0) if name == "adam" else (0.0, 0.01, 1.0, 100.0, "auto")
        cases += [("implicit", name, damping) for damping in dampings]
    draws = [random_uniform(len(truth), k, derive_seed(lab.world.seed, f"stress {draw}")) for draw in range(6)]
    rows: list[dict[str, object]] = [
        {"adjoint": "exact (unrolled)", "curvature": "", "damping": None, "status": "-", "spearman_to_exact": 1.0}
        | {"top_overlap": 1.0, "heldout_j": float(lab.measured([top_uniform(truth, k)])[0, 1])},
        {"adjoint": "random, mean of 6", "curvature": "", "damping": None, "status": "-"}
        | {"heldout_j": float(lab.measured(draws)[:, 1].mean())},
    ]
    for kind, name, damping in cases:
        adjoint: Adjoint = Identity()
        if kind != "identity":
            adjoint = Implicit(SOLVER, make_curvature(name, UnlearnSection()), damping)  # type: ignore[arg-type]
        row: dict[str, object] = {"adjoint": kind, "curvature": name, "damping": damping}
        try:
            found = adjoint.derivatives(lab.point(), [lab.gradient()], QUIET)
        except NotConverged as error:
            rows.append(row | {"status": f"refused: {error}"})
            continue
        gains = -found.values[:, 0]
        ((_, heldout),) = lab.measured([top_uniform(gains, k)]).tolist()
        status = found.solves[0]
        rows.append(
            row
            | {
                "status": status.status,
                "damping_used": status.damping,
                "steps": status.steps,
                "residual": status.residual,
                "spearman_to_exact": spearman(gains, truth),
                "top_overlap": top_precision(gains, truth, k / len(gains)),
                "heldout_j": heldout,
            }
        )
    return rows


def sparsity(lab: Lab, betas: Sequence[float]) -> list[dict[str, object]]:
    """Support size against J for both exponents of the penalty, with exact gains and many mirror steps.

    Args:
        lab: the world.
        betas: strengths, in units of the gains' standard deviation.

    Returns:
        One row per exponent and strength.
    """
    gains = lab.gains(Unrolled())
    unit = float(gains.std(correction=0))
    rows = []
    for p in (0.5, 1.0):
        for beta in betas:
            moved = refine(lab.uniform(), -gains, 0.1 / unit, 20, beta * unit, p)
            omega = drop_small(moved, 0.1)
            ((pa, heldout),) = lab.measured([omega]).tolist()
            entropy = -float((omega[omega > 0] * omega[omega > 0].log()).sum())
            rows.append(
                {
                    "p": p,
                    "beta": beta,
                    "support": int((omega > 0).sum()),
                    "effective": float(torch.tensor(entropy).exp()),
                    "pa_j": pa,
                    "heldout_j": heldout,
                }
            )
    return rows


def single_samples(lab: Lab, gains: Tensor, factors: Sequence[float], count: int) -> list[dict[str, object]]:
    """The paper's figure 2, left: J against the weight of one sample, others sharing the rest.

    Args:
        lab: the world.
        gains: (n,) exact gains, to pick samples from best to worst.
        factors: weight of the sample in units of 1 / n.
        count: samples.

    Returns:
        One row per sample: its gain, and measured PA J by factor.
    """
    n, uniform = len(gains), lab.uniform()
    order = torch.argsort(gains, descending=True)
    chosen = [int(order[round(k * (n - 1) / (count - 1))]) for k in range(count)]
    rows = []
    for k in chosen:
        omegas = []
        for factor in factors:
            omega = without(uniform, [k]) * (1.0 - factor / n)
            omega[k] = factor / n
            omegas.append(omega)
        rows.append(
            {
                "gain": float(gains[k]),
                "factors": list(factors),
                "pa_j": lab.measured(omegas)[:, 0].tolist(),
            }
        )
    return rows


def low_reward_groups(lab: Lab, groups: int) -> dict[str, object]:
    """The paper's figure 2, right: measured change of J against the proportion of low-reward tokens, by group.

    Candidates are sorted by that proportion (implicit DPO reward per token, trained on the PA pairs) and cut into
    groups; each group is unlearned alone.

    Args:
        lab: the world.
        groups: how many.

    Returns:
        Mean proportion and measured J by group, and their rank correlation.
    """
    policy = lab.world.policy
    policy.reset()
    settings = DpoSettings(learning_rate=1e-3, epochs=2)
    model = train_implicit_reward(policy, lab.preference, derive_seed(lab.world.seed, "implicit"), settings)
    table = analyse(model, lab.world.candidates, lab.preference, RewardSection(model="implicit"), len(lab.preference))
    rho = torch.tensor([row.low_token_frac or 0.0 for row in table.rows], dtype=torch.float64)
    chunks = torch.argsort(rho).chunk(groups)
    omegas = []
    for chunk in chunks:
        omega = torch.zeros_like(rho)
        omega[chunk] = 1.0 / len(chunk)
        omegas.append(omega)
    found = lab.measured(omegas)
    means = torch.tensor([float(rho[chunk].mean()) for chunk in chunks], dtype=torch.float64)
    return {
        "low_token_frac": means.tolist(),
        "pa_j": found[:, 0].tolist(),
        "heldout_j": found[:, 1].tolist(),
        "spearman": spearman(means, found[:, 0]),
        "spearman_heldout": spearman(means, found[:, 1]),
    }


def top_k_curve(lab: Lab, scores: dict[str, Tensor], sizes: Sequence[int], draws: int) -> list[dict[str, object]]:
    """The paper's figure 4: J of the top K by each score and of random K, as K grows, at equal steps.

    Args:
        lab: the world.
        scores: (n,) scores by name.
        sizes: values of K.
        draws: random sets per K.

    Returns:
        One row per K with PA and held-out J.
    """
    rows = []
    for k in sizes:
        row: dict[str, object] = {"k": k}
        for name, values in scores.items():
            row[name] = lab.measured([top_uniform(values, k)])[0].tolist()
        seeds = [derive_seed(lab.world.seed, f"random {k}, draw {draw}") for draw in range(draws)]
        randoms = lab.measured([random_uniform(len(lab.ids), k, seed) for seed in seeds])
        row["random"] = randoms.mean(0).tolist()
        row["random_sd"] = randoms.std(0, correction=1).tolist() if draws > 1 else [0.0, 0.0]
        rows.append(row)
    return rows


# Each remedy of the method's section 6b as a change of the options of stage 3.
REDUCERS: dict[str, dict[str, object]] = {
    "default": {},
    "summed log-probabilities": {"objective": "summed_margin"},
    "dpo": {"objective": "dpo"},
    "nll of good answers": {"objective": "nll"},
    "pairs clipped at the median": {"pair_clip": 0.5},
    "common direction removed": {"remove_common": True},
    "pooled over 8 clusters": {"clusters": 8},
    "adam metric": {"adjoint": "implicit", "curvature": "adam", "damping": 0.01},
    "less damage": {"damage_weight": 1.0},
}


def reducer_reliability(
    lab: Lab, sizes: Sequence[int], clusters: dict[str, int], objectives: dict[str, dict[str, object]] | None = None
) -> list[dict[str, object]]:
    """Split-half reliability of the gains under each remedy, by PA size, and how the ranking agrees with unseen pairs.

    Pooling and damage change the estimates alone, so their split-half is that of the default.

    Args:
        lab: the world.
        sizes: PA pairs.
        clusters: cluster of each candidate by id.
        objectives: remedies; None takes all.

    Returns:
        One row per remedy and size.
    """
    rows = []
    heldout = OuterProblem(lab.world.heldout, SolveSection(adjoint="identity", heldout_frac=0.0), None, lab.world.seed)
    unseen = torch.tensor([row.gain for row in score(lab.world.policy, lab.inner, heldout, QUIET).rows]).double()
    for name, changes in (REDUCERS if objectives is None else objectives).items():
        same_metric = not {"curvature", "remove_common"} & changes.keys()  # the cosine is that of plain gradients
        for size in sizes:
            section = SolveSection(**({"adjoint": "identity", "heldout_frac": 0.0} | changes))  # type: ignore[arg-type]
            outer = OuterProblem(lab.world.preference[:size], section, None, lab.world.seed, None, clusters)
            found = score(lab.world.policy, lab.inner, outer, QUIET)
            trust = found.reliability
            rows.append(
                {
                    "remedy": name,
                    "n_pa": trust.n_pairs,
                    "split_half": trust.split_half,
                    "agreement_with_heldout": spearman(
                        torch.tensor([row.estimate for row in found.rows], dtype=torch.float64), unseen
                    ),
                    "gradient_cosine": trust.gradient_cosine if same_metric else None,
                    "signal_to_noise": trust.signal_sd / trust.noise_sd
                    if trust.noise_sd and trust.signal_sd is not None
                    else None,
                }
            )
    return rows
