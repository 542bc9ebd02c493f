"""unlearn.report_to: a tracker is told what metrics.jsonl is told, and its package is imported only if asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from u2a import pipeline
from u2a.cli import main
from u2a.config import RunConfig
from u2a.trackers import PACKAGES, Tracker

STAND_IN = """
import json
from pathlib import Path

class Run:
    def __init__(self, options):
        self.path = Path(options.get("dir", ".")) / "told.jsonl"
        self.tell({"init": options})
    def tell(self, what):
        with self.path.open("a") as file:
            file.write(json.dumps(what) + "\\n")
    def log(self, values, step=None):
        self.tell({"log": values, "step": step})
    def finish(self):
        self.tell("finished")

def init(**options):
    return Run(options)
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages by the names of the trackers, which write down what they are told."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def numbers(line: dict) -> dict[str, float]:
    """The numbers of one line of metrics.jsonl, by the names a tracker shows."""
    return {
        f"{line['event']}/{key}": value
        for key, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("stand_ins")
def test_a_run_tells_its_tracker_and_imports_none_unasked(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config, folder = str(tiny_config()), tmp_path / "tracked"
    assert main(["run", config, "--quiet"]) == 0
    assert not {"wandb", "trackio"} & set(sys.modules)
    asked = ["--set", "unlearn.report_to=wandb", "--set", f"output_dir={folder}"]
    assert main(["run", config, "--quiet", *asked]) == 0
    assert "trackio" not in sys.modules
    told, written = lines(folder / "told.jsonl"), lines(folder / "metrics.jsonl")
    assert told[0]["init"] == {"project": "u2a", "name": "tracked", "dir": str(folder)}
    assert [item["log"] for item in told[1:]] == [numbers(line) for line in written]
    assert {item["step"] for item in told[1:]} == {None}
    assert {line["event"] for line in written} >= {"round", "unlearn_u2a", "unlearn_random_k"}
    plain = lines(tmp_path / "run" / "metrics.jsonl")  # being watched changes nothing
    assert [{**line, "seconds": 0} for line in written] == [{**line, "seconds": 0} for line in plain]


@pytest.mark.usefixtures("stand_ins")
def test_trackio_is_told_the_numbers_alone(tmp_path: Path) -> None:
    tracker = Tracker("trackio", tmp_path / "my run")
    assert "trackio" not in sys.modules
    tracker.log("round", {"index": 0, "fw_gap": None, "accepted": True, "added": ["a"], "seconds": 1.5})
    tracker.finish()
    assert lines(tmp_path / "told.jsonl") == [
        {"init": {"project": "u2a", "name": "my run"}},
        {"log": {"round/index": 0, "round/seconds": 1.5}, "step": None},
        "finished",
    ]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_said_before_any_model_is_loaded(
    tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr("u2a.trackers.find_spec", lambda package: None)
    monkeypatch.setattr(pipeline, "load_model", lambda section: pytest.fail("a model was loaded"))
    assert main(["run", str(tiny_config()), "--quiet", "--set", f"unlearn.report_to={name}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"unlearn.report_to: {name} is not installed (pip install {name}, or none)" in said


def test_every_choice_of_the_option_has_a_package() -> None:
    choices = RunConfig.model_fields["unlearn"].annotation.model_fields["report_to"].annotation.__args__
    assert set(choices) == {"none", *PACKAGES}


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    Event = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    tracker = Tracker("tensorboard", tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    tracker.log("round", {"index": 0, "objective_pa": -0.25, "added": ["a"], "accepted": True, "fw_gap": None})
    tracker.log("unlearn_u2a", {"step": 1, "loss": 2.5})
    tracker.log("unlearn_u2a", {"step": 2, "loss": 1.5})
    tracker.finish()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert found == [
        ("round/index", 0, 0.0),
        ("round/objective_pa", 0, -0.25),
        ("unlearn_u2a/step", 1, 1.0),
        ("unlearn_u2a/loss", 1, 2.5),
        ("unlearn_u2a/step", 2, 2.0),
        ("unlearn_u2a/loss", 2, 1.5),
    ]
