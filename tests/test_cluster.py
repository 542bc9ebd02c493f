"""Clusters of candidates, over which gains are pooled."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tiny import ask, examples, save_tiny_encoder
from u2a.config import SolveSection
from u2a.data import example_id
from u2a.reward.cluster import candidate_clusters
from u2a.types import Example

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def row(prompt: str, answer: str) -> Example:
    return Example(id=example_id(ask(prompt), answer), prompt=ask(prompt), completion=answer)


def test_answers_to_a_prompt_longer_than_the_embedder_reads_are_told_apart(encoder: str) -> None:
    long = "The quick brown fox jumps over the lazy dog. " * 20  # 256 tokens are read, here as many bytes
    rows = [row(f"{long}{k}", answer) for k in range(4) for answer in ("never", "I will not say")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        found = candidate_clusters(SolveSection(clusters=3, cluster_embedder=encoder), rows, 0)
    assert found is not None
    first, second = ({found[each.id] for each in rows if each.completion.startswith(word)} for word in ("never", "I"))
    assert len(first) == len(second) == 1 and first != second


@pytest.mark.parametrize(("n", "clusters", "expected"), [(1, 8, 1), (6, 8, 6), (6, 6, 6), (12, 3, 3)])
def test_there_are_no_more_clusters_than_embeddings(encoder: str, n: int, clusters: int, expected: int) -> None:
    rows, section = examples(n), SolveSection(clusters=clusters, cluster_embedder=encoder)
    found = candidate_clusters(section, rows, 0)
    assert found is not None and set(found) == {each.id for each in rows}
    assert len(set(found.values())) == expected
    assert candidate_clusters(section, rows[::-1], 0) == found


def test_without_clusters_or_candidates_there_is_nothing_to_cluster(tmp_path: Path) -> None:
    nowhere = str(tmp_path)
    assert candidate_clusters(SolveSection(clusters=0, cluster_embedder=nowhere), examples(3), 0) is None
    assert candidate_clusters(SolveSection(clusters=2, cluster_embedder=nowhere), (), 0) is None
