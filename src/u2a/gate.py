"""``--gate``: an exit status that follows the verdict, for CI."""

from __future__ import annotations

from pathlib import Path

from u2a.errors import GateError

GATES = {"yes": ("yes",), "not-no": ("yes", "not shown")}  # verdicts that pass


def check_gate(gate: str | None, folder: Path) -> None:
    """Fail where the verdict of a run is below what was asked for.

    Args:
        gate: a name of :data:`GATES`; None asks for nothing.
        folder: the run's directory, with its evaluation.

    Raises:
        GateError: the verdict is below it.
        RecordError: the run was not evaluated.
    """
    if gate is None:
        return
    from u2a.evaluation.verdict import answer_of
    from u2a.types import EvalTable

    verdict = EvalTable.load(folder / "evaluation.json").verdict
    if answer_of(verdict) not in GATES[gate]:
        raise GateError(f"--gate {gate}: {verdict}")
