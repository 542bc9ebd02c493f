"""The outer problem: preference pairs, what aligned means, and the split of the pairs into folds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from u2a.bilevel.objective import DPO, NLL, Margin, Objective
from u2a.config import SolveSection
from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError
from u2a.modeling import Policy
from u2a.record import content_id
from u2a.shortages import n_heldout
from u2a.types import Pair
from u2a.unlearn import InnerProblem


@dataclass(frozen=True)
class OuterProblem:
    """The outer problem: what aligned means, and how gains are computed.

    Attributes:
        preference: the PA pairs.
        section: options of stage 3.
        objective: J; None makes it from the section.
        seed: seed of folds and random draws.
        probe: measured after every inner run (mean reward of the policy's own answers), for the record; None: nothing.
        clusters: cluster number of each candidate by id, for ``solve.clusters``; None where gains are not pooled.
        checkpoints: directory where a search keeps what it has found, so that it goes on after a stop; None: nowhere.
            An objective around a function then needs a label of its own.
    """

    preference: tuple[Pair, ...]
    section: SolveSection = field(default_factory=SolveSection)
    objective: Objective | None = None
    seed: int = 0
    probe: Callable[[Policy], float] | None = None
    clusters: Mapping[str, int] | None = None
    checkpoints: Path | None = None

    @property
    def inner_checkpoints(self) -> Path | None:
        """Where inner runs keep their checkpoints."""
        return None if self.checkpoints is None else self.checkpoints / "inner"

    def clusters_of(self, inner: InnerProblem) -> list[int] | None:
        """Return the cluster of each candidate.

        Args:
            inner: the candidates.

        Returns:
            Numbers in the order of ``inner.forget``, or None where gains are not pooled.

        Raises:
            ConfigError: ``solve.clusters`` is set and no clusters are given.
        """
        if self.section.clusters == 0:
            return None
        if self.clusters is None:
            raise ConfigError("solve.clusters needs the clusters of the candidates (pass OuterProblem(clusters=...))")
        return [self.clusters[row.id] for row in inner.forget]

    def objective_value(self) -> Objective:
        """Return J.

        Returns:
            The objective.

        Raises:
            ConfigError: ``solve.objective: reward`` without a value (it needs a reward model).
        """
        if self.objective is not None:
            return self.objective
        objectives: dict[str, Objective] = {
            "margin": Margin(),
            "summed_margin": Margin(per_token=False),
            "dpo": DPO(self.section.dpo_beta),
            "nll": NLL(),
        }
        if self.section.objective not in objectives:
            raise ConfigError("solve.objective: reward needs a reward model (pass objective=ExpectedReward(...))")
        return objectives[self.section.objective]


@dataclass(frozen=True)
class Folds:
    """PA pairs split by prompt.

    Attributes:
        folds: pairs of each fold, none empty.
        heldout: pairs kept for early stopping; may be empty.
    """

    folds: tuple[tuple[Pair, ...], ...]
    heldout: tuple[Pair, ...]

    @property
    def sizes(self) -> list[int]:
        """Pairs per fold."""
        return [len(fold) for fold in self.folds]

    @property
    def noise(self) -> list[float] | None:
        """Variance of the noise of each fold's mean, in that of one prompt; None where every prompt has one pair.

        Pairs of a prompt may share all of their noise, prompts share none: a fold in which prompt i has the share q_i
        of the pairs has sum q_i^2.
        """
        counts = [Counter(prompt_key(pair.prompt) for pair in fold) for fold in self.folds]
        if all(count == 1 for fold in counts for count in fold.values()):
            return None
        return [sum((count / fold.total()) ** 2 for count in fold.values()) for fold in counts]

    def merged(self) -> Folds:
        """All pairs in one fold.

        Returns:
            The same held-out pairs, and one fold with the others.
        """
        return Folds((tuple(pair for fold in self.folds for pair in fold),), self.heldout)


def split_preference(outer: OuterProblem) -> Folds:
    """Split the PA pairs by prompt into held-out pairs and folds of nearly equal numbers of pairs.

    The prompt with the most pairs comes first, each goes to the fold that has the fewest pairs by then.

    Args:
        outer: pairs, number of folds, held-out share and seed.

    Returns:
        The split; the same whatever the order of the pairs. With fewer prompts than folds there are fewer folds.

    Raises:
        DataError: no pairs.
    """
    if not outer.preference:
        raise DataError("preference set: holds no pair (raise partition.preference_frac or set data.preferences)")
    groups: dict[str, list[Pair]] = {}
    for pair in sorted(outer.preference, key=lambda pair: pair.id):
        groups.setdefault(prompt_key(pair.prompt), []).append(pair)
    keys = sorted(groups, key=lambda key: content_id(str(outer.seed), "fold", key))
    held = n_heldout(outer.section, len(keys))
    heldout = tuple(pair for key in keys[:held] for pair in groups[key])
    rest = keys[held:]
    count = min(outer.section.folds, len(rest))
    folds: list[list[Pair]] = [[] for _ in range(count)]
    for key in sorted(rest, key=lambda key: -len(groups[key])):
        min(folds, key=len).extend(groups[key])
    return Folds(tuple(tuple(fold) for fold in folds), heldout)
