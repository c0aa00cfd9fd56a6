"""The coded pictures that the wanted frames need, and nothing else, as a small mp4 in memory with a clock of its own.

Hardware decoders count frames and know nothing of presentation: edit lists, variable rates, sound, odd containers and
seeking go wrong there. So `excerpt` settles all of that here, without decoding. It reads packets as `decode` reads frames
(jumping over what nobody wants), finds for each wanted time the picture on display, and keeps its group (from the key
picture on, in coded order) up to the last picture wanted from it. What is kept is muxed with presentation times 0, 1,
2, ...: decoding the excerpt from its start gives picture n as frame n, whatever the file was.

Pictures that lead a key picture (displayed before it, coded after it: "open" groups) need the group before; it is kept
whole where one of them is wanted, and where it is not, they are left out.
"""

from __future__ import annotations

import bisect
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video.probe import (
    NO_CLOCK,
    WORTH_A_JUMP,
    check_whole,
    display_allowance,
    duration_of,
    first_frame,
    keyframes,
    opened,
    stamp,
    tick_of,
)
from vsr1.video.sampling import Sampling

CODECS = {"h264": "h264", "hevc": "hevc", "vp9": "vp9", "libvpx-vp9": "vp9", "av1": "av1", "libdav1d": "av1"}
"""The decoders whose streams an excerpt can carry, with the names of the codecs."""
CLOCK = Fraction(1, 1000)
INSTANT = 5
"""The type of an H.264 unit of a picture after which nothing refers to what came before it: not every key picture is one."""


@dataclass(frozen=True)
class Excerpt:
    """Coded pictures of one video.

    `data` (n,) uint8: an mp4. `frames`: which of its frames are wanted, ascending and each once. `rows`: for each
    wanted time its place in `frames`. `seconds`: for each wanted time when its frame is first displayed. `duration` is
    the video's. `first` is the video's first frame, decoded: size, rotation and colours are those of all. `pictures`:
    how many have to be decoded.
    """

    source: Path
    codec: str
    data: np.ndarray
    frames: list[int]
    rows: list[int]
    seconds: list[float]
    duration: float
    first: VideoFrame
    pictures: int


@dataclass(eq=False)
class _Picture:
    """A coded picture: when it is displayed, in ticks, and the packet that holds it."""

    pts: int
    packet: Packet

    @property
    def shown(self) -> bool:
        return not self.packet.is_discard


@dataclass(eq=False)
class _Group:
    """A key picture and what is coded after it up to the next. `before` is the group its leading pictures refer to."""

    pictures: list[_Picture]
    before: _Group | None
    kept: int = 0
    """How many of the pictures must be decoded."""
    leads: bool = False
    """Whether the leading pictures must be, too."""

    def shown(self) -> list[_Picture]:
        """The pictures that can be displayed, in that order."""
        earliest = self.pictures[0].pts if self.before is None else -math.inf
        visible = (picture for picture in self.pictures if picture.shown and picture.pts >= earliest)
        return sorted(visible, key=lambda picture: picture.pts)

    def keep(self, picture: _Picture) -> None:
        self.kept = max(self.kept, self.pictures.index(picture) + 1)
        if self.before is not None and picture.pts < self.pictures[0].pts:
            self.leads, self.before.kept = True, len(self.before.pictures)


def excerpt(path: str | os.PathLike[str], sampling: Sampling) -> Excerpt:
    """Cut out of a file what decoding the wanted frames takes.

    Raises:
        VideoError: the file is missing, damaged, cut short before a wanted time, or holds no video.
        BackendUnavailable: its codec does not go into an excerpt, or it begins with pictures that refer to missing ones.
    """
    with opened(path, threads=1) as (container, stream):
        codec = stream.codec_context.name
        if CODECS.get(codec) is None:
            raise BackendUnavailable(f"an excerpt carries {', '.join(CODECS)}, and video '{path}' is {codec}")
        with opened(path, threads=1) as others:  # apart: the packets are still to be read from the beginning
            first = first_frame(path, *others)
        reader = _Reader(path, container, stream, stamp(path, first), sampling)
        reader.read()
        seconds = [reader.time(picture) for picture in reader.chosen]
        data, places, pictures = _muxed(stream, reader.kept, reader.chosen)
    frames = sorted(set(places))
    rows = [frames.index(place) for place in places]
    return Excerpt(Path(path), CODECS[codec], data, frames, rows, seconds, reader.duration, first, pictures)


