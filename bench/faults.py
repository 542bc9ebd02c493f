"""make faults: every fault of docs/trust.md, injected in this process or a child of it, and counted.

Nothing is counted that was not carried out here: the families are the project's own tests, run by pytest and counted
case by case; the kills and the numbers that are not finite come from the functions those tests use, with more cases.

    python bench/faults.py [--kills 50] [--seed 0] [--only FAMILY ...] [--out bench/results/faults.json]

The last line of standard output is JSON. The exit status is 0 only if every case of every family held.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from machine import commit, machine, versions

from u2a.record import write_whole

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Family:
    """Cases of one fault, held by tests.

    Attributes:
        name: key of the number of cases.
        held: key of the number of cases that ended as promised.
        fault: its number in docs/trust.md.
        tests: files, or ``file::function``, under ``tests/``.
    """

    name: str
    held: str
    fault: str
    tests: tuple[str, ...]


def _in(file: str, *names: str) -> tuple[str, ...]:
    """Functions of one file."""
    return tuple(f"{file}::test_{name}" for name in names)


_CONFIGS = _in(
    "faults/test_bad_configs.py",
    "a_bad_configuration_is_one_clear_error",
    "a_run_that_cannot_start_loads_no_weights",
)
_HOSTILE = _in(
    "faults/test_hostile_checkpoints.py",
    "a_hostile_model_is_refused",
    "pickles_beside_the_weights_are_not_opened",
    "an_index_that_leads_elsewhere_is_refused",
    "an_adapter_in_the_place_of_a_model_is_refused",
    "a_damaged_model_configuration_is_refused",
    "a_damaged_tokenizer_is_refused",
    "a_hostile_chat_template_is_refused",
    "code_shipped_with_a_model_is_not_executed",
    "a_damaged_gguf_file_is_refused",
    "a_hostile_head_is_refused",
    "a_head_that_is_a_link_out_of_its_folder_is_refused",
    "a_hostile_arm_is_refused",
    "an_arm_of_another_base_is_refused",
    "an_arm_that_is_a_link_out_of_the_run_is_refused",
    "a_hostile_record_is_refused",
    "a_pickle_in_the_place_of_a_record_is_refused",
    "hostile_keys_of_stages_are_refused",
)
_MARKUP = _in(
    "faults/test_injection.py",
    "a_comparison_has_the_elements_of_a_harmless_one",
    "a_model_card_keeps_its_shape",
    "a_comparison_in_markdown_keeps_its_tables",
)
_DEFECTS = ("test_defects_inner.py", "bilevel/test_defects_outer.py", "evaluation/test_defects_evaluation.py")
_MALFORMED = _in("faults/test_malformed_data.py", "a_malformed_file_is_one_clear_error")
_LEAKS = _in("faults/test_leaks.py", "a_planted_overlap_is_an_error_or_a_warning_with_its_count")
_XSS = _in("faults/test_injection.py", "a_report_has_the_elements_of_a_harmless_one")
_JUDGES = _in("evaluation/test_rubric_judge.py", "a_failure_is_unscored_and_asked_again_alone")
_DEGENERATE = _in("evaluation/test_judges.py", "degeneration_on_known_cases")
FAMILIES = (
    Family("save_points", "save_points_whole", "F2", ("faults/test_checkpoint.py",)),
    Family("signals", "signals_obeyed", "F3", ("faults/test_signals.py", "faults/test_stopped_runs.py")),
    Family("io_errors", "io_errors_clear", "F4", ("faults/test_io_errors.py",)),
    Family("edge_cases", "edge_cases_defined", "F6", ("bilevel/test_edge_cases.py", "faults/test_degenerate_gains.py")),
    Family("malformed", "malformed_clear", "F7", _MALFORMED),
    Family("fuzzed", "fuzzed_clear", "F7", ("faults/test_fuzz.py",)),
    Family("leaks", "leaks_caught", "F8", _LEAKS),
    Family("bad_configs", "bad_configs_clear", "F9", _CONFIGS),
    Family("hostile", "hostile_refused", "F10", _HOSTILE),
    Family("traversal", "traversal_confined", "F11", ("faults/test_paths.py",)),
    Family("xss", "xss_blocked", "F12", _XSS),
    Family("injections", "injections_neutralised", "F13", (*_MARKUP, "test_candidates_csv.py")),
    Family("judge_failures", "judge_failures_unscored", "F14", _JUDGES),
    Family("degenerate", "degenerate_flagged", "F15", _DEGENERATE),
    Family("memory", "memory_survived", "F16", ("faults/test_out_of_memory.py",)),
    Family("determinism", "determinism_held", "F17", ("faults/test_determinism.py",)),
    Family("environments", "environments_survived", "F18", ("faults/test_environment.py",)),
    Family("locks", "locks_held", "F19", ("faults/test_run_lock.py",)),
    Family("defects", "defects_caught", "F21", _DEFECTS),
    Family("keys", "keys_unseen", "keys", ("faults/test_keys.py",)),
)


class Counts:
    """Counts the cases that pytest runs, each once: one that fails before, in or after its call has failed."""

    def __init__(self) -> None:
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of one phase of one case."""
        if report.when == "call" or not report.passed:
            self._outcomes[report.nodeid] = report.outcome

    @property
    def cases(self) -> Counter[str]:
        """Cases by outcome."""
        return Counter(self._outcomes.values())

    @property
    def failed(self) -> list[str]:
        """Names of the cases that failed."""
        return [name for name, outcome in self._outcomes.items() if outcome == "failed"]


