"""Rationales from a teacher: a model behind an OpenAI-compatible server looks at each video and gives reasons.

The teacher is told the verdict, and for a match the span, and is asked only for the reasons: nothing of what it says can
change either. A reply that was cut off, is empty, refuses, or holds markup or far too many words is a failure; so is a
question that got no answer. Every answer, failures too, is one line appended to a journal, where it is found again by
the pair, the question's words, `PROMPT_VERSION` and the model: what was answered is never paid for twice, and what failed
is asked again by the next call.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import io
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from vsr1.data.annotation_files import AnnotationError
from vsr1.data.endpoint import Endpoint, Unanswered
from vsr1.data.pairs import Pair
from vsr1.data.rationales import unfit
from vsr1.errors import ConfigError, CorpusError, VideoError, Vsr1Error

PROMPT_VERSION: Final = "1"  # to be raised with every change of the texts below; a test holds the two together
SYSTEM: Final = (
    "You write down why a video is, or is not, what somebody searches for. You get one video as frames with their times in "
    "seconds, one query, and the verdict, which is known to be right. Say in one to three plain sentences what can be seen "
    "that leads to the verdict, as somebody would who has just watched the video and decides for himself. Mention only what "
    "is visible, never the verdict's having been given. Answer with these sentences alone: no heading, list, tag or markup."
)
MATCHED: Final = (
    "Verdict: the video shows this from {start:g} to {end:g} seconds. Tell which visible details agree with the query, and by "
    "what one sees that it begins and that it ends at these times."
)
NOT_MATCHED: Final = (
    "Verdict: the video does not show this. Tell what the query asks for that is missing here, or different, and what is "
    "there instead."
)
_ENOUGH: Final = 20  # answers after which the share of failures says something
_REFUSAL: Final = re.compile(
    r"^\W*(?:i(?:'m| am)(?: very)? sorry|sorry|i (?:can(?:'|no)t|am unable|am not able|won't)|as an ai)\b",
    re.IGNORECASE,
)
_HEADING: Final = re.compile(r"^\W*(?:reasoning|rationale|reasons?)\W*:\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Teacher:
    """Whom to ask and how.

    endpoint and model; requests: questions at a time; frames: at most so many of a video, at 1 fps or evenly; edge: their
    longer side in pixels at most; send: "frames" as images with their times, or the whole file as a "video".
    temperature and max_tokens of the reply (what a model thinks first counts); extra: fields laid over the request, None
    takes one out. failures: the share of failures above which asking ends. prices: dollars a million tokens, read and
    written.
    """

    endpoint: Endpoint
    model: str
    requests: int = 8
    frames: int = 32
    edge: int = 448
    send: Literal["frames", "video"] = "frames"
    temperature: float = 0.4
    max_tokens: int = 4096
    extra: Mapping[str, Any] = field(default_factory=dict)
    failures: float = 0.1
    prices: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name, least in (("requests", 1), ("frames", 1), ("edge", 16), ("max_tokens", 1), ("temperature", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"the teacher's {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.failures <= 1:
            raise ConfigError(f"the teacher's share of failures must be from 0 to 1, got {self.failures}")


@dataclass(frozen=True)
class Rationale:
    """A line of the journal: what was asked about which pair, of whom, and the text or the error that came back."""

    pair_id: str
    asked: str
    prompt_version: str
    model: str
    text: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.pair_id, self.asked, self.prompt_version, self.model


class TeacherError(Vsr1Error):
    """Too many failures to go on."""


@dataclass(frozen=True)
class Explained:
    """The answers by pair id; how many of them were asked for now, and what that took."""

    answers: Mapping[str, Rationale]
    asked: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float

    @property
    def failures(self) -> list[Rationale]:
        """Answers without a text."""
        return [one for one in self.answers.values() if one.text is None]

    def __str__(self) -> str:
        paid = f", ${self.dollars:.2f}" if self.dollars else ""
        return (
            f"{self.asked} asked now, {len(self.failures)} failed; {self.prompt_tokens:,} tokens read and "
            f"{self.completion_tokens:,} written now{paid}"
        )


class Journal:
    """The answers in a file of JSON lines, the last one of a key counting. To be used as a context manager; one at a time.

    Raises:
        AnnotationError: a line other than the last is damaged, or another process has the journal open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.answers: dict[tuple[str, ...], Rationale] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            self._read(self._file.read())
        except BlockingIOError as error:
            self._file.close()
            raise AnnotationError(f"'{self.path}' is being written by another process: wait until it ends") from error
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self, content: bytes) -> None:
        *lines, torn = content.split(b"\n")
        if torn:  # a kill left it without its end
            self._file.truncate(len(content) - len(torn))
        for number, line in enumerate(lines, 1):
            try:
                answer = Rationale(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise AnnotationError(f"'{self.path}', line {number}: no answer of a teacher ({error})") from error
            self.answers[answer.key] = answer

    def add(self, answer: Rationale) -> None:
        """Append an answer; from any thread."""
        line = json.dumps(asdict(answer), ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            self.answers[answer.key] = answer


def explain(
    pairs: Sequence[Pair],
    teacher: Teacher,
    journal: Journal,
    place: Callable[[str], Path],
    progress: Callable[[int, int, str], None] | None = None,
) -> Explained:
    """Ask for the rationale of each pair that the journal has none for; `place` says where a video lies.

    `progress` is told (pairs done, pairs in all, what it took so far). Whatever ends it, all answers that came are in the
    journal.

    Raises:
        TeacherError: a larger share failed than the teacher may.
        EndpointError: the server will answer nothing: its address, the model or the key is wrong.
    """
    known = {pair.pair_id: found for pair in pairs if (found := journal.answers.get(_key(pair, teacher)))}
    missing = [pair for pair in pairs if pair.pair_id not in known or known[pair.pair_id].text is None]
    stopping = threading.Event()

    def wait(seconds: float) -> None:
        if stopping.wait(seconds):
            raise Unanswered("asking was ended")

    def ask(pair: Pair) -> Rationale:
        answer = _ask(pair, teacher, place, wait)
        journal.add(answer)
        return answer

    answers, done = list[Rationale](), len(pairs) - len(missing)
    pool = ThreadPoolExecutor(teacher.requests, thread_name_prefix="vsr1-teacher")
    try:
        for future in as_completed([pool.submit(ask, pair) for pair in missing]):
            answers.append(future.result())
            _check(answers, teacher, _ENOUGH, journal.path)
            if progress is not None:
                progress(done + len(answers), len(pairs), str(_explained(answers, answers, teacher)))
    finally:
        stopping.set()
        pool.shutdown(cancel_futures=True)
    _check(answers, teacher, 1, journal.path)
    return _explained([*known.values(), *answers], answers, teacher)


def _explained(answers: Sequence[Rationale], new: Sequence[Rationale], teacher: Teacher) -> Explained:
    read, written = (sum(getattr(one, name) for one in new) for name in ("prompt_tokens", "completion_tokens"))
    dollars = (read * teacher.prices[0] + written * teacher.prices[1]) / 1e6
    return Explained({one.pair_id: one for one in answers}, len(new), read, written, dollars)


def _check(answers: Sequence[Rationale], teacher: Teacher, enough: int, journal: Path) -> None:
    failed = [one for one in answers if one.text is None]
    if len(answers) >= enough and len(failed) > teacher.failures * len(answers):
        (reason, count), *_ = Counter(one.error for one in failed).most_common(1)
        raise TeacherError(
            f"teacher '{teacher.model}' failed on {len(failed)} of {len(answers)} pairs, more than {teacher.failures:.0%}; "
            f"{count} times: {reason}; all answers are in '{journal}', and the same command asks for the failed ones again"
        )


def question(pair: Pair) -> tuple[str, str]:
    """What the teacher reads before and behind the video."""
    moment = pair.moment
    verdict = MATCHED.format_map(vars(moment)) if pair.matched else NOT_MATCHED
    return f'Query: "{moment.text}"\nVideo:', verdict


def _key(pair: Pair, teacher: Teacher) -> tuple[str, str, str, str]:
    asked = hashlib.sha256("\n".join(question(pair)).encode()).hexdigest()[:16]
    return pair.pair_id, asked, PROMPT_VERSION, teacher.model


def _ask(pair: Pair, teacher: Teacher, place: Callable[[str], Path], wait: Callable[[float], object]) -> Rationale:
    """The answer for one pair, or why there is none."""
    key, finish, read, written = _key(pair, teacher), None, 0, 0
    try:
        said = teacher.endpoint.chat(_request(pair, teacher, place(pair.shown)), wait)
        usage = said.get("usage")
        if isinstance(usage, dict):
            read, written = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        finish, text = _read_choice(said)
        if (reason := _useless(finish, text)) is not None:
            raise Unanswered(reason)
    except (Unanswered, VideoError, CorpusError) as error:
        return Rationale(*key, None, str(error), finish, read, written)
    return Rationale(*key, text, None, finish, read, written)


def _request(pair: Pair, teacher: Teacher, path: Path) -> dict[str, Any]:
    before, behind = question(pair)
    shown = _frames(path, teacher) if teacher.send == "frames" else [_whole(path)]
    content = [{"type": "text", "text": before}, *shown, {"type": "text", "text": behind}]
    request = {
        "model": teacher.model,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
        "temperature": teacher.temperature,
        "max_tokens": teacher.max_tokens,
        "seed": 42,
        **teacher.extra,
    }
    return {name: value for name, value in request.items() if value is not None}


def _frames(path: Path, teacher: Teacher) -> list[dict[str, Any]]:
    """Frames as JPEG, each behind its time."""
    from PIL import Image

    from vsr1.video import decode

    frames = decode(path, fps=1.0, max_frames=teacher.frames)
    parts: list[dict[str, Any]] = []
    for pixels, second in zip(frames.pixels.numpy(), frames.seconds.tolist(), strict=True):
        picture = Image.fromarray(pixels)
        picture.thumbnail((teacher.edge, teacher.edge))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        parts.append({"type": "text", "text": f"{second:.1f} s:"})
        parts.append({"type": "image_url", "image_url": {"url": _inline("image/jpeg", buffer.getvalue())}})
    return parts


def _whole(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VideoError(path, error.strerror or str(error)) from error
    return {"type": "video_url", "video_url": {"url": _inline("video/mp4", content)}}


def _inline(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _read_choice(said: Mapping[str, Any]) -> tuple[str | None, str]:
    """Why the first choice ended, and its text without what a model thought first."""
    try:
        choice = said["choices"][0]
        message = choice["message"]
        finish, refusal, text = choice.get("finish_reason"), message.get("refusal"), message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unanswered(f"the answer holds no choice with a message ({error!r})") from error
    if refusal:
        raise Unanswered(f"refused: {refusal}")
    thought, closed, spoken = str(text or "").rpartition("</think>")
    spoken = spoken if closed else thought + spoken
    return finish, " ".join(_HEADING.sub("", spoken).split())


def _useless(finish: str | None, text: str) -> str | None:
    """Why the text is no rationale, or None."""
    if finish not in ("stop", None):
        return f"the reply ended by '{finish}'"
    if _REFUSAL.match(text):
        return f"refused: {text[:100]}"
    return (reason := unfit(text)) and f"the reply cannot be used: {reason}"
