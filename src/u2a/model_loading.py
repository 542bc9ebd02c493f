"""Loading of the tokenizer and the model named in the options, onto the device named there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from u2a.adapter import add_adapter
from u2a.config import ModelSection
from u2a.errors import ConfigError, ModelError
from u2a.packaged import resolve_model
from u2a.record import one_line


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer, before any model, so that a template that is missing or does not work shows at once.

    Args:
        section: the model options.

    Returns:
        The tokenizer.

    Raises:
        ModelError: it cannot be loaded, or its chat template fails on one question.
    """
    name = f"model.name_or_path: {section.name_or_path!r}"
    path = resolve_model(section.name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # damaged files make the libraries below raise anything
        raise ModelError(
            f"model.name_or_path: no tokenizer at {section.name_or_path!r} ({_first_line(error)})"
        ) from None
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = _with_options(tokenizer.chat_template, section.template_options)
    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except Exception as error:  # a template is a program of the model's author, run in a sandbox
            raise ModelError(f"{name} has a chat template that fails ({_first_line(error)})") from None
    return tokenizer


def _with_options(template: str, options: Mapping[str, bool | int | float | str]) -> str:
    """Set variables of a template in its first lines, so that whatever renders it later has them as well."""
    wrong = [name for name in options if not name.isidentifier()]
    if wrong:
        raise ModelError(one_line(f"model.template_options: {wrong[0]!r} is no name of a variable"))
    return "".join(f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in options.items()) + template


def load_model(section: ModelSection) -> PreTrainedModel:
    """Load the policy's weights (safetensors only) onto its device.

    Args:
        section: the model options.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: the device is absent, the model cannot be loaded, its weights are not safetensors or not exactly
            those of its architecture, or the directory holds an adapter.
    """
    device = pick_device(section.device)
    name = f"model.name_or_path: {section.name_or_path!r}"
    path = resolve_model(section.name_or_path)
    _check_files(Path(path), name)
    quantization = None
    if section.load_in_4bit:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
        model, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, as asked for
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            dtype="auto" if section.dtype == "auto" else getattr(torch, section.dtype),
            attn_implementation=section.attention,
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            quantization_config=quantization,
        )
    except Exception as error:  # damaged files make the libraries below raise anything
        raise ModelError(f"model.name_or_path: cannot load {section.name_or_path!r} ({_first_line(error)})") from None
    _check_loaded(found, name)
    if quantization is None:
        nn.Module.to(model, device)
    return model.eval()


def load_pretrained(
    kind: Any, name_or_path: str, what: str, dtype: torch.dtype | str, may_lack: tuple[str, ...] = ()
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model that is only read, for example a reward model, with its tokenizer; its own code is never run.

    Args:
        kind: a class of transformers with ``from_pretrained``.
        name_or_path: hub id, directory, or ``package:NAME``.
        what: what the model is, for messages.
        dtype: dtype of the weights, or ``auto``.
        may_lack: beginnings of the names of weights that are not used and may be missing.

    Returns:
        The model in evaluation mode, on the CPU, and the tokenizer.

    Raises:
        ModelError: it cannot be loaded, or its weights are not safetensors or not exactly those of its architecture.
    """
    name = f"{what} {name_or_path!r}"
    path = resolve_model(name_or_path)
    _check_files(Path(path), name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, found = kind.from_pretrained(
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # damaged files make the libraries below raise anything
        raise ModelError(f"{name}: cannot be loaded ({_first_line(error)})") from None
    _check_loaded(found, name, may_lack)
    return model.eval(), tokenizer


def _check_files(folder: Path, name: str) -> None:
    """Refuse a directory whose files lead to other ones: an adapter to its base, an index out of the directory."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{name} holds an adapter, whose files name a base of their own (merge it into its base, save that, and "
            "name the result)"
        )
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except Exception as error:  # it may hold anything
        raise ModelError(f"{name}: {index.name} is damaged ({type(error).__name__})") from None
    for shard in shards:
        plain = isinstance(shard, str) and shard == Path(shard).name and shard.endswith(".safetensors")
        if not plain:
            raise ModelError(f"{name}: {index.name} names {one_line(repr(shard), 80)}, no safetensors file beside it")


