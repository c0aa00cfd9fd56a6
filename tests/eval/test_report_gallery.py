"""The gallery: what kind a query is of, which are shown, their frames and their time lines."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.eval.made_up_run import Page, trajectory, turn
from vsr1.eval import gallery, stills
from vsr1.eval.gallery import KINDS, kind_of, time_line
from vsr1.video import encode

Json = dict[str, Any]
RIGHT, OTHER = "video-0", "video-1"
HIT = turn(RIGHT, 1, "matched", (4.0, 8.0))
MISS = turn(OTHER, 3, "not_matched")
BY_KIND = {
    "failed": trajectory(0, "a", [], "failed"),
    "rejected": trajectory(0, "b", [turn(RIGHT, 1, "not_matched"), turn(OTHER, 1, "matched", (0.0, 1.0))], "matched"),
    "false-accept": trajectory(0, "c", [MISS, turn(OTHER, 2, "matched", (4.0, 8.0))], "matched"),
    "unparsable": trajectory(0, "d", [MISS, turn(RIGHT, 1, None)], "turns"),
    "moment": trajectory(0, "e", [turn(RIGHT, 1, "matched", (7.0, 12.0))], "matched"),
    "never": trajectory(0, "f", [MISS, turn(OTHER, 3, None)], "turns"),
    "near": trajectory(0, "g", [turn(RIGHT, 1, "matched", (2.0, 6.0))], "matched"),
    "later": trajectory(0, "h", [MISS, HIT], "matched"),
    "at-once": trajectory(0, "i", [HIT], "matched"),
}


def missing(video_id: str) -> Path:
    raise KeyError(video_id)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind: str) -> None:
    assert kind_of(BY_KIND[kind]) == kind


def test_an_accept_without_a_span_is_a_wrong_moment() -> None:
    assert kind_of(trajectory(0, "a", [turn(RIGHT, 1, "matched")], "matched")) == "moment"


def test_failures_come_first_and_can_be_chosen() -> None:
    records = [one for one in reversed(BY_KIND.values()) for _ in range(6)]
    text = gallery.gallery(records, missing)
    shown = re.findall(r'<article class="is-([a-z-]+)">', text)
    assert shown == [kind for kind, known in KINDS.items() for _ in range(known.places)]
    assert re.findall(r'<label for="kind-([a-z-]+)"[^>]*>[^<]*<b>(\d+)', text) == [
        ("all", "54"),
        *((k, "6") for k in KINDS),
    ]
    style = gallery.filters()
    for kind in KINDS:
        assert f"#kind-{kind}:checked~.cards>:not(.is-{kind}){{display:none}}" in style
    assert "kind-all" not in style
    found = Page(text)
    assert "54 queries of the last stage" in found.text
    assert "wrong video accepted 6, unparsable 6" in re.sub(r'.*aria-label="([^"]*)".*', r"\1", text)


def test_queries_without_a_truth_are_not_judged() -> None:
    record = BY_KIND["never"] | {"video_id": None}
    assert gallery.gallery([record], missing) == ""
    assert gallery.gallery([], missing) == ""


def test_a_card_tells_ranks_answer_probability_and_tokens() -> None:
    found = Page(gallery.gallery([BY_KIND["later"]], missing))
    assert "its rank by turn, and under the last query: 3 → 1 → 1" in found.text.replace(" ; ", "; ")
    assert "IoU 1.00" in found.text
    assert "✓ rejected score 0.640 right video at rank 3 P(matched) 0.08 soft tokens 8" in found.text
    assert "✓ accepted score 0.680 right video at rank 1 P(matched) 0.93" in found.text
    assert "video &#x27;" not in found.text
    assert found.text.count("it is not among the videos of this run") == 2


def test_an_answer_fallen_back_on_is_told() -> None:
    record = BY_KIND["never"] | {"fallback": {"video_id": RIGHT, "start": 1.0, "end": 2.5}}
    said = Page(gallery.gallery([record], missing)).text
    assert "Nothing was accepted; the answer fallen back on: video-0 , 1.0 to 2.5 s (the right video)." in said


def test_a_video_that_cannot_be_decoded_is_said_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "video-0.mp4").write_bytes(b"not a video")
    found = Page(gallery.gallery([BY_KIND["later"]], lambda video_id: tmp_path / f"{video_id}.mp4"))
    assert found.counts[".broken"] == 2
    assert "video-0.mp4':" in found.text
    assert "img" not in found.counts
    assert found.counts[".line"] == 1  # the annotation still says how long the right video is


def images(html: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]


def times(html: str) -> list[str]:
    return re.findall(r"<figcaption>([^<]*)</figcaption>", html)


def test_frames_lie_around_the_spans_and_are_marked(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", np.zeros((40, 64, 64, 3), np.uint8), 2.0)
    strip = stills.Stills(lambda video_id: path).strip("a", (6.0, 10.0), (8.0, 10.0), 20.0)
    seconds = [float(one.removesuffix(" s")) for one in times(strip.html)]
    assert list(strip.seconds) == seconds
    assert len(seconds) == stills.FRAMES
    assert 4.5 <= min(seconds) < 6.0
    assert 10.0 < max(seconds) <= 11.5
    marks = [re.findall(r'<i class="([a-z]+)">', one) for one in strip.html.split("</figure>")[:-1]]
    expected = [["true"] * (6 <= second <= 10) + ["said"] * (8 <= second <= 10) for second in seconds]
    assert marks == expected
    assert strip.duration == pytest.approx(20.0)


def test_without_a_span_frames_are_spread_over_the_video(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", np.zeros((24, 64, 64, 3), np.uint8), 2.0)
    strip = stills.Stills(lambda video_id: path).strip("a", None, None)
    assert times(strip.html) == ["0.0 s", "2.0 s", "4.0 s", "6.0 s", "8.0 s", "10.0 s"]


def test_a_span_past_the_end_shows_each_frame_once(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", np.zeros((4, 64, 64, 3), np.uint8), 1.0)
    strip = stills.Stills(lambda video_id: path).strip("a", None, (3.0, 30.0))
    assert times(strip.html) == ["0.0 s", "3.0 s"] or times(strip.html) == ["3.0 s"]


@pytest.mark.parametrize(("height", "size"), [(64, (128, 64)), (480, (320, 160))])
def test_frames_are_neither_tiny_nor_huge(tmp_path: Path, height: int, size: tuple[int, int]) -> None:
    path = encode(tmp_path / "a.mp4", np.zeros((2, height, 2 * height, 3), np.uint8), 1.0)
    strip = stills.Stills(lambda video_id: path).strip("a", None, None)
    assert {image.size for image in images(strip.html)} == {size}
    assert ('class="small"' in strip.html) == (height == 64)


def frame_array(folder: Path, meta: Json | None) -> Path:
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.full((1, 32, 32, 3), 20, np.uint8)
    np.save(folder / "a.npy", frames)
    if meta is not None:
        (folder / "meta.jsonl").write_text("torn\n" + json.dumps({"video_id": "a", **meta}) + "\n")
    return folder / "a.npy"


def test_frame_arrays_have_the_times_of_their_meta(tmp_path: Path) -> None:
    clock = [3.0 * place for place in range(9)]  # the tenth frame is there twice
    path = frame_array(tmp_path, {"sampled_timestamps_sec": clock, "source_duration_sec": 26.0})
    strip = stills.Stills(lambda video_id: path).strip("a", (12.0, 18.0), None)
    assert strip.seconds == (9.0, 12.0, 15.0, 18.0) or strip.seconds == (12.0, 15.0, 18.0)
    assert strip.duration == 26.0
    shades = [np.asarray(image).mean() for image in images(strip.html)]
    assert shades == pytest.approx([20 * second / 3 for second in strip.seconds], abs=3)


def test_frame_arrays_without_times_are_shown_without_times(tmp_path: Path) -> None:
    path = frame_array(tmp_path, None)
    pictures = stills.Stills(lambda video_id: path)
    strip = pictures.strip("a", None, (2.0, 3.0))
    assert times(strip.html) == [""] * stills.FRAMES
    assert (strip.seconds, strip.duration) == ((), None)
    known = pictures.strip("a", None, None, duration=18.0)  # both ends are among the frames: one every two seconds
    assert known.seconds == (0.0, 4.0, 8.0, 10.0, 14.0, 18.0) or len(known.seconds) == stills.FRAMES


@pytest.mark.parametrize("broken", ["text", "shape", "pickle", "none"])
def test_broken_frame_arrays_say_so(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "a.npy"
    if broken == "text":
        path.write_bytes(b"not an array")
    elif broken == "shape":
        np.save(path, np.zeros((3, 4), np.float32))
    elif broken == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    strip = stills.Stills(lambda video_id: path).strip("a", None, None)
    assert 'class="broken"' in strip.html
    assert "a.npy&#x27;: " in strip.html


def test_frames_stop_at_the_pages_budget(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", np.zeros((12, 64, 64, 3), np.uint8), 1.0)
    whole = len(stills.Stills(lambda video_id: path).strip("a", None, None).html)
    pictures = stills.Stills(lambda video_id: path, budget=int(1.5 * whole))
    first, second = (pictures.strip("a", None, None) for _ in range(2))
    assert (len(images(first.html)), len(images(second.html))) == (stills.FRAMES, 0)
    assert "Frames left out" in second.html
    assert second.duration == first.duration


def test_a_time_line_is_drawn_to_scale() -> None:
    drawn = ElementTree.fromstring(time_line((3.0, 6.0), (9.0, 20.0), 12.0, [6.0]))
    boxes = [(box.get("class"), box.get("x"), box.get("width")) for box in drawn.iter("rect")]
    assert boxes == [("true", "25.00%", "25.00%"), ("said", "75.00%", "25.00%")]
    assert [dot.get("cx") for dot in drawn.iter("circle")] == ["50.00%"]
    assert [one.text for one in drawn.iter("text")] == ["0 s", "2 s", "4 s", "6 s", "8 s", "10 s", "12 s"]
    assert drawn.findtext("title") == "true span: 3.0 to 6.0 s; span given: 9.0 to 20.0 s, of 12.0 s"


@pytest.mark.parametrize("duration", [0.7, 12.0, 64.0, 180.0, 5400.0])
def test_marks_of_a_time_line_do_not_crowd(duration: float) -> None:
    marks = list(ElementTree.fromstring(time_line((0.0, 0.1), None, duration)).iter("text"))
    assert 4 <= len(marks) <= 9


@pytest.mark.parametrize("duration", [None, 0.0, float("nan")])
def test_without_a_length_there_is_no_time_line(duration: float | None) -> None:
    assert time_line((0.0, 1.0), None, duration) == ""
    assert time_line(None, None, 12.0) == ""


def test_spans_of_which_a_half_is_missing_are_none() -> None:
    assert stills.complete(1, 2.5) == (1.0, 2.5)
    assert stills.complete(None, 2.0) is None
    assert stills.complete(1.0, float("nan")) is None
