"""The trainer: its gradient against a dense loop, weights, accumulation, retain terms, resume, formats, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import BatchSampler
from transformers import AutoModelForCausalLM, TrainerCallback

from inner_oracle import GradientTape, dense_losses, encode_all, flat, gradient, quiet, relative
from tiny import ask, examples, save_tiny, tiny_model, tiny_policy, tiny_tokenizer
from u2a.bilevel.score import rounds_to_16_bits
from u2a.callbacks import FiniteGradients
from u2a.encoding import Encoded, collate
from u2a.errors import ConfigError, DataError, ModelError, NonFiniteError
from u2a.losses import kl_from_reference
from u2a.modeling import Policy, answer_log_probs
from u2a.trainer import UnlearnTrainer, as_examples
from u2a.trainer_config import UnlearnConfig
from u2a.types import Example

LOSSES = ["ga", "grad_diff", "npo", "sft"]
WEIGHTS = (0.1, 0.5, 0.15, 0.25)
RETAIN = examples(5, start=40)


def weighted(weights=WEIGHTS, rows: tuple[Example, ...] = ()) -> list[Example]:
    rows = rows or examples(len(weights))
    return [row.model_copy(update={"weight": weight}) for row, weight in zip(rows, weights, strict=True)]


def trained(folder: Path, rows, policy: Policy | None = None, retain=None, **changes) -> UnlearnTrainer:
    trainer = UnlearnTrainer(policy or tiny_policy(), None, quiet(folder, **changes), rows, retain)
    trainer.train()
    return trainer


def first_gradient(
    folder: Path, rows, retain=None, policy: Policy | None = None, reference=None, **changes
) -> torch.Tensor:
    """Gradient that the optimiser is given in the first step."""
    policy = policy or tiny_policy(lora_b_sd=0.05)
    trainer = UnlearnTrainer(policy, reference, quiet(folder, max_steps=1, **changes), rows, retain)
    tape = GradientTape(policy)
    trainer.add_callback(tape)
    trainer.train()
    return tape.steps[0]


# --- the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_dense_weighted_sum(tmp_path: Path, name: str, adapter: bool) -> None:
    """Whole set in one batch: sum_i omega_i grad l_i, each l_i from one unpadded sequence (float32: 2e-4)."""
    policy = tiny_policy(lora_b_sd=0.05, adapter=adapter)
    items = encode_all(policy, examples(4))
    start = policy.reference_sums(items).tolist()
    dense = dense_losses(policy.model, items, name, start, 0.1)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = flat(gradient(policy, (weights * dense).sum()))
    term = {"retain_term": "nll", "retain_weight": 0.0} if name == "grad_diff" else {}
    ours = first_gradient(tmp_path, weighted(), RETAIN if term else None, policy, loss=name, **term)
    assert relative(ours, expected) < 2e-4


@pytest.mark.parametrize("name", LOSSES)
def test_every_weight_changes_the_update(tmp_path: Path, name: str) -> None:
    """Two weight vectors of equal sum give different directions, and each sample's share is linear in omega_i."""
    term = {"retain_term": "nll", "retain_weight": 0.0} if name == "grad_diff" else {}
    retain = RETAIN if term else None
    one, two, mean = (
        first_gradient(tmp_path, weighted(weights), retain, loss=name, **term)
        for weights in ((0.7, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.7), (0.4, 0.1, 0.1, 0.4))
    )
    assert torch.cosine_similarity(one, two, dim=0) < 0.999
    assert relative(one, two) > 0.05
    assert relative((one + two) / 2, mean) < 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_a_zero_weight_is_a_removed_row(tmp_path: Path, name: str) -> None:
    term = {"retain_term": "nll"} if name == "grad_diff" else {}
    retain = RETAIN if term else None
    kept = weighted((0.2, 0.3, 0.5))
    with_zero = [kept[0], examples(9)[8].model_copy(update={"weight": 0.0}), *kept[1:]]
    settings = {"loss": name, "max_steps": 4, "per_device_train_batch_size": 2, **term}
    one, two = (trained(tmp_path, rows, retain=retain, **settings).policy for rows in (kept, with_zero))
    assert torch.equal(flat(one.snapshot()), flat(two.snapshot()))


