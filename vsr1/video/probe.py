"""What a video file says about itself. `opened` is the one door to PyAV: every failure leaves it as a `VideoError`.

`probe` and `decode` both go through `opened`, which checks the path, opens the container, finds the video stream and
turns whatever FFmpeg raises meanwhile into one error that names the file and the reason.

Some containers must be read through before they say how long they are (MPEG-TS) or where their key frames lie (Matroska):
that is remembered for the last thousand files, until a file's size or time of change differs.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import av
import av.error
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vsr1.errors import VideoError

Result = TypeVar("Result")
MICROSECOND = 1e-6  # the unit of a container's duration
MP4, MATROSKA, AVI = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"  # FFmpeg's names of formats
NO_CLOCK = "its frames carry no presentation times; put the stream into an mp4 or mkv file"
SMALL_AREA = 256 * 256  # pixels; below it starting decoder threads costs more than the decoding
LISTS = {"concat", "dash", "ffmetadata", "hls", "imf", "lavfi", "rtsp", "sdp", "tedcaptions", "webm_dash_manifest"}
WORTH_A_JUMP = 2.0  # seconds; over a shorter gap reading on beats emptying the decoder and starting at a key frame
# Seconds by which a whole file may end before its header says: frames without a duration (Matroska) count as nothing.
SHORTFALL = 0.25
UNEVEN = 1e-3  # seconds (or one tick, if that is longer) by which a container's clock may make even intervals differ
REMEMBERED = 1024  # files of which the timeline is kept; key frames of an hour of film are some 20 KB


@dataclass(frozen=True)
class Timeline:
    """What reading all of a stream tells: how many `frames`, the `seconds` they cover, and whether their rate varies."""

    frames: int
    seconds: float
    variable: bool


@dataclass(frozen=True)
class VideoInfo:
    """A video as it is displayed: `seconds` of duration, `frames` in the file, mean `fps`, `width` x `height` pixels.

    `width` and `height` are those after `rotation` (degrees counter-clockwise, a multiple of 90). `variable`: some frames
    are displayed longer than others (by more than a millisecond, the least that every container can say).
    """

    path: Path
    seconds: float
    frames: int
    fps: float
    width: int
    height: int
    codec: str
    rotation: int
    variable: bool


@contextmanager
def opened(path: str | os.PathLike[str], threads: int | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the first video stream of a local file for decoding with `threads` threads (None: one if it is small).

    Raises:
        VideoError: the file is missing, a folder, empty, no video, or FFmpeg fails inside the block.
    """
    check_regular(path)
    try:
        # An absolute path is never read as a protocol ("a:b.mp4").
        options = {"protocol_whitelist": "file", "format_whitelist": _formats()}
        with av.open(os.path.abspath(path), options=options, metadata_errors="replace") as container:
            # The cover picture of a music file is a video stream to FFmpeg, not to anybody else.
            moving = [item for item in container.streams.video if not item.disposition & Disposition.attached_pic]
            if not moving:
                raise VideoError(path, "holds no video stream")
            stream = moving[0]
            if not stream.codec_context.width:
                raise VideoError(path, "holds a video stream without a readable header (truncated?)")
            small = stream.codec_context.width * stream.codec_context.height <= SMALL_AREA
            stream.codec_context.thread_count = (1 if small else 0) if threads is None else threads
            stream.codec_context.thread_type = "NONE" if stream.codec_context.thread_count == 1 else "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(path, error.strerror or str(error)) from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise VideoError for what is no file that can be read from its beginning to its end, or is empty."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise VideoError(path, error.strerror or str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(path, "is a folder, not a video file")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer for ever
        raise VideoError(path, "is not a regular file")
    if status.st_size == 0:
        raise VideoError(path, "the file is empty")


@functools.cache
def _formats() -> str:
    """The formats that hold frames themselves. A list of other files may be named mp4, too, and name itself, or any file."""
    return ",".join(sorted(av.formats_available - LISTS))


def stamp(path: str | os.PathLike[str], frame: VideoFrame) -> int:
    """The presentation time of a frame in ticks of its stream's clock."""
    if frame.pts is None:
        raise VideoError(path, NO_CLOCK)
    return frame.pts


def tick_of(stream: VideoStream) -> float:
    """Seconds of one tick of the stream's clock."""
    return float(stream.time_base or 0)


def display_allowance(stream: VideoStream) -> float:
    """Seconds by which a frame may come after a wanted time and still be the one on display then.

    Half a tick: containers round 2/3 s to their clock (0.667 s in Matroska), and that frame is on display at 2/3 s. But no
    more than half a millisecond, as clocks slower than that (AVI's) count frames and round nothing.
    """
    return min(tick_of(stream), 1e-3) / 2 + 1e-9


def check_whole(
    path: str | os.PathLike[str],
    container: InputContainer,
    stream: VideoStream,
    duration: float,
    end: float,
    last_wanted: float,
) -> None:
    """Raise VideoError where the frames `end` so early that the `last_wanted` time is not theirs to serve."""
    # A container's duration may be that of its sound; the stream's own, or that of a film without sound, is a promise.
    promised = stream.duration or len(container.streams) == 1
    if promised and last_wanted >= end and duration - end > SHORTFALL:
        raise VideoError(path, f"ends at {end:.2f} s of {duration:.2f} s (truncated?)")


def quarter_turns(frame: VideoFrame) -> int:
    """How many quarter turns counter-clockwise the stored frame needs to stand upright, 0..3."""
    return round(frame.rotation / 90) % 4


def turned(size: tuple[int, int], turns: int) -> tuple[int, int]:
    """A size after so many quarter turns, which is also the one before them."""
    return size[::-1] if turns % 2 else size


def first_frame(path: str | os.PathLike[str], container: InputContainer, stream: VideoStream) -> VideoFrame:
    """The next frame that can be decoded; VideoError where there is none."""
    frame = next(container.decode(stream), None)
    if frame is None:
        raise VideoError(path, "no frame can be decoded")
    return frame


def file_state(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    """What names a file as it is now: absolute path, size in bytes, and time of change. VideoError where it is missing."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise VideoError(path, error.strerror or str(error)) from error
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def duration_of(path: str | os.PathLike[str], container: InputContainer, stream: VideoStream) -> float:
    """Seconds from the first displayed frame to the end of the last.

    Taken from the header of formats that have one; in the others FFmpeg only guesses, so their packets are read.
    """
    if container.format.name == AVI and stream.frames:
        # By the number of frames, one a tick: FFmpeg shortens the duration of a file that ends early as if it were whole.
        return max(stream.frames, stream.duration or 0) * tick_of(stream)
    if container.format.name in (MP4, MATROSKA, AVI):
        if stream.duration:
            return stream.duration * tick_of(stream)
        if container.duration:
            return container.duration * MICROSECOND - max(0.0, (stream.start_time or 0) * tick_of(stream))
    return scan(path).seconds


def scan(path: str | os.PathLike[str]) -> Timeline:
    """Read the whole stream without decoding it; what it tells is remembered."""
    return _remembered(_scanned, path)


def keyframes(path: str | os.PathLike[str], container: InputContainer, stream: VideoStream) -> tuple[int, ...]:
    """Where, in ticks, a jump can land; empty for containers that give frames other times after one.

    An mp4 lists its key frames at the front. Matroska's list lies at the end, or has to be made by reading; it is remembered.
    """
    if container.format.name == MATROSKA:
        return _remembered(_matroska_keyframes, path)
    return _key_entries(stream) if container.format.name == MP4 else ()


def _remembered(read: Callable[[str, int, int], Result], path: str | os.PathLike[str]) -> Result:
    """What `read` (cached) says of the file as it is now; its errors name the path as it was given."""
    try:
        return read(*file_state(path))
    except VideoError as error:
        raise VideoError(path, error.reason) from error


@functools.lru_cache(REMEMBERED)
def _scanned(path: str, size: int, changed: int) -> Timeline:
    with opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        starts = sorted(packet.pts for packet in packets if packet.pts is not None)
        if not starts:
            raise VideoError(path, NO_CLOCK)
        end = max(packet.pts + (packet.duration or 0) for packet in packets if packet.pts is not None)
        return Timeline(len(packets), (end - starts[0]) * tick_of(stream), _uneven(starts, stream))


@functools.lru_cache(REMEMBERED)
def _matroska_keyframes(path: str, size: int, changed: int) -> tuple[int, ...]:
    with opened(path) as (container, stream):  # apart, as the jump to the end cannot be undone
        if container.duration is None:
            return ()
        container.seek(int(container.duration * MICROSECOND / tick_of(stream)), stream=stream)
        return _key_entries(stream)


def _key_entries(stream: VideoStream) -> tuple[int, ...]:
    return tuple(entry.timestamp for entry in stream.index_entries if entry.is_keyframe)


def _uneven(ticks: list[int], stream: VideoStream) -> bool:
    """Whether ascending times lie at intervals that differ by more than what rounding to the clock does."""
    intervals = [later - earlier for earlier, later in pairwise(ticks)]
    allowed = max(UNEVEN / tick_of(stream), 1)
    return bool(intervals) and max(intervals) - min(intervals) > allowed


def _varies(path: str | os.PathLike[str], stream: VideoStream) -> bool:
    """Whether the frame rate is variable: by the index if it lists every frame (decoding times: the same intervals)."""
    entries = list(stream.index_entries)
    if stream.frames and len(entries) == stream.frames:
        return _uneven(sorted(entry.timestamp for entry in entries), stream)
    return scan(path).variable


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Describe a video file; its first frame is decoded, so a file that passes really opens.

    Raises:
        VideoError: the file is missing, damaged, or holds no video frame.
    """
    with opened(path) as (container, stream):
        seconds = duration_of(path, container, stream)
        frames = stream.frames or scan(path).frames
        variable = _varies(path, stream)
        frame = first_frame(path, container, stream)
        turns = quarter_turns(frame)
        width, height = turned((frame.width, frame.height), turns)
        fps = float(stream.average_rate) if stream.average_rate else frames / seconds
        return VideoInfo(
            Path(path), seconds, frames, fps, width, height, stream.codec_context.name, 90 * turns, variable
        )