def absent(family: Family) -> list[str]:
    """Files and functions of a family that are not there."""
    missing = []
    for test in family.tests:
        file, _, function = test.partition("::")
        path = ROOT / "tests" / file
        names = [getattr(node, "name", "") for node in ast.parse(path.read_text("utf-8")).body] if path.exists() else []
        if not path.exists() or (function and function not in names):
            missing.append(test)
    return missing


def run_family(family: Family, quick: bool) -> tuple[dict[str, int], list[str]]:
    """Run the cases of a family and count them; ``quick`` leaves out those marked slow.

    Returns:
        Both numbers by their keys, and what failed.
    """
    if missing := absent(family):
        return {family.name: 0, family.held: 0}, [f"{test}: not there" for test in missing]
    counts = Counts()
    tests = [str(ROOT / "tests" / test) for test in family.tests]
    marks = "not gpu and not network" + (" and not slow" if quick else "")
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marks, "--timeout", "3600"]
    status = pytest.main([*options, *tests], plugins=[counts])
    held, failed = counts.cases["passed"], counts.failed
    if status != 0 and not failed:
        failed = [f"{family.name}: pytest ended with status {status}"]
    return {family.name: held + counts.cases["failed"], family.held: held}, failed


def run_kills(n: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Kill ``n`` runs, one time each, so that every kill is one resumed run to compare."""
    found = importlib.import_module("faults.kill_harness").run_kills(n, seed, most_per_run=1)
    details = [json.dumps(item) for item in found.pop("details")]
    return found, details


def run_counted(module: str, function: str, name: str, held: str) -> tuple[dict[str, int], list[str]]:
    """Call a function of the tests that injects all cases of a fault and counts them."""
    found = getattr(importlib.import_module(module), function)()
    missed = found[name] - found[held]
    return found, [f"{missed} of {found[name]} cases did not hold"] if missed else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the families and print the counts.

    Returns:
        0 if every case held, else 1.
    """
    names = ["kills", "nonfinite", "mutants", *(family.name for family in FAMILIES)]
    parser = argparse.ArgumentParser(description="Inject every fault of docs/trust.md and count what held.")
    parser.add_argument("--kills", type=int, default=50, help="kill -9 at this many points (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the points (default: 0)")
    parser.add_argument("--quick", action="store_true", help="leave out tests marked slow")
    parser.add_argument("--only", nargs="+", choices=names, metavar="FAMILY", help=f"some of: {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="also write the counts to this file")
    options = parser.parse_args(arguments)
    chosen = options.only or names
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT / "tests"))
    special = {
        "kills": lambda: run_kills(options.kills, options.seed),
        "nonfinite": lambda: run_counted("faults.non_finite", "run_non_finite", "nonfinite", "nonfinite_caught"),
        "mutants": lambda: run_counted("faults.test_mutants", "run_planted", "mutants", "mutants_killed"),
    }
    counts: dict[str, Any] = {}
    failed: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for number, name in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        family = next((item for item in FAMILIES if item.name == name), None)
        try:
            found, wrong = special[name]() if family is None else run_family(family, options.quick)
        except Exception as error:  # one broken family must not hide the others
            found, wrong = {name: 0}, [f"{type(error).__name__}: {error}"]
        counts |= found
        seconds[name] = round(time.monotonic() - start, 1)
        if wrong:
            failed[name] = wrong
        state = f"{len(wrong)} did not hold" if wrong else "all held"
        print(f"[{number}/{len(chosen)}] {name}: {state}, {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    result = counts | {
        "failed": failed,
        "seconds": seconds,
        "seed": options.seed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine("cpu"),
        "versions": versions(),
    }
    if options.out is not None:
        write_whole(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
