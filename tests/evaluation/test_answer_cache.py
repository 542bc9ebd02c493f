"""Kept answers: nothing is made twice, and no change of what the policy computes finds an old answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tiny import ask, pairs, tiny_policy
from u2a.evaluation.answer_cache import AnswerCache, policy_fingerprint
from u2a.evaluation.generation import Decoding, PolicyGenerator, generate, generate_ids
from u2a.modeling import Policy

torch.set_num_threads(1)
PROMPTS = [pair.prompt for pair in pairs(7)] + [ask("a considerably longer prompt than all of the others")]
SAMPLED = Decoding(6, temperature=1.0, seed=3)


def policy_with(adapter: bool = True, token_budget: int = 200) -> Policy:
    return tiny_policy(adapter=adapter, lora_b_sd=0.1, token_budget=token_budget)


class Prefills:
    """Counts the prompts that a policy reads."""

    def __init__(self, policy: Policy) -> None:
        self.rows = 0
        base = policy.model.get_base_model() if policy.has_adapter else policy.model  # type: ignore[operator]
        base.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        batch, width = kwargs["input_ids"].shape
        self.rows += batch if width > 1 else 0


class Bar:
    """Counts answers and stops the work when told of too many."""

    def __init__(self, most: int = 10**9) -> None:
        self.most, self.n = most, 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.n += n
        if self.n > self.most:
            raise KeyboardInterrupt


def test_the_second_time_nothing_is_generated(tmp_path: Path) -> None:
    policy = policy_with()
    expected = generate_ids(policy, PROMPTS, SAMPLED)
    assert generate_ids(policy, PROMPTS, SAMPLED, cache=AnswerCache(tmp_path)) == expected
    again, bar = policy_with(token_budget=4000), Bar()
    seen, cache = Prefills(again), AnswerCache(tmp_path)
    assert generate_ids(again, [*PROMPTS[::-1], PROMPTS[0]], SAMPLED, bar, cache) == [*expected[::-1], expected[0]]
    assert (seen.rows, bar.n, cache.n) == (0, len(PROMPTS) + 1, len(PROMPTS))
    assert generate(again, PROMPTS, SAMPLED) == generate(again, PROMPTS, SAMPLED, cache=cache)


@pytest.mark.parametrize("most", range(len(PROMPTS)))
def test_interrupted_generation_goes_on_without_repeating_a_prompt(tmp_path: Path, most: int) -> None:
    expected = generate_ids(policy_with(), PROMPTS, SAMPLED)
    policy = policy_with()
    seen = Prefills(policy)
    with pytest.raises(KeyboardInterrupt):
        generate_ids(policy, PROMPTS, SAMPLED, Bar(most), AnswerCache(tmp_path))
    kept = AnswerCache(tmp_path).n
    assert most < kept == seen.rows
    bar = Bar()
    assert generate_ids(policy, PROMPTS, SAMPLED, bar, AnswerCache(tmp_path)) == expected
    assert (seen.rows, bar.n) == (len(PROMPTS), len(PROMPTS))


def test_a_damaged_line_costs_one_answer(tmp_path: Path) -> None:
    policy = policy_with()
    expected = generate_ids(policy, PROMPTS, SAMPLED, cache=AnswerCache(tmp_path))
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    cache, seen = AnswerCache(tmp_path), Prefills(policy)
    assert cache.n_damaged == 1
    assert generate_ids(policy, PROMPTS, SAMPLED, cache=cache) == expected
    assert seen.rows == 1


def test_the_end_of_an_answer_is_kept(tmp_path: Path) -> None:
    policy = policy_with()
    policy.encoder.end_ids = frozenset(range(0, 259, 12))
    made = generate_ids(policy, PROMPTS, SAMPLED, cache=AnswerCache(tmp_path))
    assert {answer.finished for answer in made} == {True, False}
    assert generate_ids(policy, PROMPTS, SAMPLED, cache=AnswerCache(tmp_path)) == made


@pytest.mark.parametrize(
    "other",
    [
        Decoding(7, 1.0, seed=3),
        Decoding(6, 0.9, seed=3),
        Decoding(6, 1.0, seed=4),
        Decoding(6, 1.0, top_k=50, seed=3),
        Decoding(6, 1.0, top_p=0.9, seed=3),
        Decoding(6),
    ],
)
def test_another_decoding_rule_is_another_answer(tmp_path: Path, other: Decoding) -> None:
    policy, cache = policy_with(), AnswerCache(tmp_path)
    generate_ids(policy, PROMPTS[:2], SAMPLED, cache=cache)
    seen = Prefills(policy)
    generate_ids(policy, PROMPTS[:2], other, cache=cache)
    assert seen.rows == 2


def test_greedy_answers_do_not_depend_on_the_settings_of_sampling(tmp_path: Path) -> None:
    policy, cache = policy_with(), AnswerCache(tmp_path)
    made = generate_ids(policy, PROMPTS, Decoding(6), cache=cache)
    seen = Prefills(policy)
    assert generate_ids(policy, PROMPTS, Decoding(6, seed=9, top_k=3, top_p=0.5), cache=cache) == made
    assert seen.rows == 0


def test_other_end_tokens_are_another_answer(tmp_path: Path) -> None:
    policy, cache = policy_with(), AnswerCache(tmp_path)
    whole = generate_ids(policy, PROMPTS, SAMPLED, cache=cache)
    policy.encoder.end_ids = policy.encoder.end_ids | {whole[0].ids[2]}
    assert generate_ids(policy, PROMPTS, SAMPLED, cache=cache) == generate_ids(policy, PROMPTS, SAMPLED)


def nudge(name_part: str) -> Callable[[Policy], None]:
    """Change the least significant bit of one weight in the middle of the first tensor with that name."""

    def change(policy: Policy) -> None:
        value = next(value for name, value in policy.trainable().items() if name_part in name)
        flat = value.data.view(-1)
        index = flat.numel() // 2 + 1
        flat[index] = torch.nextafter(flat[index], torch.tensor(torch.inf))

    return change


def rescale(policy: Policy) -> None:
    layer = next(module for module in policy.model.modules() if isinstance(module, LoraLayer))
    layer.scaling["default"] *= 1.5


def requantise(policy: Policy) -> None:
    base = next(value for name, value in policy.model.named_parameters() if "q_proj.base_layer" in name)
    base.data.copy_(base.data.half().float())


def config_change(policy: Policy) -> None:
    policy.model.config.rms_norm_eps = 1e-2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("adapter", "change"),
    [
        (True, nudge("lora_A")),
        (True, nudge("lora_B")),
        (True, rescale),
        (True, requantise),
        (True, lambda policy: policy.scale_change(0.5)),
        (True, lambda policy: policy.reset()),
        (True, lambda policy: policy.model.merge_adapter()),
        (True, config_change),
        (True, lambda policy: policy.model.to(torch.bfloat16)),
        (False, nudge("embed_tokens")),
        (False, nudge("layers.1.mlp.down_proj")),
        (False, nudge("norm")),
        (False, config_change),
    ],
)
def test_whatever_changes_the_policy_changes_its_fingerprint(adapter: bool, change: Callable[[Policy], None]) -> None:
    policy = policy_with(adapter)
    before = policy_fingerprint(policy)
    assert before == policy_fingerprint(policy) == policy_fingerprint(policy_with(adapter))
    change(policy)
    assert policy_fingerprint(policy) != before


def test_the_fingerprint_forgets_changes_that_were_undone(tmp_path: Path) -> None:
    policy = policy_with()
    before = policy_fingerprint(policy)
    with policy.change_scaled(0.5):
        inside = policy_fingerprint(policy)
    assert policy_fingerprint(policy) == before != inside
    with policy.reference():
        assert policy_fingerprint(policy) != before
    assert policy_fingerprint(policy) == before
    policy.model.config._name_or_path = str(tmp_path)  # type: ignore[union-attr]  # where it lies does not count
    assert policy_fingerprint(policy) == before


@pytest.mark.parametrize("adapter", [True, False])
def test_the_reference_and_a_changed_policy_never_get_each_others_answers(tmp_path: Path, adapter: bool) -> None:
    policy, cache = policy_with(adapter), AnswerCache(tmp_path)
    if not adapter:
        nudge("lm_head")(policy)
        next(iter(policy.trainable().values())).data.mul_(1.7)
    changed = generate_ids(policy, PROMPTS, SAMPLED, cache=cache)
    with ExitStack() as stack:
        stack.enter_context(policy.reference())
        reference = generate_ids(policy, PROMPTS, SAMPLED, cache=cache)
        assert reference == generate_ids(policy, PROMPTS, SAMPLED)
    assert reference != changed
    assert generate_ids(policy, PROMPTS, SAMPLED, cache=AnswerCache(tmp_path)) == changed


def test_the_generator_object_uses_its_cache(tmp_path: Path) -> None:
    policy = policy_with()
    generator = PolicyGenerator(policy, AnswerCache(tmp_path))
    made = generator.generate_ids(PROMPTS, SAMPLED)
    assert [generator.text(answer) for answer in made] == generate(policy, PROMPTS, SAMPLED)
    seen = Prefills(policy)
    assert generator.generate_ids(PROMPTS, SAMPLED) == made
    assert seen.rows == 0
