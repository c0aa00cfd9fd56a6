"""JSON over HTTP to a vLLM server: one connection a request, errors that name the server, the status and the way out.

Only what passes by itself is tried again, with growing pauses: a refused or broken connection, 429 and 503. A server that
does not answer in time, that refuses a request or that answers with something unreadable is an error at once.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vsr1.errors import Vsr1Error

_PASSING = (429, 503)
_CLOSED = (403, 404)  # what a server answers for endpoints that it was not told to open


def _message(body: bytes) -> str:
    """What a server's error answer says, in whichever of vLLM's and FastAPI's forms it says it."""
    try:
        said = json.loads(body)
    except ValueError:
        return body[:300].decode(errors="replace")
    if isinstance(said, dict):
        inner = said.get("error", said.get("detail", said))
        said = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(said)[:600]


@dataclass(frozen=True)
class Server:
    """A server's address and how patient to be with it.

    timeout: seconds without a byte after which an answer is given up. tries: how often a request is sent at most. pause:
    seconds before the second try, doubled before each later one. key: what the server was given as --api-key.
    """

    url: str
    timeout: float = 600.0
    tries: int = 5
    pause: float = 0.5
    key: str | None = None

    def get(self, path: str) -> Any:
        """The JSON that a GET answers."""
        return self._read("GET", path, None, "")

    def post(self, path: str, body: Any = None, *, hint: str = "") -> Any:
        """The JSON that a POST answers; None where the answer is empty. hint: the way out, should it be closed."""
        return self._read("POST", path, body, hint)

    def events(self, path: str, body: Any, deadline: float) -> Iterator[Any]:
        """The JSON events that a POST answers with, until `deadline` (time.monotonic() seconds), where the request ends."""
        with self._errors(path, deadline), self._asked("POST", path, body, "", deadline) as (answer, line):
            for event in iter(answer.readline, b""):
                if event.startswith(b"data:") and event[5:].strip() != b"[DONE]":
                    yield self._parsed(path, event[5:])
                line.settimeout(self._patience(deadline))

    def _read(self, method: str, path: str, body: Any, hint: str) -> Any:
        with self._errors(path, None), self._asked(method, path, body, hint, None) as (answer, _):
            return self._parsed(path, answer.read())

    def _patience(self, deadline: float | None) -> float:
        left = self.timeout if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(self.timeout, left)

    @contextmanager
    def _errors(self, path: str, deadline: float | None) -> Iterator[None]:
        """What goes wrong in an answer, as our errors; being cut by the deadline is none."""
        try:
            yield
        except TimeoutError as late:
            if deadline is None or time.monotonic() < deadline:
                raise Vsr1Error(
                    f"vLLM at {self.url}{path}: nothing came for {self.timeout:g} s: raise the timeout, ask fewer questions "
                    "at once, or look at the server's log"
                ) from late
        except (OSError, http.client.HTTPException) as broken:
            raise Vsr1Error(
                f"vLLM at {self.url}{path}: the answer broke off ({broken!r}): look at the server's log"
            ) from broken

    def _parsed(self, path: str, body: bytes) -> Any:
        try:
            return json.loads(body) if body.strip() else None
        except ValueError as garbage:
            raise Vsr1Error(
                f"vLLM at {self.url}{path}: the answer is no JSON ({body[:100]!r}): is another program listening there?"
            ) from garbage

    @contextmanager
    def _asked(
        self, method: str, path: str, body: Any, hint: str, deadline: float | None
    ) -> Iterator[tuple[http.client.HTTPResponse, socket.socket]]:
        """Send a request, again where its failure may pass, until an answer with status 200 begins: it and its socket.

        The connection ends with the block: vLLM stops generating for a client that has gone.
        """
        address = urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        trouble = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(min(self.pause * 2 ** (attempt - 1), self._patience(deadline)))
            with closing(kind(address.netloc, timeout=self._patience(deadline))) as connection:
                try:
                    connection.request(method, address.path.rstrip("/") + path, content, headers)
                    line = connection.sock
                    answer = connection.getresponse()
                except TimeoutError:
                    raise
                except (OSError, http.client.HTTPException) as broken:
                    trouble = f"no connection ({broken!r})"
                    continue
                with answer:
                    if answer.status == 200:
                        yield answer, line
                        return
                    trouble = f"status {answer.status}: {_message(answer.read())}"
                    way_out = f": {hint}" if hint and answer.status in _CLOSED else ""
                    if answer.status not in _PASSING:
                        raise Vsr1Error(f"vLLM at {self.url}{path}: {trouble}{way_out}")
        raise Vsr1Error(
            f"vLLM at {self.url}{path}: {trouble}, {self.tries} times: is the server up (`vllm serve`, see docs/vllm.md) and "
            "the address right?"
        )
