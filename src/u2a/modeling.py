"""The policy: model, adapter, reference, and the only place where log-probabilities are computed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from u2a.adapter import add_adapter, fused_lora, lora_change_sq, refuse_adapter, remove_chance
from u2a.batch_size import BatchLimits, forward_batches
from u2a.config import AdapterConfig
from u2a.encoding import Batch, Encoded, Encoder, collate
from u2a.errors import ModelError, NonFiniteError
from u2a.record import content_id

Params = dict[str, Tensor]


@dataclass(frozen=True)
class AnswerLogProbs:
    """Log-probabilities of answer tokens.

    Attributes:
        token: (batch, answer) float32, log pi(y_t | x, y_<t) in nats; 0 where ``mask`` is False.
        mask: (batch, answer) bool, True on answer tokens.
        logits: (batch, answer, vocab) the logits that predict the answer tokens.
    """

    token: Tensor
    mask: Tensor
    logits: Tensor

    @property
    def sum(self) -> Tensor:
        """s_i, the summed log-probability of each answer: (batch,) nats."""
        return self.token.sum(1)

    @property
    def count(self) -> Tensor:
        """T_i, the number of answer tokens: (batch,)."""
        return self.mask.sum(1)

    @property
    def mean(self) -> Tensor:
        """s_i / T_i: (batch,) nats per token."""
        return self.sum / self.count


def answer_log_probs(model: nn.Module, batch: Batch, parameters: Params | None = None) -> AnswerLogProbs:
    """Compute the log-probabilities of the answer tokens, with logits at answer positions only.

    Args:
        model: a causal language model of transformers (plain, PEFT, or wrapped for data parallelism).
        batch: left-padded sequences.
        parameters: values to use instead of the model's own, by parameter name (for functional transforms).

    Returns:
        Log-probabilities in float32 whatever the model's dtype (float64 for a float64 model).
    """
    width = batch.targets.shape[1]
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if _accepts(model, "logits_to_keep"):
        arguments["logits_to_keep"] = width + 1
    out = model(**arguments) if parameters is None else torch.func.functional_call(model, parameters, (), arguments)
    logits = out.logits[:, -(width + 1) : -1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    picked = logits.gather(-1, batch.targets[..., None])[..., 0]
    token = torch.where(batch.answer_mask, picked - logits.logsumexp(-1), 0.0)
    return AnswerLogProbs(token, batch.answer_mask, logits)


def _accepts(model: nn.Module, name: str) -> bool:
    """Whether the innermost causal model's forward has a parameter of that name."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner = model.module if isinstance(model, wrappers) else model
    inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    return name in inspect.signature(inner.forward).parameters


