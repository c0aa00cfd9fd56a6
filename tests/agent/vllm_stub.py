"""A vLLM server in a thread, as far as the speaker uses one: strict about what it is asked, true about what it answers.

It refuses fields that the API does not have, wrong types and endpoints out of order, and it speaks with a real policy: every
reported log-probability comes from a pass of its own over the prompt and the video tokens that came over the wire.
"""

from __future__ import annotations

import base64
import json
import struct
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.policy import Policy
from vsr1.models.vision import VideoFeatures

BODY = {"model": str, "token_ids": list, "features": dict, "sampling_params": dict, "stream": bool}
SAMPLING = {
    "n": int, "temperature": float, "top_p": float, "max_tokens": int, "seed": int, "stop_token_ids": list,
    "ignore_eos": bool, "logprobs": int, "logprob_token_ids": list, "detokenize": bool, "structured_outputs": dict,
    "allowed_token_ids": list,
}  # fmt: skip
FEATURES = {"mm_hashes", "mm_placeholders", "kwargs_data"}


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def unpack(data: bytes) -> Any:
    """MessagePack, with extension type 3 as bytes."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        assert at <= len(data), "cut short"
        return data[at - count : at]

    def number(layout: str) -> int:
        return struct.unpack(layout, take(struct.calcsize(layout)))[0]

    def ext(length: int) -> bytes:
        assert take(1) == b"\x03"
        return take(length)

    def value() -> Any:
        code = take(1)[0]
        if code < 0x80:
            return code
        if code < 0x90:
            return {value(): value() for _ in range(code & 15)}
        if code < 0xA0:
            return [value() for _ in range(code & 15)]
        if code < 0xC0:
            return take(code & 31).decode()
        sizes = {0: ">B", 1: ">H", 2: ">I", 3: ">Q"}
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if 0xC7 <= code <= 0xC9:
            return ext(number(sizes[code - 0xC7]))
        if 0xCC <= code <= 0xCF:
            return number(sizes[code - 0xCC])
        if 0xD9 <= code <= 0xDB:
            return take(number(sizes[code - 0xD9])).decode()
        assert code in (0xDC, 0xDD), f"code {code:x}"
        return [value() for _ in range(number(sizes[code - 0xDB]))]

    found = value()
    assert at == len(data), "more than one value"
    return found


def tensor(packed: Sequence[Any]) -> Tensor:
    dtype, shape, raw = packed
    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).view(shape)


def typed(given: dict[str, Any], types: dict[str, type], where: str) -> None:
    for name, value in given.items():
        if name not in types:
            raise Refused(400, f"{where}: extra field '{name}'")
        if type(value) is not types[name]:
            raise Refused(400, f"{where}: '{name}' should be a {types[name].__name__}, not {value!r}")


class Stub:
    """Settings and memory of the server: what tests set (faults, script, stall, processed) and what they read (asked, log)."""

    def __init__(self, policy: Policy, model: str = "policy") -> None:
        self.policy, self.model = policy, model
        self.faults: list[
            str
        ] = []  # for the next generate requests: a status, "hang", "garbage", "shape", "few" or "cut"
        self.script: list[int] | None = None  # spoken instead of what is drawn
        self.stall: int | None = None  # streamed tokens after which nothing comes any more
        self.processed = True
        self.asked: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self.log: list[str] = []
        self.paused = self.stale = self.reload_fails = False
        self.end = threading.Event()

    def row(self, body: dict[str, Any]) -> Row:
        """The prompt and the video that came over the wire."""
        features = body.get("features")
        if features is None:
            return Row(tuple(body["token_ids"]))
        if set(features) != FEATURES or any(set(part) != {"image"} for part in features.values()):
            raise Refused(400, f"features: {sorted(features)}")
        frames, grids = [], []
        places, packed = features["mm_placeholders"]["image"], features["kwargs_data"]["image"]
        for place, digest, data in zip(places, features["mm_hashes"]["image"], packed, strict=True):
            if type(digest) is not str or set(place) != {"offset", "length"}:
                raise Refused(400, "features: hashes are strings, placeholders have an offset and a length")
            item = unpack(base64.b64decode(data))
            embeds = tensor(item["image_embeds"]["data"])
            assert item["image_embeds"]["field"] == [
                "flat",
                {"keep_on_cpu": False, "slices": [[0, len(embeds), None]], "dim": 0},
            ]
            assert item["image_grid_thw"]["field"] == ["batched", {"keep_on_cpu": True}]
            grid = tensor(item["image_grid_thw"]["data"]).tolist()
            merge = self.policy.model.config.vision_config.spatial_merge_size
            ids = body["token_ids"][place["offset"] : place["offset"] + place["length"]]
            if (
                set(ids) != {self.policy.model.config.video_token_id}
                or not len(ids) == len(embeds) == grid[1] * grid[2] // merge**2
            ):
                raise Refused(400, "a placeholder is not where its item says")
            frames.append(embeds)
            grids.append((grid[1] // merge, grid[2] // merge))
        width = self.policy.model.config.text_config.hidden_size
        tokens, *levels = torch.cat(frames).split(width, -1)
        deepstack = torch.stack(levels) if levels else tokens.new_empty(0, *tokens.shape)
        return Row(tuple(body["token_ids"]), VideoFeatures(tokens, deepstack, (len(grids), *grids[0]), (), 0.0))

    @torch.no_grad()
    def steps(self, row: Row, wants: dict[str, Any], index: int) -> Iterator[tuple[dict[str, Any], str | None]]:
        """Token by token: the report of it, and how the reply ended, if it did."""
        generator = torch.Generator().manual_seed(wants["seed"] + index) if wants["temperature"] else None
        said: list[int] = []
        while True:
            hidden, _ = backbone.run(self.policy.model.model, [Row((*row.token_ids, *said), row.video)])
            logits = self.policy.logits(hidden[0, -1])
            raw = torch.log_softmax(logits, -1)
            if (allowed := wants.get("allowed_token_ids")) is not None:
                logits = torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(allowed), logits[allowed])
            logp = torch.log_softmax(logits / (wants["temperature"] or 1.0), -1)
            drawn = logp.argmax() if generator is None else torch.multinomial(logp.exp(), 1, generator=generator)
            token = int(drawn) if self.script is None or row.video is None else self.script[len(said)]
            report = logp if self.processed else raw
            others = list(dict.fromkeys([token, *wants.get("logprob_token_ids", [])]))[: max(wants["logprobs"], 1)]
            said.append(token)
            top = [{"token_id": other, "logprob": float(report[other]), "rank": None} for other in others]
            stopped = "stop" if token in wants.get("stop_token_ids", ()) else None
            ended = stopped or ("length" if len(said) == wants["max_tokens"] else None)
            yield {"token_id": token, "logprob": float(report[token]), "rank": 1, "top_logprobs": top}, ended
            if ended:
                return

    def check(self, body: dict[str, Any]) -> dict[str, Any]:
        typed(body, BODY, "body")
        wants = body["sampling_params"]
        typed(wants, SAMPLING, "sampling_params")
        if body["model"] != self.model:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        if self.paused or self.stale:
            raise Refused(
                503 if self.paused else 400, "paused" if self.paused else "the prefix cache is of old weights"
            )
        wants = {"n": 1, "temperature": 1.0, "seed": 0} | wants
        if wants["n"] > 1 and wants["temperature"] == 0:
            raise Refused(400, "n must be 1 when using greedy sampling")
        if (ids := wants.get("logprob_token_ids")) is not None and len(ids) != wants["logprobs"]:
            raise Refused(400, "logprobs must equal len(logprob_token_ids)")
        if "structured_outputs" in wants and set(wants["structured_outputs"]) != {"regex"}:
            raise Refused(400, "structured_outputs")
        return wants

    def control(self, path: str, body: Any) -> Any:
        """The endpoints of development mode."""
        self.log.append(path)
        if path == "/pause?mode=wait":
            self.paused = True
        elif path == "/resume":
            self.paused = False
        elif path == "/reset_prefix_cache":
            self.stale = False
            return {"success": True}
        elif path == "/collective_rpc" and self.paused:
            assert body["method"] == "reload_weights" and list(body["kwargs"]) == ["weights_path"]
            if self.reload_fails:
                raise Refused(500, "no such layer")
            (file,) = Path(body["kwargs"]["weights_path"]).iterdir()
            tensors = load_file(file)
            known = {name for name in self.policy.model.state_dict() if "visual" not in name}
            assert set(tensors) == known
            self.policy.model.load_state_dict(tensors, strict=False)
            self.stale = True
            return {"results": [None]}
        else:
            raise Refused(404, "Not Found")
        return {"status": "ok"}


class Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        known = {"/v1/models": {"data": [{"id": self.stub.model}]}, "/version": {"version": "0.0.stub"}}
        self.reply(200, json.dumps(known[self.path]).encode())

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            body = json.loads(content) if content else None
            if self.path != "/inference/v1/generate":
                self.reply(200, json.dumps(self.stub.control(self.path, body)).encode())
                return
            self.generate(body)
        except Refused as refused:
            self.reply(
                refused.status, json.dumps({"error": {"message": str(refused), "code": refused.status}}).encode()
            )

    def generate(self, body: dict[str, Any]) -> None:
        stub = self.stub
        wants = stub.check(body)
        fault = stub.faults.pop(0) if stub.faults and "features" in body else ""
        if fault == "hang":
            stub.end.wait(5)
        if fault == "garbage":
            return self.reply(200, b"<html>not json")
        if fault.isdigit():
            raise Refused(int(fault), f"fault {fault}")
        row = stub.row(body)
        if "features" in body:
            stub.asked.append(body)
            stub.rows.append(row)
        if body.get("stream"):
            return self.stream(row, wants)
        choices = []
        for index in range(wants["n"]):
            reports, ends = zip(*stub.steps(row, wants, index), strict=True)
            ids = [report["token_id"] for report in reports]
            choices.append(
                {"index": index, "token_ids": ids, "logprobs": {"content": reports}, "finish_reason": ends[-1]}
            )
        answer: dict[str, Any] = {"request_id": "1", "choices": choices[::-1]}
        if fault == "shape":
            del answer["choices"][0]["token_ids"]
        if fault == "few":
            answer["choices"].pop()
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.close_connection = True
            return None
        return self.reply(200, json.dumps(answer).encode())

    def stream(self, row: Row, wants: dict[str, Any]) -> None:
        self.send_response(200)
        self.close_connection = True
        self.end_headers()
        for index in range(wants["n"]):
            for count, (report, ended) in enumerate(self.stub.steps(row, wants, index)):
                if count == self.stub.stall:
                    self.stub.end.wait(5)
                    return
                part = {"token_ids": [report["token_id"]], "logprobs": {"content": [report]}, "finish_reason": ended}
                try:
                    self.wfile.write(f"data: {json.dumps({'choices': [part | {'index': index}]})}\n\n".encode())
                except ConnectionError:
                    return  # the client has gone
        self.wfile.write(b"data: [DONE]\n\n")


def serve(stub: Stub) -> ThreadingHTTPServer:
    """Start it on a free port of this machine; `server_port` of what comes back says which."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"stub": stub}))
    server.daemon_threads = True
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True).start()
    return server
