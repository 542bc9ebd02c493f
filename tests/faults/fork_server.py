"""Starts ``u2a`` many times cheaply: this process imports everything once and forks for every command.

Each child is a process of its own that really is killed, stopped, or refused a write. What happens to it is arranged
in the child alone, by patching functions before ``u2a.cli.main`` is called; ``src/u2a`` knows nothing of it.

It reads one JSON object per line from standard input and answers each with one.
"""

from __future__ import annotations

import builtins
import errno
import gc
import importlib
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Places where a run is killed, as functions; several functions may be one place.
POINTS = {
    "save": ("u2a.disk:make", "u2a.disk:write", "u2a.disk:sync", "u2a.disk:rename", "u2a.disk:remove"),
    "inner loop": ("u2a.trainer:UnlearnTrainer.compute_loss",),
    "CG": ("u2a.bilevel.linsolve:dot",),
    "scoring": ("u2a.bilevel.candidates:CandidateLosses.of", "u2a.bilevel.backward:_Taps.measure"),
    "selection": ("u2a.bilevel.solve:refine", "u2a.bilevel.solve:frank_wolfe_gap", "u2a.bilevel.solve:_judge"),
    "reward": ("u2a.reward.models:ImplicitReward.token_rewards",),
    "evaluation": ("u2a.evaluation_stage:evaluate_arm", "u2a.evaluation.generation:_decode"),
}
WRITERS = ("disk.py", "record.py", "checkpoint.py", "tensor_tree.py")  # u2a's own ways to write files


def _owner(place: str) -> tuple[Any, str]:
    """The object that holds a function, and its name in it."""
    module, _, path = place.partition(":")
    holder = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    return holder, name


def _before(place: str, act: Callable[[tuple[Any, ...]], None]) -> None:
    """Do something before every call of a function; one that does not exist (any more) is left out."""
    holder, name = _owner(place)
    original = getattr(holder, name, None)
    if original is None:
        return

    def patched(*args: Any, **kwargs: Any) -> Any:
        act(args)
        return original(*args, **kwargs)

    setattr(holder, name, patched)


class Arranged:
    """What is arranged for one child: a count of calls by place, and signals at one of them."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.counts: Counter[str] = Counter()
        self.point, self.call = request.get("point"), request.get("call", 0)
        self.signals: list[int] = request.get("signals", [])
        for point, places in POINTS.items():
            for place in places:
                _before(place, lambda _, point=point: self._at(point))

    def _at(self, point: str) -> None:
        self.counts[point] += 1
        if point == self.point and self.counts[point] == self.call:
            for each in self.signals:
                os.kill(os.getpid(), each)


class Refused:
    """Refuses writes below a folder, each of which is one call that could fail on a full or broken disk.

    A site is the kind of call with the line of ``u2a`` that wanted the file. The first call of the site of
    the request is refused, and with ``lasting`` everything after it, as on a full disk.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.folder = str(request["folder"])
        self.site, self.number = request.get("site"), request.get("errno", errno.ENOSPC)
        self.lasting = request.get("lasting", False)
        self.refused = False
        self.seen: list[str] = []
        self._inside = False
        self._files: dict[int, str] = {}
        self._patch()

    def meet(self, what: str, path: object) -> None:
        """Note one write; refuse it when its turn has come."""
        text = self._files.get(path, "") if isinstance(path, int) else str(path)
        if self._inside or not text.startswith(self.folder):
            return
        self._inside = True
        try:
            site = f"{what} in {_caller()}"
        finally:
            self._inside = False
        self.seen.append(site)
        if (site == self.site and not self.refused) or (self.refused and self.lasting):
            self.refused = True
            raise OSError(self.number, os.strerror(self.number), None if what in ("write", "fsync") else text)

    def _patch(self) -> None:
        import safetensors.torch

        real_open, real_os_open, real_fdopen = io.open, os.open, os.fdopen
        serialise = safetensors.torch.serialize_file

        def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.meet("open", path)
            handle = real_os_open(path, flags, *args, **kwargs)
            if isinstance(path, str | os.PathLike):
                self._files[handle] = os.fspath(path)
            return handle

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not any(letter in mode for letter in "wax+"):
                return real_open(file, mode, *args, **kwargs)
            path = self._files.get(file, "") if isinstance(file, int) else file
            if not isinstance(file, int):
                self.meet("open", path)
            return self._guarded(real_open(file, mode, *args, **kwargs), path)

        def fdopen(handle: int, *args: Any, **kwargs: Any) -> Any:
            return self._guarded(real_fdopen(handle, *args, **kwargs), self._files.get(handle, ""))

        def written(tensors: Any, filename: Any, **kwargs: Any) -> None:
            self.meet("tensors", filename)
            serialise(tensors, filename, **kwargs)

        io.open = builtins.open = opened  # type: ignore[assignment]
        os.open, os.fdopen = os_open, fdopen  # type: ignore[assignment]
        for name in ("fsync", "write"):
            _before(f"os:{name}", lambda args, name=name: self.meet(name, args[0]))
        for name in ("replace", "rename"):
            _before(f"os:{name}", lambda args, name=name: self.meet(name, args[1]))
        _before("os:mkdir", lambda args: None if os.path.isdir(args[0]) else self.meet("mkdir", args[0]))
        safetensors.torch.serialize_file = written

    def _guarded(self, file: Any, path: Any) -> Any:
        """A file whose writes are met: its buffer is filled in memory, so the disk refuses at the flush."""
        write = file.write

        def met(data: Any) -> Any:
            self.meet("write", path)
            return write(data)

        try:
            file.write = met
        except AttributeError:  # a raw binary file of C
            return _Binary(file, met)
        return file


class _Binary:
    """A binary file with another ``write``."""

    def __init__(self, file: Any, write: Callable[[Any], Any]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Binary:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _caller() -> str:
    """The line of u2a that wanted a file written, whatever it writes files with."""
    frame = sys._getframe(1)
    while frame is not None:
        package, found, file = frame.f_code.co_filename.rpartition("/src/u2a/")
        if found and file not in WRITERS:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _child(request: dict[str, Any]) -> int:
    """Run one command with what was arranged for it."""
    for stream, path in ((1, request["results"]), (2, request["log"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
    arranged = Arranged(request)
    refused = Refused(request) if "folder" in request else None
    from u2a.cli import main

    clock_s = request.get("clock_s", 0.0)
    if clock_s:
        now, begin = time.time, time.time()
        time.time = lambda: now() + (clock_s if now() - begin > request["clock_after_s"] else 0.0)
    try:
        status = main(request["arguments"])
    finally:
        seen = [] if refused is None else refused.seen
        Path(request["counts"]).write_text(json.dumps({"points": dict(arranged.counts), "writes": seen}))
    return status


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, send the signals that are due by the clock, and wait."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = _child(request)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    due = sorted(request.get("at", []))
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if due and time.monotonic() - start >= due[0][0]:
            os.kill(pid, due.pop(0)[1])
        time.sleep(0.002)
    seconds = {"seconds": time.monotonic() - start, "cpu_s": used.ru_utime + used.ru_stime}
    return {"status": os.waitstatus_to_exitcode(status)} | seconds


def main() -> None:
    """Import once, then answer requests."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    for module in ("u2a.run", "u2a.cli", "u2a.bilevel.unrolled", "peft", "datasets", "u2a.config_file"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the children's collectors need not look at the libraries
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
