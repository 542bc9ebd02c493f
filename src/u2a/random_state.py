"""State of the global random generators as a JSON document."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Read the generators of Python, numpy and torch (and of the CUDA device in use).

    Returns:
        Their states as a JSON document.
    """
    version, words, gauss = random.getstate()
    numbers = np.random.get_state(legacy=False)  # noqa: NPY002 (the global one)
    assert isinstance(numbers, dict)
    words_of_numpy = numbers["state"]
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": [version, list(words), gauss],
        "numpy": {**numbers, "state": {"key": words_of_numpy["key"].tolist(), "pos": int(words_of_numpy["pos"])}},
        "torch": _hexadecimal(torch.get_rng_state()),
        "cuda": _hexadecimal(torch.cuda.get_rng_state()) if on_device else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back.

    Args:
        state: what :func:`random_state` gave.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    words_of_numpy = state["numpy"]["state"]
    key = np.array(words_of_numpy["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": key, "pos": words_of_numpy["pos"]}})  # noqa: NPY002
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _hexadecimal(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
