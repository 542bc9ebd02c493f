"""Scoring of candidates: u' grad l_k for every candidate k, against a forward pass, one backward each, and rivals.

make bench-scoring                                              SmolLM2-135M, SafeRLHF answers, CPU (about 12 minutes)
python bench/scoring.py --rivals .bench-rivals --out FILE       the same with the rivals of `make bench-rivals`
python bench/scoring.py --shape tiny --n 8                      seconds: random weights and tokens
python bench/scoring.py --shape llama-8b --device cuda --dtype bfloat16 --peak-tflops 989

All contenders run in one process on the same rows in the same batches, in interleaved repetitions; figures are
medians. A rival joins in once it has finished the job in a process of its own within a limit (--trial-limit). The truth
is one backward pass per sample. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import memory
import rivals
import torch
from machine import installed, machine, versions
from scorers import curvature, hessian_product, several_directions, works
from subject import SHAPES, Request, Subject, build, gradient
from timing import Budget, Timings, Work, reason, rounds, run_once
from torch import Tensor

from u2a.bilevel.select import spearman
from u2a.progress import Console

CORE = ("forward", "central", "one_sided_known_base", "backward")
SCORERS = ("central", "one_sided_known_base", "one_sided", "jvp", "backward")
EXACT = ("jvp", "backward")
PART = 4  # four directions are timed on one candidate in four
CURVATURE_ROUNDS = 3
SHORT_S = 1.0  # a forward pass shorter than this: all works are run once unmeasured first


@dataclass(frozen=True)
class Target:
    """A claim about one figure.

    Attributes:
        figure: its name.
        value: what was measured; None fails.
        bound: the limit.
        at_most: whether the figure must be at most the limit, else at least.
    """

    figure: str
    value: float | None
    bound: float
    at_most: bool

    def record(self) -> dict[str, Any]:
        """The claim and whether it holds."""
        met = self.value is not None and (self.value <= self.bound if self.at_most else self.value >= self.bound)
        sign = "<=" if self.at_most else ">="
        return {"figure": self.figure, "value": self.value, "target": f"{sign} {self.bound:g}", "met": met}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||."""
    return float((found.cpu().double() - exact).norm() / exact.norm())


def prepared_rivals(
    subject: Subject, timings: Timings, console: Console, options: argparse.Namespace
) -> dict[str, Work]:
    """The work of every rival that is installed and passes its trial; the others leave their reason."""
    found: dict[str, Work] = {}
    for rival in rivals.RIVALS:
        if installed(rival.package) is None:
            continue
        console.say(f"set up {rival.package}")
        failure = trial_failure(rival.package, options)
        if failure is None:
            with rivals.silenced():
                work = rival.prepare(subject)
            found[rival.package] = lambda work=work: run_silenced(work)
        else:
            timings.failures[rival.package] = failure
            console.say(f"  failed: {failure}")
    return found


