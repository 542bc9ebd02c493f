"""The whole command line on a two-layer random model, as a user meets it."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from u2a.checkpoint import verify
from u2a.cli import main
from u2a.config import RunConfig
from u2a.config_file import load_config
from u2a.errors import ConfigError
from u2a.pipeline import Pipeline
from u2a.progress import Console
from u2a.record import Record
from u2a.report import render_report
from u2a.reward import load_reward_model
from u2a.run import run
from u2a.run_records import RunRecords, what_was_done
from u2a.solution import Solution
from u2a.types import EvalTable, Partition, RewardTable, UnlearnResult


@pytest.fixture
def finished(tiny_config: Callable[..., Path], tmp_path: Path) -> Path:
    """Directory of a finished run."""
    assert main(["run", str(tiny_config()), "--quiet"]) == 0
    return tmp_path / "run"


def test_run_writes_everything_a_user_is_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"run.yaml", "partition.json", "rewards.json", "solution.json", "unlearn_u2a.json"} <= names
    assert {
        "unlearn_random_k.json",
        "evaluation.json",
        "summary.json",
        "report.html",
        "candidates.csv",
        "adapter",
        "metrics.jsonl",
    } <= names
    summary = json.loads((finished / "summary.json").read_text())
    for metric in ("preference_accuracy", "preference_margin", "reward", "retain_ppl"):
        assert {"before", "after", "random_k"} <= set(summary[metric])
    table = EvalTable.load(finished / "evaluation.json")
    for arm, metrics in table.arms.items():
        assert set(metrics) == {name for name, by_arm in summary["metrics"].items() if arm in by_arm}
        for name, found in metrics.items():
            shown = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
            assert summary["metrics"][name][arm] == shown
    assert summary["metrics"]["retain_ppl"]["after"]["value"] == summary["retain_ppl"]["after"]
    assert "metrics.retain_ppl" not in (finished / "report.html").read_text(), "the report has its own table of them"
    for key in ("n_candidates", "n_selected", "weights_sum", "seconds", "peak_rss_bytes", "verdict"):
        assert key in summary
    assert summary["weights_sum"] == pytest.approx(1.0)
    solution = Solution.load(finished / "solution.json")
    control = UnlearnResult.load(finished / "unlearn_random_k.json")
    mine = UnlearnResult.load(finished / "unlearn_u2a.json")
    assert control.n_samples == mine.n_samples == len(solution.weights) == summary["n_selected"], "equal k"
    assert control.history[-1].step <= 4 and mine.history[-1].step <= 4, "equal steps"
    page = (finished / "report.html").read_text()
    assert summary["verdict"].split(":")[0] in page and 'src="http' not in page


def test_adapter_loads_with_plain_peft_and_scores_as_recorded(finished: Path, tiny_files: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_files / "model")
    model = PeftModel.from_pretrained(base, finished / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "adapter")
    pair = Partition.load(finished / "partition.json").evaluation[0]
    turns = [{"role": turn.role, "content": turn.content} for turn in pair.prompt]
    head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def mean_log_prob(answer: str) -> float:
        start = tokenizer(head, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = tokenizer(head + answer + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)
        token = scores[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return float(token[start.shape[1] - 1 :].mean())

    table = EvalTable.load(finished / "evaluation.json")
    recorded = table.arms["after"]["preference_margin"].values[pair.id]
    assert mean_log_prob(pair.chosen) - mean_log_prob(pair.rejected) == pytest.approx(recorded, abs=1e-4)


def test_a_finished_run_is_resumed_without_doing_anything_twice(
    finished: Path, tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in finished.glob("*.json")}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage was run again")

    for name in ("pipeline.solve", "pipeline.analyse", "evaluation_stage.evaluate_arm"):
        monkeypatch.setattr(f"u2a.{name}", never)
    monkeypatch.setattr("u2a.stage_store.peak_rss_bytes", lambda: 10**15)  # this process computed nothing of it
    assert main(["run", str(tiny_config()), "--quiet"]) == 0
    assert before == {path: path.read_bytes() for path in before}


def test_the_reliability_is_said_once_and_before_the_choice(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(tiny_config()), "--set", f"output_dir={tmp_path / 'told'}"]
    for attempt in ("computed", "read back"):
        with redirect_stderr(sys.stdout):  # one stream, to see the order
            assert main(arguments) == 0
        said = capsys.readouterr().out
        assert said.count("\nreliability of the gains") == 1, attempt
        if attempt == "computed":
            assert said.index("score") < said.index("\nreliability of the gains") < said.index("inner run, round 1")


def test_results_go_to_standard_output_and_quiet_leaves_them_alone(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "streams"
    arguments = [str(tiny_config()), "--set", f"output_dir={folder}"]
    assert main(["run", *arguments]) == 0
    loud = capsys.readouterr()
    for words in (
        "reliability of the gains",
        "Selected ",
        "retain_ppl",
        "Prompt: ",
        f"Report: {folder / 'report.html'}",
    ):
        assert words in loud.out and words not in loud.err
    verdict = RunRecords.load(folder).evaluation.verdict  # type: ignore[union-attr]
    assert loud.out.count(f"Verdict: {verdict}") == 1 and "Verdict" not in loud.err
    assert "Partition" in loud.err and "done in" in loud.err and "Partition" not in loud.out
    assert main(["run", *arguments, "--quiet"]) == 0
    assert capsys.readouterr() == (loud.out, "")
    for stage, found in {"partition": "Partition\n", "solve": "\nSelected ", "evaluate": f"Verdict: {verdict}"}.items():
        assert main([stage, *arguments, "--quiet"]) == 0
        shown = capsys.readouterr()
        assert found in shown.out and not shown.err, stage


def test_from_python_everything_is_said_on_one_stream_or_not_at_all(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny_config(), [f"output_dir={tmp_path / 'python'}"])
    run(config)
    shown = capsys.readouterr()
    assert shown.err.count("Verdict: ") == 1 and not shown.out
    run(config, Console(quiet=True))
    assert capsys.readouterr() == ("", "")


def test_a_run_killed_between_stages_goes_on_to_the_same_result(
    finished: Path, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    whole = (finished / "evaluation.json").read_bytes()
    for name in ("evaluation.json", "unlearn_random_k.json"):
        (finished / name).unlink()
    for name in ("random_k.json", "random_k.safetensors"):
        (finished / "arms" / name).unlink()
    assert main(["run", str(tiny_config()), "--quiet"]) == 0
    assert (finished / "evaluation.json").read_bytes() == whole


def test_a_run_with_embeddings_that_stops_before_the_selection_goes_on_to_the_same_bytes(
    tiny_config: Callable[..., Path], tiny_encoder: str, tmp_path: Path
) -> None:
    """The resumed process embeds other texts together; the selecting rewards of the round must not show it."""
    draw = random.Random(1)

    def words(most: int) -> str:
        count = draw.randint(3, most)
        return " ".join(draw.choice(("tea", "and", "rain", "never", "why", "kites")) for _ in range(count))

    rows = [{"prompt": f"{words(14)} {k}?", "chosen": words(30), "rejected": words(25)} for k in range(160)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        data={"pairs": str(tmp_path / "pairs.jsonl")},
        reward={"model": "embedding", "name_or_path": tiny_encoder},
        partition={"forget_frac": 0.2, "preference_frac": 0.4, "reward_frac": 0.3, "evaluation_frac": 0.1},
        solve={"rounds": 1, "folds": 2, "final_refine": False},
        unlearn={"max_steps": 2},
        evaluation={"controls": []},
    )
    found = []
    for name, stages in {"whole": ["run"], "stopped": ["reward", "run"]}.items():
        for stage in stages:
            assert main([stage, str(config), "--quiet", "--set", f"output_dir={tmp_path / name}"]) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        rounds = Solution.load(tmp_path / name / "solution.json").rounds
        found.append(([row.reward for row in rounds], summary["content_hash"]))
    assert found[0][0] and found[0] == found[1]


@pytest.mark.parametrize("side", ["", "eval_"])
def test_a_head_of_reward_train_is_a_reward_model_of_a_run(
    side: str, tiny_config: Callable[..., Path], tiny_files: Path, tiny_encoder: str, tmp_path: Path, capsys
) -> None:
    head = tmp_path / "my-reward"
    pairs = str(tiny_files / "pairs.jsonl")
    assert main(["reward", "train", "--pairs", pairs, "--base", tiny_encoder, "--out", str(head), "--quiet"]) == 0
    reward = {"model": "none", "eval_model": "none", f"{side}model": "head", f"{side}name_or_path": str(head)}
    config = str(tiny_config(reward=reward, evaluation={"controls": []}))
    assert main(["run", config, "--quiet"]) == 0
    if side == "":
        score = load_reward_model(str(head), "head", "cpu").score
        rows = {row.id: row.reward for row in RewardTable.load(tmp_path / "run" / "rewards.json").rows}
        forget = Partition.load(tmp_path / "run" / "partition.json").forget
        expected = score([row.prompt for row in forget], [row.completion for row in forget]).tolist()
        assert [rows[row.id] for row in forget] == pytest.approx(expected, abs=1e-6)
    else:
        assert EvalTable.load(tmp_path / "run" / "evaluation.json").arms["after"]["reward"].value is not None
    shutil.rmtree(head)
    head.mkdir()
    assert main(["run", config, "--quiet"]) == 2
    assert f"reward.{side}name_or_path: {head}: no reward head there" in capsys.readouterr().err


def test_a_changed_option_runs_its_stage_again(finished: Path, tiny_config: Callable[..., Path]) -> None:
    assert main(["run", str(tiny_config()), "--quiet", "--set", "solve.n_selected=3"]) == 0
    assert len(Solution.load(finished / "solution.json").weights) <= 3


def test_run_yaml_replays_the_run_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    first = Solution.load(finished / "solution.json")
    other = tmp_path / "again"
    assert main(["run", str(finished / "run.yaml"), "--set", f"output_dir={other}", "--quiet"]) == 0
    assert Solution.load(other / "solution.json").weights == first.weights


def test_run_yaml_replays_from_every_directory_what_was_named_relative_to_one(
    tiny_config: Callable[..., Path], tiny_files: Path, tiny_encoder: str, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(tiny_files / "model", tmp_path / "model")
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    reward = {"model": "embedding", "name_or_path": "encoder"}
    config = tiny_config(model={"name_or_path": "model"}, reward=reward, evaluation={"embedder": "./encoder"})
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(config), "--quiet"]) == 0
    before = json.loads((tmp_path / "run" / "summary.json").read_text())["content_hash"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    replay = ["run", str(tmp_path / "run" / "run.yaml"), "--quiet"]
    assert main([*replay, "--set", "output_dir=again"]) == 0
    assert json.loads(Path("again/summary.json").read_text())["content_hash"] == before
    for name in ("pipeline.solve", "pipeline.analyse", "evaluation_stage.evaluate_arm"):
        monkeypatch.setattr(f"u2a.{name}", lambda *_, **__: pytest.fail("a finished stage was run again"))
    assert main(replay) == 0


def test_every_stage_alone_gives_what_the_whole_run_gave(
    finished: Path, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = str(tiny_config())
    for stage in ("partition", "reward", "solve", "unlearn", "evaluate", "report"):
        assert main([stage, config, "--quiet", "--set", f"output_dir={tmp_path / 'staged'}"]) == 0, stage
    for name in ("partition", "rewards"):
        assert (tmp_path / "staged" / f"{name}.json").read_bytes() == (finished / f"{name}.json").read_bytes(), name
    whole, staged = (EvalTable.load(folder / "evaluation.json") for folder in (finished, tmp_path / "staged"))
    for arm, metrics in whole.arms.items():
        for name, metric in metrics.items():
            assert (staged.arms[arm][name].value or 0.0) == pytest.approx(metric.value or 0.0, rel=1e-5, abs=1e-6), name
    assert (tmp_path / "staged" / "report.html").exists()


def test_stage_by_stage_the_adapter_has_the_card_of_the_whole_run(
    finished: Path, tiny_config: Callable[..., Path]
) -> None:
    whole = finished / "adapter"
    for stage in ("solve", "unlearn"):
        assert main([stage, str(tiny_config()), "--quiet", "--set", "output_dir=" + str(finished)]) == 0
    assert (whole / "README.md").read_text().count("Not evaluated.") == 0, "read back, nothing is forgotten"
    staged = finished.parent / "staged"
    words = ["--quiet", "--set", f"output_dir={staged}"]
    for stage in ("reward", "solve", "unlearn"):
        assert main([stage, str(tiny_config()), *words]) == 0, stage
    card = staged / "adapter" / "README.md"
    assert "Not evaluated." in card.read_text()
    weights = (staged / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main(["evaluate", str(tiny_config()), *words]) == 0
    verify(staged / "adapter")
    assert card.read_text() == (whole / "README.md").read_text() and "selection beat random-k" in card.read_text()
    assert (staged / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_the_merged_model_is_saved_by_the_stage_that_unlearns(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = str(tiny_config(model={"save_merged": True}, evaluation={"controls": []}))
    for stage in ("reward", "solve", "unlearn"):
        assert main([stage, config, "--quiet"]) == 0, stage
    verify(tmp_path / "run" / "merged")
    base = AutoModelForCausalLM.from_pretrained(load_config(config).model.name_or_path)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged"), torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_adapter_of_a_finished_run_is_merged_later_without_training_again(
    finished: Path, tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in finished.glob("*.json") if path.name != "stages.json"}
    monkeypatch.setattr(import_module("u2a.unlearn"), "UnlearnTrainer", None)  # u2a.unlearn is a function, too
    assert not (finished / "merged").exists()
    assert main(["unlearn", str(tiny_config()), "--set", "model.save_merged=true", "--quiet"]) == 0
    base = AutoModelForCausalLM.from_pretrained(load_config(tiny_config()).model.name_or_path)
    adapted = PeftModel.from_pretrained(base, finished / "adapter").eval()
    merged, ids = AutoModelForCausalLM.from_pretrained(finished / "merged"), torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("stage", ["solve", "unlearn", "evaluate", "report"])
def test_a_stage_whose_input_is_missing_says_what_to_run(
    stage: str, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([stage, str(tiny_config()), "--quiet"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") <= 2 and ("first)" in message or "no run.yaml" in message)


def test_stages_before_the_evaluation_run_without_its_pairs(
    tiny_config: Callable[..., Path], tiny_files: Path, tiny_encoder: str, tmp_path: Path, capsys
) -> None:
    head, pairs = str(tmp_path / "my-reward"), str(tiny_files / "pairs.jsonl")
    assert main(["reward", "train", "--pairs", pairs, "--base", tiny_encoder, "--out", head, "--quiet"]) == 0
    data = {"pairs": None, "forget": str(tiny_files / "negatives.jsonl"), "retain": None}
    config = str(tiny_config(data=data, reward={"model": "head", "name_or_path": head}))
    assert main(["reward", config, "--quiet"]) == 0
    table = RewardTable.load(tmp_path / "run" / "rewards.json")
    assert len(table.rows) == 10 and table.threshold is None and table.card.n_train > 0
    own = {"preferences": pairs, "retain": str(tiny_files / "retain.jsonl")}
    config = str(tiny_config(data=data | own, reward={"model": "none"}))
    for stage in ("score", "solve", "unlearn"):
        assert main([stage, config, "--quiet"]) == 0, stage
    assert (tmp_path / "run" / "adapter").is_dir() and main(["report", config, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["evaluate", config, "--quiet"]) == 2 and "evaluation: no pairs" in capsys.readouterr().err


def test_score_without_a_configuration_file(tiny_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    words = ["score", "--model", str(tiny_files / "model"), "--forget", str(tiny_files / "negatives.jsonl")]
    words += ["--prefs", str(tiny_files / "pairs.jsonl"), "--out", str(out), "--quiet"]
    assert main([*words, "--set", "solve.adjoint=identity", "--set", "unlearn.batch_size=4"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 10 and all(math.isfinite(row["gain"]) for row in rows)
    assert [row["estimate"] for row in rows] == sorted((row["estimate"] for row in rows), reverse=True)
    assert {row["completion"] for row in rows} == {
        f"never {t}" for t in ("tea", "rain", "chess", "bread", "maps", "wool", "salt", "bees", "kites", "ferns")
    }


def test_every_record_of_a_run_loads_again(finished: Path) -> None:
    kinds: dict[str, type[Record]] = {
        "partition": Partition, "rewards": RewardTable, "solution": Solution,
        "unlearn_u2a": UnlearnResult, "evaluation": EvalTable,
    }  # fmt: skip
    for name, kind in kinds.items():
        record = kind.load(finished / f"{name}.json")
        assert kind.load(record.save(finished / "copy.json")) == record


def test_misaligned_start_every_control_and_merged_model(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    shares = {
        "finetune_frac": 0.2,
        "forget_frac": 0.2,
        "preference_frac": 0.3,
        "reward_frac": 0.1,
        "evaluation_frac": 0.2,
    }
    controls = ["random_k", "full", "lowest_reward_k", "uniform_top_k", "retrain"]
    config = tiny_config(
        partition=shares,
        finetune={"enabled": True, "epochs": 1.0},
        evaluation={"controls": controls},
        model={"save_merged": True},
        solve={"rounds": 1},
    )
    assert main(["run", str(config), "--quiet"]) == 0
    table = EvalTable.load(tmp_path / "run" / "evaluation.json")
    assert set(table.arms) == {"before", "after", *controls}
    margins = {arm: metrics["preference_margin"].value for arm, metrics in table.arms.items()}
    assert margins["retrain"] != margins["before"] and margins["full"] != margins["before"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "reward", "reward_samples": 2, "scorer": "central", "heldout_frac": 0.0},
        {"objective": "dpo", "adjoint": "implicit", "scorer": "jvp", "cg_steps": 2, "curvature_samples": 4},
        {"objective": "nll", "estimator": "lower_bound", "sparsity": 0.5, "drop_below": 0.1},
        {"estimator": "shrunken", "fallback": "random_k", "selected_frac": 0.25},
    ],
    ids=lambda options: options.get("objective", "shrunken"),
)
def test_every_objective_adjoint_and_scorer_runs(
    options: dict, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    short = {"unlearn": {"max_steps": 2}, "evaluation": {"generate_prompts": 1}}
    assert main(["run", str(tiny_config(solve={"rounds": 1, **options}, **short)), "--quiet"]) == 0
    solution = Solution.load(tmp_path / "run" / "solution.json")
    assert solution.fallback == "empty" or sum(solution.weights.values()) == pytest.approx(1.0)
    assert all(math.isfinite(row.gain) for row in solution.scores.rows)


@pytest.mark.parametrize(("loss", "term"), [("ga", "proximal"), ("grad_diff", "kl"), ("npo", "none")])
def test_every_loss_and_full_fine_tuning(
    loss: str, term: str, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    full = term != "kl"
    config = tiny_config(
        unlearn={"loss": loss, "retain_term": term, "max_steps": 2, "learning_rate": 1e-4},
        model={"adapter": {"enabled": not full, "r": 4, "alpha": 8}},
        solve={"rounds": 1},
        evaluation={"generate_prompts": 1},
    )
    assert main(["run", str(config), "--quiet"]) == 0
    folder = tmp_path / "run" / ("model" if full else "adapter")
    assert (folder / "README.md").exists() and list(folder.glob("*.safetensors"))
    assert UnlearnResult.load(tmp_path / "run" / "unlearn_u2a.json").loss.startswith(loss)


def test_three_lines_of_python(tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import u2a
    from tiny import tiny_model, tiny_tokenizer

    monkeypatch.chdir(tmp_path)
    config = u2a.RunConfig.model_validate(
        {
            "reward": {"model": "none", "eval_model": "none"},
            "partition": {"forget_frac": 0, "preference_frac": 0.6, "reward_frac": 0, "evaluation_frac": 0.4},
            "solve": {"adjoint": "identity", "folds": 2, "rounds": 1, "warmup_steps": 1, "fallback": "none"},
            "unlearn": {"max_steps": 2, "batch_size": 4},
            "evaluation": {"generate_prompts": 1, "max_new_tokens": 2, "bootstrap": 100},
        }
    )
    negatives = [{"prompt": f"N{k}", "completion": f"never {k}"} for k in range(8)]
    preferences = [{"prompt": f"P{k}", "chosen": f"yes {k}", "rejected": f"no {k}"} for k in range(20)]
    result = u2a.align(tiny_model(), negatives, preferences, tokenizer=tiny_tokenizer(), config=config)
    assert result.report(tmp_path / "report.html").stat().st_size > 1000
    assert "selection beat random-k" in result.verdict
    assert result.summary["fallback"] == "empty" or sum(result.weights.values()) == pytest.approx(1.0)
    assert (result.save(tmp_path / "mine") / "adapter_config.json").exists()


def test_a_stage_alone_refuses_records_of_other_options(
    finished: Path, tiny_config: Callable[..., Path], capsys
) -> None:
    """Evaluating under changed options must not measure the old adapters and pass them on to a later run."""
    before = (finished / "stages.json").read_bytes()
    changed = ["--quiet", "--set", "unlearn.learning_rate=0.01"]
    assert main(["evaluate", str(tiny_config()), *changed]) == 2
    assert "made from other options or data (run u2a solve again)" in capsys.readouterr().err
    assert (finished / "stages.json").read_bytes() == before
    assert main(["run", str(tiny_config()), *changed]) == 0
    again = EvalTable.load(finished / "evaluation.json")
    fresh = finished.parent / "fresh"
    assert main(["run", str(tiny_config()), *changed, "--set", f"output_dir={fresh}"]) == 0
    for arm, metrics in EvalTable.load(fresh / "evaluation.json").arms.items():
        expected = metrics["preference_margin"].value
        assert again.arms[arm]["preference_margin"].value == pytest.approx(expected, abs=1e-5), arm


def test_a_report_never_shows_options_beside_results_of_other_ones(
    finished: Path, tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config, kept = (
        str(tiny_config()),
        ("run.yaml", "partition.json", "evaluation.json", "report.html", "candidates.csv"),
    )
    before = {name: (finished / name).read_bytes() for name in kept}
    changed = ["--quiet", "--set", "unlearn.loss=ga", "--set", "seed=4"]
    assert main(["evaluate", config, *changed]) == 2
    assert {name: (finished / name).read_bytes() for name in kept} == before, "a refused command changes nothing"
    with monkeypatch.context() as patch:
        patch.setattr(import_module("u2a.run"), "_solved", lambda pipeline: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["run", config, *changed])  # ended after the options were written
    records = RunRecords.load(finished)
    assert records.config.seed == 4 and records.config.unlearn.loss == "ga"
    assert records.solution is None and records.evaluation is None and records.unlearn == {}
    assert not (finished / "report.html").exists() and not (finished / "candidates.csv").exists()
    assert main(["report", str(finished), "--gate", "yes", "--quiet"]) != 0
    for name in ("pipeline.solve", "evaluation_stage.evaluate_arm"):  # nothing was lost: the old options find all of it
        monkeypatch.setattr(f"u2a.{name}", lambda *_, **__: pytest.fail("a finished stage was run again"))
    assert main(["run", config, "--quiet"]) == 0
    again = RunRecords.load(finished)
    assert again.solution is not None and again.evaluation is not None and set(again.unlearn) == {"u2a", "random_k"}
    assert (finished / "evaluation.json").read_bytes() == before["evaluation.json"]


def test_a_look_at_other_data_takes_the_results_off_the_report(
    finished: Path, tiny_config: Callable[..., Path]
) -> None:
    assert main(["partition", str(tiny_config()), "--quiet", "--set", "token_budget=333"]) == 0
    assert RunRecords.load(finished).evaluation is not None, "the same data, and options that change no number"
    assert main(["partition", str(tiny_config()), "--quiet", "--set", "seed=3"]) == 0
    records = RunRecords.load(finished)
    assert records.evaluation is None and records.solution is None and records.config.seed == 3
    assert main(["evaluate", str(tiny_config()), "--quiet"]) == 0
    assert RunRecords.load(finished).solution is not None


def test_results_of_an_earlier_solution_do_not_stay_beside_the_new_one(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config, run = str(tiny_config()), tmp_path / "run"
    assert main(["run", config, "--quiet", "--set", "model.save_merged=true"]) == 0
    assert (run / "merged").is_dir() and (run / "adapter").is_dir()
    own = run / "model"  # not what a run saves there
    own.mkdir()
    (own / "mine.txt").write_text("mine")
    assert main(["run", config, "--quiet", "--set", "unlearn.loss=ga"]) == 0
    assert not (run / "merged").exists() and (own / "mine.txt").exists()
    shutil.rmtree(own)
    assert main(["run", config, "--quiet", "--set", "model.adapter.enabled=false"]) == 0
    assert (run / "model").is_dir() and not (run / "adapter").exists()


def test_a_run_in_the_folder_of_its_model_is_refused(tiny_config: Callable[..., Path], tmp_path: Path, capsys) -> None:
    own = tmp_path / "own"
    shutil.copytree(load_config(tiny_config()).model.name_or_path, own)
    words = ["run", str(tiny_config(model={"name_or_path": str(own)})), "--quiet", "--set", f"output_dir={own}"]
    assert main(words) == 2
    assert f"output_dir: {own} is the folder of model.name_or_path" in capsys.readouterr().err
    assert not (own / "run.yaml").exists()


def test_options_that_change_no_number_run_nothing_again(
    finished: Path, tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage was run again")

    for name in ("pipeline.solve", "pipeline.analyse", "evaluation_stage.evaluate_arm"):
        monkeypatch.setattr(f"u2a.{name}", never)
    options = ["evaluation.samples_shown=2", "unlearn.save_steps=7", "data.allow_leak=true"]
    words = [word for option in options for word in ("--set", option)]
    assert main(["run", str(tiny_config()), "--quiet", *words]) == 0


def test_dropping_a_control_drops_it_from_the_report(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["run", str(tiny_config(evaluation={"controls": ["random_k", "full"]})), "--quiet"]) == 0
    assert set(RunRecords.load(tmp_path / "run").unlearn) == {"u2a", "random_k", "full"}
    assert main(["run", str(tiny_config(evaluation={"controls": ["random_k"]})), "--quiet"]) == 0
    assert set(RunRecords.load(tmp_path / "run").unlearn) == {"u2a", "random_k"}


def test_the_control_by_all_answers_is_unlearned_although_nothing_was_selected(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from u2a import pipeline

    found = pipeline.solve

    def nothing(*given) -> Solution:
        solution = found(*given)
        rows = tuple(row.model_copy(update={"weight": 0.0}) for row in solution.rows)
        return solution.model_copy(update={"rows": rows, "fallback": "empty"})

    monkeypatch.setattr(pipeline, "solve", nothing)
    config = tiny_config(evaluation={"controls": ["random_k", "full"], "generate_prompts": 2})
    assert main(["run", str(config), "--quiet"]) == 0
    run = tmp_path / "run"
    assert not (run / "unlearn_u2a.json").exists() and not (run / "unlearn_random_k.json").exists()
    result = UnlearnResult.load(run / "unlearn_full.json")
    assert result.n_samples == len(Partition.load(run / "partition.json").forget)
    arms = EvalTable.load(run / "evaluation.json").arms
    assert arms["full"]["preference_margin"].value != arms["before"]["preference_margin"].value


def test_another_chat_template_or_other_weights_behind_the_same_name_run_the_stages_again(
    tiny_config: Callable[..., Path], tiny_files: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_files / "model", model)
    config = load_config(tiny_config(model={"name_or_path": str(model), "device": "cpu"}))

    def key() -> str:
        return Pipeline(config, Console(quiet=True)).key("solve")

    first = key()
    assert key() == first
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = str(tokenizer.chat_template) + "{# another one #}"
    tokenizer.save_pretrained(model)
    second = key()
    policy = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        next(policy.parameters())[0, 0] += 1.0
    policy.save_pretrained(model)
    assert len({first, second, key()}) == 3


def test_a_new_solution_leaves_no_measurement_of_the_old_one(
    finished: Path, tiny_config: Callable[..., Path], capsys
) -> None:
    assert main(["report", str(finished), "--gate", "not-no"]) in (0, 1)
    changed = ["--quiet", "--set", "solve.selected_frac=0.3"]
    verdict = EvalTable.load(finished / "evaluation.json").verdict
    (finished / "robustness.md").write_text("of the old solution")
    for stage in ("solve", "unlearn"):
        assert main([stage, str(tiny_config()), *changed]) == 0
        for name in ("evaluation.json", "summary.json", "robustness.md"):
            assert not (finished / name).exists(), name
        records = RunRecords.load(finished)
        assert what_was_done(records).endswith("; not unlearned yet.") is (stage == "solve")
        assert verdict not in render_report(records)
    capsys.readouterr()
    assert main(["report", str(finished), "--gate", "not-no"]) == 2
    assert "evaluation.json" in capsys.readouterr().err
    assert "selection beat random-k" not in (finished / "adapter" / "README.md").read_text()


def test_a_directory_with_folders_of_something_else_is_refused(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    theirs = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"mine")
    assert main(["run", str(tiny_config()), "--quiet"]) == 2
    assert "holds adapter/ of something else, which a run would replace" in capsys.readouterr().err
    assert theirs.read_bytes() == b"mine" and [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]


def test_align_with_candidates_of_the_callers_own_cuts_none_from_the_pairs(tiny_files: Path, tmp_path: Path) -> None:
    import u2a

    tree = {"output_dir": str(tmp_path / "own"), "reward": {"model": "none", "eval_model": "none"}}
    tree |= {"unlearn": {"max_steps": 1}, "evaluation": {"generate_prompts": 2, "controls": []}}
    result = u2a.align(
        str(tiny_files / "model"),
        forget=tiny_files / "negatives.jsonl",
        preferences=str(tiny_files / "pairs.jsonl"),
        config=RunConfig.model_validate(tree | {"solve": {"rounds": 1, "folds": 2}}),
        console=Console(quiet=True),
    )
    sets = Partition.load(tmp_path / "own" / "partition.json")
    assert len(sets.forget) == 10 and all(row.completion.startswith("never") for row in sets.forget)
    written = load_config(tmp_path / "own" / "run.yaml")
    assert written.data.pairs == str(tiny_files / "pairs.jsonl")  # replayed from there
    assert written.data.forget == str(tiny_files / "negatives.jsonl") and result.weights is not None


def test_align_without_retain_rows_says_what_grad_diff_needs(tiny_files: Path, tmp_path: Path) -> None:
    import u2a

    files = {"forget": tiny_files / "negatives.jsonl", "preferences": tiny_files / "pairs.jsonl"}
    config = RunConfig.model_validate({"output_dir": str(tmp_path / "run"), "unlearn": {"loss": "grad_diff"}})
    with pytest.raises(ConfigError, match="grad_diff needs retain rows .give `retain`"):
        u2a.align("no-such-model", **files, config=config, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": {"eval_model": "embedding", "eval_name_or_path": "package:no_such"}}, "reward.eval_name_or_path"),
        ({"reward": {"model": "none", "eval_model": "language_model", "eval_name_or_path": "nowhere/x"}}, "nowhere/x"),
        ({"model": {"name_or_path": "m", "device": "cuda:1"}}, "CUDA_VISIBLE_DEVICES=1"),
        ({"solve": {"clusters": 2, "cluster_embedder": "package:no_such"}}, "solve.cluster_embedder: package:no_such"),
    ],
)
def test_what_would_end_a_run_late_ends_it_early(
    changes: dict, words: str, tiny_config: Callable[..., Path], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("u2a.pipeline.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["run", str(tiny_config(**changes)), "--quiet"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.yaml").exists()
