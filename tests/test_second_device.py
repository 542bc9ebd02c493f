"""Everything is computed on the device it is told to use, and nothing on a mixture of two.

No test machine has a GPU, so a second device is played by the CPU's memory (second_device.py), in a process of its own.
What comes out must be what the CPU says.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

import device_cases
from device_cases import CASES, computed

if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch cannot have a device written in Python", allow_module_level=True)

LONG = {name for name in CASES if name.startswith(("run ", "experiment"))}
pytestmark = pytest.mark.timeout(1200)
FOLDER = Path(__file__).parent


def there(names: list[str], folder: Path) -> dict[str, device_cases.Numbers | str]:
    """Compute cases on the second device, in a process of its own."""
    out = folder / "found.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(FOLDER / "device_cases.py"), str(out), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, device_cases.Numbers | str]:
    return there([name for name in CASES if name not in LONG], tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, device_cases.Numbers | str]:
    return there(sorted(LONG), tmp_path_factory.mktemp("long"))


def assert_same(name: str, found: device_cases.Numbers | str) -> None:
    assert isinstance(found, dict), found
    here = computed(name, "cpu")
    tolerance = 0.1 if "16-bit" in name else 0.01  # other kernels round otherwise, and differences double that
    assert isinstance(here, dict), here
    assert found.keys() == here.keys() and any(here.values())
    for key, values in here.items():
        assert len(found[key]) == len(values), key
        distance, size = math.dist(found[key], values), math.hypot(*values)
        assert distance <= tolerance * size + 1e-6, f"{key}: {found[key]} for {values}"


def test_the_device_refuses_what_a_gpu_refuses(short: dict[str, device_cases.Numbers | str]) -> None:
    assert set(map(tuple, short["the device itself"].values())) == {(1.0,)}, short["the device itself"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in LONG])
def test_numbers_there_are_those_of_the_cpu(name: str, short: dict[str, device_cases.Numbers | str]) -> None:
    assert_same(name, short[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LONG))
def test_whole_commands_there_find_what_they_find_on_the_cpu(
    name: str, long: dict[str, device_cases.Numbers | str]
) -> None:
    assert_same(name, long[name])
