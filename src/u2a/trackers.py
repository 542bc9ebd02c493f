"""Experiment trackers: what goes into ``metrics.jsonl`` goes to one of them too, if it was asked for.

The trackers themselves are accelerate's; their packages are imported when the first number is logged.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from u2a.errors import ConfigError

PROJECT = "u2a"
PACKAGES = {  # any one of them is enough; the first is the one to install
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


class Tracker:
    """One run's tracker, started by the first thing it is told.

    Args:
        name: ``tensorboard``, ``trackio`` or ``wandb``.
        folder: the run's directory; its name is the run's name, and TensorBoard's files lie in ``tensorboard/`` there.

    Raises:
        ConfigError: its package is not installed.
    """

    def __init__(self, name: str, folder: Path) -> None:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise ConfigError(f"unlearn.report_to: {name} is not installed (pip install {PACKAGES[name][0]}, or none)")
        self._name, self._folder = name, folder
        self._started: Any = None

    def log(self, event: str, data: Mapping[str, Any]) -> None:
        """Send the numbers among some data.

        Args:
            event: what happened; it comes before the names of the numbers, for example ``round/objective_pa``.
            data: values by name; ``step`` or ``index`` is the position on TensorBoard's axis.
        """
        if self._started is None:
            self._started = self._start()
        numbers = {
            f"{event}/{key}": value
            for key, value in data.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        # The others want steps that never fall, but every round and every arm counts anew: they count by themselves.
        step = data.get("step", data.get("index")) if self._name == "tensorboard" else None
        self._started.log(numbers, step=step)

    def finish(self) -> None:
        """Write out what is still on its way; the end of the process does it, too."""
        if self._started is not None:
            self._started.finish()
            self._started = None

    def _start(self) -> Any:
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        if self._name == "tensorboard":
            started = TensorBoardTracker(self._name, logging_dir=self._folder)
        elif self._name == "trackio":
            started = TrackioTracker(PROJECT, name=self._folder.name)
        else:
            started = WandBTracker(PROJECT, name=self._folder.name, dir=str(self._folder))
        started.start()
        atexit.register(self.finish)
        return started
