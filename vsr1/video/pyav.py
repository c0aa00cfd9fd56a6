"""The PyAV backend: frames of a file at wanted times, decoded by FFmpeg on the CPU into memory that the caller may provide.

The stream is walked once in presentation order, and for each wanted time the frame on display then is kept. Where the next
wanted time lies beyond a later key frame the walk jumps there instead of decoding what nobody asked for. Nothing here
needs torch, so that decoding processes start fast.
"""

from __future__ import annotations

import bisect
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from vsr1.errors import VideoError
from vsr1.video.probe import (
    MATROSKA,
    MP4,
    SMALL_AREA,
    WORTH_A_JUMP,
    check_whole,
    display_allowance,
    duration_of,
    keyframes,
    opened,
    quarter_turns,
    stamp,
    tick_of,
    turned,
)
from vsr1.video.sampling import Sampling

Shown = Callable[[int, int], bool]  # whether a frame displayed from one to another tick is wanted
AHEAD = 8  # packets that are read before one is decoded, to learn when its frame leaves the display
RESIZED = int(Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT)
"""Cubic, of a kernel as wide as what becomes one pixel; without the other two all pixels come out up to two levels darker."""
Allocate = Callable[[tuple[int, int, int, int]], np.ndarray]
"""Gives the memory for pixels of a shape (T, H, W, 3), uint8."""


@dataclass(frozen=True)
class Pictures:
    """`Frames` without torch: `pixels` (T, H, W, 3) uint8, `seconds` of each, and the video's `duration`."""

    pixels: np.ndarray
    seconds: list[float]
    duration: float


def pictures(
    path: str | os.PathLike[str],
    sampling: Sampling,
    *,
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    allocate: Allocate | None = None,
) -> Pictures:
    """Decode the frames displayed at the wanted times, as `vsr1.video.decode` does, into what `allocate` gives."""
    with opened(path, threads) as (container, stream):
        duration = duration_of(path, container, stream)
        collector = _Collector(sampling.wanted(duration), display_allowance(stream), size, allocate or plain_memory)
        collector.collect(path, container, stream, duration)
        return Pictures(collector.pixels, collector.seconds, duration)


def plain_memory(shape: tuple[int, int, int, int]) -> np.ndarray:
    return np.empty(shape, np.uint8)


class _Collector:
    """The frame on display at each wanted time: `pixels`, and the `seconds` at which each is first displayed."""

    def __init__(self, wanted: list[float], allowance: float, size: tuple[int, int] | None, allocate: Allocate) -> None:
        self.wanted, self.allowance, self.allocate = wanted, allowance, allocate
        self.upright = Upright(size)
        self.pixels = np.empty(0, np.uint8)
        self.seconds: list[float] = []

    def collect(
        self, path: str | os.PathLike[str], container: InputContainer, stream: VideoStream, duration: float
    ) -> None:
        previous: tuple[float, VideoFrame] | None = None
        for time, frame in _walk(path, container, stream, self.wanted, lambda: self.wanted[len(self.seconds)]):
            begun = len(self.seconds)
            due = bisect.bisect_left(self.wanted, time - self.allowance, lo=begun) - begun
            if previous is not None and due:
                self._take(*previous, due)
            if len(self.seconds) == len(self.wanted):
                return
            previous = (time, frame)
        if previous is None:
            raise VideoError(path, "no frame can be decoded")
        end = previous[0] + (previous[1].duration or 0) * tick_of(stream)
        check_whole(path, container, stream, duration, end, self.wanted[-1])
        self._take(*previous, len(self.wanted) - len(self.seconds))

    def _take(self, time: float, frame: VideoFrame, repeats: int) -> None:
        picture = self.upright(frame)
        if not self.seconds:
            height, width, _ = picture.shape
            self.pixels = self.allocate((len(self.wanted), height, width, 3))
        self.pixels[len(self.seconds) : len(self.seconds) + repeats] = picture
        self.seconds.extend([time] * repeats)


class Upright:
    """Frames as (H, W, 3) uint8 RGB, turned upright; all get the size (or `size` once upright) and the turn of the first."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self._size = size
        self._reformatter = VideoReformatter()
        self._first: tuple[int, int, int] | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        if self._first is None:
            turns = quarter_turns(frame)
            height, width = (frame.height, frame.width) if self._size is None else turned(self._size, turns)
            self._first = width, height, turns
        width, height, turns = self._first
        # threads=1: swscale's own pool costs more than converting a frame.
        converted = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation=None if self._size is None else RESIZED,
            threads=1,
        )
        pixels = converted.to_ndarray()
        return np.rot90(pixels, turns) if turns else pixels


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
    while True:
        wanted = next_wanted()
        if wanted - time >= WORTH_A_JUMP and wanted > considered:
            considered = wanted  # once per wanted time, whatever key frame the jump lands on
            target = start + int(wanted / tick)
            if any(start + time / tick < key <= target for key in keyframes(path, container, stream)):
                frames = _jump(path, container, stream, start, target, shown)
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
    shown: Shown,
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
    path: str | os.PathLike[str], container: InputContainer, stream: VideoStream, shown: Shown
) -> Iterator[VideoFrame]:
    """Frames in presentation order, without those that are not `shown` and that no other is predicted from.

    Only H.264 says of each packet whether anything refers to it, and lets the decoder drop the others unread. Small
    frames are decoded faster than they are judged.
    """
    codec = stream.codec_context
    skips = (
        codec.name == "h264" and container.format.name in (MP4, MATROSKA) and codec.width * codec.height > SMALL_AREA
    )
    packets = container.demux(stream)
    for packet, end in _ahead(packets) if skips else zip(packets, repeat(None)):
        if packet.is_corrupt:
            raise VideoError(path, "a damaged frame (truncated file?)")
        if skips:
            wanted = packet.pts is None or end is None or shown(packet.pts, end)
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
