"""Slow, obvious versions of what the inner problem computes: one unpadded sequence at a time, no batching at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from u2a.encoding import Encoded
from u2a.modeling import Params, Policy
from u2a.trainer_config import UnlearnConfig
from u2a.types import Example


def encode_all(policy: Policy, rows: Sequence[Example]) -> list[Encoded]:
    """Tokens of rows."""
    return [policy.encoder.encode(row.prompt, row.completion, row.source) for row in rows]


def alone(model: nn.Module, item: Encoded) -> Tensor:
    """log pi(y_t | x, y_<t) of one sequence, unpadded, without mask, cache or position ids: (answer,) float64."""
    logits = model(input_ids=torch.tensor([item.input_ids])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    start = len(item.input_ids) - item.n_answer
    return torch.stack([log_probs[t - 1, item.input_ids[t]] for t in range(start, len(item.input_ids))])


def dense_losses(model: nn.Module, items: Sequence[Encoded], name: str, reference: Sequence[float], beta: float):
    """Per-sample losses by their textbook formulas, one sequence at a time."""
    out = []
    for item, start in zip(items, reference, strict=True):
        tokens = alone(model, item)
        if name in ("ga", "grad_diff"):
            out.append(tokens.sum() / len(tokens))
        elif name == "npo":  # -2/b log sigmoid(-b log(pi / pi_ref))
            out.append(-(2 / beta) * torch.log(torch.sigmoid(-beta * (tokens.sum() - start))))
        else:
            out.append(-tokens.sum() / len(tokens))
    return torch.stack(out)


def gradient(policy: Policy, value: Tensor) -> Params:
    """Gradient of a scalar in the trainable parameters."""
    theta = policy.trainable()
    parts = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
    return {
        name: torch.zeros_like(theta[name]) if part is None else part for name, part in zip(theta, parts, strict=True)
    }


def flat(parameters: Params) -> Tensor:
    """All entries in one float64 vector."""
    return torch.cat([value.detach().double().flatten() for value in parameters.values()])


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


def quiet(folder: str | Path, **changes: Any) -> UnlearnConfig:
    """Trainer arguments without trackers, bars, checkpoints, clipping or weight decay."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "retain_term": "none",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return UnlearnConfig(**(settings | changes))


class GradientTape(TrainerCallback):
    """Keeps the gradient of every optimiser step as one vector."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.steps = policy, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        theta = self.policy.trainable().values()
        self.steps.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in theta])
        )
        return control
