"""How much memory is free: the host's as far as a container's limits let this process have it, and a GPU's."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")


def host_free_bytes(proc: Path = PROC, groups: Path = GROUPS) -> int | None:
    """Return the memory that this process can still take on the host.

    Args:
        proc: where the kernel describes memory and processes.
        groups: where the control groups are mounted (version 1 or 2).

    Returns:
        Bytes: the least of what the system has available and of what every limit on this process leaves. Cached
        files that the kernel would give up count as free. None where the system does not tell.
    """
    found = [value for value in (_available(proc), *_left_by_limits(proc, groups)) if value is not None]
    return max(0, min(found)) if found else None


def _available(proc: Path) -> int | None:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _left_by_limits(proc: Path, groups: Path) -> list[int]:
    """What the limits of this process's groups, and of the groups around them, leave."""
    left = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):  # a container may see its own group as the root
            if group == root.parent:
                break
            value = _left(group, *names)
            if value is not None:
                left.append(value)
    return left


def _left(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Limit less usage, without the cached files; None without a limit."""
    limit, usage = _number(group / limit_name), _number(group / usage_name)
    if limit is None or usage is None:
        return None
    rows = (line.split() for line in _read(group / "memory.stat").splitlines())
    cached = next((int(row[1]) for row in rows if len(row) == 2 and row[0] == cache_name), 0)
    return limit - usage + cached


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def resident_bytes(proc: Path = PROC) -> int:
    """Return the memory that this process holds.

    Args:
        proc: where the kernel describes processes.

    Returns:
        Resident bytes; 0 where the system does not tell.
    """
    for line in _read(proc / "self" / "status").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def device_free_bytes(device: str) -> int | None:
    """Return the free memory of the device that holds the model.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``, as torch names it.

    Returns:
        Bytes; of a GPU what the driver calls free, else :func:`host_free_bytes`.
    """
    if not device.startswith("cuda"):
        return host_free_bytes()
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])
