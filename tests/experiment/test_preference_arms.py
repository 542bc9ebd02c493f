"""SFT, DPO and KTO by TRL: our tokens and masks, losses against closed forms, theta_0 as the reference, clean hands."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import Trainer

import u2a.experiment.trl_run as trl_run
from arm_kit import StepBudget, distance, leaves_no_trace, perturb, tiny_setting
from tiny import END, tiny_policy
from u2a.encoding import Encoded
from u2a.errors import ConfigError, NonFiniteError
from u2a.experiment.meter import Meter
from u2a.experiment.preference_arms import Method, PreferenceArm, encoded_pairs, make_trainer
from u2a.experiment.setting import Setting
from u2a.experiment.trl_run import common_options, lent, require_trl

METHODS: tuple[Method, ...] = ("sft", "dpo", "kto")
BETA = 0.3


@contextmanager
def trainer_of(method: Method, setting: Setting) -> Iterator[Trainer]:
    """The trainer an arm would use, with the model lent to it."""
    with tempfile.TemporaryDirectory() as folder, lent(setting.policy) as model:
        options = common_options(setting, {}, folder) | ({} if method == "sft" else {"beta": BETA})
        yield make_trainer(method, setting, model, options, Meter())


def batch_of(trainer: Trainer, rows: list[int]) -> dict[str, Tensor]:
    """The batch of some rows, as TRL gets it."""
    return cast(Any, trainer.data_collator)([{"row": row} for row in rows])


def rows_in(ids: Tensor, attention: Tensor, answer: Tensor) -> list[Encoded]:
    """What a right-padded batch trains on, row by row."""
    found = []
    for row, seen, chosen in zip(ids, attention.bool(), answer.bool(), strict=True):
        assert not (chosen & ~seen).any()
        assert bool(chosen[seen][-1]) and int(chosen.sum()) == int(chosen[seen].flip(0).cumprod(0).sum())  # a suffix
        found.append(Encoded(tuple(row[seen].tolist()), int(chosen.sum())))
    return found


@pytest.mark.parametrize("max_length", [512, 44])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_and_answer_masks_are_those_of_the_encoder(method: Method, max_length: int) -> None:
    setting = tiny_setting(policy=tiny_policy(max_length=max_length))
    encode = setting.policy.encoder.encode
    chosen = [encode(pair.prompt, pair.chosen) for pair in setting.pairs[:3]]
    rejected = [encode(pair.prompt, pair.rejected) for pair in setting.pairs[:3]]
    assert any(row.n_cut for row in chosen) == (max_length == 44)
    with trainer_of(method, setting) as trainer:
        if method == "kto":
            collator = cast(Any, trainer.data_collator)
            keys = [(row.key, label) for row, label in zip(collator.rows, collator.labels, strict=True)]
            picked = [
                keys.index((row.key, good))
                for row, good in zip(chosen + rejected, [True] * 3 + [False] * 3, strict=True)
            ]
        else:
            picked = [0, 1, 2]
        batch = batch_of(trainer, picked)
    whole = [Encoded(row.input_ids, row.n_answer) for row in (chosen if method == "sft" else chosen + rejected)]
    mask = batch["labels"] != -100 if method == "sft" else batch["completion_mask"]
    assert rows_in(batch["input_ids"], batch["attention_mask"], mask) == whole
    if method == "sft":
        assert batch["labels"][mask].tolist() == [token for row in whole for token in row.answer_ids]
    if method == "kto":
        assert batch["label"].tolist() == [True] * 3 + [False] * 3
        before = [whole[-1], *whole[:-1]]
        heads = [row.input_ids[: -row.n_answer] for row in whole]
        mixed = [(head + row.answer_ids)[:max_length] for head, row in zip(heads, before, strict=True)]
        found = rows_in(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
        assert [row.input_ids for row in found] == mixed
        assert [row.input_ids[: -row.n_answer] for row in found] == heads


def test_trl_itself_would_train_on_the_newline_behind_the_answer() -> None:
    """Why its tokens are not used: its chosen tokens are ours and one more."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOTrainer

    setting = tiny_setting()
    pair = setting.pairs[0]
    row = {
        "prompt": [{"role": "user", "content": pair.prompt[0].content}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }
    with trainer_of("dpo", setting) as trainer:
        tokenizer = cast(Any, trainer.processing_class)
        made = DPOTrainer._prepare_dataset(cast(Any, trainer), Dataset.from_list([row]), tokenizer, trainer.args, "x")
    ours = setting.policy.encoder.encode(pair.prompt, pair.chosen)
    assert tokenizer.decode(ours.answer_ids) == pair.chosen + END
    assert [*made[0]["prompt_ids"], *made[0]["chosen_ids"]] == [*ours.input_ids, *tokenizer("\n")["input_ids"]]


def closed_form(method: Method, setting: Setting, picked: list[int]) -> tuple[Tensor, float]:
    """The loss from our own summed log-probabilities, differentiable, and z of KTO."""
    policy, start = setting.policy, tiny_policy()
    chosen, rejected = encoded_pairs(setting)
    chosen, rejected = [chosen[k] for k in picked], [rejected[k] for k in picked]
    if method == "sft":
        answers = policy.log_probs(chosen)
        return -answers.sum.sum() / answers.count.sum(), 0.0
    rows = [*chosen, *rejected]
    ratio = policy.log_probs(rows).sum - start.answer_sums(rows)
    good, bad = ratio[: len(chosen)], ratio[len(chosen) :]
    if method == "dpo":
        return -logsigmoid(BETA * (good - bad)).mean(), 0.0
    prompts = [row.input_ids[: -row.n_answer] for row in rows]
    answers_before = [rows[-1].answer_ids, *(row.answer_ids for row in rows[:-1])]
    mixed = [Encoded(head + tail, len(tail)) for head, tail in zip(prompts, answers_before, strict=True)]
    z = max(0.0, float((policy.answer_sums(mixed) - start.answer_sums(mixed)).mean()))
    losses = torch.cat([1 - torch.sigmoid(BETA * (good - z)), 1 - torch.sigmoid(BETA * (z - bad))])
    return losses.mean(), z


@pytest.mark.parametrize(("method", "noise"), [("sft", 7), ("dpo", 7), ("kto", 7), ("kto", 9)])
def test_loss_and_gradient_are_those_of_the_closed_form(method: Method, noise: int) -> None:
    setting = tiny_setting()
    policy = setting.policy
    picked = [0, 3, 5]
    chosen, rejected = encoded_pairs(setting)
    with trainer_of(method, setting) as trainer:
        rows = picked
        if method == "kto":
            collator = cast(Any, trainer.data_collator)
            wanted = [(chosen[k].key, True) for k in picked] + [(rejected[k].key, False) for k in picked]
            keys = [(row.key, label) for row, label in zip(collator.rows, collator.labels, strict=True)]
            rows = [keys.index(key) for key in wanted]
        start = float(cast(Tensor, trainer.compute_loss(policy.model, batch_of(trainer, rows))).detach())
        assert start == pytest.approx({"dpo": 0.693147, "kto": 0.5, "sft": start}[method], abs=1e-5)
        perturb(policy, seed=noise)
        loss = cast(Tensor, trainer.compute_loss(policy.model, batch_of(trainer, rows)))
        loss.backward()
        found = {name: cast(Tensor, value.grad).clone() for name, value in policy.trainable().items()}
    expected, z = closed_form(method, setting, picked)
    expected.backward()
    gradient = {name: cast(Tensor, value.grad) for name, value in policy.trainable().items()}
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert abs(float(loss.detach()) - start) > 1e-3
    assert (z > 0.5) == (noise == 9)  # with and without KTO's own baseline
    scale = max(float(value.abs().max()) for value in gradient.values())
    assert distance(found, gradient) < 1e-3 * scale


def test_rows_cost_what_they_cost_elsewhere_here() -> None:
    setting = tiny_setting()
    chosen, _ = encoded_pairs(setting)
    ours, theirs = Meter(), Meter()
    with ours.phase("train"):
        (-setting.policy.log_probs(chosen[:4]).sum.sum()).backward()
    with trainer_of("sft", setting) as trainer:
        batch = batch_of(trainer, [0, 1, 2, 3])
        with theirs.phase("train"):
            cast(Tensor, trainer.compute_loss(setting.policy.model, batch)).backward()
    assert theirs.flops == pytest.approx(ours.flops, rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_what_it_should_and_gives_the_model_back(method: Method, tmp_path: Path) -> None:
    import trl.trainer.base_trainer as base_trainer
    import trl.trainer.utils as utils

    def margins(setting: Setting) -> tuple[float, float]:
        chosen, rejected = encoded_pairs(setting)
        good, bad = setting.policy.answer_sums(chosen), setting.policy.answer_sums(rejected)
        return float(good.mean()), float((good - bad).mean())

    setting, meter, budget = tiny_setting(learning_rate=5e-3), Meter(), StepBudget(6)
    policy = setting.policy
    base = cast(Any, policy.model).get_base_model()
    before = margins(setting)
    state = (torch.get_rng_state(), base.config.pad_token_id, policy.tokenizer.pad_token, utils._use_triton)
    with leaves_no_trace(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        patch.setattr(base_trainer, "send_telemetry", lambda **_: pytest.fail("telemetry"))
        done = PreferenceArm(method).train(setting, {}, meter, budget)
    after = margins(setting)
    assert after[0] > before[0] + 0.5 if method == "sft" else after[1] > before[1] + 0.5
    assert done.steps == 6 and len(budget.seen) == 7 and done.note == ""
    assert [entry.step for entry in done.history] == [1, 2, 3, 4, 5, 6]
    assert all(entry.loss is not None and entry.grad_norm for entry in done.history)
    spent = meter.spent().flops
    assert spent["train"] > 0 and spent.get("reference", 0) > 0 or method == "sft" and "reference" not in spent
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (base.config.pad_token_id, policy.tokenizer.pad_token, utils._use_triton)
    assert "forward" not in vars(base) and list(cast(Any, policy.model).peft_config) == ["default"]
    assert not policy.model.training
    assert [name for name, value in policy.model.named_parameters() if value.requires_grad] == list(policy.trainable())


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_everything(method: Method) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # what was drawn before must not matter
        setting = tiny_setting(seed)
        PreferenceArm(method).train(setting, {}, Meter(), StepBudget(2))
        found.append(setting.policy.snapshot())
    assert distance(found[0], found[1]) == 0.0
    assert distance(found[0], found[2]) > 0.0


def test_the_learning_rate_is_that_of_the_trial_and_constant() -> None:
    """With SGD on one batch of all rows a step moves theta by the rate times the clipped gradient norm."""
    setting = tiny_setting(optimizer="sgd", batch_size=8, max_grad_norm=1.5)
    budget = StepBudget(4, setting.policy.snapshot)
    done = PreferenceArm("dpo").train(setting, {"learning_rate": 0.02, "beta": 0.5}, Meter(), budget)
    for before, after, entry in zip(budget.seen[:-1], budget.seen[1:], done.history, strict=True):
        moved = float(torch.stack([(after[name] - before[name]).square().sum() for name in before]).sum().sqrt())
        assert moved == pytest.approx(0.02 * min(1.5, entry.grad_norm or 0.0), rel=1e-3)


def test_beta_is_that_of_the_trial() -> None:
    """At theta_0 the gradient of DPO is proportional to it."""
    norms = []
    for trial in ({"beta": 0.05}, {}, {"beta": 0.2}):
        done = PreferenceArm("dpo").train(tiny_setting(batch_size=8), trial, Meter(), StepBudget(1))
        norms.append(done.history[0].grad_norm)
    assert norms == pytest.approx([cast(float, norms[1]) * factor for factor in (0.5, 1.0, 2.0)], rel=1e-3)


def test_the_reference_of_a_pair_is_computed_once() -> None:
    spent = []
    for steps in (2, 6):  # two steps are one epoch
        meter = Meter()
        PreferenceArm("dpo").train(tiny_setting(), {}, meter, StepBudget(steps))
        spent.append(meter.spent().flops["reference"])
    assert spent[0] == spent[1] > 0


def test_a_number_that_is_not_finite_ends_the_run() -> None:
    setting = tiny_setting()
    next(iter(setting.policy.trainable().values())).data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="gradient in phase dpo"):
        PreferenceArm("dpo").train(setting, {}, Meter(), StepBudget(3))


def test_what_cannot_be_used_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_trl()
    with pytest.raises(ConfigError, match="no hyperparameter 'betta'"):
        PreferenceArm("dpo").train(tiny_setting(), {"betta": 1.0}, Meter(), StepBudget(1))
    with pytest.raises(ConfigError, match="need pairs"):
        PreferenceArm("dpo").train(tiny_setting(rows=()), {}, Meter(), StepBudget(1))
    with pytest.raises(ConfigError, match="batch_size"):
        PreferenceArm("kto").train(tiny_setting(batch_size=1), {}, Meter(), StepBudget(1))
    with pytest.raises(ConfigError, match=r"adapter\.enabled"):
        PreferenceArm("sft").train(tiny_setting(policy=tiny_policy(adapter=False)), {}, Meter(), StepBudget(1))
    for found in ("1.15.0", "2.0"):
        monkeypatch.setattr(trl_run, "version", lambda name, found=found: found)
        with pytest.raises(ConfigError, match=rf"trl >= 1\.16, < 2, which is version {found} .*'\.\[experiment\]'"):
            PreferenceArm("sft").train(cast(Setting, None), {}, Meter(), StepBudget(1))  # before it looks at anything

    def absent(name: str) -> str:
        raise trl_run.PackageNotFoundError(name)

    monkeypatch.setattr(trl_run, "version", absent)
    with pytest.raises(ConfigError, match=r"not installed \(in the clone: pip install '\.\[experiment\]'"):
        PreferenceArm("sft").train(cast(Setting, None), {}, Meter(), StepBudget(1))
