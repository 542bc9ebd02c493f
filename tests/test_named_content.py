"""A stage is computed again when what lies behind a name has changed, though the name has not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from e2e.conftest import tiny_config, tiny_files  # noqa: F401  # fixtures
from tiny import save_tiny
from u2a import named_content as module
from u2a.config_file import load_config
from u2a.named_content import named_content
from u2a.pipeline import Pipeline
from u2a.progress import Console


def test_a_changed_embedder_of_clusters_is_searched_with_again(
    tiny_config: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    def key(*options: str) -> str:
        named = [f"solve.cluster_embedder={tmp_path / 'embedder'}", "reward.model=none", *options]
        return Pipeline(load_config(tiny_config(), named, None), Console(quiet=True))._solve_key

    save_tiny(tmp_path / "embedder", seed=1)
    pooled, plain = key("solve.clusters=3"), key()
    assert key("solve.clusters=3") == pooled
    save_tiny(tmp_path / "embedder", seed=2)
    assert key("solve.clusters=3") != pooled
    assert key() == plain, "it is not read where gains are not pooled"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose file counts as large: a megabyte, sampled at twelve kilobytes."""
    monkeypatch.setattr(module, "WHOLE_BYTES", 2**16)
    monkeypatch.setattr(module, "SAMPLES", 3)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 2**12)
    return tmp_path


@pytest.mark.parametrize("changed", ["b_head", "a", "c"])
def test_every_tensor_of_a_large_file_is_looked_at(large: Path, changed: str) -> None:
    tensors = {name: np.zeros(130_000, np.float32) for name in ("a", "c")} | {"b_head": np.zeros((1, 16), np.float32)}
    save_file(tensors, large / "model.safetensors")
    before = named_content(str(large))
    assert named_content(str(large)) == before
    tensors[changed] = tensors[changed] + 1
    save_file(tensors, large / "model.safetensors")
    assert named_content(str(large)) != before


def test_a_large_file_that_only_is_called_safetensors_is_sampled(large: Path) -> None:
    for start in (b"\xff" * 8, (4).to_bytes(8, "little") + b"[1,]", (2).to_bytes(8, "little") + b"[]"):
        (large / "model.safetensors").write_bytes(start + bytes(2**20))
        before = named_content(str(large))
        (large / "model.safetensors").write_bytes(start + bytes(2**20 - 1) + b"x")
        assert before and named_content(str(large)) != before
    header = json.dumps({"a": {"data_offsets": [-(10**9), 5]}}).encode()
    (large / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2**20))
    assert named_content(str(large))
