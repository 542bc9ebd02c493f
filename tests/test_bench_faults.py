"""The counts of ``make faults`` come from cases that ran: what is named exists, and a failure is never held."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
ISSUE = ("kills", "resumed_identical", "malformed", "malformed_clear", "xss", "xss_blocked", "hostile")
ISSUE += ("hostile_refused", "nonfinite", "nonfinite_caught")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, under a name of its own: a package of the tests is called ``faults`` as well."""
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_faults", BENCH / "faults.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_faults", module)
    spec.loader.exec_module(module)
    return module


def report(name: str, when: Literal["setup", "call", "teardown"], outcome: Any) -> pytest.TestReport:
    return pytest.TestReport(name, ("a.py", 1, name), {}, outcome, None, when)


def test_every_family_is_there_and_has_keys_of_its_own(bench: Any) -> None:
    assert {family.name: bench.absent(family) for family in bench.FAMILIES if bench.absent(family)} == {}
    keys = [key for family in bench.FAMILIES for key in (family.name, family.held)]
    assert len(keys) == len(set(keys))
    assert set(ISSUE) <= {*keys, "kills", "resumed_identical", "nonfinite", "nonfinite_caught"}


def test_a_function_that_is_not_there_fails_its_family(bench: Any) -> None:
    family = bench.Family("x", "y", "F0", ("faults/test_paths.py::test_nothing", "faults/test_nowhere.py"))
    counts, failed = bench.run_family(family, quick=True)
    assert counts == {"x": 0, "y": 0} and len(failed) == 2


def test_outcomes_are_counted_once_a_case(bench: Any) -> None:
    counts = bench.Counts()
    for name, phases in {
        "good": ("passed", "passed", "passed"),
        "bad": ("passed", "failed", "passed"),
        "no set-up": ("failed",),
        "no tear-down": ("passed", "passed", "failed"),
        "left out": ("skipped",),
    }.items():
        for when, outcome in zip(("setup", "call", "teardown"), phases, strict=False):
            counts.pytest_runtest_logreport(report(name, when, outcome))
    assert counts.failed == ["bad", "no set-up", "no tear-down"]
    assert counts.cases == {"passed": 1, "failed": 3, "skipped": 1}


def test_the_last_line_is_json_with_what_failed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    outcomes = {"xss": ({"xss": 3, "xss_blocked": 3}, []), "hostile": ({"hostile": 4, "hostile_refused": 3}, ["one"])}
    monkeypatch.setattr(bench, "run_family", lambda family, quick: outcomes[family.name])
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert bench.main(["--only", "xss", "--out", str(tmp_path / "a.json")]) == 0
    assert bench.main(["--only", "xss", "hostile"]) == 1
    first, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == first
    assert (last["hostile"], last["hostile_refused"], last["failed"]) == (4, 3, {"hostile": ["one"]})
    assert {"date", "machine", "commit", "versions", "seed", "seconds"} <= set(last)

    def broken(family: Any, quick: bool) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(bench, "run_family", broken)
    assert bench.main(["--only", "xss"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == {"xss": ["ValueError: no such thing"]}
