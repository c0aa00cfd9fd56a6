"""The policy's words from a vLLM server: the same questions, asked over the server's HTTP API (docs/vllm.md starts one).

**What is equal.** A request carries the very token ids that `agent.protocol` writes, time stamps included, and for each
frame pair the vision tower's output that `Question.video` holds (`agent.vllm_wire`); the server tokenises nothing, decodes no
file and runs no tower. A reply is its token ids, the closing `<REFINE>` or turn-closing token kept. Log-probabilities are
those the server drew with: under the temperature, and where `top_p` is below 1 or the reply is constrained, of what these
left over. `matched` is brought back to temperature 1.

**What is not.** vLLM's kernels round otherwise than ours, so log-probabilities agree to the precision of the server's dtype,
and a greedy reply may part from ours where two tokens are nearly level. Its random numbers are its own: a seed repeats a
reply on the same server, not one of `agent.generate`. Hidden states do not travel: soft tokens are always made by our own
engine, from the text that came back.

One request asks one question for as many replies as have neighbouring seeds: with `n` replies, vLLM gives reply i the seed
`seed + i`. Greedy replies to one question are one reply. With a deadline the reply is streamed, and what has come by then
counts.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vsr1.agent import protocol, vllm_wire
from vsr1.agent.constraint import reply_pattern
from vsr1.agent.speech import Question, Sampling, Spoken, answer_ids, answer_token
from vsr1.agent.vllm_http import Server
from vsr1.errors import Vsr1Error
from vsr1.models.backbone import Row
from vsr1.models.checkpoints import save_plain
from vsr1.models.policy import Policy

_GENERATE = "/inference/v1/generate"
_SCALE_OUT = "start the server with --enable-scale-out"
_DEVELOPMENT = "start the server with VLLM_SERVER_DEV_MODE=1 in its environment"
_NO_LOGP = -9999.0  # what the server writes for a probability of 0
_SEEDS = 1 << 48  # so that `seed + i` stays within the server's 64 bits


@dataclass
class _Reply:
    """One reply as it comes in: ids, log-probabilities, those of the ids asked for at each position, and how it ended."""

    token_ids: list[int] = field(default_factory=list)
    token_logps: list[float] = field(default_factory=list)
    others: list[dict[int, float]] = field(default_factory=list)
    ended: str | None = None


@dataclass(frozen=True)
class _Request:
    """One request: its prompt, the first of its neighbouring seeds, its grammar, and which replies it answers."""

    row: Row
    seed: int
    pattern: str | None
    replies: tuple[int, ...]


class VllmSpeaker:
    """A `Speaker` that asks a vLLM server.

    url: where `vllm serve` listens. model: the served model's name; None takes the server's first. timeout: seconds of
    silence after which a request is given up. weights: a folder that this process and the server both see, through which
    `sync` passes weights. requests: how many are under way at once. key: the server's --api-key. pause: seconds before a
    request is tried again, doubled each time.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        timeout: float = 600.0,
        *,
        weights: str | os.PathLike[str] | None = None,
        requests: int = 16,
        key: str | None = None,
        pause: float = 0.5,
    ) -> None:
        self.server = Server(url.rstrip("/"), timeout, pause=pause, key=key)
        self.model = model
        self.weights = None if weights is None else Path(weights)
        self.requests = requests
        self.version: str | None = None  # the server's, once it has been checked
        self._numbers = itertools.count()
        self._written: Path | None = None

    def check(self) -> str:
        """Ask the server for its models, its version and how it counts log-probabilities; returns the version.

        Only the first call asks. Vsr1Error if it cannot be reached, serves another model, or reports other
        log-probabilities than those it draws with.
        """
        if self.version is not None:
            return self.version
        said = self.server.get("/v1/models")
        with self._reading(said):
            served = [str(one["id"]) for one in said["data"]]
        model = self.model or next(iter(served), None)
        if model not in served:
            raise Vsr1Error(
                f"vLLM at {self.server.url} serves {', '.join(served) or 'nothing'}, not '{model}': start it with that model, "
                "name it with --served-model-name, or ask for what it serves"
            )
        self.model = model
        said = self.server.get("/version")
        with self._reading(said):
            version = str(said["version"])
        # where the one allowed token is not certain, the server counts before it leaves out, and before the temperature
        probe = {"temperature": 1.0, "max_tokens": 1, "logprobs": 1, "allowed_token_ids": [1], "detokenize": False}
        said = self.server.post(
            _GENERATE, {"model": model, "token_ids": [1], "sampling_params": probe}, hint=_SCALE_OUT
        )
        with self._reading(said):
            logp = float(said["choices"][0]["logprobs"]["content"][0]["logprob"])
        if logp != 0:
            raise Vsr1Error(
                f"vLLM at {self.server.url} reports log-probabilities before temperature and constraints (or logits): "
                "start it with --logprobs-mode processed_logprobs"
            )
        self.version = version
        return version

    def speak(
        self,
        policy: Policy,
        questions: Sequence[Question],
        owner: Sequence[int],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[Spoken]:
        """One reply per entry of `owner`, in that order; see `speech.Speaker`. Vsr1Error where the server fails."""
        self.check()
        requests = self._requests(policy, questions, owner, sampling, seeds)
        pool = ThreadPoolExecutor(max(1, min(self.requests, len(requests))), thread_name_prefix="vsr1-vllm")
        try:
            answers = [pool.submit(self._ask, policy, request, sampling, deadline) for request in requests]
            found: dict[int, Spoken] = {}
            for request, answer in zip(requests, answers, strict=True):
                said = [self._spoken(policy, reply, sampling) for reply in answer.result()]
                found.update(zip(request.replies, itertools.cycle(said)))
        finally:
            pool.shutdown(cancel_futures=True)
        return [found[index] for index in range(len(owner))]

    def sync(self, policy: Policy) -> None:
        """Write the language model's weights once, in the shared folder, and let the server load them in place.

        Requests of others wait while it loads. The vision tower stays behind: its output travels with every question.
        Vsr1Error without a shared folder, or where the server fails; then its weights are not to be trusted.
        """
        if self.weights is None:
            raise Vsr1Error(
                f"no folder to pass weights to vLLM at {self.server.url}: give VllmSpeaker `weights`, a folder that both see"
            )
        self.check()
        written = self._write(policy, self.weights)
        self.server.post("/pause?mode=wait", hint=_DEVELOPMENT)
        try:
            load = {"method": "reload_weights", "kwargs": {"weights_path": str(written)}}
            self.server.post("/collective_rpc", load, hint=_DEVELOPMENT)
            said = self.server.post("/reset_prefix_cache", hint=_DEVELOPMENT)
            with self._reading(said):
                emptied = said["success"]
        finally:
            self.server.post("/resume", hint=_DEVELOPMENT)
        if not emptied:
            raise Vsr1Error(
                f"vLLM at {self.server.url} has loaded the weights but keeps its prefix cache, made with the old ones: is "
                "another client using it?"
            )
        if self._written is not None:
            shutil.rmtree(self._written)
        self._written = written

    def _write(self, policy: Policy, folder: Path) -> Path:
        """A new folder below `folder` with what vLLM knows of the policy; it appears there whole or not at all."""
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in policy.model.state_dict().items()
            if not name.startswith("model.visual.")
        }
        # a matrix that is the embeddings is written again: vLLM may hold it apart, packed, and reloads what it finds only
        head = tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
        tied = policy.model.config.tie_word_embeddings
        if tied and not torch.equal(head, tensors["model.language_model.embed_tokens.weight"]):
            raise Vsr1Error(
                "the policy's output matrix has left its embeddings, but its configuration says they are one"
            )
        written = folder.absolute() / f"weights-{os.getpid()}-{next(self._numbers)}"
        partial = written.with_suffix(".partial")
        partial.mkdir(parents=True)
        save_file(tensors, partial / "model.safetensors")
        partial.rename(written)
        return written

    def _requests(
        self,
        policy: Policy,
        questions: Sequence[Question],
        owner: Sequence[int],
        sampling: Sampling,
        seeds: Sequence[int] | None,
    ) -> list[_Request]:
        """What to ask: per question, replies whose seeds follow one another together; greedy, all of them."""
        if seeds is None:
            seeds = range(sampling.seed, sampling.seed + len(owner))
        if len(seeds) != len(owner):
            raise ValueError(f"{len(owner)} replies are wanted with {len(seeds)} seeds: give one a reply")
        wanted: dict[int, list[tuple[int, int]]] = {}
        for index, (asked, seed) in enumerate(zip(owner, seeds, strict=True)):
            wanted.setdefault(asked, []).append((0 if sampling.temperature == 0 else seed % _SEEDS, index))
        requests = []
        for number, pairs in wanted.items():
            question = questions[number]
            row = protocol.prompt(policy.tokenizer, question.query, question.video, system=policy.settings.system)
            pattern = reply_pattern(question.video.duration) if sampling.constrained else None
            # neighbouring seeds keep their distance from a count, equal ones (greedy) are one
            runs = itertools.groupby(
                enumerate(sorted(pairs)), lambda item: item[1][0] - (item[0] if sampling.temperature else 0)
            )
            for _, run in runs:
                members = [pair for _, pair in run]
                requests.append(_Request(row, members[0][0], pattern, tuple(index for _, index in members)))
        return requests

    def _ask(self, policy: Policy, request: _Request, sampling: Sampling, deadline: float | None) -> list[_Reply]:
        """Send one request; its replies in the order of its seeds."""
        greedy = sampling.temperature == 0
        replies = [_Reply() for _ in range(1 if greedy else len(request.replies))]
        if deadline is not None and time.monotonic() >= deadline:
            return replies
        # some versions report as many ids as were asked for, the spoken one among them: the last may be left out
        reported = [*answer_ids(policy.tokenizer), policy.eos_id]
        settings: dict[str, Any] = {
            "n": len(replies),
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "max_tokens": sampling.max_tokens,
            "seed": request.seed,
            "stop_token_ids": [policy.refine_id, policy.eos_id],
            "ignore_eos": True,  # of the checkpoint's own list: only ours end a reply
            "logprobs": len(reported),
            "logprob_token_ids": reported,
            "detokenize": False,
        }
        if request.pattern is not None:
            settings["structured_outputs"] = {"regex": request.pattern}
        body = {
            "model": self.model,
            "token_ids": list(request.row.token_ids),
            "features": vllm_wire.features(
                request.row,
                placeholder=policy.model.config.video_token_id,
                merge=policy.videos.visual.config.spatial_merge_size,
            ),
            "sampling_params": settings,
            "stream": deadline is not None,
        }
        parts: Iterable[Any]
        if deadline is None:
            parts = [self.server.post(_GENERATE, body, hint=_SCALE_OUT)]
        else:
            parts = self.server.events(_GENERATE, body, deadline)
        for part in parts:
            with self._reading(part):
                self._add(replies, part["choices"])
        if deadline is None and any(reply.ended is None for reply in replies):
            raise Vsr1Error(f"vLLM at {self.server.url} gave fewer than the {len(replies)} replies it was asked for")
        return replies

    def _add(self, replies: Sequence[_Reply], choices: Sequence[dict[str, Any]]) -> None:
        """Take what an answer, or a streamed part of one, adds to the replies."""
        for choice in choices:
            reply = replies[choice["index"]]
            content = choice["logprobs"]["content"] if choice["token_ids"] else []
            if [one["token_id"] for one in content] != choice["token_ids"]:
                raise ValueError("its log-probabilities are of other tokens than it spoke")
            reply.token_ids += choice["token_ids"]
            reply.token_logps += [float(one["logprob"]) for one in content]
            reply.others += [
                {int(top["token_id"]): float(top["logprob"]) for top in one["top_logprobs"]} for one in content
            ]
            reply.ended = choice["finish_reason"]
            if reply.ended not in (None, "stop", "length"):
                raise ValueError(f"a reply ended with '{reply.ended}'")

    def _spoken(self, policy: Policy, reply: _Reply, sampling: Sampling) -> Spoken:
        matched = None
        answer = answer_token(policy.tokenizer, reply.token_ids)
        if answer is not None:
            logps = reply.others[answer.position]
            both = [logps.get(answer.matched, _NO_LOGP), logps.get(answer.not_matched, _NO_LOGP)]
            if min(both) > _NO_LOGP:
                matched = (both[0] - both[1]) * (sampling.temperature or 1.0)
        token_logps = torch.tensor(reply.token_logps, dtype=torch.float32)
        return Spoken(tuple(reply.token_ids), token_logps, matched, reply.ended == "stop")

    @contextmanager
    def _reading(self, said: Any) -> Iterator[None]:
        """Around the reading of what the server said: Vsr1Error if it has another form than expected."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError) as other:
            raise Vsr1Error(
                f"vLLM at {self.server.url} answers in an unknown form ({other!r}) with {str(said)[:200]}: docs/vllm.md names "
                "the versions that are known"
            ) from other


def export(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Write the folder that `vllm serve` starts from: model, tokenizer, and what vLLM wants to know of images.

    `Policy.save_pretrained` writes the same, and the refine head beside it.
    """
    save_plain(policy.model, policy.tokenizer, policy.videos.settings, Path(path))
