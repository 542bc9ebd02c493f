"""Arms of the pairs track that TRL trains on given answers: SFT on the chosen ones, DPO and KTO."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftModel

from u2a.encoding import Encoded
from u2a.errors import ConfigError
from u2a.experiment.arm import Budget, Track, Trained
from u2a.experiment.meter import Meter
from u2a.experiment.setting import Setting
from u2a.experiment.trl_run import (
    callbacks,
    check_trial,
    common_options,
    drop_reference_adapter,
    lent,
    own_tokenizer,
    require_trl,
    run_trainer,
)
from u2a.record import derive_seed

if TYPE_CHECKING:
    from transformers import Trainer

Method = Literal["sft", "dpo", "kto"]
KNOWN: dict[Method, tuple[str, ...]] = {
    "sft": ("learning_rate",),
    "dpo": ("learning_rate", "beta"),
    "kto": ("learning_rate", "beta"),
}


@dataclass(frozen=True)
class PreferenceArm:
    """SFT on chosen answers, DPO or KTO, by the trainers of TRL, with the tokens and masks of all other arms.

    A step takes ``unlearn.batch_size`` answers (sft, kto) or pairs (dpo). The losses, averaged over a batch:

    - sft: -sum_i s_i / sum_i T_i over the chosen answers;
    - dpo: -log sigmoid(beta (r_chosen - r_rejected)) with r = s - s_reference (Rafailov et al. 2023,
      arXiv 2305.18290, equation 7);
    - kto: 1 - sigmoid(beta (r - z)) for a chosen and 1 - sigmoid(beta (z - r)) for a rejected answer, z >= 0 the
      batch mean of r on mismatched answers, without gradient (Ethayarajh et al. 2024, arXiv 2402.01306).

    Attributes:
        method: which one; also the arm's name.
    """

    method: Method
    track: Track = "pairs"

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.method

    def train(self, setting: Setting, trial: Mapping[str, float], meter: Meter, budget: Budget) -> Trained:
        """Train until the budget is spent.

        Args:
            setting: pairs, options and policy at theta_0.
            trial: ``learning_rate``, and ``beta`` (> 0; 0.1) for dpo and kto.
            meter: counts.
            budget: how much may be spent.

        Returns:
            What was done.
        """
        require_trl()
        check_trial(self.name, trial, KNOWN[self.method])
        with tempfile.TemporaryDirectory(prefix="u2a-") as folder, lent(setting.policy) as model:
            options = common_options(setting, trial, folder)
            if self.method != "sft":
                options["beta"] = trial.get("beta", 0.1)
            trainer = make_trainer(self.method, setting, model, options, meter)
            for callback in callbacks(self.name, budget):
                trainer.add_callback(callback)
            return run_trainer(self.name, trainer, setting.policy, meter)


def make_trainer(method: Method, setting: Setting, model: PeftModel, options: dict[str, Any], meter: Meter) -> Trainer:
    """Make the trainer of TRL for one method.

    Args:
        method: sft, dpo or kto.
        setting: pairs and policy.
        model: the policy's model, lent.
        options: as :func:`~u2a.experiment.trl_run.common_options` gives them, and ``beta`` for dpo and kto.
        meter: counts the reference.

    Returns:
        The trainer.

    Raises:
        ConfigError: no pairs, or a batch too small for kto.
    """
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.sft_config import SFTConfig

    from u2a.experiment import trl_trainers as ours

    policy, chosen, rejected = setting.policy, *encoded_pairs(setting)
    tokenizer = own_tokenizer(policy)
    if method == "sft":
        return ours.AnswerTrainer(
            model=model,
            args=SFTConfig(
                **_batched(options, setting, len(chosen)),
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            data_collator=ours.AnswerCollator(chosen, policy.encoder.pad_id),
            train_dataset=ours.row_numbers(len(chosen)),
            processing_class=tokenizer,
        )
    if method == "dpo":
        with meter.phase("reference"):  # one pass over rows sorted by length, as the unlearning arms have
            policy.reference_sums([*chosen, *rejected])
        trainer = ours.PairTrainer(
            model=model,
            args=DPOConfig(**_batched(options, setting, len(chosen)), max_length=None),
            data_collator=ours.PairCollator(list(zip(chosen, rejected, strict=True)), policy, meter),
            train_dataset=ours.row_numbers(len(chosen)),
            processing_class=tokenizer,
        )
    else:
        options = _batched(options, setting, 2 * len(chosen))
        if options["per_device_train_batch_size"] < 2:
            raise ConfigError("unlearn.batch_size: 1 conflicts with arm kto, which compares answers (set at least 2)")
        rows = [(row, True) for row in chosen] + [(row, False) for row in rejected]
        random.Random(derive_seed(setting.seed, "kto")).shuffle(rows)  # KTO reads in the order given
        trainer = ours.LabelledTrainer(
            model=model,
            args=KTOConfig(**options, max_length=None),
            data_collator=ours.LabelledCollator([row for row, _ in rows], [label for _, label in rows], policy, meter),
            train_dataset=ours.row_numbers(len(rows)),
            processing_class=tokenizer,
        )
    drop_reference_adapter(model)
    trainer.precompute_ref_logps = True  # the collator brings them
    return trainer


def encoded_pairs(setting: Setting) -> tuple[list[Encoded], list[Encoded]]:
    """Encode both answers of every pair.

    Args:
        setting: pairs and policy.

    Returns:
        Chosen and rejected answers, in the order of ``setting.pairs``.

    Raises:
        ConfigError: there are no pairs.
    """
    pairs, encode = setting.pairs, setting.policy.encoder.encode
    if not pairs:
        raise ConfigError("the arms of the pairs track need pairs (set data.pairs or data.preferences)")
    chosen = [encode(pair.prompt, pair.chosen, pair.source) for pair in pairs]
    return chosen, [encode(pair.prompt, pair.rejected, pair.source) for pair in pairs]


def _batched(options: dict[str, Any], setting: Setting, n_rows: int) -> dict[str, Any]:
    """The options with the batch size, at most the number of rows."""
    return {**options, "per_device_train_batch_size": min(setting.config.unlearn.batch_size, n_rows)}
