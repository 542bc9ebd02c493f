"""Cells kept beside the tables: another machine makes the same tables of them, and goes on where this one stopped."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from small_experiment import write_experiment

from u2a.cli import main
from u2a.environment import code_text, libraries_text, machine_text
from u2a.errors import RecordError
from u2a.experiment import runner
from u2a.experiment.kept import CELLS, KeptCells, restore
from u2a.experiment.plan import Plan
from u2a.experiment.protocol import load_protocol
from u2a.experiment.runner import Options, run_experiment

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "original": {"method": "original"},
    "chance": {"method": "random_k", "trials": [{"learning_rate": 1e-4}, {"learning_rate": 1e-2}]},
    "wild": {"method": "full", "trials": [{"learning_rate": 1e30}]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a protocol, its run in ``out`` and its tables in ``tables``."""
    folder = tmp_path_factory.mktemp("kept")
    tuning = {"seeds": [7], "level": 0.5, "dev_frac": 0.4, "max_ppl_ratio": 100.0}
    path = write_experiment(folder, ARMS, tuning=tuning)
    assert main(["experiment", str(path), "--quiet", "--out", str(folder / "tables")]) == 0
    return folder


def elsewhere(made: Path, folder: Path) -> Path:
    """The protocol and its tables on another machine: nothing of the run itself."""
    shutil.copytree(made / "tables", folder / "tables")
    text = (made / "protocol.yaml").read_text()
    (folder / "protocol.yaml").write_text(text.replace(str(made / "out"), str(folder / "out")))
    for name in ("task.yaml", "pairs.jsonl", "retain.jsonl"):
        shutil.copy(made / name, folder / name)
    return folder / "protocol.yaml"


