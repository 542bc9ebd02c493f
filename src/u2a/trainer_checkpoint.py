"""Checkpoints of the trainer: a run that stops anywhere goes on as if it had never stopped, byte for byte on a CPU.

A checkpoint ``checkpoint-N`` is a folder that is saved whole (see :mod:`u2a.checkpoint`) and holds no pickle:

=============================  =====================================================================
file                           content
=============================  =====================================================================
``parameters.safetensors``     the trainable parameters
``state.safetensors, .json``   optimiser, scheduler, gradient scaler, guard, random generators, loss since the last log
``trainer_state.json``         transformers' ``TrainerState`` with the logged history
``adapter_*``                  with an adapter, the same weights once more as peft reads them
=============================  =====================================================================

The position in the stream of samples is the step number; see :mod:`u2a.stream`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from u2a import disk
from u2a.checkpoint import newest_whole, prune, save_folder, verify
from u2a.errors import RecordError, Stopped
from u2a.guard import CollapseGuard
from u2a.modeling import Policy
from u2a.random_state import random_state, set_random_state
from u2a.record import content_id
from u2a.signals import stopping
from u2a.tensor_tree import read_tensors, read_tree, write_tree

PARAMETERS = "parameters.safetensors"
STATE = "state"


def stream_id(rows: Sequence[tuple[str, float]], retain: Sequence[str], run: Sequence[object]) -> str:
    """Hash of everything that decides what a step is: which rows it sees, with which weights, and what it does to them.

    Args:
        rows: content and weight of the rows trained on.
        retain: content of the rows of the retain term or the guard.
        run: the policy's identity, loss, retain term, seed and batch sizes.

    Returns:
        The hash; learning rate and number of steps are not in it, they may change when a run goes on.
    """
    texts = [f"{key} {weight!r}" for key, weight in rows]
    return content_id(*texts, "retain", *retain, repr(tuple(run)))


def put_back(model: nn.Module, forward: Any) -> None:
    """Give a model the forward back that accelerate has replaced by one of lower precision.

    Args:
        model: the model.
        forward: what stood in its ``__dict__`` before, or None where its class's forward was used.
    """
    vars(model).pop("forward", None)
    vars(model).pop("_original_forward", None)
    if forward is not None:
        model.forward = forward


class CheckpointedTrainer(Trainer):
    """A trainer whose checkpoints are whole, free of pickle, and complete.

    Attributes:
        policy: the policy under training.
        stream_id: hash of model, rows, weights, loss, seed and batch sizes; a checkpoint of another stream is refused.
        resumed: what was read from the checkpoint that ``train`` goes on from, or None.
        unlogged: sums of the parts of the loss over the micro-batches since the last log, and how many these are.
    """

    policy: Policy
    stream_id: str
    resumed: dict[str, Any] | None = None
    unlogged: dict[str, float]
    _was_over = False
    _best_step: int | None = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's path; True takes the newest whole one in ``args.output_dir``.
            trial: as for ``Trainer.train``.
            ignore_keys_for_eval: as for ``Trainer.train``.

        Returns:
            The base class's ``TrainOutput``.

        Raises:
            RecordError: no checkpoint, a damaged one, or one of another run.
        """
        output, chosen = Path(self.args.output_dir or "."), None
        with self.args.main_process_first(local=False, desc="recovery of checkpoints"):
            if self.args.should_save:
                disk.recover(output)
            if resume_from_checkpoint:
                chosen = newest_whole(output) if resume_from_checkpoint is True else Path(resume_from_checkpoint)
                if chosen is None:
                    raise RecordError(f"{output}: no whole checkpoint there (leave resume_from_checkpoint out)")
                verify(chosen)
        self.resumed = None if chosen is None else self._read(chosen)
        self.unlogged, self._best_step = {}, None
        return super().train(None if chosen is None else str(chosen), trial, ignore_keys_for_eval)

    @property
    def steps_taken(self) -> int:
        """Optimiser steps that the policy has taken: those of the best checkpoint where that was loaded at the end."""
        return self.state.global_step if self._best_step is None else self._best_step

    def _read(self, folder: Path) -> dict[str, Any]:
        """The state in a checkpoint, which must be one of this run."""
        state = read_tree(folder, STATE)
        if not isinstance(state, dict) or state.get("stream") != self.stream_id:
            raise RecordError(
                f"{folder}: a checkpoint of another run, its model, rows, weights, loss, seed or batch sizes differ "
                "(put them back, or leave resume_from_checkpoint out)"
            )
        if len(state["processes"]) != self.args.world_size:
            raise RecordError(
                f"{folder}: saved by {len(state['processes'])} processes, resumed by {self.args.world_size} (launch as "
                "many as before)"
            )
        if len(state["guards"]) != len(self._guards()):
            was = "with" if state["guards"] else "without"
            raise RecordError(f"{folder}: saved {was} the collapse guard (resume with the same option)")
        return state

    # --- saving ----------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save everything that the rest of the run depends on."""
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        now = {"random": random_state(), "loss": float(self._tr_loss), "parts": self.unlogged}
        processes = self._from_all_processes(now)
        if self.args.should_save:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and (best == folder or best.exists()):
                self.state.best_model_checkpoint = str(best)
            self._note_callbacks()
            save_folder(folder, lambda part: self._write(part, processes))
            if self.args.save_total_limit:
                best_one = self.state.best_model_checkpoint
                kept = (folder,) if best_one is None else (folder, Path(best_one))
                prune(run_dir, self.args.save_total_limit, kept)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _write(self, folder: Path, processes: list[Any]) -> None:
        """Write all files of a checkpoint."""
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        save_file(self.policy.snapshot(), folder / PARAMETERS)
        scaler = getattr(self.accelerator, "scaler", None)
        state = {
            "stream": self.stream_id,
            "processes": processes,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "guards": [guard.state() for guard in self._guards()],
            "last_logged": self._globalstep_last_logged,
        }
        write_tree(folder, STATE, state)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        if isinstance(self.policy.model, PeftModel):
            self.policy.model.active_peft_config.save_pretrained(str(folder))
            save_file(get_peft_model_state_dict(self.policy.model), folder / SAFETENSORS_WEIGHTS_NAME)

    def _guards(self) -> list[CollapseGuard]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, CollapseGuard)]

    def _note_callbacks(self) -> None:
        """Write the state of callbacks that export one into the trainer's, as the base class does."""
        noted: Any = self.state.stateful_callbacks
        for each in (*self.callback_handler.callbacks, self.control):
            if isinstance(each, ExportableState):
                noted[type(each).__name__] = each.state()

    def _from_all_processes(self, document: dict[str, Any]) -> list[Any]:
        """A JSON document of each process, in the order of their ranks."""
        if self.args.world_size == 1:
            return [document]
        raw = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8).to(self.args.device)
        padded = self.accelerator.pad_across_processes(raw, pad_index=ord(" "))
        rows = self.accelerator.gather(padded).view(self.args.world_size, -1).cpu()  # type: ignore[union-attr]
        return [json.loads(row.numpy().tobytes()) for row in rows]

    # --- resuming --------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore the trainable parameters."""
        self.policy.restore(read_tensors(Path(resume_from_checkpoint) / PARAMETERS, self.policy.trainable()))

    def _load_best_model(self) -> None:
        """Restore the trainable parameters of the best checkpoint."""
        best = Path(self.state.best_model_checkpoint or "")
        verify(best)
        self._load_from_checkpoint(str(best))
        self._best_step = self.state.best_global_step

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore optimiser and learning-rate schedule."""
        if checkpoint is not None and self.resumed is not None:
            optimizer: Any = self.optimizer
            scheduler: Any = self.lr_scheduler
            optimizer.load_state_dict(self.resumed["optimizer"])
            scheduler.load_state_dict(self.resumed["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Restore the gradient scaler."""
        if checkpoint is not None and self.resumed is not None and self.resumed["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self.resumed["scaler"])  # type: ignore[union-attr]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random generators of this process."""
        if checkpoint is not None and self.resumed is not None:
            set_random_state(self.resumed["processes"][self.args.process_index]["random"])

    def restore_run(self) -> None:
        """Restore what a run keeps beside parameters and optimiser; called when training begins."""
        self._was_over = False
        if self.resumed is None:
            return
        processes = self.resumed["processes"]
        self._tr_loss.fill_(processes[self.args.process_index]["loss"])
        self.unlogged = dict(processes[self.args.process_index]["parts"])
        self._total_loss_scalar = -sum(each["loss"] for each in processes) / len(processes)  # of steps before this call
        self._globalstep_last_logged = self.resumed["last_logged"]
        for guard, state in zip(self._guards(), self.resumed["guards"], strict=True):
            guard.set_state(state)
        breached = any(guard.breached for guard in self._guards())
        self._was_over = breached or self.state.global_step >= self.state.max_steps
        if self._was_over:
            self._load_rng_state("")

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        """Train an epoch, or what is left of it; the base class would take one more step after the last one."""
        if self._was_over:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*positional, **named)

    def agreed(self, number: int) -> int:
        """The largest of a number over all processes, so that they all do the same.

        Args:
            number: of this process.

        Returns:
            The number, the same in every process.
        """
        if self.args.world_size == 1:
            return number
        value = torch.tensor(number, device=self.args.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)


