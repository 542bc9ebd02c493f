"""How often intervals over seeds and prompts hold the truth: `python bench/interval_coverage.py [--out FILE]`.

Tables of differences are drawn with the spreads (of seeds, prompts and the rest) found between arms of the comparison;
the interval of the experiment is set beside a percentile bootstrap of both. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from u2a.evaluation.stats import crossed_mean
from u2a.record import write_whole

SPREADS = {  # standard deviations of seeds, of prompts, of the rest
    "u2a - lowest rewards": (0.708, 0.936, 1.03),
    "u2a (GA) - all": (0.16, 0.291, 0.125),
    "u2a (GA) - random": (0.301, 0.29, 0.191),
}
PROMPTS, SEEDS, TRIALS, RESAMPLES = 76, (2, 3, 6, 8), 1000, 500


def table_of(spreads: tuple[float, float, float], seeds: int, generator: np.random.Generator) -> np.ndarray:
    """Differences around 0 by seed and prompt."""
    by_seed, by_prompt, rest = spreads
    rows, columns = generator.normal(size=(seeds, 1)), generator.normal(size=(1, PROMPTS))
    return by_seed * rows + by_prompt * columns + rest * generator.normal(size=(seeds, PROMPTS))


def bootstrap_holds(table: np.ndarray, generator: np.random.Generator) -> bool:
    """Whether the percentile interval of drawing seeds and prompts again holds 0."""
    seeds, prompts = table.shape
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    by_prompt = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    low, high = np.quantile(((by_seed @ table) * by_prompt).sum(1) / table.size, [0.025, 0.975])
    return bool(low <= 0.0 <= high)


def interval_holds(table: np.ndarray) -> bool:
    """Whether the experiment's interval holds 0."""
    found = crossed_mean({f"s{i}": {f"p{j}": float(v) for j, v in enumerate(row)} for i, row in enumerate(table)})
    assert found.low is not None and found.high is not None
    return found.low <= 0.0 <= found.high


def main() -> None:
    """Simulate, and print the coverage of both by case and number of seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    out, coverage = parser.parse_args().out, []
    generator = np.random.default_rng(0)
    for name, spreads in SPREADS.items():
        for seeds in SEEDS:
            tables = [table_of(spreads, seeds, generator) for _ in range(TRIALS)]
            both = np.mean([[interval_holds(table), bootstrap_holds(table, generator)] for table in tables], axis=0)
            coverage.append({"case": name, "seeds": seeds, "interval": float(both[0]), "bootstrap": float(both[1])})
    text = json.dumps({"bench": "interval_coverage", "level": 0.95, "trials": TRIALS, "coverage": coverage})
    if out is not None:
        write_whole(out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
