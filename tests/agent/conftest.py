"""Tiny models with random weights and random videos, shared by the tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vsr1.models.embedder import Embedder
from vsr1.models.policy import SYSTEM, Policy
from vsr1.models.tiny import TinyConfig
from vsr1.models.tokenizer import train_tokenizer
from vsr1.video import Frames

TEXTS = [SYSTEM, "Represent the user's input.", "system user assistant", 'Query: "a small red circle"', "Retrieved video: "]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([*TEXTS, *(f"<{second}.5 seconds>" for second in range(20))] * 2)


@pytest.fixture
def embedder(tokenizer):
    torch.manual_seed(0)
    return Embedder.tiny(tokenizer, TinyConfig(hidden=64, layers=2, feed_forward=96, vision_hidden=32)).eval()


@pytest.fixture
def policy(embedder):
    return Policy.tiny(embedder, soft_tokens=4).eval()


@pytest.fixture
def frames():
    def make(count: int = 6, size: tuple[int, int] = (64, 64), seed: int = 0) -> Frames:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)
        return Frames(pixels=pixels, seconds=torch.arange(count, dtype=torch.float64), duration=float(count), source=Path("made up"))

    return make
