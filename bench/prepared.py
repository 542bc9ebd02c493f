"""Settings of an experiment for benches: found again by the experiment, prepared where they are not there yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from u2a.experiment.plan import Plan, Slot
from u2a.experiment.protocol import load_protocol
from u2a.experiment.setting import Workplace, prepare
from u2a.progress import Console


def prepared_settings(
    protocols: Sequence[Path], tasks: Sequence[str] | None, seed: int
) -> Iterator[tuple[str, Workplace]]:
    """Go through the settings of one seed, each prepared when its turn comes.

    Args:
        protocols: files; of tasks with the same name the last one's is taken.
        tasks: only these, in this order; None: all.
        seed: of the settings.

    Yields:
        Name of the task and its setting's place.
    """
    plans = {task: plan for plan in map(Plan, map(load_protocol, protocols)) for task in plan.protocol.tasks}
    for task in tasks or plans:
        plan = plans[task]
        place = plan.place(Slot(task, next(iter(plan.protocol.arms)), seed, None))
        if not place.record.exists():
            prepare(place, Console())
        yield task, place
