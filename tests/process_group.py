"""How a worker of a distributed test ends."""

from __future__ import annotations

import gc

from accelerate import Accelerator


def leave(accelerator: Accelerator) -> None:
    """End the process group when nothing holds it any more: threads of it that outlive Python abort the process."""
    gc.collect()
    accelerator.wait_for_everyone()
    accelerator.end_training()
