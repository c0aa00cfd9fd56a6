"""What an excerpt holds: decoded from its start, frame n is the picture it says, for every codec, container and group."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video import decode
from vsr1.video.excerpt import Excerpt, _Reader, excerpt
from vsr1.video.sampling import Sampling

Write = Callable[..., Path]
QUIET = {"x265-params": "log-level=0"}


def unpacked(cut: Excerpt) -> torch.Tensor:
    """The wanted frames, decoded from the excerpt alone and taken by counting."""
    with av.open(io.BytesIO(cut.data.tobytes())) as container:
        frames = sorted(container.decode(video=0), key=lambda frame: frame.pts)
    assert len({b.pts - a.pts for a, b in pairwise(frames)}) <= 1, "the excerpt's clock is not even"
    turns = round(cut.first.rotation / 90) % 4
    return torch.from_numpy(
        np.stack([np.rot90(frames[cut.frames[row]].to_ndarray(format="rgb24"), turns) for row in cut.rows])
    )


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
    "vp9 alternate references": (
        "a.webm",
        "libvpx-vp9",
        {"g": "40", "b": "2M", "auto-alt-ref": "1", "lag-in-frames": "16"},
    ),
    "av1": ("a.mkv", "libsvtav1", {"g": "12"}),
}


SAMPLINGS = (
    {"fps": 25},
    {"fps": 1},
    {"times": [0.2, 2.44, 2.48, 2.52, 2.52, 5.9, 9]},
    {"times": [4.0]},
    {"count": 5, "span": (3.0, 3.5)},
)


@pytest.mark.parametrize("name", CASES)
def test_counting_gives_the_pictures_of_the_times(write_numbered: Write, name: str) -> None:
    file, codec, options = CASES[name]
    path = write_numbered(file, list(range(0, 6000, 40)), codec=codec, clock=25, **options)
    for sampling in SAMPLINGS:
        cut, whole = excerpt(path, Sampling(**sampling)), decode(path, **sampling)
        assert cut.seconds == pytest.approx(whole.seconds.tolist(), abs=1e-9)
        assert torch.equal(unpacked(cut), whole.pixels), sampling


def test_an_excerpt_holds_what_is_needed_and_no_more(write_numbered: Write) -> None:
    path = write_numbered("a.mp4", list(range(0, 8000, 40)), clock=25, g="25", bf="0", sc_threshold="0")
    cut = excerpt(path, Sampling(times=[2.0, 2.08, 7.0]))
    with av.open(io.BytesIO(cut.data.tobytes())) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 3 + 1
    assert (cut.frames, cut.rows) == ([0, 2, 3], [0, 1, 2])


def test_long_videos_are_not_read_through(write_numbered: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbered("a.mp4", list(range(0, 10000, 40)), clock=25, g="25")
    read = []
    pictures = _Reader._pictures
    monkeypatch.setattr(_Reader, "_pictures", lambda self: (read.append(item) or item for item in pictures(self)))
    excerpt(path, Sampling(times=[9.0]))
    assert len(read) < 3 * 25 + 5  # of 250: the first group, the one that is wanted, and the next to see its start


def test_what_an_excerpt_cannot_carry_is_refused_by_name(write_numbered: Write, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="is mpeg4"):
        excerpt(write_numbered("a.avi", [0, 40, 80], codec="mpeg4"), Sampling(count=1))
    whole = write_numbered("b.mp4", list(range(0, 4000, 40)), movflags="+faststart")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(VideoError):
        excerpt(cut, Sampling(fps=1))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps=st.lists(st.integers(1, 3000), min_size=1, max_size=30),
    times=st.lists(st.floats(0, 60), min_size=1, max_size=8).map(sorted),
    gop=st.sampled_from(["3", "250"]),
    bases=st.sampled_from(["a.mp4", "a.mkv"]),
)
def test_any_timeline(write_numbered: Write, gaps: list[int], times: list[float], gop: str, bases: str) -> None:
    path = write_numbered(bases, [0, *np.cumsum(gaps).tolist()], g=gop)
    cut, whole = excerpt(path, Sampling(times=times)), decode(path, times=times)
    assert cut.seconds == pytest.approx(whole.seconds.tolist(), abs=1e-9)
    assert torch.equal(unpacked(cut), whole.pixels)
