"""Everything measured on one arm: the same prompts, rows, decoding and judges for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from u2a.config_evaluation import EvaluationSection
from u2a.data import prompt_key
from u2a.evaluation.answer_cache import AnswerCache
from u2a.evaluation.attack_success import SafetyRate, attack_success, over_refusal
from u2a.evaluation.coherence import LongTextEncoder, coherence, coherence_metrics
from u2a.evaluation.decoding import Answer, Decoding
from u2a.evaluation.degenerate import Collapse, Observed, collapse, degeneration
from u2a.evaluation.generation import answer_text, generate_ids
from u2a.evaluation.judge import Judge, Verdict, judged
from u2a.evaluation.membership import attack_scores, auc_metric
from u2a.evaluation.memorisation import memorisation_metrics
from u2a.evaluation.perplexity import perplexity_metric, retain_nll
from u2a.evaluation.preference import preference_hits, preference_margins
from u2a.evaluation.prompt_sets import PromptSet, Wanted
from u2a.evaluation.refusal import is_refusal
from u2a.evaluation.reward_value import answer_rewards
from u2a.evaluation.risk import risk_bound
from u2a.evaluation.stats import bootstrap_mean, rate_interval
from u2a.evaluation.token_stats import token_stats
from u2a.modeling import Policy
from u2a.progress import Advance, Console
from u2a.record import Record, Row, derive_seed
from u2a.reward.base import RewardModel, prompt_text
from u2a.types import Example, Message, Metric, Pair, Partition

Turns = tuple[Message, ...]
SOLUTION = "after"
RATES = ("preference_accuracy", "refusal_rate", "degenerate_rate")


@dataclass(frozen=True)
class Instruments:
    """What arms are measured with, besides the run's own data; every arm of a table gets the same.

    Attributes:
        reward_model: the evaluation's reward model, or None.
        second_model: a second, independent one, or None.
        judge: judge of harmful prompt sets; None only without any.
        harmless_judge: judge of refusals on harmless ones; None only without any.
        prompt_sets: prompts from files.
        encoder: sentence embeddings for coherence, or None.
        holdout: texts never trained on, for membership inference; may be empty.
        cache: answers made before, or None.
    """

    reward_model: RewardModel | None = None
    second_model: RewardModel | None = None
    judge: Judge | None = None
    harmless_judge: Judge | None = None
    prompt_sets: tuple[PromptSet, ...] = ()
    encoder: LongTextEncoder | None = None
    holdout: tuple[Example, ...] = ()
    cache: AnswerCache | None = None


class SetResult(Row):
    """Answers to one prompt set.

    Attributes:
        judge: name of the judge.
        wanted: what a good model does with these prompts.
        answers: answer by prompt id.
        verdicts: the judge's verdict by prompt id.
    """

    judge: str
    wanted: Wanted
    answers: dict[str, str]
    verdicts: dict[str, Verdict]


class ArmResult(Record):
    """Everything measured on one arm; it can be saved, so that a stopped evaluation goes on arm by arm.

    Attributes:
        name: the arm (``before``, ``after``, ``random_k``, ...).
        metrics: metric by name; see :data:`u2a.evaluation.metrics.METRICS`.
        answers: generated answer by pair id.
        rewards: reward of it by pair id (empty without a reward model).
        second_rewards: the same under the second reward model.
        retain_nll: summed NLL in nats by retain row id.
        retain_tokens: answer tokens by retain row id.
        sets: answers and verdicts by prompt set.
        collapse: whether the model has collapsed, judged on all generated answers; None without any.
    """

    name: str
    metrics: dict[str, Metric]
    answers: dict[str, str] = {}
    rewards: dict[str, float] = {}
    second_rewards: dict[str, float] = {}
    retain_nll: dict[str, float] = {}
    retain_tokens: dict[str, float] = {}
    sets: dict[str, SetResult] = {}
    collapse: Collapse | None = None


@dataclass(frozen=True)
class _Arm:
    """The policy at one theta with everything its measurement needs."""

    policy: Policy
    partition: Partition
    instruments: Instruments
    section: EvaluationSection
    seed: int
    bar: Advance

    @property
    def resampling(self) -> tuple[int, int]:
        """Number and seed of bootstrap resamples."""
        return self.section.bootstrap, derive_seed(self.seed, "bootstrap")

    def answers(self, prompts: Mapping[str, Turns]) -> dict[str, Answer]:
        """Answer prompts that are keyed by id."""
        section = self.section
        seed = derive_seed(self.seed, "evaluation answers")
        decoding = Decoding(section.max_new_tokens, section.temperature, section.top_k, section.top_p, seed)
        found = generate_ids(self.policy, list(prompts.values()), decoding, self.bar, self.instruments.cache)
        return dict(zip(prompts, found, strict=True))

    def texts(self, answers: Mapping[str, Answer]) -> dict[str, str]:
        """Decode answers."""
        return {key: answer_text(self.policy, answer) for key, answer in answers.items()}


def evaluate_arm(
    policy: Policy,
    partition: Partition,
    instruments: Instruments,
    section: EvaluationSection,
    seed: int,
    progress: Console,
    name: str = SOLUTION,
) -> ArmResult:
    """Measure the policy at its current theta.

    Args:
        policy: the policy; it is not changed.
        partition: ``evaluation`` pairs, ``retain`` and ``forget`` rows are read.
        instruments: reward models, judge, prompt sets and so on; what is not there is left out.
        section: prompts answered, decoding, resamples.
        seed: the run's seed; arms of one table must share it.
        progress: shows the phase ``evaluate NAME``.
        name: name of the arm.

    Returns:
        The arm's metrics. A metric without data has value None and n = 0.

    Raises:
        NonFiniteError: log-probabilities of the pairs, logits or rewards are not finite.
    """
    pairs = prompts_answered(partition.evaluation, section.generate_prompts)
    kept = partition.retain_parts().evaluation
    total = len(partition.evaluation) + len(kept) + len(pairs) + sum(len(s.prompts) for s in instruments.prompt_sets)
    with progress.phase(f"evaluate {name}", total=total, unit="rows") as bar:
        arm = _Arm(policy, partition, instruments, section, seed, bar)
        margins = preference_margins(policy, partition.evaluation)
        bar.advance(len(partition.evaluation), "preference")
        retained = retain_nll(policy, kept)
        bar.advance(len(kept), "perplexity")
        prompts = {pair.id: pair.prompt for pair in pairs}
        answered = arm.answers(prompts)
        texts = arm.texts(answered)
        first = _rewards(instruments.reward_model, prompts, texts)
        second = _rewards(instruments.second_model, prompts, texts)
        sets, observed = _prompt_sets(arm)
        forgotten = _forgetting(arm)
    observed += [Observed(prompt_text(prompts[key]), texts[key], answered[key].finished) for key in prompts]
    fallen = collapse(observed, section.max_new_tokens) if observed else None
    metrics = _answer_metrics(arm, margins, texts, first)
    metrics["retain_ppl"] = perplexity_metric(retained, item_groups(partition), *arm.resampling)
    if instruments.second_model is not None:
        metrics["reward_second"] = _mean(arm, second)
    if instruments.encoder is not None:
        asked = {key: prompt_text(turns) for key, turns in prompts.items()}
        found = coherence(instruments.encoder, asked, texts)
        metrics |= coherence_metrics(instruments.encoder, found, item_groups(partition), *arm.resampling)
    for key, result in sets.items():
        metrics |= _set_metrics(key, result, fallen)
    return ArmResult(
        name=name,
        metrics=metrics | forgotten,
        answers=texts,
        rewards=first,
        second_rewards=second,
        retain_nll=retained.nll,
        retain_tokens=retained.tokens,
        sets=sets,
        collapse=fallen,
    )


def prompts_answered(pairs: Sequence[Pair], n: int) -> list[Pair]:
    """Choose the prompts that every arm answers: distinct ones, by the hash of the prompt.

    Args:
        pairs: held-out pairs.
        n: prompts at most.

    Returns:
        One pair per prompt (that of least id), the same for any order of ``pairs``.
    """
    first: dict[str, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: pair.id):
        first.setdefault(prompt_key(pair.prompt), pair)
    return [first[key] for key in sorted(first)[:n]]


def item_groups(partition: Partition) -> dict[str, str]:
    """Find the cluster of every measured item: rows of one prompt are not independent.

    Args:
        partition: the run's data.

    Returns:
        Prompt key by id of every evaluation pair, retain and forget row.
    """
    rows = (*partition.evaluation, *partition.retain, *partition.retain_measured, *partition.forget)
    return {row.id: prompt_key(row.prompt) for row in rows}


def _rewards(model: RewardModel | None, prompts: Mapping[str, Turns], texts: Mapping[str, str]) -> dict[str, float]:
    return {} if model is None else answer_rewards(model, prompts, texts)


def _mean(arm: _Arm, values: Mapping[str, float]) -> Metric:
    found = bootstrap_mean(values, item_groups(arm.partition), *arm.resampling)
    return Metric(value=found.value, low=found.low, high=found.high, n=found.n, values=dict(values))


def _answer_metrics(
    arm: _Arm, margins: Mapping[str, float], texts: Mapping[str, str], rewards: Mapping[str, float]
) -> dict[str, Metric]:
    """What every evaluation has; metrics without values stay in the table as undefined."""
    values: dict[str, Mapping[str, float]] = {
        "preference_accuracy": preference_hits(dict(margins)),
        "preference_margin": margins,
        "reward": rewards,
        "refusal_rate": {key: float(is_refusal(text)) for key, text in texts.items()},
        "degenerate_rate": {key: float(degeneration(text) is not None) for key, text in texts.items()},
        "answer_words": {key: float(len(text.split())) for key, text in texts.items()},
    }
    groups = item_groups(arm.partition)
    metrics = {}
    for name, items in values.items():
        found = (rate_interval if name in RATES else bootstrap_mean)(items, groups, *arm.resampling)
        metrics[name] = Metric(value=found.value, low=found.low, high=found.high, n=found.n, values=dict(items))
    return metrics


def _prompt_sets(arm: _Arm) -> tuple[dict[str, SetResult], list[Observed]]:
    """Answer and judge every prompt set."""
    results, observed = {}, []
    for item in arm.instruments.prompt_sets:
        judge = arm.instruments.judge if item.wanted == "refuse" else arm.instruments.harmless_judge
        assert judge is not None, "prompt sets need a judge"
        answered = arm.answers(item.prompts)
        texts = arm.texts(answered)
        asked = {key: prompt_text(turns) for key, turns in item.prompts.items()}
        verdicts = judged(judge, asked, texts)
        results[item.name] = SetResult(judge=judge.name, wanted=item.wanted, answers=texts, verdicts=verdicts)
        harmless = item.wanted == "comply"
        observed += [Observed(asked[key], texts[key], answered[key].finished, harmless) for key in texts]
    return results, observed


def _set_metrics(name: str, found: SetResult, fallen: Collapse | None) -> dict[str, Metric]:
    if found.wanted == "comply":
        return {f"over_refusal/{name}": _metric_of(over_refusal(found.verdicts, found.judge, fallen))}
    rate = attack_success(found.verdicts, found.judge, fallen)
    metrics = {f"asr/{name}": _metric_of(rate), f"incoherent_rate/{name}": rate.incoherent}
    return metrics | {f"harm_bound/{name}": _harm_bound(rate, found.verdicts)}


def _harm_bound(rate: SafetyRate, verdicts: Mapping[str, Verdict]) -> Metric:
    """Bound the risk of a harmful answer, among answers that say anything; those not scored count as harmful."""
    if rate.rate.value is None:
        return Metric(value=None, n=rate.rate.n, note="withheld with the rate")
    losses = {key: float(item.state != "refused") for key, item in verdicts.items() if item.state != "incoherent"}
    bound = risk_bound(losses, used_ids=(), binary=True)  # the sets hold no prompt that was trained on
    return Metric(value=bound.upper, n=bound.n, note=f"with probability {1 - bound.delta:g}; {bound.caveat}")


def _metric_of(rate: SafetyRate) -> Metric:
    """The rate with its coverage, judge and what withholds it in the note."""
    coverage = "-" if rate.coverage is None else f"{rate.coverage:.3f}"
    withheld = f"withheld: {rate.withheld}; " if rate.withheld else ""
    caveat = f"; {rate.caveat}" if rate.caveat else ""
    return rate.rate.model_copy(update={"note": f"{withheld}coverage {coverage}, judge {rate.judge}{caveat}"})


def _forgetting(arm: _Arm) -> dict[str, Metric]:
    """Memorisation of forget rows, and membership inference against the holdout."""
    n = arm.section.forget_rows
    if n == 0 or not arm.partition.forget:
        return {}
    sides = arm.partition.forget, arm.instruments.holdout
    forget, holdout = (sorted(rows, key=lambda row: row.id)[:n] for rows in sides)
    groups = {row.id: prompt_key(row.prompt) for row in (*forget, *holdout)}
    stats = token_stats(arm.policy, [*forget, *holdout])
    inside, outside = ({row.id: stats[row.id] for row in rows} for rows in (forget, holdout))
    metrics = memorisation_metrics(inside, groups, *arm.resampling)
    if holdout:
        start = None
        if float(arm.policy.change_sq().detach()) > 0:  # at the start itself every difference is 0
            with arm.policy.reference():
                start = token_stats(arm.policy, [*forget, *holdout])
        scores = attack_scores(inside, outside, start)
        metrics |= {name: auc_metric(attack, groups) for name, attack in scores.items()}
    return metrics
