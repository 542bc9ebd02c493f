from __future__ import annotations

import inspect

import pytest

from u2a import errors
from u2a.errors import ConfigError, DataError, ModelError, NonFiniteError, NotConverged, RecordError, U2AError


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
        "NonFiniteError": 1,
        "NotConverged": 1,
    }


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
