"""Answers kept by content: the same weights, prompt and decoding rule never generate twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, uint8
from transformers import PreTrainedModel

from u2a.evaluation.decoding import Answer, Decoding, Ids
from u2a.jsonl_cache import JsonlCache
from u2a.modeling import Policy, weights_fingerprint
from u2a.record import content_id


class AnswerCache:
    """The file of answers in a folder; it outlives a killed process and may be shared by several (see JsonlCache).

    Args:
        folder: holds ``answers.jsonl``; made by the first answers.
    """

    def __init__(self, folder: str | Path) -> None:
        self._file = JsonlCache(Path(folder) / "answers.jsonl")

    @property
    def n(self) -> int:
        """Answers held."""
        return self._file.n

    @property
    def n_damaged(self) -> int:
        """Lines of the file that could not be read."""
        return self._file.n_damaged

    def for_policy(self, policy: Policy, decoding: Decoding) -> CachedAnswers:
        """Choose the answers of a policy as it is now.

        Args:
            policy: the policy; its weights must not change while the result is used.
            decoding: the decoding rule.

        Returns:
            Its answers.
        """
        return self.for_weights(policy_fingerprint(policy), decoding, policy.encoder.end_ids)

    def for_weights(self, fingerprint: str, decoding: Decoding, end_ids: frozenset[int]) -> CachedAnswers:
        """Choose the answers of a model.

        Args:
            fingerprint: stands for all that the model computes, and for the program that runs it.
            decoding: the decoding rule.
            end_ids: the tokens that end an answer.

        Returns:
            Its answers.
        """
        return CachedAnswers(self._file, fingerprint, decoding, end_ids)


class CachedAnswers:
    """The answers of one model under one decoding rule.

    Args:
        file: where they are kept.
        fingerprint: of the model.
        decoding: the rule.
        end_ids: the tokens that end an answer.
    """

    def __init__(self, file: JsonlCache, fingerprint: str, decoding: Decoding, end_ids: frozenset[int]) -> None:
        self._file = file
        self._model = (fingerprint, decoding.key, json.dumps(sorted(end_ids)))

    def find(self, prompts: Sequence[Ids]) -> dict[Ids, Answer]:
        """Look answers up.

        Args:
            prompts: token ids.

        Returns:
            The answers known, by prompt.
        """
        values = {ids: self._file.get(self._key(ids)) for ids in prompts}
        return {ids: Answer(tuple(value["ids"]), value["end_id"]) for ids, value in values.items() if value}

    def add(self, answers: Mapping[Ids, Answer]) -> None:
        """Keep answers; they are on the disk when this returns.

        Args:
            answers: by the prompt's token ids.
        """
        self._file.put_many(
            {self._key(ids): {"ids": list(answer.ids), "end_id": answer.end_id} for ids, answer in answers.items()}
        )

    def _key(self, ids: Ids) -> str:
        return content_id(*self._model, json.dumps(ids))


def policy_fingerprint(policy: Policy) -> str:
    """Identify the function that a policy computes now, whatever its weights were before.

    Every byte of the trainable weights counts; of the frozen ones a sample, their types, the model's configuration
    and the state of each adapter layer (scaling, enabled or not, merged or not).

    Args:
        policy: the policy.

    Returns:
        16 hexadecimal digits.
    """
    model, config = policy.model, cast(PreTrainedModel, policy.model).config
    settings = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "use_cache")}
    layers = [
        (name, module.scaling, module.active_adapters, module.disable_adapters, module.merged_adapters)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
    types = sorted({str(value.dtype) for value in model.parameters()})
    kernel = (config._attn_implementation, policy.device.type, torch.__version__)
    described = json.dumps([settings, layers, types, kernel], sort_keys=True, default=str)
    return content_id(described, weights_fingerprint(model), _digest(policy.trainable()))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash every byte of named tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        raw = value.detach().cpu().contiguous().flatten().view(uint8).numpy().tobytes()
        digest.update(raw)
    return digest.hexdigest()
