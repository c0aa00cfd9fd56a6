"""What an excerpt holds: decoded from its start, frame n is the picture it says, for every codec, container and group."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video import decode
from vsr1.video.excerpt import Excerpt, excerpt
from vsr1.video.sampling import Sampling

Write = Callable[..., Path]
QUIET = {"x265-params": "log-level=0"}


def unpacked(cut: Excerpt) -> torch.Tensor:
    """The wanted frames, decoded from the excerpt alone and taken by counting."""
    with av.open(io.BytesIO(cut.data.tobytes())) as container:
        frames = sorted(container.decode(video=0), key=lambda frame: frame.pts)
    assert [frame.pts - frames[0].pts for frame in frames] == [n * (frames[1].pts - frames[0].pts) if n else 0 for n in range(len(frames))]
    pictures = [np.rot90(frames[index].to_ndarray(format="rgb24"), round(cut.first.rotation / 90) % 4) for index in cut.frames]
    return torch.from_numpy(np.stack([pictures[row] for row in cut.rows]))


CASES = {
    "h264": ("a.mp4", "libx264", {}),
    "h264 pyramid": ("a.mp4", "libx264", {"g": "12", "bf": "5", "x264-params": "b-pyramid=normal"}),
    "h264 open groups": ("a.mp4", "libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3:b-adapt=0"}),
    "h264 ts": ("a.ts", "libx264", {"g": "12"}),
    "h264 flv": ("a.flv", "libx264", {"g": "12"}),
    "h264 mkv": ("a.mkv", "libx264", {"g": "12"}),
    "h264 avi": ("a.avi", "libx264", {"g": "12", "bf": "0"}),
    "hevc open groups": ("a.mp4", "libx265", {"g": "12", "x265-params": "log-level=0:open-gop=1"}),
    "hevc mkv": ("a.mkv", "libx265", {"g": "12", **QUIET}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "12", "b": "2M"}),
    "vp9 alternate references": ("a.webm", "libvpx-vp9", {"g": "40", "b": "2M", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "av1": ("a.mkv", "libsvtav1", {"g": "12"}),
}


@pytest.mark.parametrize("name", CASES)
def test_counting_gives_the_pictures_of_the_times(write_numbered: Write, name: str) -> None:
    file, codec, options = CASES[name]
    path = write_numbered(file, list(range(0, 6000, 40)), codec=codec, clock=25, **options)
    for sampling in ({"fps": 25}, {"fps": 1}, {"times": [0.2, 2.44, 2.48, 2.52, 5.9, 9]}, {"times": [4.0]}, {"count": 5, "span": (3.0, 3.5)}):
        try:
            cut = excerpt(path, Sampling(**sampling))
        except BackendUnavailable as e:
            pytest.fail(str(e))
        whole = decode(path, **sampling)
        assert cut.seconds == pytest.approx(whole.seconds.tolist(), abs=1e-9)
        got = unpacked(cut)
        assert got.shape == whole.pixels.shape
        d = (got.int() - whole.pixels.int()).abs().amax((1, 2, 3))
        assert torch.equal(got, whole.pixels), (sampling, d.tolist(), len(cut.data), path.stat().st_size)
