"""The paper's misaligned start: supervised fine-tuning on good and bad answers, merged into the weights."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback

from u2a.callbacks import StepReporter
from u2a.checkpoint import newest_whole
from u2a.config import FinetuneSection
from u2a.errors import ConfigError
from u2a.modeling import Policy
from u2a.progress import Advance
from u2a.record import content_id, writing
from u2a.trainer import UnlearnTrainer
from u2a.trainer_config import UnlearnConfig
from u2a.types import Example, Pair, Partition


def mixture(
    partition: Partition, section: FinetuneSection, seed: int, leave_out_forget: bool = False
) -> tuple[Example, ...]:
    """Choose the answers of the supervised mixture.

    With ``include_forget`` the candidates themselves are bad answers of the mixture (so that there is something to
    unlearn); each fine-tuning pair gives its good or its bad answer, so many bad ones that the share of bad answers
    in the whole is ``unsafe_frac``, as far as the sizes allow.

    Args:
        partition: the sets.
        section: options.
        seed: which pairs give which answer.
        leave_out_forget: leave the candidates out afterwards (the baseline *Retrain*: the same mixture without the
            forget set).

    Returns:
        Rows to train on.

    Raises:
        ConfigError: the mixture is empty.
    """
    candidates = partition.forget if section.include_forget else ()
    pairs = sorted(partition.finetune, key=lambda pair: content_id(str(seed), "mixture", pair.id))
    total = len(candidates) + len(pairs)
    n_bad = min(len(pairs), max(0, round(section.unsafe_frac * total) - len(candidates)))
    rows = [_answer(pair, pair.rejected) for pair in pairs[:n_bad]] + [
        _answer(pair, pair.chosen) for pair in pairs[n_bad:]
    ]
    kept = () if leave_out_forget else tuple(row.model_copy(update={"weight": None}) for row in candidates)
    if not rows and not kept:
        raise ConfigError("finetune: the mixture is empty (raise partition.finetune_frac or set data.finetune)")
    return (*rows, *kept)


def _answer(pair: Pair, completion: str) -> Example:
    return Example(
        id=content_id(pair.id, completion),
        prompt=pair.prompt,
        completion=completion,
        kind=pair.kind,
        source=pair.source,
    )


def n_steps(n_rows: int, section: FinetuneSection) -> int:
    """Return the optimiser steps of fine-tuning.

    Args:
        n_rows: size of the mixture.
        section: options.

    Returns:
        Steps, at least 1.
    """
    return max(1, math.ceil(section.epochs * n_rows / section.batch_size))


def finetune(
    policy: Policy,
    rows: tuple[Example, ...],
    section: FinetuneSection,
    seed: int,
    advance: Advance,
    output_dir: Path | None = None,
    save_minutes: float = 0.0,
) -> PreTrainedModel:
    """Fine-tune on answers (NLL per answer token, averaged over rows) and merge the change into the weights.

    Args:
        policy: a fresh policy around the base model; it must not be used afterwards.
        rows: answers to learn.
        section: options.
        seed: order of the rows.
        advance: progress, told steps.
        output_dir: where checkpoints go; an interrupted run found there is resumed. None: nowhere.
        save_minutes: minutes between checkpoints.

    Returns:
        The merged model.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="u2a-") as nowhere:
        folder = output_dir or Path(nowhere)
        args = UnlearnConfig(
            output_dir=str(folder),
            loss="sft",
            retain_term="none",
            guard=False,
            learning_rate=section.learning_rate,
            lr_scheduler_type="linear",
            max_steps=n_steps(len(rows), section),
            per_device_train_batch_size=min(section.batch_size, len(rows)),
            optim="adamw_torch",
            logging_steps=10,
            save_strategy="no",
            save_minutes=save_minutes if output_dir else 0.0,
            report_to="none",
            seed=seed,
            disable_tqdm=True,
            use_cpu=policy.device.type == "cpu",
            dataloader_pin_memory=policy.device.type != "cpu",
        )
        with writing(folder):  # the base class makes it
            trainer = UnlearnTrainer(model=policy, args=args, train_dataset=rows, callbacks=[StepReporter(advance)])
        trainer.phase = "misaligned start"
        trainer.remove_callback(PrinterCallback)
        last = newest_whole(folder)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model = policy.model
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return merged.eval()  # type: ignore[return-value]
