"""Frames that nobody wants and no other frame needs are dropped undecoded, and the wanted ones stay what they are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from vsr1.video import decode

Write = Callable[..., Path]
UNEVEN = [sum(20 + 37 * (place * place % 7) for place in range(index)) for index in range(90)]
B_FRAMES = {"g": "30", "bf": "4", "b_strategy": "0", "refs": "4"}


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv"])
def test_unwanted_b_frames_are_dropped_and_the_wanted_ones_are_exact(
    write_numbered: Write, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered(name, UNEVEN, side=288, **B_FRAMES)
    with av.open(path) as whole:
        frames = [frame.to_ndarray(format="rgb24") for frame in whole.decode(video=0)]
    module = importlib.import_module("vsr1.video.pyav")
    given: list[object] = []
    read = module._frames
    monkeypatch.setattr(module, "_frames", lambda *args: (given.append(item) or item for item in read(*args)))
    for first in range(5):
        given.clear()
        wanted = [UNEVEN[index] / 1000 + 0.003 for index in range(first, len(UNEVEN), 11)]
        found = decode(path, times=wanted)
        assert all(
            (one.numpy() == frames[index]).all() for one, index in zip(found.pixels, range(first, 90, 11), strict=True)
        )
        assert len(given) < 65
    given.clear()
    decode(path, times=[time / 1000 for time in UNEVEN])
    assert len(given) == len(UNEVEN)
