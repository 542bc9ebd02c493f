"""Peak memory of scoring: a fresh process per number of candidates, on a small random model.

python bench/memory.py --n 64 --scorer central      prints one JSON object: memory before scoring and its peak
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from scorers import OURS
from subject import Request, build

from u2a.progress import Quiet, peak_rss_bytes

SIZES = (64, 4096)
REQUEST = Request("small", 0, max_tokens=32, token_budget=1024)


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process; where the kernel does not tell, the peak.

    The peak of ``getrusage`` would not do on Linux: a process starts with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_rss_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(n: int, scorer: str, request: Request = REQUEST) -> dict[str, int]:
    """Memory before and the peak after scoring ``n`` candidates; model and rows are there before."""
    subject = build(Request(request.shape, n, request.max_tokens, request.token_budget))
    before = resident_bytes("VmRSS")
    OURS[scorer].derivatives(subject.losses, [subject.u], Quiet())
    return {"n": n, "before_bytes": before, "peak_bytes": resident_bytes("VmHWM")}


def growth(small: dict[str, int], large: dict[str, int]) -> float:
    """How much more memory scoring takes with more candidates, as a fraction of the smaller run's peak."""
    more = (large["peak_bytes"] - large["before_bytes"]) - (small["peak_bytes"] - small["before_bytes"])
    return max(0.0, more / small["peak_bytes"])


def compare(scorer: str, sizes: tuple[int, int] = SIZES) -> dict[str, object]:
    """Peak memory of two fresh processes, and its growth."""
    runs = []
    for n in sizes:
        command = [sys.executable, __file__, "--n", str(n), "--scorer", scorer]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(found.stdout.splitlines()[-1]))
    return {"runs": runs, "growth": growth(runs[0], runs[1])}


def main() -> None:
    """One measurement in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--scorer", choices=sorted(OURS), default="central")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(options.n, options.scorer)))


if __name__ == "__main__":
    main()
