"""Loading of the tokenizer and the model named in the options, onto the device named there."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from u2a.config import ModelSection
from u2a.errors import ConfigError, ModelError
from u2a.packaged import resolve_model


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
    except (OSError, ValueError) as error:
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
        ModelError: it cannot be loaded, or its weights are not safetensors.
    """
    path = resolve_model(section.name_or_path)
    quantization = None
    if section.load_in_4bit:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto" if section.dtype == "auto" else getattr(torch, section.dtype),
            attn_implementation=section.attention,
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            quantization_config=quantization,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model.name_or_path: cannot load {section.name_or_path!r} ({_first_line(error)})") from None
    if quantization is None:
        nn.Module.to(model, pick_device(section.device))
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
    except (OSError, ValueError) as error:
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
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
