"""Tiny random models, a byte-level tokenizer and rows of data, all built in memory in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from u2a.config import AdapterConfig
from u2a.data import example_id, pair_id
from u2a.modeling import Policy
from u2a.types import Example, Message, Pair

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
_TOPICS = ("tea", "rain", "chess", "bread", "maps", "wool", "salt", "bees", "kites", "ferns")


def tiny_tokenizer(system_turn: bool = False, pad_is_eos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer (256 bytes and 3 special tokens) with a ChatML template.

    Args:
        system_turn: the template adds a system turn of its own where there is none.
        pad_is_eos: pad with the end-of-turn token, else with a token of its own.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (START, END, PAD)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END if pad_is_eos else PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (_SYSTEM if system_turn else "") + _TURNS
    return tokenizer


def tiny_model(seed: int = 0, layers: int = 2, hidden: int = 32, attention: str = "sdpa") -> LlamaForCausalLM:
    """Random Llama (about 30,000 weights, float32, CPU, evaluation mode) for :func:`tiny_tokenizer`."""
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,  # wide, so that answers differ visibly in likelihood
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    return model


def tiny_policy(
    seed: int = 0,
    adapter: bool = True,
    lora_b_sd: float = 0.0,
    max_length: int = 512,
    token_budget: int = 1024,
    attention: str = "sdpa",
) -> Policy:
    """Policy around :func:`tiny_model`.

    Args:
        seed: seed of model, adapter and noise.
        adapter: LoRA of rank 4 on all linear modules, else full fine-tuning.
        lora_b_sd: standard deviation of random values put into every LoRA B (0 leaves theta_0).
        max_length, token_budget: as for ``Policy``.
        attention: attention kernel.
    """
    settings = AdapterConfig(enabled=adapter, r=4, alpha=8.0)
    policy = Policy(tiny_model(seed, attention=attention), tiny_tokenizer(), settings, max_length, token_budget, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, value in policy.trainable().items():
        if lora_b_sd and ".lora_B." in name:
            value.data.copy_(lora_b_sd * torch.randn(value.shape, generator=generator))
    return policy


def save_tiny(folder: str | Path, seed: int = 0, system_turn: bool = False) -> Path:
    """Save model and tokenizer so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load them."""
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer(system_turn).save_pretrained(folder)
    return Path(folder)


def save_tiny_encoder(folder: str | Path) -> str:
    """Save a random two-layer sentence encoder (bytes as tokens) and return its folder."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = BertModel(BertConfig(vocab_size=259, initializer_range=0.3, **sizes)).eval()
    encoder.save_pretrained(folder)
    tiny_tokenizer(pad_is_eos=False).save_pretrained(folder)
    return str(folder)


def ask(text: str) -> tuple[Message, ...]:
    """A prompt of one user turn."""
    return (Message(role="user", content=text),)


def pairs(n: int, start: int = 0) -> tuple[Pair, ...]:
    """``n`` pairs on different prompts; answers differ in text and length. ``start`` shifts to other prompts."""
    rows = []
    for index in range(start, start + n):
        topic = _TOPICS[index % len(_TOPICS)]
        prompt, chosen = f"Q{index}: {topic}?", f"yes, {topic} is fine"
        rejected = f"no {topic}" + " bah" * (index % 3)
        row_id, source = pair_id(ask(prompt), chosen, rejected), f"tiny:{index + 1}"
        rows.append(Pair(id=row_id, prompt=ask(prompt), chosen=chosen, rejected=rejected, source=source))
    return tuple(rows)


def examples(n: int, start: int = 0) -> tuple[Example, ...]:
    """``n`` bad answers of different lengths on different prompts. ``start`` shifts to other prompts."""
    rows = []
    for index in range(start, start + n):
        topic = _TOPICS[index % len(_TOPICS)]
        prompt, bad = f"N{index}: {topic}?", f"never {topic}" + " ugh" * (index % 4)
        row_id, source = example_id(ask(prompt), bad), f"tiny:{index + 1}"
        rows.append(Example(id=row_id, prompt=ask(prompt), completion=bad, source=source))
    return tuple(rows)
