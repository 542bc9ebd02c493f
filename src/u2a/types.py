"""The records of stages 1, 2, 4 and 5: the data, the reward table, the unlearning run and its evaluation.

Those of stage 3 are in :mod:`u2a.solution`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from u2a.folding import fold
from u2a.record import Record, Row

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
        retain_measured: rows of their own on which utility is measured (experiments); empty: a fifth of ``retain``.
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
    retain_measured: tuple[Example, ...] = ()
    preference: tuple[Pair, ...] = ()
    reward: tuple[Pair, ...] = ()
    evaluation: tuple[Pair, ...] = ()
    leaks: tuple[Leak, ...] = ()
    dropped: dict[str, int] = {}
    fingerprint: str = ""

    def retain_parts(self) -> RetainParts:
        """Split the retain rows: 60 % train the retain term, 20 % the guard watches, 20 % are held out.

        Returns:
            The three parts without a common prompt, by order of id; with fewer than five prompts each part is the whole
            set. Where ``retain_measured`` is given, those rows are held out, and the others both train and are watched.
        """
        rows = tuple(sorted(self.retain, key=lambda row: row.id))
        if self.retain_measured:
            return RetainParts(rows, rows, tuple(sorted(self.retain_measured, key=lambda row: row.id)))
        asked = [tuple(fold(turn.content) for turn in row.prompt if turn.role == "user") for row in rows]
        place = {prompt: k % 5 for k, prompt in enumerate(dict.fromkeys(asked))}
        if len(place) < 5:
            return RetainParts(rows, rows, rows)
        fifth = [place[prompt] for prompt in asked]
        parts = (tuple(row for row, k in zip(rows, fifth, strict=True) if k in ks) for ks in ((0, 1, 2), (3,), (4,)))
        return RetainParts(*parts)


# --- stage 2: reward analysis -------------------------------------------------------------------


class RewardCard(Row):
    """What is known of a reward model.

    Attributes:
        name: a readable name.
        n_train: pairs it was trained on, here or as a saved head (0 = pretrained).
        pair_accuracy: share of held-out pairs ranked rightly, or None without pairs.
        pair_accuracy_low, pair_accuracy_high: 95 % interval, Wilson's, or from resampling prompts where they repeat.
        n_pairs: held-out pairs counted.
        n_prompts: their prompts.
        n_trained_on: further held-out pairs, which do not count: a saved head was trained on their prompts.
        ece: expected calibration error over ``n_bins`` bins of equal mass, in [0, 1/2] for a model of any worth.
        ece_if_calibrated: the ECE which a calibrated model with the same confidences would show on so few pairs;
            an ``ece`` near it is no evidence of miscalibration.
        n_bins: bins, at most one per 20 pairs (pairs of equal confidence share a bin).
        brier, brier_low, brier_high: mean (1 - p)^2 of the probability p given to the chosen answer (coin: 1/4).
        log_loss, log_loss_low, log_loss_high: mean -log p in nats (coin: log 2 = 0.693).
        length_correlation, length_correlation_low, length_correlation_high: Pearson correlation of reward and answer
            length in characters.
        length_rank_correlation, length_rank_correlation_low, length_rank_correlation_high: Spearman's.
    """

    name: str
    n_train: int = 0
    pair_accuracy: float | None = None
    pair_accuracy_low: float | None = None
    pair_accuracy_high: float | None = None
    n_pairs: int = 0
    n_prompts: int = 0
    n_trained_on: int = 0
    ece: float | None = None
    ece_if_calibrated: float | None = None
    n_bins: int = 0
    brier: float | None = None
    brier_low: float | None = None
    brier_high: float | None = None
    log_loss: float | None = None
    log_loss_low: float | None = None
    log_loss_high: float | None = None
    length_correlation: float | None = None
    length_correlation_low: float | None = None
    length_correlation_high: float | None = None
    length_rank_correlation: float | None = None
    length_rank_correlation_low: float | None = None
    length_rank_correlation_high: float | None = None


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
        midpoint: reward below which candidates are kept (``reward.prefilter_below``), or None.
        rows: one per candidate.
    """

    card: RewardCard
    threshold: float | None = None
    quantile: float | None = None
    midpoint: float | None = None
    rows: tuple[RewardRow, ...] = ()


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
        note: why there is no value (withheld, not available), or what must be read beside it; else empty.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    values: dict[str, float] = {}
    note: str = ""


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
        p: two-sided p-value of flipping the signs of whole prompts' differences, which a few prompts cannot push down
            as they narrow a bootstrap interval; None where the metric is no mean over items.
    """

    metric: str
    first: str
    second: str
    difference: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    p: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0, and the p-value, where there is one, is at most 5 %."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return False
        return self.p is None or self.p <= 0.05


class Agreement(Row):
    """How alike two reward models rank the same things; 1 is the same order, 0 none, -1 the reverse.

    Attributes:
        first, second: the models.
        over: ``prompts`` (each answer's reward) or ``arms`` (each arm's mean reward).
        spearman, kendall: correlation with a 95 % interval from resampling prompts; ``n`` counts prompts.
        n_ranked: answers or arms ranked; fewer than three have no order to compare.
    """

    first: str
    second: str
    over: str
    spearman: Metric
    kendall: Metric
    n_ranked: int


class EvalTable(Record):
    """Metrics of every arm on the held-out pairs, prompts and retain rows.

    Attributes:
        arms: metrics by arm name (``before``, ``after``, ``random_k``, ...), then by metric name.
        contrasts: paired differences (``after`` against ``before`` and ``random_k``).
        samples: generated answers.
        reward_card: the evaluation reward model (never the one that selects).
        second_reward_card: the second reward model, where there is one.
        agreements: how alike both reward models rank answers and arms.
        collapsed: what prevails in the answers of an arm that has collapsed, by arm.
        judge: the judges of the prompt sets, and what is known of their error; empty without sets.
        verdict: one sentence: did selection beat random-k: yes, no, or not shown.
    """

    arms: dict[str, dict[str, Metric]]
    contrasts: tuple[Contrast, ...] = ()
    samples: tuple[Sample, ...] = ()
    reward_card: RewardCard | None = None
    second_reward_card: RewardCard | None = None
    agreements: tuple[Agreement, ...] = ()
    collapsed: dict[str, str] = {}
    judge: str = ""
    verdict: str = ""
