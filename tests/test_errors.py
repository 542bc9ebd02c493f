from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import pytest

from u2a import errors
from u2a.errors import (
    ConfigError,
    DataError,
    ModelError,
    NonFiniteError,
    NotConverged,
    RecordError,
    Stopped,
    U2AError,
    WriteError,
)


def test_users_mistakes_exit_with_2_and_failed_computations_with_1() -> None:
    """The statuses that the command line returns."""
    statuses = {
        name: kind.exit_status
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, U2AError) and kind is not U2AError
    }
    assert statuses == {
        "ConfigError": 2,
        "DataError": 2,
        "ModelError": 2,
        "RecordError": 2,
        "WriteError": 2,
        "LockedError": 3,
        "Stopped": 2,  # of the class; each one has 128 + the number of its signal
        "NonFiniteError": 1,
        "GateError": 1,
        "NotConverged": 1,
        "OutOfMemory": 1,
    }


@pytest.mark.parametrize(("signum", "name"), [(2, "SIGINT"), (15, "SIGTERM")])
def test_a_stop_exits_as_shells_expect_and_names_its_signal(signum: int, name: str) -> None:
    assert Stopped(signum).exit_status == 128 + signum
    said = str(Stopped(signum, "A and B are saved"))
    assert said == f"stopped by {name}; A and B are saved; the same command goes on"


def test_a_failed_write_names_the_path_and_the_free_bytes_of_the_nearest_folder(tmp_path: Path) -> None:
    text = str(WriteError(tmp_path / "no" / "such" / "file", "No space left on device"))
    said = re.fullmatch(r"(.+): cannot be written: No space left on device \((\d+) bytes free there\); .*", text)
    assert said is not None and said[1] == str(tmp_path / "no" / "such" / "file")
    assert int(said[2]) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05, abs=1e8)
    assert text.count("\n") == 0


def test_all_errors_are_caught_as_one() -> None:
    for error in (ConfigError("a"), DataError("b"), ModelError("c"), RecordError("d"), NotConverged("e")):
        with pytest.raises(U2AError, match=str(error)):
            raise error


def test_config_errors_keep_every_problem() -> None:
    error = ConfigError(["one", "two"])
    assert (error.problems, str(error)) == (["one", "two"], "one\ntwo")
    assert ConfigError("one").problems == ["one"]


def test_data_errors_print_twenty_lines_and_the_total() -> None:
    assert str(DataError([f"line {k}" for k in range(20)])).count("\n") == 19
    error = DataError([f"line {k}" for k in range(45)])
    lines = str(error).splitlines()
    assert lines[:2] == ["line 0", "line 1"]
    assert lines[20:] == ["... and 25 more (45 problems in all)"]
    assert len(error.problems) == 45


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (NonFiniteError("loss", "unlearn"), "non-finite loss in phase unlearn:"),
        (NonFiniteError("loss", "unlearn", 0), "non-finite loss in phase unlearn, step 0:"),
        (NonFiniteError("score", "score", 4, ["a"]), "non-finite score in phase score, step 4, sample a:"),
        (NonFiniteError("gradient", "unlearn", None, ["a", "b"]), "non-finite gradient in phase unlearn, sample a, b:"),
        (
            NonFiniteError("loss", "p", 1, list("abcdefg")),
            "non-finite loss in phase p, step 1, sample a, b, c, d, e and 2 more:",
        ),
    ],
)
def test_non_finite_errors_name_quantity_phase_step_and_samples(error: NonFiniteError, start: str) -> None:
    assert str(error).startswith(start)
    assert "nothing was updated with it" in str(error)