def _check_loaded(found: dict[str, Any], name: str, may_lack: tuple[str, ...] = ()) -> None:
    """Refuse weights that transformers would have replaced by random ones."""
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(may_lack))
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} weights of its architecture, first {missing[0]!r}; they would be random "
            "(get the whole model)"
        )
    for key, given, wanted in sorted(found["mismatched_keys"]):
        raise ModelError(f"{name}: {key} has the shape {list(given)}, its config.json means {list(wanted)}")


def shapes_of(section: ModelSection, seed: int = 0) -> nn.Module:
    """Make the policy's model on the meta device: shapes without weights, from its configuration alone.

    Args:
        section: the model options.
        seed: seed of the adapter.

    Returns:
        The model, with its adapter where it gets one.

    Raises:
        ModelError: the model's configuration cannot be read, or no adapter fits it.
    """
    model = _bare_shapes(section)
    if not section.adapter.enabled:
        return model.requires_grad_(True)
    with torch.device("meta"):
        return add_adapter(model, section.adapter, seed)


def _bare_shapes(section: ModelSection) -> PreTrainedModel:
    path = resolve_model(section.name_or_path)
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
        dtype = getattr(settings, "dtype", None) or torch.float32 if section.dtype == "auto" else section.dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                settings, dtype=dtype, attn_implementation="eager", trust_remote_code=section.trust_remote_code
            )
    except Exception as error:  # damaged files make the libraries below raise anything
        raise ModelError(f"model.name_or_path: cannot load {section.name_or_path!r} ({_first_line(error)})") from None


def check_adapter(section: ModelSection) -> None:
    """Refuse ``adapter.layers`` and ``adapter.target_modules`` that the model does not have, without its weights.

    Args:
        section: the model options.

    Raises:
        ConfigError: a layer is out of range, or a name matches no module (peft passes over it in silence).
        ModelError: the model's configuration cannot be loaded, or peft puts no adapter on such modules.
    """
    layers, targets = section.adapter.layers, section.adapter.target_modules
    if not section.adapter.enabled or (layers is None and targets == "all-linear"):
        return
    model = _bare_shapes(section)
    n_layers = model.config.get_text_config().num_hidden_layers
    problems = [
        f"model.adapter.layers: {layer} is not a layer of the model (0 to {n_layers - 1})"
        for layer in layers or ()
        if not 0 <= layer < n_layers
    ]
    if isinstance(targets, list):  # a text is a pattern, which peft itself refuses where it matches nothing
        names = [f".{name}" for name, _ in model.named_modules()]
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, part in _linear(model)}))
        problems += [
            f"model.adapter.target_modules: {target!r} is no module of the model (its linear ones: {known})"
            for target in targets
            if not any(name.endswith(f".{target}") for name in names)
        ]
    if problems:
        raise ConfigError(problems)
    with torch.device("meta"):
        add_adapter(model, section.adapter, 0)


def _linear(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]


def check_packages(section: ModelSection) -> None:
    """Refuse a quantised base or an attention kernel whose package is missing, which loading would meet.

    Args:
        section: the model options.

    Raises:
        ConfigError: it is not installed.
    """
    problems = []
    if section.load_in_4bit and find_spec("bitsandbytes") is None:
        problems.append("model.load_in_4bit: needs the package bitsandbytes (pip install bitsandbytes, or set false)")
    kernels = ("flash_attn", "kernels")  # transformers takes either
    if section.attention == "flash_attention_2" and all(find_spec(name) is None for name in kernels):
        problems.append(
            "model.attention: flash_attention_2 needs the package flash-attn (pip install flash-attn, or set sdpa)"
        )
    if problems:
        raise ConfigError(problems)


def pick_device(name: str) -> torch.device:
    """Turn the option ``model.device`` into a device that exists.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Returns:
        The device.

    Raises:
        ModelError: unknown or absent device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"model.device: {name!r} is not available ({_first_line(error)})") from None
    return device


def _first_line(error: BaseException) -> str:
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])
