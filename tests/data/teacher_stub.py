"""A teacher in a thread: an OpenAI-compatible server that keeps what it was asked and answers as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Said = tuple[int, Any]


def reply(text: str | None, finish: str = "stop", **message: Any) -> Said:
    """A chat completion of 100 tokens read and 10 written."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


def words(body: dict[str, Any]) -> str:
    """All texts of the user's turn."""
    return "\n".join(part["text"] for part in body["messages"][1]["content"] if part["type"] == "text")


@dataclass
class Stub:
    """`answer` makes the reply of a request; `faults` are statuses (or "cut") given first."""

    answer: Callable[[dict[str, Any]], Said] = lambda body: reply("A red thing moves to the left.")
    faults: list[int | str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """The server, for the time of the block; `stub.url` says where."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                stub.asked.append(body)
                stub.keys.append(self.headers.get("Authorization"))
                fault = stub.faults.pop(0) if stub.faults else None
            if fault == "cut":
                return
            status, said = (fault, {"error": {"message": f"fault {fault}"}}) if fault else stub.answer(body)
            if self.path != "/v1/chat/completions":
                status, said = 404, {"detail": "Not Found"}
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(int(status))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
