"""Arguments of the trainer: those of ``transformers.TrainingArguments`` and what unlearning needs beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import SchedulerType, TrainingArguments

from u2a.errors import ConfigError
from u2a.losses import UnlearningLoss, check_retain, make_loss


@dataclass
class UnlearnConfig(TrainingArguments):
    """Arguments of :class:`UnlearnTrainer`, on top of those of ``transformers.TrainingArguments``.

    Attributes:
        loss: ``ga``, ``grad_diff``, ``npo``, or ``sft`` (ordinary fine-tuning on the rows).
        npo_beta: inverse temperature of NPO, > 0.
        retain_term: ``none``, ``nll``, ``kl`` (to the reference) or ``proximal`` (||change of effective weights||^2).
        retain_weight: lambda, >= 0.
        retain_batch_size: retain rows per micro-batch and device.
        max_length: tokens of prompt and answer; a model given as a ``Policy`` has its own.
        full_finetuning: train all weights instead of an adapter.
        guard: watch retain perplexity (needs a retain set).
        guard_rows: retain rows it watches, drawn by their content (0: all).
        ppl_budget_frac: allowed rise of retain perplexity.
        guard_steps: steps between measurements (0: only at the end).
        line_search: scale a breaching change down to the budget instead of only rolling back.
        save_minutes: minutes between checkpoints, beside those of ``save_strategy`` (0: none).
    """

    loss: str = field(default="npo", metadata={"help": "ga, grad_diff, npo or sft"})
    npo_beta: float = field(default=0.1, metadata={"help": "inverse temperature of NPO"})
    retain_term: str = field(default="nll", metadata={"help": "none, nll, kl or proximal"})
    retain_weight: float = field(default=1.0, metadata={"help": "weight of the retain term"})
    retain_batch_size: int = field(default=4, metadata={"help": "retain rows per micro-batch and device"})
    max_length: int = field(default=512, metadata={"help": "tokens of prompt and answer"})
    full_finetuning: bool = field(default=False, metadata={"help": "train all weights instead of an adapter"})
    guard: bool = field(default=True, metadata={"help": "watch retain perplexity where there is a retain set"})
    guard_rows: int = field(default=32, metadata={"help": "retain rows that the guard watches (0: all)"})
    ppl_budget_frac: float = field(default=0.10, metadata={"help": "allowed rise of retain perplexity"})
    guard_steps: int = field(default=5, metadata={"help": "steps between measurements (0: only at the end)"})
    line_search: bool = field(default=True, metadata={"help": "scale a breaching change down to the budget"})
    save_minutes: float = field(default=0.0, metadata={"help": "minutes between checkpoints (0: by save_strategy)"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "learning-rate schedule"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_scheduler_type == SchedulerType.CONSTANT and self.warmup_steps:  # which it would leave out
            self.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP
        if self.retain_term not in ("none", "nll", "kl", "proximal"):
            raise ConfigError(f"retain_term {self.retain_term!r}: expected none, nll, kl or proximal")
        if self.npo_beta <= 0 or self.retain_weight < 0 or self.ppl_budget_frac < 0:
            raise ConfigError("npo_beta must be > 0, retain_weight and ppl_budget_frac >= 0")
        if self.retain_batch_size < 1 or self.guard_rows < 0:
            raise ConfigError(
                "retain_batch_size must be >= 1 and guard_rows >= 0 (retain_term none needs no retain rows)"
            )
        order = getattr(self, "train_sampling_strategy", "random")  # newer versions have it
        if order != "random":
            raise ConfigError(f"train_sampling_strategy {order!r}: rows come in random order only")
        if self.save_only_model:
            raise ConfigError(
                "save_only_model: a checkpoint holds the whole state (trainer.save_model saves the model)"
            )
        if self.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor {self.label_smoothing_factor:g}: the loss is of the answers as they are "
                "(leave it out)"
            )
        if self.neftune_noise_alpha:
            raise ConfigError(
                f"neftune_noise_alpha {self.neftune_noise_alpha}: the loss is of the model without noise, as its "
                "reference is (leave it out)"
            )
        check_retain(self.loss_value(), self.retain_term)

    def loss_value(self) -> UnlearningLoss:
        """Return the per-sample loss.

        Returns:
            A value of :mod:`u2a.losses`.

        Raises:
            ConfigError: unknown name.
        """
        return make_loss(self.loss, self.npo_beta)
