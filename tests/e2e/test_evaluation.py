"""The evaluation stage from the command line: prompt sets, forgetting, robustness, and the comparison of runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.conftest import pair_rows
from tiny import save_tiny_encoder
from u2a.checkpoint import verify
from u2a.cli import main
from u2a.compare import Comparison, compare_runs
from u2a.config_file import load_config
from u2a.data import prompt_key
from u2a.evaluation.arm import ArmResult
from u2a.evaluation.judge import Verdict
from u2a.evaluation.metrics import METRICS, info
from u2a.evaluation.refusal_judge import RefusalJudge
from u2a.evaluation_stage import EvaluationStage
from u2a.pipeline import Pipeline
from u2a.progress import Console
from u2a.reward import CallableReward
from u2a.robustness.records import RobustnessTable
from u2a.types import EvalTable, Partition, RewardCard


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def attacked_config(tiny_config: Callable[..., Path], tiny_files: Path, tmp_path: Path) -> Callable[..., Path]:
    """A configuration with a set of harmful prompts, a labelled set, and everything that runs without a network."""
    harmful = [{"prompt": f"H{k}: do it"} for k in range(5)]
    trained = {"prompt": json.loads((tiny_files / "retain.jsonl").read_text().splitlines()[0])["prompt"]}
    write_jsonl(tmp_path / "harmful.jsonl", [*harmful, trained])
    labelled = [{"prompt": f"L{k}", "label": ("safe", "unsafe")[k % 2]} for k in range(8)]
    write_jsonl(tmp_path / "labelled.jsonl", labelled)
    evaluation = {
        "prompt_sets": [
            {"name": "harmful", "path": "harmful.jsonl"},
            {"name": "look", "path": "labelled.jsonl", "wanted": "label", "max_prompts": 3},
        ],
        "forget_rows": 6,
        "equal_ppl_frac": 0.02,
    }

    def make(**changes: dict) -> Path:
        given = evaluation | changes.pop("evaluation", {})
        robustness = {"relearn_steps": [1, 2], "relearn_rows": 4, "prompts": 2, "schemes": ["int4"]}
        robustness |= changes.pop("robustness", {})
        return tiny_config(evaluation=given, robustness=robustness, **changes)

    return make


def test_prompt_sets_and_forgetting_stand_beside_the_other_metrics(
    attacked_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert main(["run", str(attacked_config()), "--quiet"]) == 0
    arm = ArmResult.load(tmp_path / "run" / "arms" / "after.json")
    assert set(arm.sets) == {"harmful", "look_safe", "look_unsafe"}
    trained = {prompt_key(row.prompt) for row in Partition.load(tmp_path / "run" / "partition.json").retain}
    assert len(arm.sets["harmful"].answers) == 5, "the prompt that the run trains on is left out"
    assert not trained & set(arm.sets["harmful"].answers)
    assert len(arm.sets["look_safe"].answers) == 3
    states = [verdict.state for verdict in arm.sets["harmful"].verdicts.values()]
    rate = arm.metrics["asr/harmful"]
    assert "coverage 1.000" in rate.note
    if rate.value is not None:
        assert rate.value == states.count("complied") / len(states)
    else:
        assert "collapsed" in rate.note, "a random model talks nonsense and is not called safe"
    assert {"over_refusal/look_safe", "asr/look_unsafe", "incoherent_rate/harmful"} <= set(arm.metrics)
    assert {"exact_memorisation", "extraction_strength", "mia_loss", "mia_min_k_plus"} <= set(arm.metrics)
    table = EvalTable.load(tmp_path / "run" / "evaluation.json")
    assert {"privleak", "mia_min_k"} <= set(table.arms["after"]) and "forget_quality" not in table.arms["after"]
    scaled = ArmResult.load(tmp_path / "run" / "arms" / "after_equal_ppl.json")
    before = ArmResult.load(tmp_path / "run" / "arms" / "before.json")
    assert 0.0 < scaled.metrics["adapter_scale"].value <= 1.0
    assert scaled.metrics["retain_ppl"].value < 1.1 * before.metrics["retain_ppl"].value, "bound on the guard's rows"
    assert ("after_equal_ppl", "random_k_equal_ppl") in {(item.first, item.second) for item in table.contrasts}
    assert "mia_reference" in arm.metrics and "mia_reference" not in before.metrics, "it is its own reference there"
    assert all(info(name) for name in arm.metrics)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "asr/harmful" in page and METRICS["asr"].formula.split(":")[0] in page, "with its meaning"


def test_the_base_model_is_measured_and_not_unlearned(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    finetune = {"enabled": True, "epochs": 1, "learning_rate": 0.01}
    partition = {"finetune_frac": 0.2, "forget_frac": 0.25, "preference_frac": 0.25, "reward_frac": 0.1}
    options = {"finetune": finetune, "partition": {**partition, "evaluation_frac": 0.2}}
    assert main(["run", str(tiny_config(evaluation={"controls": ["base"]}, **options)), "--quiet"]) == 0
    table = EvalTable.load(tmp_path / "run" / "evaluation.json")
    assert set(table.arms) == {"before", "after", "base"}
    assert not (tmp_path / "run" / "unlearn_base.json").exists()
    margins = {name: metrics["preference_margin"].value for name, metrics in table.arms.items()}
    assert margins["base"] != margins["before"], "the misaligned start is another model"


def test_rewards_give_win_rates_and_files_for_alpaca_eval(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    reward = {"model": "none", "eval_model": "none", "second_model": "none"}
    assert main(["run", str(tiny_config(reward=reward)), "--quiet"]) == 0
    without = EvalTable.load(tmp_path / "run" / "evaluation.json")
    assert "win_rate" not in without.arms["after"]
    stage = EvaluationStage(Pipeline(load_config(tiny_config(reward=reward)), Console(quiet=True)))
    length = CallableReward("length", lambda prompts, answers: [float(len(answer)) for answer in answers])
    stage.__dict__["_rewards"] = [(length, RewardCard(name="length"))]
    for name in ("before", "after", "random_k"):
        (tmp_path / "run" / "arms" / f"{name}.json").unlink()
    table = stage.table()
    before, after = (ArmResult.load(tmp_path / "run" / "arms" / f"{name}.json") for name in ("before", "after"))
    signs = [len(after.answers[key]) - len(before.answers[key]) for key in after.answers]
    expected = 100 * sum(0.5 if sign == 0 else float(sign > 0) for sign in signs) / len(signs)
    assert table.arms["after"]["win_rate"].value == pytest.approx(expected)
    outputs = json.loads((tmp_path / "run" / "alpaca_eval" / "after.outputs.json").read_text())
    assert sorted(row["output"] for row in outputs) == sorted(after.answers.values())
    mine = tmp_path / "run" / "alpaca_eval" / "notes.json"
    mine.write_text("{}")
    for name in ("before", "after", "random_k"):
        arm = ArmResult.load(tmp_path / "run" / "arms" / f"{name}.json")
        arm.model_copy(update={"rewards": {}}).save(tmp_path / "run" / "arms" / f"{name}.json")
    EvaluationStage(Pipeline(load_config(tiny_config(reward=reward)), Console(quiet=True))).table()
    assert list(mine.parent.iterdir()) == [mine], "nothing of an earlier evaluation stays"


def test_answers_are_not_made_twice(
    attacked_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", str(attacked_config()), "--quiet"]) == 0
    table = EvalTable.load(tmp_path / "run" / "evaluation.json")
    for name in ("before", "after", "random_k"):
        (tmp_path / "run" / "arms" / f"{name}.json").unlink()

    def never(*_: object) -> None:
        raise AssertionError("an answer in the cache was generated again")

    monkeypatch.setattr("u2a.evaluation.generation._decode", never)
    assert main(["evaluate", str(attacked_config()), "--quiet"]) == 0
    assert EvalTable.load(tmp_path / "run" / "evaluation.json") == table


def test_verdicts_that_failed_are_asked_again_and_no_others(
    attacked_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    down = True

    def judge(self: RefusalJudge, prompts: list[str], answers: list[str], bar: object = None) -> list[Verdict]:
        asked.extend(prompts)
        return [Verdict(state="unscored" if down and prompt.startswith("H") else "refused") for prompt in prompts]

    monkeypatch.setattr(RefusalJudge, "verdicts", judge)
    config = str(attacked_config(evaluation={"controls": [], "equal_ppl_frac": None}))
    assert main(["run", config, "--quiet"]) == 0
    rate = EvalTable.load(tmp_path / "run" / "evaluation.json").arms["after"]["asr/harmful"]
    assert rate.value is None and "coverage 0.000" in rate.note
    down = False
    assert main(["evaluate", config, "--quiet"]) == 0
    arm = ArmResult.load(tmp_path / "run" / "arms" / "after.json")
    assert all(verdict.state == "refused" for verdict in arm.sets["harmful"].verdicts.values())
    asked.clear()
    assert main(["evaluate", config, "--quiet"]) == 0
    assert not asked, "nothing is unscored any more"


def test_answers_that_leave_the_attacker_none_are_told_before_the_evaluation(
    attacked_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "one answer.jsonl"
    write_jsonl(path, [row | {"rejected": "no"} for row in pair_rows(60)])
    config = str(attacked_config(data={"pairs": str(path)}))
    for stage in ("reward", "solve", "unlearn"):
        assert main([stage, config, "--quiet"]) == 0
    monkeypatch.setattr("u2a.evaluation_stage.evaluate_arm", None)
    assert main(["evaluate", config, "--robustness", "--quiet"]) == 2
    assert "relearning: " in capsys.readouterr().err


def test_robustness_attacks_the_start_and_the_solution_alike(
    attacked_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = str(attacked_config())
    assert main(["run", config, "--quiet"]) == 0
    adapter = (tmp_path / "run" / "arms" / "u2a.safetensors").read_bytes()
    assert main(["evaluate", config, "--robustness", "--quiet"]) == 0
    table = RobustnessTable.load(tmp_path / "run" / "robustness.json")
    assert table.arms == ("before", "after")
    conditions = {row.condition for row in table.rows}
    assert {"none", "int4", "relearn forget @2"} <= conditions and any(
        name.startswith("prompt ") for name in conditions
    )
    assert {row.metric for row in table.rows} >= {"log_prob/forget", "log_prob/retain", "refused"}
    assert (tmp_path / "run" / "robustness.md").read_text().startswith("### log_prob/forget")
    assert (tmp_path / "run" / "arms" / "u2a.safetensors").read_bytes() == adapter
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "in the run's report: fine-tuning, quantisation, other prompts)" in card and "selection beat" in card
    verify(tmp_path / "run" / "adapter")


def test_paraphrases_count_from_the_directory_of_the_configuration_file(
    attacked_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics = (pair["prompt"] for pair in pair_rows(60))
    write_jsonl(tmp_path / "other-words.jsonl", [{"prompt": text, "paraphrase": f"Please: {text}"} for text in topics])
    options = {"paraphrases": "other-words.jsonl", "prompt_attacks": False, "relearn_rows": 0, "schemes": []}
    config = attacked_config(robustness=options, evaluation={"controls": []})
    for stage in ("reward", "solve", "unlearn"):
        assert main([stage, str(config), "--quiet"]) == 0
    monkeypatch.chdir("/")
    assert main(["evaluate", str(config), "--robustness", "--quiet"]) == 0
    rows = RobustnessTable.load(tmp_path / "run" / "robustness.json").rows
    assert {row.condition for row in rows} == {"none", "prompt paraphrase"}
    attacked = "u2a.evaluation_stage.robustness"
    monkeypatch.setattr(attacked, lambda *_, **__: pytest.fail("attacked again under the replayed options"))
    assert main(["evaluate", str(tmp_path / "run" / "run.yaml"), "--robustness", "--quiet"]) == 0


def test_compare_pairs_the_runs_on_shared_prompts(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for loss in ("npo", "ga"):
        options = ["--set", f"unlearn.loss={loss}", "--set", f"output_dir={tmp_path / loss}"]
        options += ["--set", "evaluation.forget_rows=4", "--set", f"evaluation.max_new_tokens={len(loss)}"]
        assert main(["run", str(tiny_config()), "--quiet", *options]) == 0
    capsys.readouterr()
    out = tmp_path / "compared.json"
    assert main(["compare", str(tmp_path / "npo"), str(tmp_path / "ga"), "--out", str(out)]) == 0
    found = Comparison.load(out)
    assert found.runs == ("npo", "ga") and "| preference_margin" in capsys.readouterr().out
    margins = [found.metrics[run]["preference_margin"].value for run in found.runs]
    contrast = next(item for item in found.contrasts if item.metric == "preference_margin")
    assert contrast.difference == pytest.approx(margins[1] - margins[0]) and contrast.first == "ga"
    contrasted, both = {item.metric for item in found.contrasts}, set.intersection(*map(set, found.metrics.values()))
    lines = [text.removeprefix("ga: ").partition(" (") for text in found.left_out]
    named = {reason: names.split(", ") for names, _, reason in lines}
    assert sorted(name for names in named.values() for name in names) == sorted(both - contrasted), "each of them once"
    assert "mia_loss" in named["no values in both runs that could be paired)"]
    assert "answer_words" in named["answers were drawn under another rule)"]
    assert not any("asr" in text or "coherence" in text for text in found.left_out), "neither run has them"
    page = tmp_path / "compared.html"
    assert main(["compare", str(tmp_path / "npo"), str(tmp_path / "ga"), "--out", str(page)]) == 0
    assert "Content-Security-Policy" in page.read_text() and "<script" not in page.read_text()


def test_compare_bars_what_is_another_quantity_in_two_runs(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    own = ["--set", "reward.eval_model=embedding", "--set", f"reward.eval_name_or_path={tmp_path / 'encoder'}"]
    shares = {"forget": 0.3, "preference": 0.2, "reward": 0.3, "evaluation": 0.2}
    own += [text for name, share in shares.items() for text in ("--set", f"partition.{name}_frac={share}")]
    save_tiny_encoder(tmp_path / "encoder")
    assert main(["run", str(tiny_config()), "--quiet", "--set", f"output_dir={tmp_path / 'a'}", *own]) == 0
    options = (tmp_path / "a" / "run.yaml").read_text()

    def other(change: Callable[[str], str], without: bool = False) -> Comparison:
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b" / "run.yaml").write_text(change(options))
        if without:
            arm = ArmResult.load(tmp_path / "b" / "arms" / "after.json")
            arm.model_copy(update={"retain_nll": {}, "retain_tokens": {}}).save(tmp_path / "b" / "arms" / "after.json")
        return compare_runs([tmp_path / "a", tmp_path / "b"])

    alike = other(lambda text: text)
    assert {"preference_margin", "retain_ppl", "reward"} <= {item.metric for item in alike.contrasts}
    assert not any("(texts" in text or "(the reward" in text for text in alike.left_out)
    seed = other(lambda text: re.sub(r"(?m)^seed: \d+", "seed: 77", text))  # the same pairs, so the same heads
    assert "reward" in {item.metric for item in seed.contrasts}
    longer = other(lambda text: re.sub(r"max_length: \d+", "max_length: 400", text))
    assert not {"preference_margin", "retain_ppl"} & {item.metric for item in longer.contrasts}
    assert any("preference_margin" in text and "cut in another way" in text for text in longer.left_out)
    elsewhere = other(lambda text: re.sub(r"(?m)^(model:\n(?:  .*\n)*?  name_or_path: ).*", r"\1elsewhere", text))
    assert "preference_margin" in {item.metric for item in elsewhere.contrasts}, "the rows have the same tokens"
    unknown = other(lambda text: re.sub(r"(?m)^(model:\n(?:  .*\n)*?  name_or_path: ).*", r"\1elsewhere", text), True)
    assert "preference_margin" not in {item.metric for item in unknown.contrasts}


def test_the_default_holdout_is_of_the_candidates_kind(tiny_config: Callable[..., Path]) -> None:
    for share, answers in ((0.0, "rejected"), (1.0, "chosen")):
        config = load_config(tiny_config(partition={"mislabelled_frac": share}, evaluation={"forget_rows": 4}))
        pipeline = Pipeline(config, Console(quiet=True))
        stage, held_out = EvaluationStage(pipeline), pipeline.partition.evaluation
        assert sorted(row.completion for row in stage.holdout) == sorted(getattr(pair, answers) for pair in held_out)


def test_wrong_calls_end_with_one_clear_line(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tmp_path), str(tmp_path / "other"), "--out", str(tmp_path / "x.pdf")]) == 2
    assert "x.pdf: expected .html, .md or .json" in capsys.readouterr().err, "told before anything is read"
    assert main(["compare", str(tmp_path)]) == 2
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert main(["reward", "train", "--base", "x"]) == 2
    assert "--pairs" in capsys.readouterr().err
    sets = [{"name": "a/b", "path": "x.jsonl"}]
    assert main(["run", str(tiny_config(evaluation={"prompt_sets": sets})), "--quiet"]) == 2
    assert "slash" in capsys.readouterr().err
    judge = {"rubric": "answered"}
    assert main(["run", str(tiny_config(evaluation={"judge": judge})), "--quiet"]) == 2
    assert "url" in capsys.readouterr().err


def test_metrics_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}  (" in shown for name in METRICS)


def test_an_unknown_metric_has_no_meaning() -> None:
    assert info("asr/anything") is METRICS["asr"] and info("nothing") is None
