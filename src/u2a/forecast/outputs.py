"""Which files a run will write, with rough sizes, told from its options before it starts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, cast

from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from u2a.arms import arms_of
from u2a.checkpoint import MANIFEST
from u2a.config import RunConfig
from u2a.forecast.flops import Sizes
from u2a.forecast.phases import FileSize
from u2a.forecast.workload import Workload
from u2a.report import MAX_CHARS, MAX_ROWS
from u2a.types import Partition

ROW_BYTES = 450  # of a score, a weight or a metric in a record, about
CSV_ROW_BYTES = 150  # of a candidate's numbers and reason in candidates.csv, about
PAGE_BYTES = 60_000  # of the report without its rows
TEXT_BYTES = 1.1  # of a stored text, over its own length: quotes and escapes


def files_of(workload: Workload, sizes: Sizes, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[FileSize]:
    """List the files of a whole run.

    Args:
        workload: options and data.
        sizes: of the policy.
        model: the policy's model, which may lie on the meta device.
        tokenizer: its tokenizer.

    Returns:
        Files below ``output_dir`` when it is done, by name; checkpoints are gone by then.
    """
    config, sets = workload.config, workload.partition
    section, trained = config.evaluation, 4 * sizes.trainable
    n_forget, n_asked = len(sets.forget), min(section.generate_prompts, len(sets.evaluation))
    arms = ["before", "after", *section.controls]
    if section.equal_ppl_frac is not None:
        arms += [name.removeprefix("evaluate ") for name in workload.phases if name.endswith("_equal_ppl")]
    texts = _text_bytes(sets)
    answers = n_asked * section.max_new_tokens * 5
    sizes_by_name: dict[str, int | None] = {
        "run.yaml": 4_000,
        "stages.json": 120 * len(workload.phases),
        "summary.json": 1_500 + 2_500 * len(arms),
        "metrics.jsonl": 130 * config.unlearn.max_steps * len(arms),
        "partition.json": int(texts + 200 * _n_rows(sets)),
        "diagnosis.json": 7_000,
        "solution.json": ROW_BYTES * n_forget + 20 * n_forget * workload.n_directions,
        "evaluation.json": (ROW_BYTES // 2) * len(arms) * len(sets.evaluation),
        "candidates.csv": int(CSV_ROW_BYTES * n_forget + _candidate_bytes(sets)),
        "report.html": int(PAGE_BYTES + ROW_BYTES * min(n_forget, MAX_ROWS) + _shown_bytes(sets)),
    }
    if config.reward.model != "none":
        tokens = 0 if config.reward.model in ("embedding", "sequence_classification") else _answer_tokens(workload)
        sizes_by_name["rewards.json"] = 150 * n_forget + 22 * tokens
    for arm in arms_of(config):
        sizes_by_name |= {f"unlearn_{arm}.json": 150 * config.unlearn.max_steps, f"arms/{arm}.safetensors": trained}
    sizes_by_name |= {f"arms/{arm}.json": 2_000 + answers + 120 * len(sets.evaluation) for arm in arms}
    if n_asked or workload.prompt_sets:
        sizes_by_name["cache/answers.jsonl"] = 2 * answers * len(arms)
    if n_asked and (config.reward.eval_model != "none" or section.judge.rubric != "refusal"):
        for arm in arms:
            sizes_by_name[f"alpaca_eval/{arm}.outputs.json"] = 2 * answers
            if arm != "before":
                sizes_by_name[f"alpaca_eval/{arm}.annotations.json"] = 4 * answers
    return [
        FileSize(path=path, bytes=size)
        for path, size in sorted((sizes_by_name | _models(config, sizes, model, tokenizer)).items())
    ]


def _models(
    config: RunConfig, sizes: Sizes, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> dict[str, int | None]:
    """Files of the folders that hold models."""
    tokens, whole = _tokenizer_files(tokenizer) | {MANIFEST: 700}, _model_files(model)
    found: dict[str, int | None] = {}
    if sizes.has_adapter:
        adapter = {"adapter_config.json": 1_300, "adapter_model.safetensors": 4 * sizes.trainable, "README.md": 4_000}
        found |= {f"adapter/{name}": size for name, size in (adapter | tokens).items()}
    else:
        found |= {f"model/{name}": size for name, size in (whole | tokens | {"README.md": 4_000}).items()}
    folders = ["base"] if config.finetune.enabled else []
    folders += ["merged"] if config.model.save_merged and sizes.has_adapter else []
    return found | {f"{folder}/{name}": size for folder in folders for name, size in (whole | tokens).items()}


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The files that a tokenizer saves: they are saved aside and looked at."""
    with tempfile.TemporaryDirectory(prefix="u2a-") as name:
        tokenizer.save_pretrained(name)
        return {path.name: path.stat().st_size for path in Path(name).iterdir()}


def _model_files(model: nn.Module) -> dict[str, int]:
    """The files that the model without its adapter saves."""
    base = cast(PreTrainedModel, model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]
    weights = {
        name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora_" not in name
    }
    tied: Any = getattr(base, "_tied_weights_keys", None) or ()
    if base.config.get_text_config().tie_word_embeddings:
        weights = {name: value for name, value in weights.items() if name not in tied}
    shards = split_torch_state_dict_into_shards(weights, max_shard_size="50GB")
    found = {
        file: sum(weights[name].numel() * weights[name].element_size() for name in names)
        for file, names in shards.filename_to_tensors.items()
    }
    if shards.is_sharded:
        found["model.safetensors.index.json"] = 90 * len(weights)
    found["config.json"] = len(json.dumps(base.config.to_dict(), default=str))
    if base.can_generate():
        found["generation_config.json"] = 150
    return found


def _answer_tokens(workload: Workload) -> int:
    """Answer tokens of all candidates."""
    encode = workload.encoder.encode
    return sum(encode(row.prompt, row.completion, row.source).n_answer for row in workload.partition.forget)


def _n_rows(sets: Partition) -> int:
    pairs = len(sets.finetune) + len(sets.preference) + len(sets.reward) + len(sets.evaluation)
    return pairs + len(sets.forget) + len(sets.retain)


def _candidate_bytes(sets: Partition, most: int | None = None) -> float:
    """Length of the candidates' last questions and their answers, each up to ``most`` characters."""
    texts = [text for row in sets.forget for text in (row.prompt[-1].content if row.prompt else "", row.completion)]
    return TEXT_BYTES * sum(len(text[:most].encode()) for text in texts)


def _shown_bytes(sets: Partition) -> float:
    """Length of the candidates' texts in the report."""
    return _candidate_bytes(sets, MAX_CHARS) * min(1.0, MAX_ROWS / max(1, len(sets.forget)))


def _text_bytes(sets: Partition) -> float:
    """Length of all stored texts."""
    pairs = (*sets.finetune, *sets.preference, *sets.reward, *sets.evaluation)
    rows = (*sets.forget, *sets.retain)
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)] + [row.completion for row in rows]
    texts += [turn.content for row in (*pairs, *rows) for turn in row.prompt]
    return TEXT_BYTES * sum(len(text.encode()) for text in texts)
