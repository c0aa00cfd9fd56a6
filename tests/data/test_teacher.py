"""The teacher: what it is asked, which replies count, what is asked again, and what the journal survives."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.teacher_stub import Stub, reply, serving, words
from vsr1.data import teacher as teaching
from vsr1.data.annotation_files import AnnotationError
from vsr1.data.endpoint import Endpoint, EndpointError
from vsr1.data.pairs import Pair
from vsr1.data.teacher import Explained, Journal, Teacher, TeacherError, explain
from vsr1.errors import ConfigError
from vsr1.records import Moment
from vsr1.video import encode


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of 64 x 32 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 64, 3), dtype=np.uint8)
    return encode(tmp_path_factory.mktemp("films") / "film.mp4", pixels, fps=4.0)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(Stub()) as server:
        yield server


def some_pairs(count: int) -> list[Pair]:
    """The even ones match."""
    moments = [Moment(f"{n}_fig", f"thing {n} falls", "right", 1.5, 2.25, 3.0) for n in range(count)]
    return [Pair(moment, "wrong" if n % 2 else "right", 0.5, 1) for n, moment in enumerate(moments)]


Ask = Callable[..., Explained]


@pytest.fixture
def ask(stub: Stub, film: Path, tmp_path: Path) -> Ask:
    def ask(pairs: list[Pair], **settings: Any) -> Explained:
        endpoint = Endpoint(stub.url, settings.pop("key", None), timeout=5.0, tries=3, pause=0.001)
        teacher = Teacher(endpoint, **{"model": "wise", "failures": 1.0, **settings})
        with Journal(tmp_path / "journal.jsonl") as journal:
            return explain(pairs, teacher, journal, lambda video_id: film)

    return ask


def test_the_teacher_is_told_the_verdict_and_sees_the_frames_at_their_times(stub: Stub, ask: Ask) -> None:
    right, wrong = some_pairs(2)
    ask([right], key="secret", edge=32, temperature=0.25)
    ask([wrong])
    matched, not_matched = stub.asked
    assert stub.keys == ["Bearer secret", None]
    assert (matched["model"], matched["temperature"], matched["max_tokens"]) == ("wise", 0.25, 4096)
    assert "thing 0 falls" in words(matched) and "from 1.5 to 2.25 seconds" in words(matched)
    assert "does not show" in words(not_matched) and "1.5" not in words(not_matched)
    kinds = [part["type"] for part in matched["messages"][1]["content"]]
    assert kinds == ["text", *["text", "image_url"] * 3, "text"]
    times = [part["text"] for part in matched["messages"][1]["content"][1:-1:2]]
    assert times == ["0.0 s:", "1.0 s:", "2.0 s:"]
    url = matched["messages"][1]["content"][2]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (32, 16)


def test_the_whole_file_can_be_sent_and_fields_laid_over_the_request(stub: Stub, ask: Ask, film: Path) -> None:
    ask(some_pairs(1), send="video", extra={"seed": None, "top_k": 3})
    (body,) = stub.asked
    (part,) = [part for part in body["messages"][1]["content"] if part["type"] == "video_url"]
    assert base64.b64decode(part["video_url"]["url"].removeprefix("data:video/mp4;base64,")) == film.read_bytes()
    assert "seed" not in body and body["top_k"] == 3


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (reply("It\n falls. "), "It falls."),
        (reply("<think>hm</think>\nReasoning: It falls."), "It falls."),
        (reply("**Rationale:** It falls."), "It falls."),
    ],
    ids=["lines", "thoughts", "heading"],
)
def test_a_reply_becomes_one_line_without_thoughts_and_heading(stub: Stub, ask: Ask, said: Any, text: str) -> None:
    stub.answer = lambda body: said
    assert ask(some_pairs(1)).answers["0_fig::right"].text == text


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (reply("It is cut", finish="length"), "ended by 'length'"),
        (reply("It", finish="content_filter"), "ended by 'content_filter'"),
        (reply(""), "it is empty"),
        (reply(None), "it is empty"),
        (reply("<think>still thinking"), "markup '<think>'"),
        (reply("Fine.</think><answer>not_matched</answer>"), "markup '<answer>'"),
        (reply("Fine.<start>0</start>"), "markup '<start>'"),
        (reply("Fine. <REFINE>"), "markup '<REFINE>'"),
        (reply("Fine.<|im_end|>"), "markup '<|im_end|>'"),
        (reply("I'm sorry, but I cannot see it."), "refused: I'm sorry"),
        (reply(None, refusal="no way"), "refused: no way"),
        (reply("word " * 151), "151 words"),
        ((200, {"choices": []}), "no choice"),
        ((200, b"<html>"), "no JSON object"),
        ((400, {"message": "too many images"}), "status 400: too many images"),
    ],
    ids=lambda one: one if isinstance(one, str) else None,
)
def test_what_is_no_rationale_is_a_failure_and_no_text(stub: Stub, ask: Ask, said: Any, reason: str) -> None:
    stub.answer = lambda body: said
    (failure,) = ask(some_pairs(1)).failures
    assert failure.text is None and failure.error is not None and reason in failure.error
    assert len(stub.asked) == 1


@pytest.mark.parametrize("fault", [429, 500, 503, 408, "cut"])
def test_what_may_pass_is_tried_again(stub: Stub, ask: Ask, fault: int | str) -> None:
    stub.faults = [fault, fault]
    assert not ask(some_pairs(1)).failures
    stub.faults = [fault] * 3
    (failure,) = ask(some_pairs(3)[2:]).failures
    assert failure.error is not None and "3 times" in failure.error
    assert len(stub.asked) == 6


@pytest.mark.parametrize("fault", [401, 403, 404])
def test_a_wrong_key_or_model_ends_it_at_once(stub: Stub, ask: Ask, fault: int) -> None:
    stub.faults = [fault] * 100
    with pytest.raises(EndpointError, match=f"status {fault}.*model and key"):
        ask(some_pairs(50), requests=1)
    assert len(stub.asked) < 5


def test_what_was_answered_is_not_asked_again_and_what_failed_is(
    stub: Stub, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = some_pairs(6)
    stub.answer = lambda body: reply("Yes.", "length" if "thing 3" in words(body) else "stop")
    first = ask(pairs, prices=(2.0, 50.0))
    assert (first.asked, first.prompt_tokens, first.completion_tokens) == (6, 600, 60)
    assert first.dollars == pytest.approx(600 * 2e-6 + 60 * 50e-6)
    assert [one.pair_id for one in first.failures] == ["3_fig::wrong"]
    stub.answer = lambda body: reply("Now.")
    again = ask(pairs)
    assert again.asked == 1 and not again.failures
    assert {one.text for one in again.answers.values()} == {"Yes.", "Now."}
    assert ask(pairs).asked == 0
    assert ask(pairs, model="other").asked == 6
    moved = [Pair(Moment("0_fig", "thing 0 falls", "right", 1.0, 2.25, 3.0), "right", 0.5, 1)]
    assert ask(moved).asked == 1  # another span is another question
    monkeypatch.setattr(teaching, "PROMPT_VERSION", "next")
    assert ask(pairs).asked == 6


def test_a_torn_last_line_is_healed_and_asked_again(stub: Stub, ask: Ask, tmp_path: Path) -> None:
    ask(some_pairs(3), requests=1)
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-7])
    assert ask(some_pairs(3), requests=1).asked == 1
    assert journal.read_bytes() == whole
    journal.write_bytes(b"{}\n" + whole)
    with pytest.raises(AnnotationError, match="line 1"):
        ask(some_pairs(3))


def test_a_journal_is_written_by_one_process_at_a_time(ask: Ask, tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl"), pytest.raises(AnnotationError, match="another process"):
        ask(some_pairs(1))


def test_too_many_failures_end_it_early_and_keep_what_was_answered(stub: Stub, ask: Ask, tmp_path: Path) -> None:
    stub.answer = lambda body: reply("No." if "thing 1" in words(body) else "")
    with pytest.raises(TeacherError, match=r"more than 10%.*it is empty"):
        ask(some_pairs(200), failures=0.1, requests=1)
    assert 20 <= len(stub.asked) < 40
    assert ask(some_pairs(20), failures=1.0).asked < 20
    with pytest.raises(TeacherError, match="1 of 1"):  # however few there are
        ask(some_pairs(1), failures=0.5)


def test_a_broken_video_is_a_failure_of_its_pair(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    teacher = Teacher(Endpoint(stub.url), "wise", failures=1.0)
    with Journal(tmp_path / "journal.jsonl") as journal:
        (failure,) = explain(some_pairs(1), teacher, journal, lambda video_id: tmp_path / "broken.mp4").failures
    assert failure.error is not None and "broken.mp4" in failure.error
    assert not stub.asked


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="like http://localhost"):
        Endpoint("localhost:8000")
    for wrong in ({"requests": 0}, {"frames": 0}, {"failures": 2.0}, {"temperature": -1.0}):
        with pytest.raises(ConfigError):
            Teacher(Endpoint("http://localhost/v1"), "wise", **wrong)  # type: ignore[arg-type]


def test_the_prompt_and_its_version_change_together() -> None:
    texts = "\n".join((teaching.SYSTEM, teaching.MATCHED, teaching.NOT_MATCHED))
    assert (teaching.PROMPT_VERSION, hashlib.sha256(texts.encode()).hexdigest()[:8]) == ("1", "217d734b")
