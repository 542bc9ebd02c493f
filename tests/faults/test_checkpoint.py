"""Fault F2: a save killed between any two file-system calls leaves the old folder or the new one, never a mix."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tiny import tiny_model, tiny_policy
from u2a import disk
from u2a.checkpoint import MANIFEST, delete, is_whole, newest_whole, numbered, prune, save_folder, verify
from u2a.errors import ConfigError, RecordError, WriteError
from u2a.record import write_whole
from u2a.tensor_tree import flatten, read_tree, unflatten, write_tree

Work = Callable[[Path], object]
CALLS = ("make", "write", "sync", "rename", "remove")


class Killed(BaseException):
    """Stands for a process that is gone: from here on no call reaches the disk."""


@contextmanager
def killed_at(call: int | None) -> Iterator[list[str]]:
    """Let ``call`` file-system calls happen and refuse all that follow, those of a cleaning-up handler too."""
    made: list[str] = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_die(*args: Any) -> Any:
            if call is not None and len(made) >= call:
                raise Killed
            made.append(name)
            return original(*args)

        return call_or_die

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(disk, name, watched(name, getattr(disk, name)))
        yield made


def content(value: int) -> Callable[[Path], None]:
    """A folder of two files and a folder in it, all of which tell the version."""

    def write(folder: Path) -> None:
        disk.make(folder / "deep")
        disk.write(folder / "a.bin", bytes([value]) * 10)
        disk.write(folder / "deep" / "b.bin", bytes([value]) * 1000)

    return write


def version(folder: Path) -> int:
    """The version of a whole folder; a mix fails."""
    verify(folder)
    found = {*(folder / "a.bin").read_bytes(), *(folder / "deep" / "b.bin").read_bytes()}
    assert len(found) == 1, "a mix"
    return found.pop()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def every_kill(
    work: Callable[[Path], object], prepare: Callable[[Path], object], tmp: Path
) -> Iterator[tuple[int, Path]]:
    """Run ``work`` killed before its 1st, 2nd, ... call in a fresh folder each, up to the run that is not killed."""
    for call in range(10_000):
        folder = tmp / str(call)
        folder.mkdir()
        prepare(folder)
        try:
            with killed_at(call) as made:
                work(folder)
        except Killed:
            yield call, folder
            continue
        assert call == len(made) >= 4, "the last one was whole"
        yield call, folder
        return


def test_a_replaced_folder_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    """Folders of a fixed name: adapter/, model/, merged/, base/."""
    seen = []
    for _, folder in every_kill(
        lambda each: save_folder(each / "adapter", content(2)),
        lambda each: save_folder(each / "adapter", content(1)),
        tmp_path,
    ):
        disk.recover(folder)
        seen.append(version(folder / "adapter"))
        assert names(folder) == ["adapter"], "nothing is left over after the next start"
    assert set(seen) == {1, 2}
    assert seen == sorted(seen), "once the new one is there, it stays"
    assert len(seen) >= 15


def test_a_first_save_is_whole_or_absent(tmp_path: Path) -> None:
    seen = []
    for _, folder in every_kill(lambda each: save_folder(each / "base", content(1)), lambda each: None, tmp_path):
        disk.recover(folder)
        assert names(folder) in ([], ["base"])
        seen.append(version(folder / "base") if names(folder) else 0)
    assert set(seen) == {0, 1}
    assert seen == sorted(seen)


def test_checkpoints_and_pruning(tmp_path: Path) -> None:
    """The newest whole one is 2 or 3, whatever call the kill came before; 1 is pruned only when 3 is there."""

    def prepare(folder: Path) -> None:
        for number in (1, 2):
            save_folder(folder / f"checkpoint-{number}", content(number))

    def work(folder: Path) -> None:
        save_folder(folder / "checkpoint-3", content(3))
        prune(folder, keep=2)

    seen = []
    for _, folder in every_kill(work, prepare, tmp_path):
        disk.recover(folder)
        newest = newest_whole(folder)
        assert newest is not None
        seen.append(version(newest))
        assert f"checkpoint-{seen[-1]}" == newest.name
        assert set(names(folder)) <= {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
        assert {number: version(path) for number, path in numbered(folder)} == {k: k for k, _ in numbered(folder)}
        assert len(numbered(folder)) >= 2
    assert set(seen) == {2, 3}
    assert names(folder) == ["checkpoint-2", "checkpoint-3"]


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    seen = []
    for _, folder in every_kill(
        lambda each: write_whole(each / "run.yaml", "new"), lambda each: (each / "run.yaml").write_text("old"), tmp_path
    ):
        disk.recover(folder)
        assert names(folder) == ["run.yaml"]
        seen.append((folder / "run.yaml").read_text())
    assert set(seen) == {"old", "new"}
    assert seen == sorted(seen, reverse=True)


def test_a_deletion_leaves_the_whole_folder_or_nothing(tmp_path: Path) -> None:
    seen = []
    for _, folder in every_kill(
        lambda each: delete(each / "a"), lambda each: save_folder(each / "a", content(1)), tmp_path
    ):
        disk.recover(folder)
        seen.append(version(folder / "a") if names(folder) else 0)
    assert seen == [1] + [0] * (len(seen) - 1)


def test_recovery_can_be_killed_too(tmp_path: Path) -> None:
    """A save killed between its two renames, then a recovery killed before each of its calls, then a whole one."""
    with killed_at(None) as made:
        save_folder(tmp_path / "count", content(1))
        first = len(made)
        save_folder(tmp_path / "count", content(2))
    between = [k for k, name in enumerate(made[first:]) if name == "rename"][-1]
    for call in range(30):
        folder = tmp_path / f"r{call}"
        save_folder(folder / "a", content(1))
        with pytest.raises(Killed), killed_at(between):
            save_folder(folder / "a", content(2))
        assert not (folder / "a").exists(), "the kill fell between the two renames"
        try:
            with killed_at(call):
                disk.recover(folder)
            break
        except Killed:
            disk.recover(folder)
        assert (version(folder / "a"), names(folder)) == (1, ["a"])
    assert call >= 5
    assert (version(folder / "a"), names(folder)) == (1, ["a"])


SCRIPT = """
import os, sys
from pathlib import Path
from u2a import disk
from u2a.checkpoint import save_folder
left = [int(sys.argv[2])]
def deadly(original):
    def call(*args):
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        return original(*args)
    return call
