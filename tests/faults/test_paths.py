"""Names that would lead out of the run's directory: refused, or confined to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
import yaml

from tiny import save_tiny, tiny_tokenizer
from u2a.cli import main
from u2a.config_file import load_config
from u2a.errors import ConfigError, DataError, RecordError
from u2a.progress import Console
from u2a.record import write_whole
from u2a.report import _environment
from u2a.rows import read_rows
from u2a.stage_store import StageStore

from .cases import TRAVERSAL


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- names in a configuration ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TRAVERSAL if "/" in name or "\0" in name])
def test_the_name_of_a_prompt_set_is_no_path(name: str, tmp_path: Path) -> None:
    sets = [{"name": name, "path": "a.jsonl"}]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"evaluation": {"prompt_sets": sets}}))
    with pytest.raises(ConfigError, match=r"evaluation\.prompt_sets"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", TRAVERSAL)
def test_the_name_of_a_control_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.controls\[0\]: Input should be 'base'"):
        load_config(None, [f"evaluation.controls={json.dumps([name.replace(chr(0), 'x')])}"])


@pytest.mark.parametrize("name", [*TRAVERSAL, ".hidden/x", "a/b/c", "a//b", "o/..", "/o/n", "o/n/../../x", ""])
def test_a_name_on_the_hub_is_owner_and_name_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it was looked for"))
    with pytest.raises(DataError) as caught:
        read_rows(f"hub:{name}")
    (problem,) = caught.value.problems
    assert "not a dataset name (expected hub:OWNER/NAME" in problem and problem.isprintable()


def test_a_data_file_with_a_name_no_system_has_is_no_crash(tmp_path: Path) -> None:
    for name in ("a\0b.jsonl", "x" * 5000 + ".jsonl", str(tmp_path / "\udcff.jsonl")):
        with pytest.raises(DataError) as caught:
            read_rows(name)
        (problem,) = caught.value.problems
        assert "cannot be read" in problem and problem.isprintable()


def test_a_file_whose_name_is_no_text_is_read_and_its_rows_can_be_saved(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.jsonl"))
    path.write_text('{"prompt": "a"}\n')
    (row,) = read_rows(path)
    assert row.where == f"{tmp_path}/\\udcff\\n.jsonl:1"
    write_whole(tmp_path / "record", row.where)


# --- the run's directory -------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A configuration of a run whose partition needs no model."""
    monkeypatch.setattr("u2a.pipeline.load_tokenizer", lambda _: tiny_tokenizer())
    rows = [f'{{"prompt": "Q{k}?", "chosen": "yes {k}", "rejected": "no {k}"}}\n' for k in range(40)]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "pairs.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path / "work")

    def make(output_dir: str) -> Path:
        tree = {
            "output_dir": output_dir,
            "model": {"name_or_path": "none", "device": "cpu"},
            "data": {"pairs": "pairs.jsonl"},
            "solve": {"folds": 2},
            "unlearn": {"retain_term": "none"},
            "reward": {"model": "none", "eval_model": "none"},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True))
        tree["data"]["pairs"] = str(tmp_path / "work" / "pairs.jsonl")
        path.write_text(yaml.safe_dump(tree, allow_unicode=True))
        return path

    return make


@pytest.mark.parametrize("output_dir", ["run", "a b/ünï ✓/run", "./run/.", "run/../run", "..run", "$HOME", "~", "a:b"])
def test_everything_a_stage_writes_lies_in_the_output_directory(
    output_dir: str, config: Callable[[str], Path], tmp_path: Path
) -> None:
    path = config(output_dir)
    before = tree_of(tmp_path)
    assert main(["partition", str(path), "--quiet"]) == 0
    new = set(tree_of(tmp_path)) - set(before)
    run = Path(os.path.normpath(tmp_path / "work" / output_dir)).relative_to(tmp_path)
    assert {f"{run}/partition.json", f"{run}/run.yaml"} <= new
    assert all(name.startswith(f"{run}/") for name in new), new
    assert {name: tree_of(tmp_path)[name] for name in before} == before


@pytest.mark.parametrize("output_dir", ["", " ", "a\0b", "pairs.jsonl", "pairs.jsonl/run", "/dev/null/run", "x" * 300])
def test_an_output_directory_that_cannot_be_is_refused(
    output_dir: str, config: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(output_dir)
    before = tree_of(tmp_path)
    assert main(["partition", str(path), "--quiet"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("u2a partition: ") and message.count("\n") == 1
    assert tree_of(tmp_path) == before


def test_records_that_are_links_are_neither_followed_nor_overwritten(
    config: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run directory of somebody else may hold links to the user's own files."""
    run = tmp_path / "work" / "run"
    run.mkdir()
    for name in ("partition.json", "run.yaml", "stages.json", "metrics.jsonl"):
        (tmp_path / f"mine {name}").write_text("{}")
        (run / name).symlink_to(tmp_path / f"mine {name}")
    assert main(["partition", str(config("run")), "--quiet"]) == 2
    assert "stages.json: a link out of its folder" in capsys.readouterr().err
    (run / "stages.json").unlink()
    assert main(["partition", str(config("run")), "--quiet"]) == 0
    (run / "stages.json").symlink_to(tmp_path / "mine stages.json")
    assert not (run / "partition.json").is_symlink() and not (run / "run.yaml").is_symlink(), "replaced, not followed"
    store = StageStore(run, Console(quiet=True))
    for use in (lambda: store.is_done("x", "k"), lambda: store.mark("x", "k", {}), lambda: store.log("event", {})):
        with pytest.raises(RecordError, match="a link out of its folder"):
            use()
    for name in ("partition.json", "run.yaml", "stages.json", "metrics.jsonl"):
        assert (tmp_path / f"mine {name}").read_text() == "{}"


@pytest.mark.parametrize("name", [*TRAVERSAL, "report.html.j2/../../cli.py"])
def test_assets_are_found_by_name_inside_the_package_only(name: str) -> None:
    with pytest.raises(jinja2.TemplateNotFound):
        _environment().get_template(name)


@pytest.mark.parametrize("arm", TRAVERSAL)
def test_an_arm_of_the_comparison_is_no_path(arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fake_records import fake_evaluation, fake_partition

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text("seed: 1\n")
        fake_partition(4).save(tmp_path / name / "partition.json")
        fake_evaluation().save(tmp_path / name / "evaluation.json")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--arm", arm]) == 2
    message = capsys.readouterr().err
    assert "no arm" in message and "there are before, after, random_k" in message


def test_a_model_directory_is_read_where_it_lies(tmp_path: Path, config: Callable[[str], Path]) -> None:
    """Loading writes nothing beside a model."""
    from u2a.config import ModelSection
    from u2a.model_loading import load_model, load_tokenizer

    save_tiny(tmp_path / "model")
    before = tree_of(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path / "model"), device="cpu")
    load_tokenizer(section)
    load_model(section)
    assert tree_of(tmp_path) == before
