"""What every reward model offers: one number per answer, higher is better, never NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from u2a.errors import NonFiniteError
from u2a.types import Message

Prompts = Sequence[tuple[Message, ...]]


class RewardModel(Protocol):
    """A scorer of answers, as a value that stages pass to each other."""

    @property
    def name(self) -> str:
        """A readable name, for records."""
        ...

    def score(self, prompts: Prompts, answers: Sequence[str]) -> Tensor:
        """Sequence rewards.

        Args:
            prompts: turns before each answer, the last one the user's.
            answers: one answer per prompt.

        Returns:
            (n,) float32 on the CPU in the model's own unit, finite; higher is better. The order is the one
            given and the values do not depend on what else is scored in the same call.

        Raises:
            NonFiniteError: a reward is NaN or infinite.
        """
        ...

    def token_rewards(self, prompts: Prompts, answers: Sequence[str]) -> list[Tensor] | None:
        """Rewards of the answer tokens, or None when the model has none; arguments as for :meth:`score`.

        Args:
            prompts: turns before each answer.
            answers: one answer per prompt.

        Returns:
            One (tokens,) float32 tensor per answer, or None.
        """
        ...


@dataclass(frozen=True)
class CallableReward:
    """A Python function as a reward model.

    Attributes:
        name: a readable name.
        function: ``function(prompt_texts, answers) -> one number per answer``; see :func:`prompt_text`.
    """

    name: str
    function: Callable[[list[str], list[str]], Sequence[float]]

    def score(self, prompts: Prompts, answers: Sequence[str]) -> Tensor:
        """Sequence rewards; see :meth:`RewardModel.score`."""
        values = list(self.function([prompt_text(prompt) for prompt in prompts], list(answers)))
        if len(values) != len(answers):
            raise ValueError(f"reward {self.name!r} returned {len(values)} numbers for {len(answers)} answers")
        return checked(torch.tensor([float(value) for value in values]), self.name)

    def token_rewards(self, prompts: Prompts, answers: Sequence[str]) -> None:
        """None: a function gives no token rewards."""


def prompt_text(prompt: Sequence[Message]) -> str:
    """Join the turns of a prompt for models that know no chat template; the system turn is left out.

    Args:
        prompt: turns.

    Returns:
        The contents, separated by newlines.

    >>> prompt_text([Message(role="system", content="Be brief."), Message(role="user", content="Hi")])
    'Hi'
    """
    return "\n".join(message.content for message in prompt if message.role != "system")


@contextmanager
def naming(ids: Sequence[str]) -> Iterator[None]:
    """Name the samples of a reward that is not finite, for the duration of a ``with`` block that scores them.

    Args:
        ids: ids of the answers scored, in their order.

    Yields:
        Nothing.

    Raises:
        NonFiniteError: the same with ids in the place of positions.
    """
    try:
        yield
    except NonFiniteError as error:
        names = [ids[int(name[1:])] if name.startswith("#") else name for name in error.ids]
        raise NonFiniteError(error.what, error.phase, error.step, names) from None


def checked(rewards: Tensor, name: str, row: int | None = None) -> Tensor:
    """Return finite rewards on the CPU in float32.

    Args:
        rewards: (n,) tensor on any device.
        name: name of the reward model.
        row: position of the answer whose token rewards these are; None for one reward per answer.

    Returns:
        The same values, (n,) float32 on the CPU.

    Raises:
        NonFiniteError: a value is NaN or infinite; ``ids`` holds the positions.
    """
    rewards = rewards.detach().float().cpu()
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad and row is not None:
        bad = [row]
    if bad:
        raise NonFiniteError(f"reward of {name!r}", "reward", ids=[f"#{position}" for position in bad])
    return rewards
