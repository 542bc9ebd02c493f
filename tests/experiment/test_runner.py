"""Whole experiments on a tiny model: every cell once, a kill in between, tuning, and failures that stay listed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_experiment import write_experiment

from u2a.cli import main
from u2a.errors import ConfigError
from u2a.experiment import runner
from u2a.experiment.cell import CellResult
from u2a.experiment.claims import is_claimed
from u2a.experiment.plan import Plan, Slot, slots
from u2a.experiment.protocol import load_protocol
from u2a.experiment.runner import Options, list_cells, run_experiment
from u2a.experiment.setting import SettingRecord, in_dev
from u2a.experiment.tuning import Tuned
from u2a.progress import Console
from u2a.types import Partition

QUIET = Options(quiet=True)


def results(folder: Path) -> dict[str, CellResult]:
    found = [CellResult.load(path) for path in sorted((folder / "out" / "cells").glob("*.json"))]
    return {f"{cell.arm}.s{cell.seed}.t{cell.trial}": cell for cell in found}


def without_times(cell: CellResult) -> dict:
    tree = json.loads(cell.model_dump_json())

    def strip(node: object) -> object:
        if isinstance(node, dict):
            timing = ("seconds", "cpu_seconds", "peak_rss_bytes")
            return {key: strip(value) for key, value in node.items() if key not in timing}
        return [strip(value) for value in node] if isinstance(node, list) else node

    return strip(tree)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment that ran through, with tuning and failures."""
    folder = tmp_path_factory.mktemp("whole")
    arms = {
        "original": {"method": "original"},
        "chance": {"method": "random_k", "trials": [{"learning_rate": 1e-4}, {"learning_rate": 1e-2}]},
        "wild": {"method": "full", "trials": [{"learning_rate": 1e30}]},
        "blind": {"method": "lowest_reward_k"},
    }
    path = write_experiment(folder, arms, tuning={"seeds": [7], "level": 0.5, "dev_frac": 0.4, "max_ppl_ratio": 100.0})
    run_experiment(path, QUIET)
    return folder


def test_every_cell_holds_its_levels_item_by_item(whole: Path) -> None:
    cell = results(whole)["chance.s0.t1"]
    assert (cell.status, cell.split, cell.track, cell.method) == ("ok", "test", "negatives", "random_k")
    low, high = cell.levels
    assert (low.level, high.level) == (0.5, 1.0) and not low.full and high.full
    assert 0 < low.steps < high.steps == cell.steps == len(cell.history)
    assert cell.unit_flops * 0.5 <= low.spent.total_flops < high.spent.total_flops == cell.spent.total_flops
    assert cell.unit_flops <= high.spent.total_flops < 1.6 * cell.unit_flops
    setting = next((whole / "out" / "settings").glob("tiny.s0.*"))
    sets, record = Partition.load(setting / "sets.json"), SettingRecord.load(setting / "setting.json")
    ids = {pair.id for pair in sets.evaluation}
    for level in cell.levels:
        assert set(level.measured.margin) == set(level.measured.hit) == ids
        assert set(level.measured.retain_nll) == {row.id for row in sets.retain_parts().evaluation}
        assert level.measured.retain_nll.keys() == level.measured.retain_tokens.keys()
    assert len(high.measured.answers) == 2 and high.measured.answers.keys() <= ids
    assert high.measured.answers.keys() == high.measured.words.keys() == high.measured.refusal.keys()
    assert not low.measured.answers
    assert cell.weights is not None and set(cell.weights.values()) == {0.25}
    assert set(record.groups) >= ids
    by_id = {pair.id: pair for pair in record.forget_pairs}
    assert [pair.rejected for pair in by_id.values()] == [row.completion for row in sets.forget]


def test_the_start_is_measured_once_and_read_back(whole: Path) -> None:
    original = results(whole)["original.s0.t0"]
    setting = SettingRecord.load(next((whole / "out" / "settings").glob("tiny.s0.*")) / "setting.json")
    for level in original.levels:
        assert level.untrained and not level.reached and level.steps == 0
        assert level.measured.margin == setting.start.metrics["preference_margin"].values
        assert level.measured.seconds == 0.0


