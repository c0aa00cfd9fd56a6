"""Frames to a file: one call writes one H.264 mp4, the same bytes for the same frames on every run.

The file is muxed in memory (it is smaller than the frames it comes from), written beside its place and renamed, so a
reader never meets half a file and a full disk is an ordinary `OSError`.
"""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import ArrayLike

from vsr1.errors import VideoError

# One thread: x264's output depends on how many work on it, and a run encodes many files side by side anyway.
X264_OPTIONS = {"preset": "veryfast", "crf": "18", "threads": "1"}


def encode(path: str | os.PathLike[str], pixels: ArrayLike, fps: float) -> Path:
    """Write frames as an H.264 (yuv420p) mp4 of constant frame rate; an existing file is replaced.

    Args:
        path: where the file goes; its folder must exist.
        pixels: (T, H, W, 3) uint8 RGB, numpy or a CPU tensor; H and W even.
        fps: frames per second.

    Raises:
        ValueError: `pixels` or `fps` cannot be encoded.
        VideoError: the file cannot be written.
    """
    frames = np.ascontiguousarray(pixels)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"pixels must be uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"yuv420p needs an even height and width, got {frames.shape[1]} x {frames.shape[2]}")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps must be above 0 and at most 1000, got {fps}")
    target = Path(path)
    # A name of this process' own: a worker that has outlived its killed job may be writing the same file.
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(_mux(frames, fps))
        os.replace(aside, target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise VideoError(path, f"cannot be written: {error.strerror or error}") from error
    return target


def _mux(frames: np.ndarray, fps: float) -> bytes:
    buffer = io.BytesIO()
    reformatter = VideoReformatter()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=X264_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for index, array in enumerate(frames):
            # threads=1: swscale's own pool costs more than converting a small frame.
            frame = reformatter.reformat(VideoFrame.from_ndarray(array, format="rgb24"), format="yuv420p", threads=1)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
