"""Run the notebooks of this folder from top to bottom and keep what they print: make notebooks.

    python examples/run_notebooks.py [NOTEBOOK ...]

What is kept is the text a reader sees on a hub of code, without times, terminal codes or progress bars.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NAMES = ("which_answers_matter.ipynb", "align_in_ten_lines.ipynb")
_TIMES = re.compile(r"(?<=done in )[\d.]+(?= s$)", re.MULTILINE)


def run_notebook(
    path: Path, folder: Path, parameters: str = "", timeout_s: float = 1800.0
) -> tuple[nbformat.NotebookNode, float]:
    """Run one notebook.

    Args:
        path: the notebook; it is not changed.
        folder: where it runs, and where its files go.
        parameters: code that is run after the cell tagged ``parameters``, to change them.
        timeout_s: seconds for one cell at most.

    Returns:
        The notebook with its outputs, and the seconds it took.
    """
    notebook = nbformat.read(path, as_version=4)
    (place,) = [k for k, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    original = notebook.cells[place].source
    notebook.cells[place].source = f"{original}\n{parameters}"
    start = time.monotonic()
    NotebookClient(notebook, timeout=timeout_s, resources={"metadata": {"path": str(folder)}}).execute()
    notebook.cells[place].source = original
    return notebook, time.monotonic() - start


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave only what a reader needs of the outputs: printed text, without what differs from run to run.

    Args:
        notebook: a notebook that was run; changed in place.

    Returns:
        The same notebook.
    """
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        lines = [line.rstrip() for line in _TIMES.sub("...", printed).splitlines()]
        cell.outputs = [nbformat.v4.new_output("stream", text="\n".join(lines) + "\n")] if printed else []
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the notebooks named, or all, and write them back with their outputs.

    Args:
        arguments: paths; None takes those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    for path in [Path(name) for name in given] or [HERE / name for name in NAMES]:
        notebook, seconds = run_notebook(path, HERE.parent)
        nbformat.write(tidy(notebook), path)
        print(f"{path}: {seconds:.0f} s")


if __name__ == "__main__":
    main()
