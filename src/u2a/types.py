"""The records that stages hand to each other: frozen, typed, saved whole or not at all.

Every record is one JSON file. Undefined statistics are ``None`` with a count beside them,
never a filler number; NaN and infinities are refused on save.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from u2a.errors import RecordError

SCHEMA = 1


def content_id(*parts: str) -> str:
    """Return a 16-hex-digit id of a text, the same on every machine.

    Args:
        *parts: strings; their boundaries count (``("ab", "c")`` differs from ``("a", "bc")``).

    Returns:
        64 bits of BLAKE2b as hexadecimal digits.

    >>> content_id("a", "b") == content_id("a", "b"), content_id("ab") == content_id("a", "b")
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.hexdigest()


def derive_seed(seed: int, purpose: str) -> int:
    """Derive the seed of one generator from the run's one seed.

    Args:
        seed: the run's seed.
        purpose: what the generator is for; different purposes get independent seeds.

    Returns:
        Seed in [0, 2**31).
    """
    return int(content_id(str(seed), purpose), 16) % 2**31


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a mix.

    Args:
        path: target; its parent is created.
        text: content, written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's file mode mask (mkstemp ignores it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Row(BaseModel):
    """Base of the parts of records: frozen, no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", protected_namespaces=())


class Record(Row):
    """Base of what a stage returns: a row that can be saved to and loaded from one JSON file."""

    def save(self, path: str | Path) -> Path:
        """Save to ``path`` atomically.

        Args:
            path: a ``.json`` file.

        Returns:
            The path written.

        Raises:
            RecordError: a number in the record is NaN or infinite.
        """
        document = {"record": type(self).__name__, "schema": SCHEMA, "data": self.model_dump(mode="json")}
        bad = _non_finite_key(document["data"], type(self).__name__)
        if bad:
            raise RecordError(f"{path}: {bad}: not a finite number (use None for an undefined statistic)")
        write_whole(Path(path), json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a record saved by :meth:`save`.

        Args:
            path: the ``.json`` file.

        Returns:
            The record, equal to the one saved.

        Raises:
            RecordError: missing or damaged file, another record's file, or a newer schema.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordError(f"{path}: no {cls.__name__} there (run the stage that writes it first)") from None
        except (OSError, ValueError) as error:
            raise RecordError(f"{path}: unreadable ({error}); delete it and run its stage again") from None
        if not isinstance(document, dict) or document.get("record") != cls.__name__:
            found = document.get("record") if isinstance(document, dict) else type(document).__name__
            raise RecordError(f"{path}: holds {found!r}, expected {cls.__name__!r}")
        if document.get("schema", 0) > SCHEMA:
            raise RecordError(f"{path}: schema {document['schema']} is newer than {SCHEMA} (upgrade u2a)")
        try:
            return cls.model_validate(document["data"])
        except (ValidationError, KeyError) as error:
            raise RecordError(f"{path}: not a valid {cls.__name__}: {error}") from None


def _non_finite_key(value: Any, where: str) -> str | None:
    """Return the path of the first NaN or infinity inside nested lists and dicts, or None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found = _non_finite_key(item, f"{where}.{key}")
        if found:
            return found
    return None


# --- stage 1: partition -------------------------------------------------------------------------


class Message(Row):
    """One turn of a conversation in the chat format of transformers and TRL."""

    role: Literal["system", "user", "assistant"]
    content: str


class Example(Row):
    """A prompt with one answer (a negative candidate or a retain row).

    Attributes:
        id: content hash of prompt and completion; scores and weights are keyed by it.
        prompt: the turns before the answer; the last one is the user's.
        completion: the answer's text.
        weight: the optional column ``weight`` of the source (non-negative), or None.
        kind: free label of the source (for tables only; no method reads it), or None.
        source: ``file:line`` or ``dataset[index]``.
    """

    id: str
    prompt: tuple[Message, ...]
    completion: str
    weight: float | None = None
    kind: str | None = None
    source: str = ""