def test_tuning_reads_other_prompts_and_its_choice_is_run(whole: Path) -> None:
    found = results(whole)
    tuned = Tuned.load(whole / "out" / "tuning" / "tiny.chance.json")
    assert tuned.trial == 1 and len(tuned.trials) == 2  # the tiny step of the first trial moves next to nothing
    assert {"chance.s7.t0", "chance.s7.t1", "chance.s0.t1"} <= set(found) and "chance.s0.t0" not in found
    assert {found[name].split for name in ("chance.s7.t0", "chance.s7.t1")} == {"dev"}
    assert found["chance.s7.t0"].levels[-1].level == 0.5 and len(found["chance.s7.t0"].levels) == 1
    pairs = {
        split: Partition.load(next((whole / "out" / "settings").glob(f"tiny.s{seed}.*")) / "sets.json").evaluation
        for split, seed in (("test", 0), ("dev", 7))
    }
    assert pairs["test"] and pairs["dev"]
    measured = {
        split: Partition.load(next((whole / "out" / "settings").glob(f"tiny.s{seed}.*")) / "sets.json").retain_measured
        for split, seed in (("test", 0), ("dev", 7))
    }
    assert not {row.id for row in measured["test"]} & {row.id for row in measured["dev"]}
    assert all(in_dev(row, 0.4) for row in measured["dev"]) and not any(in_dev(row, 0.4) for row in measured["test"])
    trained = Partition.load(next((whole / "out" / "settings").glob("tiny.s0.*")) / "sets.json").retain
    assert not {row.id for row in trained} & {row.id for row in (*measured["test"], *measured["dev"])}
    assert not any(in_dev(pair, 0.4) for pair in pairs["test"]) and all(in_dev(pair, 0.4) for pair in pairs["dev"])


