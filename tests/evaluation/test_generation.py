"""Generation against loops without cache and padding, closed-form frequencies, and the same answers in any batch."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor, nn

from tiny import ask, pairs, tiny_policy
from u2a.errors import ConfigError, NonFiniteError
from u2a.evaluation.generation import (
    Answer,
    Decoding,
    _Draw,
    _generator,
    _gumbel,
    answer_text,
    generate,
    generate_ids,
)
from u2a.modeling import Policy

torch.set_num_threads(1)
PROMPTS = [pair.prompt for pair in pairs(6)] + [ask("a considerably longer prompt than all of the others")]
RULES = [Decoding(8), Decoding(8, 1.0, seed=3), Decoding(8, 0.7, top_k=9, seed=4), Decoding(8, 1.4, 40, 0.8, seed=5)]


def with_budget(token_budget: int = 4000) -> Policy:
    policy = tiny_policy(lora_b_sd=0.1, token_budget=token_budget)
    policy.model.requires_grad_(False)
    return policy


@cache
def shared_policy() -> Policy:
    """One policy for all examples of a property."""
    return with_budget()


def base_of(policy: Policy) -> nn.Module:
    return policy.model.get_base_model()  # type: ignore[operator]


def warped(logits: Tensor, rule: Decoding) -> list[float]:
    """Logits after temperature, top-k and top-p, one token at a time; -inf for the tokens left out."""
    scaled = [float(value) / rule.temperature for value in logits.double()]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])[: rule.top_k or len(scaled)]
    total, kept = math.fsum(math.exp(scaled[token]) for token in order), []
    for token in order:
        if math.fsum(math.exp(scaled[other]) for other in kept) >= (rule.top_p or 1.0) * total:
            break
        kept.append(token)
    return [value if token in kept else -math.inf for token, value in enumerate(scaled)]


@torch.no_grad()
def alone(policy: Policy, prompt: tuple, rule: Decoding) -> Answer:
    """One prompt by hand: no batch, no padding, no key-value cache."""
    prompt_ids = policy.encoder.encode_prompt(prompt)
    noise, answer = _generator(prompt_ids, rule.seed), []
    for _ in range(rule.max_new_tokens):
        logits = policy.model(torch.tensor([[*prompt_ids, *answer]])).logits[0, -1]
        if rule.temperature > 0:
            logits = torch.tensor(warped(logits, rule)) + _gumbel([noise], len(logits))[0]
        token = int(logits.argmax())
        if token in policy.encoder.end_ids:
            return Answer(tuple(answer), token)
        answer.append(token)
    return Answer(tuple(answer))


def with_logits(policy: Policy, logits: Tensor) -> Policy:
    """Make every next-token logit the same everywhere."""
    base_of(policy).lm_head.forward = lambda hidden: logits.expand(*hidden.shape[:2], -1)  # type: ignore[union-attr]
    return policy


class Calls:
    """Notes (batch, width) of what every forward pass reads, and how many positions get logits."""

    def __init__(self, policy: Policy) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.logit_positions: list[int] = []
        base_of(policy).register_forward_pre_hook(self._read, with_kwargs=True)
        base_of(policy).lm_head.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda module, args: self.logit_positions.append(args[0].shape[1])
        )

    def _read(self, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


# --- against loops by hand ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_answers_equal_a_loop_without_cache_batch_and_padding(rule: Decoding) -> None:
    policy = with_budget()
    assert generate_ids(policy, PROMPTS, rule) == [alone(policy, prompt, rule) for prompt in PROMPTS]


@pytest.mark.parametrize("rule", RULES[:2])
def test_the_reference_is_the_model_without_its_change(rule: Decoding) -> None:
    policy, start = with_budget(), tiny_policy()
    with policy.reference():
        found = generate_ids(policy, PROMPTS, rule)
    assert found == [alone(start, prompt, rule) for prompt in PROMPTS]
    assert found != generate_ids(policy, PROMPTS, rule)


def test_full_fine_tuning_has_no_adapter_to_look_through() -> None:
    policy = tiny_policy(adapter=False)
    assert generate_ids(policy, PROMPTS, RULES[1]) == [alone(policy, prompt, RULES[1]) for prompt in PROMPTS]


def test_answers_end_before_the_end_token() -> None:
    policy = with_budget()
    whole = generate_ids(policy, PROMPTS, Decoding(6))
    policy.encoder.end_ids = policy.encoder.end_ids | {whole[0].ids[2]}
    cut = generate_ids(policy, PROMPTS, Decoding(6))
    assert cut == [alone(policy, prompt, Decoding(6)) for prompt in PROMPTS]
    assert len(cut[0].ids) < len(whole[0].ids)
    assert {answer.finished for answer in cut} == {True, False}


# --- the batch does not matter ------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    budget=st.integers(1, 600),
    order=st.permutations(range(len(PROMPTS))),
    n=st.integers(1, len(PROMPTS)),
    rule=st.sampled_from(RULES),
    more_ends=st.sampled_from([0, 9]),
)
def test_answers_do_not_depend_on_batch_size_order_or_company(
    budget: int, order: list[int], n: int, rule: Decoding, more_ends: int
) -> None:
    policy = shared_policy()
    policy.encoder.end_ids = frozenset({257, *(range(0, 256, more_ends) if more_ends else ())})
    policy.token_budget = 4000
    expected = generate_ids(policy, PROMPTS, rule)
    policy.token_budget = budget
    found = generate_ids(policy, [PROMPTS[index] for index in order[:n]], rule)
    assert found == [expected[index] for index in order[:n]]


def test_seed_and_temperature_matter_and_the_global_generator_does_not() -> None:
    policy = with_budget()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(policy, PROMPTS, Decoding(8, 1.0))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert generate(policy, PROMPTS, Decoding(8, 1.0)) == first
    assert generate(policy, PROMPTS, Decoding(8, 1.0, seed=1)) != first
    greedy = generate(policy, PROMPTS, Decoding(8))
    assert generate(policy, PROMPTS, Decoding(8, 1e-6, seed=1)) == greedy
    assert generate(policy, PROMPTS, Decoding(8, 1e-300, seed=1)) == greedy
    assert generate(policy, PROMPTS, Decoding(8, 1.0, top_k=1)) == greedy
    assert generate(policy, PROMPTS, Decoding(8, 1.0, top_p=1e-9)) == greedy
    assert generate(policy, PROMPTS, Decoding(8, 1.0, top_k=10**6, top_p=1.0)) == first


def test_equal_prompts_get_equal_answers_and_none_gives_none() -> None:
    policy = with_budget(200)
    calls = Calls(policy)
    first, second = generate_ids(policy, [PROMPTS[0], PROMPTS[0]], Decoding(5, 1.0))
    assert first == second
    assert calls.shapes[0][0] == 1
    assert generate(policy, [], Decoding(5)) == []


def test_batches_keep_to_the_token_budget() -> None:
    policy = with_budget(300)
    calls = Calls(policy)
    generate_ids(policy, PROMPTS, Decoding(8))
    prefills = [shape for shape in calls.shapes if shape[1] > 1]
    assert sum(rows for rows, _ in prefills) == len(PROMPTS)
    assert all(rows == 1 or rows * (width + 8) <= 300 for rows, width in prefills)
    assert any(rows > 1 for rows, _ in prefills)


def test_the_bar_hears_of_every_answer() -> None:
    class Bar:
        n = 0

        def advance(self, n: int = 1, note: str = "") -> None:
            self.n += n

    bar = Bar()
    generate(with_budget(200), [*PROMPTS, *PROMPTS[:3]], Decoding(2), bar)
    assert bar.n == len(PROMPTS) + 3


# --- frequencies --------------------------------------------------------------------------------

LOGITS = torch.full((259,), -math.inf)
TOKENS = torch.arange(65, 71)
LOGITS[TOKENS] = torch.tensor([2.0, 1.2, 0.9, 0.4, -0.5, -1.0])
SAMPLERS = [
    Decoding(2, 1.0),
    Decoding(2, 0.6, seed=1),
    Decoding(2, 2.0, top_k=3),
    Decoding(2, 1.0, top_p=0.75),
    Decoding(2, 1.5, top_k=4, top_p=0.7),
]


def shares(rule: Decoding) -> list[float]:
    """Probability of each of TOKENS by the softmax of the warped logits."""
    return torch.tensor(warped(LOGITS, rule))[TOKENS].softmax(0).tolist()


@pytest.fixture(scope="module")
def many_prompts() -> list[tuple]:
    return [ask(f"{number}") for number in range(1500)]


def test_the_warped_shares_are_those_worked_out_by_hand() -> None:
    weights = [math.exp(value / 1.5) for value in (2.0, 1.2, 0.9)]  # the 4 best hold .37 .22 .18 .13 of all
    assert shares(SAMPLERS[4])[:3] == pytest.approx([weight / sum(weights) for weight in weights])
    assert shares(SAMPLERS[4])[3:] == [0, 0, 0]
    assert [share > 0 for share in shares(SAMPLERS[2])] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("rule", SAMPLERS)
def test_sampled_frequencies_are_the_softmax_at_every_step(rule: Decoding, many_prompts: list[tuple]) -> None:
    policy = with_logits(with_budget(10**6), LOGITS)
    drawn = [answer.ids for answer in generate_ids(policy, many_prompts, rule)]
    expected = [share for share in shares(rule) if share > 0]
    allowed = TOKENS.tolist()[: len(expected)]
    for step in range(2):
        counts = Counter(ids[step] for ids in drawn)
        assert set(counts) <= set(allowed)
        observed = [counts[token] for token in allowed]
        assert chisquare(observed, [share * len(drawn) for share in expected], sum_check=False).pvalue > 1e-3
        wrong = torch.tensor(expected).pow(1.6)  # another temperature would be seen
        assert chisquare(observed, (wrong / wrong.sum()).double() * len(drawn), sum_check=False).pvalue < 1e-3
    both = Counter(drawn)
    table = [[both[first, second] for second in allowed] for first in allowed]
    assert chi2_contingency(table).pvalue > 1e-3  # the second step has noise of its own


# --- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES[:2])
def test_a_model_that_never_ends_stops_at_the_limit(rule: Decoding) -> None:
    policy = with_budget()
    policy.encoder.end_ids = frozenset({258})
    logits = torch.zeros(259)
    logits[258] = -math.inf
    answers = generate_ids(with_logits(policy, logits), PROMPTS, rule)
    assert all(len(answer.ids) == len(answer.drawn) == 8 and not answer.finished for answer in answers)


@pytest.mark.parametrize("rule", RULES[:2])
def test_a_model_that_ends_at_once_gives_empty_answers_in_one_pass(rule: Decoding) -> None:
    policy = with_budget()
    logits = torch.zeros(259)
    logits[257] = 100.0
    calls = Calls(with_logits(policy, logits))
    assert generate_ids(policy, PROMPTS, rule) == [Answer((), 257)] * len(PROMPTS)
    assert [shape[0] for shape in calls.shapes] == [len(PROMPTS)]
    assert generate(policy, PROMPTS, rule) == [""] * len(PROMPTS)


def test_ids_are_those_of_the_text_and_say_whether_the_model_ended_the_answer() -> None:
    policy = with_budget()
    answers = generate_ids(policy, PROMPTS, Decoding(6))
    assert [answer_text(policy, answer) for answer in answers] == generate(policy, PROMPTS, Decoding(6))
    endless = [answer for answer in answers if not answer.finished]
    assert endless
    assert all(len(answer.drawn) == len(answer.ids) == 6 for answer in endless)
    end = endless[0].ids[2]
    policy.encoder.end_ids = policy.encoder.end_ids | {end}
    cut = generate_ids(policy, PROMPTS, Decoding(6))
    for before, after in zip(answers, cut, strict=True):
        if end in before.ids:
            assert (after.ids, after.end_id, after.finished) == (before.ids[: before.ids.index(end)], end, True)
            assert after.drawn == (*after.ids, end)
        else:
            assert after == before


# --- the model is left as it was, and is not slowed ------------------------------------------------


def test_the_models_own_generation_settings_are_not_used_and_stay() -> None:
    policy = with_budget()
    expected = generate(policy, PROMPTS[:2], Decoding(10))
    own = base_of(policy).generation_config
    own.do_sample = True  # type: ignore[union-attr]
    own.repetition_penalty = 5.0  # type: ignore[union-attr]
    own.suppress_tokens = list(range(200))  # type: ignore[union-attr]
    own.max_length = 5  # type: ignore[union-attr]
    assert generate(policy, PROMPTS[:2], Decoding(10)) == expected
    assert base_of(policy).generation_config is policy.model.generation_config is own


def test_training_mode_is_set_aside_and_comes_back() -> None:
    policy = with_budget()
    expected = generate(policy, PROMPTS, Decoding(6))
    seen: list[bool] = []
    base_of(policy).register_forward_pre_hook(lambda module, args: seen.append(module.training))
    policy.model.train()
    assert generate(policy, PROMPTS, Decoding(6)) == expected
    assert (any(seen), policy.model.training) == (False, True)


def test_logits_are_computed_at_one_position_per_pass_and_each_token_is_read_once() -> None:
    policy = with_budget()
    policy.encoder.end_ids = frozenset({258})
    calls = Calls(policy)
    generate(policy, PROMPTS, Decoding(7))
    assert set(calls.logit_positions) == {1}
    assert [width for _, width in calls.shapes][1:] == [1] * 6


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES[:2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_is_named(bad: float, rule: Decoding) -> None:
    policy = with_budget()
    logits = torch.zeros(259)
    logits[7] = bad
    own = base_of(policy).generation_config
    with pytest.raises(NonFiniteError, match="logit in phase generate"):
        generate(with_logits(policy, logits), PROMPTS, rule)
    assert base_of(policy).generation_config is own


def test_logits_that_rule_out_every_token_are_named_and_those_that_leave_one_are_not() -> None:
    policy = with_logits(with_budget(), torch.full((259,), -math.inf))
    with pytest.raises(NonFiniteError, match="logit in phase generate"):
        generate(policy, PROMPTS, Decoding(2))
    one = torch.full((259,), -math.inf)
    one[66] = -3.0
    assert generate_ids(with_logits(policy, one), PROMPTS, Decoding(3, 1.0)) == [Answer((66, 66, 66))] * len(PROMPTS)


def test_nan_weights_are_named() -> None:
    policy = with_budget()
    policy.model.get_input_embeddings().weight.data.fill_(float("nan"))  # type: ignore[operator]
    with pytest.raises(NonFiniteError, match="logit in phase generate"):
        generate(policy, PROMPTS[:1], Decoding(2))


def test_rows_that_ended_neither_raise_nor_use_noise() -> None:
    prompts, scores = [(1, 2), (3, 4)], torch.zeros(2, 9)
    company = _Draw(prompts, Decoding(4, 1.0), torch.tensor([8]))
    lonely = _Draw(prompts[1:], Decoding(4, 1.0), torch.tensor([8]))
    company(torch.tensor(prompts), scores)
    lonely(torch.tensor(prompts[1:]), scores[1:])
    spent = company._noise[0].get_state()
    scores[0] = math.nan  # the first row has drawn the end token 8
    for drawn in ([[1, 2, 8], [3, 4, 5]], [[1, 2, 8, 0], [3, 4, 5, 6]]):
        found = company(torch.tensor(drawn), scores)
        assert torch.equal(found[1:], lonely(torch.tensor(drawn[1:]), scores[1:]))
    assert torch.equal(company._noise[0].get_state(), spent)
    scores[1, 0] = math.nan
    with pytest.raises(NonFiniteError):
        company(torch.tensor([[1, 2, 8, 0, 0], [3, 4, 5, 6, 7]]), scores)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_new_tokens": 1, "temperature": -0.1}, "temperature: -0.1"),
        ({"max_new_tokens": 1, "temperature": math.nan}, "temperature: nan"),
        ({"max_new_tokens": 1, "temperature": math.inf}, "temperature: inf"),
        ({"max_new_tokens": 1, "top_k": 0}, "top_k: 0"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p: 0.0"),
        ({"max_new_tokens": 1, "top_p": 1.1}, "top_p: 1.1"),
    ],
)
def test_a_decoding_rule_out_of_range_is_refused(values: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Decoding(**values)  # type: ignore[arg-type]


def test_all_problems_of_a_decoding_rule_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Decoding(0, -1.0, 0, 2.0)
    assert len(caught.value.problems) == 4