@pytest.mark.parametrize("name", ["ga", "npo"])
def test_the_scale_of_the_weights_does_not_matter(tmp_path: Path, name: str) -> None:
    one, two, equal, absent = (
        flat(trained(tmp_path, rows, loss=name, per_device_train_batch_size=2).policy.snapshot())
        for rows in (
            weighted(),
            weighted([64 * weight for weight in WEIGHTS]),
            weighted([0.25] * 4),
            list(examples(4)),
        )
    )
    assert torch.equal(one, two)
    assert torch.equal(equal, absent)  # no column = equal weights
    assert not torch.equal(one, equal)


def test_minibatches_are_unbiased(tmp_path: Path) -> None:
    """One epoch of batches of two at fixed parameters averages to the full-batch gradient."""
    policy = tiny_policy(lora_b_sd=0.05)
    trainer = UnlearnTrainer(policy, None, quiet(tmp_path, loss="ga", per_device_train_batch_size=2), weighted())
    parts = [flat(gradient(policy, trainer.compute_loss(policy.model, b))) for b in trainer.get_train_dataloader()]
    assert len(parts) == 2
    whole = first_gradient(tmp_path, weighted(), policy=policy, loss="ga")
    assert relative(sum(parts) / len(parts), whole) < 1e-4


@pytest.mark.parametrize(("name", "term"), [("ga", "none"), ("grad_diff", "kl"), ("npo", "nll"), ("npo", "proximal")])
def test_accumulating_2_x_2_equals_a_batch_of_4(tmp_path: Path, name: str, term: str) -> None:
    """The gradients of every step and the parameters after three."""
    rows, retain = weighted((0.1, 0.5, 0.15, 0.05, 0.2)), RETAIN if term in ("nll", "kl") else None
    shapes = [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "retain_batch_size": 1},
        {"per_device_train_batch_size": 4, "retain_batch_size": 2},
    ]
    gradients, thetas = [], []
    for shape in shapes:
        policy = tiny_policy(lora_b_sd=0.05)
        args = quiet(tmp_path, loss=name, retain_term=term, guard=False, **shape)
        trainer = UnlearnTrainer(policy, None, args, rows, retain)
        tape = GradientTape(policy)
        trainer.add_callback(tape)
        trainer.train()
        gradients.append(torch.cat(tape.steps))
        thetas.append(flat(policy.snapshot()))
    assert relative(*gradients) < 1e-3
    assert relative(*thetas) < 1e-5


# --- retain terms -----------------------------------------------------------------------------------


def dense_retain(policy: Policy, items: list[Encoded], term: str) -> torch.Tensor:
    """The retain term over rows, one unpadded sequence at a time."""
    batches = [collate([item], 0) for item in items]
    with policy.reference(), torch.no_grad():
        starts = [answer_log_probs(policy.model, batch).logits.log_softmax(-1) for batch in batches]
    values = []
    for item, batch, old in zip(items, batches, starts, strict=True):
        now = answer_log_probs(policy.model, batch)
        if term == "nll":
            values.append(-now.token.sum() / item.n_answer)
        else:
            values.append((old.exp() * (old - now.logits.log_softmax(-1))).sum() / item.n_answer)
    return torch.stack(values).mean()


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("term", ["nll", "kl", "proximal"])
def test_retain_gradient_equals_the_dense_one(tmp_path: Path, term: str, adapter: bool) -> None:
    """The difference of the gradients with and without the term is lambda times the term's own gradient."""
    reference = tiny_model() if term == "kl" and not adapter else None

    def policy() -> Policy:
        made = tiny_policy(lora_b_sd=0.1, adapter=adapter)
        if not adapter:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for value in made.trainable().values():
                    value.add_(0.05 * torch.randn(value.shape, generator=generator))
        return made

    here = policy()
    items = encode_all(here, RETAIN[:3])
    value = here.change_sq() if term == "proximal" else dense_retain(here, items, term)
    expected = flat(gradient(here, value))
    retain = None if term == "proximal" else RETAIN[:3]
    settings: dict = {"loss": "ga", "retain_batch_size": 3, "retain_weight": 50.0}
    without = first_gradient(tmp_path, weighted(), policy=policy(), loss="ga")
    settings |= {"retain_term": term, "guard": False}
    with_term = first_gradient(tmp_path, weighted(), retain, policy(), reference, **settings)
    assert relative((with_term - without) / 50.0, expected) < 2e-4


