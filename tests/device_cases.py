"""What u2a computes, on whatever device it is given: numbers that are the same everywhere.

``python tests/device_cases.py FILE`` computes all of it on the device of second_device.py and writes it to FILE;
test_second_device.py computes it on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification

from experiment.small_experiment import write_experiment
from inner_oracle import quiet
from second_device import second_device
from tiny import examples, pairs, save_tiny, save_tiny_encoder, tiny_policy, tiny_tokenizer
from u2a.bilevel.outer_problem import OuterProblem
from u2a.bilevel.solve import solve
from u2a.cli import main
from u2a.config import GuardSection, SolveSection, UnlearnSection
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.reward import load_reward_model
from u2a.trainer import UnlearnTrainer
from u2a.unlearn import InnerProblem, InnerSolver

Numbers = dict[str, list[float]]
Case = Callable[[str, Path], Numbers]  # device, empty folder
TOPICS = ("tea", "rain", "chess", "bread", "maps", "wool", "salt", "bees", "kites", "ferns")


def policy_on(device: str, **options: Any) -> Policy:
    """A tiny policy on a device, away from its start; theta_0 stays on the CPU, as it always does."""
    policy = tiny_policy(attention="eager", **options)
    policy.model.to(device)
    return policy


def theta(policy: Policy) -> list[float]:
    """A few numbers of the trainable parameters."""
    return [float(value.double().sum()) for value in policy.snapshot().values()]


# --- the policy -----------------------------------------------------------------------------------


def measured(adapter: bool, device: str, folder: Path) -> Numbers:
    policy = policy_on(device, adapter=adapter, lora_b_sd=0.1 if adapter else 0.0)
    rows = [policy.encoder.encode(row.prompt, row.completion) for row in examples(5)]
    if not adapter:
        for value in policy.trainable().values():
            value.data.mul_(1.1)
    with policy.change_scaled(0.5):
        half = policy.answer_sums(rows).tolist()
    return {
        "sums": policy.answer_sums(rows).tolist(),
        "half": half,
        "reference": policy.reference_sums(rows).tolist(),
        "perplexity": [policy.perplexity(rows)],
        "change": [float(policy.change_sq().detach())],
        "at_start": [float(policy.at_start())],
    }


# --- selection ------------------------------------------------------------------------------------

SELECTIONS: dict[str, dict[str, Any]] = {
    "auto": {"rounds": 2},
    "jvp": {"scorer": "jvp"},
    "central": {"scorer": "central"},
    "one_sided": {"scorer": "one_sided"},
    "at_the_start": {"warmup_steps": 0, "rounds": 1, "heldout_frac": 0.0},
    "hessian": {"adjoint": "implicit", "curvature": "hessian", "scorer": "jvp"},
    "gauss_newton": {"adjoint": "implicit", "curvature": "gauss_newton", "damping": 1.0, "folds": 1},
    "fisher": {"adjoint": "implicit", "curvature": "fisher"},
    "adam": {"adjoint": "implicit", "curvature": "adam", "damping": 0.1},
    "unrolled": {"refine_adjoint": "unrolled"},
    "variance": {"pair_clip": 0.8, "remove_common": True, "damage_weight": 0.5},
    "dpo": {"objective": "dpo"},
    "nll": {"objective": "nll"},
}


def selected(section: dict[str, Any], inner: dict[str, Any], adapter: bool, device: str, folder: Path) -> Numbers:
    options = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "retain_batch_size": 2, **inner}
    problem = InnerProblem(
        examples(8),
        retain=examples(4, start=100),
        guard_rows=examples(2, start=200),
        section=UnlearnSection.model_validate(options),
        guard=GuardSection(every_steps=1, ppl_budget_frac=0.02),
        seed=1,
    )
    base = {"folds": 2, "warmup_steps": 1, "rounds": 1, "fallback": "none", "cg_steps": 2, "curvature_samples": 4}
    outer = OuterProblem(pairs(8), SolveSection.model_validate({**base, **section}), seed=2)
    policy = policy_on(device, adapter=adapter)
    found = solve(InnerSolver(policy), problem, outer, Console(quiet=True))
    return {
        "gains": [row.gain for row in found.scores.rows],
        "errors": [row.gain_se or 0.0 for row in found.scores.rows],
        "weights": [row.weight for row in found.rows],
        "objective": [found.scores.objective_value, *(each.objective_pa for each in found.rounds)],
        "theta": theta(policy),
    }


def computed_once_more(device: str, folder: Path) -> Numbers:
    """The exact derivative where not every moment of the run fits into memory."""
    sgd = {"optimizer": "sgd", "retain_term": "kl", "max_steps": 6}
    with patch("u2a.bilevel.unrolled.checkpoint_interval", lambda *sizes: 3):
        return selected({"refine_adjoint": "unrolled"}, sgd, True, device, folder)


# --- the trainer ----------------------------------------------------------------------------------


def trained(options: dict[str, Any], device: str, folder: Path) -> Numbers:
    rows = [row.model_copy(update={"weight": (k + 1) / 21}) for k, row in enumerate(examples(6))]
    args = quiet(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        use_cpu=device == "cpu",
        save_strategy="steps",
        save_steps=2,
        **options,
    )
    policy = tiny_policy(attention="eager")
    retain, held_out = examples(4, start=40), examples(3, start=60)
    trainer = UnlearnTrainer(policy, None, args, rows, retain, eval_dataset=held_out)
    trainer.train()
    assert policy.device.type == torch.device(device).type, "the trainer moves the model to the device of the run"
    stopped = theta(policy)
    again = UnlearnTrainer(tiny_policy(attention="eager"), None, args, rows, retain, eval_dataset=held_out)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {"theta": stopped, "resumed": theta(again.policy), "evaluated": [trainer.evaluate()["eval_loss"]]}


# --- whole commands -------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run_tree(device: str, folder: Path) -> dict[str, Any]:
    """Options of a small run, with its files."""
    save_tiny(folder / "model")
    rows = [
        {"prompt": f"Q{k}: {TOPICS[k % 10]}?", "chosen": f"yes, {k} is fine", "rejected": f"no {k}" + " bah" * (k % 3)}
        for k in range(60)
    ]
    retain = [{"prompt": f"R{k}: {TOPICS[k % 10]}?", "completion": f"some {TOPICS[k % 10]}"} for k in range(15)]
    return {
        "output_dir": str(folder / "run"),
        "model": {
            "name_or_path": str(folder / "model"), "device": device, "attention": "eager",
            "adapter": {"r": 4, "alpha": 8},
        },
        "data": {
            "pairs": write_jsonl(folder / "pairs.jsonl", rows),
            "retain": write_jsonl(folder / "retain.jsonl", retain),
        },
        "reward": {"model": "implicit", "eval_model": "none"},
        "solve": {"adjoint": "identity", "folds": 3, "rounds": 2, "warmup_steps": 1, "fallback": "none"},
        "unlearn": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3},
        "guard": {"every_steps": 2, "ppl_budget_frac": 0.5},
        "evaluation": {"generate_prompts": 2, "max_new_tokens": 4, "bootstrap": 100, "samples_shown": 1},
    }  # fmt: skip


def ran(tree: dict[str, Any], folder: Path, *options: str) -> Numbers:
    """Run a configuration as a user does, and read what it found."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["run", str(path), "--quiet", *options]) == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return {
        f"{name}, {arm}": [found[key] for key in ("value", "low", "high") if found[key] is not None]
        for name, by_arm in summary["metrics"].items()
        for arm, found in by_arm.items()
    }


