"""u2a: align a language model by unlearning its bad answers (arXiv 2504.06659). Names are loaded when first used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from u2a.bilevel.outer_problem import OuterProblem
    from u2a.bilevel.solve import score, solve
    from u2a.config import RunConfig
    from u2a.config_file import load_config
    from u2a.modeling import Policy
    from u2a.partition import partition
    from u2a.run import Result, align, run
    from u2a.trainer import UnlearnTrainer
    from u2a.trainer_config import UnlearnConfig
    from u2a.unlearn import InnerProblem, InnerSolver, unlearn

__all__ = ["InnerProblem", "InnerSolver", "OuterProblem", "Policy", "Result", "RunConfig", "UnlearnConfig",
           "UnlearnTrainer", "align", "load_config", "partition", "run", "score", "solve", "unlearn"]  # fmt: skip

_NAMES = {
    "u2a.bilevel.gains": ["OuterProblem"],
    "u2a.bilevel.solve": ["score", "solve"],
    "u2a.config": ["RunConfig"],
    "u2a.config_file": ["load_config"],
    "u2a.modeling": ["Policy"],
    "u2a.partition": ["partition"],
    "u2a.run": ["Result", "align", "run"],
    "u2a.trainer": ["UnlearnTrainer"],
    "u2a.trainer_config": ["UnlearnConfig"],
    "u2a.unlearn": ["InnerProblem", "InnerSolver", "unlearn"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'u2a' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:  # importing u2a.run must not hide the function of that name
        same = isinstance(value, ModuleType) and value.__name__ == _HOME.get(name)
        super().__setattr__(name, getattr(value, name) if same else value)


sys.modules[__name__].__class__ = _Package
