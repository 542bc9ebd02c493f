"""Scoring: directional derivatives u' grad l_k of all candidates' losses, by the scorer that fits best.

=========  ==========================  ===========================  =======================================
scorer     file                        passes for K directions      exact
=========  ==========================  ===========================  =======================================
backward   ``backward.py``             about 3 (16 directions)      yes; linear LoRA layers
central    ``differences.py``          2 K                          to about 0.1 %; not on a 16-bit base
one_sided  ``differences.py``          K, and 1 if l is not known   to about 1 %; not on a 16-bit base
jvp        ``forward_mode.py``         3 to 5 K                     yes; kernels with forward mode
=========  ==========================  ===========================  =======================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from u2a.bilevel.backward import BatchedBackward, supports
from u2a.bilevel.candidates import CandidateLosses, Sample, Slopes, exact_sample
from u2a.bilevel.differences import Central, OneSided
from u2a.bilevel.forward_mode import ForwardMode
from u2a.config import SolveSection
from u2a.errors import ConfigError
from u2a.modeling import Params, Policy
from u2a.progress import Advance, Console

MAX_DISAGREEMENT = 0.2  # of differences with exact derivatives, relative; beyond it they are not used
CLOSE = 1.5  # a more exact scorer is preferred up to this multiple of the cheapest one's cost
BACKWARD_COST = 3.0  # forward and backward pass with LoRA, in no-grad forward passes


@dataclass(frozen=True)
class Scoring:
    """Derivatives and how they were found.

    Attributes:
        slopes: derivatives and losses.
        scorer: name of the scorer that found them.
        error: its disagreement with exact derivatives on a sample, or None.
    """

    slopes: Slopes
    scorer: str
    error: float | None


class Scorer(Protocol):
    """A way to compute directional derivatives, as a value."""

    @property
    def name(self) -> str:
        """Name with parameters, for records."""
        ...

    def derivatives(self, losses: CandidateLosses, directions: Sequence[Params], advance: Advance) -> Slopes:
        """d/dt l_k(theta + t u) at t = 0 for every candidate and direction.

        Args:
            losses: the vector of losses.
            directions: vectors u of any length.
            advance: progress, told candidates per pass.

        Returns:
            Derivatives and losses.
        """
        ...

    def passes(self, n_directions: int) -> int:
        """Passes over all candidates, for the progress bar.

        Args:
            n_directions: number of directions.

        Returns:
            Passes.
        """
        ...


def make_scorer(section: SolveSection, losses: CandidateLosses, n_directions: int) -> Scorer:
    """Turn the configured name into a scorer value.

    Args:
        section: options of the outer problem.
        losses: the vector of losses to be scored.
        n_directions: directions it will be scored along, >= 1.

    Returns:
        The scorer; exact derivatives whatever was asked for where differences would be rounding noise.

    Raises:
        ConfigError: ``backward`` on a policy for which it is not available.
    """
    policy = losses.policy
    backward = section.scorer in ("auto", "backward") and supports(policy)
    if section.scorer == "backward" and not backward:
        raise ConfigError("solve.scorer: backward needs an adapter of plain linear LoRA layers (use auto)")
    if section.scorer in ("central", "one_sided") and rounds_to_16_bits(policy):
        return _exact(policy, "16-bit base")
    if section.scorer == "auto":
        return _cheapest(losses, n_directions, backward)
    scorers: dict[str, Scorer] = {
        "backward": BatchedBackward(),
        "central": Central(),
        "one_sided": OneSided(),
        "jvp": ForwardMode(),
    }
    return scorers[section.scorer]


def _cheapest(losses: CandidateLosses, n_directions: int, backward: bool) -> Scorer:
    """The most exact of the scorers whose cost, in no-grad forward passes, is close to the lowest."""
    low_precision = rounds_to_16_bits(losses.policy) or _is_quantised(losses.policy)
    if backward and low_precision:
        return BatchedBackward()
    if rounds_to_16_bits(losses.policy):
        return ForwardMode()
    references = 1.0 if losses.reference_sums is None else 0.0  # a pass that these scorers need, and backward not
    costs: list[tuple[Scorer, float]] = [  # from exact to inexact
        (Central(), 2.0 * n_directions + references),
        (OneSided(), n_directions + (0.0 if losses.base_is_known() else 1.0)),
    ]
    if backward:
        costs.insert(0, (BatchedBackward(), BACKWARD_COST * BatchedBackward().passes(n_directions)))
    lowest = min(cost for _, cost in costs)
    return next(scorer for scorer, cost in costs if cost <= CLOSE * lowest)


def _exact(policy: Policy, reason: str) -> Scorer:
    """Exact derivatives for whatever is trained, with the reason in the name."""
    return BatchedBackward(f"backward ({reason})") if supports(policy) else ForwardMode(f"jvp ({reason})")


def rounds_to_16_bits(policy: Policy) -> bool:
    """Whether losses move in steps of 16-bit rounding, so that their differences are noise.

    Args:
        policy: the policy.

    Returns:
        True when a weight is float16 or bfloat16, or autocast is on, also within the model's forward, where accelerate
        puts it; False for a quantised base.
    """
    if _is_quantised(policy):
        return False
    if torch.is_autocast_enabled(policy.device.type) or hasattr(policy.model, "_original_forward"):
        return True
    return any(value.dtype in (torch.float16, torch.bfloat16) for value in _base(policy).parameters())


def _is_quantised(policy: Policy) -> bool:
    """Whether the frozen weights are kept in 4 or 8 bits."""
    base = _base(policy)
    return bool(getattr(base, "is_quantized", False) or getattr(base, "is_loaded_in_4bit", False))


def _base(policy: Policy) -> nn.Module:
    return policy.model.get_base_model() if isinstance(policy.model, PeftModel) else policy.model


def agreement(sample: Sample, found: Tensor) -> float | None:
    """Relative disagreement of a scorer with exact derivatives on a sample of candidates.

    Args:
        sample: exact derivatives.
        found: (n, directions) the scorer's derivatives.

    Returns:
        The largest over directions of the root mean square difference, relative to the root mean square derivative
        (of the sample or of all candidates, whichever is larger); None when the exact ones are all 0.
    """
    if not bool(sample.derivatives.any()):
        return None
    off = found[sample.indices] - sample.derivatives
    size = torch.maximum(_rms(sample.derivatives), _rms(found))
    return float((_rms(off)[size > 0] / size[size > 0]).max())


def _rms(columns: Tensor) -> Tensor:
    return columns.square().mean(0).sqrt()


def score_all(
    section: SolveSection, losses: CandidateLosses, directions: Sequence[Params], console: Console
) -> Scoring:
    """Score all candidates with the configured scorer, and once more exactly where it turns out too far off.

    Reference log-probabilities that are not known yet are found on the way (``backward``) or before.

    Args:
        section: options of the outer problem.
        losses: the vector of losses.
        directions: vectors u, at least one.
        console: progress.

    Returns:
        Derivatives with the scorer that found them.
    """
    scorer = make_scorer(section, losses, len(directions))
    if not isinstance(scorer, BatchedBackward):
        losses = losses.with_references()
    slopes = _run(scorer, losses, directions, console)
    if losses.reference_sums is None and slopes.sums is not None:
        losses.policy.remember_reference_sums(losses.rows, slopes.sums)
    if isinstance(scorer, BatchedBackward | ForwardMode):
        return Scoring(slopes, scorer.name, None)
    error = agreement(slopes.sample or exact_sample(losses, directions), slopes.derivatives)
    if error is None or error <= MAX_DISAGREEMENT:
        return Scoring(slopes, scorer.name, error)
    exact = _exact(losses.policy, f"{scorer.name} was off by {error:.0%}")
    return Scoring(_run(exact, losses, directions, console), exact.name, None)


def _run(scorer: Scorer, losses: CandidateLosses, directions: Sequence[Params], console: Console) -> Slopes:
    with console.phase("score candidates", scorer.passes(len(directions)) * len(losses.rows), "candidates") as advance:
        return scorer.derivatives(losses, directions, advance)