def test_tables_of_kept_cells_are_the_same_to_the_digit(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_cell", lambda *_: pytest.fail("a cell was run"))
    path = elsewhere(made, tmp_path)
    (tmp_path / "tables" / "main.json").unlink()
    assert main(["experiment", str(path), "--tables", "--out", str(tmp_path / "tables")]) == 0
    for name in ("main.json", "main.md", CELLS):
        assert (tmp_path / "tables" / name).read_bytes() == (made / "tables" / name).read_bytes(), name
    found = json.loads((tmp_path / "tables" / "main.json").read_text())
    assert not found["missing"] and found["tuning"][0]["trial"] == 1


def test_kept_cells_are_not_run_again_and_failed_ones_stay_listed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = elsewhere(made, tmp_path)
    monkeypatch.setattr(runner, "run_cell", lambda *_: pytest.fail("a cell was run"))
    assert main(["experiment", str(path), "--quiet", "--out", str(tmp_path / "tables")]) == 0
    kept = KeptCells.load(tmp_path / "tables" / CELLS)
    assert sorted(cell.status for cell in kept.cells.values()) == ["diverged", "ok", "ok", "ok", "ok"]
    assert not (tmp_path / "out" / "settings").exists()  # nothing had to be prepared


def test_what_is_missing_is_run_on_the_other_machine(made: Path, tmp_path: Path) -> None:
    path = elsewhere(made, tmp_path)
    kept = KeptCells.load(tmp_path / "tables" / CELLS)
    lost = next(name for name in kept.cells if ".chance.s0" in name)
    cells = {name: cell for name, cell in kept.cells.items() if name != lost}
    kept.model_copy(update={"cells": cells}).save(tmp_path / "tables" / CELLS)
    assert restore(Plan(load_protocol(path)), tmp_path / "tables" / CELLS) == len(cells)
    assert restore(Plan(load_protocol(path)), tmp_path / "tables" / CELLS) == 0  # what is there stays
    run_experiment(path, Options(quiet=True))
    again = json.loads((tmp_path / "out" / "cells" / lost).read_text())["data"]
    before = kept.cells[lost].model_dump(mode="json")
    assert again["weights"] == before["weights"] and again["steps"] == before["steps"]
    assert again["levels"][-1]["measured"]["margin"] == before["levels"][-1]["measured"]["margin"]


def test_tables_made_elsewhere_name_the_machines_that_ran_the_cells(made: Path, tmp_path: Path) -> None:
    path = elsewhere(made, tmp_path)
    kept = KeptCells.load(tmp_path / "tables" / CELLS)
    by = {(cell.machine, cell.libraries, cell.code) for cell in kept.cells.values()}
    assert by == {(machine_text(), libraries_text(), code_text())}
    first, *others = sorted(name for name, cell in kept.cells.items() if cell.split == "test")
    ran = {first: "abacus, 1 cores, 0.1 GiB"} | dict.fromkeys(others, "")
    cells = {name: cell.model_copy(update={"machine": ran.get(name, "tuning")}) for name, cell in kept.cells.items()}
    kept.model_copy(update={"cells": cells}).save(tmp_path / "tables" / CELLS)
    assert main(["experiment", str(path), "--tables", "--out", str(tmp_path / "tables")]) == 0
    found = json.loads((tmp_path / "tables" / "main.json").read_text())
    assert found["machines"] == {"": len(others), "abacus, 1 cores, 0.1 GiB": 1}
    said = f"Machine: not recorded ({len(others)} cells); abacus, 1 cores, 0.1 GiB (1 cells)."
    assert said in (tmp_path / "tables" / "main.md").read_text()


def test_no_generated_answer_is_kept_but_what_was_measured_on_it_is(made: Path) -> None:
    assert any('"answers": {\n' in path.read_text() for path in (made / "out" / "cells").glob("*chance.s0*"))
    kept = KeptCells.load(made / "tables" / CELLS)
    states = [level.measured for cell in kept.cells.values() for level in cell.levels]
    states += [
        cell.equal.measured
        for each in kept.cells.values()
        for cell in each.levels
        if cell.equal and cell.equal.measured
    ]
    states += [start.measured for start in kept.starts.values()]
    assert all(state.answers == {} for state in states) and any(state.words for state in states)


def test_lists_of_items_stand_in_the_file_once(made: Path) -> None:
    document = json.loads((made / "tables" / CELLS).read_text())["data"]
    items = document["items"]
    assert items and len({tuple(names) for names in items}) == len(items)
    levels = [level["measured"] for cell in document["cells"].values() for level in cell["levels"]]
    assert levels and all(set(level["margin"]) == {"items", "values"} for level in levels)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (None, "{", "unreadable"),
        ('"values": "', '"values": "nan ', "not a valid KeptCells"),
        ('"items": 0', '"items": 1000', "do not fit items 1000"),
        ('"items": [', '"items": ["x",', "valid list"),
    ],
)
def test_a_damaged_file_is_one_clear_error(made: Path, tmp_path: Path, old: str | None, new: str, said: str) -> None:
    path = elsewhere(made, tmp_path)
    file = tmp_path / "tables" / CELLS
    text = file.read_text()
    assert old is None or old in text
    file.write_text(new if old is None else text.replace(old, new, 1))
    with pytest.raises(RecordError, match=f"cells.json: .*{said}"):
        restore(Plan(load_protocol(path)), file)
    assert main(["experiment", str(path), "--tables", "--out", str(tmp_path / "tables")]) == 2


@pytest.mark.parametrize("name", ["bases", "tasks", "pairs", "policy-gradients", "ablation", "third", "threshold"])
def test_the_committed_tables_are_those_of_the_committed_cells(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(os.environ.get("U2A_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "halueval" / "qa.jsonl").is_file():
        pytest.skip(f"{data} does not hold the data that cells are named by (set U2A_DATA)")
    monkeypatch.setenv("U2A_DATA", str(data.resolve()))
    monkeypatch.chdir(tmp_path)  # a run folder of its own
    kept = ROOT / "docs" / "results" / name
    shutil.copytree(kept, tmp_path / "tables")
    (tmp_path / "tables" / "main.json").unlink()
    protocol = ROOT / "configs" / f"experiment-{name}.yaml"
    assert main(["experiment", str(protocol), "--tables", "--out", str(tmp_path / "tables")]) == 0
    again, before = (json.loads((folder / "main.json").read_text()) for folder in (tmp_path / "tables", kept))
    assert again == before and all(arms for arms in before["tasks"].values())
