"""Memorisation by hand: first choices, longest common subsequences, and the texts a planted memory writes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import examples, tiny_policy
from u2a.errors import ConfigError
from u2a.evaluation.decoding import Decoding
from u2a.evaluation.generation import generate
from u2a.evaluation.memorisation import (
    exact_memorisation,
    extraction_strength,
    knowledge_memorisation,
    mean_metric,
    memorisation_metrics,
    verbatim_memorisation,
)
from u2a.evaluation.token_stats import TokenStats, token_stats
from u2a.modeling import Policy
from u2a.types import Example

torch.set_num_threads(1)


def hits(*pattern: int) -> TokenStats:
    zeros = np.zeros(len(pattern))
    return TokenStats("", zeros, zeros, zeros, np.array(pattern, dtype=bool))


@pytest.mark.parametrize(
    ("pattern", "exact", "strength"),
    [
        ((1, 1, 1, 1), 1.0, 1.0),
        ((0, 1, 1, 1), 0.75, 0.75),
        ((1, 0, 1, 1), 0.75, 0.5),
        ((0, 0, 0, 1), 0.25, 0.25),
        ((1, 1, 1, 0), 0.75, 0.0),
        ((0, 0, 0, 0), 0.0, 0.0),
        ((1,), 1.0, 1.0),
        ((0,), 0.0, 0.0),
    ],
)
def test_golden_first_choices(pattern: tuple[int, ...], exact: float, strength: float) -> None:
    assert exact_memorisation(hits(*pattern)) == exact
    assert extraction_strength(hits(*pattern)) == strength


@given(st.lists(st.integers(0, 1), min_size=1, max_size=12))
def test_extraction_strength_is_the_shortest_prefix_by_brute_force(pattern: list[int]) -> None:
    size = len(pattern)
    shortest = next(k for k in range(size + 1) if all(pattern[k:]))
    assert extraction_strength(hits(*pattern)) == pytest.approx(1 - shortest / size)
    assert extraction_strength(hits(*pattern)) <= exact_memorisation(hits(*pattern)) + 1e-12


def test_greedy_decoding_after_the_prefix_writes_the_rest() -> None:
    """One pass says how long a prefix makes greedy decoding write the truth; one token less does not."""
    policy, rows = tiny_policy(adapter=False), examples(6)
    train(policy, rows, steps=10)
    strengths = []
    for row in rows:
        ids = policy.encoder.encode(row.prompt, row.completion)
        strength = extraction_strength(token_stats(policy, [row])[row.id])
        prefix = round((1 - strength) * ids.n_answer)
        head = len(ids.input_ids) - ids.n_answer
        assert greedy(policy, ids.input_ids, head + prefix) == ids.input_ids
        if prefix:
            assert greedy(policy, ids.input_ids, head + prefix - 1) != ids.input_ids
        strengths.append(strength)
    assert any(0.0 < strength < 1.0 for strength in strengths)


@torch.no_grad()
def greedy(policy: Policy, ids: tuple[int, ...], start: int) -> tuple[int, ...]:
    """The tokens up to ``start``, continued greedily to the same length, one unpadded pass per token."""
    done = list(ids[:start])
    while len(done) < len(ids):
        done.append(int(policy.model(torch.tensor([done])).logits[0, -1].argmax()))
    return tuple(done)


def train(policy: Policy, rows: tuple[Example, ...], steps: int) -> None:
    optimiser = torch.optim.Adam(policy.trainable().values(), lr=3e-3)
    encoded = [policy.encoder.encode(row.prompt, row.completion) for row in rows]
    for _ in range(steps):
        optimiser.zero_grad()
        (-policy.log_probs(encoded).mean.mean()).backward()
        optimiser.step()


def test_a_planted_memory_is_found_by_all_four() -> None:
    policy, rows = tiny_policy(adapter=False), examples(3)
    groups: dict[str, str] = {}
    before = memorisation_metrics(token_stats(policy, rows), groups, 50, 0)
    train(policy, rows, steps=45)
    after = memorisation_metrics(token_stats(policy, rows), groups, 50, 0)
    assert before["exact_memorisation"].value < 0.2
    assert after["exact_memorisation"].value == after["extraction_strength"].value == 1.0
    assert list(after["exact_memorisation"].values) == [row.id for row in rows]
    truths = {row.id: row.completion for row in rows}
    texts = generate(policy, [row.prompt for row in rows], Decoding(40))
    answers = dict(zip(truths, texts, strict=True))
    assert set(verbatim_memorisation(truths, answers).values()) == {100.0}
    assert set(knowledge_memorisation(truths, answers).values()) == {100.0}


@pytest.mark.parametrize(
    ("truth", "answer", "f1", "recall"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 100.0, 100.0),
        ("the cat sat on the mat", "The CAT, sat: on the mat!", 100.0, 100.0),
        ("a b c d", "a c d x", 75.0, 75.0),  # LCS a c d
        ("a b c d", "d c b a", 25.0, 25.0),  # order counts
        ("a b", "x a y b z w", 50.0, 100.0),  # P = 2/6, R = 1
        ("a b c d", "a", 40.0, 25.0),  # P = 1, R = 1/4
        ("a b c d", "", 0.0, 0.0),
        ("a b c d", "...", 0.0, 0.0),
        ("running", "run", 0.0, 0.0),  # words are not stemmed
    ],
)
def test_golden_rouge_l(truth: str, answer: str, f1: float, recall: float) -> None:
    assert verbatim_memorisation({"r": truth}, {"r": answer})["r"] == pytest.approx(f1)
    assert knowledge_memorisation({"r": truth}, {"r": answer})["r"] == pytest.approx(recall)


def lcs(first: str, second: str) -> int:
    """Longest common subsequence by recursion over all choices."""
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + lcs(first[1:], second[1:])
    return max(lcs(first[1:], second), lcs(first, second[1:]))


@given(st.text("abc", min_size=1, max_size=6), st.text("abc", max_size=6))
def test_rouge_l_against_a_brute_force_subsequence(truth: str, answer: str) -> None:
    texts = {"r": " ".join(truth)}, {"r": " ".join(answer)}
    common = lcs(truth, answer)
    assert knowledge_memorisation(*texts)["r"] == pytest.approx(100 * common / len(truth))
    assert verbatim_memorisation(*texts)["r"] == pytest.approx(200 * common / (len(truth) + len(answer)))


def test_what_rouge_cannot_read_is_undefined_and_not_0() -> None:
    scores = verbatim_memorisation(
        {"a": "\u8336\u306f\u826f\u3044", "b": "tea"}, {"a": "\u8336\u306f\u826f\u3044", "b": "tea"}
    )
    assert scores == {"a": None, "b": 100.0}
    metric = mean_metric(scores, {}, 20, 0)
    assert (metric.value, metric.n, metric.values) == (100.0, 1, {"b": 100.0})
    assert "1 of 2 rows" in metric.note
    assert mean_metric({"a": None}, {}, 20, 0).value is None


def test_the_interval_is_over_prompts() -> None:
    stats = {str(k): hits(k % 2, 1) for k in range(8)}
    groups = {str(k): str(k // 4) for k in range(8)}
    metric = memorisation_metrics(stats, groups, 200, 0)["exact_memorisation"]
    assert (metric.value, metric.n) == (0.75, 2)
    assert (metric.low, metric.high) == (0.75, 0.75)  # both prompts have the same mean


def test_without_rouge_score_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[evaluation\]'"):
        verbatim_memorisation({"a": "b"}, {"a": "b"})


def test_every_truth_needs_an_answer() -> None:
    with pytest.raises(KeyError):
        verbatim_memorisation({"a": "b"}, {})