for name in ("make", "write", "sync", "rename", "remove"):
    setattr(disk, name, deadly(getattr(disk, name)))
save_folder(Path(sys.argv[1]) / "a", lambda part: (part / "x").write_bytes(b"new"))
"""


def test_a_process_that_really_dies(tmp_path: Path) -> None:
    """``os._exit`` in another process, before calls at the beginning, in the middle and at the end of a save."""
    seen = []
    for call in (0, 8, 10, 100):
        folder = tmp_path / str(call)
        save_folder(folder / "a", lambda part: (part / "x").write_bytes(b"old"))
        words = [sys.executable, "-c", SCRIPT, str(folder), str(call)]
        status = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
        assert status == (0 if call == 100 else 9)
        disk.recover(folder)
        verify(folder / "a")
        assert names(folder) == ["a"]
        seen.append((folder / "a" / "x").read_bytes())
    assert set(seen) == {b"old", b"new"}
    assert seen == sorted(seen, reverse=True)


def test_a_save_that_fails_leaves_the_old_one_and_no_debris(tmp_path: Path) -> None:
    save_folder(tmp_path / "a", content(1))

    def fails(folder: Path) -> None:
        content(2)(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match="No space left on device"):
        save_folder(tmp_path / "a", fails)
    assert (version(tmp_path / "a"), names(tmp_path)) == (1, ["a"])


def test_recovery_touches_nothing_else(tmp_path: Path) -> None:
    """Only the exact pattern counts, and a link that has it is removed without what it leads to."""
    kept = [".a.tmp-123", "a.tmp-" + "0" * 32, ".tmp-" + "0" * 32, ".a.new-" + "0" * 32, ".a.tmp-" + "0" * 32 + ".x"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / (".a.tmp-" + "0" * 32)).write_text("left over")
    (tmp_path / (".b.tmp-" + "1" * 32)).symlink_to(tmp_path / "deep")
    assert len(disk.recover(tmp_path)) == 1
    assert names(tmp_path) == sorted([*kept, "deep"])
    assert len(names(tmp_path / "deep")) == 1
    assert len(disk.recover(tmp_path, deep=True)) == 1
    assert names(tmp_path / "deep") == []


# --- what is not whole is not read ------------------------------------------------------------------

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit": (lambda folder: flip(folder / "deep" / "b.bin"), "is not the file that was saved"),
    "cut": (lambda folder: (folder / "a.bin").write_bytes(b"\1" * 9), "is not the file that was saved"),
    "missing": (lambda folder: (folder / "a.bin").unlink(), "'a.bin' is missing"),
    "added": (lambda folder: (folder / "deep" / "c.bin").write_bytes(b""), "'deep/c.bin' is there besides"),
    "link": (lambda folder: relink(folder / "a.bin"), "is not the file that was saved"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "not saved whole"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"files": {'), "unreadable"),
    "other manifest": (lambda folder: (folder / MANIFEST).write_text('{"files": 1, "x": 2}'), "unreadable"),
    "newer": (lambda folder: (folder / MANIFEST).write_text('{"files": {}, "schema_version": 2}'), "newer than 1"),
    "upwards": (lambda folder: listed(folder, "../x"), "is missing"),
}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def relink(path: Path) -> None:
    other = path.parents[1] / "elsewhere.bin"
    shutil.copy(path, other)
    path.unlink()
    path.symlink_to(other)


def listed(folder: Path, name: str) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    document["files"][name] = document["files"]["a.bin"]
    (folder / MANIFEST).write_text(json.dumps(document))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2):
        save_folder(tmp_path / f"checkpoint-{number}", content(number))
    spoil, message = DAMAGE[kind]
    spoil(tmp_path / "checkpoint-2")
    with pytest.raises(RecordError, match=message):
        verify(tmp_path / "checkpoint-2")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-1"
    assert len(caplog.records) == 1, "one line says why"
    assert not is_whole(tmp_path / "checkpoint-2")
    assert is_whole(tmp_path / "checkpoint-1")


def test_the_adapter_folder_is_plain_peft(tmp_path: Path) -> None:
    """A manifest beside the files does not disturb peft."""
    policy = tiny_policy(lora_b_sd=0.1)
    save_folder(tmp_path / "adapter", lambda part: policy.model.save_pretrained(str(part)))  # type: ignore[operator]
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(loaded(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_foreign_files_are_not_replaced_by_a_users_save(tmp_path: Path) -> None:
    from u2a.checkpoint import refuse_foreign_files

    refuse_foreign_files(tmp_path / "absent")
    refuse_foreign_files(tmp_path)
    save_folder(tmp_path / "a", content(1))
    refuse_foreign_files(tmp_path / "a")
    (tmp_path / "a" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that were not saved there this way"):
        refuse_foreign_files(tmp_path / "a")


# --- nested states ----------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 2**31),
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | TENSORS
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    """Equal in kind, value and every bit; NaN equals NaN, 0.0 is not -0.0, and the order of a dict counts."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        return torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or left.hex() == right.hex()
    return left == right


