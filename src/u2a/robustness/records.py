"""The records of the robustness pack, which a report can read without any model library."""

from __future__ import annotations

from typing import Literal

from u2a.record import Record, Row
from u2a.types import Metric

NONE = "none"
Kind = Literal["none", "quantised", "prompt", "relearned"]


class Gap(Row):
    """A paired statistic.

    Attributes:
        value, low, high: estimate and 95 % bootstrap interval over prompts, or None where undefined.
        n: prompts.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0


class RobustnessRow(Row):
    """One metric under one condition.

    Attributes:
        condition: ``none``, a scheme, ``prompt NAME`` or ``relearn SET @STEPS``.
        kind: kind of the condition.
        metric: metric name.
        arms: value by arm, with the values by item.
        n_undefined: values by arm that were not finite and are left out.
        gaps: condition minus none by arm (the original's is the control); empty for ``none``.
        excess: gap minus the original's gap by arm other than the original; empty for ``none``.
        recovery: share of the unlearning's effect undone by arm other than the original; empty for ``none``.
    """

    condition: str
    kind: Kind
    metric: str
    arms: dict[str, Metric]
    n_undefined: dict[str, int] = {}
    gaps: dict[str, Gap] = {}
    excess: dict[str, Gap] = {}
    recovery: dict[str, Gap] = {}


class RobustnessTable(Record):
    """Before and after, under every condition.

    Attributes:
        original: the arm that never unlearned.
        arms: all arms in order.
        rows: by metric, then by condition.
        attack_rows: rows of the attacker, by set.
        learning_rate: the attacker's, or None without relearning.
        quantised_frac: share of the weights that quantisation rounds, or None without it.
        group: weights that share one scale.
    """

    original: str
    arms: tuple[str, ...]
    rows: tuple[RobustnessRow, ...]
    attack_rows: dict[str, int] = {}
    learning_rate: float | None = None
    quantised_frac: float | None = None
    group: int = 64