class Checkpointing(TrainerCallback):
    """Asks for a checkpoint after so many minutes and when the run is to stop, and stops it then.

    Args:
        trainer: the trainer.
        minutes: between checkpoints, beside those of ``save_strategy``; 0: none.
    """

    def __init__(self, trainer: CheckpointedTrainer, minutes: float) -> None:
        self._trainer, self._minutes = trainer, minutes
        self._saved_at = time.monotonic()
        self._signal, self._due = 0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore what the checkpoint holds beside the base class's state."""
        self._trainer.restore_run()
        self._saved_at, self._signal, self._due = time.monotonic(), 0, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint when it is due, or a signal came; without checkpoints, stop at once."""
        trainer = self._trainer
        self._signal = trainer.agreed(stopping.requested or 0)
        saves = args.save_strategy != "no" or self._minutes > 0
        if self._signal and not saves:
            raise Stopped(self._signal)
        due = self._minutes > 0 and time.monotonic() - self._saved_at >= 60.0 * self._minutes
        self._due = bool(self._signal or trainer.agreed(int(due)))
        if self._due and not float(state.epoch or 0.5).is_integer():
            control.should_save, self._due = True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save after the epoch's own measurements, which a checkpoint of its last step would leave out."""
        control.should_save = control.should_save or self._due
        self._due = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here when that was asked for."""
        self._saved_at = time.monotonic()
        if self._signal:
            raise Stopped(self._signal)
