"""Every codec and container: the seconds of every frame are PyAV's own presentation times, and the picture is the right one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vsr1.errors import VideoError
from vsr1.video import decode, probe

Write = Callable[..., Path]
Read = Callable[[torch.Tensor], list[int]]
Numbered = Callable[[int], np.ndarray]
EVEN = list(range(0, 2000, 40))
UNEVEN = [0, 40, 80, 320, 360, 1000, 1040, 1520, 1600, 2400, 2440, 5000, 5040]
QUIET = {"x265-params": "log-level=0"}
CASES = {
    "h264 mp4": ("a.mp4", {}),
    "h264 mov": ("a.mov", {}),
    "h264 mkv": ("a.mkv", {}),
    "h264 ts": ("a.ts", {}),
    "h264 flv": ("a.flv", {}),
    "h264 fragments": ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "h264 10 bit": ("a.mp4", {"pixels": "yuv420p10le"}),
    "h264 4:4:4": ("a.mkv", {"pixels": "yuv444p"}),
    "hevc mp4": ("a.mp4", {"codec": "libx265", **QUIET}),
    "hevc 10 bit mkv": ("a.mkv", {"codec": "libx265", "pixels": "yuv420p10le", **QUIET}),
    "vp8 webm": ("a.webm", {"codec": "libvpx", "b": "2M"}),
    "vp9 webm": ("a.webm", {"codec": "libvpx-vp9", "b": "2M"}),
    "vp9 odd size": ("a.webm", {"codec": "libvpx-vp9", "b": "2M", "side": 47}),
    "av1 mp4": ("a.mp4", {"codec": "libsvtav1", "side": 64}),
    "mpeg4 avi": ("a.avi", {"codec": "mpeg4", "b": "2M", "clock": 25}),
    "mpeg2 mpg": ("a.mpg", {"codec": "mpeg2video", "b": "2M", "clock": 25}),
    "mjpeg avi": ("a.avi", {"codec": "mjpeg", "pixels": "yuvj420p", "clock": 25}),
    "mjpeg mov odd size": ("a.mov", {"codec": "mjpeg", "pixels": "yuvj444p", "side": 33}),
    "ProRes mov": ("a.mov", {"codec": "prores_ks", "pixels": "yuv422p10le"}),
    "FFV1 mkv": ("a.mkv", {"codec": "ffv1", "pixels": "yuv444p"}),
    "gif": ("a.gif", {"codec": "gif", "pixels": "gray", "clock": 100}),
}
CONSTANT_ONLY = ("avi", "mpg")  # formats whose clock counts frames


def presented(path: Path) -> list[float]:
    """The presentation times that PyAV gives, in seconds from the first."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        ticks = sorted(frame.pts for frame in container.decode(stream))
        return [float((tick - ticks[0]) * stream.time_base) for tick in ticks]


@pytest.mark.parametrize("timeline", [EVEN, UNEVEN], ids=["constant", "variable"])
@pytest.mark.parametrize("name", CASES)
def test_times_are_those_of_the_file(write_numbered: Write, read_numbers: Read, name: str, timeline: list[int]) -> None:
    file, options = CASES[name]
    if timeline is UNEVEN and file.endswith(CONSTANT_ONLY):
        pytest.skip("this format has no variable rates")
    path = write_numbered(file, timeline, **options)
    times = presented(path)
    assert times == pytest.approx([time / 1000 for time in timeline], abs=1e-3 if file != "a.gif" else 1e-2)
    middles = [(a + b) / 2 for a, b in pairwise(times)]
    for wanted in (times, middles):
        frames = decode(path, times=wanted)
        assert frames.seconds.tolist() == pytest.approx(times[: len(wanted)], abs=1e-3)
        assert read_numbers(frames.pixels) == list(range(len(wanted)))
    info = probe(path)
    assert (info.frames, info.width) == (len(timeline), options.get("side", 32))
    assert info.variable == (timeline is UNEVEN)


def test_a_rounded_clock_is_no_variable_rate(write_numbered: Write) -> None:
    for name in ("a.mkv", "a.mp4", "a.ts"):
        assert not probe(write_numbered(name, [round(1000 * index / 3) for index in range(30)])).variable, name


