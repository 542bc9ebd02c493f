"""metrics.jsonl: what a stopped run wrote and what it writes again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2a.metrics_log import MetricsLog

EVENTS = [("round", {"index": k, "J": 0.5 * k}) for k in range(3)]
EVENTS += [(arm, {"step": k, "loss": 1.0 / (k + 1)}) for arm in ("unlearn_u2a", "unlearn_full") for k in range(4)]


def written(path: Path, events: list) -> None:
    log = MetricsLog(path)
    for event, data in events:
        log.add(event, data)


def test_lines_stand_in_the_order_they_came(tmp_path: Path) -> None:
    written(tmp_path / "new" / "metrics.jsonl", EVENTS)
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"event": event, **data} for event, data in EVENTS]


@given(stopped=st.integers(0, len(EVENTS)), back=st.integers(0, 4), cut=st.integers(0, 60))
def test_a_log_that_was_stopped_anywhere_and_goes_on_earlier_is_that_of_an_unbroken_run(
    stopped: int, back: int, cut: int
) -> None:
    """The resumed run repeats the last events, as it does when it was killed before it marked them as done."""
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name, "whole.jsonl"), Path(name, "broken.jsonl")
        written(whole, EVENTS)
        written(broken, EVENTS[:stopped])
        last = EVENTS[stopped] if stopped < len(EVENTS) else ("round", {"index": 9})
        unfinished = json.dumps({"event": last[0], **last[1]})[:cut]
        with broken.open("a") as file:
            file.write(unfinished[:-1])
        written(broken, EVENTS[max(0, stopped - back) :] or EVENTS[-1:])
        assert broken.read_bytes() == whole.read_bytes()


def test_work_done_again_with_other_options_replaces_what_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, EVENTS)
    written(path, [("round", {"index": 0, "J": 9.0})])
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line for line in found if line["event"] == "round"] == [{"event": "round", "index": 0, "J": 9.0}]
    assert sum(line["event"] == "unlearn_u2a" for line in found) == 4


def test_events_without_a_place_are_kept_every_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, [("out_of_memory", {"at_most": 4})] * 2)
    written(path, [("out_of_memory", {"at_most": 2})])
    assert len(path.read_text().splitlines()) == 3


def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        MetricsLog(tmp_path / "metrics.jsonl").add("round", {"index": 0, "J": float("nan")})
    assert list(tmp_path.iterdir()) == []
