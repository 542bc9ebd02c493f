"""Loading of the tokenizer and the model named in the options, onto the device named there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from u2a.config import ModelSection
from u2a.errors import ConfigError, ModelError
from u2a.packaged import resolve_model
from u2a.record import one_line


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer, before any model, so that a missing chat template shows at once.

    Args:
        section: the model options.

    Returns:
        The tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    path = resolve_model(section.name_or_path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # damaged files make the libraries below raise anything
        raise ModelError(
            f"model.name_or_path: no tokenizer at {section.name_or_path!r} ({_first_line(error)})"
        ) from None


def load_model(section: ModelSection) -> PreTrainedModel:
    """Load the policy's weights (safetensors only) onto its device.

    Args:
        section: the model options.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: the device is absent, the model cannot be loaded, its weights are not safetensors or not all there,
            or the directory holds an adapter.
    """
    device = pick_device(section.device)
    path = resolve_model(section.name_or_path)
    if (Path(path) / "adapter_config.json").exists():
        raise ModelError(
            f"model.name_or_path: {section.name_or_path!r} holds an adapter, whose files name a base of their own "
            "(merge it into its base, save that, and name the result)"
        )
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
            dtype="auto" if section.dtype == "auto" else getattr(torch, section.dtype),
            attn_implementation=section.attention,
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            quantization_config=quantization,
        )
    except Exception as error:  # damaged files make the libraries below raise anything
        raise ModelError(f"model.name_or_path: cannot load {section.name_or_path!r} ({_first_line(error)})") from None
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"model.name_or_path: the weights of {section.name_or_path!r} lack {len(missing)} tensors, first "
            f"{missing[0]!r}; they would be random (get the whole model)"
        )
    if quantization is None:
        nn.Module.to(model, device)
    return model.eval()


def check_adapter_layers(section: ModelSection) -> None:
    """Refuse ``adapter.layers`` that the model does not have; reads the model's configuration, not its weights.

    Args:
        section: the model options.

    Raises:
        ConfigError: a layer is out of range.
        ModelError: the model's configuration cannot be loaded.
    """
    if not section.adapter.enabled or section.adapter.layers is None:
        return
    path = resolve_model(section.name_or_path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # damaged files make the libraries below raise anything
        raise ModelError(f"model.name_or_path: cannot load {section.name_or_path!r} ({_first_line(error)})") from None
    n_layers = config.get_text_config().num_hidden_layers
    problems = [
        f"model.adapter.layers: {layer} is not a layer of the model (0 to {n_layers - 1})"
        for layer in section.adapter.layers
        if not 0 <= layer < n_layers
    ]
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
