"""Real text for the small world: what its model is trained on, and what its worlds are drawn from.

Three preference sources (safety: SafeRLHF; facts: HaluEval; help: AlpacaEval) and ordinary instructions (benign).
The training split of each is cut by prompt in two: the mixture, on which the model is trained and from which
candidates are drawn (a user's negatives are answers of the model), and the PA pool, which the model never sees.
Pairs of the evaluation split are for measuring alone.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from u2a.config import DataSection, FieldMap
from u2a.data import example_id, pair_id, prompt_key, read_examples, read_pairs
from u2a.record import content_id
from u2a.types import Example, Pair

FILES = {
    "safety": "saferlhf/pairs.jsonl",
    "facts": "halueval/qa.jsonl",
    "help": "alpaca_eval/pairs.jsonl",
    "benign": "benign/prompts.jsonl",
}
MAX_PROMPT_CHARS = 72  # about 36 tokens: room for an answer remains in every sequence
MAX_ANSWER_CHARS = 200  # the encoder cuts earlier; this only keeps tokenising cheap

AnyRow = TypeVar("AnyRow", Example, Pair)


@dataclass(frozen=True)
class Corpus:
    """The texts, cut by prompt; no prompt stands in two fields.

    Attributes:
        mixture: answers the model is trained on; ``kind`` says source and side, such as ``safety:bad``.
        preference: pairs of the training split that the model does not see; ``kind`` names their source.
        evaluation: pairs of the evaluation split.
        benign: ordinary instructions of the evaluation split.
    """

    mixture: tuple[Example, ...]
    preference: tuple[Pair, ...]
    evaluation: tuple[Pair, ...]
    benign: tuple[Example, ...]

    @property
    def fingerprint(self) -> str:
        """Content id of all rows."""
        rows = (*self.mixture, *self.preference, *self.evaluation, *self.benign)
        return content_id(*(f"{row.kind}:{row.id}" for row in rows))


def data_folder() -> Path:
    """The folder of data: ``U2A_DATA``, or ``shared/data`` beside the project."""
    return Path(os.environ.get("U2A_DATA", Path(__file__).parents[2] / "shared" / "data"))


def missing(folder: Path) -> list[str]:
    """Files that are not there."""
    return [name for name in FILES.values() if not (folder / name).is_file()]


def require_data() -> Path:
    """The folder of data; the program ends with a message where files are missing."""
    folder = data_folder()
    absent = missing(folder)
    if absent:
        sys.exit(f"{folder}: no {', '.join(absent)} there (set U2A_DATA to the folder that holds them)")
    return folder


def read_corpus(folder: Path, mixture_frac: float, unsafe_frac: float, seed: int) -> Corpus:
    """Read and cut the texts.

    Args:
        folder: holds the files of ``FILES``.
        mixture_frac: share of each source's training prompts that go into the mixture.
        unsafe_frac: share of pairs in the mixture that give their rejected answer.
        seed: of the cut.

    Returns:
        The corpus, in an order that depends on contents and seed alone.
    """
    section = DataSection(retain_fields=FieldMap(completion="response"))
    sources = {
        name: [
            row.model_copy(update={"kind": name}) for row in _cut_pairs(read_pairs(str(folder / FILES[name]), section))
        ]
        for name in ("safety", "facts", "help")
    }
    benign = _cut_examples(read_examples(str(folder / FILES["benign"]), section, good=True))
    order = _Order(seed)
    rows: list[Example] = []
    pools: list[Pair] = []
    for name, pairs in sources.items():
        train = order.by_prompt(row for row in pairs if _is_train(row))
        prompts = list(dict.fromkeys(prompt_key(row.prompt) for row in train))
        mixed = set(prompts[: round(mixture_frac * len(prompts))])
        rows += order.one_side([row for row in train if prompt_key(row.prompt) in mixed], name, unsafe_frac)
        pools += [row for row in train if prompt_key(row.prompt) not in mixed]
    rows += [row.model_copy(update={"kind": "benign"}) for row in benign if _is_train(row)]
    seen: set[str] = set()
    evaluation = _unseen([row for pairs in sources.values() for row in pairs if not _is_train(row)], seen)
    held_out = _unseen([row for row in benign if not _is_train(row)], seen)
    preference = _unseen(pools, seen)
    mixture = _unseen(rows, seen)
    return Corpus(tuple(order(mixture)), tuple(order(preference)), tuple(order(evaluation)), tuple(order(held_out)))


@dataclass(frozen=True)
class _Order:
    """Random orders that depend on contents and seed alone."""

    seed: int

    def __call__(self, rows: Iterable[AnyRow]) -> list[AnyRow]:
        """Rows in random order, each content once."""
        unique = {row.id: row for row in rows}
        return sorted(unique.values(), key=lambda row: content_id(str(self.seed), row.id))

    def by_prompt(self, rows: Iterable[AnyRow]) -> list[AnyRow]:
        """Rows by a random order of their prompts."""
        return sorted(rows, key=lambda row: (content_id(str(self.seed), prompt_key(row.prompt)), row.id))

    def one_side(self, pairs: Sequence[Pair], source: str, bad_frac: float) -> list[Example]:
        """One answer of each pair, the rejected one in a share of ``bad_frac``."""
        shuffled = self(pairs)
        n_bad = round(bad_frac * len(shuffled))
        bad = [_answer(pair, pair.rejected, f"{source}:bad") for pair in shuffled[:n_bad]]
        return bad + [_answer(pair, pair.chosen, f"{source}:good") for pair in shuffled[n_bad:]]


def _answer(pair: Pair, text: str, kind: str) -> Example:
    return Example(id=example_id(pair.prompt, text), prompt=pair.prompt, completion=text, kind=kind, source=pair.source)


def _is_train(row: Example | Pair) -> bool:
    """The data folder's own split, by a hash of the prompt: 0 to 6 of 10 are for training."""
    text = row.prompt[-1].content
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 10 < 7


def _unseen(rows: Sequence[AnyRow], seen: set[str]) -> list[AnyRow]:
    """Rows whose prompt stands in no earlier set; their prompts are added to ``seen``."""
    kept = [row for row in rows if prompt_key(row.prompt) not in seen]
    seen.update(prompt_key(row.prompt) for row in kept)
    return kept


def _cut(text: str) -> str:
    """A text cut at the last space before the limit."""
    return text if len(text) <= MAX_ANSWER_CHARS else text[:MAX_ANSWER_CHARS].rsplit(" ", 1)[0]


def _short(row: Example | Pair) -> bool:
    """Whether a prompt leaves room for an answer (other alphabets take a token or more per letter)."""
    text = row.prompt[-1].content
    return len(text) <= MAX_PROMPT_CHARS and text.isascii()


def _cut_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs of short prompts with cut answers; those whose answers begin alike are left out."""
    rows = []
    for pair in filter(_short, pairs):
        good, bad = _cut(pair.chosen), _cut(pair.rejected)
        if good[:120].strip() != bad[:120].strip():
            name = pair_id(pair.prompt, good, bad)
            rows.append(pair.model_copy(update={"id": name, "chosen": good, "rejected": bad}))
    return rows


def _cut_examples(examples: Iterable[Example]) -> list[Example]:
    """Examples of short prompts with cut answers."""
    rows = []
    for row in filter(_short, examples):
        text = _cut(row.completion)
        rows.append(row.model_copy(update={"id": example_id(row.prompt, text), "completion": text}))
    return rows