class InSixteenBits(TrainerCallback):
    """Notes whether the policy's passes round to 16 bits while it is trained."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.seen = policy, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen.append(rounds_to_16_bits(self.policy))


def test_mixed_precision_holds_for_the_training_alone(tmp_path: Path) -> None:
    policy = tiny_policy(lora_b_sd=0.05)
    rows = encode_all(policy, weighted())
    before = policy.answer_sums(rows)
    trainer = UnlearnTrainer(policy, None, quiet(tmp_path, bf16=True, learning_rate=0.0), weighted(), RETAIN)
    watch = InSixteenBits(policy)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.seen == [True, True, True]  # accelerate has put autocast into the model's forward
    assert not rounds_to_16_bits(policy)  # and whoever scores or measures afterwards finds the model as it was
    assert torch.equal(policy.answer_sums(rows), before)


@pytest.mark.parametrize("name", ["npo", "ga"])
def test_references_are_of_the_precision_that_is_trained(tmp_path: Path, name: str) -> None:
    """At theta_0 every NPO loss is (2 / beta) log 2, and a change of nothing breaches no budget."""
    rows = [row.model_copy(update={"completion": "some long answer " * 20 + row.completion}) for row in examples(4)]
    policy = tiny_policy()
    policy.reference_sums(encode_all(policy, rows))  # in float32: not these
    args = quiet(tmp_path, loss=name, bf16=True, learning_rate=0.0, ppl_budget_frac=0.0, guard_steps=1)
    trainer = UnlearnTrainer(policy, None, args, rows, rows)
    trainer.train()
    logs = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
    if name == "npo":
        assert logs == pytest.approx([20.0 * math.log(2.0)] * 3, rel=1e-3)  # float32 references: 4 to 7 % off
    assert trainer.guard_result is not None and not trainer.guard_result.breached
    assert trainer.guard_result.ppl_end == pytest.approx(trainer.guard_result.ppl_start, rel=1e-6)
    exact = policy.reference_sums(encode_all(policy, rows))
    assert torch.equal(exact, policy.answer_sums(encode_all(policy, rows)))  # float32 still has its own


def test_retain_terms_at_the_start(tmp_path: Path) -> None:
    """kl and proximal are 0 at theta_0 with gradient 0; nll is the plain NLL of the retain rows."""
    for term in ("nll", "kl", "proximal"):
        policy = tiny_policy()
        retain = None if term == "proximal" else RETAIN[:3]
        trainer = UnlearnTrainer(
            policy,
            None,
            quiet(tmp_path, loss="ga", retain_term=term, retain_batch_size=3, guard=False),
            weighted(),
            retain,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        value = trainer.inner_loss.retain(policy.model, batch)
        assert value is not None
        if term == "nll":
            assert float(value) == pytest.approx(float(dense_retain(policy, encode_all(policy, RETAIN[:3]), "nll")))
        else:
            assert abs(float(value.detach())) < 1e-6
            assert flat(gradient(policy, value)).abs().max() < 1e-5


def test_kl_with_full_fine_tuning_uses_ref_model(tmp_path: Path) -> None:
    policy, reference = tiny_policy(adapter=False), tiny_model(seed=5)
    trainer = UnlearnTrainer(
        policy, reference, quiet(tmp_path, loss="npo", retain_term="kl", retain_batch_size=5), weighted(), RETAIN
    )
    batch = next(iter(trainer.get_train_dataloader()))
    items = policy.collate([policy.encoder.encode(row.prompt, row.completion) for row in RETAIN])
    with torch.no_grad():
        value = trainer.inner_loss.retain(policy.model, batch)
        ours, theirs = answer_log_probs(policy.model, items), answer_log_probs(reference, items)
        expected = kl_from_reference(ours.logits, theirs.logits, ours.mask).mean()
        sums = answer_log_probs(reference, policy.collate(encode_all(policy, examples(4)))).sum
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    order = batch["index"]
    assert torch.allclose(batch["reference_sum"], sums[order], atol=1e-3)  # npo's reference is ref_model, too
    assert not any(value.requires_grad for value in reference.parameters())


@pytest.mark.parametrize("name", ["ga", "npo"])
def test_full_fine_tuning_changes_all_weights_and_lowers_the_answers(tmp_path: Path, name: str) -> None:
    trainer = UnlearnTrainer(
        tiny_model(),
        None,
        quiet(tmp_path, loss=name, full_finetuning=True, max_steps=5, learning_rate=1e-3),
        list(examples(4)),
        processing_class=tiny_tokenizer(),
    )
    policy = trainer.policy
    assert not policy.has_adapter
    items = encode_all(policy, examples(4))
    before = policy.reference_sums(items)
    trainer.train()
    assert (policy.answer_sums(items) < before).all()
    assert torch.equal(policy.reference_sums(items), before)
    changed = [name for name, value in policy.trainable().items() if not torch.equal(value, policy.theta0[name])]
    assert len(changed) == len(policy.trainable())


# --- determinism and resume -------------------------------------------------------------------------


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    thetas = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(thetas))  # the global generator must not matter
        rows = weighted((0.2, 0.3, 0.1, 0.4))
        thetas.append(flat(trained(tmp_path, rows, seed=seed, per_device_train_batch_size=2).policy.snapshot()))
    assert torch.equal(thetas[0], thetas[1])
    assert not torch.equal(thetas[0], thetas[2])


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_six_steps_equal_three_a_checkpoint_and_three_more(tmp_path: Path, adapter: bool) -> None:
    """Bit for bit, in the middle of an epoch (5 rows, batches of 2), with optimiser state, retain rows and schedule."""
    settings = {
        "per_device_train_batch_size": 2,
        "retain_term": "nll",
        "lr_scheduler_type": "linear",
        "max_steps": 6,
        "learning_rate": 1e-3,
        "guard": False,
    }
    rows = weighted((0.1, 0.2, 0.3, 0.15, 0.25))
    whole = trained(tmp_path / "a", rows, tiny_policy(adapter=adapter), RETAIN, **settings)

    class StopAtThree(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == 3
            return control

    args = quiet(tmp_path / "b", **settings, save_strategy="steps", save_steps=100)
    half = UnlearnTrainer(tiny_policy(adapter=adapter), None, args, rows, RETAIN, callbacks=[StopAtThree()])
    half.train()
    assert half.state.global_step == 3
    rest = UnlearnTrainer(tiny_policy(adapter=adapter), None, args, rows, RETAIN)
    rest.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert rest.state.global_step == 6
    assert torch.equal(flat(rest.policy.snapshot()), flat(whole.policy.snapshot()))
    assert not torch.equal(flat(half.policy.snapshot()), flat(whole.policy.snapshot()))


def test_a_distributed_run_resumed_within_an_epoch_sees_the_rows_it_would_have_seen(tmp_path: Path) -> None:
    """The sampler lies below accelerate's shard and its skipping wrapper, as in one process of several."""

    class Sharded(UnlearnTrainer):
        def get_train_dataloader(self):
            self.seen = []
            batches = BatchSamplerShard(BatchSampler(self._get_train_sampler(), 2, drop_last=False), 1, 0)
            return DataLoaderShard(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

        def compute_loss(self, model, inputs, *rest, **named):
            self.seen.append(inputs["index"].tolist())
            return super().compute_loss(model, inputs, *rest, **named)

    rows = weighted((0.1, 0.2, 0.3, 0.15, 0.25))  # 3 steps per epoch
    settings = {"per_device_train_batch_size": 2, "max_steps": 9, "save_strategy": "steps", "save_steps": 4}
    whole = Sharded(tiny_policy(), None, quiet(tmp_path, **settings), rows)
    whole.train()
    rest = Sharded(tiny_policy(), None, quiet(tmp_path, **settings), rows)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(whole.seen) == 9
    assert rest.seen == whole.seen[4:]


# --- devices ----------------------------------------------------------------------------------------


def test_several_visible_devices_do_not_mean_data_parallelism(tmp_path: Path) -> None:
    args = quiet(tmp_path, max_steps=2)
    assert args.device.type == "cpu"
    args._n_gpu = 3
    trainer = UnlearnTrainer(tiny_policy(), None, args, weighted())
    assert (args.n_gpu, args.train_batch_size) == (1, 4)
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


def test_models_are_on_the_device_before_reference_sums_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, policy, reference = [], tiny_policy(), tiny_model()
    move, sums = torch.nn.Module.to, policy.reference_sums
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: events.append((self, *a)) or move(self, *a, **k))
    monkeypatch.setattr(policy, "reference_sums", lambda rows: events.append("sums") or sums(rows))
    UnlearnTrainer(policy, None, quiet(tmp_path), weighted())
    device = torch.device("cpu")
    assert events[:2] == [(policy.model, device), "sums"]
    events.clear()
    UnlearnTrainer(tiny_policy(), reference, quiet(tmp_path, loss="ga", retain_term="kl"), weighted(), RETAIN)
    assert (reference, device) in events
    events.clear()
    reference.is_quantized = True  # quantised weights stay where they were loaded
    UnlearnTrainer(tiny_policy(), reference, quiet(tmp_path, loss="ga", retain_term="kl"), weighted(), RETAIN)
    assert (reference, device) not in events


