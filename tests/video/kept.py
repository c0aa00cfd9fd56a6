"""Frames to put into a cache; apart from the tests, as the processes that write them need no torch."""

from __future__ import annotations

import numpy as np

from vsr1.video.pyav import Pictures


def noise(seed: int, *shape: int) -> Pictures:
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    return Pictures(pixels, [index / 3 for index in range(shape[0])], 1.7)


def plain(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def same(found: Pictures | None, expected: Pictures) -> bool:
    return (
        found is not None
        and np.array_equal(found.pixels, expected.pixels)
        and (found.seconds, found.duration) == (expected.seconds, expected.duration)
    )
