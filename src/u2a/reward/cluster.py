"""Clusters of similar negatives, over which noisy gains are pooled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.cluster.vq import kmeans2

from u2a.config import SolveSection
from u2a.reward.base import prompt_text
from u2a.reward.embedding import Embedder
from u2a.types import Example


def candidate_clusters(section: SolveSection, rows: Sequence[Example], seed: int) -> dict[str, int] | None:
    """Cluster negatives by the sentence embeddings of prompt and of answer, side by side (k-means).

    In one text a long prompt would leave the embedder, which reads a few hundred tokens, nothing of the answer.

    Args:
        section: ``clusters`` (at most as many as distinct embeddings) and ``cluster_embedder``.
        rows: the candidates.
        seed: of the first centres.

    Returns:
        Cluster number by id, whatever the order of the rows; None where ``clusters`` is 0.

    Raises:
        ModelError: the embedder cannot be loaded.
    """
    if section.clusters == 0 or not rows:
        return None
    ordered = sorted(rows, key=lambda row: row.id)
    embedder = Embedder(section.cluster_embedder)
    asked = embedder.encode([prompt_text(row.prompt) for row in ordered])
    features = np.hstack([asked, embedder.encode([row.completion for row in ordered])])
    distinct, place = np.unique(features, axis=0, return_inverse=True)
    if len(distinct) <= section.clusters:
        labels = place.ravel()
    else:
        labels = kmeans2(features, section.clusters, iter=50, minit="++", rng=seed)[1]
    return {row.id: int(label) for row, label in zip(ordered, labels, strict=True)}
