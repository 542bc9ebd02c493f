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
