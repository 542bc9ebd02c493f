"""Every mistake a user can make: one clear error, exit status 2, before any model is loaded, nothing written lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from u2a.cli import main
from u2a.config_file import load_config
from u2a.early_checks import check_early
from u2a.partition import partition

from .conftest import pair_rows, write_jsonl


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is loaded."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("u2a.pipeline.load_model", never)
    monkeypatch.setattr("u2a.score_files.load_model", never)


def run(config: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Run, expect status 2, and return the message."""
    assert main(["run", str(config), "--quiet", *more]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


BAD_ROWS = {
    "missing field": ({"prompt": "a?", "chosen": "yes"}, "rejected"),
    "empty answer": ({"prompt": "a?", "chosen": "yes", "rejected": " "}, "rejected"),
    "chosen = rejected": ({"prompt": "a?", "chosen": "yes", "rejected": "yes"}, "rejected"),
    "wrong type": ({"prompt": "a?", "chosen": 3, "rejected": "no"}, "chosen"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named_with_file_line_and_field(
    case: str, tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, field = BAD_ROWS[case]
    path = write_jsonl(tmp_path / "bad.jsonl", [*pair_rows(5), row])
    message = run(tiny_config(data={"pairs": str(path)}), capsys)
    assert f"bad.jsonl:6: {field}:" in message and "(" in message


def test_all_bad_rows_are_reported_at_once(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [row for row, _ in BAD_ROWS.values()])
    message = run(tiny_config(data={"pairs": str(path)}), capsys)
    assert all(f"bad.jsonl:{line}:" in message for line in (1, 2, 3, 4))


def test_unknown_option_names_the_nearest(tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    message = run(tiny_config(unlearn={"learnign_rate": 1e-3}), capsys)
    assert "unlearn.learnign_rate: unknown option" in message and "unlearn.learning_rate" in message


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("solve.n_selected=1000", "1000 is more than the"),
        ("data.pairs=nowhere.jsonl", "nowhere.jsonl"),
        ("unlearn.max_steps=0", "unlearn.max_steps"),
        ("unlearn.learning_rate=.nan", "unlearn.learning_rate"),
        ("unlearn.report_to=wandbb", "unlearn.report_to"),
        ("output_dir=/dev/null/run", "/dev/null"),
        ("model.adapter.layers=[99]", "model.adapter.layers: 99"),
        ("data.max_length=8", "leave no room for an answer"),
        ("model=''", "model.name_or_path: not set"),
    ],
)
def test_bad_option(
    override: str, fragment: str, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fragment in run(tiny_config(), capsys, "--set", override)


def test_no_preference_pairs(tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    shares = {"forget_frac": 0.5, "preference_frac": 0.0, "reward_frac": 0.2, "evaluation_frac": 0.3}
    assert "preference: no pairs" in run(tiny_config(partition=shares), capsys)


def test_a_source_of_which_nothing_is_left_is_not_called_absent(tiny_config: Callable[..., Path], capsys) -> None:
    message = run(tiny_config(partition={"max_retain_chars": 1}), capsys)
    assert "retain: no rows" in message and "left out: " in message and "retain: too long" in message


def test_model_without_chat_template(
    tiny_config: Callable[..., Path], tiny_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    message = run(tiny_config(model={"name_or_path": str(tmp_path / "plain")}), capsys)
    assert "no chat template" in message


def test_damaged_record_names_the_file_and_the_remedy(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stages.json").write_text("{")
    assert "stages.json: unreadable" in run(tiny_config(), capsys)


def test_nothing_already_written_is_lost(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "run" / "solution.json"
    kept.parent.mkdir()
    kept.write_text("mine")
    run(tiny_config(), capsys, "--set", "solve.n_selected=1000")
    assert kept.read_text() == "mine"


def test_the_remedy_against_too_few_reward_pairs_names_the_option_that_needs_them(
    tiny_config: Callable[..., Path], tiny_encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = {"model": "none", "eval_model": "embedding", "eval_name_or_path": tiny_encoder}
    path = tiny_config(reward=reward, partition={"reward_frac": 0.05, "forget_frac": 0.45})
    assert main(["run", str(path), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "reward.eval_model: reward pairs: " in said and "set reward.model: none" not in said
    (option,) = re.findall(r"or set (reward\.\w+): none\)", said)
    config = load_config(path, [f"{option}=none"])
    check_early(config, partition(config))


def test_help_and_config_need_no_model_library() -> None:
    code = "import sys, u2a.cli; u2a.cli.main(['config', '--print']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "learning_rate:" in done.stdout


def test_non_finite_loss_stops_with_status_1(
    tiny_config: Callable[..., Path], tmp_path: Path, tiny_files: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from u2a.model_loading import load_model

    def broken(section: object) -> object:
        model = load_model(section)  # type: ignore[arg-type]
        model.lm_head.weight.data[65] = float("nan")
        return model

    monkeypatch.setattr("u2a.pipeline.load_model", broken)
    assert main(["run", str(tiny_config()), "--quiet"]) == 1
    message = capsys.readouterr().err
    assert "non-finite" in message and "phase" in message
    assert json.loads((tmp_path / "run" / "partition.json").read_text())["record"] == "Partition"
