from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_origin

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from u2a.config import PRESETS, PartitionSection, RunConfig, UnlearnSection
from u2a.config_file import all_options, describe_range, load_config, print_options
from u2a.errors import ConfigError

PARTS = ("finetune_frac", "forget_frac", "preference_frac", "reward_frac", "evaluation_frac")


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, list(overrides))
    return caught.value.problems


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_need_no_file() -> None:
    assert load_config(None) == RunConfig()


def test_defaults_then_preset_then_file_then_overrides(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "unlearn: {retain_weight: 0.5, max_steps: 7}\nseed: 3\n")
    config = load_config(path, ["unlearn.max_steps=9"], preset="paper")
    assert config.unlearn.loss == "ga"  # preset
    assert config.unlearn.retain_weight == 0.5  # file over preset
    assert config.unlearn.max_steps == 9  # override over file
    assert config.unlearn.batch_size == UnlearnSection().batch_size  # default
    assert config.seed == 3


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    config = load_config(None, preset=name)
    for section, options in PRESETS[name].items():
        for key, value in options.items():
            assert getattr(getattr(config, section), key) == value


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown preset .expected one of: paper"):
        load_config(None, preset="papr")


@pytest.mark.parametrize(
    ("given_", "nearest"),
    [
        ("unlearn.los", "unlearn.loss"),
        ("unlearn.learningrate", "unlearn.learning_rate"),
        ("unlern.loss", "unlearn"),
        ("max_steps", "unlearn.max_steps"),
        ("solve.lerning_rate", "unlearn.learning_rate"),
        ("sed", "seed"),
        ("model.adaptr.r", "model.adapter.r"),
    ],
)
def test_an_unknown_option_names_the_nearest(given_: str, nearest: str) -> None:
    (problem,) = problems(f"{given_}=1")
    assert "unknown option" in problem
    assert f"(did you mean {nearest}?)" in problem


def test_an_option_like_no_other_points_to_the_list() -> None:
    assert problems("qqqqq=1") == ["qqqqq: unknown option (u2a config --print lists them)"]


@pytest.mark.parametrize("change", ["data.fields.rejected=prompt", "data.retain_fields.completion=prompt"])
def test_two_fields_of_one_column_are_refused(change: str) -> None:
    (problem,) = problems(change)
    assert "are not distinct columns" in problem


