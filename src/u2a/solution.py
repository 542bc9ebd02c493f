"""The records of stage 3: gains with their uncertainty, rounds of selection, and the weighted set they lead to."""

from __future__ import annotations

from typing import Literal

from u2a.record import Record, Row


class SolveStatus(Row):
    """How a linear solve ended.

    Attributes:
        status: ``converged``, ``max_steps``, ``negative_curvature`` (damping was raised) or ``closed_form``.
        steps: matrix-vector products used.
        residual: relative residual reached, computed from the definition.
        damping: damping finally used, absolute.
        mean_eigenvalue: estimated mean eigenvalue of the curvature, the unit in which damping was asked for, or None.
    """

    status: Literal["converged", "max_steps", "negative_curvature", "closed_form"]
    steps: int
    residual: float
    damping: float
    mean_eigenvalue: float | None = None


class ScoreRow(Row):
    """Predicted effect of unlearning one candidate.

    Attributes:
        id: the example's id.
        gain: data gain, minus the data part of dg/d omega (poster eq. 8); positive = unlearning it raises J.
        gain_se: standard error over prompt-disjoint PA folds (of the centred gain), or None with one fold.
        estimate: what selection ranks by (the gain after lower bound or shrinkage).
        fold_gains: the gain under each PA fold.
        loss: unlearning loss at the point of scoring, or None.
        damage: predicted rise of the retain NLL per unit of weight, or None when not asked for.
        n_answer_tokens: answer tokens scored.
    """

    id: str
    gain: float
    gain_se: float | None = None
    estimate: float
    fold_gains: tuple[float, ...] = ()
    loss: float | None = None
    damage: float | None = None
    n_answer_tokens: int = 0


class Reliability(Row):
    """Whether the gain ranking survives a change of preference pairs (method, section 6b).

    Attributes:
        split_half: Spearman correlation of the gains under two prompt-disjoint halves of the PA set,
            None when undefined (fewer than three candidates or all equal).
        full_set: Spearman-Brown prediction for the whole PA set, or None.
        gradient_cosine: cosine of the two halves' gradients of J.
        mean_gain: average gain ("does unlearning as such help?").
        mean_gain_se: its standard error over folds, or None.
        signal_sd: estimated standard deviation of the true centred gains (0 = no signal found), or None with one fold
            or one candidate, as the next two.
        noise_sd: root mean square standard error of the centred gains, or None.
        p_signal: p-value of "no signal" over flips of whole folds' signs, or None.
        n_pairs, n_folds, n_candidates: sizes.
    """

    split_half: float | None = None
    full_set: float | None = None
    gradient_cosine: float | None = None
    mean_gain: float
    mean_gain_se: float | None = None
    signal_sd: float | None = None
    noise_sd: float | None = None
    p_signal: float | None = None
    n_pairs: int
    n_folds: int
    n_candidates: int


class ScoreTable(Record):
    """Gains of all candidates with their uncertainty, in the order they were given.

    Attributes:
        rows: one per candidate.
        objective, loss, adjoint, scorer, estimator: how they were computed, as names with parameters.
        objective_value: J on the PA set at the point of scoring.
        objective_se: its standard error over prompts, or None.
        reliability: split-half reliability and signal.
        solve: status of the linear solves: one per fold, and one each for the common direction and the damage.
        scorer_error: relative disagreement with exact derivatives on a sample, or None.
    """

    rows: tuple[ScoreRow, ...]
    objective: str
    loss: str
    adjoint: str
    scorer: str
    estimator: str
    objective_value: float
    objective_se: float | None = None
    reliability: Reliability
    solve: tuple[SolveStatus, ...] = ()
    scorer_error: float | None = None


class WeightRow(Row):
    """One candidate's place in the solution.

    Attributes:
        id: the example's id.
        weight: omega_i (0 when not selected; all weights sum to 1).
        estimate: gain estimate of the round whose weights these are (of the last one, where they were refined).
        reason: why it is in or out, in a few words.
    """

    id: str
    weight: float
    estimate: float | None = None
    reason: str = ""


class Round(Row):
    """One round of selection, or the final refinement of the weights (which adds none).

    Attributes:
        index: 0-based.
        objective_pa: J on the PA pairs used for gradients, at the round's inner solution.
        objective_heldout: J on the held-out PA pairs there, or None without a split.
        retain_ppl: retain perplexity there, or None.
        fw_gap: Frank-Wolfe gap max_k <grad g, omega - e_k> over the data term, or None in the first round.
        n_selected: support after the round.
        added, dropped: ids.
        accepted: whether J, measured at the new inner solution, rose above that of every round before.
        split_half: reliability of the round's gains.
        seconds: wall time.
        reward: mean reward of the policy's own answers to a few PA prompts there, or None when not measured.
    """

    index: int
    objective_pa: float
    objective_heldout: float | None = None
    retain_ppl: float | None = None
    fw_gap: float | None = None
    n_selected: int
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    accepted: bool = True
    split_half: float | None = None
    seconds: float = 0.0
    reward: float | None = None

    @property
    def name(self) -> str:
        """How tables call it: its number, or ``refined`` where only weights moved."""
        return str(self.index + 1) if self.added or self.index == 0 else "refined"


class Solution(Record):
    """The weighted set: which negatives to unlearn and how strongly.

    Attributes:
        rows: every candidate, selected or not, in the order given.
        rounds: the course of the selection.
        scores: gains of all candidates at the best round, by which the weights were chosen.
        stopped: why it ended.
        fallback: ``none``, ``random_k`` (no signal: a random draw of equal size, uniform weights) or
            ``empty`` (no candidate promises a gain).
        start_heldout: J on the held-out PA pairs at theta_0, or None where no round is judged by them.
        support: J against the number selected is in ``rounds``.
    """

    rows: tuple[WeightRow, ...]
    rounds: tuple[Round, ...] = ()
    scores: ScoreTable
    stopped: str
    fallback: Literal["none", "random_k", "empty"] = "none"
    start_heldout: float | None = None

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the selected candidates by id; positive, summing to 1 (empty for an empty selection)."""
        return {row.id: row.weight for row in self.rows if row.weight > 0}
