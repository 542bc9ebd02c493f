"""Cells kept beside the tables: enough to make the tables again anywhere, and to go on where another machine stopped.

Generated answers are left out: what was measured on them is kept, and some of them are not fit to be published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from pydantic import SerializerFunctionWrapHandler, TypeAdapter, model_serializer, model_validator

from u2a.experiment.cell import CellResult, LevelResult
from u2a.experiment.columns import packed, unpacked
from u2a.experiment.frozen import FrozenProtocol, file_of, frozen
from u2a.experiment.measured import Measured
from u2a.experiment.plan import Plan
from u2a.experiment.setting import Start
from u2a.record import Record

CELLS = "cells.json"


class KeptCells(Record):
    """All that a table needs; in its file, numbers by item are columns (:mod:`u2a.experiment.columns`).

    Attributes:
        protocol: under which the cells were run, with those that stood there before.
        cells: by file name, tuning cells too.
        starts: by name of the setting.
    """

    protocol: FrozenProtocol
    cells: dict[str, CellResult]
    starts: dict[str, Start]

    @model_serializer(mode="wrap")
    def _as_columns(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        items: list[list[str]] = []
        document = packed(write(self), items)
        return {"items": items, **document}

    @model_validator(mode="before")
    @classmethod
    def _from_columns(cls, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        given = cast(dict[str, Any], document)
        items = TypeAdapter(list[list[str]]).validate_python(given.get("items", []))
        return unpacked({name: value for name, value in given.items() if name != "items"}, items)


def keep(plan: Plan, file: Path) -> Path:
    """Write the cells of a plan that have been run.

    Args:
        plan: which cells there are.
        file: where to; replaced.

    Returns:
        The file.
    """
    cells: dict[str, CellResult] = {}
    starts: dict[str, Start] = {}
    for slot in plan.slots:
        cell, place = plan.cell(slot), plan.place(slot)
        start = plan.start(place)
        if cell is None or start is None or not plan.path(cell).exists():
            continue
        cells[plan.path(cell).name] = _without_answers(CellResult.load(plan.path(cell)))
        starts[place.folder.name] = start.model_copy(update={"measured": _silent(start.measured)})
    path = file_of(plan.protocol)
    protocol = FrozenProtocol.load(path) if path.exists() else frozen(plan.protocol)
    return KeptCells(protocol=protocol, cells=cells, starts=starts).save(file)


def restore(plan: Plan, file: Path) -> int:
    """Put kept cells back into the experiment's folder; what is there already stays.

    Args:
        plan: names the folder.
        file: written by :func:`keep`; may be absent.

    Returns:
        Cells put back. Those of other data, options or versions have other names, and are run anew.

    Raises:
        RecordError: the file is damaged.
    """
    if not file.exists():
        return 0
    kept = KeptCells.load(file)
    if not file_of(plan.protocol).exists():
        kept.protocol.save(file_of(plan.protocol))
    for name, start in kept.starts.items():
        if not plan.start_file(name).exists():
            start.save(plan.start_file(name))
    absent = {plan.folder / "cells" / name: cell for name, cell in kept.cells.items()}
    absent = {path: cell for path, cell in absent.items() if not path.exists()}
    for path, cell in absent.items():
        cell.save(path)
    return len(absent)


def _without_answers(cell: CellResult) -> CellResult:
    return cell.model_copy(update={"levels": tuple(_level_without_answers(level) for level in cell.levels)})


def _level_without_answers(level: LevelResult) -> LevelResult:
    equal = level.equal
    if equal is not None and equal.measured is not None:
        equal = equal.model_copy(update={"measured": _silent(equal.measured)})
    return level.model_copy(update={"measured": _silent(level.measured), "equal": equal})


def _silent(measured: Measured) -> Measured:
    return measured.model_copy(update={"answers": {}})
