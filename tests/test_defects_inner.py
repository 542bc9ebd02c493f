"""Mistakes of the paper's released code in losses, masks, weights, reference and optimisation: none is possible here.

The numbers are those of the project's list of defects of github.com/muyiahhh/U2A at f59c2b0. Those of the outer
problem are in ``bilevel/test_defects_outer.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from inner_oracle import GradientTape, alone, dense_losses, encode_all, flat, gradient, quiet, relative
from tiny import END, START, ask, examples, pairs, tiny_model, tiny_policy, tiny_tokenizer
from u2a.bilevel.objective import Margin
from u2a.config import AdapterConfig, UnlearnSection
from u2a.encoding import Encoder
from u2a.errors import DataError, ModelError
from u2a.losses import NPO, kl_from_reference, make_loss
from u2a.modeling import Policy, answer_log_probs
from u2a.stream import stream_index
from u2a.trainer import UnlearnTrainer
from u2a.trainer_config import UnlearnConfig
from u2a.types import Example
from u2a.unlearn import InnerProblem, unlearn

ROWS, RETAIN = examples(4), examples(4, start=40)
SKEWED, TURNED = (0.7, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.7)


def step_gradient(folder: Path, weights=SKEWED, retain=None, policy: Policy | None = None, **changes) -> torch.Tensor:
    """Gradient of the trainer's first step on the four rows in one batch."""
    policy = policy or tiny_policy(lora_b_sd=0.05)
    rows = [row.model_copy(update={"weight": weight}) for row, weight in zip(ROWS, weights, strict=True)]
    trainer = UnlearnTrainer(policy, None, quiet(folder, max_steps=1, guard=False, **changes), rows, retain)
    tape = GradientTape(policy)
    trainer.add_callback(tape)
    trainer.train()
    return tape.steps[0]


def dense_gradient(name: str, weights, policy: Policy | None = None) -> torch.Tensor:
    """sum_i omega_i grad l_i, one unpadded sequence at a time."""
    policy = policy or tiny_policy(lora_b_sd=0.05)
    items = encode_all(policy, ROWS)
    losses = dense_losses(policy.model, items, name, policy.reference_sums(items).tolist(), 0.1)
    return flat(gradient(policy, (torch.tensor(weights, dtype=torch.float64) * losses).sum()))


def span(coder: Encoder, prompt: str, answer: str) -> str:
    """Text of the scored tokens."""
    return coder.tokenizer.decode(list(coder.encode(ask(prompt), answer).answer_ids))


def test_defect_12_grad_diff_ignores_weights(tmp_path: Path) -> None:
    """GradDiff took the unweighted mean of the forget loss (and a hard-coded 0.3): here omega and lambda both count."""
    term = {"loss": "grad_diff", "retain_term": "nll", "retain_batch_size": 4}
    one, two = (step_gradient(tmp_path, weights, RETAIN, **term) for weights in (SKEWED, TURNED))
    ours = one - two
    assert relative(ours, dense_gradient("grad_diff", SKEWED) - dense_gradient("grad_diff", TURNED)) < 1e-3
    assert one.norm() > 0
    policy = tiny_policy(lora_b_sd=0.05)
    nll = answer_log_probs(policy.model, policy.collate(encode_all(policy, RETAIN))).mean.mean().neg()
    heavy = step_gradient(tmp_path, SKEWED, RETAIN, **term, retain_weight=3.0)
    assert relative(heavy - one, 2 * flat(gradient(policy, nll))) < 1e-3


def test_defect_13_npo_weights_only_rescale(tmp_path: Path) -> None:
    """NPO multiplied one batch-mean loss by the mean weight: here the direction follows each omega_i."""
    one, two = (step_gradient(tmp_path, weights, loss="npo") for weights in (SKEWED, TURNED))
    assert torch.cosine_similarity(one, two, dim=0) < 0.99
    assert relative(one, dense_gradient("npo", SKEWED)) < 2e-4
    assert relative(two, dense_gradient("npo", TURNED)) < 2e-4


def test_defect_13_npo_uses_the_mean_per_token() -> None:
    """NPO's sigmoid saw a mean per token, so beta acted |y| times too weakly: here it sees the sequence sum."""
    policy = tiny_policy(lora_b_sd=0.1)
    items = encode_all(policy, ROWS)
    start = policy.reference_sums(items)
    log_probs = policy.log_probs(items)
    ratio = log_probs.sum - start
    expected = 20 * torch.nn.functional.softplus(0.1 * ratio)
    per_token = 20 * torch.nn.functional.softplus(0.1 * ratio / log_probs.count)
    ours = NPO(0.1).per_sample(log_probs, start)
    assert torch.allclose(ours, expected, rtol=1e-5)
    assert (ours - per_token).abs().max() > 0.1


