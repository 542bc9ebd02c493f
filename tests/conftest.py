"""Settings of all tests: no network, one thread, and a hypothesis profile that gives the same cases every time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

import offline

settings.register_profile("u2a", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("u2a")


def pytest_collection_finish() -> None:
    """Keep the garbage collector off the imported libraries: every training run collects, and they are large."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """Block the network, unless the tests that need it were asked for."""
    if "network" not in config.getoption("markexpr").replace("not network", ""):
        offline.block_network()


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    """Fail a test that tried to reach another machine, even where the attempt was caught and forgotten."""
    offline.ATTEMPTS.clear()
    yield
    assert not offline.ATTEMPTS, f"the network was tried: {offline.ATTEMPTS}"
