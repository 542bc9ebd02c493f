"""The trainers of TRL with our tokens, our reference and our meter. Importing this module needs TRL.

Their datasets hold row numbers alone; the collators here turn them into the very tokens and answer masks that
:class:`~u2a.encoding.Encoder` gives every other arm, and TRL's own collators pad them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from u2a.encoding import Encoded
from u2a.experiment.meter import Meter
from u2a.modeling import Policy

Picked = Sequence[dict[str, int]]


def row_numbers(n: int) -> Dataset:
    """Make the dataset of a trainer whose collator holds the rows.

    Args:
        n: rows.

    Returns:
        One column ``row``: 0 to n - 1, in memory.
    """
    return Dataset.from_dict({"row": list(range(n))})


def prompt_ids(row: Encoded) -> list[int]:
    """The tokens before the answer."""
    return list(row.input_ids[: -row.n_answer])


def mismatched(rows: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Put behind every prompt the answer of the row before it, and behind the first prompt the last answer.

    KTO estimates the divergence from the reference on them (Ethayarajh et al. 2024, arXiv 2402.01306).

    Args:
        rows: one batch.
        max_length: most tokens; a longer answer is cut.

    Returns:
        As many rows.
    """
    made = []
    for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        head = tuple(prompt_ids(row))
        answer = other.answer_ids[: max_length - len(head)]
        made.append(Encoded(head + answer, len(answer)))
    return made


@dataclass
class AnswerCollator:
    """Batches of answers to learn (SFT).

    Attributes:
        rows: the encoded answers.
        pad_id: padding token.
    """

    rows: Sequence[Encoded]
    pad_id: int

    def __call__(self, picked: Picked) -> dict[str, Any]:
        """Collate the rows of the numbers picked."""
        rows = [self.rows[item["row"]] for item in picked]
        ids = [list(row.input_ids) for row in rows]
        labels = [[-100] * len(prompt_ids(row)) + list(row.answer_ids) for row in rows]
        examples = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
        return DataCollatorForLanguageModeling(pad_token_id=self.pad_id)(examples)


@dataclass
class PairCollator:
    """Batches of pairs with their reference log-probabilities (DPO), computed here where they are not known yet.

    Attributes:
        rows: encoded chosen and rejected answer of every pair.
        policy: gives the reference.
        meter: counts it.
    """

    rows: Sequence[tuple[Encoded, Encoded]]
    policy: Policy
    meter: Meter

    def __call__(self, picked: Picked) -> dict[str, Any]:
        """Collate the rows of the numbers picked."""
        rows = [self.rows[item["row"]] for item in picked]
        with self.meter.phase("reference"):
            sums = self.policy.reference_sums([row for pair in rows for row in pair]).tolist()
        examples = [
            {
                "prompt_ids": prompt_ids(chosen),
                "chosen_ids": list(chosen.answer_ids),
                "rejected_ids": list(rejected.answer_ids),
                "ref_chosen_logps": sums[2 * index],
                "ref_rejected_logps": sums[2 * index + 1],
            }
            for index, (chosen, rejected) in enumerate(rows)
        ]
        return DataCollatorForPreference(pad_token_id=self.policy.encoder.pad_id)(examples)


@dataclass
class LabelledCollator:
    """Batches of answers labelled good or bad, with mismatched answers and reference log-probabilities (KTO).

    Attributes:
        rows: encoded answers.
        labels: True for a good one.
        policy: gives the reference.
        meter: counts it.
    """

    rows: Sequence[Encoded]
    labels: Sequence[bool]
    policy: Policy
    meter: Meter

    def __call__(self, picked: Picked) -> dict[str, Any]:
        """Collate the rows of the numbers picked."""
        rows = [self.rows[item["row"]] for item in picked]
        others = mismatched(rows, self.policy.encoder.max_length)
        with self.meter.phase("reference"):
            sums = self.policy.reference_sums([*rows, *others]).tolist()
        examples = [
            {
                "prompt_ids": prompt_ids(row),
                "completion_ids": list(row.answer_ids),
                "KL_completion_ids": list(other.answer_ids),
                "label": self.labels[item["row"]],
                "ref_logps": sums[index],
                "ref_KL_logps": sums[len(rows) + index],
            }
            for index, (item, row, other) in enumerate(zip(picked, rows, others, strict=True))
        ]
        return DataCollatorForUnpairedPreference(pad_token_id=self.policy.encoder.pad_id)(examples)


class AnswerTrainer(SFTTrainer):
    """TRL's SFT without telemetry."""

    def _send_telemetry(self) -> None:
        """Send nothing."""


class PairTrainer(DPOTrainer):
    """TRL's DPO on encoded rows, without telemetry."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Leave the row numbers alone."""
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing."""


class LabelledTrainer(KTOTrainer):
    """TRL's KTO on encoded rows, without telemetry."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Leave the row numbers alone."""
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing."""


class _Metered:
    """Put before a trainer of TRL that samples: generation and reference are counted by name, without telemetry.

    Attributes:
        meter: set after construction.
    """

    meter: Meter
    model: Any

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        """Count the generation."""
        with self.meter.phase("generate"):
            return super()._generate_single_turn(*arguments, **named)  # type: ignore[misc]

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
        """Count passes with the adapter disabled as the reference's, and those of the policy with gradients."""
        off = adapter_is_off(self.model)
        with self.meter.phase("reference") if off else self._counted():
            return super()._get_per_token_logps_and_entropies(*arguments, **named)  # type: ignore[misc]

    def _counted(self) -> AbstractContextManager[None]:
        # TRL's RLOO asks for the log-probabilities of fresh answers without gradients, too. With one step per draw they
        # are those of the training pass: a sparing implementation has no such pass, so it is not charged.
        return self.meter.phase("train") if torch.is_grad_enabled() else self.meter.paused()

    def _send_telemetry(self) -> None:
        """Send nothing."""


class MeteredRloo(_Metered, RLOOTrainer):
    """TRL's RLOO, metered."""


class MeteredGrpo(_Metered, GRPOTrainer):
    """TRL's GRPO, metered."""


def adapter_is_off(model: Any) -> bool:
    """Whether a PEFT model's adapter is disabled at the moment."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return isinstance(model, PeftModel) and any(layer.disable_adapters for layer in layers)
