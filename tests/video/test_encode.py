"""What `encode` promises: a readable file, the same bytes each time, all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vsr1.errors import VideoError
from vsr1.video import decode, encode, probe


def gradient(frames: int = 6, height: int = 48, width: int = 64) -> np.ndarray:
    ramp = np.linspace(0, 200, width, dtype=np.uint8)
    pixels = np.broadcast_to(ramp[None, None, :, None], (frames, height, width, 3)).copy()
    pixels += (8 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    return pixels


@pytest.mark.parametrize("fps", [2, 2.5, 30000 / 1001, 25])
def test_comes_back_the_same(tmp_path: Path, fps: float) -> None:
    pixels = gradient()
    path = encode(tmp_path / "a.mp4", pixels, fps)
    info = probe(path)
    assert (info.frames, info.width, info.height, info.codec) == (6, 64, 48, "h264")
    assert info.fps == pytest.approx(fps)
    assert info.seconds == pytest.approx(6 / fps, abs=1e-3)
    frames = decode(path, times=[(index + 0.5) / fps for index in range(6)])
    assert (frames.pixels.int() - torch.from_numpy(pixels).int()).abs().float().mean() < 4
    assert frames.seconds.tolist() == pytest.approx([index / fps for index in range(6)], abs=1e-4)


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    first = encode(tmp_path / "a.mp4", gradient(), 2).read_bytes()
    assert encode(tmp_path / "b.mp4", torch.from_numpy(gradient()), 2).read_bytes() == first


def test_two_processes_may_write_the_same_file(tmp_path: Path) -> None:
    # As when a job is killed and started again while a worker of the old one ends its last video.
    path, pixels = tmp_path / "a.mp4", gradient()
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            for _ in range(100):
                encode(path, pixels, 2)
            failed = 0
        finally:
            os._exit(failed)
    try:
        for _ in range(100):
            encode(path, pixels, 2)
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0
    assert path.read_bytes() == encode(tmp_path / "b.mp4", pixels, 2).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


def test_colours_survive(tmp_path: Path) -> None:
    colours = np.array([[225, 30, 35], [40, 85, 250], [30, 185, 50], [245, 230, 40]], np.uint8)
    pixels = np.broadcast_to(colours[:, None, None], (4, 32, 32, 3))
    decoded = decode(encode(tmp_path / "c.mp4", pixels, 1), fps=1).pixels.float().mean((1, 2))
    assert (decoded - torch.from_numpy(colours).float()).abs().max() < 6


@pytest.mark.parametrize(
    ("pixels", "fps"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), 1),
        (np.zeros((32, 32, 3), np.uint8), 1),
        (np.zeros((2, 32, 32, 4), np.uint8), 1),
        (np.zeros((0, 32, 32, 3), np.uint8), 1),
        (np.zeros((2, 31, 32, 3), np.uint8), 1),
        (np.zeros((2, 32, 32, 3), np.uint8), 0),
        (np.zeros((2, 32, 32, 3), np.uint8), float("nan")),
    ],
)
def test_bad_arguments(tmp_path: Path, pixels: np.ndarray, fps: float) -> None:
    with pytest.raises(ValueError, match=r"pixels|even|fps"):
        encode(tmp_path / "a.mp4", pixels, fps)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="cannot be written"):
        encode(tmp_path / "missing" / "a.mp4", gradient(), 2)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", gradient(), 2)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(VideoError, match="No space left"):
        encode(path, gradient(3), 2)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
