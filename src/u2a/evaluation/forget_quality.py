r"""Forgetting measured against a model that was never trained on the forget set: PrivLeak (MUSE) and TOFU's numbers.

Both PrivLeak and TOFU's forget quality compare with such a retrained model. Without one they are not available, and say
so; they are never 0.

Source: Shi et al. 2024, arXiv 2407.06460 (MUSE); Maini et al. 2024, arXiv 2401.06121 (TOFU).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import logsumexp
from scipy.stats import ks_2samp

from u2a.data import example_id
from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.evaluation.membership import AttackScores, mean_variance, placements
from u2a.evaluation.stats import bootstrap_mean
from u2a.modeling import Policy
from u2a.types import Message, Metric

NO_RETRAIN = "not available: it compares with a model retrained without the forget rows, and there is none"
UTILITY_PARTS = tuple(
    f"{data}_{what}"
    for data in ("retain", "real_authors", "world_facts")
    for what in ("probability", "rouge_l_recall", "truth_ratio")
)


def privleak(
    unlearned: AttackScores, retrained: AttackScores | None, groups: Mapping[str, str], level: float = 0.95
) -> Metric:
    """100 (A - A_retrain) / A_retrain with A = 1 - AUC (MUSE's convention: low = memorised), on the same texts.

    Args:
        unlearned: scores of the Min-40 % attack on the unlearned model.
        retrained: the same of the model retrained without the forget rows, or None.
        groups: prompt key by row id.
        level: coverage in (0, 1).

    Returns:
        Percent; 0 is ideal, negative = still memorised, positive = over-unlearned. The interval is the delta method's
        for log(A / A_retrain), clustered by prompt. Value None with a note when it is not available.

    Raises:
        DataError: the two models were scored on different texts.
    """
    if retrained is None:
        return Metric(value=None, note=NO_RETRAIN)
    for first, second in ((unlearned.forget, retrained.forget), (unlearned.holdout, retrained.holdout)):
        _check_same_rows(first, second)
    sides, other_sides = placements(unlearned), placements(retrained)
    n_forget, n_holdout = (len({groups.get(key, key) for key in side}) for side in sides)
    if not n_forget:
        return Metric(value=None, note="not available: no forget rows or no holdout")
    mine, theirs = (1.0 - float(np.mean(list(each[0].values()))) for each in (sides, other_sides))
    if theirs <= 0.0:
        note = "undefined: the retrained model itself tells every forget row from the holdout (its 1 - AUC is 0)"
        return Metric(value=None, n=n_forget, note=note)
    value = 100.0 * (mine - theirs) / theirs
    if mine <= 0.0 or min(n_forget, n_holdout) < 2:
        return Metric(value=value, n=n_forget)
    influence = [
        {key: own / mine - other[key] / theirs for key, own in side.items()}
        for side, other in zip(sides, other_sides, strict=True)
    ]
    half = NormalDist().inv_cdf(0.5 + level / 2) * sum(mean_variance(side, groups) for side in influence) ** 0.5
    low, high = (100.0 * (mine / theirs * math.exp(end) - 1.0) for end in (-half, half))
    return Metric(value=value, low=low, high=high, n=n_forget)


@dataclass(frozen=True)
class TruthRow:
    """A question with answers to be weighed against each other.

    Attributes:
        prompt: turns, the last one the user's.
        paraphrase: the true answer in other words.
        perturbed: wrong answers of the same form, at least one.
    """

    prompt: tuple[Message, ...]
    paraphrase: str
    perturbed: tuple[str, ...]

    @property
    def id(self) -> str:
        """Content id of question and true answer."""
        return example_id(self.prompt, self.paraphrase)


def truth_log_ratios(policy: Policy, rows: Sequence[TruthRow]) -> dict[str, float]:
    """Logarithm of TOFU's truth ratio TR = mean_j p(wrong_j)^(1/T_j) / p(true)^(1/T).

    Args:
        policy: the policy at its current theta.
        rows: questions.

    Returns:
        log TR by row id; 0 = wrong answers are as likely as the true one, negative = the model knows.

    Raises:
        DataError: a row without wrong answers.
        NonFiniteError: a log-probability is not finite.

    Departs: TOFU's code averages the wrong answers' losses (a geometric mean) for the forget quality and their
    probabilities (this, the paper's equation) elsewhere; published p-values may differ slightly for that.
    """
    empty = [row.prompt[-1].content for row in rows if not row.perturbed]
    if empty:
        raise DataError(f"perturbed: {len(empty)} rows have no wrong answer (first prompt: {empty[0]!r:.60})")
    texts = [(row, text) for row in rows for text in (row.paraphrase, *row.perturbed)]
    encoded = [policy.encoder.encode(row.prompt, text) for row, text in texts]
    sums = policy.answer_sums(encoded).tolist()
    means = iter([value / item.n_answer for value, item in zip(sums, encoded, strict=True)])
    ratios = {}
    for row in rows:
        true = next(means)
        wrong = [next(means) for _ in row.perturbed]
        ratios[row.id] = float(logsumexp(wrong)) - math.log(len(wrong)) - true
    bad = [key for key, value in ratios.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError("truth ratio", "evaluate", ids=bad)
    return ratios


def forget_truth_ratio(log_ratios: Mapping[str, float], groups: Mapping[str, str], resamples: int, seed: int) -> Metric:
    """Mean of min(TR, 1/TR) over the forget rows: 1 = the true answer is no likelier than wrong ones.

    Args:
        log_ratios: log TR by row id.
        groups: prompt key by row id.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        In (0, 1], higher = more forgotten.
    """
    return _mean({key: math.exp(-abs(value)) for key, value in log_ratios.items()}, groups, resamples, seed)


def retain_truth_ratio(log_ratios: Mapping[str, float], groups: Mapping[str, str], resamples: int, seed: int) -> Metric:
    """Mean of max(0, 1 - TR) over rows that must be known; arguments as for :func:`forget_truth_ratio`.

    Args:
        log_ratios: log TR by row id.
        groups: prompt key by row id.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        In [0, 1), higher = the true answer is likelier than wrong ones.
    """
    return _mean(
        {key: max(0.0, -math.expm1(min(value, 0.0))) for key, value in log_ratios.items()}, groups, resamples, seed
    )


def _mean(values: dict[str, float], groups: Mapping[str, str], resamples: int, seed: int) -> Metric:
    interval = bootstrap_mean(values, groups, resamples, seed)
    return Metric(value=interval.value, low=interval.low, high=interval.high, n=interval.n, values=values)


def forget_quality(unlearned: Mapping[str, float], retrained: Mapping[str, float] | None) -> Metric:
    """p-value of the two-sample Kolmogorov-Smirnov test of the truth ratios of two models on the forget rows.

    Args:
        unlearned: truth ratios (or their logarithms, the test is the same) of the unlearned model by row id.
        retrained: the same of the model retrained without the forget rows, or None.

    Returns:
        In [0, 1]; near 0 = told apart, so not forgotten or over-forgotten. A large value with few rows shows nothing.
        Value None with a note when it is not available.

    Raises:
        DataError: the two models were scored on different rows.
    """
    if retrained is None:
        return Metric(value=None, n=len(unlearned), note=NO_RETRAIN)
    _check_same_rows(unlearned, retrained)
    if not unlearned:
        return Metric(value=None, note="not available: no rows with perturbed answers")
    test = ks_2samp(list(unlearned.values()), list(retrained.values()))
    return Metric(value=float(test.pvalue), n=len(unlearned))  # type: ignore[attr-defined]


def model_utility(parts: Mapping[str, float | None]) -> Metric:
    """TOFU's model utility: the harmonic mean of nine numbers in [0, 1], so that one bad one pulls it down.

    Args:
        parts: value by name of :data:`UTILITY_PARTS`; None or absent = not measured.

    Returns:
        In [0, 1], higher is better, 0 as soon as one part is 0. Value None with a note when a part is missing.

    Raises:
        ConfigError: an unknown name, or a value outside [0, 1].
    """
    problems = [f"{name}: not one of {', '.join(UTILITY_PARTS)}" for name in sorted(set(parts) - set(UTILITY_PARTS))]
    known = {name: value for name, value in parts.items() if value is not None}
    problems += [f"{name}: {value} is not in [0, 1]" for name, value in known.items() if not 0.0 <= value <= 1.0]
    if problems:
        raise ConfigError(problems)
    missing = [name for name in UTILITY_PARTS if name not in known]
    if missing:
        return Metric(value=None, n=len(known), note=f"not available: {', '.join(missing)} not measured")
    values = [known[name] for name in UTILITY_PARTS]
    mean = 0.0 if min(values) == 0.0 else len(values) / sum(1.0 / value for value in values)
    return Metric(value=mean, n=len(values))


def _check_same_rows(first: Mapping[str, float], second: Mapping[str, float]) -> None:
    if first.keys() != second.keys():
        count = len(first.keys() ^ second.keys())
        raise DataError(
            f"retrained model: {count} rows were scored for one of the two models only (score the same rows)"
        )
