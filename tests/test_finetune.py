from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from inner_oracle import encode_all
from tiny import examples, pairs, tiny_policy
from u2a.config import FinetuneSection
from u2a.encoding import collate
from u2a.errors import ConfigError, NonFiniteError
from u2a.finetune import finetune, mixture, n_steps
from u2a.modeling import answer_log_probs
from u2a.progress import Quiet
from u2a.types import Partition


def partition(n_pairs: int, n_forget: int) -> Partition:
    return Partition(finetune=pairs(n_pairs), forget=examples(n_forget, start=100))


def n_bad(rows, parts: Partition) -> int:
    bad = {pair.rejected for pair in parts.finetune} | {row.completion for row in parts.forget}
    return sum(row.completion in bad for row in rows)


@given(st.integers(0, 30), st.integers(0, 30), st.floats(0, 1), st.booleans(), st.integers(0, 5))
def test_the_share_of_bad_answers_is_as_near_as_the_sizes_allow(
    n_pairs: int, n_forget: int, frac: float, include: bool, seed: int
) -> None:
    parts = partition(n_pairs, n_forget)
    section = FinetuneSection(unsafe_frac=frac, include_forget=include)
    total = n_pairs + (n_forget if include else 0)
    if total == 0:
        with pytest.raises(ConfigError, match="mixture is empty"):
            mixture(parts, section, seed)
        return
    rows = mixture(parts, section, seed)
    least = n_forget if include else 0
    assert len(rows) == total
    assert n_bad(rows, parts) == min(max(round(frac * total), least), total)
    assert len({row.prompt for row in rows}) == total  # each pair gives one answer, each candidate its own


def test_the_seed_decides_which_pairs_give_which_answer() -> None:
    parts, section = partition(20, 0), FinetuneSection(unsafe_frac=0.5)
    one, again, other = (mixture(parts, section, seed) for seed in (1, 1, 2))
    assert one == again
    assert {row.id for row in one} != {row.id for row in other}


def test_retrain_is_the_same_mixture_without_the_candidates() -> None:
    parts, section = partition(10, 4), FinetuneSection(unsafe_frac=0.6)
    whole, left = mixture(parts, section, 0), mixture(parts, section, 0, leave_out_forget=True)
    forget = {row.id for row in parts.forget}
    assert [row for row in whole if row.id not in forget] == list(left)
    assert len(whole) == len(left) + 4


def test_weights_of_the_candidates_do_not_weigh_the_fine_tuning() -> None:
    parts = Partition(forget=tuple(row.model_copy(update={"weight": 0.0}) for row in examples(3)))
    assert [row.weight for row in mixture(parts, FinetuneSection(), 0)] == [None] * 3


def test_steps_cover_the_epochs() -> None:
    assert n_steps(10, FinetuneSection(epochs=2.0, batch_size=8)) == 3
    assert n_steps(1, FinetuneSection(epochs=0.1, batch_size=8)) == 1


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_fine_tuning_teaches_the_answers_and_returns_a_plain_model(adapter: bool) -> None:
    policy, rows = tiny_policy(adapter=adapter), examples(4)
    items = encode_all(policy, rows)
    before = policy.answer_sums(items)
    section = FinetuneSection(learning_rate=5e-3, epochs=8.0, batch_size=4)
    merged = finetune(policy, rows, section, 0, Quiet())
    assert not isinstance(merged, PeftModel)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        after = answer_log_probs(merged, collate(items, 257)).sum
    assert (after > before + 5).all()
    assert not merged.training


def test_a_non_finite_loss_names_the_phase() -> None:
    policy = tiny_policy()
    policy.model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="in phase misaligned start, step 0, sample"):
        finetune(policy, examples(2), FinetuneSection(batch_size=2), 0, Quiet())
