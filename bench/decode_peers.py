"""What decoding is measured against: each peer gives chosen frames of a file as (T, H, W, 3) uint8 RGB, the way its users do.

The public code of VideoSearch-R1 (arXiv 2607.00446) takes n = min(total, 64, max(1, floor(duration x fps))) frames at the
indices linspace(0, total - 1, n), cut to integers, by one OpenCV seek a frame: every one is decoded from the key frame before
it. (It then resizes them by PIL, which is left out here.) Written from that description.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

Read = Callable[[Path, Sequence[int]], np.ndarray]
PUBLIC = "public"
PUBLIC_FPS, PUBLIC_MOST = 1.0, 64
THREADS = (os.cpu_count() or 1) + 1  # what FFmpeg takes by itself, and the fastest for all of them


def public_indices(total: int, duration: float, fps: float = PUBLIC_FPS, most: int = PUBLIC_MOST) -> list[int]:
    """The frames that the public code takes of a file of `total` frames and `duration` seconds."""
    return uniform_indices(total, min(total, most, max(1, int(duration * fps))))


def uniform_indices(total: int, count: int) -> list[int]:
    """`count` frames from the first to the last."""
    return np.linspace(0, total - 1, count).astype(int).tolist()


def by_public(cv2: ModuleType) -> Read:
    def read(path: Path, indices: Sequence[int]) -> np.ndarray:
        film, pictures = cv2.VideoCapture(str(path)), []
        for index in indices:
            film.set(cv2.CAP_PROP_POS_FRAMES, index)
            good, picture = film.read()
            if not good:
                raise RuntimeError(f"OpenCV reads no frame {index} of '{path}'")
            pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        film.release()
        return np.stack(pictures)

    return read


def by_opencv(cv2: ModuleType) -> Read:
    """Reading on, converting only what is wanted: the best that OpenCV offers."""

    def read(path: Path, indices: Sequence[int]) -> np.ndarray:
        film, pictures, at = cv2.VideoCapture(str(path)), [], -1
        for index in indices:
            while at < index:
                if not film.grab():
                    raise RuntimeError(f"OpenCV reads no frame {at + 1} of '{path}'")
                at += 1
            pictures.append(cv2.cvtColor(film.retrieve()[1], cv2.COLOR_BGR2RGB))
        film.release()
        return np.stack(pictures)

    return read


def by_decord(decord: ModuleType) -> Read:
    def read(path: Path, indices: Sequence[int]) -> np.ndarray:
        return decord.VideoReader(str(path), num_threads=THREADS).get_batch(list(indices)).asnumpy()

    return read


def by_torchcodec(decoders: ModuleType) -> Read:
    def read(path: Path, indices: Sequence[int]) -> np.ndarray:
        film = decoders.VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=THREADS)
        return film.get_frames_at(list(indices)).data.numpy()

    return read


def peers() -> dict[str, Read | str]:
    """The peers by name; text that says why for those that cannot be imported."""
    ways = {
        PUBLIC: ("cv2", by_public, "pip install opencv-python-headless"),
        "OpenCV": ("cv2", by_opencv, "pip install opencv-python-headless"),
        "decord": ("decord", by_decord, "pip install decord"),
        "torchcodec": ("torchcodec.decoders", by_torchcodec, "pip install torchcodec, and FFmpeg's libraries"),
    }
    found: dict[str, Read | str] = {}
    for name, (module, way, missing) in ways.items():
        try:
            found[name] = way(import_module(module))
        except (ImportError, OSError, RuntimeError):
            found[name] = missing
    return found
