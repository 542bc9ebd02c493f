"""Only ask which bad answers matter: predict for each one whether unlearning it would align the model.

    python examples/score_only.py --model MODEL --negatives negatives.jsonl --preferences pairs.jsonl

The command `u2a score` does the same and writes a file; this shows the objects behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import u2a
from u2a.config import DataSection, ModelSection, SolveSection, UnlearnSection
from u2a.console import reliability_text
from u2a.data import read_examples, read_pairs
from u2a.model_loading import load_model, load_tokenizer
from u2a.progress import Console
from u2a.solution import ScoreTable


def main(arguments: Sequence[str] | None = None) -> ScoreTable:
    """Score, and print how far the ranking can be trusted and the ten best.

    Args:
        arguments: words of the command line; None takes those of the process.

    Returns:
        Gains of all negatives.
    """
    parser = argparse.ArgumentParser(description="Predict which bad answers are worth unlearning.")
    parser.add_argument("--model", required=True, help="hub id, directory, or package:NAME")
    parser.add_argument("--negatives", required=True, help="JSONL file of prompt and completion")
    parser.add_argument("--preferences", required=True, help="JSONL file of prompt, chosen and rejected")
    options = parser.parse_args(arguments)

    negatives = read_examples(options.negatives, DataSection(), good=False)
    preferences = read_pairs(options.preferences, DataSection())
    section = ModelSection(name_or_path=options.model)
    policy = u2a.Policy(load_model(section), load_tokenizer(section), section.adapter)
    inner = u2a.InnerProblem(tuple(negatives), section=UnlearnSection(loss="npo", retain_term="none"))
    outer = u2a.OuterProblem(tuple(preferences), SolveSection(objective="margin", adjoint="identity", folds=4))
    table = u2a.score(policy, inner, outer, Console())

    print(reliability_text(table.reliability))
    texts = {row.id: row.completion for row in negatives}
    for row in sorted(table.rows, key=lambda row: -row.estimate)[:10]:
        print(f"{row.estimate:+.3g}  {texts[row.id][:80]!r}")
    return table


if __name__ == "__main__":
    main()