def test_times_go_on_after_a_minute(write_numbered: Write, read_numbers: Read) -> None:
    path = write_numbered("a.mp4", list(range(0, 300_000, 2000)), g="10")
    frames = decode(path, fps=1, max_frames=64)
    assert frames.duration == pytest.approx(298.04)
    assert frames.seconds.tolist() == pytest.approx([2 * int(index * 298.04 / 64 / 2) for index in range(64)])
    assert read_numbers(frames.pixels) == [int(second) // 2 for second in frames.seconds]
    assert decode(path, times=[65.0, 299.0]).seconds.tolist() == pytest.approx([64.0, 298.0])


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv", "a.ts"])
def test_sound_changes_nothing(tmp_path: Path, read_numbers: Read, numbered_frame: Numbered, file: str) -> None:
    """Sound that begins before the pictures and ends after them."""
    path = tmp_path / file
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "10"})
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=16000)
        for block in range(80):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16000, 1024 * block
            container.mux(sound.encode(silence))
            if block < 50:
                frame = av.VideoFrame.from_ndarray(numbered_frame(block), format="rgb24")
                frame.pts, frame.time_base = block + 25, Fraction(1, 25)
                container.mux(video.encode(frame))
        container.mux(video.encode())
        container.mux(sound.encode())
    frames = decode(path, times=[index / 25 for index in range(50)])
    assert frames.seconds.tolist() == pytest.approx([index / 25 for index in range(50)], abs=1e-3)
    assert read_numbers(frames.pixels) == list(range(50))
    assert presented(path) == pytest.approx(frames.seconds.tolist(), abs=1e-3)
    assert not probe(path).variable


def test_what_an_edit_list_cuts_off_is_not_there(tmp_path: Path, read_numbers: Read, numbered_frame: Numbered) -> None:
    """The first 10 frames are decoded, as others refer to them, but never displayed."""
    path = tmp_path / "a.mp4"
    with av.open(path, "w", options={"avoid_negative_ts": "disabled"}) as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "10", "bf": "0"})
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        packets = []
        for index in range(50):
            frame = av.VideoFrame.from_ndarray(numbered_frame(index), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            packets += video.encode(frame)
        for packet in packets + video.encode():
            packet.pts -= 10
            packet.dts -= 10
            container.mux(packet)
    frames = decode(path, fps=25)
    assert presented(path) == pytest.approx([index / 25 for index in range(40)])
    assert frames.seconds.tolist() == pytest.approx([index / 25 for index in range(40)])
    assert read_numbers(frames.pixels) == list(range(10, 50))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_what_is_remembered_of_a_file_is_forgotten_when_it_changes(
    write_numbered: Write, read_numbers: Read, name: str
) -> None:
    for timeline in (range(0, 8000, 40), range(0, 6000, 40), range(0, 7000, 80)):
        path = write_numbered(name, list(timeline), g="25")
        frames = decode(path, times=[0.0, 5.0])
        assert read_numbers(frames.pixels) == [0, 5000 // timeline.step]
        assert frames.duration == pytest.approx(timeline.stop / 1000, abs=0.05)


def test_a_stream_is_read_through_once(write_numbered: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("vsr1.video.probe")

    paths = [write_numbered(name, EVEN) for name in ("a.ts", "b.mkv")]
    opened, calls = module.opened, []
    monkeypatch.setattr(module, "opened", lambda path, *rest: calls.append(path) or opened(path, *rest))
    for _ in range(3):
        for path in paths:
            module.scan(path)
    assert len(calls) == 2
    with pytest.raises(VideoError, match=r"'gone\.ts'"):
        module.scan("gone.ts")


def test_size_is_that_of_the_upright_picture(write_numbered: Write, read_numbers: Read) -> None:
    for turn in (0, 90):
        path = write_numbered(f"{turn}.mp4", EVEN, rotation=turn, side=128)
        frames = decode(path, fps=5, size=(40, 64))
        assert tuple(frames.pixels.shape) == (10, 40, 64, 3)
        whole = decode(path, fps=5).pixels.float()
        assert torch.allclose(frames.pixels.float().mean((1, 2, 3)), whole.mean((1, 2, 3)), atol=1.5)
    assert read_numbers(decode(path.with_name("0.mp4"), fps=5, size=(40, 64)).pixels) == list(range(0, 50, 5))


def test_making_small_does_not_alias(tmp_path: Path) -> None:
    """Lines of one pixel are grey from afar."""
    path = tmp_path / "a.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width = stream.height = 256
        stream.pix_fmt = "gray"
        lines = np.zeros((256, 256), np.uint8)
        lines[:, ::2] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(lines, format="gray")))
        container.mux(stream.encode())
    small = decode(path, count=1, size=(32, 32)).pixels.float()
    assert (small - 127.5)[:, 2:-2, 2:-2].abs().max() < 4
