"""The bench's small world: same seed, same world; no prompt in two sets; the trained model is reused."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from corpus import data_folder, missing
from small_model import Base, ModelOptions, base_model
from small_world import KINDS, World, make_world

from u2a.data import prompt_key

TINY = ModelOptions(vocabulary=400, layers=1, hidden=16, heads=2, max_length=160, steps=3, batch_tokens=512)
SETS = ("candidates", "preference", "heldout", "retain", "retain_heldout")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def base(cache: Path) -> Base:
    if missing(data_folder()):
        pytest.skip(f"{data_folder()} does not hold the data (set U2A_DATA)")
    return base_model(TINY, data_folder(), cache)


def texts(world: World) -> dict[str, list[str]]:
    return {name: [row.id for row in getattr(world, name)] for name in SETS}


def test_the_same_seed_gives_the_same_world_and_another_seed_another_one(base: Base) -> None:
    first, again, other = (make_world(base, "piles", seed, 16) for seed in (100, 100, 101))
    assert texts(first) == texts(again)
    assert all(torch.equal(value, again.policy.theta0[name]) for name, value in first.policy.theta0.items())
    assert set(texts(first)["candidates"]) != set(texts(other)["candidates"])
    assert any(not torch.equal(value, other.policy.theta0[name]) for name, value in first.policy.theta0.items())


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_stands_in_two_sets_and_the_pile_has_its_shares(base: Base, kind: str) -> None:
    world = make_world(base, kind, 102, 32)
    prompts = {name: {prompt_key(row.prompt) for row in getattr(world, name)} for name in SETS}
    assert all(prompts.values())
    assert all(prompts[a].isdisjoint(prompts[b]) for a, b in combinations(SETS, 2))
    assert len(prompts["candidates"]) == len(world.candidates) == 32
    found = {name: sum(row.kind == name for row in world.candidates) / 32 for name in KINDS[kind].candidates}
    assert found == KINDS[kind].candidates


def test_a_smaller_pa_set_is_the_start_of_a_larger_one_and_changes_nothing_else(base: Base) -> None:
    small, whole = (make_world(base, "weak", 103, 16, n_pa) for n_pa in (8, None))
    assert small.preference == whole.preference[:8]
    rest = [name for name in SETS if name != "preference"]
    assert [texts(small)[name] for name in rest] == [texts(whole)[name] for name in rest]


def test_training_is_deterministic_and_its_result_is_reused(base: Base, cache: Path, tmp_path: Path) -> None:
    weights = base.folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert base_model(TINY, data_folder(), cache).folder == base.folder
    assert weights.stat().st_mtime_ns == before
    anew = base_model(TINY, data_folder(), tmp_path)
    assert anew.folder.name == base.folder.name
    assert (anew.folder / "model.safetensors").read_bytes() == weights.read_bytes()
