"""Bad configurations from the command line: every mistake named in one line each, with exit status 2."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny import save_tiny
from u2a.cli import main
from u2a.config_file import all_options, load_config
from u2a.errors import ConfigError

from .cases import BAD_CONFIGS, BadConfig


def refused(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    """Check a configuration that must be refused; return its problems."""
    assert main(["config", str(path), *more]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("u2a config: ")
    lines = output.err.removeprefix("u2a config: ").split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() and len(line) < 500 for line in lines), lines
    return lines


def test_there_are_enough_cases() -> None:
    assert len(BAD_CONFIGS) >= 40
    assert len({case.name for case in BAD_CONFIGS}) == len(BAD_CONFIGS)


@pytest.mark.parametrize("case", BAD_CONFIGS, ids=lambda case: case.name)
def test_a_bad_configuration_is_one_clear_error(
    case: BadConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(case.yaml, encoding="utf-8")
    if case.name == "a billion laughs":  # its sections are unknown as well, and it is refused before they are read
        assert case.yaml.count("*a") == 81
    (line,) = refused(path, capsys)
    expected = str(path) + case.said[1:] if case.said.startswith("*") else case.said
    assert line.startswith(expected), line


def test_all_mistakes_of_a_file_are_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        """
seed: -1
seed: true
model: {dtype: int8, load_in_4bit: true, adapter: {enabled: false}}
unlearn: {los: npo, learning_rate: 0, max_steps: many, retain_term: kl}
partition: {forget_frac: 0.9}
solve: {objective: reward}
reward: {model: none}
data: {allow_leak: "yes", pairs: "a\\0b"}
guard:
""",
        encoding="utf-8",
    )
    lines = refused(path, capsys, "--set", "finetune.epochs=0")
    begins = [
        f"{path}:3: seed: stands twice",
        "unlearn.los: unknown option (did you mean unlearn.loss?)",
        "seed: expected something else than true or false",
        "data.allow_leak: expected one of true or false",
        "data.pairs: holds a NUL",
        "model.dtype: Input",
        "unlearn.learning_rate: Input",
        "unlearn.max_steps: Input",
        "guard: expected options below it",
        "finetune.epochs: Input",
        "partition: the five *_frac options sum to 1.55",
        "model.load_in_4bit conflicts with model.adapter",
        "unlearn.retain_term: kl conflicts",
        "solve.objective: reward conflicts",
    ]
    for begin in begins:
        assert sum(line.startswith(begin) for line in lines) == 1, (begin, lines)
    assert len(lines) == len(begins), lines


def test_a_wrong_value_makes_no_conflict_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The defaults that stand in for wrong values are not blamed."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "finetune: {enabled: true}\npartition: {finetune_frac: 2.0, forget_frac: 0.15}\n"
        "evaluation: {controls: [retrain]}\n"
    )
    (line,) = refused(path, capsys)
    assert line.startswith("partition.finetune_frac: Input should be less than or equal to 1")


def test_several_conflicts_stand_on_lines_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {dtype: float16, load_in_4bit: true, adapter: {enabled: false}}\n")
    lines = refused(path, capsys)
    assert [line.split(" conflicts")[0] for line in lines] == ["model.load_in_4bit", "model.dtype: float16"]
    assert lines[1].endswith("set float32)"), "a semicolon inside a sentence does not cut it"


@pytest.mark.parametrize("name", sorted(all_options()))
def test_every_option_refuses_a_mapping_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"{name}={{a: {{b: 1}}}}"])  # one option is a mapping itself, of plain values
    assert caught.value.problems and all(text.startswith((f"{name}: ", f"{name}.a")) for text in caught.value.problems)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "--set seed: expected section.option=value"),
        ("=3", "--set =3: expected"),
        ("seed=[1", "--set seed=[1: the value is not valid YAML"),
        ("seed=!!int ''", "the value is not valid YAML"),
        ("data={pairs: a, pairs: b}", "--set data:1: pairs: stands twice"),
        ("unlearn.loss.x=1", "unlearn.loss: Input should be"),
        ("a..b=1", "a: unknown option"),
        ("seed=~", "seed: Input should be a valid integer, got None"),
    ],
)
def test_a_bad_override_is_one_clear_error(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [text])
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


def test_a_key_may_stand_once_in_each_section_and_aliases_may_be_used(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "finetune: &rates {learning_rate: 1e-4, batch_size: 4}\nunlearn:\n  <<: *rates\n  learning_rate: 2e-4\n"
        "data: {fields: &names {prompt: q}, retain_fields: *names}\n"
    )
    config = load_config(path)
    assert (config.finetune.learning_rate, config.unlearn.learning_rate, config.unlearn.batch_size) == (1e-4, 2e-4, 4)
    assert config.data.retain_fields.prompt == "q"


def test_unreadable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\0s")
    (tmp_path / "control.yaml").write_bytes(b"seed: \x07")
    for name, said in (
        ("absent.yaml", "cannot be read"),
        (".", "cannot be read"),
        ("binary.yaml", "cannot be read"),
        ("control.yaml", "not valid YAML"),
    ):
        (line,) = refused(tmp_path / name, capsys)
        assert said in line


# --- what only shows when the run begins -------------------------------------------------------------


@pytest.fixture
def run_config(tmp_path: Path) -> Path:
    rows = [f'{{"prompt": "Q{k}?", "chosen": "yes {k}", "rejected": "no {k}"}}\n' for k in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(save_tiny(tmp_path / "model")), "device": "cpu"},
        "data": {"pairs": "pairs.jsonl"},
        "solve": {"folds": 2, "rounds": 1},
        "unlearn": {"retain_term": "none", "max_steps": 1},
        "reward": {"model": "none", "eval_model": "none"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


ABSENT_GPU = f"cuda:{torch.cuda.device_count()}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"model.device={ABSENT_GPU}", f"model.device: '{ABSENT_GPU}' is not available"),
        ("model.device=gpu", "model.device: 'gpu' is not available"),
        ("model.device=''", "model.device: '' is not available"),
        ("model=nowhere/at-all", "model.name_or_path: no tokenizer at 'nowhere/at-all'"),
        ("model=''", "model.name_or_path: not set"),
        ("model='package:'", "package:: package '' is not installed"),
        ("model=package:os.path", "package 'os.path' is not installed"),
        ("model=package:__main__", "package '__main__' is not installed"),
        ("model=package:no_such_package", "package 'no_such_package' is not installed"),
        ("model.adapter.layers=[7]", "model.adapter.layers: 7 is not a layer of the model (0 to 1)"),
        ("data.pairs=nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        ("data.retain=~nobody-of-this-name/r.jsonl", "cannot be read"),
        ("data.retain='hub:../x'", "hub:../x: not a dataset name"),
        ("solve.n_selected=999", "solve.n_selected: 999 is more than the"),
        ("output_dir=/dev/null/run", "/dev/null"),
    ],
)
def test_a_run_that_cannot_start_loads_no_weights(
    override: str,
    said: str,
    run_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(import_module("transformers").AutoModelForCausalLM, "from_pretrained", never)
    assert main(["run", str(run_config), "--quiet", "--set", override]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1 and message.startswith("u2a run: ")


def test_a_home_that_does_not_exist_is_no_crash(run_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load(run_config.read_text())
    tree["data"]["retain"] = "~nobody-of-this-name/r.jsonl"
    run_config.write_text(yaml.safe_dump(tree))
    assert main(["partition", str(run_config), "--quiet"]) == 2
    assert re.search(r"nobody-of-this-name/r\.jsonl: cannot be read", capsys.readouterr().err)


# --- fuzzing: any text at all is a configuration or a ConfigError -----------------------------------

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.sampled_from([*all_options(), "unlearn", "model", "data.pairs.x", "x", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=4,
)


def problems_of(path: Path) -> list[str] | None:
    """Problems of a refused configuration, or None for a valid one; any other exception passes."""
    try:
        load_config(path)
    except ConfigError as error:
        return error.problems
    return None


@FUZZ
@given(st.text(max_size=60) | st.text("{}[]:,&*!|>-# \n'\"ab1", max_size=60))
def test_any_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8", errors="replace")
    problems = problems_of(tmp_path / "a.yaml")
    assert problems is None or problems
    assert all(problem.isprintable() for problem in problems or ())


@FUZZ
@given(st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=5))
def test_any_values(tmp_path: Path, options: list[tuple[str, object]]) -> None:
    tree: dict = {}
    for name, value in options:
        section, _, rest = name.partition(".")
        if rest:
            held = tree.setdefault(section, {})
            if isinstance(held, dict):
                held[rest] = value
        else:
            tree[section] = value
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    problems = problems_of(tmp_path / "a.yaml")
    assert problems is None or problems
    assert all(problem.isprintable() for problem in problems or ())
