"""Unlearn weighted bad answers with the trainer, in the way of transformers and TRL.

    python examples/train_with_trainer.py --model MODEL --negatives negatives.jsonl --retain instructions.jsonl
    accelerate launch examples/train_with_trainer.py --model MODEL --negatives ... --retain ...

Rows are {"prompt": ..., "completion": ...}; a column "weight" of the negatives, such as that of a solution, is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import load_dataset

from u2a import UnlearnConfig, UnlearnTrainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save the adapter.

    Args:
        arguments: words of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description="Unlearn weighted bad answers.")
    parser.add_argument("--model", required=True, help="hub id, directory, or package:NAME")
    parser.add_argument("--negatives", required=True, help="JSONL file of prompt, completion and perhaps weight")
    parser.add_argument("--retain", required=True, help="JSONL file of prompt and good completion")
    parser.add_argument("--output", default="runs/trainer", help="directory of checkpoints and of the adapter")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps")
    options = parser.parse_args(arguments)

    trainer = UnlearnTrainer(
        model=options.model,
        args=UnlearnConfig(
            output_dir=options.output,
            loss="npo",
            retain_term="nll",
            max_steps=options.steps,
            per_device_train_batch_size=8,
            logging_steps=5,
            use_cpu=not torch.cuda.is_available(),  # several processes on CPUs find each other only when told
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.negatives, split="train"),
        retain_dataset=load_dataset("json", data_files=options.retain, split="train"),
    )
    trainer.train()
    trainer.save_model(f"{options.output}/adapter")
    if trainer.accelerator.is_main_process and trainer.guard_result is not None:
        found = trainer.guard_result
        print(f"retain perplexity {found.ppl_start:.4g} to {found.ppl_end:.4g}, budget {found.ppl_budget:.4g}")


if __name__ == "__main__":
    main()
