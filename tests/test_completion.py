"""The completion scripts, in the shells that are there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from u2a.cli import build_parser, main
from u2a.completion import SHELLS, completion_script
from u2a.config_file import all_options


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(completion_script(build_parser(), shell), encoding="utf-8")
    return folder


def run_shell(*words: str, folder: Path) -> list[str]:
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.splitlines()


def in_bash(scripts: Path, *line: str) -> list[str]:
    """What bash offers for the last word, through the function that the script registered."""
    code = (
        'source ./bash; compopt() { :; }; function_name=$(complete -p u2a | sed "s/.*-F \\([^ ]*\\) .*/\\1/"); '
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); "$function_name"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return run_shell("bash", "--norc", "-c", code, "bash", *line, folder=scripts)


OFFERS = [
    (("u2a", "ru"), ["run"]),
    (("u2a", "completion", ""), ["bash", "zsh", "fish"]),
    (("u2a", "run", "config.yaml", "--set", "unlearn.lo"), ["unlearn.loss="]),
    (("u2a", "demo", "--set", ""), [f"{name}=" for name in all_options()]),
    (("u2a", "solve", "--preset", ""), ["paper"]),
    (("u2a", "evaluate", "--ga"), ["--gate"]),
    (("u2a", "evaluate", "--gate", ""), ["yes", "not-no"]),
    (("u2a", "data", ""), ["show"]),
    (("u2a", "data", "show", "zs"), ["zsh"]),  # a file in the folder
    (("u2a", "run", "zs"), ["zsh"]),
    (("u2a", "run", "no such file"), []),
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
@pytest.mark.parametrize(("line", "offered"), OFFERS, ids=lambda item: " ".join(item[1:])[:30])
def test_bash(scripts: Path, line: tuple[str, ...], offered: list[str]) -> None:
    assert [word for word in in_bash(scripts, *line) if word] == offered


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine")
@pytest.mark.parametrize(("line", "offered"), OFFERS[:-3], ids=lambda item: " ".join(item[1:])[:30])
def test_fish(scripts: Path, line: tuple[str, ...], offered: list[str]) -> None:
    code = f"source ./fish; complete -C '{' '.join(line)}'"
    found = [text.split("\t")[0] for text in run_shell("fish", "--no-config", "-c", code, folder=scripts)]
    assert sorted(found) == sorted(offered)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
def test_zsh_takes_the_script(scripts: Path) -> None:
    code = 'autoload -U compinit; compinit -D; eval "$(<zsh)"; print $_comps[u2a]; whence -w _u2a_set'
    assert run_shell("zsh", "-f", "-c", code, folder=scripts) == ["_shtab_u2a", "_u2a_set: function"]


def test_every_option_and_command_is_in_every_script(scripts: Path) -> None:
    for shell in SHELLS:
        text = (scripts / shell).read_text(encoding="utf-8")
        assert [name for name in all_options() if f"{name}=" not in text] == []
        assert all(word in text for word in ("run", "robustness", "not-no")), shell


def test_the_command_prints_the_script(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    assert capsys.readouterr().out.strip() == (scripts / "fish").read_text(encoding="utf-8").strip()


def test_without_shtab_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    found = capsys.readouterr()
    assert (found.out, found.err.count("\n")) == ("", 1)
    assert "in the clone: pip install '.[completion]'" in found.err