@given(TREES)
def test_a_nested_state_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    document = json.loads(json.dumps(flatten(tree, tensors), allow_nan=False))
    assert same(unflatten(document, tensors), tree)
    folder = tmp_path_factory.mktemp("tree")
    write_tree(folder, "t", tree)
    assert same(read_tree(folder, "t"), tree)


@pytest.mark.parametrize("make", ["adamw", "amsgrad", "momentum", "sgd"])
def test_an_optimizer_comes_back_and_steps_alike(tmp_path: Path, make: str) -> None:
    """Two optimisers, one of them restored from the files, take the same third step."""

    def new(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if make in ("adamw", "amsgrad"):
            return torch.optim.AdamW(parameters, lr=0.1, amsgrad=make == "amsgrad")
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9 if make == "momentum" else 0.0)

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, scale: float) -> None:
        for parameter in parameters:
            parameter.grad = scale * torch.ones_like(parameter)
        optimizer.step()

    one = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    first = new(one)
    for scale in (1.0, -0.5):
        step(one, first, scale)
    write_tree(tmp_path, "o", first.state_dict())
    two = [torch.nn.Parameter(each.detach().clone()) for each in one]
    second = new(two)
    second.load_state_dict(read_tree(tmp_path, "o"))
    assert same(second.state_dict(), first.state_dict())
    step(one, first, 0.3)
    step(two, second, 0.3)
    assert all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


@pytest.mark.parametrize("bad", [object(), {1.5: 0}, {(1,): 0}, [b"x"], {"a": {1, 2}}, 1j])
def test_what_json_cannot_hold_is_refused(bad: Any) -> None:
    with pytest.raises(RecordError, match="cannot save"):
        flatten(bad, {})


@pytest.mark.parametrize(
    "document", [[1], {"tensor": "absent"}, {"dict": [[1]]}, {"float": "1.0"}, {"code": "x"}, {"list": 1}, {}]
)
def test_foreign_documents_are_refused(tmp_path: Path, document: Any) -> None:
    with pytest.raises(RecordError):
        unflatten(document, {})
    save_file({"x": torch.zeros(1)}, tmp_path / "t.safetensors")
    (tmp_path / "t.json").write_text(json.dumps(document))
    with pytest.raises(RecordError, match="run again what writes it"):
        read_tree(tmp_path, "t")
    assert list(load_file(tmp_path / "t.safetensors")) == ["x"]
