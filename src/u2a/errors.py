"""Every error a user can meet, each with what was got, what was expected and what to do."""

from __future__ import annotations

import os
import signal
from pathlib import Path


class U2AError(Exception):
    """Base class of all errors that u2a raises on purpose.

    Attributes:
        exit_status: process exit status the command line returns for this error.
    """

    exit_status = 2


class ConfigError(U2AError):
    """An option is unknown, out of range, or in conflict with another one.

    Args:
        problems: one complete sentence per problem; all are reported at once.
    """

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(U2AError):
    """A data file cannot be used; the message reads ``file:line: field: problem (fix)``.

    Args:
        problems: one line per problem. At most 20 are printed, followed by the total.
    """

    shown = 20

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = self.problems[: self.shown]
        if len(self.problems) > self.shown:
            lines.append(f"... and {len(self.problems) - self.shown} more ({len(self.problems)} problems in all)")
        super().__init__("\n".join(lines))


class ModelError(U2AError):
    """A model, tokenizer or adapter cannot be loaded or lacks something the run needs."""


class RecordError(U2AError):
    """A saved record is missing, damaged, of another kind, or of a newer schema."""


class NonFiniteError(U2AError):
    """A loss, gradient, score or weight is NaN or infinite; nothing was updated with it.

    Args:
        what: the quantity, for example ``"loss"``.
        phase: pipeline phase, for example ``"unlearn"``.
        step: optimiser step, scoring batch or solver iteration (0-based), or None.
        ids: ids of the samples concerned; the first five are printed.
    """

    exit_status = 1

    def __init__(self, what: str, phase: str, step: int | None = None, ids: list[str] | None = None) -> None:
        self.what, self.phase, self.step, self.ids = what, phase, step, list(ids or [])
        where = phase if step is None else f"{phase}, step {step}"
        who = f", sample {', '.join(self.ids[:5])}" if self.ids else ""
        more = f" and {len(self.ids) - 5} more" if len(self.ids) > 5 else ""
        super().__init__(
            f"non-finite {what} in phase {where}{who}{more}: nothing was updated with it "
            "(lower the learning rate, check the sample's text, or use dtype float32)"
        )


class GateError(U2AError):
    """The verdict of a run is below the one asked for."""

    exit_status = 1


class NotConverged(U2AError):
    """A linear or inner solve stopped before its tolerance.

    Args:
        message: what was solved, the residual reached and the one asked for.
    """

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)


class OutOfMemory(U2AError):
    """Memory ran out, and no smaller batch is left to try.

    Args:
        what: what did not fit, for example ``"policy, the smallest batch (512 tokens)"``.
    """

    exit_status = 1

    def __init__(self, what: str) -> None:
        super().__init__(
            f"out of memory: {what} (lower data.max_length or unlearn.retain_batch_size, use model.load_in_4bit or a "
            "smaller model, or a machine with more memory)"
        )


class LockedError(U2AError):
    """Another process works in the run's directory."""

    exit_status = 3


KEPT = "what was saved before is kept, and the same command goes on from there once this can be written"


class WriteError(U2AError):
    """A file cannot be written: the disk is full, the directory read-only, the device broken.

    What was saved before is untouched.

    Args:
        path: the file or directory.
        reason: what the system said.
        outcome: what that means, and what to do.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        reason: str,
        outcome: str = KEPT,
    ) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(f"{path}: cannot be written: {reason} ({free_bytes_text(self.path)}); {outcome}")


class Stopped(U2AError):
    """A signal asked the run to stop, and it did at a point from which the same command goes on.

    Args:
        signum: number of the signal, for example 15 for SIGTERM.
        saved: what is on the disk, for the message.
    """

    def __init__(self, signum: int, saved: str = "") -> None:
        self.signum, self.saved = signum, saved
        self.exit_status = 128 + signum
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; {saved or 'all that was finished is saved'}; the same command goes on")


def free_bytes_text(path: Path) -> str:
    """Say how much room there is where a file would stand.

    Args:
        path: a file or directory; it need not exist.

    Returns:
        Words such as ``1234 bytes free there``.
    """
    for folder in (path, *path.absolute().parents):
        try:
            room = os.statvfs(folder)
        except OSError:
            continue
        return f"{room.f_bavail * room.f_frsize} bytes free there"
    return "free bytes unknown"
