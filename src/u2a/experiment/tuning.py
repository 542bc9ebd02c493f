"""Which trial of an arm's grid is used: the same rule for every arm, on seeds and prompts of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from u2a.experiment.cell import CellResult, LevelResult
from u2a.experiment.measured import perplexity
from u2a.experiment.protocol_sections import TuningSection
from u2a.record import Record, Row


class TrialScore(Row):
    """One trial on the tuning seeds.

    Attributes:
        trial: its number.
        values: its hyperparameters.
        value: mean of the tuning metric over seeds, or None where a cell failed or lacks the level.
        ppl_ratio: mean of retain perplexity over the start's, or None likewise or where it collapsed.
        flops: of its tuning cells in all: the cost of the search.
        seconds: the same in wall seconds with evaluation.
        failed: one line for every cell of it that did not come through.
    """

    trial: int
    values: dict[str, float]
    value: float | None
    ppl_ratio: float | None
    flops: int
    seconds: float
    failed: tuple[str, ...] = ()


class Tuned(Record):
    """The choice for one (task, arm).

    Attributes:
        task, arm: whose.
        trial: the chosen one.
        reason: why, in a few words.
        trials: all of them.
    """

    task: str
    arm: str
    trial: int
    reason: str
    trials: tuple[TrialScore, ...]


def choose_trial(section: TuningSection, cells: Sequence[CellResult], start_ppl: Mapping[int, float | None]) -> Tuned:
    """Choose the trial of the highest metric among those whose retain perplexity is within the bound.

    Args:
        section: the rule.
        cells: tuning cells of one (task, arm): every trial on every tuning seed.
        start_ppl: retain perplexity of the start by tuning seed; None where there are no retain rows.

    Returns:
        The choice; ties go to the first trial. Without retain rows there is no bound. With no trial within the bound
        it is the one of smallest perplexity, with no trial that came through the first one.
    """
    numbers = sorted({cell.trial for cell in cells})
    scores = tuple(_score(section, [cell for cell in cells if cell.trial == k], start_ppl) for k in numbers)
    through = [score for score in scores if score.value is not None]
    bounded = all(ppl is not None for ppl in start_ppl.values())
    whole = [score for score in through if score.ppl_ratio is not None]
    within = [score for score in whole if _ratio(score) <= section.max_ppl_ratio] if bounded else through
    if within:
        best = max(within, key=lambda score: (score.value, -score.trial))
        among = f"{len(within)} of {len(through)} trials within the perplexity bound"
        reason = f"highest {section.metric} among " + (among if bounded else f"{len(within)} trials (no retain rows)")
    elif whole:
        best = min(whole, key=lambda score: (_ratio(score), score.trial))
        reason = "no trial within the perplexity bound: the smallest perplexity"
    elif through:
        best, reason = through[0], "every trial's perplexity overflowed: the first one"
    else:
        best, reason = scores[0], "no trial came through: the first one"
    lost = len(scores) - len(through)
    reason += f"; {lost} of {len(scores)} did not come through" if through and lost else ""
    reason += "".join(f"; {name} at the edge of the grid" for name in _edges(best, scores))
    return Tuned(task=cells[0].task, arm=cells[0].arm, trial=best.trial, reason=reason, trials=scores)


def _edges(best: TrialScore, scores: Sequence[TrialScore]) -> list[str]:
    """Hyperparameters whose chosen value is the smallest or the largest of several: a better one may lie outside."""
    out = []
    for name, value in best.values.items():
        values = {score.values[name] for score in scores if name in score.values}
        if len(values) > 1 and value in (min(values), max(values)):
            out.append(name)
    return out


def _ratio(score: TrialScore) -> float:
    return math.inf if score.ppl_ratio is None else score.ppl_ratio


def _score(section: TuningSection, cells: Sequence[CellResult], start_ppl: Mapping[int, float | None]) -> TrialScore:
    found = [(cell, _at(cell, section.level)) for cell in cells]
    values = [None if level is None else _metric(level, section.metric) for _, level in found]
    ratios = [None if level is None else _ppl_ratio(level, start_ppl[cell.seed]) for cell, level in found]
    return TrialScore(
        trial=cells[0].trial,
        values=cells[0].values,
        value=_mean(values),
        ppl_ratio=_mean(ratios),
        flops=sum(cell.spent.total_flops for cell in cells),
        seconds=round(math.fsum(cell.seconds for cell in cells), 3),
        failed=tuple(f"seed {cell.seed}: {cell.status}: {cell.error}" for cell in cells if cell.status != "ok"),
    )


def _at(cell: CellResult, level: float) -> LevelResult | None:
    if cell.status != "ok":
        return None
    return next((result for result in cell.levels if result.level == level), None)


def _metric(level: LevelResult, name: str) -> float | None:
    sources = {
        "preference_margin": level.measured.margin,
        "preference_accuracy": level.measured.hit,
        "reward": level.measured.reward,
    }
    return fmean(sources[name].values()) if sources[name] else None


def _ppl_ratio(level: LevelResult, start_ppl: float | None) -> float | None:
    ppl = perplexity(level.measured.retain_nll, level.measured.retain_tokens)
    return None if ppl is None or start_ppl is None else ppl / start_ppl


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if values and len(known) == len(values) else None
