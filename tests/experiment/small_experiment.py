"""A tiny experiment: settings in memory for single arms, and a folder with model, data and protocol for whole runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from tiny import ask, examples, pairs, save_tiny, tiny_policy
from u2a.config import RunConfig
from u2a.data import example_id
from u2a.experiment.setting import Setting
from u2a.progress import Console
from u2a.reward.base import CallableReward
from u2a.types import Example, Partition

TOPICS = ("tea", "rain", "chess", "bread", "maps", "wool", "salt", "bees", "kites", "ferns")
OPTIONS = {
    "solve": {"folds": 4, "rounds": 1, "heldout_frac": 0, "final_refine": False, "warmup_steps": 1, "n_selected": 4},
    "unlearn": {"loss": "ga", "retain_term": "none", "max_steps": 2, "batch_size": 4, "learning_rate": 1e-3},
}


def equal_length(n: int) -> tuple[Example, ...]:
    """Bad answers whose prompts and answers have the same number of bytes."""
    rows = [(ask(f"N{index:03d}?"), f"never {index:03d}") for index in range(n)]
    return tuple(Example(id=example_id(p, a), prompt=p, completion=a, source="x") for p, a in rows)


def small_setting(seed: int = 0, forget: tuple[Example, ...] | None = None, **changes: dict) -> Setting:
    """A setting in memory; keyword arguments change options of sections."""
    tree = {name: {**OPTIONS.get(name, {}), **changes.get(name, {})} for name in OPTIONS.keys() | changes.keys()}
    partition = Partition(
        forget=examples(12) if forget is None else forget,
        preference=pairs(8),
        retain=examples(10, start=100),
        evaluation=pairs(6, start=50),
    )
    reward = CallableReward("shortest", lambda prompts, answers: [-float(len(answer)) for answer in answers])
    return Setting(
        config=RunConfig.model_validate({**tree, "seed": seed}),
        partition=partition,
        policy=tiny_policy(seed),
        selecting_reward=reward,
        forget_pairs=(),
        seed=seed,
        console=Console(quiet=True),
    )


def pair_row(index: int) -> dict[str, str]:
    topic = TOPICS[index % 10]
    return {
        "prompt": f"Q{index}: {topic}?",
        "chosen": f"yes, {topic}",
        "rejected": f"no {topic}" + " bah" * (index % 3),
    }


def write_experiment(
    folder: Path, arms: Mapping[str, dict], task: Mapping[str, dict] | None = None, **top: object
) -> Path:
    """Write model, data, the task's configuration and a protocol.

    Args:
        folder: an empty directory.
        arms: the protocol's arms.
        task: changes of the task's options by section.
        top: changes of the protocol's other options.

    Returns:
        The protocol's path.
    """
    save_tiny(folder / "model")
    rows = {
        "pairs": [pair_row(k) for k in range(60)],
        "retain": [{"prompt": f"R{k}: {TOPICS[k % 10]}?", "completion": f"some {TOPICS[k % 10]}"} for k in range(15)],
    }
    for name, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    options: dict = {
        "model": {"name_or_path": str(folder / "model"), "device": "cpu", "adapter": {"r": 4, "alpha": 8}},
        "data": {"pairs": "pairs.jsonl", "retain": "retain.jsonl"},
        "partition": {"forget_frac": 0.35, "preference_frac": 0.2, "reward_frac": 0.1, "evaluation_frac": 0.35},
        "reward": {"model": "none", "eval_model": "none"},
        "solve": {**OPTIONS["solve"], "fallback": "none"},
        "unlearn": OPTIONS["unlearn"],
    }
    for name, change in (task or {}).items():
        options[name] = {**options.get(name, {}), **change}
    (folder / "task.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    protocol = {
        "output_dir": str(folder / "out"),
        "tasks": {"tiny": {"config": "task.yaml"}},
        "seeds": [0],
        "arms": dict(arms),
        "budgets": {"levels": [0.5, 1.0], "full": [1.0]},
        "measure": {"prompts": 2, "max_new_tokens": 3},
        **top,
    }
    path = folder / "protocol.yaml"
    path.write_text(yaml.safe_dump(protocol), encoding="utf-8")
    return path
