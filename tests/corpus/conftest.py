"""The fixtures of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus.shared import D, scratch, unit
from vsr1.corpus import Corpus


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A new folder, gone afterwards."""
    with scratch() as folder:
        yield Path(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Five videos, two segments."""
    made = Corpus.create(tmp_path / "corpus", D, "embedder-a")
    made.add(["a", "b", "c"], unit(3), paths=["a.mp4", None, tmp_path / "c.mp4"], durations=[1.5, None, 3.0])
    made.add(["d", "e"], unit(2, seed=1))
    return made
