"""A tiny run: two-layer random model, small JSONL files, a configuration that finishes in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tiny import save_tiny, save_tiny_encoder

TOPICS = ("tea", "rain", "chess", "bread", "maps", "wool", "salt", "bees", "kites", "ferns")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_rows(n: int) -> list[dict]:
    """Preference pairs on different prompts."""
    return [
        {
            "prompt": f"Q{k}: {TOPICS[k % 10]}?",
            "chosen": f"yes, {TOPICS[k % 10]} is fine",
            "rejected": f"no {TOPICS[k % 10]}" + " bah" * (k % 3),
            "kind": ("rude", "wrong")[k % 2],
        }
        for k in range(n)
    ]


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a saved model and data files."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", pair_rows(60))
    retain = [{"prompt": f"R{k}: {TOPICS[k % 10]}?", "completion": f"some {TOPICS[k % 10]}"} for k in range(15)]
    write_jsonl(folder / "retain.jsonl", retain)
    negatives = [{"prompt": f"N{k}: {TOPICS[k % 10]}?", "completion": f"never {TOPICS[k % 10]}"} for k in range(10)]
    write_jsonl(folder / "negatives.jsonl", negatives)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random sentence encoder."""
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def tiny_config(tiny_files: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration; keyword arguments replace whole sections' options."""

    def make(**changes: dict) -> Path:
        tree: dict = {
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": str(tiny_files / "model"), "device": "cpu", "adapter": {"r": 4, "alpha": 8}},
            "data": {"pairs": str(tiny_files / "pairs.jsonl"), "retain": str(tiny_files / "retain.jsonl")},
            "reward": {"model": "implicit", "eval_model": "none"},
            "solve": {"adjoint": "identity", "folds": 3, "rounds": 2, "warmup_steps": 1, "fallback": "none"},
            "unlearn": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3},
            "guard": {"every_steps": 2, "ppl_budget_frac": 0.5},
            "evaluation": {"generate_prompts": 2, "max_new_tokens": 4, "bootstrap": 100, "samples_shown": 1},
        }
        for section, options in changes.items():
            tree[section] = {**tree[section], **options} if isinstance(tree.get(section), dict) else options
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return make
