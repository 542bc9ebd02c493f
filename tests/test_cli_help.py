"""u2a --help: light, quick, and it says what every exit status means."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys

import pytest

from u2a import __version__
from u2a.cli import build_parser, main

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "pydantic", "numpy", "scipy", "jinja2", "yaml")


def commands(parser: argparse.ArgumentParser) -> list[list[str]]:
    """Every command as words, the empty one included."""
    found: list[list[str]] = [[]]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [[name, *rest] for name, inner in action.choices.items() for rest in commands(inner)]
    return found


@pytest.mark.parametrize("words", [["completion", "bash"], ["config", "--print"], ["metrics"], ["env"]])
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "u2a", *words], stdout=writes, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_the_package_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "u2a", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"u2a {__version__}\n"
    wrong = subprocess.run([sys.executable, "-m", "u2a", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("usage: u2a")


def test_the_help_of_every_command_is_light() -> None:
    words = commands(build_parser())
    assert len(words) > 15
    assert ["data", "show"] in words
    code = (
        "import sys\nfrom u2a.cli import main\n"
        f"for words in {words!r}:\n    try:\n        main([*words, '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0, words\n"
        "    else:\n        raise AssertionError(words)\n"
        f"print('loaded', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert done.stdout.count("usage: u2a") == len(words)


def processor_seconds(*words: str) -> float:
    """Processor time of a Python process, which other processes do not lengthen; the best of three."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def test_help_takes_less_than_four_tenths_of_a_second() -> None:
    assert processor_seconds("-m", "u2a.cli", "--help") - processor_seconds("-c", "pass") < 0.4


def test_help_explains_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.split("exit status:\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3", "130", "141", "143"]
