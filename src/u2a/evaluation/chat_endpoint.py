"""Models that reply to messages: over the OpenAI-compatible HTTP interface, from a Python function, or a local model.

The key of an HTTP endpoint is read from the environment for each call. It is never kept in an object, shown in an
error, or written to a file, and no redirect is followed with it.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, Protocol
from urllib.parse import urlsplit

from u2a.errors import ConfigError, U2AError
from u2a.evaluation.decoding import Decoding, Generator
from u2a.types import Message

_NEVER = {401: "the key is not accepted", 403: "access is denied", 404: "there is no such model or path"}
_AGAIN = (408, 409, 425, 429)  # and every 5xx
_MOST_BYTES = 4_000_000


class EndpointError(U2AError):
    """One call failed for good; others may succeed.

    Args:
        reason: what happened, without the texts sent or received.
    """

    exit_status = 1

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


def endpoint_key(variable: str | None) -> str | None:
    """Read the key of an endpoint.

    Args:
        variable: name of the environment variable that holds it; None for a server without keys.

    Returns:
        The key, or None.

    Raises:
        ConfigError: the variable holds none; the key itself is not repeated.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"judge: the environment variable {variable} is empty (put the key there)")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"judge: the environment variable {variable} holds no usable key")
    return key


class ChatEndpoint(Protocol):
    """Anything that replies to messages. It may be called from several threads at once."""

    @property
    def name(self) -> str:
        """What names the model in records and cache keys."""
        ...

    def complete(self, messages: Sequence[Message]) -> str:
        """Reply.

        Args:
            messages: turns, the last one the user's.

        Returns:
            The reply's text; may be empty.

        Raises:
            EndpointError: this call failed for good.
            ConfigError: no call can succeed (key, address or model name).
        """
        ...


@dataclass(frozen=True)
class LocalEndpoint:
    """A Python function as an endpoint.

    Attributes:
        name: what names it.
        function: ``function(messages) -> reply``.
    """

    name: str
    function: Callable[[list[Message]], str]

    def complete(self, messages: Sequence[Message]) -> str:
        """Reply; see :meth:`ChatEndpoint.complete`."""
        return self.function(list(messages))


@dataclass(frozen=True)
class ModelEndpoint:
    """A local model as an endpoint; calls from several threads wait for each other.

    Attributes:
        name: what names the model *and its weights*: cached replies are found by it.
        generator: answers prompts.
        decoding: how; greedy decoding makes verdicts repeatable.
    """

    name: str
    generator: Generator
    decoding: Decoding
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def complete(self, messages: Sequence[Message]) -> str:
        """Reply; see :meth:`ChatEndpoint.complete`."""
        with self._turn:
            answer = self.generator.generate_ids([tuple(messages)], self.decoding)[0]
            return self.generator.text(answer)


@dataclass(frozen=True)
class HttpEndpoint:
    """A server with the OpenAI-compatible path ``/chat/completions``.

    Time-outs, broken connections and the statuses 408, 409, 425, 429 and 5xx are tried again: after ``backoff_s``,
    twice that, and so on, or after what the server's Retry-After says, but never longer than ``longest_wait_s``.

    Attributes:
        url: address up to the version, for example ``https://host/v1``.
        model: the model's name on the server.
        key_env: name of the environment variable that holds the key, or None for a server without keys.
        timeout_s: seconds to wait for the connection and for each part of the reply, > 0.
        attempts: calls at most for one reply, >= 1.
        backoff_s: seconds before the second attempt, >= 0.
        longest_wait_s: seconds between two attempts at most, >= 0.
        sleep: waits; replaced in tests.

    Raises:
        ConfigError: a value is out of range, or the address holds a user name or query.
    """

    url: str
    model: str
    key_env: str | None = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    attempts: int = 5
    backoff_s: float = 1.0
    longest_wait_s: float = 60.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        checks = {
            "url: expected http:// or https:// and a host": parts.scheme in ("http", "https") and parts.hostname,
            "url: it holds a user name, query or fragment (name the key's variable in key_env instead)": not (
                "@" in parts.netloc or parts.query or parts.fragment
            ),
            f"timeout_s: {self.timeout_s} is not a finite number > 0": 0 < self.timeout_s < math.inf,
            f"attempts: {self.attempts} is not at least 1": self.attempts >= 1,
            f"backoff_s: {self.backoff_s} is not a finite number >= 0": 0 <= self.backoff_s < math.inf,
            f"longest_wait_s: {self.longest_wait_s} is not a finite number >= 0": 0 <= self.longest_wait_s < math.inf,
        }
        problems = [f"judge.{problem}" for problem, fine in checks.items() if not fine]
        if problems:
            raise ConfigError(problems)

    @property
    def name(self) -> str:
        """Model and host, and the path where it is not the usual one: a gateway may have a model behind each."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/")
        return f"{self.model}@{parts.netloc}{'' if path in ('', '/v1') else path}"

    def complete(self, messages: Sequence[Message]) -> str:
        """Reply; see :meth:`ChatEndpoint.complete`."""
        body = {"model": self.model, "messages": [message.model_dump() for message in messages], "temperature": 0}
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "u2a"} | self._authorization(),
            method="POST",
        )
        failure = ""
        for attempt in range(1, self.attempts + 1):
            raw, failure, retry_after = self._once(request)
            if raw is not None:
                return self._without_key(_reply_text(raw))
            if attempt < self.attempts:
                wait = self.backoff_s * 2 ** (attempt - 1) if retry_after is None else retry_after
                self.sleep(min(wait, self.longest_wait_s))
        raise EndpointError(f"endpoint: {failure} ({self.attempts} attempts)")

    def _authorization(self) -> dict[str, str]:
        key = endpoint_key(self.key_env)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _without_key(self, reply: str) -> str:
        """A reply is kept on disk: one that repeats the key loses it."""
        key = endpoint_key(self.key_env)
        return reply if key is None else reply.replace(key, "[key]")

    def _once(self, request: urllib.request.Request) -> tuple[bytes | None, str, float | None]:
        """The reply's bytes, or what failed in a way that may pass and the seconds to wait if the server says so."""
        try:
            with _OPENER.open(request, timeout=self.timeout_s) as response:
                return response.read(_MOST_BYTES), "", None
        except urllib.error.HTTPError as error:
            status, wait = error.code, _seconds(error.headers.get("Retry-After"))
            error.close()
            if status in _NEVER:
                raise ConfigError(f"judge: {self.name} replied {status}: {_NEVER[status]}") from None
            if status not in _AGAIN and status < 500:
                raise EndpointError(f"endpoint: status {status}") from None
            return None, f"status {status}", wait
        except TimeoutError:
            return None, "time-out", None
        except (urllib.error.URLError, OSError, HTTPException) as error:
            timed_out = isinstance(getattr(error, "reason", None), TimeoutError)
            return None, "time-out" if timed_out else "no connection", None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Reports a redirect as the failure it is, so that the key goes to no other host."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or a date), or None without a usable one."""
    if retry_after is None:
        return None
    try:
        wait = float(retry_after)
    except ValueError:
        try:
            wait = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, wait) if math.isfinite(wait) else None


def _reply_text(raw: bytes) -> str:
    """Text of a completion: the content, or the refusal that some servers put beside it."""
    try:
        message = json.loads(raw)["choices"][0]["message"]
        text = message.get("content") or message.get("refusal") or ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise EndpointError("endpoint: the reply is no chat completion") from None
    if not isinstance(text, str):
        raise EndpointError("endpoint: the reply is no text")
    return text
