"""What a run will cost, phase by phase: from its workload and either a probe or formulas alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from u2a.bilevel.backward import BatchedBackward
from u2a.bilevel.differences import Central, OneSided
from u2a.bilevel.forward_mode import ForwardMode
from u2a.bilevel.score import Scorer
from u2a.forecast.flops import Shape, Sizes, shape_of
from u2a.forecast.probe import Measured
from u2a.forecast.reward_probe import RewardCost
from u2a.forecast.work import Work
from u2a.forecast.workload import Workload
from u2a.record import Record, Row

TRAINED_COPIES = 6  # float32 copies of what is trained: itself, gradient, two moments, start, and the best state
PROCESS_BYTES = 800 * 2**20  # Python with its libraries, where nothing was measured
MODULES = 7  # adapted matrices of a decoder layer
RATIOS = {"unrolled": 3.0, "product": 2.0}  # operations by formula, over those of a gradient
UNKNOWN = ("load tokenizer", "convert model", "load model", "reward model", "report")  # not told by their work


class PhaseCost(Row):
    """Cost of one phase.

    Attributes:
        name: as the console names it.
        seconds: wall time, or None where it was not measured.
        flops: floating-point operations, or None where they are not known.
        peak_bytes: memory in use at most, or None where it is not known.
    """

    name: str
    seconds: float | None
    flops: float | None
    peak_bytes: int | None


class FileSize(Row):
    """A file that will be written.

    Attributes:
        path: below the run's directory.
        bytes: its size, roughly, or None.
    """

    path: str
    bytes: int | None


class Forecast(Record):
    """What a run will cost.

    Attributes:
        model: name of the policy.
        device: where it runs.
        parameters: weights of the policy, without the adapter.
        trainable: trained weights.
        measured: whether a probe on this machine was made; False: formulas alone.
        phases: in the order in which they begin.
        seconds: of all phases that were measured together, or None.
        peak_bytes: most memory in use.
        free_bytes: memory free before the model was loaded, or None where the system does not tell.
        fits: whether the peak is below what is free; None where that is not known.
        counted: operations seen by torch's counter over those of the formula, by kind of work.
        advice: what to change so that it fits.
        notes: what the figures assume.
        files: what will be written, below ``output_dir``.
        output_dir: the run's directory.
    """

    model: str
    device: str
    parameters: int
    trainable: int
    measured: bool
    phases: tuple[PhaseCost, ...]
    seconds: float | None
    peak_bytes: int
    free_bytes: int | None
    fits: bool | None
    counted: dict[str, float]
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[FileSize, ...]
    output_dir: str


@dataclass(frozen=True)
class Basis:
    """What costs are computed from.

    Attributes:
        workload: what the run does.
        sizes: of the policy.
        measured: the probe's findings, or None.
        rewards: costs of the reward models by kind of work; of those not measured there is none.
        fixed_s: seconds of phases that were done once already (loading), by name.
        directions: directions scored at once.
        gpu: the device is a GPU, whose memory holds nothing but tensors.
    """

    workload: Workload
    sizes: Sizes
    measured: Measured | None
    rewards: Mapping[str, RewardCost]
    fixed_s: Mapping[str, float]
    directions: int
    gpu: bool

    @property
    def resident_bytes(self) -> float:
        """Memory of the model at rest, by formula."""
        return (
            self.sizes.stored_bytes + 4.0 * TRAINED_COPIES * self.sizes.trainable + (0 if self.gpu else PROCESS_BYTES)
        )


def phase_costs(basis: Basis) -> list[PhaseCost]:
    """Compute the cost of every phase.

    Args:
        basis: workload, sizes and what was measured.

    Returns:
        One cost per phase, in order.
    """
    return [_phase(name, works, basis) for name, works in basis.workload.phases.items()]


def _phase(name: str, works: Sequence[Work], basis: Basis) -> PhaseCost:
    fixed = basis.fixed_s.get(name, None if name in UNKNOWN else 0.0 if basis.measured else None)
    costs = [PhaseCost(name=name, seconds=fixed, flops=0.0, peak_bytes=None), *(_cost(work, basis) for work in works)]
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    return PhaseCost(
        name=name,
        seconds=_sum([cost.seconds for cost in costs]),
        flops=_sum([cost.flops for cost in costs]),
        peak_bytes=max(peaks, default=None),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum, or None where a part of it is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _cost(work: Work, basis: Basis) -> PhaseCost:
    """Cost of one piece of work."""
    if not work.batches:
        reward = basis.rewards.get(work.kind)
        if reward is None:
            return PhaseCost(name=work.kind, seconds=None, flops=None, peak_bytes=None)
        unit = reward.unit
        return _row(work, unit.seconds * work.times, unit.flops * work.times, unit.peak_bytes)
    shapes = [shape_of(batch) for batch in work.batches]
    if work.kind == "generate":
        return _generation(work, shapes, basis)
    way, operations = _way(work.kind, basis)
    flops = work.times * sum(operations(shape) for shape in shapes)
    unit = None if basis.measured is None else basis.measured.units[way]
    if unit is None:
        peak = _formula_bytes(way, shapes, basis) + _directions_bytes(work.kind, basis)
        return _row(work, None, flops * RATIOS.get(way, 1.0), int(peak))
    peak = unit.peak_bytes + int(_directions_bytes(work.kind, basis, unit.vectors))
    if way == "product":
        return _row(work, unit.seconds * work.times, unit.flops * work.times, peak)
    return _row(work, unit.start_s + unit.seconds * flops, flops * (unit.flops or 1.0), peak)


def _row(work: Work, seconds: float | None, flops: float, peak_bytes: int) -> PhaseCost:
    return PhaseCost(name=work.kind, seconds=seconds, flops=flops, peak_bytes=peak_bytes)


def _way(kind: str, basis: Basis) -> tuple[str, Callable[[Shape], float]]:
    """The unit that a kind of work is measured in, and its operations for one batch."""
    sizes, k = basis.sizes, basis.directions
    if kind == "forward":
        return kind, sizes.forward
    if kind != "score":
        return kind, sizes.gradient
    scorer = None if basis.measured is None else basis.measured.scorer
    if scorer is None:
        named: dict[str, Scorer] = {"central": Central(), "one_sided": OneSided(), "jvp": ForwardMode()}
        scorer = named.get(basis.workload.config.solve.scorer, BatchedBackward())
    if isinstance(scorer, Central | OneSided):
        return "forward", lambda shape: scorer.passes(k) * sizes.forward(shape)
    at_once = min(k, scorer.chunk) if isinstance(scorer, BatchedBackward) else 1
    return kind, lambda shape: scorer.passes(k) * sizes.scoring(shape, at_once)


def _generation(work: Work, shapes: Sequence[Shape], basis: Basis) -> PhaseCost:
    """Reading the prompts takes operations, drawing tokens takes steps."""
    flops = work.times * sum(basis.sizes.generation(shape) for shape in shapes)
    if basis.measured is None or basis.measured.generation is None:
        return _row(work, None, flops, int(_formula_bytes("generate", shapes, basis)))
    unit, steps = basis.measured.units["generate"], basis.measured.generation
    seconds = sum(
        unit.seconds * basis.sizes.generation(replace(shape, answer=1))
        + (shape.answer - 1) * (steps.step_s + steps.row_s * shape.rows)
        for shape in shapes
    )
    return _row(work, work.times * seconds, flops, unit.peak_bytes)


def _formula_bytes(way: str, shapes: Sequence[Shape], basis: Basis) -> float:
    """Peak memory of a kind of work by formula."""
    sizes = basis.sizes
    if way == "forward":
        most = max(sizes.forward_bytes(shape) for shape in shapes)
    elif way == "generate":
        most = max(sizes.cache_bytes(shape) for shape in shapes)
    else:
        most = max(sizes.gradient_bytes(shape) for shape in shapes) * (2.0 if way in RATIOS else 1.0)
    if way == "score":
        rank_bytes = 4.0 * sizes.rank * MODULES * min(basis.directions, BatchedBackward().chunk)
        most += max(shape.tokens for shape in shapes) * sizes.upper_layers * rank_bytes
    if way == "step":  # rows of the candidates and retain rows are in one graph
        most *= 2.0
    return basis.resident_bytes + most


def _directions_bytes(kind: str, basis: Basis, held: int = 0) -> float:
    """Memory of the vectors, each as long as all trained weights, that a scoring holds beyond those already told."""
    # A gradient of J per direction and, where candidates are scored, what the adjoint makes of each. Besides,
    # differences need a unit vector and the weights as they were, and conjugate gradients three vectors.
    k = basis.directions
    vectors = {"gradient": k, "score": 2 * k + 2, "product": 2 * k + 3, "unrolled": 2 * k}
    return 4.0 * basis.sizes.trainable * max(0, vectors.get(kind, 0) - held)


def with_formulas(basis: Basis) -> int:
    """Return the peak memory of a run by formula alone.

    Args:
        basis: workload and sizes.

    Returns:
        Bytes.
    """
    costs = phase_costs(replace(basis, measured=None, rewards={}))
    return max([int(basis.resident_bytes), *(cost.peak_bytes or 0 for cost in costs)])
