"""What every section of the options is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Frac = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


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
