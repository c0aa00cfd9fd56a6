"""Chat completions of any OpenAI-compatible server: one request, tried again where its failure may pass.

A refused or broken connection, silence, 408, 409, 425, 429 and every 5xx may pass: the request is sent again after a pause
that doubles, is a little random, and is at least what the server's Retry-After says. A wrong address, key or model is
wrong for every request: `EndpointError`. What is wrong with one request only is `Unanswered`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from random import uniform
from typing import Any, Final
from urllib.parse import urlsplit

from vsr1.errors import ConfigError, Vsr1Error

_PASSING: Final = (408, 409, 425, 429)
_FOR_ALL: Final = (401, 403, 404, 405)
LONGEST_PAUSE: Final = 120.0  # seconds; a server that says more is not worth waiting for


class EndpointError(Vsr1Error):
    """A server that no request will get an answer from."""


class Unanswered(Exception):
    """One request that got no answer, and why."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    url: up to and with the version (`http://localhost:8000/v1`). key: sent as a bearer token. timeout: seconds without a
    byte. tries: how often a request is sent at most. pause: seconds before the second try.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    tries: int = 5
    pause: float = 1.0

    def __post_init__(self) -> None:
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise ConfigError(f"the teacher's address must be like http://localhost:8000/v1, got '{self.url}'")

    def chat(self, body: Any, wait: Callable[[float], object]) -> dict[str, Any]:
        """The JSON object that answers a chat completion; `wait` sleeps between two tries, and may raise to end them."""
        content = json.dumps(body).encode()
        trouble = ""
        for attempt in range(self.tries):
            try:
                status, said, after = self._post(content)
            except TimeoutError:
                trouble, after = f"nothing came for {self.timeout:g} s", 0.0
            except (OSError, http.client.HTTPException) as broken:
                trouble, after = f"no connection ({broken!r})", 0.0
            else:
                if status == 200:
                    return self._object(said)
                trouble = f"status {status}: {_message(said)}"
                if status in _FOR_ALL:
                    raise EndpointError(f"teacher at {self.url}: {trouble}: are its address, model and key right?")
                if status not in _PASSING and status < 500:
                    raise Unanswered(trouble)
            if attempt + 1 < self.tries:
                wait(min(max(self.pause * 2**attempt * uniform(1.0, 1.25), after), LONGEST_PAUSE))
        raise Unanswered(f"{trouble}, {self.tries} times")

    def _post(self, content: bytes) -> tuple[int, bytes, float]:
        """Status, body and Retry-After (seconds) of one request."""
        address = urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        with closing(kind(address.netloc, timeout=self.timeout)) as connection:
            connection.request("POST", f"{address.path.rstrip('/')}/chat/completions", content, headers)
            answer = connection.getresponse()
            after = answer.getheader("Retry-After", "")
            return answer.status, answer.read(), float(after) if after.isdecimal() else 0.0

    def _object(self, said: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(said)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Unanswered(f"the answer is no JSON object: {said[:100].decode(errors='replace')}")
        return answer


def _message(said: bytes) -> str:
    """What an error answer says, in whichever form; on one line and short."""
    text = said.decode(errors="replace")
    try:
        inner = json.loads(text)
        while isinstance(inner, dict):
            inner = inner.get("error", inner.get("detail", inner.get("message", str(inner))))
        text = str(inner)
    except ValueError:
        pass  # it said so in plain words
    return " ".join(text.split())[:300]
