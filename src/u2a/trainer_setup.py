"""What the trainer is given, turned into a policy on its device with a guard; what could only be ignored is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from u2a.config import AdapterConfig, GuardSection, ModelSection
from u2a.encoding import Encoded
from u2a.errors import ConfigError, ModelError
from u2a.guard import CollapseGuard
from u2a.model_loading import load_model, load_tokenizer
from u2a.modeling import Policy
from u2a.record import content_id
from u2a.trainer_config import UnlearnConfig


def check_models(
    model: str | PreTrainedModel | Policy, ref_model: Any, peft_config: LoraConfig | None, args: UnlearnConfig
) -> None:
    """Refuse what could only be ignored, before the model is changed.

    Args:
        model: hub id or path, a model, or a policy.
        ref_model: model of the reference, or None.
        peft_config: LoRA settings, or None.
        args: arguments of the trainer.

    Raises:
        ConfigError: options in conflict.
    """
    _refuse_sharding(args)
    full = not model.has_adapter if isinstance(model, Policy) else args.full_finetuning
    if isinstance(model, Policy) and (peft_config is not None or (args.full_finetuning and not full)):
        raise ConfigError("model: a Policy has its adapter already (leave out peft_config and full_finetuning)")
    if full and peft_config is not None:
        raise ConfigError("args.full_finetuning conflicts with peft_config (give one of them)")
    if ref_model is not None and not isinstance(ref_model, nn.Module):
        raise ConfigError(f"ref_model: expected a loaded model, got {type(ref_model).__name__}")
    if ref_model is not None and ref_model is (model.model if isinstance(model, Policy) else model):
        raise ConfigError("ref_model is the model that is trained (leave it out, or load it once more)")
    if args.retain_term == "kl" and full and ref_model is None:
        raise ConfigError("retain_term 'kl' with full fine-tuning needs ref_model (with an adapter it does not)")


def _refuse_sharding(args: UnlearnConfig) -> None:
    """Guard, reference, checkpoints and the saved adapter read whole parameters, of which a shard holds a part."""
    asked = {
        "FSDP": args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"),
        "DeepSpeed": args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
    }
    for name, value in asked.items():
        if value:
            raise ConfigError(
                f"{name}: training with sharded parameters is not supported (launch with DDP: accelerate launch "
                "--multi_gpu; one GPU must hold the model)"
            )


def policy_of(
    model: str | PreTrainedModel | Policy,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: LoraConfig | None,
    args: UnlearnConfig,
) -> Policy:
    """Make a policy of whatever was passed as ``model``.

    Args:
        model: hub id or path, a model (it is changed), or a policy (returned as it is).
        tokenizer: the model's tokenizer; may be None for a name.
        peft_config: LoRA settings, or None for rank 16 on all linear layers.
        args: arguments of the trainer.

    Returns:
        The policy.

    Raises:
        ModelError: the model cannot be used, or a tokenizer is missing.
    """
    if isinstance(model, Policy):
        return model
    if isinstance(model, str):
        dtype = "float32" if args.full_finetuning else "auto"  # 16-bit weights swallow small updates
        section = ModelSection(name_or_path=model, dtype=dtype, device="cpu" if args.use_cpu else "auto")
        tokenizer = load_tokenizer(section) if tokenizer is None else tokenizer
        model = load_model(section)
    if tokenizer is None:
        raise ModelError("processing_class is missing (pass the model's tokenizer)")
    adapter = peft_config or AdapterConfig(enabled=not args.full_finetuning)
    return Policy(model, tokenizer, adapter, args.max_length, seed=args.seed)


def place(model: nn.Module, ref_model: nn.Module | None, args: UnlearnConfig) -> None:
    """Move the models to the device of the run before anything is computed, and train on one device per process.

    A quantised model, or one spread over several devices, stays where it is.

    Args:
        model: the model that is trained.
        ref_model: model of the reference, or None.
        args: arguments of the trainer.
    """
    device = args.device  # sets the devices up
    if args.n_gpu > 1:  # not distributed: several visible devices would silently mean DataParallel
        args._n_gpu = 1
    for each in (model, ref_model):
        spread = len(set((getattr(each, "hf_device_map", None) or {}).values())) > 1
        if each is not None and not spread and not getattr(each, "is_quantized", False):
            nn.Module.to(each, device)


def make_guard(policy: Policy, rows: Sequence[Encoded], args: UnlearnConfig) -> CollapseGuard:
    """Make the collapse guard, on rows drawn by their content: the first ones may all be of one kind.

    Args:
        policy: the policy.
        rows: retain rows, at least one.
        args: arguments of the trainer.

    Returns:
        The guard.
    """
    rows = sorted(rows, key=lambda row: content_id("guard", row.key))[: args.guard_rows or None]
    section = GuardSection(
        ppl_budget_frac=args.ppl_budget_frac,
        every_steps=args.guard_steps,
        max_rows=len(rows),
        line_search=args.line_search,
    )
    return CollapseGuard(policy, rows, section)


def autocast_of(args: UnlearnConfig) -> Any:
    """The precision of the run's forward passes, before accelerate is there to give it.

    Args:
        args: arguments of the trainer.

    Returns:
        A context manager.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16)