def plain_run(device: str, folder: Path) -> Numbers:
    return ran(run_tree(device, folder), folder)


def rich_run(device: str, folder: Path) -> Numbers:
    """Everything that a configuration can ask for on a tiny model, beside the plain run."""
    tree = run_tree(device, folder)
    encoder = save_tiny_encoder(folder / "encoder")
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": f"P{k}?"} for k in range(3)])
    reward = {"model": "embedding", "name_or_path": encoder, "eval_model": "language_model"}
    reward |= {"eval_name_or_path": str(folder / "model"), "prefilter_frac": 0.8}
    tree["finetune"] = {"enabled": True, "epochs": 1.0}
    tree["partition"] = {
        "finetune_frac": 0.1,
        "forget_frac": 0.3,
        "preference_frac": 0.2,
        "reward_frac": 0.2,
        "evaluation_frac": 0.2,
    }
    tree["reward"] = reward
    tree["solve"] |= {"clusters": 3, "cluster_embedder": encoder, "objective": "reward", "reward_samples": 2}
    tree["solve"] |= {"reward_max_new_tokens": 4, "rounds": 1}
    tree["evaluation"] |= {
        "controls": ["random_k", "full", "lowest_reward_k", "uniform_top_k", "retrain"],
        "prompt_sets": [{"name": "attack", "path": prompts}],
        "embedder": encoder,
        "forget_rows": 4,
        "temperature": 0.7,
        "equal_ppl_frac": 0.05,
    }
    return ran(tree, folder)


