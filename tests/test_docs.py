"""README, docs and examples say what is true: files and names exist, commands parse, code runs."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import u2a
from fake_records import fake_partition, fake_solution
from tiny import save_tiny
from u2a.cli import build_parser
from u2a.config import DataSection, RunConfig
from u2a.config_file import all_options, load_config, print_options
from u2a.data import parse_examples, parse_pairs
from u2a.partition import Inputs, build_partition
from u2a.rows import read_rows
from u2a.trainer_setup import policy_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TOPICS = ("tea", "rain", "chess", "bread", "maps", "wool", "salt", "bees", "kites", "ferns")
IN_SOLUTION = re.compile(r"`([a-z_.]+)` in `solution\.json`")
FILE_ENDINGS = ("md", "json", "jsonl", "yaml", "html", "py", "txt", "safetensors", "csv", "lock")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def options_page(text: str) -> str:
    """docs/options.md with its block replaced by the current options."""
    return re.sub(r"(?<=^```yaml\n).*?(?=^```)", lambda _: print_options(), text, flags=re.S | re.M)


# --- files --------------------------------------------------------------------------------------


def tree_paths() -> list[str]:
    """Paths of the annotated tree of the README: indentation is the directory."""
    (block,) = [text for text in blocks("README.md", "text") if "src/u2a/" in text]
    paths, parents = [], []
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        parents = [*parents[:depth], name]
        paths.append("".join(parents))
    return paths


def test_the_file_tree_of_the_readme_is_the_repository() -> None:
    paths = tree_paths()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [path for path in paths if path.endswith("/") != (ROOT / path).is_dir()] == []
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src" / "u2a").rglob("*.py")}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}
    assert sorted((modules | pages | scripts) - set(paths)) == [], "files that the README does not name"


@pytest.mark.parametrize("name", ["findings", "which_method"])
def test_every_figure_of_a_finding_stands_in_a_table_that_a_command_wrote(name: str) -> None:
    tables = [ROOT / "docs" / "results", ROOT / "bench" / "results"]
    files = [path for folder in tables for path in folder.rglob("*") if path.suffix in (".md", ".json")]
    known = {number for path in files for number in re.findall(r"\d+\.\d+", path.read_text(encoding="utf-8"))}
    figures = re.findall(r"\d+\.\d+", prose(ROOT / "docs" / f"{name}.md"))
    assert [figure for figure in figures if figure not in known] == []


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


@each_page
def test_files_named_in_text_exist(page: Path) -> None:
    named = re.findall(r"`((?:tests|examples|configs|src)/[\w./-]+)`", prose(page))
    assert [path for path in named if path != "configs/data" and not (ROOT / path).exists()] == []


def test_places_in_a_solution_file_are_where_the_pages_say(tmp_path: Path) -> None:
    saved = fake_solution(fake_partition(3)).save(tmp_path / "solution.json")
    tree, found = json.loads(saved.read_text(encoding="utf-8")), []
    for page in PAGES:
        for place in IN_SOLUTION.findall(page.read_text(encoding="utf-8")):
            value = tree
            for part in place.split("."):
                assert part in value, f"{page.name}: {place}"
                value = value[part]
            found.append(place)
    assert len(found) >= 5


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    for page in sorted(linked):
        linked |= {f"docs/{name}" for name in re.findall(r"\]\((\w+\.md)\)", (ROOT / page).read_text(encoding="utf-8"))}
    named = {path for path in tree_paths() if path.startswith("docs/") and path.endswith(".md")}
    assert {path.relative_to(ROOT).as_posix() for path in PAGES[2:]} <= linked | named


# --- options, names and commands ----------------------------------------------------------------


def test_the_page_of_options_is_what_the_program_prints() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == options_page(page), "run: python tests/test_docs.py"


def objects() -> dict[str, Any]:
    """Modules of u2a by dotted name, and their classes and functions by name."""
    names = [item.name for item in pkgutil.walk_packages(u2a.__path__, "u2a.") if item.name != "u2a.__main__"]
    modules = {name.removeprefix("u2a."): importlib.import_module(name) for name in names}
    found: dict[str, Any] = {"u2a": u2a}
    for module in modules.values():
        found |= {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    return found | modules


def resolves(name: str, known: dict[str, Any]) -> bool:
    """Whether a dotted name is an object of u2a (an annotated field counts)."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if (head := ".".join(parts[:cut])) in known:
            value = known[head]
            for part in parts[cut:]:
                fields = getattr(value, "model_fields", None) or getattr(value, "__annotations__", {})
                if not hasattr(value, part):
                    return part in fields and part == parts[-1]
                value = getattr(value, part)
            return True
    return False


