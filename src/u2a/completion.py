"""``u2a completion``: the words that a shell completes, options of ``--set`` included; the scripts are shtab's."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence

from u2a.config import PRESETS
from u2a.config_file import all_options
from u2a.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
FILES = ("config", "file", "runs", "forget", "prefs", "retain", "pairs", "out")  # arguments that are paths

# Bash puts a space after a word; after ``section.option=`` the value has to follow at once.
NO_SPACE = """
_u2a_completion() {
  _shtab_u2a
  [[ "${COMPREPLY[0]-}" == *= ]] && compopt -o nospace
  return 0
}
complete -o bashdefault -F _u2a_completion u2a
"""


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Write the completion of a command line for a shell.

    Args:
        parser: the command line; its arguments are marked with what completes them.
        shell: ``bash``, ``zsh`` or ``fish``.

    Returns:
        A script to be sourced by the shell.

    Raises:
        ConfigError: the package shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise ConfigError("completion: shtab is not installed (in the clone: pip install '.[completion]')") from None
    for action in _actions(parser):
        completes = None
        if action.dest == "overrides":
            completes = _words("set", [f"{name}=" for name in all_options()])
        elif action.dest == "preset":
            completes = _words("preset", sorted(PRESETS))
        elif action.dest in FILES:
            completes = shtab.FILE
        if completes is not None:
            setattr(action, "complete", completes)  # noqa: B010 (argparse does not know this attribute)
    return shtab.complete(parser, shell) + (NO_SPACE if shell == "bash" else "")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _words(name: str, words: Sequence[str]) -> dict[str, str | dict[str, str]]:
    """Fixed words in the form in which shtab takes what completes an argument."""
    listed = shlex.join(words)
    glued = "-S '' " if words[0].endswith("=") else ""  # no space after the word
    function = f"_u2a_{name}"
    return {
        "bash": function,
        "zsh": function,
        "fish": listed,
        "preamble": {
            "bash": f'{function}() {{\n  compgen -W "{listed}" -- "$1"\n}}',
            "zsh": f"{function}() {{\n  compadd {glued}-- {listed}\n}}",
        },
    }
