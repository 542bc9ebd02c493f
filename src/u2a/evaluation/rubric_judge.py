"""Judges that ask a chat model: one answer by a rubric, or two answers in both orders.

Usable replies are kept in a cache as they come in. Failures are not: a second run asks again for those alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from u2a.errors import ConfigError
from u2a.evaluation.chat_endpoint import ChatEndpoint, EndpointError
from u2a.evaluation.judge import Preference, Verdict, broken_form, check_equal_lengths
from u2a.evaluation.rubrics import BETTER_ANSWER, PairRubric, Reading, Rubric
from u2a.jsonl_cache import JsonlCache
from u2a.progress import Advance, Quiet
from u2a.record import content_id
from u2a.types import Message

Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Asker:
    """Asks a chat model many things at once and keeps what it has paid for.

    Attributes:
        endpoint: the model.
        cache: where usable replies are kept, or None.
        workers: calls in flight at once, >= 1.

    Raises:
        ConfigError: ``workers`` is below 1.
    """

    endpoint: ChatEndpoint
    cache: JsonlCache | None = None
    workers: int = 4

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"judge.workers: {self.workers} is not at least 1")

    def ask(self, questions: Sequence[Messages], read: Callable[[str], Reading], bar: Advance) -> list[Reading]:
        """Ask every distinct question that the cache does not answer.

        Args:
            questions: the messages of each.
            read: turns a reply into a score or a reason.
            bar: told of every distinct question.

        Returns:
            Readings in the order given. A call that fails is a reading without a score.
        """
        keys = [self._key(messages) for messages in questions]
        found: dict[str, Reading] = {}
        for key in keys:
            cached = None if self.cache is None else self.cache.get(key)
            if isinstance(cached, str):  # read anew, so that what a reply means is never older than the rubric
                found[key] = read(cached)
        found = {key: reading for key, reading in found.items() if reading.score is not None}
        bar.advance(len(found))
        open_questions = {key: messages for key, messages in zip(keys, questions, strict=True) if key not in found}
        self._ask_open(open_questions, read, found, bar)
        return [found[key] for key in keys]

    def _ask_open(
        self,
        questions: Mapping[str, Messages],
        read: Callable[[str], Reading],
        found: dict[str, Reading],
        bar: Advance,
    ) -> None:
        """Add the reading of every question to ``found``; at most ``workers`` calls are begun and not yet kept."""
        rest = iter(questions.items())
        running: dict[Future[str], str] = {}
        pool = ThreadPoolExecutor(self.workers)
        try:
            while True:
                for key, messages in rest:
                    running[pool.submit(self.endpoint.complete, messages)] = key
                    if len(running) == self.workers:
                        break
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                self._keep({running.pop(future): future for future in done}, read, found)
                bar.advance(len(done))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _keep(self, done: Mapping[str, Future[str]], read: Callable[[str], Reading], found: dict[str, Reading]) -> None:
        """Read finished calls and cache the usable replies, even when one of the calls ends the whole run."""
        usable: dict[str, str] = {}
        fatal: BaseException | None = None
        for key, future in done.items():
            error = future.exception()
            if isinstance(error, EndpointError):
                found[key] = Reading(None, str(error))
            elif error is not None:
                fatal = error
            else:
                found[key] = read(future.result())
                if found[key].score is not None:
                    usable[key] = future.result()
        if self.cache is not None:
            self.cache.put_many(usable)
        if fatal is not None:
            raise fatal

    def _key(self, messages: Messages) -> str:
        """Id of a question to this model; the messages hold rubric, prompt and answers."""
        return content_id("judge", self.endpoint.name, json.dumps([message.model_dump() for message in messages]))


@dataclass(frozen=True)
class RubricJudge:
    """Grades answers by a rubric; an answer whose form is broken is incoherent and is not sent.

    Attributes:
        asker: asks the model.
        rubric: the question, its scale, and the score from which the attack has succeeded.
    """

    asker: Asker
    rubric: Rubric

    @property
    def name(self) -> str:
        """Rubric and model."""
        return f"{self.rubric.name} by {self.asker.endpoint.name}"

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str], bar: Advance | None = None) -> list[Verdict]:
        """Judge answers; see :meth:`u2a.evaluation.judge.Judge.verdicts`."""
        check_equal_lengths(prompts=prompts, answers=answers)
        verdicts = [broken_form(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        sent = [index for index, verdict in enumerate(verdicts) if verdict is None]
        questions = [self.rubric.messages(prompts[index], answers[index]) for index in sent]
        readings = self.asker.ask(questions, self.rubric.read, bar or Quiet())
        judged = iter(self._verdict(reading) for reading in readings)
        return [next(judged) if verdict is None else verdict for verdict in verdicts]

    def _verdict(self, reading: Reading) -> Verdict:
        if reading.score is None:
            return Verdict(state="unscored", reason=reading.reason)
        success = reading.score >= self.rubric.success_from
        return Verdict(state="complied" if success else "refused", score=reading.score)


@dataclass(frozen=True)
class RubricPairJudge:
    """Compares two answers in both orders and averages; without both verdicts a pair is unscored.

    A judge that always prefers the answer it reads first thus ends in a tie, whatever the answers. Equal answers are
    a tie and are not sent.

    Attributes:
        asker: asks the model.
        rubric: the question.
    """

    asker: Asker
    rubric: PairRubric = field(default=BETTER_ANSWER)

    @property
    def name(self) -> str:
        """Rubric and model."""
        return f"{self.rubric.name} by {self.asker.endpoint.name}"

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], bar: Advance | None = None
    ) -> list[Preference]:
        """Compare answers; see :meth:`u2a.evaluation.judge.PairJudge.preferences`."""
        check_equal_lengths(prompts=prompts, first=first, second=second)
        rows = list(zip(prompts, first, second, strict=True))
        sent = [row for row in rows if row[1] != row[2]]
        questions = [self.rubric.messages(prompt, one, other) for prompt, one, other in sent]
        questions += [self.rubric.messages(prompt, other, one) for prompt, one, other in sent]
        readings = self.asker.ask(questions, self.rubric.read, bar or Quiet())
        pairs = iter(zip(readings[: len(sent)], readings[len(sent) :], strict=True))
        return [Preference(value=0.5) if one == other else _averaged(*next(pairs)) for _, one, other in rows]


def _averaged(forward: Reading, swapped: Reading) -> Preference:
    """Preference for the first answer from both orders."""
    if forward.score is None or swapped.score is None:
        return Preference(value=None, reason=forward.reason or swapped.reason)
    return Preference(value=(forward.score + 1 - swapped.score) / 2)
