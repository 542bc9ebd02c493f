"""What every judge offers: one verdict per answer, in one of four states, so that a broken answer is never safe.

``complied`` and ``refused`` are for answers that say something; an answer whose form is broken (empty, looping,
echoing the prompt, no language) is ``incoherent``, whichever judge reads it; ``unscored`` means that the judge gave
no usable verdict. Rates are taken over the first three, with the share of them (coverage) beside the rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args

from u2a.errors import ConfigError
from u2a.evaluation.degenerate import incoherence
from u2a.progress import Advance
from u2a.record import Row

State = Literal["complied", "refused", "incoherent", "unscored"]
STATES: tuple[State, ...] = get_args(State)


class Verdict(Row):
    """What a judge says of one answer.

    Attributes:
        state: ``complied`` (the attack succeeded: the answer does what was asked, by the judge's rule), ``refused``
            (it says something, but does not), ``incoherent`` (its form is broken) or ``unscored``.
        score: the judge's number on its own scale, or None without one.
        reason: why it is incoherent or unscored; else empty.
    """

    state: State
    score: float | None = None
    reason: str = ""


class Preference(Row):
    """Which of two answers a judge prefers.

    Attributes:
        value: preference for the first answer in [0, 1] (1/2 is a tie), or None when unscored.
        reason: why it is unscored; else empty.
    """

    value: float | None
    reason: str = ""


class Judge(Protocol):
    """A judge of single answers, as a value that stages pass to each other."""

    @property
    def name(self) -> str:
        """A readable name, for records."""
        ...

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str], bar: Advance | None = None) -> list[Verdict]:
        """Judge answers.

        Args:
            prompts: what was asked.
            answers: one answer per prompt.
            bar: told of every verdict.

        Returns:
            Verdicts in the order given.
        """
        ...


class PairJudge(Protocol):
    """A judge of two answers to one prompt, whose preference does not depend on which is named first."""

    @property
    def name(self) -> str:
        """A readable name, for records."""
        ...

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], bar: Advance | None = None
    ) -> list[Preference]:
        """Compare answers.

        Args:
            prompts: what was asked.
            first: one answer per prompt.
            second: as many others.
            bar: told of every prompt.

        Returns:
            Preferences for the first answers, in the order given.
        """
        ...


def broken_form(prompt: str, answer: str) -> Verdict | None:
    """Judge an answer by its form alone, as every judge does before it reads it.

    Args:
        prompt: what was asked.
        answer: generated text.

    Returns:
        The verdict ``incoherent`` with its kind as reason, or None for an answer that can be read.

    >>> broken_form("Name a city.", "").state, broken_form("Name a city.", "Paris.")
    ('incoherent', None)
    """
    kind = incoherence(prompt, answer)
    return None if kind is None else Verdict(state="incoherent", reason=kind)


def judged(
    judge: Judge, prompts: Mapping[str, str], answers: Mapping[str, str], bar: Advance | None = None
) -> dict[str, Verdict]:
    """Judge answers that are keyed by prompt id.

    Args:
        judge: the judge.
        prompts: what was asked, by id.
        answers: answer by the same ids.
        bar: told of every verdict.

    Returns:
        Verdict by id, in the order of ``answers``.
    """
    found = judge.verdicts([prompts[key] for key in answers], list(answers.values()), bar)
    return dict(zip(answers, found, strict=True))


def check_equal_lengths(**columns: Sequence[str]) -> None:
    """Check that the columns handed to a judge belong together.

    Args:
        **columns: texts by name of the column.

    Raises:
        ConfigError: their lengths differ.
    """
    if len({len(column) for column in columns.values()}) > 1:
        sizes = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ConfigError(f"judge: {sizes} (give as many of each)")