def sixteen_bits(device: str, folder: Path) -> Numbers:
    """A bfloat16 base under the default attention."""
    tree = run_tree(device, folder)
    tree["model"] |= {"dtype": "bfloat16", "attention": "sdpa"}
    return ran(tree, folder)


def attacked(device: str, folder: Path) -> Numbers:
    """The attacks on what came of a run."""
    tree = run_tree(device, folder)
    tree["robustness"] = {"relearn_steps": [1, 2], "relearn_rows": 4, "measured_rows": 4}
    found = ran(tree, folder)
    assert main(["evaluate", str(folder / "config.yaml"), "--robustness", "--quiet"]) == 0
    record = json.loads((folder / "run" / "robustness.json").read_text())
    return {**found, "robustness": numbers_in(record)}


def numbers_in(tree: Any) -> list[float]:
    """Every fraction in a JSON document, in order."""
    if isinstance(tree, float):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [number for part in parts for number in numbers_in(part)]


def single_commands(device: str, folder: Path) -> Numbers:
    """A dry run, reward heads of both kinds trained, and candidates scored from plain files."""
    tree = run_tree(device, folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["run", str(path), "--dry-run", "--quiet"]) == 0
    pair_file, there = tree["data"]["pairs"], ("--set", f"model.device={device}", "--quiet")
    found = {}
    for base in (save_tiny_encoder(folder / "encoder"), tree["model"]["name_or_path"]):
        out = folder / f"head of {Path(base).name}"
        assert main(["reward", "train", "--pairs", pair_file, "--base", base, "--out", str(out), *there]) == 0
        scores = load_reward_model(str(out), device=device).score([row.prompt for row in pairs(3)], ["yes", "no", "?"])
        found[Path(base).name] = scores.tolist()
    bad = [{"prompt": f"N{k}: {TOPICS[k % 10]}?", "completion": f"never {TOPICS[k % 10]}"} for k in range(8)]
    forget, out = write_jsonl(folder / "forget.jsonl", bad), folder / "scores.jsonl"
    files = ["--forget", forget, "--prefs", pair_file, "--retain", tree["data"]["retain"], "--out", str(out)]
    assert main(["score", "--model", tree["model"]["name_or_path"], *files, *there]) == 0
    return {**found, "scores": numbers_in([json.loads(line) for line in out.read_text().splitlines()])}


def scored_by_a_classifier(device: str, folder: Path) -> Numbers:
    """Full fine-tuning, and a reward model with a classifier's head."""
    tree = run_tree(device, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=259, num_labels=1, pad_token_id=258, **sizes)).save_pretrained(
        folder / "classifier"
    )
    tiny_tokenizer(pad_is_eos=False).save_pretrained(folder / "classifier")
    tree["model"]["adapter"] = {"enabled": False}
    tree["reward"] = {"model": "sequence_classification", "name_or_path": str(folder / "classifier")}
    tree["reward"] |= {"eval_model": "none"}
    return ran(tree, folder)


