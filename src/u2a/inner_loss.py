"""The loss of one micro-batch of an unlearning run, in one place for the trainer and for the replay of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from u2a.encoding import Batch
from u2a.losses import UnlearningLoss, kl_from_reference
from u2a.modeling import Policy, answer_log_probs


@dataclass(frozen=True)
class InnerLoss:
    """mean_{i in B} c_i l_i + lambda L_R of a batch B of :class:`~u2a.stream.BatchMaker`, with c_i = |S| omega_i.

    Attributes:
        policy: the policy; gives the proximal term and the reference.
        loss: the per-sample loss l_i.
        retain_term: ``none``, ``nll``, ``kl`` or ``proximal``.
        retain_weight: lambda >= 0.
        ref_model: reference of the ``kl`` term; None uses the policy's.
    """

    policy: Policy
    loss: UnlearningLoss
    retain_term: str
    retain_weight: float
    ref_model: nn.Module | None = None

    def per_sample(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Losses of the batch's rows.

        Args:
            model: the (possibly wrapped) model.
            inputs: a batch, on the model's device.

        Returns:
            (batch,) l_i in nats.
        """
        return self.loss.per_sample(answer_log_probs(model, Batch(**inputs["forget"])), inputs["reference_sum"])

    def retain(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """Mean over retain rows of the per-row mean over answer tokens; or the proximal term; or None.

        Args:
            model: the (possibly wrapped) model.
            inputs: a batch, on the model's device.

        Returns:
            Scalar L_R, or None where there is no retain term.
        """
        if self.retain_term == "proximal":
            return self.policy.change_sq()
        if "retain" not in inputs:
            return None
        batch = Batch(**inputs["retain"])
        answers = answer_log_probs(model, batch)
        if self.retain_term == "nll":
            return -answers.mean.mean()
        with torch.no_grad():
            if self.ref_model is not None:
                reference = answer_log_probs(self.ref_model, batch)
            else:
                with self.policy.reference() as start:
                    reference = answer_log_probs(start, batch)
        return kl_from_reference(answers.logits, reference.logits, answers.mask).mean()

    def total(self, losses: Tensor, coefficients: Tensor, retain: Tensor | None) -> Tensor:
        """The scalar that a step descends.

        Args:
            losses: (batch,) l_i.
            coefficients: (batch,) c_i >= 0.
            retain: L_R, or None.

        Returns:
            mean_i c_i l_i + lambda L_R.
        """
        forget = (coefficients * losses).mean()
        return forget if retain is None else forget + self.retain_weight * retain
