"""Settings and budgets for tests of the experiment's arms."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from tiny import pairs, tiny_policy
from u2a.config import EvaluationSection, RunConfig, UnlearnSection
from u2a.experiment.setting import Setting
from u2a.modeling import Params, Policy
from u2a.progress import Console
from u2a.reward.base import CallableReward, RewardModel
from u2a.types import Pair, Partition


@dataclass
class StepBudget:
    """A budget of a number of steps, which keeps what the policy was like whenever it was told.

    Attributes:
        steps: steps that may be taken.
        look: measures the policy, with no argument; its answers are kept in ``seen``.
    """

    steps: int
    look: Callable[[], Any] = lambda: None
    seen: list[Any] = field(default_factory=list)

    def left(self) -> bool:
        return len(self.seen) <= self.steps

    def reached(self, steps: int = 0) -> None:
        assert steps == len(self.seen)  # told once before the first step, then after every one
        self.seen.append(self.look())


def tiny_setting(
    seed: int = 0,
    rows: tuple[Pair, ...] | None = None,
    reward: RewardModel | None = None,
    policy: Policy | None = None,
    tokens: int = 6,
    **unlearn: Any,
) -> Setting:
    """A setting around :func:`tiny.tiny_policy` with eight pairs.

    Args:
        seed: seed of the arm.
        rows: the PA pairs.
        reward: the selecting reward model.
        policy: another policy.
        tokens: most tokens of an answer that is drawn.
        unlearn: options of the section ``unlearn``.
    """
    options = {"learning_rate": 1e-3, "batch_size": 4} | unlearn
    config = RunConfig(unlearn=UnlearnSection(**options), evaluation=EvaluationSection(max_new_tokens=tokens))
    rows = pairs(8) if rows is None else rows
    return Setting(
        config=config,
        partition=Partition(preference=rows[: len(rows) // 2]),
        policy=tiny_policy() if policy is None else policy,
        selecting_reward=reward,
        forget_pairs=rows[len(rows) // 2 :],
        seed=seed,
        console=Console(quiet=True),
    )


def perturb(policy: Policy, sd: float = 0.08, seed: int = 7) -> None:
    """Move theta away from theta_0, the same way every time."""
    generator = torch.Generator().manual_seed(seed)
    for value in policy.trainable().values():
        value.data.add_(sd * torch.randn(value.shape, generator=generator))


def distance(first: Params, second: Params) -> float:
    """Largest difference of two sets of parameters."""
    return max(float((first[name] - second[name]).abs().max()) for name in first)


class Traces:
    """Files opened for writing outside the temporary directory, and connections, while ``on``."""

    on = False
    found: ClassVar[list[str]] = []

    @classmethod
    def hear(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if not cls.on:
            return
        if event in ("socket.connect", "socket.getaddrinfo"):
            cls.found.append(f"{event} {arguments}")
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            path = os.path.abspath(arguments[0])
            harmless = path.startswith((tempfile.gettempdir(), "/dev/", "/proc/")) or "__pycache__" in path
            cls.found += [] if harmless else [path]


sys.addaudithook(Traces.hear)


@contextmanager
def leaves_no_trace(temporary: Path) -> Iterator[None]:
    """Fail when a block writes outside ``temporary``, leaves something in it, or connects to anything."""
    before, tempfile.tempdir = tempfile.tempdir, str(temporary)
    Traces.on, Traces.found = True, []
    try:
        yield
    finally:
        Traces.on, tempfile.tempdir = False, before
    assert Traces.found == []
    assert list(temporary.iterdir()) == []


def visible(tokens: int = 6) -> CallableReward:
    """A toy reward: the printable ASCII characters of an answer, divided by the tokens it may have."""

    def score(prompts: list[str], answers: list[str]) -> list[float]:
        return [sum(letter.isascii() and letter.isprintable() for letter in answer) / tokens for answer in answers]

    return CallableReward("visible", score)


@torch.no_grad()
def first_token_visible(setting: Setting) -> float:
    """The exact probability, averaged over prompts, that an answer begins with a printable ASCII letter or sign."""
    policy = setting.policy
    shown = torch.tensor([len(text) == 1 and "!" <= text <= "~" for text in map(policy.tokenizer.decode, range(259))])
    shares = []
    for pair in setting.pairs:
        logits = policy.model(input_ids=torch.tensor([policy.encoder.encode_prompt(pair.prompt)])).logits[0, -1]
        shares.append(float(logits.softmax(0)[shown].sum()))
    return sum(shares) / len(shares)
