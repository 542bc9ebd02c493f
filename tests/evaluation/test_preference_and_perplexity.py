"""Margins and perplexity against log-probabilities computed one row at a time without padding."""

from __future__ import annotations

import math

import pytest
import torch

from tiny import ask, examples, pairs, tiny_policy
from u2a.errors import NonFiniteError
from u2a.evaluation.perplexity import RetainNll, perplexity_metric, retain_nll
from u2a.evaluation.preference import preference_hits, preference_margins
from u2a.modeling import Policy
from u2a.types import Pair

torch.set_num_threads(1)


@torch.no_grad()
def answer_nll_alone(policy: Policy, prompt: tuple, answer: str) -> tuple[float, int]:
    """NLL of the answer and end token, token by token from an unpadded forward."""
    start = policy.tokenizer(policy.encoder.prompt_text(prompt), add_special_tokens=False)["input_ids"]
    ids = start + policy.tokenizer(answer, add_special_tokens=False)["input_ids"] + [policy.tokenizer.eos_token_id]
    log_probs = policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nll = -sum(float(log_probs[place - 1, ids[place]]) for place in range(len(start), len(ids)))
    return nll, len(ids) - len(start)


@pytest.mark.parametrize("token_budget", [60, 300, 4000])
def test_margins_are_length_normalised_and_free_of_padding(token_budget: int) -> None:
    policy, rows = tiny_policy(lora_b_sd=0.1, token_budget=token_budget), pairs(7)
    margins = preference_margins(policy, rows)
    assert list(margins) == [row.id for row in rows]
    for row in rows:
        good, n_good = answer_nll_alone(policy, row.prompt, row.chosen)
        poor, n_poor = answer_nll_alone(policy, row.prompt, row.rejected)
        assert margins[row.id] == pytest.approx(poor / n_poor - good / n_good, abs=1e-4)


def test_equal_answers_tie_exactly_and_count_half() -> None:
    same = Pair(id="same", prompt=ask("which?"), chosen="either", rejected="either")
    margins = preference_margins(tiny_policy(lora_b_sd=0.1, token_budget=100), (*pairs(5), same))
    assert margins["same"] == 0.0
    assert preference_hits(margins)["same"] == 0.5


def test_swapping_the_answers_negates_the_margin() -> None:
    policy, rows = tiny_policy(), pairs(5)
    swapped = [row.model_copy(update={"chosen": row.rejected, "rejected": row.chosen}) for row in rows]
    there, back = preference_margins(policy, rows), preference_margins(policy, swapped)
    assert all(there[key] == pytest.approx(-back[key], abs=1e-6) for key in there)
    hits, misses = preference_hits(there), preference_hits(back)
    assert all(hits[key] + misses[key] == 1.0 for key in hits)


def test_non_finite_log_probability_names_its_pairs() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[policy.tokenizer("z")["input_ids"][0]] = math.nan
    rows = (*pairs(3), Pair(id="zed", prompt=ask("z?"), chosen="a", rejected="b"))
    with pytest.raises(NonFiniteError) as caught:
        preference_margins(policy, rows)
    assert caught.value.ids == ["zed"]


def test_perplexity_is_over_all_answer_tokens_with_the_end_token() -> None:
    policy, rows = tiny_policy(lora_b_sd=0.1, token_budget=150), examples(6)
    scored = retain_nll(policy, rows)
    alone = [answer_nll_alone(policy, row.prompt, row.completion) for row in rows]
    expected = math.exp(sum(nll for nll, _ in alone) / sum(count for _, count in alone))
    metric = perplexity_metric(scored, {}, 300, 0)
    assert metric.value == pytest.approx(expected, rel=1e-4)
    assert metric.low < metric.value < metric.high
    assert metric.n == 6
    encoded = [policy.encoder.encode(row.prompt, row.completion) for row in rows]
    assert metric.value == pytest.approx(policy.perplexity(encoded), rel=1e-6)


def test_no_rows_and_collapse_are_undefined() -> None:
    assert perplexity_metric(RetainNll({}, {}), {}, 100, 0).value is None
    assert perplexity_metric(RetainNll({"a": math.inf}, {"a": 1.0}), {}, 100, 0).value is None
    assert perplexity_metric(RetainNll({"a": 1e6, "b": 1e6}, {"a": 1.0, "b": 1.0}), {}, 100, 0).value is None