def test_failed_cells_are_saved_and_listed(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(whole)
    assert found["wild.s0.t0"].status == "diverged" and "NonFiniteError" in found["wild.s0.t0"].error
    assert found["blind.s0.t0"].status == "failed" and "reward model" in found["blind.s0.t0"].error
    assert main(["experiment", str(whole / "protocol.yaml"), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"tiny.wild.s0.t0 +diverged +\d+ s NonFiniteError", line) for line in lines)
    assert any(re.match(r"tiny.blind.s0.t0 +failed +\d+ s ConfigError: rewards of candidates", line) for line in lines)
    assert lines[-1] == "6 cells: 4 ok, 1 diverged, 1 failed"


def test_tables_are_written_without_running_anything(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run_cell", lambda *_: pytest.fail("a cell was run"))
    path = changed_seeds(whole / "protocol.yaml", tmp_path / "more.yaml", [0, 1])
    assert main(["experiment", str(path), "--tables", "--out", str(tmp_path / "tables")]) == 0
    assert str(tmp_path / "tables" / "main.md") in capsys.readouterr().out
    found = json.loads((tmp_path / "tables" / "main.json").read_text())
    assert found["tasks"]["tiny"]["chance"]["n_seeds"] == 1
    assert "tiny.chance.s1" in found["missing"] and not any(name.endswith(".s0") for name in found["missing"])


def changed_seeds(path: Path, other: Path, seeds: list[int]) -> Path:
    tree = yaml.safe_load(path.read_text())
    tree["seeds"] = seeds
    for task in tree["tasks"].values():
        task["config"] = str(path.parent / task["config"])
    other.write_text(yaml.safe_dump(tree))
    return other


def test_what_is_done_is_not_run_again_unless_failed_and_asked_for(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    real = runner.run_cell

    def noted(cell, arm, bench):
        ran.append(cell.name)
        return real(cell, arm, bench)

    monkeypatch.setattr(runner, "run_cell", noted)
    run_experiment(whole / "protocol.yaml", QUIET)
    assert ran == []
    run_experiment(whole / "protocol.yaml", Options(quiet=True, only=("wild", "chance"), retry_failed=True))
    assert ran == ["tiny.wild.s0.t0"]


def test_of_several_processes_one_runs_a_failed_cell_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = runner.run_cell
    monkeypatch.setattr(runner, "run_cell", lambda cell, *rest: ran.append(cell.name) or real(cell, *rest))
    plan = Plan(load_protocol(whole / "protocol.yaml"), ("wild", "chance"))
    failed = runner.failed_results(plan)
    assert {name.rsplit(".", 2)[0] for name in failed} >= {"tiny.wild.s0.t0"} and len(failed) == 2
    for _ in range(2):  # as two processes that were told the same
        runner.Runner(plan, Console(quiet=True), failed).work()
    assert ran == ["tiny.wild.s0.t0"]


def test_slots_follow_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    from u2a.experiment.protocol import Protocol

    protocol = Protocol.model_validate(
        {
            "tasks": {"x": {"config": "x", "seeds": 2}, "y": {"config": "y"}},
            "seeds": [0, 1, 2],
            "arms": {
                "one": {"method": "full", "seeds": 1, "tasks": ["y"]},
                "two": {"method": "full", "trials": [{}, {"learning_rate": 1.0}]},
            },
        }
    )
    assert slots(protocol) == [
        *(Slot("x", "two", 1000, trial) for trial in (0, 1)),
        *(Slot("x", "two", seed, None) for seed in (0, 1)),
        *(Slot("y", "two", 1000, trial) for trial in (0, 1)),
        Slot("y", "one", 0, 0),
        *(Slot("y", "two", seed, None) for seed in (0, 1, 2)),
    ]
    assert slots(protocol, ["one"]) == [Slot("y", "one", 0, 0)]
    section = protocol.tasks["x"].model_copy(update={"tuned_on": "y"})
    elsewhere = protocol.model_copy(update={"tasks": {**protocol.tasks, "x": section}})
    assert slots(elsewhere) == slots(protocol)[2:]
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(Plan, "tuned", lambda self, *names: asked.append(names))
    assert Plan(elsewhere).cell(Slot("x", "two", 0, None)) is None and asked == [("y", "two")]
    assert slots(protocol, ["2", "y", "two"]) == [
        *(Slot("y", "two", 1000, trial) for trial in (0, 1)),
        Slot("y", "two", 2, None),
    ]
    assert slots(elsewhere, ["x", "1"]) == [  # what it is tuned on is run, too
        Slot("x", "two", 1, None),
        *(Slot("y", "two", 1000, trial) for trial in (0, 1)),
    ]
    expected = r"--only three: no such arm, task or seed \(expected some of: one, two, x, y, 0, 1, 2\)"
    with pytest.raises(ConfigError, match=expected):
        slots(protocol, ["one", "three"])


ARMS = {name: {"method": "random_k", "set": [f"solve.n_selected={k}"]} for k, name in enumerate("abcde", 2)}


def command(path: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "u2a.cli", "experiment", str(path), *options]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_experiment_goes_on_and_gives_the_same_results(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, ARMS)
    process = command(path)
    cells = tmp_path / "out" / "cells"
    for _ in range(2400):
        if list(cells.glob("*.json")) or process.poll() is not None:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = {file: file.read_bytes() for file in cells.glob("*.json")}
    assert 0 < len(before) < len(ARMS)
    run_experiment(path, QUIET)
    assert all(file.read_bytes() == text for file, text in before.items())
    assert len(results(tmp_path)) == len(ARMS)
    # killed right after a cell was saved it leaves a claim on what is done, which blocks nobody
    assert not any(map(is_claimed, (tmp_path / "out" / "claims").iterdir()))
    at_once = tmp_path / "again"
    at_once.mkdir()
    run_experiment(write_experiment(at_once, ARMS), QUIET)
    assert {name: without_times(cell) for name, cell in results(at_once).items()} == {
        name: without_times(cell) for name, cell in results(tmp_path).items()
    }


@pytest.mark.slow
def test_two_processes_share_the_cells(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, ARMS)
    process = command(path, "--processes", "2")
    said = process.communicate(timeout=280)[1]
    assert process.returncode == 0
    done = re.findall(r"^\[\d+/5\] (\S+) ok", said, re.MULTILINE)
    assert sorted(done) == [f"tiny.{name}.s0.t0" for name in "abcde"]
    assert len(re.findall(r"^setting \S+$", said, re.MULTILINE)) == 1
    assert list_cells(path)[-1] == "5 cells: 5 ok"
    assert list((tmp_path / "out" / "claims").iterdir()) == []


def test_a_signal_stops_between_two_steps_and_saves_no_half_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_experiment(tmp_path, {"a": {"method": "full"}})
    real = runner.run_cell

    def signalled(cell, arm, bench):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(cell, arm, bench)

    monkeypatch.setattr(runner, "run_cell", signalled)
    assert main(["experiment", str(path), "--quiet"]) == 143
    assert "the same command goes on" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("cells/*.json")) and not list((tmp_path / "out" / "claims").iterdir())
    monkeypatch.setattr(runner, "run_cell", real)
    assert main(["experiment", str(path), "--quiet"]) == 0
    assert list_cells(path)[-1] == "1 cells: 1 ok"


def test_a_changed_arm_runs_anew_and_the_others_are_kept(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, {"a": ARMS["a"], "b": ARMS["b"]})
    protocol = load_protocol(path)
    keys = {slot.arm: Plan(protocol).cell(slot) for slot in slots(protocol)}
    changed = path.read_text().replace("n_selected=3", "n_selected=4")
    path.write_text(changed)
    again = {slot.arm: Plan(load_protocol(path)).cell(slot) for slot in slots(protocol)}
    assert keys["a"] is not None and again["a"] is not None and keys["b"] is not None and again["b"] is not None
    assert keys["a"].key() == again["a"].key() and keys["b"].key() != again["b"].key()


def test_an_unknown_method_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, {"a": {"method": "magic"}})
    assert main(["experiment", str(path), "--quiet"]) == 2
    assert not (tmp_path / "out" / "settings").exists()
