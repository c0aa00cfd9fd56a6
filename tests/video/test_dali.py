"""The DALI backend's graph on its CPU decoders, which read VP9: batches, times, resizing, isolation, colours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video import Frames, decode
from vsr1.video.dali import DaliDecoder, decode_batch, missing, refuses
from vsr1.video.excerpt import excerpt
from vsr1.video.sampling import Sampling

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="DALI is not installed",
)

Write = Callable[..., Path]
Read = Callable[[torch.Tensor], list[int]]
VP9 = {"codec": "libvpx-vp9", "side": 64, "b": "2M"}


@needs_dali
@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_a_batch_gives_the_frames_of_pyav(write_numbered: Write, read_numbers: Read, index: bool) -> None:
    gaps = np.random.default_rng(0).integers(5, 300, 60)
    paths = [
        write_numbered("a.webm", list(range(0, 4000, 40)), g="12", **VP9),
        write_numbered("b.mp4", [0, *np.cumsum(gaps).tolist()], g="30", **VP9),
        write_numbered("c.mkv", list(range(3000, 5000, 40)), **{**VP9, "side": 96}, **{"auto-alt-ref": "1"}),
        write_numbered("d.mp4", list(range(0, 2000, 40)), rotation=90, **VP9),
    ]
    decoder = DaliDecoder(None, batch=3, index=index)  # so that four videos are two runs of the pipeline
    for sampling in ({"fps": 3}, {"times": [0.1, 0.1, 1.7, 50]}, {"count": 4, "span": (1.0, 1.5)}):
        for path, ours in zip(paths, decode_batch(paths, Sampling(**sampling), decoder), strict=True):
            theirs = decode(path, **sampling)
            assert isinstance(ours, Frames)
            assert torch.equal(ours.seconds, theirs.seconds) and ours.duration == theirs.duration
            assert (ours.pixels.int() - theirs.pixels.int()).abs().max() <= 3, (path, sampling)


@needs_dali
def test_resizing_is_upright(write_numbered: Write) -> None:
    paths = [write_numbered(f"{turn}.mp4", [0, 40, 80], rotation=turn, **VP9) for turn in (0, 90)]
    results = decode_batch(paths, Sampling(count=2), DaliDecoder(None, size=(30, 50)))
    assert [tuple(frames.pixels.shape) for frames in results] == [(2, 30, 50, 3)] * 2
    plain, turned = (decode(path, count=2).pixels.float().mean() for path in paths)
    assert results[0].pixels.float().mean() == pytest.approx(float(plain), abs=1)
    assert results[1].pixels.float().mean() == pytest.approx(float(turned), abs=1)


@needs_dali
def test_one_bad_sample_is_lost_and_no_other(write_numbered: Write, read_numbers: Read) -> None:
    path = write_numbered("a.webm", list(range(0, 2000, 40)), **VP9)
    cut = excerpt(path, Sampling(fps=5))
    noise = replace(cut, source=Path("noise"), data=np.random.default_rng(0).integers(0, 256, 5000, np.uint8))
    decoder = DaliDecoder(None, batch=4)
    for _ in range(2):
        results = decoder.decode([cut, noise, cut])
        assert isinstance(results[1], VideoError) and results[1].path == "noise" and "DALI" in results[1].reason
        for frames in (results[0], results[2]):
            assert isinstance(frames, Frames) and read_numbers(frames.pixels) == list(range(0, 50, 5))


@needs_dali
def test_earlier_results_stay_as_they_were(write_numbered: Write) -> None:
    path = write_numbered("a.webm", list(range(0, 2000, 40)), **VP9)
    decoder = DaliDecoder(None)
    (first,) = decode_batch([path], Sampling(fps=5), decoder)
    before = first.pixels.clone()
    for _ in range(4):
        decode_batch([path], Sampling(fps=5, span=(1.0, 2.0)), decoder)
    assert torch.equal(first.pixels, before)


@needs_dali
@pytest.mark.parametrize("matrix", [1, 5, 9], ids=["BT.709", "BT.601", "BT.2020"])
def test_colours_are_those_the_file_names(tmp_path: Path, matrix: int) -> None:
    patches = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    picture = np.kron(patches, np.ones((16, 16, 1))).astype(np.uint8)
    path = tmp_path / "a.webm"
    with av.open(path, "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=25, options={"crf": "4", "b": "9M"})
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=1)))
        container.mux(stream.encode())
    (frames,) = decode_batch([path], Sampling(count=1), DaliDecoder(None))
    middles = frames.pixels[0, 8::16, 8::16].float() - torch.from_numpy(picture[8::16, 8::16]).float()
    assert middles.abs().mean() < 3  # 8 levels if BT.601 is taken for BT.709


def test_what_nvdec_would_get_wrong_is_refused(write_numbered: Write) -> None:
    def reason(name: str, **options: object) -> str | None:
        return refuses(excerpt(write_numbered(name, [0, 40], **options), Sampling(count=1)))

    # Of fewer frames than its lookahead x265 reorders with a delay it never set, and the muxer refuses such times.
    plain = {"x265-params": "log-level=0:bframes=0"}
    assert "48 x 16" in reason("small.mp4")
    assert "144 x 144" in reason("small.mkv", codec="libx265", side=128, **plain)
    assert "even sizes" in reason("odd.webm", codec="libvpx-vp9", side=191)
    assert "yuv420p10le" in reason("deep.mp4", side=192, pixels="yuv420p10le")
    assert "takes h264, hevc, vp9; this is av1" in reason("a.mkv", codec="libsvtav1", side=192)
    assert reason("good.mp4", side=192) is None


@pytest.mark.skipif(missing() is None, reason="DALI serves here")
def test_a_machine_without_it_says_what_is_missing() -> None:
    with pytest.raises(BackendUnavailable, match=r"needs NVIDIA DALI|needs a CUDA device"):
        DaliDecoder()
