"""The dry run: what it tells is what the run then does, writes and costs; and it writes nothing itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from e2e.conftest import tiny_config, tiny_files  # noqa: F401  # fixtures
from forecast_kit import BARE, SIMPLE, both, written
from tiny import examples, tiny_model, tiny_policy, tiny_tokenizer
from u2a.bilevel.backward import BatchedBackward
from u2a.bilevel.gains import candidate_losses
from u2a.bilevel.operators import random_unit
from u2a.bilevel.trajectory import plan_of
from u2a.cli import main
from u2a.config import AdapterConfig, GuardSection, UnlearnSection
from u2a.config_file import load_config
from u2a.encoding import Encoded
from u2a.errors import ConfigError
from u2a.forecast.dry_run import dry_run
from u2a.forecast.flops import Shape, shape_of, sizes_of
from u2a.forecast.phases import Forecast
from u2a.forecast.text import forecast_text, size_text, time_text
from u2a.forecast.work import step_batches
from u2a.free_memory import host_free_bytes
from u2a.model_loading import shapes_of
from u2a.modeling import Policy
from u2a.progress import Console, Quiet
from u2a.unlearn import InnerProblem


def sequences(rows: int, width: int, answer: int) -> list[Encoded]:
    return [Encoded(tuple(3 + (k + row) % 200 for k in range(width)), answer) for row in range(rows)]


def counted(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


# --- formulas -----------------------------------------------------------------------------------


def policy_for_counting(adapter: bool = True, layers: list[int] | None = None) -> Policy:
    """Attention as plain products, since torch's counter does not see the CPU's fused kernel."""
    settings = AdapterConfig(enabled=adapter, r=4, alpha=8.0, layers=layers)
    return Policy(tiny_model(layers=4, attention="eager"), tiny_tokenizer(), settings, 512, 4096)


@pytest.mark.parametrize(("adapter", "layers"), [(True, None), (True, [2, 3]), (False, None)])
@pytest.mark.parametrize("shape", [Shape(3, 40, 7), Shape(2, 120, 60)])
def test_formulas_agree_with_the_counter(adapter: bool, layers: list[int] | None, shape: Shape) -> None:
    policy = policy_for_counting(adapter, layers)
    sizes, rows = sizes_of(policy.model), sequences(shape.rows, shape.width, shape.answer)
    assert shape_of(rows) == shape
    with torch.no_grad():
        assert sizes.forward(shape) == pytest.approx(counted(lambda: policy.log_probs(rows)), rel=0.02)

    def step() -> None:
        torch.autograd.grad(policy.log_probs(rows).mean.sum(), list(policy.trainable().values()), allow_unused=True)

    assert sizes.gradient(shape) == pytest.approx(counted(step), rel=0.10)


def test_the_rules_of_thumb_2nd_4nd_and_6nd_hold_for_a_wide_model() -> None:
    wide = replace(
        sizes_of(policy_for_counting().model),
        body=10**9, upper=10**9, head=10**6, lora_in=10**5, lora_out=10**5, hidden=1, heads_width=1,
    )  # fmt: skip
    shape = Shape(4, 100, 50)
    assert wide.forward(shape) == pytest.approx(2 * 10**9 * 400, rel=0.01)
    assert wide.gradient(shape) == pytest.approx(4 * 10**9 * 400, rel=0.01)
    full = replace(wide, has_adapter=False, lora_in=0, lora_out=0)
    assert full.gradient(shape) == pytest.approx(6 * 10**9 * 400, rel=0.01)


@pytest.mark.parametrize("directions", [1, 8])
def test_formula_of_scoring_agrees_with_the_counter(directions: int) -> None:
    policy = policy_for_counting()
    losses = candidate_losses(policy, InnerProblem(examples(6)))
    vectors = [random_unit(policy.trainable(), seed) for seed in range(directions)]
    found = counted(lambda: BatchedBackward().derivatives(losses, vectors, Quiet()))
    assert sizes_of(policy.model).scoring(shape_of(losses.rows), directions) == pytest.approx(found, rel=0.10)


def test_sizes_are_those_of_the_model_and_of_its_shapes_alone(tmp_path: Path) -> None:
    model = tiny_model(layers=3)
    n = model.num_parameters()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = load_config(None, [f"model.name_or_path={tmp_path}", "model.adapter.r=4"], None)
    shapes = shapes_of(config.model)
    assert {value.device.type for value in shapes.parameters()} == {"meta"}
    policy = Policy(model, tiny_tokenizer(), AdapterConfig(r=4), 512)
    sizes = sizes_of(policy.model)
    assert sizes == sizes_of(shapes)
    assert sizes.parameters == n
    assert sizes.trainable == sum(value.numel() for value in policy.trainable().values())
    assert sizes.stored_bytes == 4 * (n + sizes.trainable)
    quantised = sizes_of(shapes, load_in_4bit=True)
    assert sizes.stored_bytes - quantised.stored_bytes == pytest.approx((4 - 0.53) * sizes.body, rel=0.01)


@pytest.mark.parametrize("adapter", [True, False])
def test_memory_kept_for_the_backward_pass_is_what_torch_saves(adapter: bool) -> None:
    policy = Policy(tiny_model(layers=4, hidden=64), tiny_tokenizer(), AdapterConfig(enabled=adapter, r=4), 512)
    weights = {value.untyped_storage()._cdata for value in policy.model.parameters()}
    rows, kept = sequences(4, 64, 5), {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        policy.log_probs(rows).mean.sum()
    sizes, shape = sizes_of(policy.model), shape_of(rows)
    assert sizes.saved_bytes(shape) + sizes.logits_bytes(shape) == pytest.approx(sum(kept.values()), rel=0.10)


# --- free memory ---------------------------------------------------------------------------------


MEMINFO = "MemTotal: 100000 kB\nMemAvailable: 64000 kB\n"
LIMITS = [
    ("0::/\n", {}, 64000 * 1024),
    ("0::/a\n", {"a/memory.max": "max\n", "a/memory.current": "5\n"}, 64000 * 1024),
    (
        "0::/a/b\n",
        {
            "a/b/memory.max": "9000\n",
            "a/b/memory.current": "7000\n",
            "a/b/memory.stat": "anon 6000\ninactive_file 1000\n",
        },
        3000,
    ),
    ("0::/a/b\n", {"a/memory.max": "500\n", "a/memory.current": "100\n"}, 400),  # the group around it
    ("0::/\n", {"memory.max": "50\n", "memory.current": "80\n"}, 0),
    ("0::/gone\n", {"memory.max": "50\n", "memory.current": "20\n"}, 30),  # a container sees its group as the root
    (
        "3:cpu:/x\n4:memory:/j\n",
        {
            "memory/j/memory.limit_in_bytes": "8000\n",
            "memory/j/memory.usage_in_bytes": "6000\n",
            "memory/j/memory.stat": "total_inactive_file 500\n",
        },
        2500,
    ),
]


@pytest.mark.parametrize(("cgroup", "files", "expected"), LIMITS)
def test_free_memory_honours_the_limits_of_containers(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    described = {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup}
    for name, text in (described | {f"groups/{name}": text for name, text in files.items()}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    assert host_free_bytes(tmp_path / "proc", tmp_path / "groups") == expected


# --- the workload --------------------------------------------------------------------------------


@pytest.mark.parametrize(("retain_term", "parts"), [("nll", 1), ("none", 1), ("nll", 2)])
def test_batches_of_training_are_those_of_the_trainer(retain_term: str, parts: int) -> None:
    policy = tiny_policy()
    section = UnlearnSection(
        loss="npo", retain_term=retain_term, max_steps=5, batch_size=3, gradient_accumulation_steps=parts
    )
    problem = InnerProblem(examples(7), examples(5, 100), (), section, GuardSection(), 11)
    plan = plan_of(policy, problem, problem.uniform())
    rows = sorted(problem.forget, key=lambda row: row.id)
    encode = policy.encoder.encode
    retain = [encode(row.prompt, row.completion) for row in problem.retain] if retain_term == "nll" else []
    found = step_batches(
        [encode(r.prompt, r.completion) for r in rows], 3, 5 * parts, problem.seed, retain, section.retain_batch_size
    )
    expected = []
    for step in plan.steps:
        for batch in step.micro_batches:
            expected += [batch[part]["input_ids"] for part in ("forget", "retain") if part in batch]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(policy.collate(ours).input_ids, theirs)


@pytest.fixture
def configure(tiny_config: Callable[..., Path]) -> Callable[..., Path]:  # noqa: F811
    return tiny_config


def test_phases_files_counts_and_operations_are_those_of_the_run(configure: Callable[..., Path]) -> None:
    # Attention as plain products: torch's counter does not see the CPU's fused kernel.
    done = both(configure(**SIMPLE), "model.attention=eager")
    forecast, flops = done.forecast, {phase.name: phase.flops for phase in done.forecast.phases}
    assert list(flops) == list(done.console.seconds), "same names in the same order"
    assert {file.path for file in forecast.files} == written(done.folder)
    for file in forecast.files:
        real = (done.folder / file.path).stat().st_size
        assert file.bytes is not None
        assert abs(file.bytes - real) <= max(2 * real, 6_000), file
    trainable = sum(value.numel() for value in done.policy.trainable().values())
    assert forecast.trainable == trainable
    assert forecast.parameters == sum(value.numel() for value in done.policy.model.parameters()) - trainable
    for name in ("warm-up", "gradient of J", "score candidates", "inner run, round 1", "unlearn random_k"):
        assert flops[name] == pytest.approx(done.console.flops[name], rel=0.10), name
    # The reference is the model without its adapter, which in so small a model is a sixth of the operations.
    assert flops["reference"] == pytest.approx(done.console.flops["reference"], rel=0.20)
    assert flops["unlearn u2a"] == done.console.flops["unlearn u2a"] == 0.0, "restored"
    known = [phase.seconds for phase in forecast.phases if phase.name != "report"]
    assert None not in known
    assert forecast.seconds == pytest.approx(sum(value or 0.0 for value in known))
    assert forecast.fits
    assert forecast.measured
    assert not forecast.advice
    assert all(0.9 < value < 1.1 for value in forecast.counted.values()), forecast.counted
    text = forecast_text(forecast)
    for word in ("inner run, round 1", "report.html", "Memory: fits", f"{trainable:,}", "within about 25"):
        assert word in text


def test_the_best_round_is_counted_once_more_where_a_later_one_may_be_rolled_back(
    configure: Callable[..., Path],
) -> None:
    for rounds in (1, 2):
        solve = SIMPLE["solve"] | {"rounds": rounds, "final_refine": True}
        forecast = dry_run(load_config(configure(**BARE | {"solve": solve}), [], None), Console(quiet=True))
        flops = {phase.name: phase.flops for phase in forecast.phases}
        expected = flops[f"inner run, round {rounds}"] if rounds > 1 else 0.0
        assert flops["inner run, best round"] == expected, rounds
        assert flops["inner run, final weights"] > 0.0


@pytest.mark.slow
def test_phases_and_files_of_a_run_with_all_trimmings(configure: Callable[..., Path]) -> None:
    shares = {"finetune_frac": 0.2, "forget_frac": 0.2, "preference_frac": 0.3, "reward_frac": 0.1}
    changes = {
        "reward": {"model": "implicit", "eval_model": "none"},
        "partition": shares | {"evaluation_frac": 0.2},
        "finetune": {"enabled": True, "epochs": 0.5},
        "model": {"save_merged": True},
        "solve": SIMPLE["solve"] | {"adjoint": "implicit", "cg_steps": 1, "remove_common": True},
        "evaluation": {"controls": ["base", "random_k", "full", "retrain"], "forget_rows": 3},
    }
    done = both(configure(**SIMPLE | changes))
    assert [phase.name for phase in done.forecast.phases] == list(done.console.seconds)
    assert {file.path for file in done.forecast.files} == written(done.folder)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_nothing_and_prints_json(
    configure: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(configure(**BARE))
    monkeypatch.chdir(tmp_path)
    before = written(tmp_path)
    assert main(["run", path, "--dry-run", "--json", "--quiet"]) == 0
    found = Forecast.model_validate(json.loads(capsys.readouterr().out))
    assert found.trainable > 0
    assert written(tmp_path) == before


def test_errors_of_the_data_appear_and_options_that_do_not_go_together_are_refused(
    configure: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(configure(**BARE))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    assert main(["run", path, "--dry-run", "--quiet", "--set", f"data.retain={tmp_path / 'bad.jsonl'}"]) == 2
    assert "bad.jsonl:1: completion" in capsys.readouterr().err
    few = ["--set", "partition.max_reward=4"]
    head = ["--set", "reward.model=embedding"]
    assert main(["run", path, "--dry-run", "--quiet", *few, *head]) == 2
    assert "reward pairs" in capsys.readouterr().err
    assert main(["run", path, "--json", "--quiet"]) == 2
    assert main(["run", path, "--dry-run", "--gate", "yes", "--quiet"]) == 2


def test_a_judge_without_its_key_is_met_as_in_the_run(
    configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOY_KEY", raising=False)
    monkeypatch.setattr("u2a.forecast.dry_run.device_free_bytes", lambda _: 1)  # formulas alone
    (tmp_path / "asked.jsonl").write_text('{"prompt": "How?"}\n', encoding="utf-8")
    judge = {"rubric": "answered", "url": "http://host/v1", "model": "toy", "key_variable": "TOY_KEY"}
    sets = [{"name": "asked", "path": str(tmp_path / "asked.jsonl")}]
    path = configure(**BARE | {"evaluation": {"judge": judge, "prompt_sets": sets}})
    with pytest.raises(ConfigError, match="TOY_KEY is empty"):
        dry_run(load_config(path, [], None), Console(quiet=True))
    kept = tmp_path / "run" / "cache" / "verdicts.jsonl"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert dry_run(load_config(path, [], None), Console(quiet=True)).phases, "it has replied before"
    assert written(tmp_path / "run") == {"cache/verdicts.jsonl"}


def test_a_model_that_does_not_fit_is_not_loaded_and_gets_advice_but_no_time(
    configure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("u2a.forecast.dry_run.device_free_bytes", lambda _: 2**20)
    monkeypatch.setattr("u2a.pipeline.load_model", _never)
    monkeypatch.setattr("u2a.forecast.dry_run.resident_bytes", lambda: 0)
    forecast = dry_run(load_config(configure(**BARE), [], None), Console(quiet=True))
    assert forecast.fits is False and not forecast.measured
    assert forecast.seconds is None
    assert all(phase.seconds is None for phase in forecast.phases if phase.name != "load tokenizer")
    flops = {phase.name: phase.flops for phase in forecast.phases}
    assert flops["warm-up"] and flops["score candidates"], "operations are known by formula"
    text = forecast_text(forecast)
    assert "does not fit" in text
    assert "not measured" in text
    assert any("solve.rounds" in line for line in forecast.advice)


def _never(*_: object, **__: object) -> None:
    raise AssertionError("the model was loaded")


def test_advice_for_a_large_model_names_4_bits_and_a_smaller_budget(
    configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    folder = tmp_path / "large"
    LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr("u2a.forecast.dry_run.device_free_bytes", lambda _: 20 * 2**30)
    config = load_config(configure(**BARE), [f"model.name_or_path={folder}", "token_budget=16384"], None)
    start = time.monotonic()
    forecast = dry_run(config, Console(quiet=True))
    assert time.monotonic() - start < 60
    assert forecast.parameters == 8_030_261_248, "the published count of Llama 3.1 8B"
    assert forecast.fits is False and 32 * 2**30 > 4 * 8.03e9 - 2**30
    assert forecast.peak_bytes > 4 * 8.03e9, "float32 weights alone"
    named = "\n".join(forecast.advice)
    assert "load_in_4bit" in named and "bfloat16" in named
    by_name = {file.path: file.bytes for file in forecast.files}
    assert by_name["adapter/adapter_model.safetensors"] == 4 * forecast.trainable


def test_numbers_are_written_for_people() -> None:
    assert size_text(1.5 * 2**30) == "1.5 GiB" and time_text(61.0) == "1 min 01 s" and time_text(None) == "not measured"


# --- the demo ------------------------------------------------------------------------------------


# On a shared machine two phases of the same steps were seen to take 26 and 37 s: kinds of phases are compared.
KINDS = {
    "training": ("warm-up", "inner run", "unlearn"),
    "scoring": ("reference", "gradient of J", "score candidates"),
    "measuring": ("measure start", "measure round", "evaluate"),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_forecast_of_the_demo_is_right_within_a_quarter(tmp_path: Path) -> None:
    """Probes right before and right after the run: a machine with others on it is as fast as their mean."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)
    demo = [sys.executable, "-m", "u2a.cli", "demo", "--quiet", "--set", f"output_dir={tmp_path / 'run'}"]

    def forecast() -> Forecast:
        done = subprocess.run(
            [*demo, "--dry-run", "--json"], env=environment, capture_output=True, text=True, check=True
        )
        return Forecast.model_validate(json.loads(done.stdout))

    before = forecast()
    subprocess.run(demo, env=environment, check=True, capture_output=True)
    after = forecast()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    real: dict[str, float] = summary["seconds"]
    told = {
        phase.name: ((phase.seconds or 0.0) + (other.seconds or 0.0)) / 2
        for phase, other in zip(before.phases, after.phases, strict=True)
    }
    assert before.seconds is not None
    assert sum(told.values()) == pytest.approx(sum(real.values()), rel=0.25)
    for kind, starts in KINDS.items():
        forecast_s, real_s = (sum(part[name] for name in part if name.startswith(starts)) for part in (told, real))
        assert real_s > 0.1 * sum(real.values())
        assert forecast_s == pytest.approx(real_s, rel=0.25), kind
    assert (before.peak_bytes + after.peak_bytes) / 2 == pytest.approx(summary["peak_rss_bytes"], rel=0.25)
