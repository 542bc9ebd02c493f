"""A decoder small enough for dense Hessians, as pure functions of a dictionary of float64 tensors.

transformers' Llama computes its norms and softmax in float32 whatever the dtype, so re-solved inner problems stop
at a gradient of about 1e-7. Here nothing is ever cast: token and position embeddings, then pre-norm blocks of causal
attention and a SiLU-gated MLP, a last norm and an output matrix. A weight ``name`` may carry LoRA factors
``name_lora_a`` and ``name_lora_b``; its effective value is then ``name + b @ a``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        vocab: token ids are below it.
        width: of the residual stream; a multiple of ``heads``.
        layers: blocks.
        heads: attention heads.
        hidden: width of the MLP.
        length: most tokens of a sequence.
    """

    vocab: int = 48
    width: int = 16
    layers: int = 2
    heads: int = 2
    hidden: int = 24
    length: int = 10

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights by name.

        Returns:
            Matrices as (out, in), norms as (width,).
        """
        square, up = (self.width, self.width), (self.hidden, self.width)
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": (self.vocab, self.width),
            "positions": (self.length, self.width),
        }
        for layer in range(self.layers):
            block: dict[str, tuple[int, ...]] = {"norm1": (self.width,), "norm2": (self.width,)}
            block |= {"q": square, "k": square, "v": square, "o": square}
            block |= {"gate": up, "up": up, "down": (self.width, self.hidden)}
            shapes |= {f"layer{layer}_{name}": size for name, size in block.items()}
        return shapes | {"norm": (self.width,), "head": (self.vocab, self.width)}


@dataclass(frozen=True)
class Decoder:
    """A decoder whose trainable numbers theta are given at every call.

    Attributes:
        shape: sizes.
        frozen: weights that stay, float64.
    """

    shape: Shape
    frozen: Params

    def logits(
        self, theta: Params, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            theta: the trainable weights; together with the frozen ones they are all of ``shape.weights()``.
            tokens: (batch, length) ids.
            mask: (batch, length) true on real tokens; None: all are. What stands at padding is meaningless.
            positions: (batch, length) position of each token; None: counted from the left.

        Returns:
            (batch, length, vocab) float64.
        """
        params = {**self.frozen, **theta}
        length = tokens.shape[1]
        places = torch.arange(length).expand_as(tokens) if positions is None else positions
        seen = torch.ones(length, length, dtype=torch.bool).tril().expand(len(tokens), length, length)
        if mask is not None:  # a token always sees itself, so that padding has a softmax, too
            seen = seen & (mask.bool()[:, None, :] | torch.eye(length, dtype=torch.bool))
        x = params["tokens"][tokens] + params["positions"][places]
        for layer in range(self.shape.layers):
            x = x + self._attention(params, f"layer{layer}_", rms_norm(x, params[f"layer{layer}_norm1"]), seen)
            x = x + _mlp(params, f"layer{layer}_", rms_norm(x, params[f"layer{layer}_norm2"]))
        return linear(params, "head", rms_norm(x, params["norm"]))

    def _attention(self, params: Params, prefix: str, x: Tensor, seen: Tensor) -> Tensor:
        """Causal attention, written out: softmax(q k' / sqrt(d)) v."""
        batch, length, width = x.shape
        heads, size = self.shape.heads, width // self.shape.heads
        q, k, v = (
            linear(params, prefix + name, x).reshape(batch, length, heads, size).transpose(1, 2) for name in "qkv"
        )
        scores = (q @ k.transpose(2, 3) / math.sqrt(size)).masked_fill(~seen[:, None], -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        return linear(params, prefix + "o", mixed)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm.

    Args:
        x: (..., width).
        scale: (width,).

    Returns:
        (..., width).
    """
    return x / (x.square().mean(-1, keepdim=True) + _NORM_EPS).sqrt() * scale


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """Apply a weight, x W', where W includes LoRA factors if there are any.

    Args:
        params: all weights.
        name: of W.
        x: (..., in).

    Returns:
        (..., out).
    """
    out = x @ params[name].T
    if f"{name}_lora_a" in params:
        out = out + x @ params[f"{name}_lora_a"].T @ params[f"{name}_lora_b"].T
    return out


def _mlp(params: Params, prefix: str, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    gated = F.silu(linear(params, prefix + "gate", x)) * linear(params, prefix + "up", x)
    return linear(params, prefix + "down", gated)


def random_weights(seed: int, shape: Shape) -> Params:
    """Draw all weights.

    Args:
        seed: of the draw.
        shape: sizes.

    Returns:
        float64; matrices with variance 1 / in (embeddings and head with variance 1), norms around 1.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in shape.weights().items():
        draw = torch.randn(size, generator=generator, dtype=torch.float64)
        if len(size) == 1:
            weights[name] = 1.0 + 0.1 * draw
        else:
            weights[name] = draw if name in ("tokens", "positions") else draw / size[1] ** 0.5
    return weights


def lora_decoder(
    seed: int, shape: Shape = Shape(), rank: int = 2, modules: Sequence[str] = ("q", "v", "up")
) -> tuple[Decoder, Params]:
    """A decoder of which only LoRA factors are trained.

    Args:
        seed: of all draws.
        shape: sizes.
        rank: of the factors.
        modules: adapted matrices of every layer.

    Returns:
        (decoder, theta_0). The factors B of theta_0 are not 0, as after a warm-up: at B = 0 the gradient with
        respect to A vanishes.
    """
    frozen, theta = random_weights(seed, shape), {}
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in range(shape.layers):
        for module in modules:
            name = f"layer{layer}_{module}"
            out, into = frozen[name].shape
            a = torch.randn(rank, into, generator=generator, dtype=torch.float64)
            b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
            theta |= {f"{name}_lora_a": a / into**0.5, f"{name}_lora_b": 0.3 * b}
    return Decoder(shape, frozen), theta


def full_decoder(seed: int, trained: Sequence[str], shape: Shape = Shape()) -> tuple[Decoder, Params]:
    """A decoder of which some weights themselves are trained, and the others frozen.

    Args:
        seed: of the draw.
        trained: names of the trained weights, of ``shape.weights()``.
        shape: sizes.

    Returns:
        (decoder, theta_0).
    """
    weights = random_weights(seed, shape)
    theta = {name: weights.pop(name) for name in trained}
    return Decoder(shape, weights), theta


def flatten(params: Params) -> Tensor:
    """Write parameters as one column, differentiably.

    Args:
        params: tensors by name.

    Returns:
        (d,), blocks in the order of the dictionary.
    """
    return torch.cat([value.flatten() for value in params.values()])


def unflatten(column: Tensor, like: Params) -> Params:
    """Undo :func:`flatten`, differentiably.

    Args:
        column: (d,).
        like: gives names and shapes.

    Returns:
        Tensors by name.
    """
    parts = column.split([value.numel() for value in like.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}
