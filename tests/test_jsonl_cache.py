"""The file of values by key under every cut, altered bytes, a real kill, and two writers at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from u2a.errors import RecordError
from u2a.jsonl_cache import JsonlCache

FIRST = {"a": {"ids": [1, 2], "end": None}, "b": [0.1, -3e-7, "ü\n\u2028"]}
LAST = {"c": {"text": "the last line"}}

WRITER = """
import sys
from u2a.jsonl_cache import JsonlCache
cache, name, batches = JsonlCache(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(batches):
    cache.put_many({f"{name} {number} {item}": [name, number, "x" * 50 * item] for item in range(20)})
    print(number, flush=True)
"""


def written(path: Path) -> JsonlCache:
    cache = JsonlCache(path)
    cache.put_many(FIRST)
    cache.put_many(LAST)
    return cache


def writer(path: Path, name: str, batches: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(batches)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_values_are_read_back_as_they_were_given(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.jsonl"
    here, again = written(path), JsonlCache(path)
    for cache in (here, again):
        assert {key: cache.get(key) for key in "abcd"} == {**FIRST, **LAST, "d": None}
        assert (cache.n, cache.n_damaged) == (3, 0)
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_batch_makes_no_file(tmp_path: Path) -> None:
    cache = JsonlCache(tmp_path / "cache.jsonl")
    cache.put_many({})
    assert (cache.n, cache.path.exists()) == (0, False)


def test_what_is_in_memory_is_what_the_file_gives_back(tmp_path: Path) -> None:
    cache = JsonlCache(tmp_path / "cache.jsonl")
    value = {"ids": (1, 2), 3: [4]}
    cache.put_many({"a": value})
    value[3].append(5)  # type: ignore[union-attr]
    assert cache.get("a") == JsonlCache(cache.path).get("a") == {"ids": [1, 2], "3": [4]}


def test_the_last_of_equal_keys_counts(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    first, second = JsonlCache(path), JsonlCache(path)
    first.put_many({"a": 1, "b": 1})
    second.put_many({"a": 2})
    assert [JsonlCache(path).get(key) for key in "ab"] == [2, 1]
    assert first.get("a") == 1  # another writer's lines are seen when the file is opened


def test_a_file_cut_at_any_byte_of_the_last_line_keeps_the_rest_and_takes_more(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    written(path)
    raw = path.read_bytes()
    start = raw.rindex(b"\n", 0, len(raw) - 1) + 1
    for cut in range(start, len(raw) + 1):
        path.write_bytes(raw[:cut])
        whole = cut >= len(raw) - 1  # only the line end may be missing
        cache = JsonlCache(path)
        assert [cache.get(key) for key in "ab"] == list(FIRST.values())
        assert cache.get("c") == (LAST["c"] if whole else None)
        assert cache.n_damaged == (0 if whole or cut == start else 1)
        cache.put_many({"d": cut})
        again = JsonlCache(path)
        assert [again.get(key) for key in "abd"] == [*FIRST.values(), cut]
        assert again.get("c") == (LAST["c"] if whole else None)
        assert again.n_damaged == cache.n_damaged


@pytest.mark.parametrize("mask", [1, 2, 16, 255])
def test_no_altered_byte_gives_a_wrong_value(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "cache.jsonl"
    written(path)
    raw = path.read_bytes()
    expected = {**FIRST, **LAST}
    damaged = 0
    for position in range(len(raw)):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ mask]) + raw[position + 1 :])
        cache = JsonlCache(path)
        damaged += cache.n_damaged > 0
        found = {key: cache.get(key) for key in expected}
        assert all(value in (None, expected[key]) for key, value in found.items())
        assert cache.n == sum(value is not None for value in found.values())  # no new key either
        assert cache.n + cache.n_damaged >= 2
    assert damaged > 0.9 * len(raw)


def test_lines_that_are_not_ours_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    path.write_text('\n{"key": 1}\n[1, 2, "x"]\n["a"]\nnull\n12\n\n\xff\n', encoding="latin-1")
    assert (JsonlCache(path).n, JsonlCache(path).n_damaged) == (0, 6)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"x": object()}])
def test_a_value_that_is_not_json_adds_nothing(tmp_path: Path, value: object) -> None:
    cache = JsonlCache(tmp_path / "cache.jsonl")
    with pytest.raises(RecordError, match="the value of 'bad' cannot be kept as JSON"):
        cache.put_many({"good": 1, "bad": value})
    assert (cache.n, cache.path.exists()) == (0, False)


def test_a_killed_writer_loses_nothing_that_it_had_put(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    process = writer(path, "w", 100000)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    done = 4 + len([line for line in process.stdout.read().split("\n") if line])
    process.wait()
    cache = JsonlCache(path)
    for number in range(done + 1):
        assert all(cache.get(f"w {number} {item}") == ["w", number, "x" * 50 * item] for item in range(20))
    assert cache.n_damaged <= 1


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    processes = [writer(path, name, 100) for name in "uv"]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    cache = JsonlCache(path)
    assert (cache.n, cache.n_damaged) == (2 * 100 * 20, 0)
