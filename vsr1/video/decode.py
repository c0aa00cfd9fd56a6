"""Frames of a file at chosen presentation times: the clock is the file's own, never an index divided by a guess.

`decode` turns its sampling arguments into wanted times, walks the stream once in presentation order, and keeps for
each time the frame on display then. Where the next wanted time lies beyond a later key frame it jumps there instead
of decoding what nobody asked for. `decode_many` does this for a list of files on a bounded pool of threads (FFmpeg
works outside the interpreter lock) and hands errors back as values, so one bad file never ends a run.
"""

from __future__ import annotations

import bisect
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from vsr1.errors import VideoError
from vsr1.video.frames import Frames
from vsr1.video.probe import (
    MATROSKA,
    MP4,
    SMALL_AREA,
    WORTH_A_JUMP,
    check_whole,
    display_allowance,
    duration_of,
    opened,
    quarter_turns,
    stamp,
    tick_of,
)
from vsr1.video.sampling import Sampling

Shown = Callable[[int, int], bool]  # whether a frame displayed from one to another tick is wanted
AHEAD = 8  # packets that are read before one is decoded, to learn when its frame leaves the display


def decode(
    path: str | os.PathLike[str],
    *,
    times: Sequence[float] | None = None,
    fps: float | None = None,
    count: int | None = None,
    max_frames: int | None = None,
    span: tuple[float, float] | None = None,
    threads: int | None = None,
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
        threads: decoder threads; None takes one for small frames and one per core for large ones.

    Raises:
        ValueError: the sampling arguments contradict each other or are out of range.
        VideoError: the file is missing, damaged, cut short before a wanted time, or holds no video.
    """
    sampling = Sampling(times, fps, count, max_frames, span)
    with opened(path, threads) as (container, stream):
        duration = duration_of(path, container, stream)
        pixels, seconds = _collect(path, container, stream, duration, sampling.wanted(duration))

    import torch  # here and not above: processes that only encode or probe must not load it

    return Frames(torch.from_numpy(pixels), torch.tensor(seconds, dtype=torch.float64), duration, Path(path))


def decode_many(
    paths: Iterable[str | os.PathLike[str]],
    *,
    workers: int = 0,
    times: Sequence[float] | None = None,
    fps: float | None = None,
    count: int | None = None,
    max_frames: int | None = None,
    span: tuple[float, float] | None = None,
) -> Iterator[tuple[Path, Frames | VideoError]]:
    """Decode many files with `workers` threads (0: one per core), in the order given, one thread a file.

    At most two files a worker are held decoded and unread. A file that fails yields its `VideoError` in place of
    frames. Sampling arguments are those of `decode`.
    """
    Sampling(times, fps, count, max_frames, span)  # complains now, not in a worker
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")

    def task(path: Path) -> Frames | VideoError:
        try:
            return decode(path, times=times, fps=fps, count=count, max_frames=max_frames, span=span, threads=1)
        except VideoError as error:
            return error

    def results() -> Iterator[tuple[Path, Frames | VideoError]]:
        number = workers or os.cpu_count() or 1
        pending: deque[tuple[Path, Future[Frames | VideoError]]] = deque()
        executor = ThreadPoolExecutor(number, thread_name_prefix="vsr1-decode")
        try:
            for path in map(Path, paths):
                pending.append((path, executor.submit(task, path)))
                if len(pending) >= 2 * number:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            executor.shutdown(cancel_futures=True)

    return results()


def _collect(
    path: str | os.PathLike[str], container: InputContainer, stream: VideoStream, duration: float, wanted: list[float]
) -> tuple[np.ndarray, list[float]]:
    """The frame on display at each wanted time: pixels (T, H, W, 3) and the time each is first displayed."""
    upright = _Upright()
    pixels = np.empty(0, np.uint8)
    seconds: list[float] = []
    allowance = display_allowance(stream)

    def take(time: float, frame: VideoFrame, repeats: int) -> None:
        nonlocal pixels
        picture = upright(frame)
        if not seconds:
            pixels = np.empty((len(wanted), *picture.shape), np.uint8)
        pixels[len(seconds) : len(seconds) + repeats] = picture
        seconds.extend([time] * repeats)

    previous: tuple[float, VideoFrame] | None = None
    for time, frame in _walk(path, container, stream, wanted, lambda: wanted[len(seconds)]):
        due = bisect.bisect_left(wanted, time - allowance, lo=len(seconds)) - len(seconds)
        if previous is not None and due:
            take(*previous, due)
        if len(seconds) == len(wanted):
            return pixels, seconds
        previous = (time, frame)
    if previous is None:
        raise VideoError(path, "no frame can be decoded")
    end = previous[0] + (previous[1].duration or 0) * tick_of(stream)
    check_whole(path, container, stream, duration, end, wanted[-1])
    take(*previous, len(wanted) - len(seconds))
    return pixels, seconds


class _Upright:
    """Frames as (H, W, 3) uint8 RGB, turned upright; all get the size and the turn of the first."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._first: tuple[int, int, int] | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        self._first = self._first or (frame.width, frame.height, quarter_turns(frame))
        width, height, turns = self._first
        # threads=1: swscale's own pool costs more than converting a frame.
        converted = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
        return np.rot90(converted.to_ndarray(), turns)


def _walk(
    path: str | os.PathLike[str],
    container: InputContainer,
    stream: VideoStream,
    wanted_times: Sequence[float],
    next_wanted: Callable[[], float],
) -> Iterator[tuple[float, VideoFrame]]:
    """Frames in presentation order with their seconds; those that are on display at no wanted time may be skipped.

    Only mp4 and Matroska can be trusted to give frames the same times after a jump; the others are read through.
    """
    tick = tick_of(stream)
    start: int | None = None
    slack = 2 * display_allowance(stream)

    def shown(begin: int, end: int) -> bool:
        """Whether a frame displayed from `begin` to `end` (ticks) is wanted, as far as is known."""
        if start is None:
            return True
        after = bisect.bisect_left(wanted_times, (begin - start) * tick - slack)
        return after < len(wanted_times) and wanted_times[after] <= (end - start) * tick + slack

    frames = _frames(path, container, stream, shown)
    first = next(frames, None)
    if first is None:
        return
    start = stamp(path, first)
    yield 0.0, first
    time, considered = 0.0, 0.0
    keys: list[int] | None = None if container.format.name in (MP4, MATROSKA) else []
    while True:
        wanted = next_wanted()
        if wanted - time >= WORTH_A_JUMP and wanted > considered:
            considered = wanted  # once per wanted time, whatever key frame the jump lands on
            target = start + int(wanted / tick)
            if keys is None or any(start + time / tick < key <= target for key in keys):
                frames = _jump(path, container, stream, start, target, shown)
            if keys is None:  # only now: Matroska's index lies at its end and is read at the first jump
                keys = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
        frame = next(frames, None)
        if frame is None:
            return
        time = (stamp(path, frame) - start) * tick
        yield time, frame


def _jump(
    path: str | os.PathLike[str],
    container: InputContainer,
    stream: VideoStream,
    start: int,
    target: int,
    shown: Shown | None = None,
) -> Iterator[VideoFrame]:
    """Frames from a key frame that is displayed no later than `target` (ticks), or else from the `start`.

    An index may be wrong; the frame it leads to says so.
    """
    for ticks in (target, start):
        container.seek(ticks, stream=stream)
        frames = _frames(path, container, stream, shown)
        frame = next(frames, None)
        if frame is not None and stamp(path, frame) <= target:
            return chain([frame], frames)
    raise VideoError(path, f"its index leads to no frame at or before {(target - start) * tick_of(stream):.2f} s")


def _frames(
    path: str | os.PathLike[str], container: InputContainer, stream: VideoStream, shown: Shown | None
) -> Iterator[VideoFrame]:
    """Frames in presentation order, without those that are not `shown` (None: all are) and that no other is predicted from.

    Only H.264 says of each packet whether anything refers to it, and lets the decoder drop the others unread. Small
    frames are decoded faster than they are judged.
    """
    codec = stream.codec_context
    skips = (
        codec.name == "h264" and container.format.name in (MP4, MATROSKA) and codec.width * codec.height > SMALL_AREA
    )
    for packet, end in _ahead(container.demux(stream)):
        if packet.is_corrupt:
            raise VideoError(path, "a damaged frame (truncated file?)")
        if skips:
            wanted = shown is None or packet.pts is None or end is None or shown(packet.pts, end)
            codec.skip_frame = "DEFAULT" if wanted else "NONREF"
        yield from stream.decode(packet)


def _ahead(packets: Iterable[Packet]) -> Iterator[tuple[Packet, int | None]]:
    """Packets, each with a time at which the next frame is on display, if one among the packets that follow says so.

    The next frame in presentation order may hide behind them, but then it is displayed even earlier.
    """
    waiting: deque[Packet] = deque()

    def end(packet: Packet) -> int | None:
        later = (other.pts for other in waiting if other.pts is not None and not other.is_discard)
        return None if packet.pts is None else min((pts for pts in later if pts > packet.pts), default=None)

    for packet in packets:
        waiting.append(packet)
        if len(waiting) > AHEAD:
            first = waiting.popleft()
            yield first, end(first)
    while waiting:
        first = waiting.popleft()
        yield first, end(first)
