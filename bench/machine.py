"""What a figure was measured on: machine, cores, threads, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("u2a", "torch", "transformers", "peft", "numpy")


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, object]:
    """Processor, cores, threads, load, the commit and, where one is used, the accelerator."""
    found: dict[str, object] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "load_1min": round(os.getloadavg()[0], 2),
        "device": device,
        "commit": commit(),
    }
    if device.startswith("cuda"):
        found["accelerator"] = torch.cuda.get_device_name(torch.device(device))
    return found


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Python's version and those of packages; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: installed(name) for name in packages}


def installed(package: str) -> str | None:
    """Version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit, with a mark if files differ from it; None without git."""

    def ask(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, check=True)
        return done.stdout.decode("utf-8", "replace").strip()

    try:
        return ask("rev-parse", "HEAD") + (" and changes" if ask("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
