"""The same scores whatever the number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from score_worker import SCORERS, score

from tiny import examples

WORKER = Path(__file__).with_name("score_worker.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed support")
def test_two_processes_share_the_batches_and_both_hold_the_scores_of_one(tmp_path: Path) -> None:
    paths = f"{WORKER.parents[1]}{os.pathsep}{WORKER.parent}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [[sys.executable, str(WORKER), str(rank), str(tmp_path)] for rank in (0, 1)]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in words]
    one = score(tmp_path)
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert set(one) == {text for name in SCORERS for text in (name, f"{name} losses")}
    for name, value in one.items():
        assert float(value.abs().min()) > 0.0
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-12)
        assert torch.equal(first[name], second[name]), "every process holds the same numbers"
    for rank in (0, 1):
        assert json.loads((tmp_path / f"broken{rank}.json").read_text()) == [examples(9)[4].id]
