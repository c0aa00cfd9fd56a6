"""Which backend `decode` takes, and what it says where one cannot serve. DALI's CPU decoders stand in for NVDEC."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video import Frames, dali, decode

Write = Callable[..., Path]
VP9 = {"codec": "libvpx-vp9", "side": 192, "b": "2M"}
module = importlib.import_module("vsr1.video.decode")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Pretends that DALI and a device are there; holds what came to it. Its frames are told by a duration of -1."""
    came: list[Path] = []

    def decode_one(cut: object, device: int | None, size: tuple[int, int] | None) -> Frames:
        came.append(cut.source)
        return Frames(torch.empty(0), torch.empty(0), -1.0, cut.source)

    monkeypatch.setattr(dali, "missing", lambda: None)
    monkeypatch.setattr(dali, "decode_one", decode_one)
    return came


def test_auto_takes_the_gpu_where_it_is_asked_for_and_pays(
    write_numbered: Write, served: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    short, deep = (
        write_numbered("a.mp4", [0, 40], side=192),
        write_numbered("b.mp4", [0, 40], side=192, pixels="yuv420p10le"),
    )
    avi = write_numbered("c.avi", [0, 40], codec="mpeg4", side=192)
    assert decode(short, count=1, backend="auto", device="meta").pixels.is_meta
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)  # there is no device to go to
    assert decode(short, count=1, device="cuda").duration > 0 and not served  # too short
    monkeypatch.setattr(module, "WORTH_A_GPU", 2 * 192 * 192)
    assert decode(short, count=2, device="cuda:0").duration == -1 and served == [short]
    for path, options in (
        (short, {}),
        (short, {"device": "cpu"}),
        (deep, {"device": "cuda"}),
        (avi, {"device": "cuda"}),
    ):
        assert decode(path, count=2, **options).duration > 0
    assert served == [short]
    monkeypatch.setattr(dali, "missing", lambda: "is not there")
    assert decode(short, count=2, device="cuda").duration > 0


def test_what_fails_on_the_gpu_may_be_read_by_pyav(
    write_numbered: Write, served: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(cut: object, *_: object) -> Frames:
        raise VideoError(cut.source, "DALI cannot decode it")

    path = write_numbered("a.mp4", [0, 40], side=192)
    monkeypatch.setattr(dali, "decode_one", fails)
    monkeypatch.setattr(module, "WORTH_A_GPU", 0)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    assert len(decode(path, count=2, device="cuda")) == 2
    assert "DALI cannot decode it; PyAV" in caplog.text
    with pytest.raises(VideoError, match="DALI cannot"):
        decode(path, count=2, backend="dali")


def test_dali_by_name_never_falls_back(
    write_numbered: Write, served: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered("a.mp4", [0, 40], side=192)
    assert decode(path, count=1, backend="dali").duration == -1  # however short
    with pytest.raises(BackendUnavailable, match=r"is mpeg4; backend 'pyav' reads it"):
        decode(write_numbered("c.avi", [0, 40], codec="mpeg4", side=192), count=1, backend="dali")
    with pytest.raises(ValueError, match="got device 'cpu'"):
        decode(path, count=1, backend="dali", device="cpu")
    with pytest.raises(VideoError, match="No such file"):
        decode("gone.mp4", count=1, backend="dali")
    monkeypatch.setattr(dali, "missing", lambda: "needs NVIDIA DALI: pip install 'vsr1[gpu]'")
    with pytest.raises(BackendUnavailable, match=r"'dali' needs NVIDIA DALI.*backend 'pyav' needs neither"):
        decode(path, count=1, backend="dali")


def test_what_dali_refuses_is_said_with_the_way_out(write_numbered: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    dali._kept.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"takes 8-bit 4:2:0.*b\.mp4'; backend 'pyav' reads it"):
        decode(write_numbered("b.mp4", [0, 40], side=192, pixels="yuv420p10le"), count=1, backend="dali")
    dali._kept.cache_clear()


@pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="DALI is not installed",
)
def test_dali_gives_the_frames_of_pyav(write_numbered: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.cache
    def kept(device: int, size: tuple[int, int] | None) -> tuple[dali.DaliDecoder, threading.Lock]:
        return dali.DaliDecoder(None, batch=1, size=size), threading.Lock()

    monkeypatch.setattr(dali, "missing", lambda: None)
    monkeypatch.setattr(dali, "_kept", kept)
    path = write_numbered("a.webm", list(range(0, 4000, 40)), g="12", rotation=0, **VP9)
    for size in (None, (96, 64)):
        ours, theirs = (
            decode(path, fps=3, size=size, **options) for options in ({"backend": "dali", "device": "cuda:0"}, {})
        )
        assert torch.equal(ours.seconds, theirs.seconds) and ours.pixels.shape == theirs.pixels.shape
        assert (ours.pixels.float() - theirs.pixels.float()).abs().mean() < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backend": "opencv"}, "auto, pyav, dali"), ({"size": (0, 5)}, "size must be"), ({"size": (5,)}, "size must be")],
    ids=str,
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode("never-read.mp4", count=1, **options)
