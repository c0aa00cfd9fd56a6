"""The one door to a video, whatever keeps it: a file that FFmpeg reads, or a frame array (`vsr1.video.array`)."""

from __future__ import annotations

import os

from vsr1.video.array import is_array
from vsr1.video.array import pictures as pictures_of_array
from vsr1.video.array import probe as probe_array
from vsr1.video.probe import VideoInfo
from vsr1.video.probe import probe as probe_file
from vsr1.video.pyav import Allocate, Pictures
from vsr1.video.pyav import pictures as pictures_of_file
from vsr1.video.sampling import Sampling


def pictures(
    path: str | os.PathLike[str],
    sampling: Sampling,
    *,
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    allocate: Allocate | None = None,
) -> Pictures:
    """The frames at the wanted times, as `vsr1.video.decode` gives them, in memory that `allocate` gives.

    Raises:
        VideoError: the video cannot be read.
    """
    if is_array(path):
        return pictures_of_array(path, sampling, size=size, allocate=allocate)
    return pictures_of_file(path, sampling, size=size, threads=threads, allocate=allocate)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Describe a video; its first frame is decoded, or its array is opened, so a video that passes really opens.

    Raises:
        VideoError: it is missing, damaged, or holds no frame.
    """
    return probe_array(path) if is_array(path) else probe_file(path)
