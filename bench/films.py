"""Films whose frames say their number: a textured background that moves, grain, cuts, and bits painted over it.

They are made once (x264 and its like at their defaults but for speed, key frames where an encoder's default or a streaming
service would put them), and kept in the system's temporary folder, because encoding takes longer than what is measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

FOLDER = Path(tempfile.gettempdir()) / "vsr1-films-1"  # another number where the pictures change
RATE = 30  # frames a second
BITS = 12
OPTIONS = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "row-mt": "1", "crf": "32", "b": "0"},
}
_MARGIN = 256  # pixels that the background has to move in


@dataclass(frozen=True)
class Film:
    """What to encode: H.264 unless told otherwise, `key` frames from key frame to key frame, `rotation` as phones write it."""

    height: int
    width: int
    seconds: int
    codec: str = "libx264"
    key: int = 250
    rotation: int = 0

    @property
    def frames(self) -> int:
        return self.seconds * RATE

    @property
    def path(self) -> Path:
        ending = "webm" if self.codec == "libvpx-vp9" else "mp4"
        name = f"{self.codec}-{self.width}x{self.height}-{self.seconds}s-key{self.key}-turned{self.rotation}.{ending}"
        return FOLDER / name


def numbered(plane: np.ndarray, number: int) -> None:
    """Paint `number` into a plane (H, W) of brightness: twelve blocks across the middle, the lowest bit on the left."""
    height, width = plane.shape
    for bit in range(BITS):
        left, right = (width * place // BITS for place in (bit, bit + 1))
        plane[height * 3 // 8 : height * 5 // 8, left:right] = 235 if number >> bit & 1 else 16


def read_numbers(pixels: np.ndarray) -> list[int]:
    """The numbers of frames (T, H, W, 3) uint8."""
    height, width = pixels.shape[1:3]
    line = pixels[:, height * 7 // 16 : height * 9 // 16].mean((1, 3))
    middles = [width * (2 * bit + 1) // (2 * BITS) for bit in range(BITS)]
    reach = width // (4 * BITS)
    bits = np.stack([line[:, middle - reach : middle + reach].mean(1) > 128 for middle in middles], 1)
    return (bits @ (1 << np.arange(BITS))).tolist()


def make(film: Film, tell: Callable[[str], None] = print) -> Path:
    """The film's file, encoded unless it is there."""
    path = film.path
    if path.exists():
        return path
    tell(f"encoding {path}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{os.getpid()}-{path.name}")
    with av.open(aside, "w") as container:
        stream = container.add_stream(film.codec, rate=RATE, options=OPTIONS[film.codec])
        stream.width, stream.height, stream.pix_fmt = film.width, film.height, "yuv420p"
        stream.codec_context.gop_size = film.key
        stream.codec_context.thread_type = "FRAME"  # PyAV's own choice makes x264 cut every picture into slices
        stream.codec_context.thread_count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        if film.rotation:
            stream.set_display_rotation(film.rotation)
        picture = _pictures(film)
        for index in range(film.frames):
            container.mux(stream.encode(VideoFrame.from_ndarray(picture(index), format="yuv420p")))
        container.mux(stream.encode())
    aside.replace(path)
    return path


def _pictures(film: Film) -> Callable[[int], np.ndarray]:
    """Frame `index` as planes on top of each other: (3/2 H, W) uint8."""
    rng = np.random.default_rng(0)
    height, width = film.height, film.width
    rows, columns = height + _MARGIN, width + _MARGIN
    texture = np.full((rows, columns), 120.0)
    for size, strength in ((64, 30), (16, 15), (4, 8), (2, 4)):
        blocks = rng.normal(size=(rows // size + 1, columns // size + 1))
        texture += strength * np.kron(blocks, np.ones((size, size)))[:rows, :columns]
    luma = np.clip(texture, 24, 220).astype(np.uint8)
    chroma = np.clip(128 + (texture[::2, ::2] - 120) / 2, 64, 192).astype(np.uint8)
    grain = rng.integers(0, 5, (rows, columns), dtype=np.uint8)

    def picture(index: int) -> np.ndarray:
        scene = index // (7 * RATE)
        down = 2 * int((_MARGIN / 4 - 1) * (1 + np.sin(index / 40 + scene)))
        across = 2 * ((index + 37 * scene) % (_MARGIN // 2))
        there = rng.integers(0, _MARGIN, 2)
        planes = np.empty((height * 3 // 2, width), np.uint8)
        planes[:height] = luma[down : down + height, across : across + width]
        planes[:height] += grain[there[0] : there[0] + height, there[1] : there[1] + width]
        numbered(planes[:height], index)
        small = chroma[down // 2 : (down + height) // 2, across // 2 : (across + width) // 2]
        planes[height:] = np.concatenate([small.ravel(), 255 - small.ravel()]).reshape(height // 2, width)
        middle = slice(height * 3 // 16, height * 5 // 16)
        planes[height:].reshape(2, height // 2, width // 2)[:, middle] = 128
        return planes

    return picture
