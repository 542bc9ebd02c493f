"""Win rate of a model over a baseline, its two-term length-controlled variant, and AlpacaEval's file formats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from u2a.errors import DataError
from u2a.evaluation.judge import Preference, check_equal_lengths
from u2a.evaluation.stats import Interval, rate_interval
from u2a.progress import Advance, Quiet
from u2a.record import Row, write_whole
from u2a.reward.base import RewardModel
from u2a.types import Message, Metric

RIDGE = 1e-3
LENGTH_WARNING = 10.0
_Z95 = 1.959963984540054


class WinRate(Row):
    """How often a judge prefers a model's answers to the baseline's.

    Attributes:
        rate: 100 x mean preference over scored pairs with its 95 % interval, clustered by prompt.
        coverage: scored over all pairs, or None without pairs.
        wins, ties, losses: scored pairs with a preference above, at and below 1/2.
        unscored: pairs left out.
    """

    rate: Metric
    coverage: float | None
    wins: int
    ties: int
    losses: int
    unscored: int


class LengthControlled(Row):
    """A win rate with the effect of answer length taken out (two-term variant).

    Attributes:
        rate: 100 x fitted preference at equal lengths, 95 % interval from the cluster-robust covariance.
        length_effect: coefficient of the length term (negative: the judge likes length), or None where all lengths
            differ by the same amount or not at all, so that there is no telling.
        win_rate: 100 x mean preference, for comparison.
        warning: set when both differ by more than 10 points, or when equal lengths lie outside the data.
    """

    rate: Metric
    length_effect: float | None
    win_rate: float | None
    warning: str = ""


@dataclass(frozen=True)
class RewardPairJudge:
    """Prefers the answer of higher reward; equal rewards or answers are a tie. Order does not matter.

    Attributes:
        model: a reward model other than the one that selected.
    """

    model: RewardModel

    @property
    def name(self) -> str:
        """The reward model's name."""
        return f"reward of {self.model.name}"

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], bar: Advance | None = None
    ) -> list[Preference]:
        """Compare answers; see :meth:`u2a.evaluation.judge.PairJudge.preferences`."""
        check_equal_lengths(prompts=prompts, first=first, second=second)
        turns = [(Message(role="user", content=prompt),) for prompt in prompts]
        rewards = self.model.score([*turns, *turns], [*first, *second]).tolist() if turns else []
        (bar or Quiet()).advance(len(turns))
        ours, theirs = rewards[: len(turns)], rewards[len(turns) :]
        gaps = [
            0.0 if answer == other else reward - its
            for answer, other, reward, its in zip(first, second, ours, theirs, strict=True)
        ]
        return [Preference(value=0.5 + 0.5 * np.sign(gap)) for gap in gaps]


def win_rate(
    preferences: Mapping[str, Preference], groups: Mapping[str, str], resamples: int = 1000, seed: int = 0
) -> WinRate:
    """Mean preference over the pairs that were scored.

    Args:
        preferences: preference for the model over the baseline, by row id.
        groups: prompt key by row id; ids that are missing are prompts of their own.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        The rate in [0, 100] with coverage. With one row per prompt the interval is Wilson's, which is too wide rather
        than too narrow where preferences lie between 0 and 1.
    """
    values = {key: item.value for key, item in preferences.items() if item.value is not None}
    interval = rate_interval(values, groups, resamples, seed)
    return WinRate(
        rate=_percent(interval, values) if values else Metric(value=None),
        coverage=len(values) / len(preferences) if preferences else None,
        wins=sum(value > 0.5 for value in values.values()),
        ties=sum(value == 0.5 for value in values.values()),
        losses=sum(value < 0.5 for value in values.values()),
        unscored=len(preferences) - len(values),
    )


def lc_win_rate_2term(
    preferences: Mapping[str, Preference],
    lengths: Mapping[str, tuple[int, int]],
    groups: Mapping[str, str] | None = None,
) -> LengthControlled:
    """Win rate at equal lengths by a logistic model with a bias and a length term.

    logit p = bias + theta tanh((len_baseline - len_model) / sd), fitted with a ridge of 1e-3 on both; the result is
    100 sigmoid(bias), which is the mean of the fitted preferences with the length term set to zero.

    Args:
        preferences: preference for the model over the baseline, by row id; unscored ones are left out.
        lengths: characters of the model's and of the baseline's answer, by row id.
        groups: prompt key by row id; ids that are missing are prompts of their own.

    Returns:
        The length-controlled rate in [0, 100], without an interval where all preferences are equal.

    Source: Dubois et al. 2024, arXiv 2404.04475, section 3.
    Departs: no term for the difficulty of the instruction, no cross-validated penalty and no added gamed rows, so the
        number is not comparable with AlpacaEval's LC win rate.
    """
    keys = sorted(key for key, item in preferences.items() if item.value is not None)
    if not keys:
        return LengthControlled(rate=Metric(value=None), length_effect=None, win_rate=None)
    target = np.array([preferences[key].value for key in keys], dtype=float)
    gaps = np.array([lengths[key][1] - lengths[key][0] for key in keys], dtype=float)
    spread = float(gaps.std())
    design = np.column_stack([np.ones(len(keys)), np.tanh(gaps / spread) if spread else np.zeros(len(keys))])
    beta = _fit_logistic(design, target)
    names = [(groups or {}).get(key, key) for key in keys]
    one_sided = target.min() == target.max()  # no curvature but the ridge's: an interval would be far too narrow
    half = None if one_sided or len(set(names)) < 2 else _Z95 * _bias_error(design, target, beta, names)
    low, high = (None, None) if half is None else (expit(beta[0] - half), expit(beta[0] + half))
    interval = Interval(float(expit(beta[0])), low, high, len(set(names)))
    plain = 100 * float(target.mean())
    rate = _percent(interval, {})
    return LengthControlled(
        rate=rate,
        length_effect=float(beta[1]) if spread else None,
        win_rate=plain,
        warning=_length_warning(100 * float(expit(beta[0])), plain, gaps),
    )


