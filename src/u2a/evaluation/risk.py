"""Risk control: bounds that hold with stated confidence for new prompts, and the choice among configurations.

A risk is the mean of a loss in [0, 1] over prompts: the harmful-answer indicator, a judge's score, or FROC's mix of
what was not forgotten and what was lost (:func:`froc_losses`). Everything here is valid for prompts exchangeable with
the calibration prompts and for nothing else, and says so in its record.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import scipy.optimize
import scipy.special

from u2a.errors import ConfigError, DataError
from u2a.record import Record, Row

CAVEAT = (
    "Valid only for prompts exchangeable with the calibration prompts: not for other topics, attacks or users. "
    "No calibration prompt may have been used in training or in any selection."
)
_ROUNDING = 1e-9  # of a sum of losses that should be whole

Correction = Literal["bonferroni", "bonferroni_holm", "fixed_sequence"]


class RiskBound(Record):
    """Upper bound of a risk.

    Attributes:
        risk: mean loss of the calibration prompts, or None without any.
        upper: with probability 1 - delta over the calibration prompts the true risk is at most this; None without any.
        n: calibration prompts.
        delta: chance of a bound that is too low.
        binary: whether the loss can only be 0 or 1 (the bound is then the exact binomial one).
        caveat: what it is not valid for.
    """

    risk: float | None
    upper: float | None
    n: int
    delta: float
    binary: bool
    caveat: str = CAVEAT


class ConfigurationRisk(Row):
    """One configuration of :class:`RiskControl`.

    Attributes:
        name: the configuration.
        risk: mean loss, or None without prompts.
        n: calibration prompts.
        p: p-value of "its risk is above alpha", or None without prompts.
        controlled: whether that is rejected after the correction for the number of configurations.
    """

    name: str
    risk: float | None
    n: int
    p: float | None
    controlled: bool


class RiskControl(Record):
    """Which configurations control a risk.

    Attributes:
        alpha: largest risk allowed.
        delta: chance that any configuration is wrongly said to control it.
        correction: how the number of configurations is paid for.
        binary: whether the loss can only be 0 or 1.
        configurations: all that were tested, in the order given.
        caveat: what it is not valid for.
    """

    alpha: float
    delta: float
    correction: Correction
    binary: bool
    configurations: tuple[ConfigurationRisk, ...]
    caveat: str = CAVEAT

    @property
    def controlled(self) -> tuple[str, ...]:
        """Names of the configurations whose risk is at most alpha, all at once with probability 1 - delta."""
        return tuple(row.name for row in self.configurations if row.controlled)


@dataclass(frozen=True)
class FrocReference:
    """What the FROC losses are measured against. Fix it without the calibration prompts, or the bounds do not hold.

    Attributes:
        forget_level: how far s must rise for a prompt to count as forgotten (a_unl).
        best_retain_loss: smallest mean retain loss of any configuration, in nats, > 0.
        best_forget_accuracy: largest accuracy of any configuration on forget rows, in [0, 1].
        best_retain_accuracy: the same on retain rows.
        forget_weight: share w_f of forgetting in the loss, in [0, 1]; utility has the rest.
    """

    forget_level: float
    best_retain_loss: float
    best_forget_accuracy: float = 1.0
    best_retain_accuracy: float = 1.0
    forget_weight: float = 0.5

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected a number in [0, 1]"
            for name, value in (
                ("best_forget_accuracy", self.best_forget_accuracy),
                ("best_retain_accuracy", self.best_retain_accuracy),
                ("forget_weight", self.forget_weight),
            )
            if not 0.0 <= value <= 1.0
        ]
        if not 0.0 < self.best_retain_loss < math.inf:
            problems.append(f"best_retain_loss is {self.best_retain_loss}, expected a positive number of nats")
        if not math.isfinite(self.forget_level):
            problems.append(f"forget_level is {self.forget_level}, expected a finite number")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class PromptOutcome:
    """Loss and accuracy of one configuration on the forget and the retain row of one calibration prompt.

    Attributes:
        forget_loss, retain_loss: mean NLL in nats, >= 0; infinity counts as entirely forgotten, or entirely lost.
        forget_accuracy, retain_accuracy: in [0, 1].
    """

    forget_loss: float
    retain_loss: float
    forget_accuracy: float
    retain_accuracy: float


def froc_losses(outcomes: Mapping[str, PromptOutcome], reference: FrocReference) -> dict[str, float]:
    """FROC's loss of each prompt: w_f softplus(a_unl - s) + w_u softplus(r), cut to [0, 1].

    s = log Loss_U + max Acc_U - Acc_U grows with forgetting; r = log Loss_R - log min Loss_R + max Acc_R - Acc_R grows
    with the utility lost. softplus(z) = log(1 + exp(z)).

    Args:
        outcomes: by prompt key.
        reference: levels that were fixed without these prompts.

    Returns:
        Loss in [0, 1] by prompt key, for :func:`risk_bound` and :func:`learn_then_test`.

    Raises:
        DataError: a loss is negative or NaN, or an accuracy is outside [0, 1].

    Source: FROC, arXiv 2512.13337.
    """
    losses = {}
    for key, row in outcomes.items():
        if not (row.forget_loss >= 0 and row.retain_loss >= 0):
            raise DataError(f"prompt {key}: losses are {row.forget_loss} and {row.retain_loss} nats, expected >= 0")
        if not (0 <= row.forget_accuracy <= 1 and 0 <= row.retain_accuracy <= 1):
            raise DataError(f"prompt {key}: an accuracy is outside [0, 1]")
        s = _log(row.forget_loss) + reference.best_forget_accuracy - row.forget_accuracy
        ratio = _log(row.retain_loss) - math.log(reference.best_retain_loss)
        r = ratio + reference.best_retain_accuracy - row.retain_accuracy
        terms = ((reference.forget_weight, reference.forget_level - s), (1.0 - reference.forget_weight, r))
        losses[key] = min(1.0, sum(weight * float(np.logaddexp(0.0, z)) for weight, z in terms if weight > 0.0))
    return losses


def risk_bound(
    losses: Mapping[str, float], used_ids: Iterable[str], delta: float = 0.1, binary: bool = False
) -> RiskBound:
    """Hoeffding-Bentkus upper bound of a risk; the conformal unlearning risk (CUR) with :func:`froc_losses`.

    It is the smallest risk that the calibration prompts reject at level delta, by the smaller p-value of
    exp(-n h1(min(R, a), a)) and e * BinomialCDF(ceil(n R); n, a).

    Args:
        losses: loss in [0, 1] by prompt, one prompt one loss (average over several answers first).
        used_ids: ids, of the same kind, of everything that was used in training or selection.
        delta: chance of a bound that is too low, in (0, 1).
        binary: the loss can only be 0 or 1, by what it is and not by what was observed: the exact binomial
            (Clopper-Pearson) bound is used, which is tighter.

    Returns:
        The bound with its caveat.

    Raises:
        ConfigError: delta is out of range.
        DataError: a calibration prompt was used before, or a loss is out of range.

    Source: Bates et al. (2021), arXiv 2101.02703; FROC, arXiv 2512.13337.

    >>> result = risk_bound({str(k): float(k < 20) for k in range(200)}, used_ids=[])
    >>> round(result.upper, 4)
    0.1457
    """
    _check_level("delta", delta)
    check_calibration(losses, used_ids)
    values = _losses(losses, binary)
    if not values:
        return RiskBound(risk=None, upper=None, n=0, delta=delta, binary=binary)
    n, total = len(values), math.fsum(values)
    risk, upper = total / n, 1.0
    if hoeffding_bentkus_p(total, n, 1.0, binary) < delta:
        root = scipy.optimize.brentq(lambda a: hoeffding_bentkus_p(total, n, a, binary) - delta, 0.0, 1.0, xtol=1e-12)
        upper = cast(float, root)
    return RiskBound(risk=risk, upper=upper, n=n, delta=delta, binary=binary)


def learn_then_test(
    configurations: Mapping[str, Mapping[str, float]],
    used_ids: Iterable[str],
    alpha: float,
    delta: float = 0.1,
    correction: Correction = "bonferroni_holm",
    binary: bool = False,
) -> RiskControl:
    """Find the configurations whose risk is at most alpha, all at once with probability 1 - delta.

    Args:
        configurations: losses in [0, 1] by prompt, for each named configuration. A fixed sequence is tested in this
            order and stops at the first failure: the order must not come from the calibration prompts.
        used_ids: ids, of the same kind as the prompts', of everything that was used in training or selection.
        alpha: largest risk allowed, in (0, 1).
        delta: chance of any false claim, in (0, 1).
        correction: ``bonferroni_holm`` (never worse than ``bonferroni``) or ``fixed_sequence``.
        binary: as for :func:`risk_bound`.

    Returns:
        Risk, p-value and verdict of every configuration.

    Raises:
        ConfigError: no configuration, alpha or delta is out of range, or mapie is not installed.
        DataError: a calibration prompt was used before, or a loss is out of range.

    Source: Angelopoulos et al. (2021), Learn then Test, arXiv 2110.01052.
    """
    try:
        from mapie.risk_control import control_fwer
    except ImportError:
        raise ConfigError("learn_then_test needs mapie (in the clone: pip install '.[evaluation]')") from None
    _check_level("alpha", alpha)
    _check_level("delta", delta)
    if not configurations:
        raise ConfigError("there is no configuration to test")
    if correction not in get_args(Correction):
        raise ConfigError(f"correction is {correction!r}, expected one of {', '.join(get_args(Correction))}")
    check_calibration({key for losses in configurations.values() for key in losses}, used_ids)
    values = {name: _losses(losses, binary) for name, losses in configurations.items()}
    p = {
        name: hoeffding_bentkus_p(math.fsum(losses), len(losses), alpha, binary) if losses else None
        for name, losses in values.items()
    }
    # A configuration without prompts is never accepted, and still counts as one that was tried.
    tested = np.array([1.0 if value is None else value for value in p.values()])
    accepted = {int(index) for index in control_fwer(tested, delta, correction)}
    rows = tuple(
        ConfigurationRisk(
            name=name,
            risk=math.fsum(losses) / len(losses) if losses else None,
            n=len(losses),
            p=p[name],
            controlled=index in accepted,
        )
        for index, (name, losses) in enumerate(values.items())
    )
    return RiskControl(alpha=alpha, delta=delta, correction=correction, binary=binary, configurations=rows)


def hoeffding_bentkus_p(total: float, n: int, alpha: float, binary: bool = False) -> float:
    """P-value of "the risk is above alpha".

    Args:
        total: sum of the losses, in [0, n].
        n: prompts, >= 1.
        alpha: risk in [0, 1].
        binary: losses can only be 0 or 1.

    Returns:
        The smaller of Hoeffding's and Bentkus's p-value, at most 1; with ``binary`` the exact binomial one.
    """
    count = math.ceil(total - _ROUNDING)
    binomial = float(scipy.special.bdtr(count, n, alpha))  # the binomial distribution function
    if binary:
        return binomial
    risk = min(total / n, alpha)
    divergence = float(scipy.special.rel_entr(risk, alpha) + scipy.special.rel_entr(1.0 - risk, 1.0 - alpha))
    return min(1.0, math.exp(-n * divergence), math.e * binomial)


def check_calibration(calibration_ids: Iterable[str], used_ids: Iterable[str]) -> None:
    """Refuse calibration prompts that were used before.

    Args:
        calibration_ids: ids of the calibration prompts; prompt keys, so that a prompt with another answer is found.
        used_ids: ids of the same kind of all prompts used in training or selection.

    Raises:
        DataError: they share an id.
    """
    overlap = sorted(set(calibration_ids) & set(used_ids))
    if overlap:
        raise DataError(
            f"{len(overlap)} calibration prompts were used in training or selection ({', '.join(overlap[:5])}): "
            "a risk bound would not hold (calibrate on prompts held out from the start)"
        )


def _check_level(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{name} is {value}, expected a number between 0 and 1")


def _losses(losses: Mapping[str, float], binary: bool) -> list[float]:
    """The losses, refused when one is outside [0, 1] or, with ``binary``, neither 0 nor 1."""
    wrong = [key for key, value in losses.items() if not 0.0 <= value <= 1.0 or (binary and value not in (0, 1))]
    if wrong:
        expected = "0 or 1" if binary else "a number in [0, 1]"
        raise DataError([f"prompt {key}: loss is {losses[key]}, expected {expected}" for key in wrong])
    return [float(value) for value in losses.values()]


def _log(value: float) -> float:
    return -math.inf if value == 0.0 else math.log(value)
