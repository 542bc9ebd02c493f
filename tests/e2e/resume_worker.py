"""Trains a tiny model in several processes, with a checkpoint or from one; test_distributed.py starts it."""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from process_group import leave
from tiny import examples, tiny_model, tiny_tokenizer
from u2a import UnlearnConfig, UnlearnTrainer


def trainer(folder: str) -> UnlearnTrainer:
    """A trainer that saves after its second step of four."""
    return UnlearnTrainer(
        model=tiny_model(),
        args=UnlearnConfig(
            output_dir=folder, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
            logging_steps=3, report_to="none", save_strategy="steps", save_steps=2, disable_tqdm=True,
        ),
        train_dataset=examples(10),
        retain_dataset=examples(6, start=50),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip


def main(folder: str) -> None:
    """Train, go on from the second step in a fresh trainer, and save both ends with the logged losses."""
    torch.set_num_threads(1)
    for name, start in (("whole", None), ("resumed", f"{folder}/checkpoint-2")):
        run = trainer(folder)
        run.train(resume_from_checkpoint=start)
        losses = torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        if run.is_world_process_zero():
            save_file(run.policy.snapshot() | {"losses": losses}, f"{folder}/{name}.safetensors")
    accelerator = run.accelerator
    del run
    leave(accelerator)


if __name__ == "__main__":
    main(sys.argv[1])
