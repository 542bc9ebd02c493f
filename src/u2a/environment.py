"""``u2a env``: what a bug report needs - versions, machine, threads - and nothing private.

No path, host name, user name or value of an environment variable is shown, and nothing heavy is imported.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from u2a import __version__
from u2a.terminal import escaped

# Their names are shown when they are set, because they change what a run does; their values never are.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS", "NO_COLOR", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE", "U2A_CACHE",
)  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
EXTRA = re.compile(r"extra\s*==\s*[\"']([^\"']+)[\"']")
GPU_QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def environment() -> list[tuple[str, str]]:
    """Describe this installation and machine.

    Returns:
        Names and values in a fixed order: Python, platform, processor, memory, GPU, variables, packages.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        ("u2a", __version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
        ("processor", _processor()),
        ("cores", f"{cores} of {os.cpu_count()} usable"),
        ("memory", _memory()),
        ("encoding", f"text {locale.getpreferredencoding(False)}, file names {sys.getfilesystemencoding()}"),
        ("GPU", _gpus()),
        ("torch built for", _torch_build()),
        ("variables set", ", ".join(name for name in VARIABLES if name in os.environ) or "none"),
    ]
    return [*rows, *_packages()]


def environment_text() -> str:
    """Return :func:`environment` as aligned lines, ready to paste into a bug report.

    Returns:
        Text that ends with a line feed.
    """
    rows = environment()
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {escaped(value)}\n" for name, value in rows)


def machine_text() -> str:
    """Name the machine in one line, for tables of results.

    Returns:
        Processor, usable cores, memory and GPU where there is one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = _gpus()
    return f"{_processor()}, {cores} cores, {_memory()}" + ("" if gpu.startswith("none") else f", {gpu}")


def code_text() -> str:
    """Name the sources of this package, for tables of results: two results of one name come from the same code.

    Returns:
        8 hexadecimal digits of a hash over all its modules.
    """
    digest = hashlib.blake2b(digest_size=4)
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def libraries_text() -> str:
    """Name the libraries that results depend on, in one line.

    Returns:
        Names with versions; what is not installed is left out.
    """
    found = []
    for name in ("torch", "transformers", "peft", "trl"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine() or "unknown"


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "unknown"
    return f"{size / 2**30:.1f} GiB"


def _gpus() -> str:
    """Ask NVIDIA's tool, which is quicker than starting CUDA."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none found (no nvidia-smi)"
    try:
        done = subprocess.run([tool, *GPU_QUERY], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not answer"
    text = done.stdout.decode("utf-8", "replace")
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or "none"


def _torch_build() -> str:
    """Read the accelerator that torch was built for from its version file, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "torch is not installed"
    try:
        tree = ast.parse((Path(next(iter(spec.submodule_search_locations))) / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return "unknown"
    values: dict[str, str] = {}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant) and node.value.value:
            values |= {target.id: str(node.value.value) for target in targets if isinstance(target, ast.Name)}
    found = [
        f"{name.upper() if name == 'cuda' else 'ROCm'} {values[name]}" for name in ("cuda", "hip") if name in values
    ]
    return ", ".join(found) or "CPU only"


def _packages() -> list[tuple[str, str]]:
    try:
        requirements = metadata.requires("u2a") or []
    except metadata.PackageNotFoundError:
        return [("packages", "u2a is not installed as a package (pip install -e .)")]
    return requirement_rows(requirements)


def requirement_rows(requirements: Sequence[str]) -> list[tuple[str, str]]:
    """Look up the installed versions of requirements.

    Args:
        requirements: as in a package's metadata, for example ``gguf>=0.10; extra == "demo"``.

    Returns:
        Package and version, ``not installed`` where it is absent; packages of an extra name it. Each package once.
    """
    rows: dict[str, str] = {}
    for requirement in requirements:
        name, extra = NAME.match(requirement), EXTRA.search(requirement)
        if name is None or name[0] == "u2a" or name[0] in rows:
            continue
        try:
            version = metadata.version(name[0])
        except metadata.PackageNotFoundError:
            version = "not installed"
        rows[name[0]] = version + (f" (extra {extra[1]})" if extra else "")
    return list(rows.items())
