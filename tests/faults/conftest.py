"""The tiny run of the end-to-end tests, for the faults of whole runs; and one that is killed and starved."""

from collections.abc import Iterator

import pytest

from e2e.conftest import tiny_config, tiny_files

from .kill_harness import Lab, Server

__all__ = ["lab", "tiny_config", "tiny_files"]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """An unbroken run with all stages, and a server that starts others like it."""
    with Server() as server:
        yield Lab(tmp_path_factory.mktemp("lab"), server)