OUT_OF_RANGE = {
    "unlearn.npo_beta": [0, -1, ".nan", ".inf"],
    "unlearn.max_steps": [0, 1.5, "many"],
    "unlearn.learning_rate": [0],
    "unlearn.retain_weight": [-0.1],
    "unlearn.loss": ["dpo"],
    "unlearn.warmup_ratio": [1.1],
    "guard.ppl_budget_frac": [-0.1],
    "partition.forget_frac": [1.2],
    "solve.folds": [0, 65],
    "solve.damping": [-1, "some"],
    "solve.reward_samples": [1],
    "solve.heldout_frac": [1.0],
    "seed": [-1, "null"],
    "evaluation.bootstrap": [99],
    "evaluation.controls": ["[bogus]", "random_k"],
    "model.dtype": ["int8"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    assert any(name.split(".")[-1] in problem or name in problem for problem in problems(f"{name}={value}"))


@pytest.mark.parametrize(
    "text", ["seed=true", "unlearn.learning_rate=yes", "data.allow_leak=1", "guard.line_search=0.0"]
)
def test_truth_values_and_numbers_are_not_exchanged(text: str) -> None:
    assert "true or false" in problems(text)[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["unlearn.loss=grad_diff", "unlearn.retain_term=none"], "grad_diff.*conflicts with retain_term"),
        (["model.load_in_4bit=true", "model.adapter.enabled=false"], "load_in_4bit conflicts with model.adapter"),
        (["model.dtype=bfloat16", "model.adapter.enabled=false"], "dtype: bfloat16 conflicts with model.adapter"),
        (["unlearn.retain_term=kl", "model.adapter.enabled=false"], "retain_term: kl conflicts with model.adapter"),
        (["solve.scorer=backward", "model.adapter.enabled=false"], "scorer: backward conflicts with model.adapter"),
        (["solve.objective=reward", "reward.model=none"], "objective: reward conflicts with reward.model: none"),
        (["evaluation.controls=[lowest_reward_k]", "reward.model=none"], "lowest_reward_k conflicts with reward.model"),
        (["evaluation.controls=[retrain]"], "retrain conflicts with finetune"),
        (["finetune.enabled=true"], "finetune.enabled: true conflicts with partition.finetune_frac: 0"),
        (["partition.forget_frac=0.5"], r"\*_frac options sum to 1.15, expected 1"),
    ],
)
def test_conflicts_name_both_options(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["partition.forget_frac=0"],
        ["partition.forget_frac=0.9"],
        ["partition.finetune_frac=0.333", "partition.reward_frac=0"],
        ["partition.forget_frac=0", "partition.preference_frac=0.07", "partition.reward_frac=0.0001"],
    ],
)
def test_the_shares_that_the_error_proposes_are_accepted_and_in_the_same_proportions(overrides: list[str]) -> None:
    given = {text.split(".")[1].split("=")[0]: float(text.split("=")[1]) for text in overrides}
    (problem,) = problems(*overrides)
    line = yaml.safe_load(re.search(r"\{.*?\}", problem).group())  # type: ignore[union-attr]
    accepted = load_config(None, [f"partition.{name}={share}" for name, share in line.items()]).partition
    asked = PartitionSection().model_dump(include=set(PARTS)) | given
    for name, share in accepted.model_dump(include=set(PARTS)).items():
        assert share == pytest.approx(asked[name] / sum(asked.values()), abs=0.011)


def test_shares_that_are_all_zero_have_no_proportions() -> None:
    assert "leave them out" in problems(*(f"partition.{name}=0" for name in PARTS))[0]


def test_every_problem_is_reported_at_once() -> None:
    found = problems("unlearn.los=npo", "unlearn.npo_beta=-1", "seed=-1", "solve.folds=true")
    assert [sum(word in problem for problem in found) for word in ("unlearn.los:", "npo_beta", "seed", "folds")] == [
        1
    ] * 4


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("unlearn.learning_rate=1e-5", "unlearn.learning_rate", 1e-5),  # YAML 1.1 alone reads text
        ("unlearn.max_steps=1e1", "unlearn.max_steps", 10),
        ("model=some/path", "model.name_or_path", "some/path"),
        ("model.name_or_path=a=b", "model.name_or_path", "a=b"),
        ("model.adapter.target_modules=[q_proj, v_proj]", "model.adapter.target_modules", ["q_proj", "v_proj"]),
        ("model.adapter.layers=null", "model.adapter.layers", None),
        ("solve.damping=auto", "solve.damping", "auto"),
        ("solve.damping=0.5", "solve.damping", 0.5),
        ("guard.line_search=false", "guard.line_search", False),
        ("data={retain: hub:a/b}", "data.retain", "hub:a/b"),
    ],
)
def test_overrides_are_read_as_yaml(text: str, name: str, value: object) -> None:
    here: object = load_config(None, [text])
    for part in name.split("."):
        here = getattr(here, part)
    assert here == value


@pytest.mark.parametrize("text", ["seed", "=3", "unlearn.max_steps=[1", "unlearn=5", "unlearn.loss.x=1", "a..b=1"])
def test_malformed_overrides_are_clear_errors(text: str) -> None:
    assert problems(text)