class Pair(Row):
    """A prompt with a preferred and a rejected answer; fields as in :class:`Example`."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    kind: str | None = None
    source: str = ""


class Leak(Row):
    """Rows of one set that stand in another one too.

    Attributes:
        first, second: names of the two sets.
        level: ``prompt`` (same prompt after case and space folding) or ``text`` (same prompt and answer).
        count: rows of ``first`` concerned.
        examples: up to three ids.
    """

    first: str
    second: str
    level: Literal["prompt", "text"]
    count: int
    examples: tuple[str, ...] = ()


class RetainParts(NamedTuple):
    """Disjoint parts of the retain set: for the retain term, for the collapse guard, for evaluation."""

    train: tuple[Example, ...]
    guard: tuple[Example, ...]
    evaluation: tuple[Example, ...]


class Partition(Record):
    """The disjoint sets of a run, split by prompt.

    Attributes:
        finetune: pairs for the misaligned start (empty when there is none).
        forget: negative candidates, one row per distinct (prompt, answer).
        retain: ordinary instructions whose quality must survive.
        preference: the PA (preference-alignment) pairs that define the outer objective.
        reward: pairs on which reward heads are trained.
        evaluation: held-out pairs; nothing is chosen or tuned on them.
        leaks: overlaps that were found (an exact one with ``evaluation`` is an error unless allowed).
        dropped: rows left out, by reason.
        fingerprint: content hash of all sets.
    """

    finetune: tuple[Pair, ...] = ()
    forget: tuple[Example, ...] = ()
    retain: tuple[Example, ...] = ()
    preference: tuple[Pair, ...] = ()
    reward: tuple[Pair, ...] = ()
    evaluation: tuple[Pair, ...] = ()
    leaks: tuple[Leak, ...] = ()
    dropped: dict[str, int] = {}
    fingerprint: str = ""

    def retain_parts(self) -> RetainParts:
        """Split the retain rows: 60 % train the retain term, 20 % the guard watches, 20 % are held out.

        Returns:
            The three parts, by order of id; with fewer than five rows each part is the whole set.
        """
        rows = tuple(sorted(self.retain, key=lambda row: row.id))
        if len(rows) < 5:
            return RetainParts(rows, rows, rows)
        return RetainParts(tuple(row for k, row in enumerate(rows) if k % 5 < 3), rows[3::5], rows[4::5])


# --- stage 2: reward analysis -------------------------------------------------------------------


class RewardCard(Row):
    """What is known of a reward model.

    Attributes:
        name: a readable name.
        n_train: pairs it was trained on here (0 = pretrained).
        pair_accuracy: share of held-out pairs ranked rightly, or None without pairs.
        pair_accuracy_low, pair_accuracy_high: Wilson 95 % interval.
        n_pairs: held-out pairs counted.
        length_correlation: Pearson correlation of reward and answer length in characters.
    """

    name: str
    n_train: int = 0
    pair_accuracy: float | None = None
    pair_accuracy_low: float | None = None
    pair_accuracy_high: float | None = None
    n_pairs: int = 0
    length_correlation: float | None = None


class RewardRow(Row):
    """Reward of one negative: whole answer, per token where the model gives it.

    Attributes:
        id: the example's id.
        reward: sequence reward (the model's own unit; higher is better).
        token_rewards: one reward per answer token, or None.
        low_token_frac: share of tokens under the table's threshold (rho), or None.
        kept: False when the pre-filter left the candidate out.
    """

    id: str
    reward: float
    token_rewards: tuple[float, ...] | None = None
    low_token_frac: float | None = None
    kept: bool = True


class RewardTable(Record):
    """Result of the reward analysis: one row per negative, in the order of ``Partition.forget``.

    Attributes:
        card: the reward model.
        threshold: low-reward threshold (token rewards where there are any, else sequence rewards):
            the ``quantile`` of the PA set's chosen answers.
        quantile: the quantile used.
        rows: one per candidate.
    """

    card: RewardCard
    threshold: float | None = None
    quantile: float | None = None
    rows: tuple[RewardRow, ...] = ()


# --- stage 3: score, select, weight -------------------------------------------------------------


class SolveStatus(Row):
    """How a linear solve ended.

    Attributes:
        status: ``converged``, ``max_steps``, ``negative_curvature`` (damping was raised) or ``closed_form``.
        steps: matrix-vector products used.
        residual: relative residual reached, computed from the definition.
        damping: damping finally used, absolute.
    """

    status: Literal["converged", "max_steps", "negative_curvature", "closed_form"]
    steps: int
    residual: float
    damping: float


class ScoreRow(Row):
    """Predicted effect of unlearning one candidate.

    Attributes:
        id: the example's id.
        gain: data gain, minus the data part of dg/d omega (poster eq. 8); positive = unlearning it raises J.
        gain_se: standard error over prompt-disjoint PA folds (of the centred gain), or None with one fold.
        estimate: what selection ranks by (the gain after lower bound or shrinkage).
        fold_gains: the gain under each PA fold.
        loss: unlearning loss at the point of scoring, or None.
        n_answer_tokens: answer tokens scored.
    """

    id: str
    gain: float
    gain_se: float | None = None
    estimate: float
    fold_gains: tuple[float, ...] = ()
    loss: float | None = None
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
        signal_sd: estimated standard deviation of the true centred gains (0 = no signal found).
        noise_sd: root mean square standard error of the centred gains.
        n_pairs, n_folds, n_candidates: sizes.
    """

    split_half: float | None = None
    full_set: float | None = None
    gradient_cosine: float | None = None
    mean_gain: float
    mean_gain_se: float | None = None
    signal_sd: float
    noise_sd: float
    n_pairs: int
    n_folds: int
    n_candidates: int


class ScoreTable(Record):
    """Gains of all candidates with their uncertainty, in the order they were given.

    Attributes:
        rows: one per candidate.
        objective, loss, adjoint, scorer, estimator: how they were computed, as names with parameters.
        objective_value: J on the PA set at the point of scoring.
        objective_se: its standard error over pairs, or None.
        reliability: split-half reliability and signal.
        solve: status of the linear solve, one per fold.
        scorer_error: relative disagreement with exact forward-mode derivatives on a sample, or None.
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
        estimate: gain estimate of the last round.
        reason: why it is in or out, in a few words.
    """

    id: str
    weight: float
    estimate: float | None = None
    reason: str = ""


class Round(Row):
    """One round of selection.

    Attributes:
        index: 0-based.
        objective_pa: J on the PA pairs used for gradients, at the round's inner solution.
        objective_heldout: J on the held-out PA pairs there, or None without a split.
        retain_ppl: retain perplexity there, or None.
        fw_gap: Frank-Wolfe gap max_k <grad g, omega - e_k> over the data term, or None in the first round.
        n_selected: support after the round.
        added, dropped: ids.
        accepted: whether the block was kept.
        split_half: reliability of the round's gains.
        seconds: wall time.
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


class Solution(Record):
    """The weighted set: which negatives to unlearn and how strongly.

    Attributes:
        rows: every candidate, selected or not, in the order given.
        rounds: the course of the selection.
        scores: the score table of the last scoring that covered all candidates.
        stopped: why it ended.
        fallback: ``none``, ``random_k`` (no signal: a random draw of equal size, uniform weights) or
            ``empty`` (no candidate promises a gain).
        support: J against the number selected is in ``rounds``.
    """

    rows: tuple[WeightRow, ...]
    rounds: tuple[Round, ...] = ()
    scores: ScoreTable
    stopped: str
    fallback: Literal["none", "random_k", "empty"] = "none"

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the selected candidates by id; positive, summing to 1 (empty for an empty selection)."""
        return {row.id: row.weight for row in self.rows if row.weight > 0}


# --- stage 4: unlearn ---------------------------------------------------------------------------


class StepLog(Row):
    """One logged optimiser step of an unlearning run.

    Attributes:
        step: optimiser step, 1-based.
        loss: training loss of the step (weighted unlearning loss plus retain term), nats.
        retain_ppl: retain perplexity after it where it was measured, else None.
        grad_norm: gradient norm before clipping, or None.
    """

    step: int
    loss: float | None = None
    retain_ppl: float | None = None
    grad_norm: float | None = None


class UnlearnResult(Record):
    """What an unlearning run did.

    Attributes:
        arm: name of the arm (``u2a``, ``random_k``, ``full``, ...).
        loss: unlearning loss with its parameters and retain term.
        n_samples: samples with positive weight.
        steps: optimiser steps taken.
        steps_kept: steps in the returned model (fewer after a roll-back).
        breached: True when the utility budget was exceeded and the run rolled back.
        retain_ppl_start, retain_ppl_end: perplexity of the guard's retain rows.
        ppl_budget: largest perplexity allowed.
        scale: adapter scale chosen by the line search (1 = the whole change).
        history: steps.
        seconds: wall time.
    """

    arm: str
    loss: str
    n_samples: int
    steps: int
    steps_kept: int
    breached: bool = False
    retain_ppl_start: float | None = None
    retain_ppl_end: float | None = None
    ppl_budget: float | None = None
    scale: float = 1.0
    history: tuple[StepLog, ...] = ()
    seconds: float = 0.0


# --- stage 5: evaluate --------------------------------------------------------------------------


class Metric(Row):
    """One number with its uncertainty.

    Attributes:
        value: point estimate, or None when undefined.
        low, high: 95 % interval (bootstrap over prompts, or Wilson for rates), or None.
        n: items counted (prompts where the interval is clustered by prompt).
        values: per-item values for paired comparisons, keyed by item id; may be empty.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    values: dict[str, float] = {}


class Sample(Row):
    """One prompt and the answers of each arm to it.

    Attributes:
        id: the pair's id.
        prompt: the last user turn.
        answers: generated answer by arm.
        rewards: reward of it by arm (evaluation reward model).
    """

    id: str
    prompt: str
    answers: dict[str, str]
    rewards: dict[str, float] = {}


class Contrast(Row):
    """Paired difference of one metric between two arms on the same prompts.

    Attributes:
        metric: metric name.
        first, second: arms; the difference is first minus second.
        difference, low, high: paired bootstrap mean and 95 % interval.
        n: prompts.
    """

    metric: str
    first: str
    second: str
    difference: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0


class EvalTable(Record):
    """Metrics of every arm on the held-out pairs, prompts and retain rows.

    Attributes:
        arms: metrics by arm name (``before``, ``after``, ``random_k``, ...), then by metric name.
        contrasts: paired differences (``after`` against ``before`` and ``random_k``).
        samples: generated answers.
        reward_card: the evaluation reward model (never the one that selects).
        verdict: one sentence: did selection beat random-k: yes, no, or not shown.
    """

    arms: dict[str, dict[str, Metric]]
    contrasts: tuple[Contrast, ...] = ()
    samples: tuple[Sample, ...] = ()
    reward_card: RewardCard | None = None
    verdict: str = ""
