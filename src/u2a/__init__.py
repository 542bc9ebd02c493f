"""u2a: align a language model by unlearning its bad answers (arXiv 2504.06659).

Names are loaded when they are first used, so that ``import u2a`` and ``u2a --help`` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from u2a.bilevel.gains import OuterProblem
    from u2a.bilevel.solve import score, solve
    from u2a.config import RunConfig
    from u2a.config_file import load_config
    from u2a.modeling import Policy
    from u2a.partition import partition
    from u2a.run import Result, align, run
    from u2a.trainer import UnlearnConfig, UnlearnTrainer
    from u2a.unlearn import InnerProblem, InnerSolver, unlearn

_HOME = {
    "InnerProblem": "u2a.unlearn",
    "InnerSolver": "u2a.unlearn",
    "OuterProblem": "u2a.bilevel.gains",
    "Policy": "u2a.modeling",
    "Result": "u2a.run",
    "RunConfig": "u2a.config",
    "UnlearnConfig": "u2a.trainer",
    "UnlearnTrainer": "u2a.trainer",
    "align": "u2a.run",
    "load_config": "u2a.config_file",
    "partition": "u2a.partition",
    "run": "u2a.run",
    "score": "u2a.bilevel.solve",
    "solve": "u2a.bilevel.solve",
    "unlearn": "u2a.unlearn",
}

__all__ = [
    "InnerProblem", "InnerSolver", "OuterProblem", "Policy", "Result", "RunConfig", "UnlearnConfig", "UnlearnTrainer",
    "align", "load_config", "partition", "run", "score", "solve", "unlearn",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'u2a' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
