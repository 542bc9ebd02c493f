"""Generation against a loop without cache and padding, and the same answers in any batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import ask, pairs, tiny_policy
from u2a.errors import NonFiniteError
from u2a.evaluation.generation import _generator, _gumbel, answer_text, generate, generate_ids
from u2a.modeling import Policy

torch.set_num_threads(1)
PROMPTS = [pair.prompt for pair in pairs(6)] + [ask("a considerably longer prompt than all of the others")]


@torch.no_grad()
def greedy_alone(policy: Policy, prompt: tuple, max_new_tokens: int) -> str:
    ids = list(policy.encoder.encode_prompt(prompt))
    answer: list[int] = []
    for _ in range(max_new_tokens):
        token = int(policy.model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token in policy.encoder.end_ids:
            break
        answer.append(token)
    return policy.tokenizer.decode(answer, skip_special_tokens=True).strip()


def with_budget(token_budget: int) -> Policy:
    policy = tiny_policy(lora_b_sd=0.1, token_budget=token_budget)
    policy.model.requires_grad_(False)
    return policy


def test_greedy_equals_a_loop_without_cache_and_padding() -> None:
    policy = with_budget(4000)
    assert generate(policy, PROMPTS, 12) == [greedy_alone(policy, prompt, 12) for prompt in PROMPTS]


@settings(max_examples=12, deadline=None)
@given(budget=st.integers(1, 600), order=st.permutations(range(len(PROMPTS))), temperature=st.sampled_from([0.0, 1.0]))
def test_answers_do_not_depend_on_batch_size_or_order(budget: int, order: list[int], temperature: float) -> None:
    expected = generate(with_budget(4000), PROMPTS, 8, temperature, seed=3)
    found = generate(with_budget(budget), [PROMPTS[index] for index in order], 8, temperature, seed=3)
    assert found == [expected[index] for index in order]


def test_answers_end_before_the_end_token() -> None:
    policy = with_budget(4000)
    first = policy.tokenizer(greedy_alone(policy, PROMPTS[0], 6)[2:3], add_special_tokens=False)["input_ids"][0]
    whole = generate(policy, PROMPTS, 6)
    policy.encoder.end_ids = policy.encoder.end_ids | {first}
    cut = generate(policy, PROMPTS, 6)
    assert cut == [greedy_alone(policy, prompt, 6) for prompt in PROMPTS]
    assert len(cut[0]) < len(whole[0])


def test_seed_and_temperature_matter_and_the_global_generator_does_not() -> None:
    policy = with_budget(4000)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(policy, PROMPTS, 8, 1.0, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert generate(policy, PROMPTS, 8, 1.0, seed=0) == first
    assert generate(policy, PROMPTS, 8, 1.0, seed=1) != first
    assert generate(policy, PROMPTS, 8, 1e-6, seed=1) == generate(policy, PROMPTS, 8)


def test_gumbel_noise_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    noise = _gumbel([_generator((index,), 0) for index in range(20000)], 4)
    counts = Counter((logits + noise).argmax(1).tolist())
    for token, share in enumerate(logits.softmax(0).tolist()):
        assert counts[token] / 20000 == pytest.approx(share, abs=4 * (share * (1 - share) / 20000) ** 0.5)


def test_the_models_own_generation_settings_are_not_used() -> None:
    policy = with_budget(4000)
    expected = generate(policy, PROMPTS[:2], 10)
    policy.model.generation_config.do_sample = True
    policy.model.generation_config.repetition_penalty = 5.0
    assert generate(policy, PROMPTS[:2], 10) == expected


def test_equal_prompts_get_equal_answers_and_none_gives_none() -> None:
    policy = with_budget(200)
    first, second = generate(policy, [PROMPTS[0], PROMPTS[0]], 5, 1.0)
    assert first == second
    assert generate(policy, [], 5) == []


def test_nan_logits_are_named() -> None:
    policy = with_budget(4000)
    policy.model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="logit in phase generate"):
        generate(policy, PROMPTS[:1], 2)


def test_ids_are_those_of_the_text_and_say_whether_the_model_ended_the_answer() -> None:
    policy = with_budget(4000)
    answers = generate_ids(policy, PROMPTS, 6)
    assert [answer_text(policy, answer) for answer in answers] == generate(policy, PROMPTS, 6)
    endless = [answer for answer in answers if not answer.finished]
    assert endless
    assert all(len(answer.drawn) == len(answer.ids) == 6 for answer in endless)
    end = endless[0].ids[2]
    policy.encoder.end_ids = policy.encoder.end_ids | {end}
    cut = generate_ids(policy, PROMPTS, 6)
    for before, after in zip(answers, cut, strict=True):
        if end in before.ids:
            assert (after.ids, after.end_id, after.finished) == (before.ids[: before.ids.index(end)], end, True)
            assert after.drawn == (*after.ids, end)
        else:
            assert after == before