# --- nothing non-finite is applied ------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_a_non_finite_loss_names_step_and_sample_and_changes_nothing(tmp_path: Path, adapter: bool) -> None:
    """The embedding of a letter that one row alone uses is spoilt in the second step."""
    rows = [*examples(3), Example(id="spoilt", prompt=ask("Z?"), completion="§")]
    policy = tiny_policy(adapter=adapter)
    token = policy.tokenizer("§", add_special_tokens=False)["input_ids"][0]
    seen = []

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                policy.model.get_input_embeddings().weight.data[token] = float("nan")
                seen.append(flat(policy.snapshot()))
            return control

    trainer = UnlearnTrainer(policy, None, quiet(tmp_path, max_steps=5), rows, callbacks=[Spoil()])
    with pytest.raises(NonFiniteError, match="non-finite loss in phase unlearn, step 2, sample spoilt:") as caught:
        trainer.train()
    assert caught.value.ids == ["spoilt"]
    assert torch.equal(flat(policy.snapshot()).nan_to_num(7.0), seen[0].nan_to_num(7.0))


def test_a_non_finite_gradient_stops_before_the_update(tmp_path: Path) -> None:
    policy = tiny_policy()

    class Spoil(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:  # one of two micro-batches is done
                next(p for p in kwargs["model"].parameters() if p.grad is not None).grad[0, 0] = float("inf")
            return control

    args = quiet(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_grad_norm=1.0)
    trainer = UnlearnTrainer(policy, None, args, weighted(), callbacks=[Spoil()])
    trainer.phase = "rehearsal"
    with pytest.raises(NonFiniteError, match="non-finite gradient in phase rehearsal, step 1, sample") as caught:
        trainer.train()
    assert sorted(caught.value.ids) == sorted(row.id for row in weighted())  # two micro-batches of two
    one_step = trained(
        tmp_path,
        weighted(),
        max_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_grad_norm=1.0,
    )
    assert torch.equal(flat(policy.snapshot()), flat(one_step.policy.snapshot()))


def test_infinite_gradients_are_left_to_the_scaler_of_float16() -> None:
    model = torch.nn.Linear(1, 1)
    model.weight.grad = torch.full((1, 1), float("inf"))
    check = FiniteGradients(lambda: ("unlearn", ["a"]))
    check.on_pre_optimizer_step(SimpleNamespace(fp16=True), SimpleNamespace(global_step=0), None, model=model)
    with pytest.raises(NonFiniteError, match="gradient in phase unlearn, step 0, sample a"):
        check.on_pre_optimizer_step(SimpleNamespace(fp16=False), SimpleNamespace(global_step=0), None, model=model)


def test_a_non_finite_retain_term_is_named(tmp_path: Path) -> None:
    policy = tiny_policy()
    retain = [Example(id="r", prompt=ask("Z?"), completion="§")]
    trainer = UnlearnTrainer(
        policy, None, quiet(tmp_path, loss="ga", retain_term="nll", guard=False), weighted(), retain
    )
    token = policy.tokenizer("§", add_special_tokens=False)["input_ids"][0]
    policy.model.get_input_embeddings().weight.data[token] = float("nan")
    start = flat(policy.snapshot())
    with pytest.raises(NonFiniteError, match=r"retain term \(nll\) in phase unlearn, step 0"):
        trainer.train()
    assert torch.equal(flat(policy.snapshot()), start)


def test_a_non_finite_evaluation_loss_names_the_evaluation_row(tmp_path: Path) -> None:
    policy = tiny_policy()
    held_out = [Example(id="spoilt", prompt=ask("Z?"), completion="§")]
    trainer = UnlearnTrainer(policy, None, quiet(tmp_path, loss="ga"), weighted(), eval_dataset=held_out)
    token = policy.tokenizer("§", add_special_tokens=False)["input_ids"][0]
    policy.model.get_input_embeddings().weight.data[token] = float("nan")
    with pytest.raises(NonFiniteError, match="sample spoilt"):
        trainer.evaluate()


def test_evaluate_is_the_mean_loss_of_the_evaluation_rows(tmp_path: Path) -> None:
    policy = tiny_policy()
    args = quiet(tmp_path, loss="ga", per_device_eval_batch_size=2)
    trainer = UnlearnTrainer(policy, None, args, weighted(), eval_dataset=examples(3, start=20))
    items = encode_all(policy, examples(3, start=20))
    expected = dense_losses(policy.model, items, "ga", [0.0] * 3, 0.1).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


# --- data formats -----------------------------------------------------------------------------------

STANDARD = {"prompt": ["Tea?", "Rain?"], "completion": ["never", "no"]}
CONVERSATIONAL = {
    "prompt": [[{"role": "user", "content": text}] for text in STANDARD["prompt"]],
    "completion": [[{"role": "assistant", "content": text}] for text in STANDARD["completion"]],
}
PREFERENCE = {"prompt": STANDARD["prompt"], "chosen": ["yes", "sure"], "rejected": STANDARD["completion"]}
IMPLICIT = {
    side: [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(PREFERENCE["prompt"], PREFERENCE[side], strict=True)
    ]
    for side in ("chosen", "rejected")
}


@pytest.mark.parametrize("columns", [STANDARD, CONVERSATIONAL, PREFERENCE, IMPLICIT], ids=lambda c: "-".join(c))
def test_trl_formats_give_the_same_run(tmp_path: Path, columns: dict) -> None:
    """datasets.Dataset in every format, with the column weight; of preference pairs the rejected answer goes."""
    expected = [
        Example(id="a", prompt=ask("Tea?"), completion="never", weight=1.0),
        Example(id="b", prompt=ask("Rain?"), completion="no", weight=3.0),
    ]
    rows = Dataset.from_dict(columns | {"weight": [1.0, 3.0]})
    policy = tiny_policy()
    one = UnlearnTrainer(policy, None, quiet(tmp_path, per_device_train_batch_size=1), rows)
    one.train()
    two = trained(tmp_path, expected, per_device_train_batch_size=1)
    assert torch.equal(flat(policy.snapshot()), flat(two.policy.snapshot()))
    assert [sample.weight for sample in one.train_dataset.samples] == [0.5, 1.5]


def test_of_pairs_the_retain_side_is_the_chosen_answer() -> None:
    assert [row.completion for row in as_examples(Dataset.from_dict(PREFERENCE), good=True)] == ["yes", "sure"]
    assert [row.completion for row in as_examples(Dataset.from_dict(PREFERENCE), good=False)] == ["never", "no"]
    both = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "yes"}]
    assert [row.completion for row in as_examples([{"messages": both}], good=True)] == ["yes"]


