"""Tiny models with random weights and videos of random pixels, shared by the rooms whose conftest imports them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from vsr1.corpus import Corpus
from vsr1.models.embedder import Embedder
from vsr1.models.policy import SYSTEM, Policy
from vsr1.models.tiny import TinyConfig
from vsr1.models.tokenizer import train_tokenizer
from vsr1.records import Moment
from vsr1.video import Frames, encode

TEXTS = [
    SYSTEM,
    "Represent the user's input.",
    "system user assistant",
    'Query: "a small red circle"',
    "Retrieved video: ",
]
QUERIES = [
    "a small red circle",
    "the user finds a video",
    "compare them step by step",
    "a moment in seconds",
    "the answer",
    "what the query asks for",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([*TEXTS, *(f"<{second}.5 seconds>" for second in range(20))] * 2)


@pytest.fixture
def embedder(tokenizer: PreTrainedTokenizerBase) -> Embedder:
    torch.manual_seed(0)
    return Embedder.tiny(tokenizer, TinyConfig(hidden=64, layers=2, feed_forward=96, vision_hidden=32)).eval()


@pytest.fixture
def policy(embedder: Embedder) -> Policy:
    return Policy.tiny(embedder, soft_tokens=4).eval()


@pytest.fixture
def frames() -> Callable[..., Frames]:
    def make(count: int = 6, size: tuple[int, int] = (64, 64), seed: int = 0) -> Frames:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)
        seconds = torch.arange(count, dtype=torch.float64)
        return Frames(pixels=pixels, seconds=seconds, duration=float(count), source=Path("made up"))

    return make


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six videos of one grid and different lengths: four frames at 1 fps, 3.125 to 3.75 seconds."""
    folder = tmp_path_factory.mktemp("videos")
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number in range(len(QUERIES)):
        colours = torch.randint(0, 256, (25 + number, 8, 8, 3), dtype=torch.uint8, generator=generator)
        pixels = colours.repeat_interleave(8, 1).repeat_interleave(8, 2)
        paths.append(encode(folder / f"{number}.mp4", pixels, fps=8.0))
    return paths


@pytest.fixture
def moments() -> list[Moment]:
    """Query i asks for video i."""
    return [Moment(f"q{i}", text, f"v{i}", 1.0, 2.0, 3.0) for i, text in enumerate(QUERIES)]


@pytest.fixture
def make_corpus(embedder: Embedder, tmp_path: Path) -> Callable[[Sequence[Path]], Corpus]:
    """A corpus of the given files in which query i scores 1 for video i and less, at random, for the others."""

    def make(paths: Sequence[Path]) -> Corpus:
        scores = torch.rand(len(QUERIES), len(QUERIES), generator=torch.Generator().manual_seed(0)) - 0.5
        with torch.no_grad():
            vectors = torch.linalg.pinv(embedder.embed_texts(QUERIES)) @ scores.fill_diagonal_(1.0)
        corpus = Corpus.create(tmp_path / "corpus", embedder.dimension, embedder.identity)
        corpus.add([f"v{i}" for i in range(len(paths))], vectors.T[: len(paths)], paths=list(paths))
        return corpus

    return make