def test_numbers_in_scientific_notation_work_in_files_too(tmp_path: Path) -> None:
    assert load_config(yaml_file(tmp_path, "unlearn: {learning_rate: 1e-5}")).unlearn.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "holds a list"),
        ("a: [1\n", "not valid YAML"),
        ("unlearn:\n  x: 1\n", "unlearn.x: unknown option"),
    ],
)
def test_damaged_files_are_clear_errors(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(yaml_file(tmp_path, text))


def test_a_missing_or_binary_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "b.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(yaml_file(tmp_path, "\n")) == RunConfig()


def test_data_paths_are_relative_to_the_file_hub_names_stay(tmp_path: Path) -> None:
    config = load_config(yaml_file(tmp_path, "data: {pairs: d/p.jsonl, retain: hub:a/b, forget: /x/y.jsonl}"))
    assert config.data.pairs == str(tmp_path / "d" / "p.jsonl")
    assert (config.data.retain, config.data.forget) == ("hub:a/b", "/x/y.jsonl")
    assert load_config(None, ["data.pairs=p.jsonl"]).data.pairs == "p.jsonl"
    config = load_config(yaml_file(tmp_path, "robustness: {paraphrases: p.jsonl}\nmodel: {name_or_path: d}\n"))
    assert config.robustness.paraphrases == str(tmp_path / "p.jsonl")
    assert config.model.name_or_path == "d", "names of models count from the working directory"
    config = load_config(yaml_file(tmp_path, 'data: {pairs: "d/10:30.jsonl", retain: "https://a/b", forget: "a:b"}'))
    assert (config.data.pairs, config.data.forget) == (str(tmp_path / "d" / "10:30.jsonl"), str(tmp_path / "a:b"))
    assert config.data.retain == "https://a/b"


def test_run_yaml_replays_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes loads as the very same options, though it lies elsewhere and carries its provenance."""
    from u2a.artifacts import write_run_yaml

    monkeypatch.chdir(tmp_path)
    yaml_file(tmp_path, "data: {pairs: 'p:1.jsonl'}\nunlearn: {loss: ga, max_steps: 7}\nmodel: {name_or_path: m}\n")
    config = load_config("config.yaml", ["seed=9", "data.forget=n:1.jsonl", "model.adapter.layers=[0, 1]"])
    write_run_yaml(config, tmp_path / "runs" / "run.yaml", "abc")
    provenance = yaml.safe_load((tmp_path / "runs" / "run.yaml").read_text())["provenance"]
    assert provenance["data_fingerprint"] == "abc"
    assert provenance["device"] == ("cuda" if torch.cuda.is_available() else "cpu"), "the device itself, not auto"
    monkeypatch.chdir("/")
    again = load_config(tmp_path / "runs" / "run.yaml")
    assert again.data.pairs == str(tmp_path / "p:1.jsonl") and again.data.forget == str(tmp_path / "n:1.jsonl")
    assert again.model_copy(update={"data": config.data}) == config


def test_the_printed_options_are_a_valid_file_with_the_defaults(tmp_path: Path) -> None:
    assert load_config(yaml_file(tmp_path, print_options())) == RunConfig()


def test_every_option_is_printed_with_its_meaning() -> None:
    text = print_options().splitlines()
    for name, field in all_options().items():
        key = name.rsplit(".", 1)[-1]
        assert any(line.strip().startswith(f"{key}: ") and f"# {field.description}" in line for line in text), name


def test_every_bounded_option_prints_its_range() -> None:
    options = all_options()
    assert describe_range(options["unlearn.npo_beta"]) == " [> 0]"
    assert describe_range(options["partition.forget_frac"]) == " [>= 0, <= 1]"
    assert describe_range(options["unlearn.loss"]) == " [ga, grad_diff, npo]"
    assert describe_range(options["model.name_or_path"]) == ""
    for name, field in options.items():
        if get_origin(field.annotation) is Literal:
            assert describe_range(field), name


def test_configurations_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 3  # type: ignore[misc]


@given(st.integers(0, 2**40), st.floats(1e-12, 1e6), st.sampled_from(["npo", "ga"]), st.text(max_size=20))
def test_any_valid_configuration_survives_yaml(seed: int, rate: float, loss: str, text: str) -> None:
    tree = {"seed": seed, "unlearn": {"learning_rate": rate, "loss": loss}, "data": {"system_prompt": text}}
    config = RunConfig.model_validate(tree)
    assert RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
