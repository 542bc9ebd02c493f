"""Inputs of the smoke experiment: a random two-layer model with a byte tokenizer, and plain rows of data.

python bench/smoke_inputs.py FOLDER      writes FOLDER/model, pairs.jsonl and retain.jsonl, the same every time
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from u2a.record import write_whole

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOPICS = ("tea", "rain", "chess", "bread", "maps", "wool", "salt", "bees", "kites", "ferns")
PAIRS, RETAIN = 120, 40


def tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (START, END)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
    made.chat_template = TEMPLATE
    return made


def model() -> LlamaForCausalLM:
    """About 30,000 random weights."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # wide, so that answers differ visibly in likelihood
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=257,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def pair(index: int) -> dict[str, str]:
    """A polite and a rude answer."""
    topic = TOPICS[index % len(TOPICS)]
    bad = f"no {topic}" + " bah" * (index % 3)
    return {"prompt": f"Q{index}: {topic}?", "chosen": f"yes, {topic} is fine", "rejected": bad}


def retain(index: int) -> dict[str, str]:
    """An ordinary instruction with its answer."""
    topic = TOPICS[index % len(TOPICS)]
    return {"prompt": f"R{index}: {topic}?", "completion": f"some {topic}"}


def main(folder: Path) -> None:
    """Write everything that is not there yet."""
    if not (folder / "model" / "config.json").exists():
        tokenizer().save_pretrained(folder / "model")
        model().save_pretrained(folder / "model")
    for name, rows in (("pairs", map(pair, range(PAIRS))), ("retain", map(retain, range(RETAIN)))):
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
