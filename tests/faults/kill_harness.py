"""Kills, stops and starves a whole run at many points, lets it go on, and compares it with one that was left alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.conftest import TOPICS, pair_rows, write_jsonl
from tiny import save_tiny

HOLD = """
import sys
from pathlib import Path
from u2a.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
SERVER = Path(__file__).with_name("fork_server.py")
ASIDE = re.compile(r"\.(tmp|old)-[0-9a-f]{32}$")  # names of saves that are going on
TIMES = {"seconds", "peak_rss_bytes"}  # differ from run to run, wherever they stand


class Server:
    """A process that forks a ``u2a`` per request; see ``fork_server``."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, str(SERVER)], stdin=pipe, stdout=pipe, env=environment)
        self._answer()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Run one command; see ``fork_server`` for what can be arranged."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server ended"
        return json.loads(line)


class Lab:
    """A tiny model, data and a configuration with all stages, and one unbroken run of it to compare with.

    Attributes:
        run: directory of the run.
        seconds: wall seconds of the unbroken run.
        points: calls by place, in the unbroken run.
        sites: places of the source that write files, in the order in which they first did.
        whole: digests of the unbroken run.
    """

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server, self.run = folder, server, folder / "run"
        self._log, self._results, self._counts = (folder / name for name in ("log.txt", "results.txt", "counts.json"))
        self.config = write_files(folder)
        done = self.attempt(folder=str(self.run))
        assert done["status"] == 0, self.said
        self.seconds: float = done["seconds"]
        self.points = self.calls
        self.sites = list(dict.fromkeys(json.loads(self._counts.read_text())["writes"]))
        self.whole = digests(self.run)

    def attempt(self, **request: Any) -> dict[str, Any]:
        """One ``u2a run``, with what is arranged for it; see ``fork_server``."""
        for path in (self._log, self._results, self._counts):
            path.unlink(missing_ok=True)
        arguments = request.pop("arguments", ["run", str(self.config), "--quiet"])
        files = {"log": str(self._log), "results": str(self._results), "counts": str(self._counts)}
        return self.server.ask(arguments=arguments, **files, **request)

    @property
    def said(self) -> str:
        """What the last attempt printed on standard error: with ``--quiet``, errors alone."""
        return self._log.read_text(encoding="utf-8")

    @property
    def results(self) -> str:
        """What the last attempt printed on standard output."""
        return self._results.read_text(encoding="utf-8")

    @property
    def calls(self) -> dict[str, int]:
        """Calls by place of the last attempt, which was not killed."""
        return json.loads(self._counts.read_text())["points"]

    @contextmanager
    def holding(self) -> Iterator[int]:
        """Another process that holds the run's lock, and is killed in the end; yields its id."""
        pipe = subprocess.PIPE
        words = [sys.executable, "-c", HOLD, str(self.run)]
        with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process.pid
            process.kill()

    def fresh(self) -> None:
        """Start over."""
        shutil.rmtree(self.run, ignore_errors=True)

    def differences(self) -> list[str]:
        """Files of the run whose content is not that of the unbroken one."""
        now = digests(self.run)
        return sorted(name for name in self.whole.keys() | now.keys() if self.whole.get(name) != now.get(name))


