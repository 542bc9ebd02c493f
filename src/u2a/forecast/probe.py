"""A probe of the machine: each way of computing is done once or twice on real rows, timed, and its memory measured.

A way that the run never takes is not tried. The batches are those of the run: the largest one, for its memory, and a
middle one. What is measured are seconds per floating-point operation, so that other batches can be told from them.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback

from u2a.bilevel.adjoint import InnerPoint
from u2a.bilevel.backward import BatchedBackward
from u2a.bilevel.curvature import make_curvature
from u2a.bilevel.differences import Central, OneSided
from u2a.bilevel.gains import candidate_losses
from u2a.bilevel.operators import random_unit
from u2a.bilevel.score import Scorer, make_scorer
from u2a.bilevel.trajectory import plan_of
from u2a.bilevel.unrolled import unrolled_gradients
from u2a.callbacks import StepReporter
from u2a.encoding import Encoded
from u2a.evaluation.decoding import Decoding
from u2a.evaluation.generation import generate_ids
from u2a.forecast.flops import Shape, Sizes, shape_of
from u2a.forecast.work import Rows, Work
from u2a.forecast.workload import Workload
from u2a.modeling import Params, Policy
from u2a.progress import Quiet, peak_rss_bytes, reset_peak_rss
from u2a.types import Example
from u2a.unlearn import InnerProblem, trainer_of, weighted_rows

STEPS = 3  # optimiser steps of the probe; the first one warms up and is not timed
DRAWN = 5  # tokens drawn for an answer


@dataclass(frozen=True)
class Unit:
    """What one way of computing costs.

    Attributes:
        seconds: per operation, or per item where the way has no batches.
        flops: operations per item where the way has no batches; else by how much the formula is to be multiplied,
            where torch's counter was asked instead (0: it was not).
        peak_bytes: memory of the process, or of the GPU, while it was tried on the largest batch.
        counted: operations that torch's counter saw, over those of the formula; None where it was not asked.
        start_s: seconds that every piece of such work takes besides (making a trainer).
        vectors: vectors as long as all trained weights that were held besides while it was tried.
    """

    seconds: float
    flops: float = 0.0
    peak_bytes: int = 0
    counted: float | None = None
    start_s: float = 0.0
    vectors: int = 0


@dataclass(frozen=True)
class Generation:
    """What drawing tokens costs beside reading the prompts.

    Attributes:
        step_s: seconds per token drawn for a batch, whatever its rows.
        row_s: seconds more per row.
    """

    step_s: float
    row_s: float


@dataclass(frozen=True)
class Measured:
    """What the probe found.

    Attributes:
        units: cost by kind of work.
        generation: cost of drawing tokens, or None where the run draws none.
        scorer: the scorer that the run will use.
    """

    units: dict[str, Unit]
    generation: Generation | None
    scorer: Scorer | None


class Meter:
    """Times a piece of work and measures the peak of its memory.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None

    def seconds(self, work: Callable[[], object]) -> float:
        """Time one call.

        Args:
            work: what to do.

        Returns:
            Seconds, the device's part included.
        """
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Do a piece of work and return the most memory in use meanwhile.

        Args:
            work: what to do.

        Returns:
            Bytes of the GPU, or resident bytes of this process (since its start where that cannot be reset).
        """
        gc.collect()
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
            work()
            return int(torch.cuda.max_memory_allocated(self._gpu))
        reset_peak_rss()
        work()
        return peak_rss_bytes()

    def _wait(self) -> None:
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)


def counted_flops(work: Callable[[], object]) -> float:
    """Count the operations of a piece of work as torch sees them; kernels that its counter does not know count 0.

    Args:
        work: what to do.

    Returns:
        Floating-point operations.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


