"""What decoding gives, whichever backend did it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device


@dataclass(frozen=True)
class Frames:
    """Sampled frames of one video.

    `pixels` (T, H, W, 3) uint8 RGB, upright. `seconds` (T,) float64: when each frame is first displayed, counted
    from the video's first frame. `duration` in seconds; `source` is the file.
    """

    pixels: Tensor
    seconds: Tensor
    duration: float
    source: Path

    def __len__(self) -> int:
        return int(self.seconds.shape[0])

    def to(self, target: str | device) -> Frames:
        """The same frames with their pixels on a device; the times stay in CPU memory."""
        return replace(self, pixels=self.pixels.to(target))