@pytest.mark.parametrize("name", ["ga", "npo", "sft"])
def test_defect_13_the_prompt_is_unlearned(name: str) -> None:
    """NPO's labels held the prompt: here the loss sees logits that predict answer tokens, and no others."""
    policy = tiny_policy()
    (item,) = encode_all(policy, ROWS[:1])
    start = policy.reference_sums([item])
    logits: list[torch.Tensor] = []

    def keep(module, inputs, output):
        output.retain_grad()
        logits.append(output)

    handle = policy.model.get_base_model().lm_head.register_forward_hook(keep)
    loss = make_loss(name).per_sample(policy.log_probs([item]), start).sum()
    loss.backward()
    handle.remove()
    touched = logits[0].grad.abs().sum(-1)[0] > 0  # type: ignore[union-attr]
    assert touched.tolist() == [True] * item.n_answer + [False]  # the last logit predicts nothing


def test_defect_14_padding_enters_the_mean() -> None:
    """Pads counted in the denominator, so a short answer weighed 5 %: here padding changes no loss and no gradient."""
    policy = tiny_policy(lora_b_sd=0.05)
    short, *others = encode_all(policy, [ROWS[0], *examples(3, start=60)])
    long = policy.encoder.encode(ask("a long question " * 12), "and a long answer " * 6)
    gradients = []
    for batch in ([short], [short, long], [long, short, *others]):
        place = batch.index(short)
        loss = make_loss("ga").per_sample(policy.log_probs(batch), None)[place]
        assert float(loss.detach()) == pytest.approx(float(alone(policy.model, short).mean().detach()), abs=2e-5)
        gradients.append(flat(gradient(policy, loss)))
    assert relative(gradients[1], gradients[0]) < 1e-4
    assert relative(gradients[2], gradients[0]) < 1e-4


@pytest.mark.parametrize("pad_is_eos", [True, False], ids=["pad=eos", "own pad"])
def test_defect_14_the_pad_is_token_one_and_eos_is_dropped(pad_is_eos: bool) -> None:
    """Token id 1 was taken for the pad, and pad = eos dropped real end tokens: both are scored here."""
    policy = Policy(tiny_model(), tiny_tokenizer(pad_is_eos=pad_is_eos), LoraConfig(r=2, target_modules=["q_proj"]))
    letter = policy.tokenizer.decode([1])
    items = [policy.encoder.encode(ask("Tea?"), letter * 3), policy.encoder.encode(ask("Tea?"), "a longer answer")]
    assert items[0].answer_ids == (1, 1, 1, 257)
    with torch.no_grad():
        batch = policy.log_probs(items)
        assert batch.count.tolist() == [4, 16]
        assert torch.allclose(batch.token[0, -4:].double(), alone(policy.model, items[0]), atol=2e-5)
    assert (batch.token[0, -4:] < 0).all()


@pytest.mark.parametrize("system_turn", [False, True], ids=["no system turn", "system turn"])
def test_defect_15_the_span_starts_in_the_wrong_place(system_turn: bool) -> None:
    """The first answer token was skipped, or the assistant header unlearned: here the span is answer + end token."""
    coder = Encoder(tiny_tokenizer(system_turn), 512)
    scored = span(coder, "Where?", "Paris is nice")
    print(repr(scored))
    assert scored == f"Paris is nice{END}"
    assert START not in scored
    assert coder.prompt_text(ask("Where?")).endswith(f"{START}assistant\n")


def test_defect_15_a_beginning_token_is_added_twice() -> None:
    """The rendered template was tokenised with special tokens again: here the template's own one stands alone."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<|pad|>" + tokenizer.chat_template
    tokenizer.bos_token = "<|pad|>"
    ids = Encoder(tokenizer, 512).encode(ask("Tea?"), "No").input_ids
    assert ids[0] == 258
    assert ids.count(258) == 1


def test_defect_16_truncation_is_silent(tmp_path: Path) -> None:
    """A prompt over 256 tokens gave zero gradient without a word: here it is an error that names the row."""
    row = Example(id="long", prompt=ask("why? " * 200), completion="no", source="bad.jsonl:3")
    with pytest.raises(DataError, match=r"bad\.jsonl:3: prompt: \d+ tokens leave no room"):
        UnlearnTrainer(tiny_policy(), None, quiet(tmp_path), [row])
    policy = tiny_policy(max_length=60)
    cut = policy.encoder.encode(ask("Tea?"), "no " * 40)
    assert cut.n_cut == 121 - cut.n_answer > 0  # an answer that is cut is counted
    assert policy.log_probs([cut]).token.requires_grad


def test_defect_17_pairs_use_another_template() -> None:
    """Preference pairs were scored as raw text, no template: here the outer objective's rows are encoded alike."""
    policy, row = tiny_policy(), pairs(1)[0]
    forget = policy.encoder.encode(row.prompt, row.rejected)
    retain = policy.encoder.encode(row.prompt, row.chosen)
    (item,) = Margin().prepare(policy, [row])
    assert item.answers == (retain, forget)
    assert policy.tokenizer.decode(list(forget.input_ids)).startswith(f"{START}user\n")


