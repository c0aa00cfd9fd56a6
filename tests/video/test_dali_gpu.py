"""NVDEC through DALI beside PyAV: the same frames at the same times, on the device, for every codec that it is used for.

    python -m pytest tests/video/test_dali_gpu.py -v -rA

Runs where torch sees a CUDA device and DALI is installed. What it prints (decoders, memory, differences) is worth reading.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video import Frames, decode
from vsr1.video.dali import DaliDecoder, decode_batch, missing
from vsr1.video.excerpt import excerpt
from vsr1.video.sampling import Sampling

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"DALI {missing()}")

Write = Callable[..., Path]
Read = Callable[[torch.Tensor], list[int]]
SIDE = 192
CASES = {
    "h264": ("a.mp4", "libx264", {"g": "12"}),
    "h264 pyramid": ("a.mp4", "libx264", {"g": "40", "bf": "5", "x264-params": "b-pyramid=normal:ref=5"}),
    "h264 open groups": ("a.mp4", "libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3:b-adapt=0"}),
    "h264 without B": ("a.mp4", "libx264", {"g": "50", "bf": "0"}),
    "h264 ts": ("a.ts", "libx264", {"g": "12"}),
    "h264 flv": ("a.flv", "libx264", {"g": "12"}),
    "h264 mkv": ("a.mkv", "libx264", {"g": "12"}),
    "h264 full range": ("a.mp4", "libx264", {"g": "12", "pixels": "yuvj420p"}),
    "hevc": ("a.mp4", "libx265", {"g": "12", "x265-params": "log-level=0:open-gop=0"}),
    "hevc open groups": ("a.mp4", "libx265", {"g": "12", "x265-params": "log-level=0:open-gop=1"}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "12", "b": "2M"}),
    "vp9 hidden frames": ("a.webm", "libvpx-vp9", {"g": "40", "b": "2M", "auto-alt-ref": "1", "lag-in-frames": "16"}),
}
SAMPLINGS = {
    "every frame": {"fps": 25},
    "one a second": {"fps": 1},
    "some": {"times": [0.2, 2.44, 2.48, 2.52, 2.52, 5.9, 9]},
    "a span": {"count": 5, "span": (3.0, 3.5)},
}


def decoded(decoder: DaliDecoder, *paths: Path, **sampling: object) -> list[Frames]:
    results = decode_batch(paths, Sampling(**sampling), decoder)
    for result in results:
        if not isinstance(result, Frames):
            raise result
    return results


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("name", CASES)
def test_the_frames_that_pyav_gives(write_numbered: Write, read_numbers: Read, name: str, index: bool) -> None:
    file, codec, options = CASES[name]
    path = write_numbered(file, list(range(0, 6000, 40)), codec=codec, clock=25, side=SIDE, **options)
    decoder = DaliDecoder(batch=2, index=index)
    wrong = []
    for what, sampling in SAMPLINGS.items():
        (ours,), theirs = decoded(decoder, path, **sampling), decode(path, **sampling)
        assert ours.pixels.is_cuda and ours.pixels.dtype == torch.uint8 and ours.pixels.shape == theirs.pixels.shape
        assert torch.equal(ours.seconds, theirs.seconds)
        difference = (ours.pixels.cpu().float() - theirs.pixels.float()).abs().mean()
        got, expected = read_numbers(ours.pixels), read_numbers(theirs.pixels)
        print(f"{name}, {what}: mean difference {difference:.3f} levels")
        if got != expected or difference > 3:
            wrong.append(f"{what}: {difference:.2f} levels, frames {got} instead of {expected}")
    assert not wrong, "\n".join(wrong)


def test_variable_rates_rotation_and_a_batch_of_many_sizes(write_numbered: Write, read_numbers: Read) -> None:
    gaps = np.random.default_rng(0).integers(5, 300, 80)
    paths = [
        write_numbered("a.mp4", [0, *np.cumsum(gaps).tolist()], side=192, g="20"),
        write_numbered("b.mkv", list(range(0, 4000, 40)), side=320, g="20"),
        write_numbered("c.mp4", list(range(0, 2000, 40)), side=256, rotation=180),
        write_numbered("d.mp4", list(range(0, 3000, 40)), side=256, codec="libx265", **{"x265-params": "log-level=0"}),
    ]
    for path, ours in zip(paths, decoded(DaliDecoder(batch=8), *paths, count=16), strict=True):
        theirs = decode(path, count=16)
        assert torch.equal(ours.seconds, theirs.seconds)
        assert (ours.pixels.cpu().float() - theirs.pixels.float()).abs().mean() < 3, path
        assert read_numbers(ours.pixels) == read_numbers(theirs.pixels), path


def test_resize_on_the_gpu(write_numbered: Write, read_numbers: Read) -> None:
    paths = [write_numbered(f"{side}.mp4", list(range(0, 2000, 40)), side=side) for side in (192, 320)]
    for ours in decoded(DaliDecoder(size=(96, 160)), *paths, fps=5):
        assert tuple(ours.pixels.shape) == (10, 96, 160, 3) and ours.pixels.is_cuda
        assert read_numbers(ours.pixels) == list(range(0, 50, 5))


def test_decode_takes_the_gpu(write_numbered: Write, read_numbers: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbered("a.mp4", list(range(0, 4000, 40)), side=SIDE)
    theirs = decode(path, fps=5)
    monkeypatch.setattr(importlib.import_module("vsr1.video.decode"), "WORTH_A_GPU", 0)
    for options in ({"backend": "dali"}, {"backend": "dali", "device": "cuda:0"}, {"device": "cuda"}):
        for size in (None, (96, 160)):
            ours = decode(path, fps=5, size=size, **options)
            assert ours.pixels.is_cuda and torch.equal(ours.seconds, theirs.seconds)
            assert read_numbers(ours.pixels) == list(range(0, 100, 5))
    small = write_numbered("small.mp4", [0, 40])
    assert decode(small, count=1, device="cuda").pixels.is_cuda  # by PyAV, and taken there
    with pytest.raises(BackendUnavailable, match=r"48 x 16.*backend 'pyav' reads it"):
        decode(small, count=1, backend="dali")


def test_earlier_results_stay_as_they_were(write_numbered: Write) -> None:
    decoder = DaliDecoder()
    paths = [write_numbered(f"{n}.mp4", list(range(0, 2000, 40)), side=SIDE) for n in range(2)]
    first = decoded(decoder, *paths, fps=5)
    before = [frames.pixels.clone() for frames in first]
    for _ in range(4):
        decoded(decoder, *paths, fps=5, span=(1.0, 2.0))
    assert all(torch.equal(frames.pixels, pixels) for frames, pixels in zip(first, before, strict=True))


def test_one_bad_file_is_isolated(write_numbered: Write, read_numbers: Read, tmp_path: Path) -> None:
    good = [write_numbered(f"{n}.mp4", list(range(0, 2000, 40)), side=SIDE) for n in range(3)]
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    small = write_numbered("small.mp4", [0, 40])
    decoder = DaliDecoder()
    cuts = [excerpt(path, Sampling(fps=5)) for path in good]
    noise = np.random.default_rng(0).integers(0, 256, cuts[1].data.size, np.uint8)
    for name, spoiled in (
        ("noise", noise),
        ("cut", cuts[1].data[: cuts[1].data.size // 2]),
        ("empty", cuts[1].data[:0]),
    ):
        batch = [cuts[0], replace(cuts[1], data=spoiled), cuts[2]]
        began = time.perf_counter()
        first, bad, last = decoder.decode(batch)
        print(
            f"{name}: {type(bad).__name__} {bad if isinstance(bad, VideoError) else ''} ({time.perf_counter() - began:.2f} s)"
        )
        assert isinstance(bad, VideoError)
        for frames in (first, last):
            assert isinstance(frames, Frames) and read_numbers(frames.pixels) == list(range(0, 50, 5))
    results = decode_batch([good[0], text, small, good[1]], Sampling(fps=5), decoder)
    assert [type(result) for result in results] == [Frames, VideoError, BackendUnavailable, Frames]


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1080, 1920)])
def test_decoders_are_kept_from_batch_to_batch(write_numbered: Write, tmp_path: Path, height: int, width: int) -> None:
    """Not asserted but told: whether NVDEC's decoders are made anew, in time and in the device's memory."""
    import av

    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(50):
            picture = np.full((height, width, 3), 4 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    decoder = DaliDecoder(batch=4)
    for turn in range(8):
        free, began = torch.cuda.mem_get_info()[0], time.perf_counter()
        frames = decoded(decoder, *[path] * 4, count=4)
        took = 1000 * (time.perf_counter() - began)
        print(f"{height}p, batch {turn}: {took:.0f} ms, {(free - torch.cuda.mem_get_info()[0]) / 2**20:.0f} MiB taken")
        means = frames[0].pixels.float().mean((1, 2, 3)).tolist()
        assert means == pytest.approx(decode(path, count=4).pixels.float().mean((1, 2, 3)).tolist(), abs=3)
