"""The one sentence every result carries: did selection beat random-k - yes, no, or not shown.

It is decided by the held-out preference margin (length-normalised, the quantity of the default objective, on pairs
that nothing was tuned on) and its paired interval over prompts. Accuracy throws the size of a margin away and so
needs many more pairs; it can veto a "yes" but not make one. One seed means one draw of random-k and one order of
training: the interval covers the choice of evaluation prompts only, and the sentence says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from u2a.solution import Reliability, Solution
from u2a.types import Contrast

BEFORE, SOLUTION, RANDOM = "before", "after", "random_k"
START = "selection beat random-k: "
PRIMARY, VETO = "preference_margin", "preference_accuracy"


def verdict(contrasts: Sequence[Contrast], solution: Solution | None = None, doubt: str | None = None) -> str:
    """Say whether selection beat a random draw of equal size.

    Args:
        contrasts: paired differences, solution minus other arms.
        solution: the weighted set (its fallback and the reliability of its gains), or None when unknown.
        doubt: why a favourable result cannot be believed (a collapsed model, for one), or None.

    Returns:
        A sentence that starts ``selection beat random-k: yes``, ``: no`` or ``: not shown``.
        ``yes`` needs the 95 % interval of the held-out margin difference above 0, a p-value of flipped signs of at
        most 5 %, and the interval of accuracy not below 0; ``no`` needs the margin's below 0, and the p-value; a
        fallback or a missing control is ``not shown``.
    """
    reliability = None if solution is None else solution.scores.reliability
    if solution is not None and solution.fallback == "empty":
        return _sentence("not shown", "no candidate promised a gain, so nothing was selected", reliability)
    if solution is not None and solution.fallback == "random_k":
        reason = "the gains carried no signal, so the selected set is itself a random draw with uniform weights"
        return _sentence("not shown", reason, reliability)
    primary = _find(contrasts, PRIMARY)
    if primary is None or primary.difference is None:
        return _sentence("not shown", "there is no random-k arm with held-out pairs to compare with", reliability)
    if primary.low is None or primary.high is None:
        return _sentence("not shown", f"{_described(primary)}, too few for an interval", reliability)
    veto = _find(contrasts, VETO)
    if not primary.low <= 0 <= primary.high and not primary.excludes_zero:
        reason = f"{_described(primary)}, but flipping the signs of prompts gives p {primary.p:.3f}"
        return _sentence("not shown", reason, reliability)
    if primary.high < 0:
        return _sentence("no", f"{_described(primary)}; random-k did better", reliability)
    if primary.low <= 0:
        return _sentence("not shown", f"{_described(primary)}; the interval holds 0", reliability)
    if veto is not None and veto.high is not None and veto.high < 0:
        return _sentence("not shown", f"{_described(primary)}, but {_described(veto)}: they disagree", reliability)
    if doubt is not None:
        return _sentence("not shown", f"{_described(primary)}, but {doubt}", reliability)
    return _sentence("yes", _described(primary), reliability)


def answer_of(sentence: str) -> str | None:
    """Take the answer out of a verdict.

    Args:
        sentence: what :func:`verdict` returned.

    Returns:
        ``yes``, ``no`` or ``not shown``; None for any other text.

    >>> answer_of("selection beat random-k: not shown (there is no random-k arm)")
    'not shown'
    """
    answer = sentence.removeprefix(START).split(" (")[0]
    return answer if sentence.startswith(START) and answer in ("yes", "no", "not shown") else None


def _find(contrasts: Sequence[Contrast], metric: str) -> Contrast | None:
    wanted = (metric, SOLUTION, RANDOM)
    return next((item for item in contrasts if (item.metric, item.first, item.second) == wanted), None)


def _described(contrast: Contrast) -> str:
    unit = " nats/token" if contrast.metric == PRIMARY else ""
    name = contrast.metric.replace("_", " ")
    if contrast.low is None or contrast.high is None:
        return f"held-out {name} {contrast.difference:+.3g}{unit} on {contrast.n} prompts"
    interval = f"[{contrast.low:+.3g}, {contrast.high:+.3g}]"
    return (
        f"held-out {name} {contrast.difference:+.3g}{unit}, 95 % interval {interval}, {contrast.n} prompts, "
        "one draw of random-k"
    )


def _sentence(answer: str, reason: str, reliability: Reliability | None) -> str:
    return f"{START}{answer} ({reason}{_reliability_clause(reliability)})"


def _reliability_clause(reliability: Reliability | None) -> str:
    if reliability is None:
        return ""
    if reliability.split_half is None:
        return "; split-half reliability of the gains undefined"
    whole = "" if reliability.full_set is None else f", {reliability.full_set:.2f} predicted for the whole PA set"
    return f"; split-half reliability of the gains {reliability.split_half:.2f}{whole}"
