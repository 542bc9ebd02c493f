"""A small world in which unlearning takes a second: candidates, PA pairs and held-out pairs drawn for a seed.

The model is that of ``small_model``. No two sets of a world share a prompt.

python bench/small_world.py [KIND ...]      measures worlds of the tuning seeds and prints one JSON document
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from corpus import AnyRow, require_data
from small_model import Base, ModelOptions, base_model

from u2a.bilevel.objective import Margin, objective_values
from u2a.bilevel.outcome import random_weights
from u2a.bilevel.outer_problem import OuterProblem
from u2a.bilevel.solve import score
from u2a.config import AdapterConfig, SolveSection, UnlearnSection
from u2a.data import prompt_key
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.record import content_id, derive_seed
from u2a.types import Example, Pair
from u2a.unlearn import InnerProblem, unlearn


@dataclass(frozen=True)
class Kind:
    """What a user brings.

    Attributes:
        candidates: shares of the kinds of answers in the pile of negatives.
        pairs: source of the PA pairs and of the held-out pairs.
    """

    candidates: Mapping[str, float]
    pairs: str


KINDS: dict[str, Kind] = {
    # complaints of several kinds, of which PA is about one: hallucinated answers to questions of fact
    "piles": Kind({"facts:bad": 0.5, "safety:bad": 0.25, "help:bad": 0.25}, "facts"),
    # half of the thumbs-down were given to right answers
    "mislabelled": Kind({"facts:bad": 0.5, "facts:good": 0.5}, "facts"),
    # weakly labelled: the rejected answer of a pair is often acceptable, and a small model hardly tells the two apart
    "weak": Kind({"safety:bad": 1.0}, "safety"),
}
PA_SIZES = (16, 32, 64, 128, None)  # pairs; None is all
TUNING_SEEDS = (100, 101, 102, 103)


# --- a world ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """One draw of everything a user would bring; no prompt stands in two sets.

    Attributes:
        kind: name in ``KINDS``.
        seed: of the draw and of the adapter.
        policy: the misaligned model with a fresh adapter.
        candidates: the negatives, all of them answers the model was trained on.
        preference: PA pairs; the first n are the PA set of size n.
        heldout: pairs on which J is measured.
        retain: rows of the retain term.
        retain_heldout: rows whose perplexity is measured.
    """

    kind: str
    seed: int
    policy: Policy
    candidates: tuple[Example, ...]
    preference: tuple[Pair, ...]
    heldout: tuple[Pair, ...]
    retain: tuple[Example, ...]
    retain_heldout: tuple[Example, ...]

    def inner(self, section: UnlearnSection) -> InnerProblem:
        """The inner problem, without the collapse guard."""
        return InnerProblem(self.candidates, self.retain, (), section, seed=self.seed)


def make_world(
    base: Base, kind: str, seed: int, n_candidates: int = 32, n_pa: int | None = None, n_heldout: int = 100
) -> World:
    """Draw a world.

    Args:
        base: the trained model.
        kind: name in ``KINDS``.
        seed: of the draw; worlds of one seed and different ``n_pa`` differ in their PA set alone.
        n_candidates: negatives, one per prompt.
        n_pa: PA pairs (None: all).
        n_heldout: at most this many held-out pairs.

    Returns:
        The world.
    """
    corpus, source = base.corpus, KINDS[kind].pairs
    order = _Draw(seed)
    taken: set[str] = set()
    candidates: list[Example] = []
    for name, share in KINDS[kind].candidates.items():
        of_kind = [row for row in corpus.mixture if row.kind == name]
        candidates += order.one_per_prompt(of_kind, round(share * n_candidates), taken)
    if len(candidates) < n_candidates:
        raise ValueError(f"{kind}: {len(candidates)} candidates of {n_candidates} (the texts hold no more prompts)")
    retain = [row for row in order(corpus.mixture) if row.kind == "benign" and prompt_key(row.prompt) not in taken]
    policy = base.policy(AdapterConfig(r=4, alpha=8.0), derive_seed(seed, "adapter"))
    return World(
        kind=kind,
        seed=seed,
        policy=policy,
        candidates=tuple(candidates),
        preference=tuple(order(row for row in corpus.preference if row.kind == source)[:n_pa]),
        heldout=tuple(order(row for row in corpus.evaluation if row.kind == source)[:n_heldout]),
        retain=tuple(retain),
        retain_heldout=tuple(order(corpus.benign)[:32]),
    )


@dataclass(frozen=True)
class _Draw:
    """Random orders that depend on contents and the seed alone."""

    seed: int

    def __call__(self, rows: Iterable[AnyRow]) -> list[AnyRow]:
        return sorted(rows, key=lambda row: content_id(str(self.seed), "world", row.id))

    def one_per_prompt(self, rows: Iterable[Example], n: int, taken: set[str]) -> list[Example]:
        """At most n rows of prompts that are not taken yet; their prompts are added to ``taken``."""
        chosen: list[Example] = []
        for row in self(rows):
            if len(chosen) < n and prompt_key(row.prompt) not in taken:
                taken.add(prompt_key(row.prompt))
                chosen.append(row)
        return chosen


# --- measuring ----------------------------------------------------------------------------------

# A learning rate that rises and an epsilon that smooths Adam's first steps: without them J is rough in omega, and the
# exact derivative holds for tiny changes only (docs/results/selection.md).
SECTION = UnlearnSection(
    loss="npo",
    retain_term="nll",
    learning_rate=2e-3,
    warmup_ratio=0.5,
    adam_epsilon=1e-4,
    max_steps=16,
    batch_size=4,
    retain_batch_size=2,
)
ROUGH = SECTION.model_copy(update={"learning_rate": 1e-3, "warmup_ratio": 0.0, "adam_epsilon": 1e-8})
SCREEN = SolveSection(adjoint="identity", heldout_frac=0.0, folds=4, warmup_steps=4, estimator="mean", fallback="none")


@dataclass(frozen=True)
class Outcome:
    """What one unlearning run changed.

    Attributes:
        delta_j: rise of the mean held-out margin, nats per token.
        ppl_ratio: perplexity of unseen retain rows after the run over that before it.
        seconds: wall time of the run.
    """

    delta_j: float
    ppl_ratio: float
    seconds: float


class Meter:
    """Measures held-out J and retain perplexity of one world's policy.

    Args:
        world: the world.
        section: loss and optimiser of its runs.
    """

    def __init__(self, world: World, section: UnlearnSection = SECTION) -> None:
        self.world = world
        self.section = section
        self.items = Margin().prepare(world.policy, world.heldout)
        encode = world.policy.encoder.encode
        self.retain = [encode(row.prompt, row.completion) for row in world.retain_heldout]
        world.policy.reset()
        self.start = self._now()

    def _now(self) -> tuple[float, float]:
        policy = self.world.policy
        return float(objective_values(Margin(), policy, self.items).mean()), policy.perplexity(self.retain)

    def run(self, weights: Mapping[str, float]) -> Outcome:
        """Unlearn with these weights from theta_0 and measure."""
        start = time.monotonic()
        unlearn(self.world.policy, self.world.inner(self.section), weights)
        seconds = time.monotonic() - start
        margin, ppl = self._now()
        return Outcome(margin - self.start[0], ppl / self.start[1], seconds)


def uniform(ids: Sequence[str]) -> dict[str, float]:
    """Equal weights that sum to 1."""
    return dict.fromkeys(ids, 1.0 / len(ids))


def measure(base: Base, kind: str, seed: int, section: UnlearnSection = SECTION, k: int = 16) -> dict[str, object]:
    """Gains by PA size, and what choosing by them changes on held-out pairs.

    Args:
        base: the trained model.
        kind: name in ``KINDS``.
        seed: of the world.
        section: loss and optimiser of the runs.
        k: candidates chosen.

    Returns:
        Numbers by name.
    """
    world = make_world(base, kind, seed)
    meter = Meter(world, section)
    inner, quiet = world.inner(section), Console(quiet=True)
    kinds = {row.id: row.kind for row in world.candidates}

    def ranked(pairs: tuple[Pair, ...], name: str) -> list[str]:
        start = time.monotonic()
        table = score(world.policy, inner, OuterProblem(pairs, SCREEN, Margin(), seed), quiet)
        trust = table.reliability
        report[f"gains_{name}"] = {
            "split_half": trust.split_half,
            "mean_gain": trust.mean_gain,
            "mean_gain_se": trust.mean_gain_se,
            "signal_sd": trust.signal_sd,
            "seconds": time.monotonic() - start,
        }
        return [row.id for row in sorted(table.rows, key=lambda row: (-row.gain, row.id))]

    report: dict[str, object] = {"kind": kind, "seed": seed, "j_start": meter.start[0], "ppl_start": meter.start[1]}
    arms = {"full": inner.uniform(), "random_1": random_weights(inner, k, 1), "random_2": random_weights(inner, k, 2)}
    for n in PA_SIZES:
        best = ranked(world.preference[:n], f"pa_{n or 'all'}")
        arms[f"top_pa_{n or 'all'}"] = uniform(best[:k])
    oracle = ranked(world.heldout, "oracle")
    arms |= {
        "top_oracle": uniform(oracle[:k]),
        "bottom_oracle": uniform(oracle[-k:]),
        "bottom_pa_all": uniform(best[-k:]),
    }
    for name, weights in arms.items():
        outcome = meter.run(weights)
        bad = sum(kinds[row] == f"{KINDS[kind].pairs}:bad" for row in weights)
        report[name] = {**asdict(outcome), "bad_frac": bad / len(weights)}
    return report


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    return {name: _rounded(part) for name, part in value.items()} if isinstance(value, dict) else value


def main(kinds: Sequence[str]) -> None:
    """Measure worlds of the tuning seeds; the last line is one JSON document."""
    base = base_model(ModelOptions(), require_data())
    reports = [_rounded(measure(base, kind, seed)) for kind in kinds for seed in TUNING_SEEDS]
    print(json.dumps({"training": base.training, "section": SECTION.model_dump(), "worlds": reports}))


if __name__ == "__main__":
    main(sys.argv[1:] or list(KINDS))
