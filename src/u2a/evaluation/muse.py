"""MUSE's six questions about a model that was made to forget.

C1 verbatim memorisation, C2 knowledge memorisation, C3 privacy leakage and C4 utility are numbers of one model; C5
(scalability) and C6 (sustainability) are experiments: C4 after requests of growing size, and after successive requests.

Source: Shi et al. 2024, arXiv 2407.06460.
Departs: questions are chat turns (MUSE completes plain text after "Answer:"), the holdout is checked for overlap, and
knowledge and utility are ROUGE-L recall (the released code seems to take F1, which words around the answer lower).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from u2a.config import AdapterConfig, DataSection
from u2a.data import prompt_key, read_examples
from u2a.errors import ConfigError, DataError
from u2a.evaluation.answer_cache import AnswerCache
from u2a.evaluation.decoding import Decoding
from u2a.evaluation.forget_quality import NO_RETRAIN, privleak
from u2a.evaluation.generation import generate
from u2a.evaluation.membership import AttackScores, check_holdout, min_k_score
from u2a.evaluation.memorisation import (
    KNOWLEDGE_TOKENS,
    VERBATIM_TOKENS,
    knowledge_memorisation,
    mean_metric,
    verbatim_memorisation,
)
from u2a.evaluation.token_stats import answer_text, token_stats
from u2a.modeling import Policy
from u2a.record import Record, Row
from u2a.rows import Source
from u2a.types import Example, Message, Metric
from u2a.unlearn import InnerProblem, InnerSolver

Request = tuple[Example, ...]
State = TypeVar("State")


@dataclass(frozen=True)
class MuseData:
    """Texts and questions; a part that is empty leaves its question without a number.

    Attributes:
        forget: texts that were to be forgotten, for C1 and C3.
        forget_questions: questions about them with short true answers, for C2.
        retain_questions: questions about what must still be known, for C4.
        holdout: texts of the same kind as ``forget`` that were never trained on, for C3.
        shots: questions with answers that precede every question (MUSE takes 10).
    """

    forget: tuple[Example, ...] = ()
    forget_questions: tuple[Example, ...] = ()
    retain_questions: tuple[Example, ...] = ()
    holdout: tuple[Example, ...] = ()
    shots: tuple[Example, ...] = ()


@dataclass(frozen=True)
class MuseOptions:
    """How it is measured.

    Attributes:
        verbatim_tokens: tokens of the greedy continuation for C1, >= 1.
        knowledge_tokens: tokens of an answer for C2 and C4, >= 1.
        resamples: bootstrap resamples.
        seed: seed of the resampling.
    """

    verbatim_tokens: int = VERBATIM_TOKENS
    knowledge_tokens: int = KNOWLEDGE_TOKENS
    resamples: int = 1000
    seed: int = 0


class MuseReport(Record):
    """The first four answers.

    Attributes:
        verbatim: C1, percent, down.
        knowledge: C2, percent, down.
        privleak: C3, percent, towards 0.
        utility: C4, percent, up.
    """

    verbatim: Metric
    knowledge: Metric
    privleak: Metric
    utility: Metric


class MusePoint(Row):
    """One point of the curves of C5 and C6.

    Attributes:
        requests: requests forgotten so far (0 = the start).
        rows: rows in them.
        utility: C4 there.
    """

    requests: int
    rows: int
    utility: Metric


def read_muse(sources: Mapping[str, Source], section: DataSection) -> MuseData:
    """Read the parts from files of prompts with answers.

    Args:
        sources: file or rows by attribute name of :class:`MuseData`; any may be left out.
        section: the columns (``retain_fields``) and ``system_prompt``.

    Returns:
        The data.

    Raises:
        ConfigError: an unknown part.
        DataError: unusable rows, of all parts at once.
    """
    unknown = sorted(set(sources) - set(MuseData.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"{unknown[0]}: no part of MUSE's data (expected {', '.join(MuseData.__dataclass_fields__)})")
    problems: list[str] = []
    parts: dict[str, tuple[Example, ...]] = {}
    for name, source in sources.items():
        try:
            parts[name] = tuple(read_examples(source, section, good=True, name=name))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return MuseData(**parts)


def muse(
    policy: Policy,
    data: MuseData,
    options: MuseOptions,
    retrained: AttackScores | None = None,
    cache: AnswerCache | None = None,
) -> MuseReport:
    """Answer the first four questions for the policy at its current theta.

    Args:
        policy: the policy; it is not changed.
        data: texts and questions.
        options: lengths and intervals.
        retrained: :func:`min_k_attack` of the model retrained without the forget rows, or None.
        cache: keeps generated answers.

    Returns:
        The numbers; a part without data, and C3 without a retrained model, has value None and a note that says why.

    Raises:
        ConfigError: rouge-score is not installed.
        DataError: the holdout shares a prompt with the forget rows, or a shot is one of the questions.
        NonFiniteError: the model gives NaN.
    """
    return MuseReport(
        verbatim=_verbatim(policy, data, options, cache),
        knowledge=_knowledge(policy, data.forget_questions, data.shots, options, cache),
        privleak=_leak(policy, data, retrained),
        utility=_knowledge(policy, data.retain_questions, data.shots, options, cache),
    )


def utility(policy: Policy, data: MuseData, options: MuseOptions, cache: AnswerCache | None = None) -> Metric:
    """C4 alone, as measured along the curves of C5 and C6; arguments and errors as for :func:`muse`.

    Args:
        policy: the policy.
        data: ``retain_questions`` and ``shots`` are read.
        options: lengths and intervals.
        cache: keeps generated answers.

    Returns:
        100 x mean ROUGE-L recall of the answers to the retain questions.
    """
    return _knowledge(policy, data.retain_questions, data.shots, options, cache)


def min_k_attack(policy: Policy, forget: Sequence[Example], holdout: Sequence[Example]) -> AttackScores:
    """Scores of the Min-40 % attack, for :func:`u2a.evaluation.forget_quality.privleak`.

    Args:
        policy: the unlearned or the retrained model.
        forget: forget rows.
        holdout: rows of the same kind that were never trained on.

    Returns:
        The scores.

    Raises:
        ConfigError: no holdout.
        DataError: the holdout shares a prompt with the forget rows.
    """
    check_holdout(forget, holdout)
    sides = (token_stats(policy, rows) for rows in (forget, holdout))
    return AttackScores(*({key: min_k_score(stats) for key, stats in side.items()} for side in sides))


def _verbatim(policy: Policy, data: MuseData, options: MuseOptions, cache: AnswerCache | None) -> Metric:
    if not data.forget:
        return Metric(value=None, note="not available: no forget rows")
    decoding = Decoding(options.verbatim_tokens)
    texts = generate(policy, [row.prompt for row in data.forget], decoding, cache=cache)
    answers = {row.id: text for row, text in zip(data.forget, texts, strict=True)}
    truths = {row.id: answer_text(policy, row, options.verbatim_tokens) for row in data.forget}
    return _summary(verbatim_memorisation(truths, answers), data.forget, options)


def _knowledge(
    policy: Policy,
    questions: Sequence[Example],
    shots: Sequence[Example],
    options: MuseOptions,
    cache: AnswerCache | None,
) -> Metric:
    if not questions:
        return Metric(value=None, note="not available: no questions")
    told = {prompt_key(shot.prompt) for shot in shots}
    doubled = [row for row in questions if prompt_key(row.prompt) in told]
    if doubled:
        raise DataError(f"shots: {len(doubled)} of the questions stand among them, with their answers (leave them out)")
    decoding = Decoding(options.knowledge_tokens)
    texts = generate(policy, [with_shots(row.prompt, shots) for row in questions], decoding, cache=cache)
    answers = {row.id: text for row, text in zip(questions, texts, strict=True)}
    return _summary(knowledge_memorisation({row.id: row.completion for row in questions}, answers), questions, options)


def with_shots(prompt: tuple[Message, ...], shots: Sequence[Example]) -> tuple[Message, ...]:
    """Put solved questions before a question.

    Args:
        prompt: turns of the question.
        shots: questions with answers.

    Returns:
        The question's system turns, then every shot as a user's and an assistant's turn, then the question.
    """
    system = tuple(turn for turn in prompt if turn.role == "system")
    solved = [
        turn
        for shot in shots
        for turn in (*shot.prompt, Message(role="assistant", content=shot.completion))
        if turn.role != "system"
    ]
    return (*system, *solved, *(turn for turn in prompt if turn.role != "system"))


def _summary(values: Mapping[str, float | None], rows: Sequence[Example], options: MuseOptions) -> Metric:
    groups = {row.id: prompt_key(row.prompt) for row in rows}
    return mean_metric(values, groups, options.resamples, options.seed)


def _leak(policy: Policy, data: MuseData, retrained: AttackScores | None) -> Metric:
    if not data.forget or not data.holdout:
        return Metric(value=None, note="not available: it needs forget rows and a holdout never trained on")
    if retrained is None:
        return Metric(value=None, note=NO_RETRAIN)
    groups = {row.id: prompt_key(row.prompt) for row in (*data.forget, *data.holdout)}
    return privleak(min_k_attack(policy, data.forget, data.holdout), retrained, groups)


# --- C5 and C6 ----------------------------------------------------------------------------------


def split_requests(rows: Sequence[Example], n: int = 4) -> tuple[Request, ...]:
    """Divide forget rows into requests of about equal size, all rows of a prompt in one request.

    Args:
        rows: forget rows.
        n: requests, >= 1.

    Returns:
        The requests, the same for any order of ``rows``.

    Raises:
        ConfigError: fewer prompts than requests, or ``n`` < 1.
    """
    by_prompt: dict[str, list[Example]] = {}
    for row in sorted(rows, key=lambda row: row.id):
        by_prompt.setdefault(prompt_key(row.prompt), []).append(row)
    if not 1 <= n <= len(by_prompt):
        raise ConfigError(f"requests: {n} of them from {len(by_prompt)} distinct prompts (expected 1 to that many)")
    requests: list[list[Example]] = [[] for _ in range(n)]
    for key in sorted(by_prompt):
        min(requests, key=len).extend(by_prompt[key])
    return tuple(tuple(request) for request in requests)


def scalability(
    start: State,
    requests: Sequence[Request],
    unlearn: Callable[[State, Request], State],
    measure: Callable[[State], Metric],
) -> tuple[MusePoint, ...]:
    """C5: utility after one request of growing size, each time from the start.

    Args:
        start: the model before; ``unlearn`` must leave it as it is.
        requests: the first j of them together are the j-th request; see :func:`split_requests`.
        unlearn: returns the state after forgetting some rows.
        measure: C4 of a state.

    Returns:
        A point for the start and one per size.
    """
    points = [MusePoint(requests=0, rows=0, utility=measure(start))]
    for count in range(1, len(requests) + 1):
        union = tuple(row for request in requests[:count] for row in request)
        points.append(MusePoint(requests=count, rows=len(union), utility=measure(unlearn(start, union))))
    return tuple(points)


def sustainability(
    start: State,
    requests: Sequence[Request],
    unlearn: Callable[[State, Request], State],
    measure: Callable[[State], Metric],
) -> tuple[MusePoint, ...]:
    """C6: utility after successive requests, each from where the one before ended.

    Args:
        start: the model before; ``unlearn`` must leave it as it is.
        requests: one after the other; with those of :func:`scalability` the two curves have the same rows.
        unlearn: returns the state after forgetting some rows.
        measure: C4 of a state.

    Returns:
        A point for the start and one per request.
    """
    points, state = [MusePoint(requests=0, rows=0, utility=measure(start))], start
    for request in requests:
        state, last = unlearn(state, request), points[-1]
        rows = last.rows + len(request)
        points.append(MusePoint(requests=last.requests + 1, rows=rows, utility=measure(state)))
    return tuple(points)


def inner_unlearner(problem: InnerProblem, adapter: AdapterConfig | LoraConfig) -> Callable[[Policy, Request], Policy]:
    """The project's own unlearning as the step of :func:`scalability` and :func:`sustainability`.

    Args:
        problem: retain rows and options; its candidates are replaced by each request, all of equal weight.
        adapter: adapter settings of each request.

    Returns:
        A function of a policy and a request; its result is a new policy, the one given is not changed.
    """

    def unlearn(policy: Policy, request: Request) -> Policy:
        after = continued(policy, adapter, problem.seed)
        solved = replace(problem, forget=request)
        InnerSolver(after)(solved, solved.uniform(), arm="muse")
        return after

    return unlearn


def continued(policy: Policy, adapter: AdapterConfig | LoraConfig, seed: int = 0) -> Policy:
    """A new policy whose theta_0 is another one's current theta, its adapter merged into the weights.

    Args:
        policy: the policy; its model is copied in memory.
        adapter: settings of the new adapter.
        seed: seed of the new adapter's initial weights.

    Returns:
        The new policy.
    """
    model = copy.deepcopy(policy.model)
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model  # type: ignore[operator]
    plain = cast(PreTrainedModel, merged)
    return Policy(plain, policy.tokenizer, adapter, policy.encoder.max_length, policy.token_budget, seed)