def test_plain_model_objects_get_an_adapter_by_default_and_save_as_plain_peft(tmp_path: Path) -> None:
    """The saved adapter, loaded with peft alone, gives the trained policy's logits."""
    folder = save_tiny(tmp_path / "base")
    trainer = UnlearnTrainer(
        tiny_model(),
        args=quiet(tmp_path / "out", max_steps=3, learning_rate=1e-2),
        train_dataset=list(examples(4)),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 16
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    batch = collate(encode_all(trainer.policy, examples(4)), 257)
    with torch.no_grad():
        ours = answer_log_probs(trainer.model.eval(), batch).logits
        assert torch.allclose(answer_log_probs(loaded, batch).logits, ours, atol=1e-5)
        plain = answer_log_probs(AutoModelForCausalLM.from_pretrained(folder), batch).logits
    assert (ours - plain).abs().max() > 1e-2


def test_a_path_loads_model_and_tokenizer(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = UnlearnTrainer(
        str(folder), args=quiet(tmp_path, max_steps=1), train_dataset=[*examples(2)], peft_config=lora
    )
    assert all("q_proj" in name for name in trainer.policy.trainable())
    assert trainer.train().global_step == 1


# --- logging ----------------------------------------------------------------------------------------


def test_logged_parts_add_up(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, weighted(), retain=RETAIN, loss="grad_diff", retain_term="kl", retain_weight=2.0, learning_rate=1e-2
    )
    logs = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["forget_loss"] + 2.0 * entry["retain_loss"], rel=1e-5)
    assert logs[-1]["forget_loss"] < logs[0]["forget_loss"]


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    free = first_gradient(tmp_path, weighted())
    clipped = first_gradient(tmp_path, weighted(), max_grad_norm=0.5)
    assert free.norm() > 0.5
    assert float(clipped.norm()) == pytest.approx(0.5, rel=1e-3)
    assert torch.cosine_similarity(free, clipped, dim=0) > 1 - 1e-6


# --- errors -----------------------------------------------------------------------------------------


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="retain_term 'ridge': expected none, nll, kl or proximal"):
        quiet(tmp_path, retain_term="ridge")
    with pytest.raises(ConfigError, match="npo_beta must be > 0"):
        quiet(tmp_path, npo_beta=0.0)
    with pytest.raises(ConfigError, match="retain_weight"):
        quiet(tmp_path, retain_weight=-1.0)
    with pytest.raises(ConfigError, match="'dpo': expected one of"):
        quiet(tmp_path, loss="dpo")
    with pytest.raises(ConfigError, match="grad_diff.*conflicts"):
        quiet(tmp_path, loss="grad_diff", retain_term="none")


