"""The protocol's file and its hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from small_experiment import write_experiment

from u2a.errors import ConfigError, RecordError
from u2a.experiment.estimates import BY_SEED, PROMPT_METRICS
from u2a.experiment.frozen import fix, frozen, protocol_hash
from u2a.experiment.protocol import check_held_out, load_protocol, task_config
from u2a.experiment.protocol_sections import MetricName
from u2a.experiment.runner import Options, run_experiment

ARMS = {
    "a": {"method": "random_k"},
    "b": {
        "method": "full",
        "set": ["unlearn.npo_beta=0.2"],
        "trials": [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}],
    },
}


def changed(path: Path, change) -> Path:
    tree = yaml.safe_load(path.read_text())
    change(tree)
    other = path.with_name("other.yaml")
    other.write_text(yaml.safe_dump(tree, sort_keys=False))
    return other


def test_the_hash_is_that_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first, second = (write_experiment(tmp_path / name, ARMS) for name in ("one", "two"))
    assert protocol_hash(load_protocol(first)) == protocol_hash(load_protocol(second))
    text = first.read_text()
    first.write_text("# a comment\n" + text)
    assert protocol_hash(load_protocol(first)) == protocol_hash(load_protocol(second))


def set_in(*keys: str, value: object):
    def change(tree: dict) -> None:
        for key in keys[:-1]:
            tree = tree.setdefault(key, {})
        tree[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_in("seeds", value=[0, 1]),
        set_in("arms", "a", "method", value="full"),
        set_in("arms", "a", "set", value=["solve.n_selected=3"]),
        set_in("arms", "b", "trials", value=[{"npo_beta": 1.0}, {"npo_beta": 3.0}]),
        set_in("budgets", "levels", value=[0.5, 1.0, 2.0]),
        set_in("measure", "max_new_tokens", value=4),
        set_in("tuning", "dev_frac", value=0.4),
        set_in("tasks", "tiny", "set", value=["data.max_length=100"]),
        set_in("families", value={"f": {"contrasts": [["a", "b"]]}}),
        set_in("margins", value={"reward": 0.1}),
        set_in("tasks", "tiny", "seeds", value=1),
        set_in("arms", "a", "up_to", value=0.5),
        set_in("arms", "b", "tuned_by", value="reward"),
        set_in("statements", value={"s": {"rule": "cheaper", "arms": ["a", "b"], "spent": "cpu_seconds"}}),
    ],
)
def test_everything_that_decides_a_number_or_a_test_changes_the_hash(tmp_path: Path, change) -> None:
    path = write_experiment(tmp_path, ARMS)
    assert protocol_hash(load_protocol(path)) != protocol_hash(load_protocol(changed(path, change)))


MODEL = ("model/model.safetensors", "model/tokenizer.model", "model/a.jinja")


@pytest.mark.parametrize("name", ["pairs.jsonl", "retain.jsonl", "task.yaml", *MODEL])
def test_the_content_of_files_changes_the_hash(tmp_path: Path, name: str) -> None:
    path = write_experiment(tmp_path, ARMS)
    if not (tmp_path / name).exists():
        (tmp_path / name).write_text("some content")
    before = protocol_hash(load_protocol(path))
    file = tmp_path / name
    if name == "task.yaml":
        file.write_text(file.read_text().replace("warmup_steps: 1", "warmup_steps: 2"))
    else:
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 1
        file.write_bytes(raw)
    assert protocol_hash(load_protocol(path)) != before


def test_young_options_at_their_defaults_change_no_hash_of_a_kept_protocol(tmp_path: Path) -> None:
    statements = set_in("statements", value={"s": {"rule": "cheaper", "arms": ["a", "b"]}})
    document = frozen(load_protocol(changed(write_experiment(tmp_path, ARMS), statements))).document
    assert not {"up_to", "tuned_by"} & set(document["arms"]["a"]) and "spent" not in document["statements"]["s"]
    assert "trials" in document["arms"]["a"] and "at_most" in document["statements"]["s"]


def test_a_place_for_results_changes_nothing(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, ARMS)
    other = changed(path, set_in("output_dir", value=str(tmp_path / "elsewhere")))
    assert protocol_hash(load_protocol(path)) == protocol_hash(load_protocol(other))


def test_a_changed_protocol_is_refused_until_it_is_asked_for(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, ARMS)
    first = fix(load_protocol(path))
    assert fix(load_protocol(path)) == first
    other = load_protocol(changed(path, set_in("seeds", value=[0, 1])))
    with pytest.raises(RecordError, match=r"seeds changed since; .*--new-protocol"):
        fix(other)
    second = fix(other, replace=True)
    assert second.hash != first.hash and fix(other) == second
    assert [(old.hash, old.n_main_cells, old.changed) for old in second.replaced] == [(first.hash, 0, ("seeds",))]
    cells = tmp_path / "out" / "cells"
    cells.mkdir()
    for name in ("tiny.a.s0.t0.k.json", "tiny.a.s1000.t0.k.json"):
        (cells / name).write_text("{}")
    third = fix(load_protocol(path), replace=True)
    assert third.hash == first.hash and [old.n_main_cells for old in third.replaced] == [0, 1]


BAD = {
    "unknown option": (set_in("seedz", value=[1]), r"seedz: unknown option \(did you mean seeds\?\)"),
    "unknown option of an arm": (set_in("arms", "a", "metod", value="x"), r"arms.a.metod: unknown.*method"),
    "falling levels": (set_in("budgets", "levels", value=[1.0, 0.5]), "budgets.levels: .* expected rising"),
    "full outside": (set_in("budgets", "full", value=[3.0]), "budgets.full: each must be one"),
    "no such task": (set_in("arms", "a", "tasks", value=["x"]), "arms.a.tasks: 'x' is no task"),
    "shared option": (set_in("arms", "a", "set", value=["model.dtype=float16"]), "model.dtype is shared by all arms"),
    "unknown contrast": (set_in("families", value={"f": {"contrasts": [["a", "z"]]}}), "families.f: 'z' is no arm"),
    "unknown task of a family": (set_in("families", value={"f": {"tasks": ["z"]}}), "families.f.tasks: 'z' is no task"),
    "tuned nowhere": (
        set_in("tasks", "tiny", "tuned_on", value="z"),
        "tasks.tiny.tuned_on: 'z' is no task that is tuned",
    ),
    "tuned on itself": (set_in("tasks", "tiny", "tuned_on", value="tiny"), "'tiny' is no task that is tuned itself"),
    "seed of both": (set_in("tuning", value={"seeds": [0], "level": 1.0}), "not in tuning.seeds"),
    "wrong type": (set_in("measure", "prompts", value="many"), "measure.prompts: .*got 'many'"),
    "up to no level": (set_in("arms", "a", "up_to", value=0.7), "arms.a.up_to: 0.7 is none of budgets.levels"),
    "reward of no answers": (
        lambda tree: (
            tree["budgets"].update(full=[0.5])
            or tree.update(statements={"s": {"rule": "cheaper", "arms": ["a", "b"], "metric": "reward"}})
        ),
        "statements.s: the last level of arm b is not in budgets.full",
    ),
    "margin of no scaled change": (
        lambda tree: (
            tree["budgets"].update(full=[0.5])
            or tree.update(
                statements={
                    "s": {"rule": "cheaper", "arms": ["a", "b"], "metric": "preference_margin_at_equal_ppl"},
                }
            )
        ),
        "statements.s: the last level of arm b is not in budgets.full",
    ),
    "no such metric": (set_in("families", value={"f": {"metric": "rewrd"}}), "families.f.metric: .*got 'rewrd'"),
    "family of no answers": (
        lambda tree: (
            tree["budgets"].update(full=[0.5]) or tree.update(families={"f": {"metric": "refusal_rate", "level": 1.0}})
        ),
        "families.f.level: refusal_rate is measured at budgets.full alone",
    ),
    "no budget of utility": (
        lambda tree: (
            tree.setdefault("measure", {}).update(equal_ppl_frac=None)
            or tree.update(families={"f": {"metric": "reward_at_equal_ppl"}})
        ),
        "families.f.metric: reward_at_equal_ppl needs measure.equal_ppl_frac",
    ),
    "tuned beyond": (set_in("arms", "b", "up_to", value=0.5), "arms.b.up_to: 0.5 is below tuning.level"),
    "tested beyond": (
        lambda tree: tree["arms"]["a"].update(up_to=0.5) or tree.update(families={"f": {"contrasts": [["a", "b"]]}}),
        "families.f.level: 1 is more than arm a is run up to",
    ),
    "name": (set_in("arms", "a/b", value={"method": "full"}), "made of letters"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_protocols_say_what_is_wrong(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    path = write_experiment(tmp_path, ARMS)
    with pytest.raises(ConfigError, match=message):
        load_protocol(changed(path, change))


def test_every_metric_of_an_experiment_can_be_declared() -> None:
    names = TypeAdapter(MetricName).json_schema()["enum"]
    assert sorted(names) == sorted([*PROMPT_METRICS, *BY_SEED])


def test_seeds_that_would_measure_other_prompts_are_refused_before_any_cell(tmp_path: Path) -> None:
    single = load_protocol(write_experiment(tmp_path, ARMS))
    check_held_out(single)
    several = changed(tmp_path / "protocol.yaml", set_in("seeds", value=[0, 1]))
    with pytest.raises(ConfigError, match="tasks.tiny: partition.held_out_seed is not set"):
        check_held_out(load_protocol(several))
    with pytest.raises(ConfigError, match="held_out_seed"):
        run_experiment(several, Options(quiet=True))
    assert not (tmp_path / "out").exists()
    tree = yaml.safe_load(several.read_text())
    tree["tasks"]["tiny"]["set"] = ["partition.held_out_seed=0"]
    several.write_text(yaml.safe_dump(tree))
    check_held_out(load_protocol(several))


def test_a_task_s_own_seeds_are_part_of_the_protocol(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, ARMS, seeds=[0, 1])
    first = fix(load_protocol(path))
    assert first.document["task_plans"] == {}
    other = load_protocol(changed(path, set_in("tasks", "tiny", "seeds", value=1)))
    with pytest.raises(RecordError, match="task_plans changed since"):
        fix(other)
    file = tmp_path / "out" / "protocol.json"
    kept = {part: content for part, content in first.document.items() if part != "task_plans"}
    first.model_copy(update={"document": kept}).save(file)  # as it was written before there was the part
    assert fix(other).replaced == () and fix(other).document["task_plans"] == {"tiny": {"seeds": 1}}
    with pytest.raises(RecordError, match="task_plans changed since"):
        fix(load_protocol(path))


def test_a_wrong_option_of_a_task_names_task_and_arm(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, {"a": {"method": "full", "set": ["unlearn.lerning_rate=1"]}})
    protocol = load_protocol(path)
    task_config(protocol, "tiny", 0)
    with pytest.raises(ConfigError, match=r"tasks.tiny, arms.a: unlearn.lerning_rate: unknown.*learning_rate"):
        task_config(protocol, "tiny", 0, "a")
