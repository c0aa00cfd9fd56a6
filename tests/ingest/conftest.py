"""Small videos of one colour each, and a stand-in for the embedder that says which colour it saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from vsr1.models.vision import VideoSettings
from vsr1.video import Frames, encode


class Colours:
    """Embeds a video as its mean colour, a unit vector (3,). It is its own vision tower, and takes part in nothing else."""

    identity, dimension, settings = "colours", 3, VideoSettings(fps=2.0, max_frames=4)

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.refuses: Callable[[Frames], bool] = lambda frames: False

    @property
    def videos(self) -> Colours:
        return self

    def encode_frames(self, videos: Sequence[Frames]) -> list[torch.Tensor]:
        if any(self.refuses(one) for one in videos):
            raise ValueError("no size for this shape")
        self.batches.append(len(videos))
        return [one.pixels.float().mean((0, 1, 2)) for one in videos]

    def embed_videos(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.stack(list(features)), dim=1)


@pytest.fixture
def colours() -> Colours:
    return Colours()


def colour(number: int) -> np.ndarray:
    """One of twelve colours whose directions differ: from red (0) to green (11)."""
    angle = np.pi / 2 * number / 11
    return np.array([200 * np.cos(angle), 200 * np.sin(angle), 80]).astype(np.uint8)


def film(path: Path, number: int, frames: int = 4) -> Path:
    """One second of colour `number`, at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return encode(path, np.broadcast_to(colour(number), (frames, 16, 16, 3)), fps=4.0)
