"""Habits that keep the source readable, checked on the syntax trees: imports, sizes, unsafe calls, stray paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import u2a

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "u2a"

# A module imports only what stands in an earlier layer or, without a cycle, in its own. A package is one entry,
# apart from the statistics, which need no model.
LAYERS = (
    {"errors"},
    {"signals"},
    {"disk"},
    {"terminal"},
    {"environment"},
    {"free_memory"},
    {"record"},
    {"checkpoint"},
    {"random_state"},
    {"tensor_tree"},
    {"parts"},
    {"diagnosis"},
    {"jsonl_cache"},
    {"folding"},
    {"types"},
    {"card_words"},
    {"solution"},
    {"yaml_file"},
    {"config_base"},
    {"config_evaluation"},
    {"config_reward"},
    {"config"},
    {"config_file"},
    {"completion"},
    {"progress"},
    {"rows"},
    {"data"},
    {"contradictions"},
    {"shortages"},
    {"partition"},
    {"packaged"},
    {"encoding"},
    {"batch_size"},
    {"near_duplicates"},
    {"token_checks"},
    {"doctor"},
    {"adapter"},
    {"modeling"},
    {"model_loading"},
    {"named_content"},
    {"data_show"},
    {"losses"},
    {"stream"},
    {"guard"},
    {"callbacks"},
    {"inner_loss"},
    {"trainer_checkpoint"},
    {"trainer_config"},
    {"trainer_setup"},
    {"trainer"},
    {"unlearn"},
    {"bilevel"},
    {"evaluation.stats"},
    {"reward"},
    {"evaluation"},
    {"robustness"},
    {"finetune"},
    {"figure_file", "figures", "console", "run_records", "content_hash", "report", "model_card", "compare"},
    {"candidates_csv", "trackers"},
    {"metrics_log"},
    {"stage_store"},
    {"gate"},
    {"early_checks"},
    {"run_lock"},
    {"arms"},
    {"pipeline"},
    {"evaluation_stage"},
    {"artifacts"},
    {"run"},
    {"score_files"},
    {"forecast.flops"},
    {"forecast.work"},
    {"forecast.workload"},
    {"forecast.probe"},
    {"forecast.reward_probe"},
    {"forecast.phases"},
    {"forecast.text"},
    {"forecast.lighter"},
    {"forecast.outputs"},
    {"forecast.dry_run"},
    {"forecast"},
    {"experiment"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Takes what users of transformers' Trainer expect, and hands it over.
TRAINER_SURFACE = {"UnlearnTrainer.__init__": (80, 10)}


def layer(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return module if module in RANK else module.split(".")[0]


def module_name(path: Path) -> str:
    """Name of a module below u2a: ``bilevel.solve``; a package has the name of its folder."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


TREES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
    if path != SOURCE / "__init__.py"  # the lazy table of public names
}


def imported(tree: ast.AST) -> set[str]:
    """Modules below u2a that a tree imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"line {node.lineno}: relative import")
        if isinstance(node, ast.ImportFrom) and node.module == "u2a":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    names = {name.removeprefix("u2a.") for name in found if name.startswith("u2a.") or name in RANK}
    return {name for name in names if name.split(".")[0] in RANK or name.split(".")[0] == "reference"}


def wrong_way(module: str, tree: ast.AST) -> list[str]:
    """Imports of a module that point to a later layer or to the reference code."""
    found = []
    for name in sorted(imported(tree)):
        reference = layer(name) == "reference"
        if layer(module) != "reference" and (reference or RANK[layer(name)] > RANK[layer(module)]):
            found.append(f"{module} imports {name}")
    return found


def functions(tree: ast.AST, prefix: str = "") -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions of a tree with their qualified names."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((prefix + node.name, node))
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        found += functions(node, f"{prefix}{node.name}." if named else prefix)
    return found


def too_big(tree: ast.AST) -> list[str]:
    """Functions of over 60 lines (docstring aside) or 7 parameters (self aside)."""
    found = []
    for name, node in functions(tree):
        first = node.body[0]
        has_docstring = ast.get_docstring(node) is not None and first.end_lineno is not None
        documentation = first.end_lineno - first.lineno + 1 if has_docstring else 0
        lines = (node.end_lineno or 0) - node.lineno + 1 - documentation
        parameters = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([argument for argument in parameters if argument not in ("self", "cls")])
        most_lines, most_parameters = TRAINER_SURFACE.get(name, (60, 7))
        if lines > most_lines:
            found.append(f"{name}: {lines} lines")
        if count > most_parameters:
            found.append(f"{name}: {count} parameters")
    return found


def unsafe(tree: ast.AST) -> list[str]:
    """Ways to run code that comes with data: pickle, torch.load, eval, exec, trust_remote_code=True."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "shelve")]
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            found += [call] if call in ("torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load") else []
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and isinstance(node.value, ast.Constant):
            found += ["trust_remote_code"] if node.value.value else []
    return found


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in TREES} - {"reference"} == set(RANK)