class Policy:
    """A causal language model with its tokenizer, its trainable change and its reference theta_0.

    With an adapter the reference is the same model with the adapter disabled; with full fine-tuning the
    initial weights are kept on the CPU and swapped in. There is never a second model.

    Args:
        model: model from transformers, without an adapter.
        tokenizer: its tokenizer.
        adapter: LoRA settings; ``enabled=False`` trains all weights.
        max_length: most tokens per sequence.
        token_budget: tokens per forward batch, padding included.
        seed: seed of the adapter's initial weights.

    Attributes:
        limits: the largest batches that fitted, once memory has run out.
        answer_limits: the same for generating answers, in prompts.

    Raises:
        ModelError: the model carries an adapter already, the adapter cannot be made, changes the model from the start
            or holds more than LoRA matrices, nothing is trainable, or what is has 16 bits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: AdapterConfig | LoraConfig,
        max_length: int = 512,
        token_budget: int = 1024,
        seed: int = 0,
    ) -> None:
        refuse_adapter(model)
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, max_length, end_ids(model))
        self.token_budget = token_budget
        self.has_adapter = isinstance(adapter, LoraConfig) or adapter.enabled
        self.limits, self.answer_limits = BatchLimits(), BatchLimits("generation", "prompts")
        self.model: nn.Module = add_adapter(model, adapter, seed) if self.has_adapter else model.requires_grad_(True)
        remove_chance(self.model)
        self.model.eval()
        self._names = tuple(name for name, value in self.model.named_parameters() if value.requires_grad)
        if not self._names:
            raise ModelError(f"no trainable parameter (does {adapter} match any module of the model?)")
        if any(value.dtype in (torch.float16, torch.bfloat16) for value in self.trainable().values()):
            raise ModelError("the trainable weights are 16-bit, small updates round away (load the model as float32)")
        self._theta0 = self.snapshot()
        if self.has_adapter and float(self.change_sq().detach()) != 0.0:
            raise ModelError("model.adapter: it changes the model from the start (leave init_lora_weights at True)")
        self._reference_sums: dict[str, float] = {}

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    def trainable(self) -> Params:
        """The trainable parameters theta by name (the live tensors, not copies)."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self._names}

    def snapshot(self) -> Params:
        """Copy of the trainable parameters, on the CPU."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.trainable().items()}

    @torch.no_grad()
    def restore(self, snapshot: Params) -> None:
        """Set the trainable parameters.

        Args:
            snapshot: values of equal structure, as made by :meth:`snapshot`.
        """
        for name, value in self.trainable().items():
            value.copy_(snapshot[name])

    def reset(self) -> None:
        """Return to theta_0."""
        self.restore(self._theta0)

    @property
    def theta0(self) -> Params:
        """The initial trainable parameters (do not change them)."""
        return self._theta0

    @cached_property
    def identity(self) -> str:
        """Content id of the function at theta_0 on tokens: a sample of all weights, theta_0, the longest sequence."""
        weights = {name: value for name, value in self.model.state_dict().items() if name not in self._theta0}
        return content_id(_fingerprint(weights), _fingerprint(self._theta0), str(self.encoder.max_length))

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """Give the model at theta_0, in evaluation mode, for the duration of a ``with`` block."""
        if isinstance(self.model, PeftModel):
            with evaluation_mode(self.model), self.model.disable_adapter():
                yield self.model
            return
        now = self.snapshot()
        self.reset()
        try:
            with evaluation_mode(self.model):
                yield self.model
        finally:
            self.restore(now)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Left-pad sequences onto the model's device.

        Args:
            encoded: at least one sequence.

        Returns:
            The batch.
        """
        return collate(encoded, self.encoder.pad_id, self.device)

    def log_probs(self, encoded: Sequence[Encoded]) -> AnswerLogProbs:
        """Log-probabilities of answers at the current theta; differentiable outside ``no_grad``.

        Args:
            encoded: sequences of one forward batch.

        Returns:
            Per-token log-probabilities.
        """
        return answer_log_probs(self.model, self.collate(encoded))

    @torch.no_grad()
    def answer_sums(self, encoded: Sequence[Encoded], model: nn.Module | None = None) -> Tensor:
        """Summed answer log-probabilities at the current theta, in evaluation mode, batched by length.

        Args:
            encoded: any number of sequences.
            model: another model with the same tokenizer, or None for the policy's.

        Returns:
            (n,) float32 on the CPU, in the order given.
        """

        def compute(batch: list[int]) -> Tensor:
            return answer_log_probs(reader, self.collate([encoded[index] for index in batch])).sum.float().cpu()

        reader = self.model if model is None else model
        out = torch.zeros(len(encoded))
        with evaluation_mode(reader), fused_lora(reader):
            for batch, sums in forward_batches(encoded, self.token_budget, self.limits, compute):
                out[batch] = sums
        return out

    def reference_sums(self, encoded: Sequence[Encoded]) -> Tensor:
        """Summed answer log-probabilities at theta_0, computed once per content.

        Args:
            encoded: any number of sequences.

        Returns:
            (n,) float32 on the CPU, in the order given.

        Raises:
            NonFiniteError: a reference log-probability is not finite.
        """
        key = self._precise_key
        missing = list({key(item): item for item in encoded if key(item) not in self._reference_sums}.values())
        if missing:
            with self.reference():
                sums = self.answer_sums(missing)
            if not torch.isfinite(sums).all():
                raise NonFiniteError("reference log-probability", "reference")
            self._reference_sums |= {key(item): float(value) for item, value in zip(missing, sums, strict=True)}
        return torch.tensor([self._reference_sums[key(item)] for item in encoded])

    def _precise_key(self, item: Encoded) -> str:
        """The content of a sequence and the precision of a pass under autocast."""
        kind = self.device.type
        return f"{item.key} {torch.get_autocast_dtype(kind)}" if torch.is_autocast_enabled(kind) else item.key

    def knows_none_of(self, encoded: Sequence[Encoded]) -> bool:
        """Whether these sequences differ, and :meth:`reference_sums` has been asked for none of them yet."""
        keys = {self._precise_key(item) for item in encoded}
        return len(keys) == len(encoded) and keys.isdisjoint(self._reference_sums)

    def remember_reference_sums(self, encoded: Sequence[Encoded], sums: Tensor) -> None:
        """Keep (n,) summed log-probabilities that a pass at theta_0 has found on the way."""
        values = zip(encoded, sums.float().tolist(), strict=True)
        self._reference_sums |= {self._precise_key(item): value for item, value in values}

    def forget_reference_sums(self) -> None:
        """Let the next one who needs a reference compute it."""
        self._reference_sums.clear()

    def at_start(self) -> bool:
        """Whether the policy stands at theta_0, bit for bit."""
        start = self.theta0
        return all(torch.equal(value.detach().cpu(), start[name]) for name, value in self.trainable().items())

    @torch.no_grad()
    def perplexity(self, encoded: Sequence[Encoded]) -> float:
        """Perplexity of answers at the current theta: exp(sum NLL / sum answer tokens), EOS scored.

        Args:
            encoded: at least one sequence.

        Returns:
            Perplexity, >= 1; infinity when the model has collapsed.
        """
        nll = -self.answer_sums(encoded).double().sum() / sum(item.n_answer for item in encoded)
        return float(torch.exp(nll))

    @contextmanager
    def change_scaled(self, scale: float) -> Iterator[None]:
        """Use theta_0 + scale * (theta - theta_0) for the duration of a ``with`` block (exact on effective weights).

        Args:
            scale: factor in [0, 1].
        """
        now = self.snapshot()
        self.scale_change(scale)
        try:
            yield
        finally:
            self.restore(now)

    @torch.no_grad()
    def scale_change(self, scale: float) -> None:
        """Scale the change from theta_0; with LoRA the effective weight change B A is scaled through B.

        Args:
            scale: factor in [0, 1].
        """
        for name, value in self.trainable().items():
            if self.has_adapter:
                if ".lora_B." in name or ".lora_embedding_B." in name:
                    value.mul_(scale)
            else:
                start = self._theta0[name].to(value.device)
                value.copy_(start + scale * (value - start))

    def change_sq(self) -> Tensor:
        """Squared Frobenius norm of the change of the *effective* weights, differentiable; 0 at theta_0.

        For LoRA ||s B A||^2 = s^2 tr((B'B)(A A')), without forming B A.

        Returns:
            Scalar tensor.
        """
        if self.has_adapter:
            return lora_change_sq(self.model)
        pairs = ((value, self._theta0[name].to(value.device)) for name, value in self.trainable().items())
        return torch.stack([(value - start).float().square().sum() for value, start in pairs]).sum()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for the duration of a ``with`` block.

    Args:
        model: any module; every submodule returns to the mode it had.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def weights_fingerprint(model: nn.Module, per_tensor: int = 256) -> str:
    """Hash a sample of a model's weights, to tell whether two models are the same one.

    Args:
        model: any module.
        per_tensor: entries read of each tensor, evenly spread.

    Returns:
        32 hexadecimal digits.
    """
    return _fingerprint(model.state_dict(), per_tensor)


def _fingerprint(tensors: Mapping[str, Tensor], per_tensor: int = 256) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in tensors.items():
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // per_tensor)].cpu().double()  # mps has no float64
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def end_ids(model: nn.Module) -> list[int]:
    """End-of-turn token ids of a model's generation config.

    Args:
        model: model from transformers.

    Returns:
        Ids; may be empty.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ends is None else [int(end) for end in (ends if isinstance(ends, list) else [ends])]