def arms(device: str, folder: Path) -> Numbers:
    """Every kind of arm of an experiment that trains."""
    methods = ("full", "u2a", "guard_k", "highest_loss_k", "sft", "dpo", "kto", "rloo", "grpo", "ppo")
    model = {"name_or_path": str(folder / "model"), "device": device, "adapter": {"r": 4, "alpha": 8}}
    reward = {"model": "language_model", "name_or_path": str(folder / "model"), "eval_model": "none"}
    shares = {"forget_frac": 0.3, "preference_frac": 0.2, "reward_frac": 0.2, "evaluation_frac": 0.3}
    task = {"model": model, "reward": reward, "partition": shares}
    protocol = write_experiment(folder, {name: {"method": name} for name in methods}, task, seeds=[0])
    assert main(["experiment", str(protocol), "--quiet"]) == 0
    found = json.loads(next(folder.rglob("main.json")).read_text())
    return {"json": [float(len(found))]}


CASES: dict[str, Case] = {
    "policy": partial(measured, True),
    "policy without adapter": partial(measured, False),
    **{f"selection: {name}": partial(selected, section, {}, True) for name, section in SELECTIONS.items()},
    "selection: without adapter": partial(selected, {}, {"retain_term": "proximal"}, False),
    "selection: sgd": computed_once_more,
    "trainer: npo and nll": partial(trained, {"loss": "npo", "retain_term": "nll"}),
    "trainer: grad_diff and kl": partial(
        trained, {"loss": "grad_diff", "retain_term": "kl", "gradient_accumulation_steps": 2}
    ),
    "trainer: ga and proximal": partial(
        trained, {"loss": "ga", "retain_term": "proximal", "ppl_budget_frac": 0.01, "guard_steps": 1}
    ),
    "run": plain_run,
    "run with every extra": rich_run,
    "run with attacks on it": attacked,
    "run with a 16-bit base": sixteen_bits,
    "single commands": single_commands,
    "run with full fine-tuning and a classifier": scored_by_a_classifier,
    "experiment": arms,
}


def computed(name: str, device: str) -> Numbers | str:
    """One case's numbers, or what went wrong."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return CASES[name](device, Path(folder))
        except BaseException:
            return traceback.format_exc()


def refusals(device: str) -> Numbers:
    """Whether the device does what a GPU does with operands on two devices: 1 where it does."""
    there, here, generator = torch.ones(3, device=device), torch.ones(3), torch.Generator()
    refused: dict[str, Callable[[], Any]] = {
        "a sum": lambda: there + here,
        "a product": lambda: here @ there,
        "a change in place": lambda: here.add_(there),
        "a gathering": lambda: torch.cat([there, here]),
        "a loss": lambda: torch.nn.functional.mse_loss(there, here),
        "a vector as a number": lambda: there * here[:1],
        "a draw by the CPU's generator": lambda: torch.randn(3, device=device, generator=generator),
        "an index of the device for the CPU": lambda: here[torch.tensor([0, 2], device=device)],
        "values of the CPU put in place": lambda: there.index_put_((torch.tensor([0, 2]),), here[:2]),
        "numpy": there.numpy,
        "pinned memory": there.pin_memory,
    }
    allowed: dict[str, Callable[[], Any]] = {
        "a number": lambda: there * torch.tensor(2.0),
        "an index of the CPU": lambda: there[torch.tensor([0, 2])],
        "a copy": lambda: there.cpu() + here,
        "a copy in place": lambda: here.clone().copy_(there),
        "a way back": lambda: here.to(device) + there,
    }
    return {name: [float(_raises(act))] for name, act in refused.items()} | {
        name: [float(not _raises(act))] for name, act in allowed.items()
    }


def _raises(act: Callable[[], Any]) -> bool:
    try:
        act()
    except (RuntimeError, TypeError):
        return True
    return False


def on_the_second_device(out: Path, names: list[str]) -> None:
    """Compute cases on the second device and write them down."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "far"  # what accelerate finds by itself on a machine that has one
    torch.set_num_threads(1)
    with second_device():
        found = {"the device itself": refusals("far")} | {name: computed(name, "far") for name in names}
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    on_the_second_device(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
