"""The scoring benchmark on a tiny random model: it runs, says what it should, and its contenders agree."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import memory  # noqa: E402
import scoring  # noqa: E402
from subject import Request, build  # noqa: E402
from timing import Budget, Timings, rounds  # noqa: E402

from u2a.bilevel.attention import second_order_attention  # noqa: E402
from u2a.progress import Console  # noqa: E402

KEYS = {
    "ratio_to_forward",
    "ratio_to_forward_one_sided",
    "ratio_to_forward_backward",
    "ratio_backward_4_directions",
    "ratio_central_4_directions",
    "speedup_vs_per_sample_backward",
    "speedup_vs_released_way",
    "speedup_one_sided_vs_released_way",
    "speedup_one_sided",
    "spearman",
    "rel_error",
    "rivals",
    "peak_rss_growth",
    "hvp_ratio",
    "hvp_ratio_same_kernel",
    "seconds",
    "n",
    "tokens",
    "machine",
    "versions",
    "targets",
}
TINY = ["--shape", "tiny", "--n", "8", "--max-tokens", "24", "--token-budget", "64", "--repeats", "1", "--no-memory"]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a tiny run: the last line printed, which is also in the file asked for."""
    out, printed = tmp_path_factory.mktemp("bench") / "results" / "scoring.json", io.StringIO()
    with redirect_stdout(printed):
        scoring.main([*TINY, "--out", str(out)])
    last = json.loads(printed.getvalue().splitlines()[-1])
    assert last == json.loads(out.read_text())
    return last


def test_the_record_has_every_figure(record: dict[str, Any]) -> None:
    assert KEYS - set(record) == set()
    assert record["n"] == 8 and record["n_batches"] > 1
    assert all(times["min_s"] > 0 for times in record["seconds"].values())
    assert set(record["rivals"]) == {"kronfluence", "dattri", "curvlinops-for-pytorch", "bergson"}


def test_every_scorer_agrees_with_one_backward_per_sample(record: dict[str, Any]) -> None:
    assert set(record["agreement"]) == {"central", "one_sided", "one_sided_known_base", "jvp", "backward"}
    for name, row in record["agreement"].items():
        assert row["spearman"] > 0.99, name
        assert row["rel_error"] < (1e-4 if name in ("jvp", "backward") else 0.05), name
    assert record["difference_4_directions"] < 0.05


def test_the_released_way_computes_the_same_numbers(record: dict[str, Any]) -> None:
    assert record["released_way_rel_error"] < 1e-3
    assert record["seconds"]["released_way"]["median_s"] > 0


def test_a_target_is_met_on_its_own_side_only() -> None:
    assert scoring.Target("x", 2.0, 2.2, at_most=True).record()["met"]
    assert not scoring.Target("x", 2.0, 2.2, at_most=False).record()["met"]
    assert not scoring.Target("x", None, 2.2, at_most=True).record()["met"]


def test_a_rival_that_fails_leaves_its_reason_and_the_others_go_on() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no such kernel\nmore")

    timings, ours = Timings(), {"forward": lambda: torch.zeros(1)}
    rounds(ours, {"rival": broken}, Budget(float("inf"), 3, ("forward",)), timings, Console(quiet=True))
    assert timings.failures == {"rival": "RuntimeError: no such kernel"}
    assert len(timings.seconds["forward"]) == 3 and "rival" not in timings.seconds
    with pytest.raises(RuntimeError):
        rounds({"own": broken}, {}, Budget(float("inf"), 1, ()), timings, Console(quiet=True))


def test_no_further_round_begins_when_time_is_up() -> None:
    timings, ours = Timings(), {"forward": lambda: torch.zeros(1)}
    rounds(ours, {}, Budget(0.0, 3, ("forward",)), timings, Console(quiet=True))
    assert len(timings.seconds["forward"]) == 1


def test_memory_growth_counts_what_scoring_adds() -> None:
    small = {"n": 64, "before_bytes": 100, "peak_bytes": 200}
    large = {"n": 4096, "before_bytes": 150, "peak_bytes": 270}  # 120 instead of 100, of 200
    assert memory.growth(small, large) == pytest.approx(0.1)
    assert memory.growth(large, small) == 0.0


def test_operations_of_a_forward_pass_are_those_torch_counts() -> None:
    subject = build(Request("tiny", 4, max_tokens=16, token_budget=10_000))
    with second_order_attention(subject.policy), FlopCounterMode(display=False) as counter:  # it counts this kernel
        subject.losses.values()
    assert scoring.forward_flops(subject) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_missing_data_end_the_program_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("U2A_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="U2A_DATA"):
        scoring.main(["--no-memory"])