def test_imports_point_to_earlier_layers() -> None:
    assert [text for module, tree in TREES.items() for text in wrong_way(module, tree)] == []


def test_imports_have_no_cycle() -> None:
    graph = {module: {name for name in imported(tree) if name in TREES} for module, tree in TREES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(TREES) <= set(order)
    assert graph["cli"] >= {"config_file", "run"}  # imports inside functions are seen, too


@pytest.mark.parametrize("command", ["import u2a", "from u2a.cli import main; main(['--help'])"])
def test_start_is_light(command: str) -> None:
    code = (
        f"import sys\ntry:\n    {command}\nexcept SystemExit:\n    pass\n"
        "print('loaded', sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_public_names_exist_and_are_few() -> None:
    assert len((SOURCE / "__init__.py").read_text(encoding="utf-8").splitlines()) <= 60
    assert sorted(u2a.__all__) == sorted(u2a._HOME)
    assert [name for name in u2a.__all__ if not callable(getattr(u2a, name))] == []


@pytest.mark.parametrize("first", ["u2a.partition", "u2a.pipeline", "u2a.cli"])
def test_a_function_is_not_hidden_by_the_module_of_its_name(first: str) -> None:
    code = f"import {first}, u2a\nfor _ in (0, 1):\n    print(u2a.partition.__qualname__, u2a.partition.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["partition u2a.partition"] * 2


def test_functions_and_modules_are_short() -> None:
    found = [f"{module}.{text}" for module, tree in TREES.items() for text in too_big(tree)]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py")}
    found += [f"{module_name(path)}: {length} lines" for path, length in lengths.items() if length > 400]
    assert found == []


def test_nothing_runs_code_that_comes_with_data() -> None:
    assert [f"{module}: {text}" for module, tree in TREES.items() for text in unsafe(tree)] == []


TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".j2", ".jsonl", ".json", ".html", ".svg", ".sh", ".cfg", ""}
STRAY = re.compile(r"(?<![\w.~])/(?:work|tmp|root)/|\b(?:claude|chatgpt|copilot)\b|co-authored-by", re.IGNORECASE)


def repository_texts() -> list[Path]:
    """Source and text files of the repository, without what it ignores and this file, which names what it looks for."""
    folders = [ROOT / name for name in ("src", "tests", "bench", "docs", "examples", "configs", ".ci")]
    inside = [path for folder in folders for path in folder.rglob("*")]
    files = [path for path in [*ROOT.glob("*"), *inside] if path.is_file() and path.suffix in TEXT]
    return [path for path in files if path != Path(__file__) and not {"__pycache__", "u2a.egg-info"} & set(path.parts)]


def test_no_machine_path_and_no_trace_of_a_tool_in_any_text() -> None:
    found = []
    for path in repository_texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := STRAY.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == []


def test_the_checks_see_what_they_look_for() -> None:
    assert wrong_way("losses", ast.parse("def f():\n    from u2a.bilevel.solve import solve")) == [
        "losses imports bilevel.solve"
    ]
    assert wrong_way("run", ast.parse("import u2a.reference.dense")) == ["run imports reference.dense"]
    assert wrong_way("run", ast.parse("from u2a import cli")) == ["run imports cli"]
    assert wrong_way("run", ast.parse("from u2a.errors import U2AError")) == []
    assert too_big(ast.parse("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...")) == ["A.f: 8 parameters"]
    assert too_big(ast.parse("def f():\n" + "    x = 1\n" * 60)) == ["f: 61 lines"]
    assert too_big(ast.parse("def f():\n    '''" + "Text.\n" * 60 + "'''\n")) == []
    assert unsafe(ast.parse("import pickle\ntorch.load(p)\neval(s)\nf(trust_remote_code=True)\nmodel.eval()")) == [
        "pickle",
        "torch.load",
        "eval",
        "trust_remote_code",
    ]
    assert STRAY.search("see /tmp/x")
    assert not STRAY.search("docs/work/x and ~/tmp/x")
