"""Files that are not what their name says: each is one `VideoError` with the path and a reason."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from vsr1.errors import VideoError
from vsr1.video import decode, encode, probe

Write = Callable[..., Path]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Ten seconds of noise, so that the frames and not the headers make up the file."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    return encode(tmp_path / "video.mp4", pixels, 2)


def fails(path: Path, reason: str = ".") -> None:
    for action in (probe, lambda name: decode(name, fps=1)):
        with pytest.raises(VideoError, match=reason) as caught:
            action(path)
        assert caught.value.path == str(path)
        assert str(path) in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    fails(tmp_path / "missing.mp4", "No such file")


def test_folder(tmp_path: Path) -> None:
    fails(tmp_path, "folder")


def test_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    fails(tmp_path / "pipe.mp4", "not a regular file")


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    fails(tmp_path / "empty.mp4", "empty")


@pytest.mark.parametrize(
    "content",
    [b"just some words\n" * 50, bytes(5000), b"#EXTM3U\nhttp://127.0.0.1:9/x.ts\n"],
    ids=["text", "zeros", "list"],
)
def test_not_a_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "words.mp4").write_bytes(content)
    fails(tmp_path / "words.mp4")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_cut_short(video: Path, share: float) -> None:
    """The index of an mp4 comes last, so any cut makes it unreadable."""
    video.write_bytes(video.read_bytes()[: int(share * video.stat().st_size)])
    fails(video)


@pytest.mark.parametrize("share", [0.4, 0.6, 0.75])
@pytest.mark.parametrize("name", ["early.mp4", "early.mkv", "early.avi"])
def test_cut_short_with_the_index_in_front(tmp_path: Path, name: str, share: float) -> None:
    """Here the header still promises the whole length: what is there decodes, what is missing is an error."""
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream("libx264", rate=2, options={"crf": "20", "bf": "0", "tune": "zerolatency"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert len(decode(path, times=[0.0, 1.0])) == 2
    for fps in (2, 0.5):
        with pytest.raises(VideoError, match="truncated"):
            decode(path, fps=fps)


def test_damaged_bytes(video: Path) -> None:
    content = bytearray(video.read_bytes())
    content[200:] = bytes(len(content) - 200)
    video.write_bytes(content)
    fails(video)


def test_sound_alone(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    fails(path, "no video stream")


def test_a_bare_stream_has_no_clock(tmp_path: Path) -> None:
    path = tmp_path / "bare.h264"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    fails(path, "no presentation times")


def test_no_frames(tmp_path: Path) -> None:
    path = tmp_path / "none.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    fails(path)


def test_a_colon_in_the_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encode("http:clip.mp4", np.zeros((2, 32, 32, 3), np.uint8), 1)
    assert probe("http:clip.mp4").frames == 2
    assert len(decode("http:clip.mp4", fps=1)) == 2


def test_the_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "the file is empty")))
    assert (error.path, error.reason) == ("a.mp4", "the file is empty")
