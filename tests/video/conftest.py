"""Video files whose frames carry their own number, so a decoded frame says which one it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

SIDE = 32


def numbered(index: int, side: int = SIDE) -> np.ndarray:
    """A frame that says `index` (below 256): its low four bits in the left half, its high four in the right."""
    frame = np.empty((side, side, 3), np.uint8)
    frame[:, : side // 2] = 16 * (index % 16)
    frame[:, side // 2 :] = 16 * (index // 16)
    return frame


@pytest.fixture
def numbered_frame() -> Callable[[int], np.ndarray]:
    return numbered


@pytest.fixture
def read_numbers() -> Callable[[torch.Tensor], list[int]]:
    """The numbers that decoded frames (T, H, W, 3) carry."""

    def read(pixels: torch.Tensor) -> list[int]:
        middle = pixels[:, pixels.shape[1] // 2].float().mean(-1)
        half, edge = pixels.shape[2] // 2, pixels.shape[2] // 16
        low, high = middle[:, edge : half - edge].mean(-1), middle[:, half + edge : -edge].mean(-1)
        return [round(float(a) / 16) + 16 * round(float(b) / 16) for a, b in zip(low, high, strict=True)]

    return read


@pytest.fixture
def write_numbered(tmp_path: Path) -> Callable[..., Path]:
    """Write numbered frames at the given presentation times (milliseconds) with any codec, container and rotation."""

    def write(
        name: str,
        milliseconds: Sequence[int],
        codec: str = "libx264",
        rotation: int = 0,
        clock: int = 1000,
        side: int = SIDE,
        pixels: str = "yuv420p",
        **options: str,
    ) -> Path:
        path = tmp_path / name
        with av.open(path, "w") as container:
            stream = container.add_stream(codec, rate=25, options={"crf": "10", **options})
            stream.width = stream.height = side
            stream.pix_fmt = pixels
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = Fraction(1, clock)
            if rotation:
                stream.set_display_rotation(rotation)
            for index, time in enumerate(milliseconds):
                frame = av.VideoFrame.from_ndarray(numbered(index, side), format="rgb24")
                frame.pts = round(time * clock / 1000)
                frame.time_base = Fraction(1, clock)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write