def trial_failure(package: str, options: argparse.Namespace) -> str | None:
    """Run a rival once in a process of its own, which can be stopped whatever it does; why it failed, or None."""
    names = ("shape", "n", "max_tokens", "token_budget", "device", "dtype", "threads", "rivals")
    given = [f"--{name.replace('_', '-')}={value}" for name in names if (value := getattr(options, name)) is not None]
    command = [sys.executable, __file__, *given, f"--trial={package}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.trial_limit, check=False)
    except subprocess.TimeoutExpired:
        return f"did not finish {options.n} candidates within {options.trial_limit:g} s (building the model included)"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"ended with status {done.returncode}"


def run_trial(options: argparse.Namespace) -> None:
    """Build the subject and run one rival once."""
    rival = next(rival for rival in rivals.RIVALS if rival.package == options.trial)
    subject = build(request(options))
    try:
        with rivals.silenced():
            rival.prepare(subject)()
    except Exception as error:  # whatever a foreign library raises is its result
        sys.exit(reason(error))


def request(options: argparse.Namespace) -> Request:
    """What to build, from the command line."""
    return Request(options.shape, options.n, options.max_tokens, options.token_budget, options.device, options.dtype)


def run_silenced(work: Work) -> Tensor:
    """A rival's work without its bars and logs."""
    with rivals.silenced():
        return work()


def measure_curvature(subject: Subject, timings: Timings, console: Console) -> dict[str, Any]:
    """Hessian-vector products against gradients, and curvlinops' product where it is installed."""
    entries = curvature(subject)
    for number in range(CURVATURE_ROUNDS):
        console.say(f"curvature, round {number + 1}")
        for name, work in entries.items():
            run_once(name, work, timings, console)
    out = {
        "hvp_ratio": timings.median("hvp_product") / timings.median("hvp_gradient"),
        "hvp_ratio_same_kernel": timings.median("hvp_product") / timings.median("hvp_gradient_same_kernel"),
        "hvp_curvlinops": {"status": "not installed"},
    }
    if installed("curvlinops-for-pytorch"):
        out["hvp_curvlinops"] = _curvlinops_hessian(subject, timings, console)
    return out


def _curvlinops_hessian(subject: Subject, timings: Timings, console: Console) -> dict[str, Any]:
    try:
        with rivals.silenced():
            work = rivals.curvlinops_hessian(subject)
        run_once("hvp_curvlinops", lambda: run_silenced(work), timings, console)
    except Exception as error:
        console.say(f"  hvp_curvlinops failed: {reason(error)}")
        return {"status": "failed", "reason": reason(error)}
    ours = torch.cat([value.reshape(-1) for value in hessian_product(subject).values()])
    seconds = timings.median("hvp_curvlinops")
    return {
        "status": "measured",
        "seconds": seconds,
        "ratio_to_ours": seconds / timings.median("hvp_product"),
        "rel_difference": relative_error(timings.results["hvp_curvlinops"], ours.cpu().double()),
    }


def rival_table(timings: Timings, exact: Tensor) -> dict[str, Any]:
    """What came of every rival; a rival that makes the query's gradient itself is compared with ours plus that."""
    best = min(SCORERS, key=timings.median)
    table: dict[str, Any] = {}
    for rival in rivals.RIVALS:
        name, entry = rival.package, {"version": installed(rival.package), "how": rival.how}
        if name in timings.failures:
            entry |= {"status": "failed", "reason": timings.failures[name]}
        elif name not in timings.seconds:
            entry |= {"status": "not installed"}
        else:
            seconds = timings.median(name)
            extra = timings.median("query_gradient") if rival.includes_query_gradient else 0.0
            entry |= {
                "status": "measured",
                "seconds": seconds,
                "includes_query_gradient": rival.includes_query_gradient,
                "ratio_to_central": seconds / (timings.median("central") + extra),
                "ratio_to_best": seconds / (timings.median(best) + extra),
                "spearman": spearman(timings.results[name], exact),
                "rel_error": relative_error(timings.results[name], exact),
            }
        table[name] = entry
    return table


def figures(timings: Timings, exact: Tensor) -> dict[str, Any]:
    """Ratios, speed-ups and agreement of our scorers."""
    forward, per_sample = timings.median("forward"), timings.median("per_sample_backward")
    part = timings.median("part_forward")
    agreement = {
        name: {
            "spearman": spearman(timings.results[name], exact),
            "rel_error": relative_error(timings.results[name], exact),
        }
        for name in SCORERS
    }
    four = timings.results["part_central_4"], timings.results["part_backward_4"]
    return {
        "ratio_to_forward": timings.median("central") / forward,
        "ratio_to_forward_one_sided": timings.median("one_sided_known_base") / forward,
        "ratio_to_forward_one_sided_unknown_base": timings.median("one_sided") / forward,
        "ratio_to_forward_jvp": timings.median("jvp") / forward,
        "ratio_to_forward_backward": timings.median("backward") / forward,
        "ratio_to_forward_per_sample_backward": per_sample / forward,
        "ratio_central_4_directions": timings.median("part_central_4") / part,
        "ratio_backward_4_directions": timings.median("part_backward_4") / part,
        "difference_4_directions": relative_error(four[0], four[1]),
        "speedup_vs_per_sample_backward": per_sample / timings.median("central"),
        "speedup_one_sided": per_sample / timings.median("one_sided_known_base"),
        "ratio_to_forward_released_way": timings.median("released_way") / forward,
        "released_way_rel_error": relative_error(timings.results["released_way"], exact),
        "speedup_vs_released_way": timings.median("released_way") / timings.median("central"),
        "speedup_one_sided_vs_released_way": timings.median("released_way") / timings.median("one_sided_known_base"),
        "speedup_backward": per_sample / timings.median("backward"),
        "best_scorer": min(SCORERS, key=timings.median),
        "spearman": agreement["central"]["spearman"],
        "rel_error": agreement["central"]["rel_error"],
        "agreement": agreement,
    }


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims, with whether each is met."""
    claims = [
        Target("ratio_to_forward", found["ratio_to_forward"], 2.2, True),
        Target("ratio_to_forward_one_sided", found["ratio_to_forward_one_sided"], 1.2, True),
        Target("speedup_vs_per_sample_backward", found["speedup_vs_per_sample_backward"], 2.2, False),
        Target("speedup_one_sided", found["speedup_one_sided"], 4.0, False),
        Target("speedup_vs_released_way", found["speedup_vs_released_way"], 2.2, False),
        Target("speedup_one_sided_vs_released_way", found["speedup_one_sided_vs_released_way"], 4.0, False),
        Target("hvp_ratio", found["hvp_ratio"], 4.0, True),
    ]
    checked = SCORERS if found["dtype"] == "float32" else EXACT  # in 16 bits differences of losses are rounding noise
    for name in checked:
        row = found["agreement"][name]
        claims.append(Target(f"spearman of {name}", row["spearman"], 0.999, False))
        claims.append(Target(f"rel_error of {name}", row["rel_error"], 0.01, True))
    for name, row in found["rivals"].items():
        if row["status"] == "measured":
            figure = f"seconds of {name} / seconds of the same work by central"
            claims.append(Target(figure, row["ratio_to_central"], 1.0, False))
    for name, row in (found["memory"] or {}).items():
        claims.append(Target(f"peak_rss_growth of {name}", row["growth"], 0.05, True))
    return [claim.record() for claim in claims]


def forward_flops(subject: Subject) -> float:
    """Floating-point operations of one forward pass over the candidates, padding included.

    2 per weight of a linear layer and token, 4 T^2 d for attention, the output layer at answer positions only.
    """
    config = cast(Any, subject.policy.model).config
    linear = [module for module in subject.policy.model.modules() if isinstance(module, torch.nn.Linear)]
    head = config.vocab_size * config.hidden_size
    inner = sum(module.weight.numel() for module in linear) - head
    total = 0.0
    for batch in subject.losses.batches():
        rows = [subject.losses.rows[k] for k in batch]
        width, answer = max(len(row.input_ids) for row in rows), max(row.n_answer for row in rows)
        attention = 4 * width * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        total += len(rows) * (width * (2 * inner + attention) + 2 * (answer + 1) * head)
    return total


def shares_of_peak(subject: Subject, timings: Timings, peak_tflops: float | None) -> dict[str, float]:
    """Achieved TFLOP/s of forward and central scorer, and their share of the device's peak where it is given."""
    flops = forward_flops(subject)
    rates = {name: passes * flops / timings.median(name) / 1e12 for name, passes in (("forward", 1), ("central", 2))}
    out = {"forward_flops": flops} | {f"tflops_{name}": rate for name, rate in rates.items()}
    if peak_tflops:
        out |= {f"share_of_peak_{name}": rate / peak_tflops for name, rate in rates.items()}
    return out


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure everything and return the record."""
    until = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"bench": "scoring", "memory": None, "peak_rss_growth": None}
    if options.memory:  # first: the model of the main part is not in memory yet
        console.say("peak memory of scoring, 64 and 4,096 candidates, in fresh processes")
        grown: dict[str, Any] = {name: memory.compare(name) for name in ("central", "backward")}
        found |= {"memory": grown, "peak_rss_growth": max(row["growth"] for row in grown.values())}
    console.say(f"build {options.shape} with {options.n} candidates")
    subject = build(request(options))
    timings = Timings()
    start = time.monotonic()
    known = subject.losses.values()  # warm-up, and the known base
    forward_s = time.monotonic() - start
    console.say(f"{subject.tokens} tokens; a forward pass takes about {forward_s:.1f} s, a round about 40 of them")
    found |= measure_curvature(subject, timings, console)
    entries = works(subject, known) | {"query_gradient": lambda: next(iter(gradient(subject.query).values()))}
    entries |= several_directions(subject, max(1, min(PART, options.n // 4)))
    foreign = prepared_rivals(subject, timings, console, options)
    if forward_s < SHORT_S:
        rounds(entries, foreign, Budget(until, 1, CORE), Timings(), Console(quiet=True))  # first calls are slower
    rounds(entries, foreign, Budget(until, options.repeats, CORE), timings, console)
    exact = timings.results["per_sample_backward"]
    found |= figures(timings, exact)
    found |= {"rivals": rival_table(timings, exact)}
    found |= shares_of_peak(subject, timings, options.peak_tflops)
    found |= {
        "seconds": timings.summary(),
        "shape": options.shape,
        "dtype": options.dtype,
        "n": options.n,
        "n_batches": len(subject.losses.batches()),
        "tokens": subject.tokens,
        "answer_tokens": sum(row.n_answer for row in subject.losses.rows),
        "machine": machine(options.device),
        "versions": versions(),
    }
    return found | {"targets": targets(found)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["smollm2", *SHAPES], default="smollm2", help="model")
    parser.add_argument("--n", type=int, default=96, help="candidates, at least 4 (96)")
    parser.add_argument("--max-tokens", type=int, default=96, help="most tokens of prompt and answer (96)")
    parser.add_argument("--token-budget", type=int, default=1024, help="tokens per forward batch (1024)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen weights")
    parser.add_argument("--minutes", type=float, default=12.0, help="no further repetition begins after this (12)")
    parser.add_argument("--repeats", type=int, default=5, help="most repetitions (5)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (its own default)")
    parser.add_argument("--peak-tflops", type=float, default=None, help="of the device, for the achieved share")
    parser.add_argument("--rivals", default=None, metavar="DIR", help="folder with the rivals' packages")
    parser.add_argument("--trial-limit", type=float, default=90.0, help="seconds a rival's first run may take (90)")
    parser.add_argument("--trial", default=None, metavar="PACKAGE", help="run one rival once and end")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    if options.n < 4:
        parser.error("--n: at least 4 candidates are needed")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark; the last line printed is the record."""
    options, console = parse(arguments), Console()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.rivals:
        rivals.use_folder(options.rivals)
    if options.trial:
        run_trial(options)
        return
    found = run(options, console)
    for claim in found["targets"]:
        value = "none" if claim["value"] is None else f"{claim['value']:.4g}"
        console.say(f"{'met   ' if claim['met'] else 'MISSED'} {claim['figure']}: {value} (target {claim['target']})")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
