"""The same update whatever the number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("distributed_worker.py")


def train(launcher: list[str], batch_size: int, path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(WORKER.parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *launcher, str(WORKER), str(batch_size), str(path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed support")
def test_two_processes_make_the_same_update_as_one(tmp_path: Path) -> None:
    """Two processes of two rows each equal one process of four rows, forget and retain rows alike."""
    assert "processes: 1" in train([], 4, tmp_path / "one.safetensors")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert "processes: 2" in train(launcher, 2, tmp_path / "two.safetensors")
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert max(float(value.abs().max()) for value in one.values()) > 1e-3, "something was trained"
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed support")
def test_two_processes_go_on_from_their_checkpoint(tmp_path: Path) -> None:
    """Bit for bit, with a loss that is logged across the checkpoint; each process has its own generators in it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = str(WORKER.with_name("resume_worker.py"))
    environment = os.environ | {"PYTHONPATH": str(WORKER.parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *launcher, worker, str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert len(whole["losses"]) == 1
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert len(dict(state["dict"])["processes"]["list"]) == 2
