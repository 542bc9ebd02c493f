"""The sampled-reward objective: it scores the very tokens that were drawn, on one scale."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tiny import pairs, tiny_policy
from u2a.bilevel.objective import objective_values
from u2a.bilevel.reward_objective import Drawn
from u2a.evaluation.expected_reward import sampled_reward
from u2a.evaluation.generation import Answer, Decoding, answer_text, generate_ids
from u2a.modeling import Policy
from u2a.reward import CallableReward
from u2a.types import Message

torch.set_num_threads(1)
PAIRS = pairs(4)
PROMPTS = [pair.prompt for pair in PAIRS]
LENGTH = CallableReward("length", lambda prompts, answers: [float(len(answer)) for answer in answers])


class TokenReward:
    """Rewards 1, 2, 3 .. for the tokens of each answer, as many as ``lengths`` says, and another sequence score."""

    name = "tokens"

    def __init__(self, lengths: dict[int, int] | None = None, n_tokens: int = 4) -> None:
        self.lengths, self.n_tokens, self.calls = lengths or {}, n_tokens, 0

    def score(self, prompts: Sequence[tuple[Message, ...]], answers: Sequence[str]) -> Tensor:
        return torch.tensor([0.5 * row - self.calls for row in range(len(answers))])

    def token_rewards(self, prompts: Sequence[tuple[Message, ...]], answers: Sequence[str]) -> list[Tensor]:
        rows = [torch.arange(1.0, self.n_tokens + 1) for _ in answers]
        if self.calls in self.lengths:
            rows[2] = torch.arange(1.0, self.lengths[self.calls] + 1)
        self.calls += 1
        return rows


def sampling_policy(end_ids: frozenset[int] | None = None) -> Policy:
    policy = tiny_policy(lora_b_sd=0.1)
    if end_ids is not None:
        policy.encoder.end_ids = end_ids
    return policy


def draw(policy: Policy, model: CallableReward | TokenReward, n_samples: int = 2, n_tokens: int = 4) -> list[Drawn]:
    return sampled_reward(model, n_samples, n_tokens, seed=5).draw(policy, PAIRS)


def test_the_answers_are_the_tokens_that_were_drawn_not_their_text_tokenised_again():
    policy = sampling_policy()
    ids = [generate_ids(policy, PROMPTS, Decoding(4, 1.0, seed=5 + sample)) for sample in range(2)]
    again = [policy.encoder.encode(p, answer_text(policy, a)) for p, a in zip(PROMPTS, ids[0], strict=True)]
    found = draw(policy, LENGTH)
    for row, drawn in enumerate(found):
        head = policy.encoder.encode_prompt(PROMPTS[row])
        assert [a.input_ids for a in drawn.answers] == [(*head, *column[row].drawn) for column in ids]
        assert drawn.rewards == tuple(float(len(answer_text(policy, column[row]))) for column in ids)
    assert any(old.answer_ids != drawn.answers[0].answer_ids for old, drawn in zip(again, found, strict=True))


def test_the_end_token_counts_only_where_it_was_drawn():
    for drawn in draw(sampling_policy(frozenset({-1})), LENGTH):  # nothing ends an answer
        assert [answer.n_answer for answer in drawn.answers] == [4, 4]
        assert [len(answer.answer_ids) for answer in drawn.answers] == [4, 4]
    policy = sampling_policy()
    first = generate_ids(policy, PROMPTS, Decoding(4, 1.0, seed=5))[1].ids[1]
    policy.encoder.end_ids = frozenset({first})
    answer = draw(policy, LENGTH)[1].answers[0]
    assert answer.answer_ids[-1] == first
    assert answer.n_answer <= 2


def test_an_answer_of_no_text_is_its_end_token():
    policy = sampling_policy(frozenset(range(300)))  # whatever is drawn ends the answer
    expected = generate_ids(policy, PROMPTS, Decoding(4, 1.0, seed=5))
    assert all(answer.ids == () and answer.finished for answer in expected)
    for row, drawn in enumerate(draw(policy, LENGTH)):
        assert drawn.answers[0].answer_ids == (expected[row].end_id,)
        assert drawn.rewards == (0.0, 0.0)
    assert torch.isfinite(objective_values(sampled_reward(LENGTH, 2, 4, 5), policy, prepared(policy, LENGTH))).all()


def prepared(policy: Policy, model: CallableReward | TokenReward):  # noqa: ANN201
    return sampled_reward(model, 2, 4, 5).prepare(policy, PAIRS)


def test_token_rewards_sum_to_the_sequence_score():
    found = draw(sampling_policy(frozenset({-1})), TokenReward())
    for drawn in found:
        assert drawn.token_rewards is not None
        for row, score in zip(drawn.token_rewards, drawn.rewards, strict=True):
            assert sum(row) == pytest.approx(score)
            assert [b - a for a, b in zip(row, row[1:], strict=False)] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(("sample", "length"), [(0, 3), (1, 5)])
def test_one_row_of_another_length_drops_the_token_rewards_of_the_whole_call(sample: int, length: int):
    policy = sampling_policy(frozenset({-1}))
    found = draw(policy, TokenReward({sample: length}))
    assert [drawn.token_rewards for drawn in found] == [None] * 4
    assert [drawn.rewards for drawn in found] == [(0.5 * row, 0.5 * row - 1.0) for row in range(4)]


@pytest.mark.parametrize("lengths", [{}, {1: 3}])
def test_the_value_is_the_mean_score_with_and_without_token_rewards(lengths: dict[int, int]):
    policy = sampling_policy(frozenset({-1}))
    objective = sampled_reward(TokenReward(lengths), 2, 4, 5)
    values = objective_values(objective, policy, objective.prepare(policy, PAIRS))
    assert values.tolist() == pytest.approx([0.5 * row - 0.5 for row in range(4)], abs=1e-4)


def test_drawn_tokens_hold_the_end_token_last():
    assert Answer((1, 2), 9).drawn == (1, 2, 9)
    assert (Answer((1, 2)).drawn, Answer((1, 2)).finished) == ((1, 2), False)