def test_defect_18_kl_is_a_cross_entropy() -> None:
    """The "KL" was -sum p_ref log p over all positions: here it is 0 for equal models and masked to the answer."""
    policy = tiny_policy()
    items = encode_all(policy, RETAIN)
    now = answer_log_probs(policy.model, policy.collate(items))
    assert kl_from_reference(now.logits, now.logits, now.mask).abs().max() < 1e-6
    noise = now.logits + torch.randn_like(now.logits) * ~now.mask[..., None]  # other positions do not matter
    assert kl_from_reference(noise, now.logits, now.mask).abs().max() < 1e-6
    half = now.logits.bfloat16()
    exact = kl_from_reference(half.float(), now.logits.detach(), now.mask)
    assert kl_from_reference(half, now.logits, now.mask).dtype == torch.float32
    assert torch.equal(kl_from_reference(half, now.logits, now.mask), exact)


def test_defect_18_the_retain_set_is_mostly_never_used(tmp_path: Path) -> None:
    """zip() restarted an unshuffled retain loader of fixed batches of 4: here every row comes equally often."""
    args = quiet(tmp_path, retain_term="nll", retain_batch_size=3, per_device_train_batch_size=2, guard=False)
    retain = examples(7, start=40)
    trainer = UnlearnTrainer(tiny_policy(), None, args, list(ROWS), retain)
    items = encode_all(trainer.policy, retain)
    seen: list[int] = []
    loader = trainer.get_train_dataloader()
    for epoch in range(7):
        loader.batch_sampler.sampler.set_epoch(epoch)
        for batch in loader:
            for ids, mask in zip(batch["retain"]["input_ids"], batch["retain"]["attention_mask"], strict=True):
                seen.append([item.input_ids for item in items].index(tuple(ids[mask.bool()].tolist())))
    assert len(seen) == 7 * 2 * 3
    assert {seen.count(index) for index in range(7)} == {6}
    assert seen[:7] != sorted(seen[:7])


def test_defect_19_peft_adds_a_penalty_to_the_loss(tmp_path: Path) -> None:
    """AdaLoRA's ||AA' - I|| came into outputs.loss through labels, its rank was ignored: here no labels are passed."""
    policy = tiny_policy(lora_b_sd=0.05)
    passed: list[set[str]] = []
    policy.model.register_forward_pre_hook(lambda module, a, kw: passed.append(set(kw)), with_kwargs=True)
    assert relative(step_gradient(tmp_path, policy=policy, loss="npo"), dense_gradient("npo", SKEWED)) < 2e-4
    assert passed
    assert not any("labels" in names for names in passed)
    ranks = {value.shape[0] for name, value in policy.trainable().items() if ".lora_A." in name}
    assert ranks == {4}  # the rank asked for


def test_defect_21_the_proximal_term_is_not_zero_at_the_start(tmp_path: Path) -> None:
    """It pulled to another random adapter (4.9 at step 0): here it is 0 with gradient 0, whatever the seed."""
    for seed in (0, 1, 2):
        policy = tiny_policy(seed)
        assert float(policy.change_sq().detach()) == 0.0
        assert flat(gradient(policy, policy.change_sq())).abs().max() == 0.0
    args = quiet(tmp_path, loss="ga", retain_term="proximal", retain_weight=10.0, max_steps=1)
    trainer = UnlearnTrainer(tiny_policy(), None, args, list(ROWS))
    trainer.train()
    assert trainer.state.log_history[0]["retain_loss"] == 0.0


def test_defect_21_the_proximal_term_is_divided_by_the_number_of_tensors() -> None:
    """It was a mean over tensors: here two adapted modules give the sum of their two terms."""

    def value(modules: list[str]) -> float:
        policy = Policy(tiny_model(), tiny_tokenizer(), LoraConfig(r=2, target_modules=modules))
        for name, tensor in policy.trainable().items():
            tensor.data.fill_(0.1 if ".lora_B." in name else 0.2)
        return float(policy.change_sq().detach())

    assert value(["q_proj", "v_proj"]) == pytest.approx(value(["q_proj"]) + value(["v_proj"]), rel=1e-5)


