"""The trainer: weighted unlearning as a subclass of ``transformers.Trainer``.

It routes data to the losses of :mod:`u2a.losses` and adds what an unlearning run needs: per-sample weights, retain
rows, a reference, the collapse guard and a check that nothing non-finite is ever applied. Checkpoints, logging,
trackers and ``accelerate launch`` are the base class's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from u2a.batch_size import micro_batch, split_rows
from u2a.callbacks import FiniteGradients, StreamPosition
from u2a.config import DataSection, FieldMap
from u2a.data import parse_examples
from u2a.encoding import Encoded
from u2a.errors import ConfigError, NonFiniteError
from u2a.guard import GuardResult
from u2a.inner_loss import InnerLoss
from u2a.modeling import Policy
from u2a.record import derive_seed
from u2a.rows import read_rows
from u2a.stream import BatchMaker, FixedSamples, Sample, SampleStream, StreamSampler
from u2a.trainer_checkpoint import CheckpointedTrainer, Checkpointing, put_back, stream_id
from u2a.trainer_config import UnlearnConfig
from u2a.trainer_setup import autocast_of, check_models, make_guard, place, policy_of
from u2a.types import Example

if TYPE_CHECKING:
    from datasets import Dataset

    Rows = Dataset | Sequence[Mapping[str, Any]] | Sequence[Example]


class UnlearnTrainer(CheckpointedTrainer):
    """Unlearns weighted rows: each step descends mean_{i in B} (|S| omega_i) l_i + lambda L_R.

    Args:
        model: hub id or path, a model of transformers, or a :class:`~u2a.modeling.Policy`.
        ref_model: model for reference log-probabilities; None uses the disabled adapter, and with full
            fine-tuning the weights at the start.
        args: arguments; None uses the defaults.
        train_dataset: negatives in TRL's formats (prompt/completion, or prompt/chosen/rejected, whose rejected
            answers are unlearned; standard or conversational) with an optional column ``weight`` (non-negative;
            rows of weight 0 are left out), or :class:`~u2a.types.Example` rows.
        retain_dataset: rows whose quality must survive, in the same formats; their answers are the good ones.
        eval_dataset: rows on which ``evaluate()`` reports the mean loss.
        processing_class: tokenizer; None loads the one that belongs to ``model`` (when it is a name).
        peft_config: LoRA settings; None uses rank 16 on all linear layers unless ``args.full_finetuning``.
        callbacks: further callbacks.
        optimizers: (optimizer, scheduler) to use instead of those of ``args``.

    Attributes:
        policy: the policy under training.
        inner_loss: the loss of a micro-batch.
        guard: the collapse guard, or None.
        guard_result: how the guard ended the last ``train()``.
        phase: name of what is done, for the message of a ``NonFiniteError``.

    Raises:
        ConfigError: options in conflict, or no row with positive weight.
        DataError: rows that cannot be used.
        ModelError: the model cannot be used.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | Policy,
        ref_model: PreTrainedModel | None = None,
        args: UnlearnConfig | None = None,
        train_dataset: Rows | None = None,
        retain_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = UnlearnConfig(output_dir="u2a-output") if args is None else args
        self._examples = as_examples(train_dataset, args.loss == "sft")
        retain, held_out = as_examples(retain_dataset, good=True), as_examples(eval_dataset, args.loss == "sft")
        if train_dataset is not None and not self._examples:
            raise ConfigError("train_dataset has no row of positive weight (unlearning nothing changes nothing)")
        if args.retain_term in ("nll", "kl") and not retain and train_dataset is not None:
            raise ConfigError(f"retain_term {args.retain_term!r} needs a retain_dataset (or set retain_term to none)")
        check_models(model, ref_model, peft_config, args)
        self.policy = policy_of(model, processing_class, peft_config, args)  # the model is changed from here on
        reference = None if ref_model is None else ref_model.eval().requires_grad_(False)
        place(self.policy.model, reference, args)
        self.inner_loss = InnerLoss(self.policy, args.loss_value(), args.retain_term, args.retain_weight, reference)
        self._retain = self._encode(retain)
        args.label_names = args.label_names or []
        world = max(1, args.world_size)
        per_step = args.train_batch_size * args.gradient_accumulation_steps * world
        epoch_length = math.ceil(len(self._examples) / per_step) * per_step
        self._sampler = StreamSampler(epoch_length)
        order = args.seed if args.data_seed is None else args.data_seed
        seed = derive_seed(order, "sample stream")
        self._ids = [row.id for row in (*self._examples, *held_out)]
        with autocast_of(args):  # the references are the function that is trained
            samples, measured = self._samples(self._examples), self._samples(held_out, len(self._examples))
        super().__init__(
            model=self.policy.model,  # type: ignore[arg-type]  # a PEFT model is what the base class expects, too
            args=args,
            train_dataset=SampleStream(samples, epoch_length, seed) if samples else None,
            eval_dataset=None if eval_dataset is None else FixedSamples(measured),
            data_collator=BatchMaker(
                self.policy.encoder.pad_id,
                args.train_batch_size,
                self._retain if args.retain_term in ("nll", "kl") else (),
                args.retain_batch_size,
                derive_seed(order, "retain stream"),
            ),
            processing_class=self.policy.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch: divide by accumulation
        self.guard = None
        self.guard_result: GuardResult | None = None
        if args.guard and self._retain and self._examples:
            with autocast_of(args):
                self.guard = make_guard(self.policy, self._retain, args)
            self.add_callback(self.guard)
        self.phase = "unlearn"
        self._step_ids: deque[list[str]] = deque(maxlen=args.gradient_accumulation_steps)
        self.add_callback(FiniteGradients(lambda: (self.phase, [name for ids in self._step_ids for name in ids])))
        if self._examples:
            self.add_callback(StreamPosition(self._sampler, per_step))
        rows = [(sample.encoded.key, sample.weight) for sample in samples]
        numbers = (order, per_step, args.retain_batch_size, args.npo_beta, args.retain_weight)
        texts = (self.policy.identity, args.loss, args.retain_term)
        self.stream_id = stream_id(rows, [row.key for row in self._retain], (*texts, *numbers))
        self.add_callback(Checkpointing(self, args.save_minutes))
        self._parts: dict[str, float] = {}  # of the micro-batch at hand
        self.unlogged = {}

    def _encode(self, examples: Sequence[Example]) -> tuple[Encoded, ...]:
        encode = self.policy.encoder.encode
        return tuple(encode(row.prompt, row.completion, row.source or row.id) for row in examples)

    def _samples(self, examples: Sequence[Example], first: int = 0) -> tuple[Sample, ...]:
        """Encode rows and attach weights (mean 1), reference log-probabilities, and numbers from ``first`` on."""
        encoded = self._encode(examples)
        sums = torch.zeros(len(encoded))
        if self.inner_loss.loss.needs_reference and encoded:
            other = self.inner_loss.ref_model
            sums = self.policy.reference_sums(encoded) if other is None else self.policy.answer_sums(encoded, other)
        weights = [1.0 if row.weight is None else row.weight for row in examples]
        scale = len(weights) / math.fsum(weights) if weights else 1.0
        rows = zip(encoded, weights, sums.tolist(), strict=True)
        return tuple(Sample(item, weight * scale, ref, k) for k, (item, weight, ref) in enumerate(rows, first))

    def _get_train_sampler(self, train_dataset: Any = None) -> StreamSampler:
        """Positions of the stream in order; the stream itself is shuffled."""
        return self._sampler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradient of one micro-batch, in parts where memory runs out (in a run of one process).

        Args:
            model: the (possibly wrapped) model.
            inputs: a batch of :class:`~u2a.stream.BatchMaker`.
            num_items_in_batch: not used.

        Returns:
            Its loss.
        """
        self._step_ids.append([self._ids[k] for k in inputs["index"].tolist()])
        step = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        parameters, n = list(self.policy.trainable().values()), len(inputs["weight"])
        if self.args.world_size > 1:  # the others wait for as many backward passes
            loss = step(inputs)
        else:
            loss = micro_batch(
                n, parameters, self.policy.limits, lambda k: [step(part) for part in split_rows(inputs, k)]
            )
        for name, value in {"batches": 1.0, **self._parts}.items():
            self.unlogged[name] = self.unlogged.get(name, 0.0) + value
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Length of the gradient; one that is not finite is refused: clipping would turn the step into nothing."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16 and norm is not None and not math.isfinite(norm):
            ids = [name for batch in self._step_ids for name in batch]
            raise NonFiniteError("gradient", self.phase, self.state.global_step, ids)
        return norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Weighted mean of the per-sample losses plus lambda times the retain term.

        Args:
            model: the (possibly wrapped) model.
            inputs: a batch of :class:`~u2a.stream.BatchMaker`.
            return_outputs: return ``(loss, {"per_sample": losses})``.
            num_items_in_batch: not used: the loss is a mean over the micro-batch.

        Returns:
            Scalar loss in nats.

        Raises:
            NonFiniteError: a per-sample loss or the retain term is not finite.
        """
        losses = self._finite_losses(model, inputs)
        retain = self.inner_loss.retain(model, inputs)
        if retain is not None and not torch.isfinite(retain):
            raise NonFiniteError(f"retain term ({self.inner_loss.retain_term})", self.phase, self.state.global_step)
        retain = None if retain is None else retain * inputs.get("retain_share", 1.0)
        loss = self.inner_loss.total(losses, inputs["weight"], retain)
        earlier = self._parts if inputs.get("part") else {}  # of the same micro-batch
        now = {"forget_loss": float((inputs["weight"] * losses.detach()).mean())}
        now |= {} if retain is None else {"retain_loss": float(retain.detach())}
        self._parts = earlier | {name: earlier.get(name, 0.0) + value for name, value in now.items()}
        return (loss, {"per_sample": losses}) if return_outputs else loss

    def _finite_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        losses = self.inner_loss.per_sample(model, inputs)
        if not torch.isfinite(losses).all():
            ids = [self._ids[k] for k in inputs["index"].tolist()]
            bad = [name for name, loss in zip(ids, losses.tolist(), strict=True) if not math.isfinite(loss)]
            raise NonFiniteError("loss", self.phase, self.state.global_step, bad)
        return losses

    def train(self, *positional: Any, **named: Any) -> Any:
        """Train as the base class does, then let the guard settle a breach of the budget.

        Args:
            *positional: arguments of ``Trainer.train``.
            **named: arguments of ``Trainer.train``, such as ``resume_from_checkpoint``.

        Returns:
            The base class's ``TrainOutput``.
        """
        own = vars(self.policy.model).get("forward")
        try:
            output = super().train(*positional, **named)
            self.policy.model.eval()
            if self.guard is not None:
                self.guard_result = self.guard.settle(self.steps_taken)
        finally:  # accelerate has put another one there, which computes under autocast
            put_back(self.policy.model, own)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Weighted mean loss of an evaluation batch, without the retain term.

        Args:
            model: the model.
            inputs: a batch.
            prediction_loss_only: not used; only the loss is returned.
            ignore_keys: not used.

        Returns:
            (loss, None, None).
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            losses = self._finite_losses(model, inputs)
            return self.inner_loss.total(losses, inputs["weight"], None), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the two parts of the loss beside it: means over this process's micro-batches since the last log.

        Args:
            logs: numbers to log.
            start_time: of the training, or None.
        """
        if "loss" in logs and self.unlogged:
            count = self.unlogged.pop("batches")
            logs = logs | {name: total / count for name, total in self.unlogged.items()}
            self.unlogged = {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: a step holds up to three forwards.

        Args:
            inputs: a batch.

        Returns:
            0.
        """
        return 0


def as_examples(rows: Rows | None, good: bool) -> tuple[Example, ...]:
    """Turn any accepted form of rows into examples; rows of weight 0 are left out.

    Args:
        rows: a dataset, a list of dicts, examples, or None.
        good: of a preference pair take the chosen answer (else the rejected one).

    Returns:
        Examples of positive weight.

    Raises:
        DataError: a row cannot be used.
    """
    if rows is None:
        return ()
    if not (isinstance(rows, list | tuple) and all(isinstance(row, Example) for row in rows)):
        raw = read_rows(rows, "dataset")  # type: ignore[arg-type]
        side = "chosen" if good else "rejected"
        both, whole = {"chosen", "rejected"}, {"completion", "messages"}  # of a pair whatever else there is is not read
        pairs = all(both <= row.values.keys() or (side in row.values and not whole & row.values.keys()) for row in raw)
        fields = FieldMap(completion=side) if pairs else FieldMap()
        rows = parse_examples(raw, DataSection(fields=fields, retain_fields=fields), good)
    return tuple(row for row in rows if row.weight is None or row.weight > 0)  # type: ignore[union-attr]


def _in_parts(step: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any], n: int) -> list[Tensor]:
    """The losses of a micro-batch's parts of at most ``n`` rows."""
    return [step(part) for part in split_rows(inputs, n)]
