"""Every error a user can meet, each with what was got, what was expected and what to do."""

from __future__ import annotations


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


class NotConverged(U2AError):
    """A linear or inner solve stopped before its tolerance.

    Args:
        message: what was solved, the residual reached and the one asked for.
    """

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
