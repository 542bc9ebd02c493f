"""Generation by vLLM from an exported model: the interface of :class:`PolicyGenerator`, for large models on a GPU.

vLLM is an optional extra. Its answers depend on the prompt and the seed, but its sampler is its own, so sampled answers
are not those of :class:`PolicyGenerator`; greedy ones agree up to rounding. vLLM does not tell NaN logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from u2a.encoding import Encoder
from u2a.errors import ConfigError, ModelError
from u2a.evaluation.answer_cache import AnswerCache
from u2a.evaluation.decoding import Answer, Decoding, Ids, answer_in_batches, cut_at_end
from u2a.progress import Advance, Quiet
from u2a.record import content_id, derive_seed
from u2a.types import Message

TEMPERATURES = (0.01, 2.0)
"""Sampling temperatures that vLLM uses as they are: it raises lower ones and refuses higher ones."""

PROMPTS_PER_CALL = 512
"""Prompts handed to vLLM at once; their answers are kept when all of them are done."""


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM runs a model.

    Attributes:
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        max_model_len: most tokens of prompt and answer; None for the model's own limit.
        gpu_memory_frac: share of each GPU's memory that vLLM may take, in (0, 1].
        n_gpus: GPUs that share the model, >= 1.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_frac: float = 0.9
    n_gpus: int = 1


class VllmGenerator:
    """Answers prompts with a model folder (safetensors, configuration, tokenizer) loaded by vLLM.

    Args:
        model_dir: the exported model, adapter merged.
        options: how vLLM runs it.
        cache: answers made before and the place for new ones, or None.

    Raises:
        ConfigError: vLLM cannot be imported.
        ModelError: there is no model with a tokenizer in the folder.
    """

    def __init__(
        self, model_dir: str | Path, options: EngineOptions | None = None, cache: AnswerCache | None = None
    ) -> None:
        try:
            from vllm import LLM  # type: ignore[import-not-found]
        except ImportError as error:
            raise ConfigError(f"generation by vLLM: {error} (in the clone: pip install '.[vllm]')") from None

        folder, options = Path(model_dir), options or EngineOptions()
        self._encoder, self._cache = _load_encoder(folder), cache
        self._fingerprint = content_id("vllm", folder_fingerprint(folder), options.dtype) if cache is not None else ""
        self._engine: Any = LLM(
            model=str(folder),
            trust_remote_code=False,
            generation_config="vllm",  # not the model's own sampling settings
            seed=0,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            gpu_memory_utilization=options.gpu_memory_frac,
            tensor_parallel_size=options.n_gpus,
        )

    def generate_ids(
        self, prompts: Sequence[tuple[Message, ...]], decoding: Decoding, bar: Advance | None = None
    ) -> list[Answer]:
        """Answer prompts.

        Args:
            prompts: turns, the last one the user's.
            decoding: how to draw tokens.
            bar: told of every answer.

        Returns:
            Answers in the order given; equal prompts get equal answers.

        Raises:
            ConfigError: vLLM would change the temperature.
            ModelError: vLLM stopped an answer that was neither ended nor at the length limit.
        """
        low, high = TEMPERATURES
        if decoding.temperature and not low <= decoding.temperature <= high:
            raise ConfigError(f"temperature: {decoding.temperature} is not 0 or in [{low}, {high}], as vLLM needs")
        view = (
            self._cache.for_weights(self._fingerprint, decoding, self._encoder.end_ids)
            if self._cache is not None
            else None
        )
        return answer_in_batches(
            [self._encoder.encode_prompt(prompt) for prompt in prompts],
            decode=lambda batch: self._decode(batch, decoding),
            batch_size=lambda _: PROMPTS_PER_CALL,
            known=view,
            bar=bar or Quiet(),
        )

    def text(self, answer: Answer) -> str:
        """Decode an answer.

        Args:
            answer: the answer's tokens.

        Returns:
            Its text without special tokens and outer white space.
        """
        return self._encoder.tokenizer.decode(list(answer.ids), skip_special_tokens=True).strip()  # type: ignore[union-attr]

    def _decode(self, prompts: list[Ids], decoding: Decoding) -> list[Answer]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        rules = [
            SamplingParams(
                temperature=decoding.temperature,
                top_k=decoding.top_k or 0,  # 0 is all
                top_p=1.0 if decoding.top_p is None else decoding.top_p,
                seed=derive_seed(decoding.seed, str(ids)),
                max_tokens=decoding.max_new_tokens,
                stop_token_ids=sorted(self._encoder.end_ids),
                ignore_eos=True,  # stop_token_ids alone decide
                detokenize=False,
            )
            for ids in prompts
        ]
        tokens = [{"prompt_token_ids": list(ids)} for ids in prompts]
        results = self._engine.generate(tokens, rules, use_tqdm=False)
        return [self._answer(result.outputs[0], decoding) for result in results]

    def _answer(self, output: Any, decoding: Decoding) -> Answer:
        answer = cut_at_end(list(output.token_ids), self._encoder.end_ids)
        if answer.end_id is None and output.stop_reason in self._encoder.end_ids:
            answer = Answer(answer.ids, output.stop_reason)  # left out of the tokens
        if not answer.finished and len(answer.ids) < decoding.max_new_tokens:
            raise ModelError(
                f"vLLM stopped an answer after {len(answer.ids)} of {decoding.max_new_tokens} tokens "
                f"({output.finish_reason}): prompt and answer need a larger max_model_len, or fewer new tokens"
            )
        return answer


def folder_fingerprint(model_dir: str | Path) -> str:
    """Identify an exported model by every byte of its weights and settings.

    Args:
        model_dir: the folder; its name does not count.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(model_dir).iterdir()):
        if path.suffix in (".safetensors", ".json"):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'blake2b').hexdigest()} ".encode())
    return digest.hexdigest()


def _load_encoder(folder: Path) -> Encoder:
    """The tokenizer of an exported model, with the end-of-turn tokens of its generation config."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        has_settings = (folder / "generation_config.json").exists()
        ends = GenerationConfig.from_pretrained(folder).eos_token_id if has_settings else None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no exported model with a tokenizer there ({error})") from None
    more = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return Encoder(tokenizer, max_length=2, end_ids=more)  # prompts are never cut
