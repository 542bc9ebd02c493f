"""The methods a protocol may name."""

from __future__ import annotations

from u2a.errors import ConfigError
from u2a.experiment.arm import Arm
from u2a.experiment.policy_gradient_arms import PolicyGradientArm
from u2a.experiment.ppo import PpoArm
from u2a.experiment.preference_arms import PreferenceArm
from u2a.experiment.trl_run import require_trl
from u2a.experiment.unlearning_arms import UNLEARNING_ARMS

_OTHERS: tuple[Arm, ...] = (
    PreferenceArm("sft"),
    PreferenceArm("dpo"),
    PreferenceArm("kto"),
    PolicyGradientArm("rloo"),
    PolicyGradientArm("grpo"),
    PpoArm(),
)
METHODS: dict[str, Arm] = {**UNLEARNING_ARMS, **{arm.name: arm for arm in _OTHERS}}


def method(name: str) -> Arm:
    """Find a method.

    Args:
        name: its name.

    Returns:
        The arm.

    Raises:
        ConfigError: there is none of that name, or it needs TRL, which is not installed.
    """
    if name not in METHODS:
        raise ConfigError(f"no method {name!r} (expected one of: {', '.join(METHODS)})")
    if isinstance(METHODS[name], PreferenceArm | PolicyGradientArm):
        require_trl()
    return METHODS[name]
