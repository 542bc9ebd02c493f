"""Nested states of optimisers, schedulers and searches as safetensors and JSON: exact, and without any code in them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from u2a import disk
from u2a.errors import RecordError
from u2a.record import one_line, refuse_foreign_link


def flatten(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Turn a nested state into a JSON document, its tensors beside it.

    Containers and what JSON lacks become objects of one entry that names the kind, so that ``(1,)`` and ``[1]``, or
    the keys ``1`` and ``"1"``, stay different.

    Args:
        tree: None, booleans, integers, floats, strings and tensors in dicts (of string or integer keys), lists and
            tuples.
        tensors: receives the tensors, on the CPU, under the names that the document mentions.
        path: name of the tree, for names of tensors.

    Returns:
        The document.

    Raises:
        RecordError: something else is in the tree.

    >>> flatten({"step": (1, float("inf"))}, {})
    {'dict': [['step', {'tuple': [1, {'float': 'inf'}]}]]}
    """
    if isinstance(tree, Tensor):
        tensors[path or "value"] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path or "value"}
    if isinstance(tree, dict):
        if bad := [key for key in tree if type(key) not in (str, int)]:
            raise RecordError(f"{path}: cannot save the key {one_line(repr(bad[0]), 80)}")
        pairs = [
            [key, flatten(value, tensors, f"{path}/{number}.{key}")] for number, (key, value) in enumerate(tree.items())
        ]
        return {"dict": pairs}
    if isinstance(tree, list | tuple):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [flatten(value, tensors, f"{path}/{number}") for number, value in enumerate(tree)]}
    if isinstance(tree, float):
        return float(tree) if math.isfinite(tree) else {"float": repr(float(tree))}
    if tree is None or isinstance(tree, str | int):
        return tree
    raise RecordError(f"{path}: cannot save a {type(tree).__name__}")


def unflatten(document: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo :func:`flatten`.

    Args:
        document: what it returned.
        tensors: what it collected.

    Returns:
        The tree.

    Raises:
        RecordError: the document is not of that form.
    """
    if not isinstance(document, dict):
        if isinstance(document, list):
            raise RecordError("a saved state holds a bare list")
        return document
    match list(document.items()):
        case [("tensor", str(name))] if name in tensors:
            return tensors[name]
        case [("dict", list(pairs))] if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            return {key: unflatten(value, tensors) for key, value in pairs}
        case [("list", list(items))]:
            return [unflatten(item, tensors) for item in items]
        case [("tuple", list(items))]:
            return tuple(unflatten(item, tensors) for item in items)
        case [("float", "inf" | "-inf" | "nan" as text)]:
            return float(text)
    raise RecordError(f"a saved state holds {one_line(repr(document), 80)}")


def write_tree(folder: Path, name: str, tree: Any) -> None:
    """Write a nested state as ``NAME.json`` and ``NAME.safetensors``.

    Args:
        folder: a folder that is being written (see :func:`u2a.checkpoint.save_folder`).
        name: of the files.
        tree: the state.
    """
    tensors: dict[str, Tensor] = {}
    document = flatten(tree, tensors)
    disk.write(folder / f"{name}.json", json.dumps(document, allow_nan=False).encode())
    save_file(tensors, folder / f"{name}.safetensors")


def read_tree(folder: Path, name: str) -> Any:
    """Read what :func:`write_tree` wrote.

    Args:
        folder: a folder that was verified.
        name: of the files.

    Returns:
        The state; its tensors are on the CPU.

    Raises:
        RecordError: a file is missing or damaged.
    """
    about, path = folder / f"{name}.json", folder / f"{name}.safetensors"
    refuse_foreign_link(about)
    refuse_foreign_link(path)
    try:
        document = json.loads(about.read_text(encoding="utf-8"))
        return unflatten(document, load_file(path))
    except RecordError as error:
        raise RecordError(f"{about}: {error}; delete {folder} and run again what writes it") from None
    except Exception as error:  # a damaged file makes its readers raise anything
        reason = one_line(str(error))
        raise RecordError(f"{folder}: unreadable ({reason}); delete it and run again what writes it") from None


def tensors_id(tensors: dict[str, Tensor]) -> str:
    """Hash of tensors, every bit of them.

    Args:
        tensors: tensors by name.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read tensors that must be exactly those of a model: no name more or less, no other shape or dtype.

    Args:
        path: a safetensors file.
        like: tensors by name, as the model has them.

    Returns:
        The tensors, finite, on the CPU.

    Raises:
        RecordError: anything else; no part of it is used.
    """
    refuse_foreign_link(path)
    remedy = "delete it and run its stage again"
    try:
        found = load_file(path)
    except Exception as error:  # a damaged file makes its reader raise anything
        raise RecordError(f"{path}: not a safetensors file ({one_line(str(error))}); {remedy}") from None
    if found.keys() != like.keys():
        name = min(found.keys() ^ like.keys())
        state = "lacks" if name in like else "holds besides"
        raise RecordError(f"{path}: weights of another model, it {state} {one_line(name)!r}; {remedy}")
    for name, value in like.items():
        tensor = found[name]
        if (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
            is_, wanted = (f"{item.dtype} {list(item.shape)}" for item in (tensor, value))
            raise RecordError(f"{path}: {name}: {is_}, the model has {wanted}; {remedy}")
        if not bool(torch.isfinite(tensor).all()):
            raise RecordError(f"{path}: {name}: holds numbers that are not finite; {remedy}")
    return found
