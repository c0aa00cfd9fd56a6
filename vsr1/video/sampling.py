"""Which times of a video are wanted: one description that every way of decoding takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Sampling:
    """Wanted presentation times, in seconds from the first displayed frame. Exactly one of `times`, `fps` and `count`.

    times: seconds, ascending; a time past the end means the last frame.
    fps: times 0, 1/fps, 2/fps, ... below the duration.
    count: `count` times 0, d/count, 2d/count, ... of the duration d.
    max_frames: if `fps` wants more frames than this, take this many by the rule of `count`; with `times` or `count` a
        plain upper limit.
    span: (start, end) seconds that `fps` and `count` sample instead of the whole; an end past the video's means its end.

    Raises:
        ValueError: the arguments contradict each other or are out of range.
    """

    times: Sequence[float] | None = None
    fps: float | None = None
    count: int | None = None
    max_frames: int | None = None
    span: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.times is not None:  # tuples, so that equal samplings have equal hashes
            object.__setattr__(self, "times", tuple(float(time) for time in self.times))
        if self.span is not None:
            object.__setattr__(self, "span", tuple(self.span))
        kinds = (("times", self.times), ("fps", self.fps), ("count", self.count))
        given = [name for name, value in kinds if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of times, fps and count; got {' and '.join(given) or 'none'}")
        if self.times is not None:
            if len(self.times) == 0 or not all(math.isfinite(time) and time >= 0 for time in self.times):
                raise ValueError(f"times must be one or more seconds from 0 on, got {list(self.times)}")
            if any(later < earlier for earlier, later in pairwise(self.times)):
                raise ValueError(f"times must ascend, got {list(self.times)}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.max_frames is not None:
            if self.max_frames < 1:
                raise ValueError(f"max_frames must be at least 1, got {self.max_frames}")
            asked = len(self.times) if self.times is not None else self.count
            if asked is not None and asked > self.max_frames:
                raise ValueError(f"{asked} frames are asked for, but max_frames is {self.max_frames}")
        if self.span is not None:
            if self.times is not None:
                raise ValueError("span must go with fps or count, not with times")
            if not 0 <= self.span[0] < self.span[1]:
                raise ValueError(f"span must be (start, end) seconds with 0 <= start < end, got {self.span}")

    def wanted(self, duration: float) -> list[float]:
        """The wanted times of a video of `duration` seconds, ascending; at least one."""
        if self.times is not None:
            return list(self.times)
        start, end = self.span or (0.0, duration)
        length = max(0.0, min(end, duration) - start)
        number = self.count
        if self.fps is not None:
            # The small allowance keeps 2.9999999999 s x 1 fps from becoming a fourth frame at the very end.
            number = max(1, math.ceil(length * self.fps - 1e-6))
            if self.max_frames is None or number <= self.max_frames:
                return [start + index / self.fps for index in range(number)]
            number = self.max_frames
        assert number is not None
        return [start + index * length / number for index in range(number)]
