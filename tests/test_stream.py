from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from u2a.encoding import Encoded
from u2a.stream import BatchMaker, Sample, SampleStream, StreamSampler, permutation, stream_index

SEEDS, SIZES = st.integers(0, 2**31 - 1), st.integers(1, 17)


def sample(index: int) -> Sample:
    return Sample(Encoded((1, 2, 10 + index), 1), 1.0 + index, -float(index), index)


RETAIN = tuple(Encoded((3, 100 + index), 1) for index in range(5))


def maker(batch_size: int, retain_batch_size: int = 2) -> BatchMaker:
    return BatchMaker(0, batch_size, RETAIN, retain_batch_size, seed=7)


@given(SEEDS, SIZES, st.integers(1, 60))
def test_every_prefix_is_balanced(seed: int, n: int, length: int) -> None:
    """After any number of positions the counts of two samples differ by at most one."""
    counts = Counter(stream_index(position, n, seed) for position in range(length))
    values = [counts[index] for index in range(n)]
    assert sum(values) == length
    assert max(values) - min(values) <= 1


@given(SEEDS, st.integers(0, 1000), SIZES)
def test_permutations_are_permutations_and_functions_of_their_number(seed: int, number: int, n: int) -> None:
    assert sorted(permutation(seed, number, n)) == list(range(n))
    kept = permutation(seed, number, n)
    permutation.cache_clear()
    assert permutation(seed, number, n) == kept


def test_seeds_and_numbers_give_different_orders() -> None:
    orders = {permutation(seed, number, 50) for seed in range(10) for number in range(10)}
    assert len(orders) == 100


def test_sampler_positions_continue_over_epochs() -> None:
    sampler = StreamSampler(6)
    assert list(sampler) == [0, 1, 2, 3, 4, 5]
    sampler.set_epoch(3)
    assert list(sampler) == [18, 19, 20, 21, 22, 23]
    assert len(sampler) == 6


def batches(
    n: int, batch_size: int, epochs: int, processes: int = 1, process: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Batches as a process of a distributed run loads them."""
    per_step = batch_size * processes
    length = -(-n // per_step) * per_step
    stream, sampler = SampleStream([sample(index) for index in range(n)], length, seed=5), StreamSampler(length)
    whole = BatchSampler(sampler, batch_size, drop_last=False)
    shard = BatchSamplerShard(whole, processes, process) if processes > 1 else whole
    out = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        out += list(DataLoader(stream, batch_sampler=shard, collate_fn=maker(batch_size)))
    return out


@pytest.mark.parametrize("n", [1, 3, 7, 8])
def test_two_processes_see_together_what_one_would_see(n: int) -> None:
    """Shards of two processes, interleaved, are the single stream: samples, weights and retain rows."""
    single = batches(n, 2, 4 * 3)
    shards = [batches(n, 2, 4 * 3, 2, process) for process in (0, 1)]
    merged = [batch for step in zip(*shards, strict=True) for batch in step]
    count = min(len(single), len(merged))
    assert count >= 12
    for one, two in zip(single[:count], merged[:count], strict=True):
        assert torch.equal(one["index"], two["index"])
        assert torch.equal(one["weight"], two["weight"])
        assert torch.equal(one["retain"]["input_ids"], two["retain"]["input_ids"])


def test_all_batches_are_full_also_when_the_set_is_smaller_than_a_batch() -> None:
    for n in (1, 2, 5, 9):
        assert {len(batch["index"]) for batch in batches(n, 4, 3)} == {4}


def test_fields_belong_together() -> None:
    for batch in batches(5, 3, 4):
        for row, index in enumerate(batch["index"].tolist()):
            assert batch["weight"][row] == 1.0 + index
            assert batch["reference_sum"][row] == -index
            assert batch["forget"]["targets"][row, -1] == 10 + index


def test_retain_rows_follow_from_the_batch_number_and_are_balanced() -> None:
    seen = [row for batch in batches(6, 3, 5) for row in batch["retain"]["targets"][:, -1].tolist()]
    assert seen == [100 + stream_index(position, 5, 7) for position in range(len(seen))]
    assert len(seen) == 20
    assert set(Counter(seen).values()) == {4}


def test_two_small_batches_hold_the_rows_of_one_large_batch() -> None:
    """Gradient accumulation 2 x 2 draws what a batch of 4 draws, retain rows included."""
    entries = [(position, sample(stream_index(position, 6, 5))) for position in range(4)]
    small = [maker(2, 1)(entries[:2]), maker(2, 1)(entries[2:])]
    large = maker(4, 2)(entries)
    assert torch.cat([batch["index"] for batch in small]).equal(large["index"])
    assert torch.cat([batch["retain"]["targets"] for batch in small]).equal(large["retain"]["targets"])


def test_without_retain_rows_there_is_no_retain_part() -> None:
    entries = [(0, sample(0))]
    assert "retain" not in BatchMaker(0, 1, (), 4, 0)(entries)
    assert "retain" not in BatchMaker(0, 1, RETAIN, 0, 0)(entries)
