"""Trains a tiny model on weighted rows and saves the adapter; test_distributed.py starts it in one or two processes."""

from __future__ import annotations

import sys
import tempfile

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from process_group import leave
from tiny import examples, tiny_model, tiny_tokenizer
from u2a import UnlearnConfig, UnlearnTrainer


def main(batch_size: int, path: str) -> None:
    """Train five steps with ``batch_size`` rows per process."""
    torch.set_num_threads(1)
    rows = [
        {"prompt": row.prompt[0].content, "completion": row.completion, "weight": 1.0 + k % 3}
        for k, row in enumerate(examples(10))
    ]
    retain = [{"prompt": row.prompt[0].content, "completion": "fine"} for row in examples(6, start=50)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = UnlearnTrainer(
            model=tiny_model(),
            args=UnlearnConfig(
                output_dir=folder,
                max_steps=5,
                per_device_train_batch_size=batch_size,
                retain_batch_size=batch_size,
                learning_rate=1e-3,
                max_grad_norm=1e9,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            retain_dataset=retain,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        if trainer.is_world_process_zero():
            save_file(trainer.policy.snapshot(), path)
            print(f"processes: {trainer.args.world_size}")
    accelerator = trainer.accelerator
    del trainer
    leave(accelerator)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
