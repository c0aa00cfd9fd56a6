"""Frames of a file at chosen presentation times: the clock is the file's own, never an index divided by a guess.

What `decode` promises, whichever backend does it:

- A frame is named by its time. Times count from the first displayed frame and are the file's presentation times, so
  variable rates, edit lists, late starts and B-frames come out right; `seconds` says for each frame when it is first
  displayed, to the tick of the file's clock. A wanted time gives the frame on display then; past the end, the last one.
- Frames are upright, RGB, all of the size of the first (or `size`), as many as wanted, in ascending order.
- A file that is missing, no regular file, damaged, cut short before a wanted time or without video is one `VideoError`
  with the path and a reason. Damage behind the last wanted frame may go unnoticed: what nobody wants is not decoded.
- Nothing is fetched over a network, whatever a file says. Time and memory are not limited here: `vsr1.video.loader` does
  that, in processes of its own.

The backends: `pyav` decodes on the CPU and reads everything that FFmpeg reads; `dali` decodes on an NVIDIA GPU and gives
the same frames at the same times, with pixels that may differ by a few levels. `auto` takes the GPU where it pays.
Frame arrays need no decoder, only their times: `vsr1.video.array` has them, and says what "on display" means there.
`vsr1.video.loader` decodes many files ahead of whoever wants them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video.array import is_array
from vsr1.video.frames import Frames
from vsr1.video.pyav import Pictures
from vsr1.video.sampling import Sampling
from vsr1.video.sources import pictures

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

BACKENDS = ("auto", "pyav", "dali")
WORTH_A_GPU = 300_000_000
"""Coded pixels below which `auto` stays on the CPU: a core decodes them in about a second, and NVDEC has to be set up."""


def decode(
    path: str | os.PathLike[str],
    *,
    times: Sequence[float] | None = None,
    fps: float | None = None,
    count: int | None = None,
    max_frames: int | None = None,
    span: tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
) -> Frames:
    """Decode the frames displayed at the wanted times; works for variable frame rates as for constant ones.

    Exactly one of:
        times: seconds from the first frame, ascending; a time past the end gives the last frame.
        fps: times 0, 1/fps, 2/fps, ... below the duration.
        count: `count` times 0, d/count, 2d/count, ... of the duration d.

    Args:
        max_frames: if `fps` wants more frames than this, take this many by the rule of `count`; with `times` or
            `count` a plain upper limit.
        span: (start, end) seconds that `fps` and `count` sample instead of the whole video.
        size: (height, width) in pixels that the upright frames are resized to (cubic, without aliasing); None keeps theirs.
        threads: PyAV's decoder threads; None takes one for small frames and one per core for large ones.
        backend: "pyav"; "dali"; or "auto": DALI if `device` is a CUDA device, DALI is there and takes the video, and it is
            long enough to be worth it, else PyAV.
        device: where the pixels shall lie. None: CPU memory, or with backend "dali" the current CUDA device.

    Raises:
        ValueError: the arguments contradict each other or are out of range.
        VideoError: the file is missing, damaged, cut short before a wanted time, or holds no video.
        BackendUnavailable: backend "dali" cannot serve: no DALI, no CUDA device, or not this video; it never falls back.
    """
    sampling = Sampling(times, fps, count, max_frames, span)
    check_size(size)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got '{backend}'")
    if backend == "dali" or (backend == "auto" and device is not None):
        frames = _on_gpu(path, sampling, size, device, optional=backend == "auto")
        if frames is not None:
            return frames
    decoded = as_frames(path, pictures(path, sampling, size=size, threads=threads))
    return decoded if device is None else decoded.to(device)


def check_size(size: tuple[int, int] | None) -> None:
    """Raise ValueError for what is no (height, width)."""
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width) of at least 1 x 1 pixels, got {size}")


def as_frames(path: str | os.PathLike[str], decoded: Pictures) -> Frames:
    """The same memory as tensors."""
    import torch  # here and not above: processes that only encode or probe must not load it

    seconds = torch.tensor(decoded.seconds, dtype=torch.float64)
    return Frames(torch.from_numpy(decoded.pixels), seconds, decoded.duration, Path(path))


def _on_gpu(
    path: str | os.PathLike[str],
    sampling: Sampling,
    size: tuple[int, int] | None,
    device: str | torch.device | None,
    optional: bool,
) -> Frames | None:
    """Frames by DALI; None if that is `optional` and it cannot serve, or would not pay."""
    import torch

    from vsr1.video import dali
    from vsr1.video.excerpt import excerpt

    if is_array(path):
        if optional:
            return None
        raise BackendUnavailable(f"video backend 'dali' reads video files, and '{path}' is a frame array: take 'auto'")
    target = torch.device("cuda" if device is None else device)
    if target.type != "cuda":
        if optional:
            return None
        raise ValueError(
            f"backend 'dali' leaves the pixels on a CUDA device, got device '{device}'; move them afterwards"
        )
    if reason := dali.missing():
        if optional:
            return None
        raise BackendUnavailable(f"video backend 'dali' {reason}; backend 'pyav' needs neither")
    try:
        cut = excerpt(path, sampling)
        if optional and (cut.pictures * cut.first.width * cut.first.height < WORTH_A_GPU or dali.refuses(cut)):
            return None
        return dali.decode_one(cut, target.index, size)
    except VideoError as error:
        if not optional:
            raise
        log.warning("%s; PyAV has the last word", error)
        return None
    except BackendUnavailable as error:
        if optional:
            return None
        raise BackendUnavailable(f"{error}; backend 'pyav' reads it") from error
