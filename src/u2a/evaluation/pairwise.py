"""Metrics of one arm against a baseline: a judge's preference between the two answers to each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from u2a.evaluation.arm import ArmResult
from u2a.evaluation.attack_success import MIN_COVERAGE
from u2a.evaluation.judge import PairJudge, Preference
from u2a.evaluation.win_rate import export_outputs, export_preferences, lc_win_rate_2term, win_rate
from u2a.types import Metric


@dataclass(frozen=True)
class Compared:
    """Preferences for an arm's answers over the baseline's.

    Attributes:
        judge: name of the judge.
        prompts: what was asked, by pair id.
        preferences: preference for the arm, by pair id.
    """

    judge: str
    prompts: dict[str, str]
    preferences: dict[str, Preference]


def preferences_over(arm: ArmResult, baseline: ArmResult, prompts: Mapping[str, str], judge: PairJudge) -> Compared:
    """Judge the answers that both arms gave.

    Args:
        arm: the arm.
        baseline: the arm it is compared with.
        prompts: what was asked, by pair id.
        judge: the judge.

    Returns:
        Preferences for the arm.
    """
    ids = [key for key in arm.answers if key in baseline.answers]
    asked = {key: prompts[key] for key in ids}
    ours, theirs = ([each.answers[key] for key in ids] for each in (arm, baseline))
    found = judge.preferences(list(asked.values()), ours, theirs)
    return Compared(judge.name, asked, dict(zip(ids, found, strict=True)))


def rewards_over(arm: ArmResult, baseline: ArmResult, prompts: Mapping[str, str], judge: str) -> Compared:
    """Prefer the answer of higher reward; equal rewards are a tie, and so are equal answers, however they round.

    Args:
        arm: the arm, with rewards.
        baseline: the arm it is compared with.
        prompts: what was asked, by pair id.
        judge: name of the reward model.

    Returns:
        Preferences for the arm.
    """
    ids = [key for key in arm.rewards if key in baseline.rewards]
    gaps = {
        key: 0.0 if arm.answers[key] == baseline.answers[key] else arm.rewards[key] - baseline.rewards[key]
        for key in ids
    }
    found = {key: Preference(value=0.5 if gap == 0 else float(gap > 0)) for key, gap in gaps.items()}
    return Compared(judge, {key: prompts[key] for key in ids}, found)


def with_privleak(arms: Mapping[str, ArmResult]) -> dict[str, ArmResult]:
    """Add PrivLeak to every arm on which membership was measured.

    Args:
        arms: results by arm; the control ``retrain`` is what PrivLeak compares with.

    Returns:
        The arms; without ``retrain`` the metric has no value and says so.
    """
    retrained = arms["retrain"].metrics.get("mia_min_k") if "retrain" in arms else None
    out = dict(arms)
    for name, arm in arms.items():
        auc = arm.metrics.get("mia_min_k")
        if auc is None or auc.value is None:
            continue
        found = Metric(value=None, note="not available without the control retrain")
        if retrained is not None and retrained.value is not None and retrained.value < 1:
            value = 100 * ((1 - auc.value) - (1 - retrained.value)) / (1 - retrained.value)
            found = Metric(value=value, n=auc.n, note="Min-40 %, against the control retrain")
        out[name] = arm.model_copy(update={"metrics": arm.metrics | {"privleak": found}})
    return out


def win_rate_metrics(
    compared: Compared, arm: ArmResult, baseline: ArmResult, groups: Mapping[str, str], resampling: tuple[int, int]
) -> dict[str, Metric]:
    """Win rate over the baseline, plain and with the effect of length taken out.

    Args:
        compared: the preferences.
        arm: the arm.
        baseline: the baseline.
        groups: prompt key by pair id.
        resampling: number and seed of bootstrap resamples.

    Returns:
        ``win_rate`` and ``lc_win_rate_2term``, the judge and the coverage in their notes; empty without answers. Below
        ``MIN_COVERAGE`` both are withheld: which pairs a judge could not score is not by chance.
    """
    if not compared.preferences:
        return {}
    plain = win_rate(compared.preferences, groups, *resampling)
    lengths = {key: (len(arm.answers[key]), len(baseline.answers[key])) for key in compared.preferences}
    controlled = lc_win_rate_2term(compared.preferences, lengths, groups)
    note = f"over {baseline.name}, judge {compared.judge}, {plain.unscored} of {len(compared.preferences)} unscored"
    if plain.coverage is not None and plain.coverage < MIN_COVERAGE:
        note = f"withheld: coverage {plain.coverage:.3f} is below {MIN_COVERAGE}; {note}"
        return {name: Metric(value=None, note=note) for name in ("win_rate", "lc_win_rate_2term")}
    warning = f"; {controlled.warning}" if controlled.warning else ""
    return {
        "win_rate": plain.rate.model_copy(update={"note": note}),
        "lc_win_rate_2term": controlled.rate.model_copy(update={"note": note + warning}),
    }


def export_alpaca_eval(folder: Path, compared: Compared, arm: ArmResult, baseline: ArmResult) -> None:
    """Write answers and preferences in AlpacaEval's formats, for the official tool.

    Args:
        folder: where ``ARM.outputs.json`` and ``ARM.annotations.json`` go.
        compared: the preferences.
        arm: the arm.
        baseline: the baseline.
    """
    ids = list(compared.prompts)
    asked = list(compared.prompts.values())
    ours, theirs = ([each.answers[key] for key in ids] for each in (arm, baseline))
    judged = compared.judge, [compared.preferences[key] for key in ids]
    for each, answers in ((arm, ours), (baseline, theirs)):
        rows = dict(zip(asked, answers, strict=True))
        export_outputs(folder / f"{each.name}.outputs.json", rows, each.name, "held-out prompts")
    export_preferences(
        folder / f"{arm.name}.annotations.json", asked, (arm.name, ours), (baseline.name, theirs), judged
    )


def clear_alpaca_eval(folder: Path) -> None:
    """Remove what :func:`export_alpaca_eval` wrote before: answers of another solution, and arms that are no more.

    Args:
        folder: where it went; anything else in it stays.
    """
    for ending in ("outputs", "annotations"):
        for path in folder.glob(f"*.{ending}.json"):
            path.unlink()
