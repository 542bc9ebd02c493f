"""The notebooks run, use public names alone, and keep outputs that are small and tell nothing of a machine."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path

import nbformat
import pytest

import u2a
from tiny import save_tiny

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
RUNNER = runpy.run_path(str(EXAMPLES / "run_notebooks.py"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def private_or_unknown(tree: ast.AST) -> list[str]:
    """Names of u2a that are private, or that do not exist."""
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "u2a":
            module = importlib.import_module(node.module or "")
            wrong += [item.name for item in node.names if item.name.startswith("_") or not hasattr(module, item.name)]
        elif isinstance(node, ast.Attribute):
            of_u2a = isinstance(node.value, ast.Name) and node.value.id == "u2a"
            wrong += [node.attr] if node.attr.startswith("_") or (of_u2a and node.attr not in u2a.__all__) else []
    return wrong


def test_both_notebooks_are_there_and_run_by_the_runner() -> None:
    assert [path.name for path in NOTEBOOKS] == sorted(RUNNER["NAMES"])
    assert len(NOTEBOOKS) == 2


@each_notebook
def test_a_notebook_is_valid_and_uses_public_names_alone(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    code = "\n".join(cell.source for cell in cells(path, "code"))
    assert private_or_unknown(ast.parse(code)) == []
    assert "u2a." in code
    words = sum(len(cell.source.split()) for cell in cells(path, "markdown"))
    assert words > 150, "it teaches"


def test_the_checker_of_names_sees_what_it_should() -> None:
    bad = ["from u2a.run import _default_config", "from u2a.run import nothing", "u2a.nothing()", "x._policy"]
    assert [len(private_or_unknown(ast.parse(text))) for text in bad] == [1] * len(bad)
    assert private_or_unknown(ast.parse("from u2a.progress import Console\nu2a.align(x.model)")) == []


@each_notebook
def test_outputs_are_printed_text_alone_small_and_of_no_machine(path: Path) -> None:
    numbers = [cell.execution_count for cell in cells(path, "code")]
    if not any(numbers):  # never run by the runner: then nothing is kept at all
        assert not any(cell.outputs for cell in cells(path, "code"))
        return
    assert numbers == list(range(1, len(numbers) + 1)), "run from top to bottom, in order"
    printed = ""
    for cell in cells(path, "code"):
        assert all(output.output_type == "stream" and output.name == "stdout" for output in cell.outputs)
        assert not cell.metadata.get("execution")
        printed += "".join(output.text for output in cell.outputs)
    assert 100 < len(printed) < 20_000
    assert not re.search(r"\x1b|[ '\"]/\w+/|Traceback|Error\b", printed)
    assert path.stat().st_size < 60_000


@each_notebook
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    targets = [link for cell in cells(path, "markdown") for link in re.findall(r"\]\(([^)#\s]+)", cell.source)]
    assert targets
    assert [target for target in targets if "://" not in target and not (EXAMPLES / target).exists()] == []


def test_tidying_keeps_printed_text_without_what_differs_from_run_to_run() -> None:
    new = nbformat.v4
    outputs = [
        new.new_output("stream", name="stderr", text="\x1b[31ma warning\n"),
        new.new_output("stream", name="stdout", text="a \n  score: done in 12.3 s\n"),
        new.new_output("stream", name="stdout", text="b\n"),
        new.new_output("execute_result", data={"text/plain": "<object at 0x1>"}),
    ]
    cell = new.new_code_cell("x", outputs=outputs, execution_count=7, metadata={"execution": {"t": "now"}})
    kernel = {"name": "python3", "display_name": "Python 3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python", "version": "3"}}
    book = RUNNER["tidy"](new.new_notebook(cells=[cell, new.new_code_cell("y")], metadata=metadata | {"more": 1}))
    assert [output.text for output in book.cells[0].outputs] == ["a\n  score: done in ... s\nb\n"]
    assert [cell.execution_count for cell in book.cells] == [1, 2] and book.cells[1].outputs == []
    assert book.metadata["language_info"] == {"name": "python"} and "more" not in book.metadata


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    """With a tiny model in the place of the packaged one; the kernel is a process of its own."""
    model = str(save_tiny(tmp_path / "model"))
    options = ["model.adapter.layers=null", "reward.model=none", "reward.eval_model=none", "data.max_length=512"]
    options += ["evaluation.generate_prompts=2", "evaluation.max_new_tokens=4"]
    notebook, seconds = RUNNER["run_notebook"](path, tmp_path, f"MODEL = {model!r}\nOPTIONS = {options!r}")
    assert seconds < 300
    outputs = [output for cell in RUNNER["tidy"](notebook).cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs)
    assert "reliability" in printed
    if path.stem == "align_in_ten_lines":
        assert "selection beat random-k: " in printed
        assert (tmp_path / "runs" / "ten_lines" / "aligned" / "adapter_model.safetensors").exists()
