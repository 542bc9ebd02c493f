"""The key of a judge's endpoint is in no file and no text, whatever the server does with it and the user types."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from u2a.cli import main
from u2a.config import RunConfig
from u2a.early_checks import VERDICTS, check_judge_key
from u2a.errors import ConfigError, U2AError
from u2a.evaluation.arm import ArmResult
from u2a.evaluation.chat_endpoint import HttpEndpoint
from u2a.types import Message

KEY = "sk-sentinel-5e1f0c"
VERDICT = json.dumps({"score": 1, "reason": f"your key is {KEY}"})


class Echo:
    """A server that puts the key into all it says; ``kind`` chooses how it behaves."""

    def __init__(self) -> None:
        self.kind, self.keys, outer = "reply", [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.keys.append(self.headers.get("Authorization"))
                outer.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self.kind == "time-out":
            time.sleep(0.4)
        if self.kind == "no reply":
            return
        if self.kind == "no HTTP":
            handler.wfile.write(f"{KEY}\r\n\r\n".encode())
            return
        content: Any = {"reply": VERDICT, "not JSON": KEY, "a list": [KEY]}.get(self.kind, "")
        raw = json.dumps({"error": KEY, "choices": [{"message": {"content": content}}]}).encode()
        raw = {"no completion": json.dumps({"error": KEY}).encode(), "broken": raw[:-5]}.get(self.kind, raw)
        status = int(self.kind) if self.kind.isdigit() else 200
        try:
            handler.send_response(status, KEY)
            handler.send_header("X-Key", KEY)
            handler.send_header("Location", f"{self.url}/{KEY}")
            handler.send_header("Retry-After", KEY)
            handler.end_headers()
            handler.wfile.write(raw)
        except OSError:
            pass  # the caller has given up


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Echo]:
    monkeypatch.setenv("TOY_KEY", KEY)
    made = Echo()
    yield made
    made.http.shutdown()
    made.http.server_close()


FAILURES = [
    "301", "307", "400", "401", "403", "404", "408", "422", "429", "500", "503",
    "time-out", "no reply", "no HTTP", "no completion", "broken", "a list",
]  # fmt: skip


@pytest.mark.parametrize("kind", FAILURES)
def test_no_error_repeats_the_key(kind: str, server: Echo) -> None:
    server.kind = kind
    wait = 0.1 if kind == "time-out" else 5.0
    chat = HttpEndpoint(server.url, "toy", "TOY_KEY", timeout_s=wait, attempts=2, sleep=lambda _: None)
    with pytest.raises(U2AError) as caught:
        chat.complete([Message(role="user", content="?")])
    assert set(server.keys) == {f"Bearer {KEY}"}, "it was sent, so that its absence means something"
    shown = [str(caught.value), repr(caught.value), *traceback.format_exception(caught.value), repr(chat), chat.name]
    assert not [text for text in shown if KEY in text]


def test_a_reply_that_repeats_the_key_loses_it(server: Echo) -> None:
    chat = HttpEndpoint(server.url, "toy", "TOY_KEY")
    reply = chat.complete([Message(role="user", content="?")])
    assert json.loads(reply) == {"score": 1, "reason": "your key is [key]"}


@pytest.mark.parametrize(("kind", "status"), [("reply", 0), ("400", 0), ("401", 2)])
def test_no_file_of_a_run_and_nothing_printed_holds_the_key(
    kind: str,
    status: int,
    server: Echo,
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("U2A_CACHE", str(tmp_path / "cache"))
    (tmp_path / "asked.jsonl").write_text('{"prompt": "How?"}\n{"prompt": "Why?"}\n', encoding="utf-8")
    server.kind = kind
    judge = {"rubric": "answered", "url": server.url, "model": "toy", "key_variable": "TOY_KEY"}
    options = {"judge": judge, "prompt_sets": [{"name": "asked", "path": "asked.jsonl"}], "controls": []}
    # Answers of a random model are broken in form and would not be sent.
    monkeypatch.setattr("u2a.evaluation.rubric_judge.broken_form", lambda *_: None)
    config = tiny_config(evaluation=options, solve={"rounds": 1}, unlearn={"max_steps": 1})
    assert main(["run", str(config)]) == status
    assert f"Bearer {KEY}" in server.keys
    if status == 0:
        verdicts = ArmResult.load(tmp_path / "run" / "arms" / "after.json").sets["asked"].verdicts.values()
        assert {verdict.state for verdict in verdicts} <= ({"unscored"} if kind == "400" else {"complied", "refused"})
    output = capfd.readouterr()
    assert KEY not in output.out and KEY not in output.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "run" / "run.yaml").exists() and "TOY_KEY" in (tmp_path / "run" / "run.yaml").read_text("utf-8")
    assert [str(path) for path in files if KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    "option", [f"key_variable={KEY}", f"url=http://me:{KEY}@host/v1", f"url=http://host/v1?key={KEY}"]
)
def test_a_key_among_the_options_is_refused_and_not_repeated(
    option: str,
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = set(tmp_path.rglob("*"))
    path = tiny_config()
    assert main(["partition", str(path), "--set", f"evaluation.judge.{option}"]) == 2
    message = capfd.readouterr().err
    assert message.startswith("u2a partition: evaluation.judge: ") and message.count("\n") == 1
    assert KEY not in message
    assert set(tmp_path.rglob("*")) - before == {path}


def test_a_missing_key_is_told_before_a_model_is_loaded(
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("U2A_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOY_KEY", raising=False)
    monkeypatch.setattr("u2a.pipeline.load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "asked.jsonl").write_text('{"prompt": "How?"}\n', encoding="utf-8")
    judge = {"rubric": "answered", "url": "http://host/v1", "model": "toy", "key_variable": "TOY_KEY"}
    options = {"judge": judge, "prompt_sets": [{"name": "asked", "path": "asked.jsonl"}]}
    assert main(["run", str(tiny_config(evaluation=options))]) == 2
    assert "judge: the environment variable TOY_KEY is empty (put the key there)" in capsys.readouterr().err


def test_the_key_is_asked_for_only_where_the_judge_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOY_KEY", raising=False)
    judge = {"rubric": "answered", "url": "http://host/v1", "model": "toy", "key_variable": "TOY_KEY"}
    sets = [{"name": "asked", "path": "asked.jsonl"}]

    def config(**evaluation: Any) -> RunConfig:
        return RunConfig.model_validate({"output_dir": str(tmp_path / "run"), "evaluation": evaluation})

    with pytest.raises(ConfigError, match="TOY_KEY is empty"):
        check_judge_key(config(judge=judge, prompt_sets=sets))
    check_judge_key(config(judge=judge))
    check_judge_key(config(judge=judge | {"key_variable": None}, prompt_sets=sets))
    check_judge_key(config(judge=judge | {"rubric": "refusal"}, prompt_sets=sets))
    (tmp_path / "run" / "cache").mkdir(parents=True)
    (tmp_path / "run" / "cache" / VERDICTS).touch()
    check_judge_key(config(judge=judge, prompt_sets=sets))  # it has replied before
