"""What all arms share that TRL trains: whether it is there, its options made equal to ours, and the model lent to it.

TRL's defaults would change the comparison: bfloat16, gradient checkpointing, its own tokens for a row, a decaying
learning rate, a second adapter as the reference, telemetry. Here they are set to what the unlearning arms have.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from packaging.version import Version
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from u2a.callbacks import FiniteGradients
from u2a.errors import ConfigError, NonFiniteError
from u2a.experiment.arm import UNTIL_SPENT, Budget, BudgetCallback, Trained
from u2a.experiment.meter import Meter
from u2a.experiment.setting import Setting
from u2a.guard import all_finite
from u2a.modeling import Policy
from u2a.record import derive_seed
from u2a.types import StepLog


def require_trl() -> None:
    """Check that TRL is installed in a version these arms know; costs nothing and loads nothing.

    Raises:
        ConfigError: it is not.
    """
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = None
    if found is None or not Version("1.16") <= Version(found) < Version("2"):
        state = "not installed" if found is None else f"version {found}"
        raise ConfigError(
            f"the arms sft, dpo, kto, rloo and grpo need the package trl >= 1.16, < 2, which is {state} "
            "(in the clone: pip install '.[experiment]', or leave these arms out)"
        )


def check_trial(arm: str, trial: Mapping[str, float], known: tuple[str, ...]) -> None:
    """Refuse hyperparameters that an arm does not have.

    Args:
        arm: its name.
        trial: hyperparameters by name.
        known: those it has.

    Raises:
        ConfigError: an unknown one.
    """
    unknown = sorted(set(trial) - set(known))
    if unknown:
        raise ConfigError(f"arm {arm}: no hyperparameter {unknown[0]!r} (it has {', '.join(known)})")


def common_options(setting: Setting, trial: Mapping[str, float], folder: str) -> dict[str, Any]:
    """Options of a TRL configuration that are equal for all arms; optimiser and precision are those of unlearning.

    Args:
        setting: options, seed and device.
        trial: ``learning_rate`` where it is not that of the options.
        folder: a directory that vanishes afterwards.

    Returns:
        Keyword arguments.
    """
    section, on_cpu = setting.config.unlearn, setting.policy.device.type == "cpu"
    return {
        "output_dir": folder,
        "max_steps": UNTIL_SPENT,
        "learning_rate": trial.get("learning_rate", section.learning_rate),
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "max_grad_norm": section.max_grad_norm,
        "optim": "sgd" if section.optimizer == "sgd" else "adamw_torch",
        "adam_epsilon": section.adam_epsilon,
        "weight_decay": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": derive_seed(setting.seed, "trl"),
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
    }


@contextmanager
def lent(policy: Policy) -> Iterator[PeftModel]:
    """Lend the adapted model to a trainer of TRL, and undo afterwards what it changes beside theta.

    That is: a patched ``forward``, the padding token in the configurations, tags, training mode, gradients, and the
    state of torch's global generator. Meanwhile TRL projects the answers' positions alone through the LM head, as all
    else here does. It does so by itself only where Triton runs; on a CPU the rows' prompts would be charged to its
    arms for nothing.

    Args:
        policy: the policy.

    Yields:
        The PEFT model.

    Raises:
        ConfigError: the policy has no adapter.
    """
    model = policy.model
    if not isinstance(model, PeftModel):
        raise ConfigError("model.adapter.enabled: false conflicts with the arms that TRL trains (set it to true)")
    from trl.trainer import utils

    base = cast(PreTrainedModel, model.get_base_model())
    own_choice = utils._use_triton  # type: ignore[attr-defined]
    configs = [item for item in (base.config, base.generation_config) if item is not None]
    pads = [item.pad_token_id for item in configs]
    tags, forward = copy.copy(base.model_tags), vars(base).get("forward")
    with torch.random.fork_rng(devices=[] if policy.device.type == "cpu" else None), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between TRL and transformers
        try:
            # There it is asked for the positions alone, not for the kernels.
            utils._use_triton = lambda device: True  # type: ignore[attr-defined]
            yield model
        finally:
            utils._use_triton = own_choice  # type: ignore[attr-defined]
            drop_reference_adapter(model)
            for item, pad in zip(configs, pads, strict=True):
                item.pad_token_id = pad
            base.model_tags = tags
            vars(base).pop("forward", None)
            if forward is not None:
                base.forward = forward
            model.zero_grad(set_to_none=True)
            model.eval()


def drop_reference_adapter(model: PeftModel) -> None:
    """Remove the copy of the adapter that TRL adds as its reference: without it TRL disables the adapter instead.

    The disabled adapter is exactly theta_0, costs less, and is what every other arm takes as the reference.

    Args:
        model: the PEFT model.
    """
    if "ref" in model.peft_config:
        model.delete_adapter("ref")


def own_tokenizer(policy: Policy) -> PreTrainedTokenizerBase:
    """Copy the tokenizer for TRL, which changes it, with our padding token.

    Args:
        policy: the policy.

    Returns:
        The copy.
    """
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(policy.encoder.pad_id))
    return tokenizer


def callbacks(arm: str, budget: Budget) -> list[TrainerCallback]:
    """Callbacks of every trainer: non-finite gradients are refused, the budget is told of every step.

    Args:
        arm: name for error messages.
        budget: the budget.

    Returns:
        The callbacks.
    """
    return [FiniteGradients(lambda: (arm, [])), BudgetCallback(budget)]


def run_trainer(arm: str, trainer: Trainer, policy: Policy, meter: Meter) -> Trained:
    """Train until the budget is spent.

    Args:
        arm: name for error messages.
        trainer: the trainer.
        policy: the policy whose model it trains.
        meter: counts.

    Returns:
        What was done.

    Raises:
        NonFiniteError: a gradient, a logit of the generation or a weight is not finite.
        RuntimeError: whatever else torch reports.
    """
    trainer.remove_callback(PrinterCallback)
    try:
        with meter.phase("train"):
            trainer.train()
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):  # what torch says of drawing from non-finite logits
            raise
        raise NonFiniteError("logit", f"{arm}, generate", trainer.state.global_step) from None
    steps = trainer.state.global_step
    if not all_finite(list(policy.trainable().values())):
        raise NonFiniteError("weight", arm, steps)
    history = tuple(
        StepLog(step=int(entry["step"]), loss=_finite(entry.get("loss")), grad_norm=_finite(entry.get("grad_norm")))
        for entry in trainer.state.log_history
        if "loss" in entry
    )
    return Trained(steps, "stopped at the most steps a run may take" if steps >= UNTIL_SPENT else "", None, history)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
