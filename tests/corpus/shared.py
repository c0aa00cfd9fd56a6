"""Small vectors, and how the tests of the corpus read them back."""

from __future__ import annotations

import os
import tempfile

import torch

from vsr1.corpus import Corpus

D = 6


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is such a file system: a commit waits for the disk, these tests make thousands."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def unit(count: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors (count, D) float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, D, generator=generator), dim=1)


def vectors_of(corpus: Corpus) -> torch.Tensor:
    """The vectors as a search sees them: inner products with the unit axes, put back in row order."""
    ids, scores = corpus.search(torch.eye(D), max(1, len(corpus)))
    rows = torch.full((len(corpus), D), torch.nan)
    for axis, (names, values) in enumerate(zip(ids, scores, strict=True)):
        for name, value in zip(names, values.tolist(), strict=False):
            rows[corpus.row(name), axis] = value
    return rows


def files(corpus: Corpus) -> list[str]:
    """Names of the segment files."""
    return sorted(path.name for path in (corpus.folder / "vectors").iterdir())
