"""Runs tests against a copy of the source with errors planted into it, one at a time.

A process of its own: the large libraries are imported once, u2a never, and every mutant is tested in a fork. Reads
from standard input a JSON object with ``source`` (the folder that holds the copy) and ``mutants`` (objects with
``file``, ``old``, ``new`` and ``tests``); prints one JSON line ``{"status": ..., "said": ...}`` for each, ``status``
being pytest's exit status.
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import hypothesis  # noqa: F401
import peft  # noqa: F401
import pytest
import torch
import transformers.trainer  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


def tested(tests: list[str], source: Path) -> tuple[int, str]:
    """Exit status of pytest in a fork that imports the copy, and the end of what it printed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said = io.StringIO()
        sys.path.insert(0, str(source))
        with redirect_stdout(said), redirect_stderr(said):
            status = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *tests]))
        os.write(writer, said.getvalue()[-3000:].encode())
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def main() -> None:
    """Plant, test and take back each mutant."""
    sys.dont_write_bytecode = True  # a file changed twice within a second would be taken for the first one
    torch.set_num_threads(1)
    os.chdir(ROOT)
    task = json.load(sys.stdin)
    source = Path(task["source"])
    for mutant in task["mutants"]:
        path = source / "u2a" / mutant["file"]
        before = path.read_text(encoding="utf-8")
        path.write_text(before.replace(mutant["old"], mutant["new"]), encoding="utf-8")
        try:
            status, said = tested(mutant["tests"], source)
        finally:
            path.write_text(before, encoding="utf-8")
        print(json.dumps({"status": status, "said": said}), flush=True)


if __name__ == "__main__":
    main()
