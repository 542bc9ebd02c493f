"""What to change in the options so that a run fits into memory, each change with the peak it would have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from u2a.config import RunConfig
from u2a.encoding import Encoder
from u2a.errors import DataError
from u2a.forecast.flops import sizes_of
from u2a.forecast.phases import Basis, with_formulas
from u2a.forecast.text import size_text
from u2a.forecast.workload import Workload

WORTH = 0.03  # a change that saves less than this share of the peak is not named


def advice(basis: Basis, shapes: nn.Module) -> list[str]:
    """List changes of the options that lower the peak, the most helpful first.

    Args:
        basis: the run that does not fit.
        shapes: the policy's model on the meta device.

    Returns:
        One line per change, each on its own.
    """
    before = with_formulas(basis)
    found = []
    for text, changed in _changes(basis, shapes):
        peak = with_formulas(changed)
        if peak <= (1 - WORTH) * before:
            found.append((peak, f"{text}: {size_text(peak)} by formula instead of {size_text(before)}"))
    lines = [line for _, line in sorted(found)]
    return [*lines, "fewer solve.rounds and evaluation.controls save time, not memory"]


def _changes(basis: Basis, shapes: nn.Module) -> Iterator[tuple[str, Basis]]:
    """Changes one at a time."""
    config, sizes = basis.workload.config, basis.sizes
    model, inner = config.model, config.unlearn
    if not model.adapter.enabled:
        yield "model.adapter.enabled: true", replace(basis, sizes=replace(sizes, trainable=sizes.parameters // 100))
    elif not model.load_in_4bit:
        gpu = "" if basis.gpu else " (needs a GPU)"
        yield f"model.load_in_4bit: true{gpu}", replace(basis, sizes=sizes_of(shapes, load_in_4bit=True))
        if sizes.item_bytes == 4:
            half = replace(sizes, stored_bytes=sizes.stored_bytes - 2 * sizes.parameters, item_bytes=2)
            yield "model.dtype: bfloat16", replace(basis, sizes=half)
    if model.adapter.enabled and model.adapter.layers is None:
        upper = sizes.layers - sizes.layers // 2
        kept = replace(sizes, upper_layers=upper, trainable=sizes.trainable // 2)
        yield f"model.adapter.layers: the upper {upper} of {sizes.layers}", replace(basis, sizes=kept)
    yield f"token_budget: {config.token_budget // 2}", _with(basis, token_budget=config.token_budget // 2)
    if inner.batch_size > 1:
        smaller = {
            "batch_size": inner.batch_size // 2,
            "retain_batch_size": max(1, inner.retain_batch_size // 2),
            "gradient_accumulation_steps": 2 * inner.gradient_accumulation_steps,
        }
        text = ", ".join(f"unlearn.{name}: {value}" for name, value in smaller.items())
        yield text, _with(basis, unlearn=inner.model_copy(update=smaller))
    length = config.data.max_length // 2
    with contextlib.suppress(DataError):  # a prompt would leave no room for an answer
        yield f"data.max_length: {length}", _with(basis, data=config.data.model_copy(update={"max_length": length}))
    if config.solve.folds > 2:
        section = config.solve.model_copy(update={"folds": 2})
        changed = _with(basis, solve=section)
        fewer = replace(changed, directions=changed.workload.n_directions)
        yield "solve.folds: 2 (coarser standard errors)", fewer
    if config.solve.scorer in ("auto", "backward"):
        yield (
            "solve.scorer: central (slower)",
            _with(basis, solve=config.solve.model_copy(update={"scorer": "central"})),
        )


def _with(basis: Basis, **options: object) -> Basis:
    """The same run with other options."""
    old = basis.workload
    config: RunConfig = old.config.model_copy(update=options)
    encoder = Encoder(old.encoder.tokenizer, config.data.max_length)
    workload = Workload(config, old.partition, encoder, old.prompt_sets, old.holdout)
    return replace(basis, workload=workload, measured=None)
