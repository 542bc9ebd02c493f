"""What every section of the options is made of."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Frac = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
_ROUNDING = 1e-9


def count_of(share: float, n: int) -> int:
    """Count a share of n things, rounded up; a product that is above a whole number by rounding alone is that number.

    Args:
        share: from 0 to 1.
        n: >= 0.

    Returns:
        ceil(share n), and at least 1 of something where the share is not 0.

    >>> count_of(0.07, 100), count_of(0.071, 100), count_of(1e-12, 100), count_of(0.5, 0)
    (7, 8, 1, 0)
    """
    return max(min(n, 1) if share > 0 else 0, math.ceil(share * n - _ROUNDING))


def shares_of_one(parts: dict[str, float]) -> dict[str, float]:
    """Scale parts to whole hundredths that sum to 1; the largest takes up the rounding, and 0 stays 0.

    Args:
        parts: numbers >= 0 by name, at least one > 0.

    Returns:
        Shares by name, in the same order.

    >>> shares_of_one({"a": 0.0, "b": 0.3, "c": 0.15, "d": 0.2})
    {'a': 0.0, 'b': 0.46, 'c': 0.23, 'd': 0.31}
    """
    total = sum(parts.values())
    hundredths = {name: round(100 * part / total) for name, part in parts.items()}
    largest = max(parts, key=lambda name: parts[name])
    hundredths[largest] += 100 - sum(hundredths.values())
    return {name: count / 100 for name, count in hundredths.items()}


def option(default: Any, help: str) -> Any:  # noqa: A002 - the field's own word
    """Declare an option; a mutable default is copied.

    Args:
        default: default value.
        help: one-line meaning with unit.

    Returns:
        A pydantic field.
    """
    return Field(default=default, description=help)


class Section(BaseModel):
    """Base of all configuration sections: frozen, unknown keys refused, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=(), allow_inf_nan=False)
