"""Floating-point operations and memory of passes through a language model, by formula from the sizes of its matrices.

A matrix product of m x k with k x n counts 2 m k n operations. With N weights in the matrices and D tokens a forward
pass takes 2ND, a step on LoRA matrices about 4ND (the frozen weights get no gradient, and below the lowest adapter
nothing flows back), a step on all weights 6ND; attention adds 4 D times width times features per layer. Elementwise
work is not counted. The memory is what a decoder block of Llama's kind keeps for its backward pass.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from u2a.encoding import Encoded

LOGIT_COPIES = (3, 5)  # float32 copies of the logits alive at once without and with a backward pass
NF4_BYTES = 0.53  # of one weight in 4 bits, with its share of the scales


@dataclass(frozen=True)
class Shape:
    """One padded batch.

    Attributes:
        rows: sequences.
        width: tokens of each, padding included.
        answer: answer tokens of each, padding included; logits are needed for one more.
    """

    rows: int
    width: int
    answer: int

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.width


def shape_of(encoded: Sequence[Encoded]) -> Shape:
    """Return the shape that sequences have when they are padded into one batch.

    Args:
        encoded: at least one sequence.

    Returns:
        The shape.
    """
    return Shape(len(encoded), max(len(item.input_ids) for item in encoded), max(item.n_answer for item in encoded))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that decide what a pass through it costs.

    Attributes:
        parameters: all weights, without the adapter.
        trainable: trained weights.
        stored_bytes: memory of the frozen and trained weights.
        body: weights of the matrices that every token passes, without the output layer and the adapter.
        upper: those of them to which a gradient flows back (in and above the lowest layer that is trained).
        head: weights of the output layer.
        lora_in: weights of all LoRA matrices A.
        lora_out: weights of all LoRA matrices B.
        layers: decoder layers.
        upper_layers: those through which a gradient flows back.
        hidden: width of the residual stream.
        heads_width: width of all attention heads together.
        kv_width: width of keys.
        inner: width of the feed-forward part.
        item_bytes: bytes of an activation.
        has_adapter: whether LoRA matrices are trained instead of all weights.
        all_logits: the model computes logits at every position.
        rank: of the LoRA matrices.
    """

    parameters: int
    trainable: int
    stored_bytes: int
    body: int
    upper: int
    head: int
    lora_in: int
    lora_out: int
    layers: int
    upper_layers: int
    hidden: int
    heads_width: int
    kv_width: int
    inner: int
    item_bytes: int
    has_adapter: bool
    all_logits: bool
    rank: int

    @property
    def vocabulary(self) -> int:
        """Tokens of the output layer."""
        return self.head // self.hidden

    def _kept(self, shape: Shape) -> int:
        """Positions whose logits are computed."""
        return shape.rows * (shape.width if self.all_logits else min(shape.width, shape.answer + 1))

    def forward(self, shape: Shape) -> float:
        """Operations of a forward pass: 2ND and attention.

        Args:
            shape: the batch.

        Returns:
            Floating-point operations.
        """
        matrices = self.body + self.lora_in + self.lora_out
        attention = 4.0 * self.heads_width * self.layers * shape.width
        return shape.tokens * (2.0 * matrices + attention) + 2.0 * self._kept(shape) * self.head

    def gradient(self, shape: Shape) -> float:
        """Operations of a forward and a backward pass to the trained weights.

        Args:
            shape: the batch.

        Returns:
            Floating-point operations.
        """
        per_weight = 2.0 if self.has_adapter else 4.0
        attention = 8.0 * self.heads_width * self.upper_layers * shape.width
        back = per_weight * self.upper + 4.0 * (self.lora_in + self.lora_out) + attention
        return self.forward(shape) + shape.tokens * back + per_weight * self._kept(shape) * self.head

    def scoring(self, shape: Shape, directions: int) -> float:
        """Operations of one batched backward pass for several directions (:mod:`u2a.bilevel.backward`).

        Args:
            shape: the batch.
            directions: directions scored at once.

        Returns:
            Floating-point operations.
        """
        taps = 2.0 * (directions + 1) * (self.lora_in + 2.0 * self.lora_out)
        attention = 8.0 * self.heads_width * self.upper_layers * shape.width
        back = 2.0 * (self.upper + self.lora_in + self.lora_out) + attention + taps
        return self.forward(shape) + shape.tokens * back + 2.0 * self._kept(shape) * self.head

    def generation(self, shape: Shape) -> float:
        """Operations of answering prompts with cached keys and values.

        Args:
            shape: prompts, and as ``answer`` the tokens drawn for each.

        Returns:
            Floating-point operations.
        """
        matrices = self.body + self.lora_in + self.lora_out + self.head
        attention = 4.0 * self.heads_width * self.layers * (shape.width + shape.answer / 2.0)
        steps = max(0, shape.answer - 1)
        return self.forward(replace(shape, answer=0)) + steps * shape.rows * (2.0 * matrices + attention)

    def logits_bytes(self, shape: Shape) -> float:
        """Memory of one float32 copy of a batch's logits.

        Args:
            shape: the batch.

        Returns:
            Bytes.
        """
        return 4.0 * self._kept(shape) * self.vocabulary

    def saved_bytes(self, shape: Shape) -> float:
        """Memory of what a forward pass keeps for its backward pass, without the logits.

        Args:
            shape: the batch.

        Returns:
            Bytes.
        """
        if self.has_adapter and self.item_bytes < 4:  # LoRA in float32 keeps float32 copies of its inputs
            per_token = 36.0 * self.hidden + 10.0 * self.inner + 4.0 * self.kv_width
        else:
            streams = 6.0 if self.has_adapter else 8.0
            per_token = self.item_bytes * (streams * self.hidden + 4.0 * self.inner + 2.0 * self.kv_width)
        return shape.tokens * self.upper_layers * (per_token + 28.0 * self.rank + 24.0)

    def forward_bytes(self, shape: Shape) -> float:
        """Memory of a pass without gradients, beside the weights.

        Args:
            shape: the batch.

        Returns:
            Bytes.
        """
        layer = shape.tokens * self.item_bytes * (6.0 * self.hidden + 3.0 * self.inner)
        return layer + LOGIT_COPIES[0] * self.logits_bytes(shape)

    def gradient_bytes(self, shape: Shape) -> float:
        """Memory of a forward and backward pass, beside the weights.

        Args:
            shape: the batch.

        Returns:
            Bytes.
        """
        return self.saved_bytes(shape) + LOGIT_COPIES[1] * self.logits_bytes(shape)

    def cache_bytes(self, shape: Shape) -> float:
        """Memory of generation beside the weights: keys and values, and the scores of one step.

        Args:
            shape: prompts, and as ``answer`` the tokens drawn for each.

        Returns:
            Bytes.
        """
        kept = 2.0 * self.item_bytes * self.layers * self.kv_width * shape.rows * (shape.width + shape.answer)
        return kept + self.forward_bytes(replace(shape, answer=0))