def test_data_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no row of positive weight"):
        UnlearnTrainer(tiny_policy(), None, quiet(tmp_path), weighted((0.0, 0.0)))
    with pytest.raises(ConfigError, match="needs a retain_dataset"):
        UnlearnTrainer(tiny_policy(), None, quiet(tmp_path, loss="grad_diff", retain_term="nll"), weighted())
    with pytest.raises(DataError, match="completion: missing"):
        UnlearnTrainer(tiny_policy(), None, quiet(tmp_path), Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}))
    with pytest.raises(DataError, match="expected a finite number >= 0"):
        UnlearnTrainer(tiny_policy(), None, quiet(tmp_path), Dataset.from_dict(STANDARD | {"weight": [1.0, -1.0]}))


def test_models_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    rows = list(examples(2))
    with pytest.raises(ModelError, match="processing_class is missing"):
        UnlearnTrainer(tiny_model(), args=quiet(tmp_path), train_dataset=rows)
    with pytest.raises(ConfigError, match="full_finetuning conflicts with peft_config"):
        UnlearnTrainer(
            tiny_model(),
            args=quiet(tmp_path, full_finetuning=True),
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=2),
        )
    with pytest.raises(ConfigError, match="'kl' with full fine-tuning needs ref_model"):
        UnlearnTrainer(tiny_policy(adapter=False), None, quiet(tmp_path, retain_term="kl"), rows, RETAIN)


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_a_sharded_launch_is_refused_before_the_model_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = quiet(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")  # what accelerate launch sets
    monkeypatch.setattr("u2a.trainer_setup.load_model", None)
    with pytest.raises(ConfigError, match=f"{name}: training with sharded parameters"):
        UnlearnTrainer("no-model", None, args, weighted())


def test_the_default_configuration_is_the_documented_one(tmp_path: Path) -> None:
    args = UnlearnConfig(output_dir=str(tmp_path))
    assert (args.loss, args.npo_beta, args.retain_term, args.learning_rate) == ("npo", 0.1, "nll", 1e-4)
    assert (args.ppl_budget_frac, args.full_finetuning, args.remove_unused_columns) == (0.10, False, False)


def test_of_a_pair_the_rejected_answer_is_unlearned_whatever_columns_stand_beside_it() -> None:
    bad, good = (
        [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": text}] for text in ("BAD", "GOOD")
    )
    pair = {"prompt": "Q?", "chosen": good, "rejected": bad}
    for more in ({}, {"messages": good}, {"completion": "GOOD"}):
        assert [row.completion for row in as_examples([pair | more], good=False)] == ["BAD"], more
        assert [row.completion for row in as_examples([pair | more], good=True)] == ["GOOD"], more


def test_a_warm_up_is_not_left_out_by_the_constant_schedule(tmp_path: Path) -> None:
    rates = []

    class Tape(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = UnlearnTrainer(
        tiny_policy(), None, quiet(tmp_path, max_steps=4, warmup_steps=2, learning_rate=1e-3), weighted()
    )
    trainer.add_callback(Tape())
    trainer.train()
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 1e-3])


# --- what is told and refused -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_evaluation_is_the_mean_loss_of_its_rows_whatever_the_batch(tmp_path: Path, batch: int) -> None:
    policy = tiny_policy(lora_b_sd=0.05)
    args = quiet(tmp_path, loss="ga", retain_term="nll", retain_batch_size=1, per_device_eval_batch_size=batch)
    trainer = UnlearnTrainer(policy, None, args, weighted(), RETAIN, examples(6))
    items = encode_all(policy, examples(6))
    expected = dense_losses(policy.model, items, "ga", [0.0] * 6, 0.1).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_the_parts_of_the_loss_add_up_to_what_is_logged(tmp_path: Path, every: int) -> None:
    settings = {"loss": "ga", "retain_term": "nll", "gradient_accumulation_steps": 4, "learning_rate": 1e-2}
    policy = tiny_policy()
    args = quiet(
        tmp_path, **settings, per_device_train_batch_size=2, max_steps=6, logging_steps=every, retain_weight=0.5,
        eval_strategy="steps", eval_steps=1, guard=False,
    )  # fmt: skip
    trainer = UnlearnTrainer(policy, None, args, weighted(), RETAIN, examples(3, start=20))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6 // every
    for entry in logs:
        assert entry["forget_loss"] + 0.5 * entry["retain_loss"] == pytest.approx(entry["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"retain_term": "nll"}, {}, "retain_term 'nll' needs a retain_dataset"),
        ({"loss": "grad_diff", "retain_term": "nll", "retain_batch_size": 0}, {}, "retain_batch_size must be >= 1"),
        ({"guard_rows": -1}, {}, "guard_rows >= 0"),
        ({"train_sampling_strategy": "sequential"}, {}, "rows come in random order only"),
        ({"save_only_model": True}, {}, "a checkpoint holds the whole state"),
        ({"full_finetuning": True}, {"peft_config": LoraConfig(r=2)}, "full_finetuning conflicts with peft_config"),
        ({}, {"ref_model": "name"}, "ref_model: expected a loaded model, got str"),
        ({"fsdp": "full_shard"}, {}, r"FSDP: training with sharded parameters is not supported \(launch with DDP"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor 0.1: the loss is of the answers as they are"),
        ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha 5.0: the loss is of the model without noise"),
    ],
)
def test_a_refused_call_leaves_the_model_as_it_was(tmp_path: Path, settings: dict, options: dict, said: str) -> None:
    model = tiny_model()
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match=said):
        UnlearnTrainer(
            model, args=quiet(tmp_path, **settings), train_dataset=weighted(), processing_class=tokenizer, **options
        )
    UnlearnTrainer(model, args=quiet(tmp_path), train_dataset=weighted(), processing_class=tokenizer)


def test_what_a_policy_has_already_is_not_given_once_more(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a Policy has its adapter already"):
        UnlearnTrainer(tiny_policy(), None, quiet(tmp_path), weighted(), peft_config=LoraConfig(r=64))
    with pytest.raises(ConfigError, match="a Policy has its adapter already"):
        UnlearnTrainer(tiny_policy(), None, quiet(tmp_path, full_finetuning=True), weighted())
    policy = tiny_policy(adapter=False)
    UnlearnTrainer(policy, None, quiet(tmp_path, full_finetuning=True), weighted())
    with pytest.raises(ConfigError, match="ref_model is the model that is trained"):
        UnlearnTrainer(policy, policy.model, quiet(tmp_path), weighted())


def test_the_order_of_rows_follows_data_seed(tmp_path: Path) -> None:
    def first(**settings: int) -> list[str]:
        trainer = UnlearnTrainer(tiny_policy(), None, quiet(tmp_path, **settings), examples(16))
        return [trainer._ids[sample.index] for _, sample in (trainer.train_dataset[k] for k in range(8))]

    assert first() == first(data_seed=3) != first(data_seed=4)  # quiet's seed is 3
    assert first(seed=5, data_seed=3) == first()


def test_the_guard_watches_rows_of_every_kind(tmp_path: Path) -> None:
    kinds = [row.model_copy(update={"completion": "x" * 40}) for row in examples(40)] + list(examples(40, start=40))

    def watched(rows: list[Example], **settings: int) -> set[str]:
        trainer = UnlearnTrainer(tiny_policy(), None, quiet(tmp_path, **settings), weighted(), rows)
        assert trainer.guard is not None
        return {row.key for row in trainer.guard.rows}

    policy = tiny_policy()
    first, second = ({item.key for item in encode_all(policy, part)} for part in (kinds[:40], kinds[40:]))
    drawn = watched(kinds)
    assert len(drawn) == 32 and len(drawn & first) >= 8 and len(drawn & second) >= 8
    assert watched(kinds[::-1]) == drawn
    assert watched(kinds, guard_rows=0) == first | second and len(watched(kinds, guard_rows=5)) == 5