def test_options_and_objects_named_in_text_exist() -> None:
    known, options = objects(), {*all_options(), *RunConfig.model_fields}
    sections = {name.split(".")[0] for name in options}
    wrong = []
    for page in PAGES:
        text = IN_SOLUTION.sub("", prose(page))
        for name in re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(.*?\))?`", text):
            if name.rsplit(".", 1)[-1] in FILE_ENDINGS:
                continue
            ours = name.split(".")[0] in sections | set(known) | {item.split(".")[0] for item in known}
            if ours and name not in options and not resolves(name, known):
                wrong.append(f"{page.name}: {name}")
    assert wrong == []


def test_the_checker_of_names_sees_a_wrong_one() -> None:
    known = objects()
    assert resolves("losses.npo", known) and resolves("ScoreRow.gain", known) and resolves("Policy.theta0", known)
    assert not resolves("losses.nposed", known) and not resolves("ScoreRow.gains", known)


def test_the_two_commands_are_targets_and_the_test_command_is_exact() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    lines = [line.split("#")[0].strip() for block in blocks("README.md", "bash") for line in block.splitlines()]
    assert {"make demo", "make test"} <= set(lines)
    assert {line.removeprefix("make ") for line in lines if line.startswith("make ")} <= set(targets)


@each_page
def test_commands_parse_and_set_options_that_exist(page: Path) -> None:
    lines = [line for block in blocks(str(page.relative_to(ROOT)), "bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    for command in (line for line in words if line[:1] == ["u2a"]):
        arguments = command[1 : command.index(">")] if ">" in command else command[1:]
        options = build_parser().parse_args(arguments)
        for name in (text.split("=")[0] for text in getattr(options, "overrides", ())):
            assert name in {*all_options(), "model"}, name


# --- code ---------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with the files that pages and examples name."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny("my-model")
    pairs = [
        {
            "prompt": f"Q{k}: {TOPICS[k % 10]}?",
            "chosen": f"yes, {TOPICS[k % 10]}",
            "rejected": "no" + " bah" * (1 + k % 3),
        }
        for k in range(40)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    bad = [{"prompt": f"N{k}: {TOPICS[k % 10]}?", "completion": "never" + " ugh" * (k % 4)} for k in range(12)]
    write_jsonl(tmp_path / "negatives.jsonl", bad)
    good = [{"prompt": f"R{k}: {TOPICS[k % 10]}?", "completion": f"some {TOPICS[k % 10]}"} for k in range(15)]
    write_jsonl(tmp_path / "instructions.jsonl", good)
    return tmp_path


def test_the_page_on_python_runs_from_top_to_bottom(folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    for number, block in enumerate(blocks("docs/python.md", "python")):
        exec(compile(block, f"python.md, block {number}", "exec"), names)
    assert (folder / "report.html").exists() and (folder / "aligned" / "adapter_model.safetensors").exists()
    assert set(names["result"].summary["retain_ppl"]) == {"before", "after", "random_k"}


def test_the_other_python_blocks_are_valid_and_pass_known_arguments(folder: Path) -> None:
    known = {"align": u2a.align, "UnlearnTrainer": u2a.UnlearnTrainer, "UnlearnConfig": u2a.UnlearnConfig}
    for page in ("README.md", "docs/coming_from_trl.md", "docs/which_method.md"):
        for block in blocks(page, "python"):
            compile(block, page, "exec")
            for name, arguments in re.findall(
                r"(align|UnlearnTrainer|UnlearnConfig)\(((?:[^()]|\([^()]*\))*)\)", block
            ):
                keywords = re.findall(r"(\w+)=", re.sub(r"\([^()]*\)", "", arguments))
                assert set(keywords) <= set(inspect.signature(known[name]).parameters), (page, name)


def test_sample_rows_are_read(tmp_path: Path) -> None:
    section = DataSection()
    for page in ("README.md", "docs/data.md"):
        (block,) = blocks(page, "json")
        rows = [json.loads(line) for line in block.splitlines()]
        pairs = [row for row in rows if "chosen" in row]
        write_jsonl(tmp_path / "pairs.jsonl", pairs)
        write_jsonl(tmp_path / "rest.jsonl", [row for row in rows if "chosen" not in row])
        assert len(parse_pairs(read_rows(tmp_path / "pairs.jsonl"), section)) == len(pairs) >= 1
        assert (
            len(parse_examples(read_rows(tmp_path / "rest.jsonl"), section, good=False)) == len(rows) - len(pairs) >= 2
        )


def test_the_sample_configuration_is_valid(tmp_path: Path) -> None:
    (readme,) = blocks("README.md", "yaml")
    (tmp_path / "readme.yaml").write_text(readme, encoding="utf-8")
    config = load_config(tmp_path / "readme.yaml")
    assert (config.data.pairs, config.data.retain) == tuple(
        str(tmp_path / f"{n}.jsonl") for n in ("pairs", "instructions")
    )
    for number, block in enumerate(blocks("docs/which_method.md", "yaml")):
        (tmp_path / f"method{number}.yaml").write_text(block, encoding="utf-8")
        assert load_config(tmp_path / f"method{number}.yaml").unlearn.loss == "npo"
    (mapped,) = [block for block in blocks("docs/data.md", "yaml") if "fields" in block]
    (tmp_path / "mapped.yaml").write_text(mapped, encoding="utf-8")
    assert load_config(tmp_path / "mapped.yaml").data.fields.chosen == "right_answer"


def test_negatives_alone_are_unlearned_with_the_lines_that_the_pages_show(tmp_path: Path) -> None:
    (readme,) = blocks("README.md", "yaml")
    (page,) = [block for block in blocks("docs/data.md", "yaml") if "forget:" in block]
    for number, text in enumerate((re.sub(r"^( *)# (?=forget|partition)", r"\1", readme, flags=re.M), page)):
        (tmp_path / f"{number}.yaml").write_text(text, encoding="utf-8")
        config = load_config(tmp_path / f"{number}.yaml")
        assert config.data.forget == str(tmp_path / "negatives.jsonl")
        assert config.partition.forget_frac == 0
        sets = build_partition(Inputs(pairs=tiny.pairs(100)), config.partition)
        assert not sets.forget and sets.preference and sets.reward and sets.evaluation


def test_extras_are_named_as_they_can_be_installed_and_the_readme_lists_them_all() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in extras if f"| `{name}` |" not in readme] == []
    named = set()
    for path in [*PAGES, *(ROOT / "src").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "install 'u2a[" not in text, f"{path}: u2a is on no package index"
        named |= {extra for group in re.findall(r"pip install '\.\[([\w,]+)\]'", text) for extra in group.split(",")}
    assert named <= set(extras) and {"demo", "completion", "experiment", "benchmarks"} <= named


@each_page
def test_a_page_that_advises_several_seeds_says_how_they_can_be_compared(page: Path) -> None:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if re.search(r"--set seed=\d", line)]
    assert [line for line in lines if "--set partition.held_out_seed=0 --set seed=" not in line] == []


def test_the_page_on_gpus_loads_and_names_the_precision_that_the_code_has(folder: Path) -> None:
    (options,) = blocks("docs/gpu.md", "yaml")
    (folder / "gpu.yaml").write_text(options, encoding="utf-8")
    assert load_config(folder / "gpu.yaml").model.dtype == "bfloat16" and RunConfig().model.dtype == "float32"
    names: dict[str, Any] = {}
    (code,) = blocks("docs/gpu.md", "python")
    exec(compile(code, "gpu.md", "exec"), names)
    names["model"].save_pretrained("half")
    names["tokenizer"].save_pretrained("half")
    for model, full, dtype in (("half", False, torch.bfloat16), ("half", True, torch.float32)):
        args = u2a.UnlearnConfig(output_dir="out", use_cpu=True, report_to="none", full_finetuning=full)
        policy = policy_of(model, None, None, args)
        (frozen,) = {value.dtype for name, value in policy.model.named_parameters() if "lora" not in name}
        assert frozen == dtype and {value.dtype for value in policy.trainable().values()} == {torch.float32}
    assert "model_init_kwargs" not in inspect.signature(u2a.UnlearnConfig).parameters


def test_functions_that_prepare_known_sets_do_what_the_page_says() -> None:
    names: dict[str, Any] = {}
    for block in blocks("docs/data.md", "python"):
        exec(compile(block, "data.md", "exec"), names)
    row = {"prompt": "P", "response_0": "a", "response_1": "b", "safer_response_id": 1}
    unsafe_first = row | {"is_response_0_safe": False, "is_response_1_safe": True}
    assert names["safer_pair"](unsafe_first) == {"prompt": "P", "chosen": "b", "rejected": "a"}
    assert names["safer_pair"](row | {"is_response_0_safe": True, "is_response_1_safe": True}) is None
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in ("a", "b", " ")]
    assert names["usable"]({"chosen": turns[0], "rejected": turns[1]})
    assert not names["usable"]({"chosen": turns[0], "rejected": turns[0]})
    assert not names["usable"]({"chosen": turns[0], "rejected": turns[2]})
    alpaca = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}
    assert names["retain_row"](alpaca) == {"prompt": "Add 1 and 2.", "completion": "3"}
    assert names["retain_row"](alpaca | {"input": "x"}) is None


def test_example_train_with_trainer(folder: Path) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "train_with_trainer.py"))["main"]
    main([
        "--model", "my-model", "--negatives", "negatives.jsonl", "--retain", "instructions.jsonl",
        "--output", "out", "--steps", "2",
    ])  # fmt: skip
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_example_score_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "score_only.py"))["main"]
    table = main(["--model", "my-model", "--negatives", "negatives.jsonl", "--preferences", "pairs.jsonl"])
    assert len(table.rows) == 12 and table.objective == "margin"
    printed = capsys.readouterr().out.splitlines()
    shown = [float(line.split()[0]) for line in printed[-10:]]
    assert shown == sorted(shown, reverse=True)


if __name__ == "__main__":
    target = ROOT / "docs" / "options.md"
    target.write_text(options_page(target.read_text(encoding="utf-8")), encoding="utf-8")