def sizes_of(model: nn.Module, load_in_4bit: bool = False) -> Sizes:
    """Read the sizes off a model, which may lie on the meta device.

    Args:
        model: a causal language model of transformers, with an adapter or without.
        load_in_4bit: count the matrices of the body as quantised to 4 bits.

    Returns:
        The sizes.
    """
    base = cast(PreTrainedModel, model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]
    config: Any = base.config.get_text_config()
    output = base.get_output_embeddings()
    head = 0 if output is None else cast(Any, output).out_features * cast(Any, output).in_features
    matrices, lora = _matrices(base, output, config)
    layers = int(config.num_hidden_layers)
    trained = [layer for _, layer in lora if layer is not None]
    lowest = min(trained, default=0)
    parameters = {id(value): value for value in base.parameters()}.values()
    names = dict(base.named_parameters())
    adapter = [value for name, value in names.items() if "lora_" in name]
    body = sum(size for size, _ in matrices)
    stored = sum(value.numel() * value.element_size() for value in parameters)
    if load_in_4bit:
        stored -= int(body * (_item_bytes(base) - NF4_BYTES))
    width = int(config.num_attention_heads * (getattr(config, "head_dim", None) or _head_width(config)))
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Sizes(
        parameters=sum(value.numel() for value in parameters) - sum(value.numel() for value in adapter),
        trainable=sum(value.numel() for value in parameters if value.requires_grad),
        stored_bytes=stored,
        body=body,
        upper=sum(size for size, layer in matrices if layer is None or layer >= lowest),
        head=head,
        lora_in=sum(value.numel() for name, value in names.items() if ".lora_A." in name),
        lora_out=sum(value.numel() for name, value in names.items() if ".lora_B." in name),
        layers=layers,
        upper_layers=layers - lowest,
        hidden=int(config.hidden_size),
        heads_width=width,
        kv_width=width * int(kv_heads) // int(config.num_attention_heads),
        inner=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        item_bytes=_item_bytes(base),
        has_adapter=bool(adapter),
        all_logits="logits_to_keep" not in inspect.signature(base.forward).parameters,
        rank=max((value.shape[0] for name, value in names.items() if ".lora_A." in name), default=0),
    )


def _matrices(
    base: nn.Module, output: nn.Module | None, config: Any
) -> tuple[list[tuple[int, int | None]], list[tuple[int, int | None]]]:
    """Weights and layer number of every matrix that a token passes: those of the body, and those of LoRA."""
    body: list[tuple[int, int | None]] = []
    lora: list[tuple[int, int | None]] = []
    for name, module in base.named_modules():
        for key, value in module.named_parameters(recurse=False):
            layer = _layer(name)
            if value.dim() == 3:  # experts, of which a token passes some
                share = (getattr(config, "num_experts_per_tok", None) or 1) / value.shape[0]
                body.append((int(value.numel() * share), layer))
            if key != "weight" or module is output or isinstance(module, nn.Embedding):
                continue
            columns, rows = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
            count = columns * rows or value.numel()  # 4-bit weights are packed
            if ".lora_" in name:
                lora.append((count, layer))
            elif value.dim() == 2:
                body.append((count, layer))
    return body, lora


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return None if found is None else int(found[1])


def _item_bytes(base: PreTrainedModel) -> int:
    """Bytes of an activation: those of the embedding, which is never quantised."""
    return cast(nn.Embedding, base.get_input_embeddings()).weight.element_size()


def _head_width(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_attention_heads)
