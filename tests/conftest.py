"""Settings of all tests: no network, one thread, and a hypothesis profile that gives the same cases every time."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("u2a", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("u2a")


def pytest_collection_finish() -> None:
    """Keep the garbage collector off the imported libraries: every training run collects, and they are large."""
    gc.collect()
    gc.freeze()