class _Reader:
    """One pass over the packets of a file: which pictures are `chosen`, and which groups must be `kept` for them."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        container: InputContainer,
        stream: VideoStream,
        start: int,
        sampling: Sampling,
    ) -> None:
        self.path, self.container, self.stream, self.start = path, container, stream, start
        self.duration = duration_of(path, container, stream)
        self.wanted = sampling.wanted(self.duration)
        self.tick = tick_of(stream)
        self.kept: list[_Group] = []
        self.chosen: list[_Picture] = []

    def read(self) -> None:
        """Find the picture on display at each wanted time."""
        last: list[_Picture] = []
        group = None
        for following in self._groups():
            shown = following.shown()
            if not shown:
                continue
            if group is None:
                if shown[0].pts != self.start:
                    raise BackendUnavailable(f"video '{self.path}' begins with pictures that refer to missing ones")
            else:
                self._choose(group, last, self.time(shown[0]))
                if len(self.chosen) == len(self.wanted):
                    return
            group, last = following, shown
        if group is None:
            raise VideoError(self.path, "no frame can be decoded")
        end = self.time(last[-1]) + (last[-1].packet.duration or 0) * self.tick
        check_whole(self.path, self.container, self.stream, self.duration, end, self.wanted[-1])
        self._choose(group, last, math.inf)

    def time(self, picture: _Picture) -> float:
        """When a picture is displayed, in seconds from the first."""
        return (picture.pts - self.start) * self.tick

    def _choose(self, group: _Group, shown: list[_Picture], until: float) -> None:
        """Choose for every wanted time that lies before `until` seconds, which is when the next group begins."""
        allowance = display_allowance(self.stream)
        times = [self.time(picture) - allowance for picture in shown]
        for wanted in self.wanted[len(self.chosen) : bisect.bisect_left(self.wanted, until - allowance)]:
            picture = shown[max(0, bisect.bisect_right(times, wanted) - 1)]
            group.keep(picture)
            self.chosen.append(picture)
        if group.before is not None:
            group.before.before = None  # or every group would hold all that came before it
        self.kept += [item for item in (group.before, group) if item and item.kept and item not in self.kept[-2:]]

    def _groups(self) -> Iterator[_Group]:
        """Groups in coded order; those without a wanted time may be skipped, where the container can be trusted."""
        considered = 0.0
        leads_elsewhere = False
        pictures: list[_Picture] = []
        before: _Group | None = None
        coming = self._pictures()
        while (picture := next(coming, None)) is not None:
            begins = self._begins(picture)
            if begins and pictures:
                yield (before := _Group(pictures, before))
                pictures = []
                wanted = self.wanted[len(self.chosen)]
                if wanted - self.time(picture) >= WORTH_A_JUMP and wanted > considered and not leads_elsewhere:
                    considered = wanted  # once per wanted time, whatever key picture the jump lands on
                    target = self.start + int(wanted / self.tick)
                    if any(picture.pts < key <= target for key in keyframes(self.path, self.container, self.stream)):
                        self.container.seek(target, stream=self.stream)
                        coming, before = self._pictures(), None
                        picture = next(coming, None)
                        if picture is None or picture.pts > target or not self._begins(picture):
                            leads_elsewhere = True  # such an index is not asked again
                            self.container.seek(self.start, stream=self.stream)
                            coming = self._pictures()
                            continue
            if begins or pictures:
                pictures.append(picture)
        if pictures:
            yield _Group(pictures, before)

    def _begins(self, picture: _Picture) -> bool:
        """Whether decoding can begin at this picture and go on after it."""
        if not picture.packet.is_keyframe or self.stream.codec_context.name != "h264":
            return bool(picture.packet.is_keyframe)
        header = self.stream.codec_context.extradata or b""
        return INSTANT in _unit_types(bytes(picture.packet), 1 + (header[4] & 3) if header[:1] == b"\1" else None)

    def _pictures(self) -> Iterator[_Picture]:
        for packet in self.container.demux(self.stream):
            if packet.is_corrupt:
                raise VideoError(self.path, "a damaged frame (truncated file?)")
            if packet.size:
                if packet.pts is None:
                    raise VideoError(self.path, NO_CLOCK)
                yield _Picture(packet.pts, packet)


def _unit_types(data: bytes, prefix: int | None) -> Iterator[int]:
    """The types of the units of an H.264 packet: each after its length in `prefix` bytes, or (None) after a start code."""
    position = 0
    while prefix is None and (position := data.find(b"\0\0\1", position) + 3) > 2 and position < len(data):
        yield data[position] & 31
    while prefix is not None and position + prefix < len(data):
        yield data[position + prefix] & 31
        position += prefix + int.from_bytes(data[position : position + prefix], "big")


def _muxed(stream: VideoStream, groups: list[_Group], chosen: list[_Picture]) -> tuple[np.ndarray, list[int], int]:
    """The kept pictures as an mp4, which of its frames each of the chosen is, and how many it holds."""
    coded = [
        picture
        for group in groups
        for picture in group.pictures[: group.kept]
        if group.leads or picture.pts >= group.pictures[0].pts
    ]
    order = sorted(range(len(coded)), key=lambda index: (coded[index].pts, index))
    place = {id(coded[index]): rank for rank, index in enumerate(order)}
    # No picture may be displayed before it is decoded.
    delay = max(index - place[id(picture)] for index, picture in enumerate(coded))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"use_editlist": "0"}) as container:
        track = container.add_stream_from_template(stream, opaque=True)
        track.time_base = CLOCK
        for index, picture in enumerate(coded):
            copy = Packet(bytes(picture.packet))
            copy.stream, copy.time_base, copy.is_keyframe = track, CLOCK, picture.packet.is_keyframe
            copy.dts, copy.pts = index, place[id(picture)] + delay
            container.mux(copy)
    return np.frombuffer(buffer.getvalue(), np.uint8), [place[id(picture)] for picture in chosen], len(coded)
