"""Where nothing is as usual: no network, no home, no cache, the C locale, paths with spaces and letters beyond ASCII.

These are the small tests of it; ``make test-environment`` runs the whole suite there.
"""

from __future__ import annotations

import ast
import json
import os
import pwd
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import offline
from hostile_environment import INSIDE, NAME, hostile_environment
from tiny import save_tiny
from u2a.errors import ModelError
from u2a.packaged import cache_dir, resolve_model

pytestmark = pytest.mark.skipif(INSIDE in os.environ, reason="the whole suite already runs in such an environment")
SOURCE = Path(__file__).resolve().parents[2] / "src" / "u2a"
COMMAND = [sys.executable, "-m", "u2a.cli"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a configuration whose names all hold spaces and other letters."""
    folder = tmp_path_factory.mktemp("u2a") / NAME
    save_tiny(folder / "ein modèl")
    pairs = [{"prompt": f"Q{k}: thé?", "chosen": f"oui {k}", "rejected": f"non {k} ✗"} for k in range(60)]
    retain = [{"prompt": f"R{k}?", "completion": f"ça va {k}"} for k in range(15)]
    for name, rows in (("päirs.jsonl", pairs), ("rétain.jsonl", retain)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    tree = {
        "output_dir": "rün ✓/one",
        "model": {"name_or_path": "ein modèl", "device": "cpu", "adapter": {"r": 4, "alpha": 8}},
        "data": {"pairs": "päirs.jsonl", "retain": "rétain.jsonl", "system_prompt": "Réponds."},
        "reward": {"model": "none", "eval_model": "none"},
        "solve": {"adjoint": "identity", "folds": 2, "rounds": 1, "warmup_steps": 1},
        "unlearn": {"max_steps": 2, "batch_size": 4},
        "evaluation": {"generate_prompts": 2, "max_new_tokens": 4, "bootstrap": 100, "samples_shown": 1},
    }
    (folder / "cönfig file.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def variables(place: Path) -> dict[str, str]:
    return hostile_environment(place / "environment")


def u2a(words: list[str], place: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *words], cwd=place, env=variables, capture_output=True, timeout=280, check=False)


MODES = [pytest.param(None, id="C locale"), pytest.param("0", id="C locale, PYTHONUTF8=0")]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_where_nothing_is_as_usual(mode: str | None, place: Path, variables: dict[str, str]) -> None:
    more = {} if mode is None else {"PYTHONUTF8": mode}
    run = f"rün ✓/{mode}"
    done = u2a(["run", "cönfig file.yaml", "--set", f"output_dir={run}"], place, variables | more)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    printed = done.stdout.decode("utf-8")
    assert f"Report: {run}/report.html" in printed
    assert "thé" in (place / run / "partition.json").read_text(encoding="utf-8")
    assert yaml.safe_load((place / run / "run.yaml").read_text(encoding="utf-8"))["output_dir"] == run
    assert (place / run / "adapter" / "adapter_model.safetensors").exists()
    assert (place / "environment" / "a file").is_file(), "nothing was put in the place of the cache"


def test_both_runs_chose_the_same(place: Path) -> None:
    first, second = (place / f"rün ✓/{mode}/solution.json" for mode in (None, "0"))
    weights = [json.loads(path.read_text(encoding="utf-8"))["data"]["rows"] for path in (first, second)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("encoding", [None, "ascii:strict"])
def test_everything_can_be_printed(encoding: str | None, place: Path, variables: dict[str, str]) -> None:
    more = {"PYTHONUTF8": "0"} if encoding is None else {"PYTHONIOENCODING": encoding}
    for words in (["data", "show", "päirs.jsonl"], ["config", "--print"], ["metrics"]):
        done = u2a(words, place, variables | more)
        assert done.returncode == 0 and not done.stderr, (words, done.stderr)
        if words[0] == "data":
            assert ("\\xe9" if encoding else "thé") in done.stdout.decode("utf-8")


def test_a_bad_file_is_one_clear_error_there_too(place: Path, variables: dict[str, str]) -> None:
    (place / "fàulty.jsonl").write_text('{"prompt": "é"}\n', encoding="utf-8")
    words = ["partition", "cönfig file.yaml", "--set", f"data.pairs={place}/fàulty.jsonl", "--quiet"]
    done = u2a(words, place, variables | {"PYTHONUTF8": "0"})
    lines = done.stderr.decode("utf-8").splitlines()
    assert done.returncode == 2
    assert lines and all(line.removeprefix("u2a partition: ").startswith(f"{place}/fàulty.jsonl:1: ") for line in lines)


def test_the_environment_is_as_hostile_as_it_says(place: Path, variables: dict[str, str]) -> None:
    """Otherwise the tests above would prove nothing."""
    code = """
import os, pathlib, socket, sys, tempfile
assert sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode
try: socket.create_connection(("192.0.2.1", 80), 1)
except OSError as error: assert "blocked" in str(error), error
else: raise SystemExit("connected")
try: pathlib.Path.home()
except RuntimeError: pass
else: raise SystemExit("there is a home")
try: os.makedirs(os.environ["HF_HOME"])
except OSError: pass
else: raise SystemExit("there is a cache")
assert os.fsencode(tempfile.gettempdir()).endswith("temporary ü".encode())
"""
    (place / "look.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, place / "look.py"], env=variables | {"PYTHONUTF8": "0"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_a_home_the_cache_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "U2A_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelError, match="no home directory .* U2A_CACHE"):
        cache_dir()
    assert resolve_model(str(tmp_path)) == str(tmp_path), "only packaged models need it"
    monkeypatch.setenv("U2A_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


# --- the guard against the network, which holds in every test -----------------------------------------------


@pytest.fixture
def attempts() -> Iterator[list[str]]:
    """The attempts of one test, taken back at its end."""
    yield offline.ATTEMPTS
    offline.ATTEMPTS.clear()


def test_another_machine_is_not_reached_and_the_attempt_is_noted(attempts: list[str]) -> None:
    with pytest.raises(OSError, match="blocked"):
        urllib.request.urlopen("http://192.0.2.1/", timeout=1)
    with pytest.raises(OSError, match="blocked"):
        socket.getaddrinfo("example.com", 80)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, pytest.raises(OSError, match="blocked"):
        one.sendto(b"?", ("192.0.2.2", 53))
    with socket.socket() as one, pytest.raises(OSError, match="blocked"):
        one.connect_ex(("192.0.2.3", 80))
    assert attempts == ["192.0.2.1", "example.com", "192.0.2.2", "192.0.2.3"]


def test_this_machine_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), 5).close()
    assert offline.ATTEMPTS == []
    here = [offline.is_here(host) for host in (None, "", "localhost", "127.0.0.1", "127.9.9.9", "::1", b"127.0.0.1")]
    assert all(here)
    assert not any(offline.is_here(host) for host in ("10.0.0.1", "example.com", "0.0.0.0.example", "::2"))


# --- text is UTF-8 whatever the locale says ------------------------------------------------------------------


def locale_text(tree: ast.AST) -> list[int]:
    """Lines of calls that read or write text in the locale's encoding."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        of_os = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in ("os", "_OPENER")
        values = [*node.args, *named.values()]
        binary = any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in values[:2])
        text = name in ("read_text", "write_text", "fdopen") or (name == "open" and not of_os)
        text |= name in ("TemporaryFile", "NamedTemporaryFile") and "mode" in named
        text |= any(isinstance(named.get(key), ast.Constant) for key in ("text", "universal_newlines"))
        positional = (name == "read_text" and node.args) or (name == "write_text" and len(node.args) > 1)
        if text and not binary and "encoding" not in named and not positional:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_source_names_the_encoding_of_every_text(path: Path) -> None:
    assert locale_text(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_checker_sees_what_it_should() -> None:
    bad = ["open(p)", "open(p, 'w')", "p.open()", "p.read_text()", "p.write_text(t)", "os.fdopen(1, 'w')"]
    bad += ["subprocess.run(c, text=True)", "io.open(p, mode='a')", "NamedTemporaryFile(mode='w')"]
    good = ["open(p, 'rb')", "p.open('wb')", "p.read_text('utf-8')", "open(p, encoding='utf-8')", "os.open(p, 1)"]
    good += ["os.fdopen(1, 'w', encoding='utf-8')", "p.write_text(t, encoding='utf-8')", "subprocess.run(c)"]
    assert [text for text in bad if locale_text(ast.parse(text)) != [1]] == []
    assert [text for text in good if locale_text(ast.parse(text))] == []


def test_children_get_the_variables_of_their_parent(variables: dict[str, str]) -> None:
    """The home is absent, not empty, and no setting of Python's encodings hides a fault."""
    assert not {"HOME", "PYTHONUTF8", "PYTHONIOENCODING", "LANG", "XDG_CACHE_HOME"} & set(variables)
    assert all(Path(variables[name]).is_relative_to(Path(variables["TMPDIR"]).parent) for name in ("HF_HOME",))
    assert os.path.basename(variables["TMPDIR"]) == "temporary ü"
