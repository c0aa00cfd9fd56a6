"""Frame arrays: videos that somebody has sampled already, kept as `<video>.npy` with their times in `meta.jsonl` beside them.

An array is (T, H, W, 3) uint8 RGB, upright. Its row of `meta.jsonl`, the one with its `video_id`, says when each frame was
displayed (`sampled_timestamps_sec`) and how long the video was (`source_duration_sec`): frames were not taken at the rate
that was aimed at, so nothing is made up from a rate here, and an array without a row is an error. Where an odd number of
frames was made even by one that repeats the last, that one is left out.

A stored frame stands for the times around it, so a wanted time gives the stored frame nearest to it (of two, the earlier),
where a video file has one that was really on display. Arrays are mapped into memory: only wanted frames are read.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from av.video.frame import VideoFrame

from vsr1.errors import VideoError
from vsr1.video.probe import UNEVEN, VideoInfo, check_regular, file_state
from vsr1.video.pyav import Allocate, Pictures, Upright, plain_memory
from vsr1.video.sampling import Sampling

META: Final = "meta.jsonl"
_NEEDED: Final = (
    "sampled_timestamps_sec", "source_duration_sec", "output_num_frames", "even_pad_applied",
    "sampled_frames_before_even_pad",
)  # fmt: skip
_FOLDERS: Final = 8  # whose meta.jsonl is kept in memory: some megabytes for ten thousand videos


@dataclass(frozen=True)
class Clip:
    """A frame array: `frames` (T, H, W, 3) uint8, mapped; `seconds` of each, ascending; `duration` of the video."""

    frames: np.ndarray
    seconds: Sequence[float]
    duration: float


@dataclass(frozen=True)
class _Meta:
    """What a meta.jsonl says: video id -> the keys needed here; `unread` names the lines that cannot be read."""

    rows: Mapping[str, Mapping[str, Any]]
    unread: Sequence[int]


def is_array(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a frame array, by its ending."""
    return os.fspath(path).lower().endswith(".npy")


def beside(path: str | os.PathLike[str]) -> tuple[str, int, int] | tuple[()]:
    """What names the state of the other file that a video depends on: that of a frame array's meta.jsonl; else nothing."""
    return _meta_state(path) if is_array(path) else ()


def pictures(
    path: str | os.PathLike[str],
    sampling: Sampling,
    *,
    size: tuple[int, int] | None = None,
    allocate: Allocate | None = None,
) -> Pictures:
    """The stored frames nearest to the wanted times, as `vsr1.video.pyav.pictures` gives those of a file.

    Raises:
        VideoError: the array or its row of meta.jsonl is missing or damaged, or they do not fit each other.
    """
    clip = read(path)
    picked = _nearest(clip.seconds, sampling.wanted(clip.duration))
    height, width = clip.frames.shape[1:3] if size is None else size
    pixels = (allocate or plain_memory)((len(picked), height, width, 3))
    upright = Upright(size)
    for place, index in enumerate(picked):
        if place and index == picked[place - 1]:
            pixels[place] = pixels[place - 1]
        elif size is None:
            pixels[place] = clip.frames[index]
        else:
            pixels[place] = upright(VideoFrame.from_ndarray(np.ascontiguousarray(clip.frames[index]), format="rgb24"))
    return Pictures(pixels, [clip.seconds[index] for index in picked], clip.duration)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Describe a frame array: `frames` are those stored (without padding), `fps` their mean rate, `codec` is "npy".

    Raises:
        VideoError: as `pictures`.
    """
    clip = read(path)
    count, height, width, _ = clip.frames.shape
    gaps = [later - earlier for earlier, later in pairwise(clip.seconds)]
    variable = bool(gaps) and max(gaps) - min(gaps) > UNEVEN
    return VideoInfo(Path(path), clip.duration, count, count / clip.duration, width, height, "npy", 0, variable)


def read(path: str | os.PathLike[str]) -> Clip:
    """Map a frame array and look its times up.

    Raises:
        VideoError: as `pictures`.
    """
    frames = _mapped(path)
    try:
        return _clip(frames, _row(path))
    except ValueError as error:
        raise VideoError(path, f"does not fit its row of {META}: {error}; extract it again") from error


def _mapped(path: str | os.PathLike[str]) -> np.ndarray:
    check_regular(path)
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise VideoError(path, f"cannot be read as .npy ({error}): extract it again") from error
    if not isinstance(frames, np.ndarray):
        raise VideoError(path, "is an archive of arrays; a frame array is one array: np.save")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise VideoError(path, f"holds {frames.dtype} {frames.shape}; a frame array is uint8 (T, H, W, 3)")
    return frames


def _row(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    file = Path(path)
    try:
        meta = _read_meta(*_meta_state(path))
    except OSError as error:
        raise VideoError(path, f"the {META} beside it cannot be read: {error.strerror or error}") from error
    row = meta.rows.get(file.name.removesuffix(file.suffix))
    if row is None:
        unread = (
            f" ({len(meta.unread)} of its lines cannot be read, first line {meta.unread[0]})" if meta.unread else ""
        )
        raise VideoError(
            path,
            f"the {META} beside it has no row for it{unread}, so its frames have no times: write the row, extract the "
            "array again, or use the video file",
        )
    return row


def _meta_state(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    try:
        return file_state(Path(path).with_name(META))
    except VideoError as error:
        raise VideoError(
            path, f"there is no {META} beside it, so its frames have no times: put it there, or use the video file"
        ) from error


@functools.lru_cache(_FOLDERS)
def _read_meta(path: str, size: int, changed: int) -> _Meta:
    rows: dict[str, Mapping[str, Any]] = {}
    unread = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
                rows[row["video_id"]] = {key: row[key] for key in _NEEDED if key in row}  # the last of several stands
            except (ValueError, TypeError, KeyError, RecursionError):
                unread.append(number)  # a line cut off by a kill is its own video's loss alone
    return _Meta(rows, unread)


def _clip(frames: np.ndarray, row: Mapping[str, Any]) -> Clip:
    """The array with its times. Raises ValueError where they cannot be of the same video."""
    stored = len(frames)
    if row.get("output_num_frames", stored) != stored:
        raise ValueError(f"that speaks of {row['output_num_frames']} frames, the array has {stored}")
    count = row.get("sampled_frames_before_even_pad", stored) if row.get("even_pad_applied") else stored
    if type(count) is not int or not 1 <= count <= stored:
        raise ValueError(f"'sampled_frames_before_even_pad' is {count!r} of {stored} frames")
    times = row.get("sampled_timestamps_sec")
    if not isinstance(times, list) or not all(map(_is_number, times)):
        raise ValueError("'sampled_timestamps_sec' is not there, or no list of seconds")
    if not count <= len(times) <= stored:
        raise ValueError(f"it has {len(times)} times for {stored} frames")
    seconds = [float(time) for time in times[:count]]
    if seconds[0] < 0 or any(later < earlier for earlier, later in pairwise(seconds)):
        raise ValueError("its times do not ascend from 0 on")
    duration: Any = row.get("source_duration_sec")
    if not _is_number(duration) or duration <= 0:
        raise ValueError(f"'source_duration_sec' must be above 0, is {duration!r}")
    return Clip(frames[:count], seconds, float(duration))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _nearest(seconds: Sequence[float], wanted: Iterable[float]) -> list[int]:
    """For each wanted time the index of the nearest of ascending times; of two as near, the earlier."""
    times = np.array(seconds)
    between = (times[1:] + times[:-1]) / 2
    return [int(index) for index in np.searchsorted(between, np.array(list(wanted)), side="left")]