@dataclass
class Probe:
    """Tries the ways in which a run uses its policy; the policy is left at theta_0.

    Args:
        policy: the policy, at theta_0.
        workload: what the run will do.
        sizes: of the policy's model.
    """

    policy: Policy
    workload: Workload
    sizes: Sizes

    def __post_init__(self) -> None:
        self._meter = Meter(self.policy.device)
        self._directions: list[Params] = []

    def measure(self) -> Measured:
        """Try every way that the run will take.

        Returns:
            The costs.
        """
        works = [work for phase in self.workload.phases.values() for work in phase]
        kinds = {work.kind for work in works if work.batches}
        batches = {kind: [batch for work in works if work.kind == kind for batch in work.batches] for kind in kinds}
        units = {"forward": self._passes(batches.get("forward", []), self._forward, self.sizes.forward)}
        scorer = self._scorer() if "score" in kinds else None
        if "gradient" in kinds:
            units["gradient"] = self._passes(batches["gradient"], self._gradient, self.sizes.gradient)
        if scorer is not None and not isinstance(scorer, Central | OneSided):
            units["score"] = self._scoring(batches["score"], scorer)
        if "step" in kinds:
            units["step"] = self._on_largest(self._training(self._problem()), works, "step", 1.0)
        if "product" in kinds:
            units["product"] = self._product()
        if "unrolled" in kinds:
            units["unrolled"] = self._on_largest(self._unrolled(self._problem()), works, "unrolled", 2.0)
        generation = None
        if "generate" in kinds:
            units["generate"], generation = self._generating(batches["generate"])
        self.policy.reset()
        return Measured(units, generation, scorer)

    # --- one way each ----------------------------------------------------------------------------

    def _passes(self, batches: Sequence[Rows], run: Callable[[Rows], object], flops: Callable[[Shape], float]) -> Unit:
        """Passes over the largest and a middle batch, the first one once more to warm up."""
        ordered = sorted(batches or [self._some_rows()], key=lambda batch: flops(shape_of(batch)))
        large, middle = ordered[-1], ordered[len(ordered) // 2]
        counted: list[float] = []
        peak = self._meter.peak_bytes(lambda: counted.append(counted_flops(lambda: run(large))))
        seconds = sum(self._meter.seconds(lambda batch=batch: run(batch)) for batch in (large, middle))
        rate = seconds / sum(flops(shape_of(batch)) for batch in (large, middle))
        return Unit(rate, 0.0, peak, counted[0] / flops(shape_of(large)))

    def _some_rows(self) -> Rows:
        return tuple(self._encoded()[:4])

    def _forward(self, batch: Rows) -> None:
        self.policy.answer_sums(batch)

    def _gradient(self, batch: Rows) -> None:
        value = self.policy.log_probs(batch).mean.sum()
        torch.autograd.grad(value, list(self.policy.trainable().values()), allow_unused=True)

    def _scorer(self) -> Scorer:
        inner = self.workload.inner
        losses = candidate_losses(self.policy, replace(inner, forget=inner.forget[:1]))
        return make_scorer(self.workload.config.solve, losses, self.workload.n_directions)

    def _scoring(self, batches: Sequence[Rows], scorer: Scorer) -> Unit:
        """One pass of the scorer: as many directions as it takes at once."""
        losses = candidate_losses(self.policy, replace(self.workload.inner, forget=self._scored(batches)))
        place = {item.key: k for k, item in enumerate(losses.rows)}
        count = min(self.workload.n_directions, scorer.chunk) if isinstance(scorer, BatchedBackward) else 1
        directions = [random_unit(self.policy.trainable(), seed) for seed in range(count)]

        def run(batch: Rows) -> None:
            scorer.derivatives(losses.subset([place[item.key] for item in batch]), directions, Quiet())

        known = [batch for batch in batches if all(item.key in place for item in batch)]
        unit = self._passes(known, run, lambda shape: self.sizes.scoring(shape, count))
        return replace(unit, vectors=count)

    def _scored(self, batches: Sequence[Rows]) -> tuple[Example, ...]:
        """Candidates of the largest and of a middle batch."""
        ordered = sorted(batches, key=lambda batch: shape_of(batch).tokens)
        keys = {item.key for batch in (ordered[-1], ordered[len(ordered) // 2]) for item in batch}
        pairs = zip(self._encoded(), self._examples(), strict=True)
        return tuple({item.key: row for item, row in pairs if item.key in keys}.values())

    def _problem(self) -> InnerProblem:
        """The inner problem of the probe: few steps, on rows enough for them, unguarded."""
        inner = self.workload.inner.shortened(STEPS)
        section = inner.section.model_copy(update={"save_steps": 0, "report_to": "none"})
        rows = inner.forget[: STEPS * section.batch_size * section.gradient_accumulation_steps]
        return replace(inner, forget=rows, section=section)

    def _training(self, problem: InnerProblem) -> Unit:
        """A few steps of the real trainer."""
        clock = _Clock(self._meter)
        rows = weighted_rows(problem.forget, problem.uniform())
        plan = plan_of(self.policy, problem, problem.uniform())
        flops = [sum(self._step_flops(batch) for batch in step.micro_batches) for step in plan.steps]

        def run() -> None:
            with tempfile.TemporaryDirectory(prefix="u2a-") as folder:
                trainer = trainer_of(self.policy, problem, rows, Path(folder), [StepReporter(clock)])
                trainer.remove_callback(PrinterCallback)
                trainer.train()

        start = time.perf_counter()
        peak = self._meter.peak_bytes(run)
        in_all = time.perf_counter() - start
        self.policy.reset()
        seconds = (clock.times[-1] - clock.times[0]) / sum(flops[1:])
        return Unit(seconds, 0.0, peak, start_s=max(0.0, in_all - seconds * sum(flops)))

    def _on_largest(self, unit: Unit, works: Sequence[Work], kind: str, factor: float) -> Unit:
        """The unit with the memory of the run's largest micro-batch, told by formula from that of the probe's."""
        problem = self._problem()
        steps = plan_of(self.policy, problem, problem.uniform()).steps
        probed = max(self._micro_bytes(batch) for step in steps for batch in step.micro_batches)
        shapes = [(work, [shape_of(batch) for batch in work.batches]) for work in works if work.kind == kind]
        largest = max(
            sum(self.sizes.gradient_bytes(shape) for shape in each[k : k + work.graph])
            for work, each in shapes
            for k in range(0, len(each), work.graph)
        )
        return replace(unit, peak_bytes=unit.peak_bytes + int(factor * max(0.0, largest - probed)))

    def _micro_bytes(self, batch: dict[str, Any]) -> float:
        """Memory of one micro-batch of the trainer, by formula."""
        return sum(self.sizes.gradient_bytes(shape) for shape in _shapes(batch))

    def _step_flops(self, batch: dict[str, Any]) -> float:
        """Operations of one micro-batch of the trainer."""
        return sum(self.sizes.gradient(shape) for shape in _shapes(batch))

    def _unrolled(self, problem: InnerProblem) -> Unit:
        """The derivative through two steps."""
        problem = problem.shortened(STEPS - 1)
        plan = plan_of(self.policy, problem, problem.uniform())
        flops = sum(self._step_flops(batch) for step in plan.steps for batch in step.micro_batches)
        folds = self.workload.config.solve
        count = 1 if folds.heldout_frac > 0 else self.workload.n_directions
        outer = [random_unit(self.policy.trainable(), seed) for seed in range(count)]
        times: list[float] = []

        def run() -> None:
            times.append(self._meter.seconds(lambda: unrolled_gradients(self.policy, plan, outer, every=1)))

        peak = self._meter.peak_bytes(run)
        counted = counted_flops(run)
        return Unit(times[0] / flops, counted / flops, peak, vectors=2 * self.workload.n_directions)

    def _product(self) -> Unit:
        """One product with the curvature; a diagonal one is made, which is its whole cost."""
        config, inner = self.workload.config, self.workload.inner
        chosen = replace(inner, forget=inner.forget[: config.solve.curvature_samples])
        losses = candidate_losses(self.policy, chosen)
        point = InnerPoint(self.policy, chosen, chosen.uniform(), losses, config.solve)
        curvature = make_curvature(config.solve.curvature, config.unlearn)
        vector = random_unit(self.policy.trainable(), 0)

        def run() -> None:
            curvature.at(point.terms()).product(vector)

        peak = self._meter.peak_bytes(run)
        flops = counted_flops(run)
        return Unit(self._meter.seconds(run), flops, peak, vectors=1)

    def _generating(self, batches: Sequence[Rows]) -> tuple[Unit, Generation]:
        """Answers of one and of a few tokens, to the largest batch of prompts and to one prompt."""
        large = max(batches, key=lambda batch: len(batch) * len(batch[0].input_ids))
        few = min(DRAWN, large[0].n_answer)

        def draw(batch: Rows, tokens: int) -> Callable[[], object]:
            prompts = [self.workload.asked[item.input_ids] for item in batch]
            return lambda: generate_ids(self.policy, prompts, Decoding(tokens))

        peak = self._meter.peak_bytes(draw(large, few))
        first, last = (self._meter.seconds(draw(large, tokens)) for tokens in (1, few))
        prefill = Shape(len(large), max(len(item.input_ids) for item in large), 1)
        step = max(0.0, last - first) / max(1, few - 1)
        alone = (large[0],)
        single = max(0.0, self._meter.seconds(draw(alone, few)) - self._meter.seconds(draw(alone, 1))) / max(1, few - 1)
        row = max(0.0, step - single) / max(1, len(large) - 1)
        return Unit(first / self.sizes.generation(prefill), 0.0, peak), Generation(step - row * len(large), row)

    def _examples(self) -> Sequence[Example]:
        return self.workload.inner.forget

    def _encoded(self) -> list[Encoded]:
        return [self.policy.encoder.encode(row.prompt, row.completion, row.source) for row in self._examples()]


def _shapes(batch: dict[str, Any]) -> list[Shape]:
    """Shapes of the candidates and of the retain rows of one micro-batch of the trainer."""
    parts = [batch[part] for part in ("forget", "retain") if part in batch]
    return [Shape(len(part["input_ids"]), part["input_ids"].shape[1], part["targets"].shape[1]) for part in parts]


class _Clock:
    """Notes when each step was done."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.times: list[float] = []

    def advance(self, n: int = 1, note: str = "") -> None:
        """Note the time."""
        self._meter._wait()
        self.times.append(time.perf_counter())