def _fit_logistic(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Minimise the cross-entropy plus RIDGE/2 |beta|^2 by Newton steps in a trust region."""

    def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
        logit = design @ beta
        value = np.logaddexp(0, logit).sum() - target @ logit + RIDGE / 2 * beta @ beta
        return float(value), design.T @ (expit(logit) - target) + RIDGE * beta

    found = minimize(
        loss, np.zeros(2), jac=True, hess=lambda beta: _information(design, beta), method="trust-exact", tol=1e-8
    )
    return found.x


def _information(design: np.ndarray, beta: np.ndarray) -> np.ndarray:
    fitted = expit(design @ beta)
    return (design.T * (fitted * (1 - fitted))) @ design + RIDGE * np.eye(2)


def _bias_error(design: np.ndarray, target: np.ndarray, beta: np.ndarray, names: Sequence[str]) -> float:
    """Standard error of the bias: sandwich of summed scores per prompt, times G / (G - 1)."""
    scores = design * (target - expit(design @ beta))[:, None]
    place = {name: index for index, name in enumerate(sorted(set(names)))}
    sums = np.zeros((len(place), 2))
    np.add.at(sums, [place[name] for name in names], scores)
    bread = np.linalg.inv(_information(design, beta))
    covariance = bread @ (sums.T @ sums) @ bread * len(place) / (len(place) - 1)
    return math.sqrt(covariance[0, 0])


def _length_warning(controlled: float, plain: float, gaps: np.ndarray) -> str:
    warnings = []
    if abs(controlled - plain) > LENGTH_WARNING:
        warnings.append(f"length moves the win rate by {plain - controlled:+.1f} points")
    if gaps.min() > 0 or gaps.max() < 0:
        warnings.append("one side is always the longer one: equal lengths lie outside the data")
    return "; ".join(warnings)


def _percent(interval: Interval, values: Mapping[str, float]) -> Metric:
    parts = (interval.value, interval.low, interval.high)
    value, low, high = (None if part is None else 100 * float(part) for part in parts)
    return Metric(value=value, low=low, high=high, n=interval.n, values={k: 100 * v for k, v in values.items()})


def export_outputs(path: Path, rows: Mapping[str, str], generator: str, dataset: str) -> None:
    """Write answers in the JSON format of AlpacaEval's ``model_outputs``.

    Args:
        path: target.
        rows: answer by instruction.
        generator: name of the model.
        dataset: name of the set of instructions.
    """
    outputs = [
        {"dataset": dataset, "instruction": instruction, "output": output, "generator": generator}
        for instruction, output in rows.items()
    ]
    write_whole(path, json.dumps(outputs, ensure_ascii=False, indent=1) + "\n")


def export_preferences(
    path: Path,
    instructions: Sequence[str],
    model: tuple[str, Sequence[str]],
    baseline: tuple[str, Sequence[str]],
    judged: tuple[str, Sequence[Preference]],
) -> None:
    """Write preferences in the JSON format of AlpacaEval's ``annotations``: 1 = baseline, 2 = model, 1.5 = tie.

    Args:
        path: target.
        instructions: what was asked.
        model: name and answers of the model.
        baseline: name and answers of the baseline.
        judged: name of the judge and its preferences for the model; an unscored one is null.

    Raises:
        DataError: the columns differ in length.
    """
    (name, ours), (other, theirs), (judge, preferences) = model, baseline, judged
    if len({len(instructions), len(ours), len(theirs), len(preferences)}) > 1:
        raise DataError(f"{path}: instructions, answers and preferences differ in number (give one of each per prompt)")
    rows = [
        {
            "instruction": instruction,
            "output_1": their,
            "generator_1": other,
            "output_2": our,
            "generator_2": name,
            "annotator": judge,
            "preference": None if preferred.value is None else 1 + preferred.value,
        }
        for instruction, our, their, preferred in zip(instructions, ours, theirs, preferences, strict=True)
    ]
    write_whole(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