def write_files(folder: Path) -> Path:
    """Write model, data and configuration; returns the configuration's path."""
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", pair_rows(60))
    retain = [{"prompt": f"R{k}: {TOPICS[k % 10]}?", "completion": f"some {TOPICS[k % 10]}"} for k in range(15)]
    write_jsonl(folder / "retain.jsonl", retain)
    shares = {"finetune": 0.15, "forget": 0.25, "preference": 0.3, "reward": 0.1, "evaluation": 0.2}
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model"), "device": "cpu", "adapter": {"r": 4, "alpha": 8}},
        "data": {"pairs": str(folder / "pairs.jsonl"), "retain": str(folder / "retain.jsonl")},
        "partition": {f"{name}_frac": share for name, share in shares.items()},
        "finetune": {"enabled": True, "epochs": 1, "learning_rate": 0.01},
        "reward": {"model": "implicit", "eval_model": "none"},
        "solve": {
            "adjoint": "implicit", "folds": 2, "rounds": 2, "warmup_steps": 1, "fallback": "none", "cg_steps": 3,
            "curvature_samples": 2, "patience": 3,
        },
        "unlearn": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3, "save_steps": 2},
        "guard": {"every_steps": 2, "ppl_budget_frac": 0.5},
        "evaluation": {
            "generate_prompts": 2, "max_new_tokens": 4, "bootstrap": 100, "samples_shown": 1,
            "controls": ["random_k"],
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def digests(run: Path) -> dict[str, str]:
    """Sha256 of every file of a run, of its content without wall seconds and peak memory.

    The report is left out: it shows those in words.
    """
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_file() and name != "report.html":
            found[name] = hashlib.sha256(_content(path)).hexdigest()
    return found


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.parent.name == "cache":  # lines stand in the order of the work; a killed write may leave half a line
        return _dump(sorted(line for line in raw.decode().splitlines() if _is_json(line)))
    if path.suffix == ".jsonl":
        return _dump([_timeless(json.loads(line)) for line in raw.splitlines()])
    if path.name == "run.yaml":
        tree = yaml.safe_load(raw)
        tree["provenance"]["git"] = None  # of the working copy of u2a, which may change meanwhile
        return _dump(tree)
    if path.suffix == ".json":
        return _dump(_timeless(json.loads(raw)))
    return raw


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return bool(line)


def _timeless(value: Any) -> Any:
    """A JSON value without what depends on the clock."""
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def leftovers(run: Path) -> list[str]:
    """Files that a save begins with, and the lock: a finished run holds none."""
    marks = (".part", "run.lock")
    return [
        str(path.relative_to(run)) for path in run.rglob("*") if path.name.endswith(marks) or ASIDE.search(path.name)
    ]


def plan(lab: Lab, n: int, seed: int) -> list[dict[str, Any]]:
    """Kills: every forced point in turn for half of them, the others uniform over the unbroken run's time."""
    draw = np.random.default_rng(seed)
    points = [name for name in lab.points if lab.points[name]]
    kills: list[dict[str, Any]] = []
    for index in range(n):
        if index % 2 == 0:
            point = points[(index // 2) % len(points)]
            call = int(draw.integers(1, lab.points[point] + 1))
            kills.append({"point": point, "call": call, "signals": [signal.SIGKILL]})
        else:
            kills.append({"at": [[float(draw.uniform(0.0, lab.seconds)), signal.SIGKILL]]})
    return kills


def kill_and_resume(lab: Lab, kills: list[dict[str, Any]]) -> dict[str, Any]:
    """One run that is killed as often as given, then finished; says what came of it."""
    lab.fresh()
    n_killed, unreadable = 0, []
    for kill in kills:
        status = lab.attempt(**kill)["status"]
        n_killed += status == -signal.SIGKILL
        if status not in (0, -signal.SIGKILL):
            unreadable.append(lab.said[-400:])
    status = lab.attempt()["status"]
    if status != 0:
        unreadable.append(lab.said[-400:])
    different = lab.differences() if status == 0 else ["(not finished)"]
    return {"killed": n_killed, "different": different, "unreadable": unreadable, "leftovers": leftovers(lab.run)}


def run_kills(n: int, seed: int = 0, most_per_run: int = 3) -> dict[str, Any]:
    """Kill runs until ``n`` kills have hit, each run one to three times.

    Args:
        n: kills.
        seed: of the points and times.
        most_per_run: kills of one run, at most.

    Returns:
        kills, runs, resumed_identical (kills after which the run ended like the unbroken one), unreadable, leftovers,
        and details of what went wrong.
    """
    with tempfile.TemporaryDirectory(prefix="u2a-kills-") as name, Server() as server:
        return kill_runs(Lab(Path(name), server), n, seed, most_per_run)


def kill_runs(lab: Lab, n: int, seed: int = 0, most_per_run: int = 3) -> dict[str, Any]:
    """See :func:`run_kills`; on a lab that is there already."""
    found: dict[str, Any] = {"kills": 0, "runs": 0, "resumed_identical": 0, "unreadable": 0, "leftovers": 0}
    details: list[dict[str, Any]] = []
    draw = np.random.default_rng([seed, 1])
    planned = iter(plan(lab, 10 * n + 10, seed))
    while found["kills"] < n:
        kills = [next(planned) for _ in range(min(int(draw.integers(1, most_per_run + 1)), n - found["kills"]))]
        result = kill_and_resume(lab, kills)
        found["kills"] += result["killed"]
        found["runs"] += 1
        found["resumed_identical"] += 0 if result["different"] else result["killed"]
        found["unreadable"] += len(result["unreadable"])
        found["leftovers"] += len(result["leftovers"])
        if result["different"] or result["unreadable"] or result["leftovers"]:
            details.append({"plan": kills, **result})
    return found | {"details": details}


if __name__ == "__main__":
    print(json.dumps(run_kills(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0), indent=1))