def test_defect_21_the_reference_stays_trainable() -> None:
    """A second trainable adapter was the reference: here there is one model, and the reference cannot move."""
    policy = tiny_policy()
    items = encode_all(policy, ROWS)
    start = [float(alone(tiny_model(), item).sum().detach()) for item in items]
    inner = InnerProblem(ROWS, section=UnlearnSection(loss="npo", retain_term="none", learning_rate=1e-2, batch_size=4))
    unlearn(policy, inner, inner.uniform())
    with policy.reference():
        assert policy.answer_sums(items).tolist() == pytest.approx(start, abs=1e-3)
    assert (policy.answer_sums(items) < torch.tensor(start) - 1).all()


def test_defect_21_baselines_and_solution_differ_in_their_regulariser() -> None:
    """The baselines had no retain term: here every arm is the same inner problem with other weights."""
    section = UnlearnSection(loss="ga", retain_term="proximal", retain_weight=0.5, max_steps=2, batch_size=2)
    inner = InnerProblem(ROWS, section=section)
    arms = [
        unlearn(tiny_policy(), inner, weights, arm)
        for arm, weights in (("full", inner.uniform()), ("u2a", {ROWS[0].id: 1.0}))
    ]
    assert {result.loss for result in arms} == {"ga + 0.5 proximal"}
    assert {result.steps for result in arms} == {2}


def test_defect_22_the_learning_rate_oscillates(tmp_path: Path) -> None:
    """A cosine planned for too few steps rose again: here it falls to the run's own last step."""
    rates: list[float] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])
            return control

    args = quiet(tmp_path, max_steps=9, lr_scheduler_type="cosine", per_device_train_batch_size=2)
    UnlearnTrainer(tiny_policy(), None, args, list(ROWS), callbacks=[Watch()]).train()
    assert len(rates) == 9
    assert all(late < early for early, late in zip(rates, rates[1:], strict=False))


def test_defect_22_step_limits_and_checkpoint_intervals_have_no_effect(tmp_path: Path) -> None:
    """max_unlearn_steps and save_every were unused: here both are obeyed."""
    section = UnlearnSection(retain_term="none", max_steps=5, save_steps=2, batch_size=3)
    inner = InnerProblem(ROWS, section=section)
    assert unlearn(tiny_policy(), inner, inner.uniform(), output_dir=tmp_path).steps == 5
    assert {path.name for path in tmp_path.glob("*/checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}


def test_defect_23_no_clipping(tmp_path: Path) -> None:
    """Gradients were never clipped: here the default clips to norm 1."""
    assert UnlearnConfig(output_dir=str(tmp_path)).max_grad_norm == UnlearnSection().max_grad_norm == 1.0
    assert step_gradient(tmp_path, loss="npo").norm() > 5
    assert float(step_gradient(tmp_path, loss="npo", max_grad_norm=1.0).norm()) == pytest.approx(1.0, rel=1e-3)


def test_defect_23_no_shuffling(tmp_path: Path) -> None:
    """The forget rows came sorted by index in every epoch: here each pass is another permutation."""
    passes = [tuple(stream_index(8 * epoch + k, 8, 3) for k in range(8)) for epoch in range(4)]
    assert len(set(passes)) == 4
    assert all(sorted(one) == list(range(8)) for one in passes)
    trainer = UnlearnTrainer(tiny_policy(), None, quiet(tmp_path, loss="ga"), examples(8))
    order = [index for batch in trainer.get_train_dataloader() for index in batch["index"].tolist()]
    assert sorted(order) == list(range(8))
    assert order != list(range(8))


def test_defect_23_no_accumulation(tmp_path: Path) -> None:
    """There was no accumulation: here two micro-batches of two are one batch of four."""
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    one, two = (step_gradient(tmp_path, loss="npo", **kind) for kind in (shape, {}))
    assert relative(one, two) < 1e-4


def test_defect_23_small_updates_round_away_in_bfloat16(tmp_path: Path) -> None:
    """bf16 weights swallowed AdamW's updates of 1e-5: here adapters are float32, and 16-bit weights are not trained."""
    policy = Policy(tiny_model().bfloat16(), tiny_tokenizer(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert {value.dtype for value in policy.trainable().values()} == {torch.float32}
    section = UnlearnSection(loss="ga", retain_term="none", learning_rate=1e-5, max_steps=1, batch_size=4)
    inner = InnerProblem(ROWS, section=section)
    unlearn(policy, inner, inner.uniform())
    moved = [value for name, value in policy.trainable().items() if ".lora_B." in name]
    assert all((value != 0).float().mean() > 0.5 for value in moved)
    with pytest.raises(ModelError, match="16-bit, small updates round away"):
        Policy(tiny_model().bfloat16(), tiny_tokenizer(), AdapterConfig(enabled=False))
    tiny_model().bfloat16().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    args = quiet(tmp_path, full_finetuning=True)
    full = UnlearnTrainer(str(tmp_path / "m"), args=args, train_dataset=list(ROWS))
    assert {value.dtype for value in full.policy.trainable().values()} == {torch.float32}
