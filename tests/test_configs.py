"""The configuration files that come with the project: valid, free of machine paths, and what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from u2a.cli import main
from u2a.config_file import load_config
from u2a.experiment.methods import METHODS
from u2a.experiment.protocol import load_protocol, task_config

FOLDER = Path(__file__).parents[1] / "configs"
PROTOCOLS = sorted(FOLDER.glob("experiment-*.yaml"))
FILES = sorted(set(FOLDER.glob("*.yaml")) - set(PROTOCOLS))
TASKS = sorted((FOLDER / "experiment").glob("*.yaml"))
MODELS = {
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-14b-instruct": "Qwen/Qwen2.5-14B-Instruct",
}
DATA = ("saferlhf", "ultrafeedback", "halueval")


def test_every_model_of_the_paper_meets_every_data_set() -> None:
    wanted = {f"{model}-{data}" for model in MODELS for data in DATA} | {
        "saferlhf-smollm2",
        "saferlhf-evaluation-smollm2",
    }
    assert {path.stem for path in FILES} == wanted


@pytest.mark.parametrize("path", [*FILES, *TASKS], ids=lambda path: path.stem)
def test_a_config_is_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(path)]) == 0
    assert capsys.readouterr().out == "the configuration is valid\n"


@pytest.mark.parametrize("path", [*FILES, *PROTOCOLS, *TASKS], ids=lambda path: path.stem)
def test_a_config_names_no_place_on_a_machine(path: Path) -> None:
    def leaves(tree: object) -> list[object]:
        parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
        return [tree] if parts is None else [leaf for part in parts for leaf in leaves(part)]

    values = [value for value in leaves(yaml.safe_load(path.read_text())) if isinstance(value, str)]
    assert [value for value in values if value.startswith(("/", "~", "\\")) or "../" in value] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_writes_into_a_directory_of_its_own_name(path: Path) -> None:
    assert load_config(path).output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_starts_misaligned_and_has_the_random_control(path: Path) -> None:
    config = load_config(path)
    assert config.finetune.enabled and config.finetune.include_forget and config.finetune.unsafe_frac == 0.7
    assert "random_k" in config.evaluation.controls


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_every_task_of_an_experiment_starts_misaligned(path: Path) -> None:
    config = load_config(path)
    assert config.finetune.enabled and config.finetune.include_forget and config.finetune.unsafe_frac == 0.7
    assert config.reward.model != "implicit" and config.reward.eval_model != "none"


def test_the_protocols_of_the_experiments_name_methods_and_tasks_that_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("U2A_DATA", str(tmp_path))
    names = (
        "main",
        "tasks",
        "bases",
        "pairs",
        "policy-gradients",
        "openings",
        "ablation",
        "third",
        "threshold",
        "smoke",
    )
    assert {path.stem for path in PROTOCOLS} == {f"experiment-{name}" for name in names}
    for path in PROTOCOLS:
        protocol = load_protocol(path)
        assert protocol.output_dir.startswith(f"runs/{path.stem}")
        for name, arm in protocol.arms.items():
            assert arm.method in METHODS
            for task in protocol.tasks_of(name):
                task_config(protocol, task, 0, name)
    smoke, main_table = (load_protocol(FOLDER / f"experiment-{name}.yaml") for name in ("smoke", "main"))
    assert {arm.method for arm in smoke.arms.values()} == set(METHODS), "the smoke run has every method"
    assert len(smoke.seeds) == 2 and len(main_table.seeds) >= 6
    assert main_table.families["reward"].contrasts[0] == ("u2a_npo", "random_k")


@pytest.mark.parametrize("stem", [f"{model}-{data}" for model in MODELS for data in DATA])
def test_a_paper_config_uses_the_model_of_its_name_and_two_different_reward_models(stem: str) -> None:
    config = load_config(FOLDER / f"{stem}.yaml")
    assert config.model.name_or_path == MODELS[stem.rsplit("-", 1)[0]]
    assert (config.model.dtype, config.solve.adjoint, config.solve.scorer) == ("bfloat16", "implicit", "auto")
    assert config.reward.model == config.reward.eval_model == "sequence_classification"
    assert config.reward.name_or_path != config.reward.eval_name_or_path, "the judge must not be the selector"


@pytest.mark.parametrize("loss", ["ga", "grad_diff", "npo"])
def test_the_small_config_runs_all_three_losses_and_leaves_the_files_to_the_user(loss: str) -> None:
    term = "proximal" if loss == "ga" else "nll"
    overrides = [f"unlearn.loss={loss}", f"unlearn.retain_term={term}"]
    config = load_config(FOLDER / "saferlhf-smollm2.yaml", overrides)
    assert config.unlearn.loss == loss
    assert config.data.pairs is None and config.data.retain is None
