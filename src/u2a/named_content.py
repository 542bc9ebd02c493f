"""What a model's name stands for: a local folder's files may change while its name stays."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from u2a.config import RunConfig
from u2a.modeling import weights_fingerprint
from u2a.record import content_id

WHOLE_BYTES = 64 * 2**20  # larger files are sampled
SAMPLES, SAMPLE_BYTES = 256, 64 * 2**10
TENSOR_SAMPLES, TENSOR_SAMPLE_BYTES = 16, 16 * 2**10  # of every tensor; a smaller one is read whole
MODEL_NAMES = {  # options that name a model
    "model": ("name_or_path",),
    "reward": ("name_or_path", "eval_name_or_path", "second_name_or_path"),
    "solve": ("cluster_embedder",),
    "evaluation": ("embedder",),
}
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".gguf")


def named_content(name: str | None) -> str:
    """Hash what lies in a file or a local model folder.

    Args:
        name: a path, a hub id or another name.

    Returns:
        Hash of names and contents of the files a model is loaded from, or of the one file; an empty text for a name
        behind which nothing lies here. Files above 64 MiB are sampled: of safetensors the header, tensors of up to
        256 KiB and 16 samples of each larger one are read, of others the size and 256 samples.
    """
    place = Path(name) if name else None
    if place is None or not place.exists():
        return ""
    inside = sorted(place.iterdir()) if place.is_dir() else None
    files = [place] if inside is None else [path for path in inside if path.suffix in SUFFIXES and path.is_file()]
    stats = [(path, path.stat()) for path in files]
    return content_id(
        *(part for path, stat in stats for part in (path.name, _digest(path, stat.st_mtime_ns, stat.st_size)))
    )


def with_lasting_names(config: RunConfig) -> RunConfig:
    """Name every local model, and the file of paraphrases, so that the names hold from every working directory.

    Args:
        config: all options.

    Returns:
        The options with absolute paths for what lies in the file system; hub ids and packages are as they were.
    """
    names = MODEL_NAMES | {"robustness": ("paraphrases",)}
    changes = {}
    for section, options in names.items():
        old = getattr(config, section)
        places = {option: Path(name).absolute() for option in options if (name := getattr(old, option))}
        found = {option: str(place) for option, place in places.items() if place.exists()}
        changes[section] = old.model_copy(update=found)
    return config.model_copy(update=changes)


def model_identity(name: str, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tell models apart that are called alike.

    Args:
        name: of the model.
        model: passed as an object, or None.
        tokenizer: its tokenizer.

    Returns:
        Hash of the weights (of the files behind a path; nothing for a hub id), chat template, and tokens of a sentence.
    """
    weights = named_content(name) if model is None else weights_fingerprint(model)
    tokens = tokenizer("A few words, 12 numbers (and so on).\n")["input_ids"]
    return [weights, str(tokenizer.chat_template), str(tokens)]


def judging_content(config: RunConfig) -> list[str]:
    """Hash what lies behind the names of the evaluation's reward models and its embedder.

    Args:
        config: options.

    Returns:
        As :func:`named_content`, for each.
    """
    names = (config.reward.eval_name_or_path, config.reward.second_name_or_path, config.evaluation.embedder)
    return [named_content(name) for name in names]


def clustering_content(config: RunConfig) -> list[str]:
    """Hash what lies behind the name of the embedder by which gains are pooled.

    Args:
        config: options.

    Returns:
        As :func:`named_content`; empty where there is none, or no folder behind its name.
    """
    found = named_content(config.solve.cluster_embedder) if config.solve.clusters else ""
    return [found] if found else []


@lru_cache(maxsize=256)
def _digest(path: Path, changed_ns: int, size: int) -> str:
    """Hash a file, once as long as it does not change."""
    found = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as stream:
        for start, length in [(0, size)] if size <= WHOLE_BYTES else _samples(path, stream, size):
            stream.seek(start)
            found.update(stream.read(length))
    return found.hexdigest()


def _samples(path: Path, stream: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Places and lengths of what is read of a large file: of a file of tensors a part of each."""
    spread = _spread(0, size, SAMPLES, SAMPLE_BYTES)
    if path.suffix != ".safetensors":
        return spread
    try:
        start = 8 + int.from_bytes(stream.read(8), "little")
        tensors = json.loads(stream.read(min(start, size) - 8))
        spans = [each["data_offsets"] for name, each in sorted(tensors.items()) if name != "__metadata__"]
        if all(0 <= a <= b <= size - start for a, b in spans):
            return [(0, start), *(part for a, b in spans for part in _tensor(start + a, start + b))]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # no such file, whatever its name
        pass
    return spread


def _tensor(start: int, end: int) -> list[tuple[int, int]]:
    if end - start <= TENSOR_SAMPLES * TENSOR_SAMPLE_BYTES:
        return [(start, end - start)]
    return _spread(start, end, TENSOR_SAMPLES, TENSOR_SAMPLE_BYTES)


def _spread(start: int, end: int, count: int, length: int) -> list[tuple[int, int]]:
    """Samples of equal distance, the first and the last byte among them."""
    return [(start + (end - start - length) * k // (count - 1), length) for k in range(count)]
