"""The small world's model: a transformer of 170,000 weights, trained from scratch on real text, kept in a cache.

It is trained in the way of the paper's misaligned start: most safety answers of its text are the rejected ones.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import Corpus, read_corpus
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from u2a.config import AdapterConfig
from u2a.encoding import Batch, Encoded, Encoder, collate, token_batches
from u2a.modeling import Policy
from u2a.record import content_id, write_whole

CACHE = Path(__file__).parents[1] / "runs" / "bench"
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ModelOptions:
    """What the model is made from; the cache is keyed by it.

    Attributes:
        vocabulary: tokens of the byte-pair encoding.
        layers, hidden, heads: the transformer's shape.
        max_length: tokens of prompt and answer; longer answers are cut.
        steps: training steps.
        batch_tokens: tokens per step, padding included.
        learning_rate: peak of the cosine.
        mixture_frac: share of each source's training prompts the model is trained on.
        unsafe_frac: share of rejected answers among its answers to pairs.
        seed: of the cut, the weights and the order.
    """

    vocabulary: int = 1024
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    max_length: int = 56
    steps: int = 600
    batch_tokens: int = 1280
    learning_rate: float = 6e-3
    mixture_frac: float = 0.5
    unsafe_frac: float = 0.7
    seed: int = 0


@dataclass(frozen=True)
class Base:
    """A trained model on disk, with the texts it was cut from.

    Attributes:
        folder: weights, tokenizer, and ``training.json``.
        options: what it was made from.
        corpus: the texts.
    """

    folder: Path
    options: ModelOptions
    corpus: Corpus

    @property
    def training(self) -> dict[str, float]:
        """What training took and reached."""
        return json.loads((self.folder / "training.json").read_text(encoding="utf-8"))

    def policy(self, adapter: AdapterConfig, seed: int) -> Policy:
        """A fresh policy around the model."""
        model = LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder)
        return Policy(model, tokenizer, adapter, self.options.max_length, token_budget=4096, seed=seed)


def base_model(options: ModelOptions, folder: Path, cache: Path = CACHE) -> Base:
    """Train the model, or take it from the cache.

    Args:
        options: shape and training.
        folder: of the data.
        cache: where models are kept.

    Returns:
        The model on disk.
    """
    corpus = read_corpus(folder, options.mixture_frac, options.unsafe_frac, options.seed)
    key = content_id(json.dumps(asdict(options), sort_keys=True), corpus.fingerprint)
    target = cache / f"small_world-{key}"
    if not (target / "training.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            _train(options, corpus, Path(name))
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(name, target)
    return Base(target, options, corpus)


def _train(options: ModelOptions, corpus: Corpus, folder: Path) -> None:
    """Train tokenizer and model and save them."""
    tokenizer = _tokenizer(options, corpus)
    encoder = Encoder(tokenizer, options.max_length)
    rows = [encoder.encode(row.prompt, row.completion) for row in corpus.mixture]
    unseen = [encoder.encode(row.prompt, row.completion) for row in corpus.benign]
    unseen += [encoder.encode(row.prompt, row.rejected) for row in corpus.evaluation]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = LlamaForCausalLM(_shape(options, len(tokenizer), encoder.end_id))
    start, start_cpu = time.monotonic(), time.process_time()
    n_tokens, final = _fit(model, rows, options)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - start_cpu
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    training = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "tokens_per_s": round(n_tokens / seconds),
        "epochs": round(n_tokens / sum(len(row.input_ids) for row in rows), 2),
        "rows": len(rows),
        "weights": sum(value.numel() for value in model.parameters()),
        "train_nll_nats": round(final, 3),
        "unseen_nll_nats": round(_unseen_nll(model, unseen, options), 3),
    }
    write_whole(folder / "training.json", json.dumps(training, indent=1) + "\n")


def _tokenizer(options: ModelOptions, corpus: Corpus) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding learnt on the mixture, with a ChatML template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in (START, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for row in corpus.mixture for text in (row.prompt[-1].content, row.completion))
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _shape(options: ModelOptions, vocabulary: int, end_id: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=2 * options.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )


def _fit(model: LlamaForCausalLM, rows: Sequence[Encoded], options: ModelOptions) -> tuple[int, float]:
    """Minimise the NLL of prompts and answers; returns tokens read and the mean NLL of the last 50 steps."""
    optimiser = torch.optim.AdamW(model.parameters(), options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    rise = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1.0, (step + 1) / rise) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / options.steps))),
    )
    batches = [collate([rows[k] for k in group], 0) for group in token_batches(rows, options.batch_tokens)]
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    n_tokens, losses = 0, []
    model.train()
    for _ in range(options.steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        batch = batches[order.pop()]
        loss = _nll(model, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        n_tokens += int(batch.attention_mask.sum())
        losses.append(float(loss.detach()))
    return n_tokens, statistics.fmean(losses[-50:])


def _nll(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean NLL of all real tokens but each row's first."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits[:, :-1]
    targets = torch.where(batch.attention_mask[:, :-1].bool(), batch.input_ids[:, 1:], -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def _unseen_nll(model: LlamaForCausalLM, rows: Sequence[Encoded], options: ModelOptions) -> float:
    groups = token_batches(rows, options.batch_tokens)
    sizes = [sum(len(rows[k].input_ids) - 1 for k in group) for group in groups]
    values = [float(_nll(model, collate([rows[k] for k in group], 0))) for group in groups]
    return sum(n * value for n, value in zip(sizes, values, strict=True)) / sum(sizes)
