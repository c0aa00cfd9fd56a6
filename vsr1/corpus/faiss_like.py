"""`FlatIP`: the sweep behind the interface of `faiss.IndexFlatIP`, so that a program changes one line to use it.

Shapes, dtypes, results for missing neighbours and the shifting of ids are those of FAISS. Three things differ: equal
scores come in the order of their ids (FAISS leaves it open), k is at most 2048, and wrong arguments raise ValueError
or IndexError with a sentence where FAISS has a bare AssertionError or RuntimeError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vsr1.corpus.segments import DTYPES
from vsr1.ops.corpus_scan import CorpusMatrix, scan


class FlatIP:
    """Exact inner-product search over vectors (ntotal, d) in memory; ids are row numbers.

    `dtype` is how vectors are stored and compared, queries stay float32: "bfloat16" takes half the memory and time of
    "float32" and rounds the vectors to 8 bits of mantissa.
    """

    is_trained = True
    metric_type = 0  # FAISS's METRIC_INNER_PRODUCT

    def __init__(self, d: int, dtype: str = "float32") -> None:
        if d < 1:
            raise ValueError(f"d must be at least 1, got {d}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        self.d = d
        self.ntotal = 0
        self._rows = torch.empty(0, d, dtype=DTYPES[dtype])  # with room to grow; the first ntotal count

    def add(self, x: Any) -> None:
        """Appends vectors x (n, d), which get the ids ntotal, ntotal + 1, ..."""
        vectors = self._checked(x)
        total = self.ntotal + len(vectors)
        if total > len(self._rows):
            # Room for half as many again: n additions copy O(n) rows in all.
            grown = torch.empty(max(total, len(self._rows) * 3 // 2), self.d, dtype=self._rows.dtype)
            grown[: self.ntotal] = self._rows[: self.ntotal]
            self._rows = grown
        self._rows[self.ntotal : total] = vectors
        self.ntotal = total

    def search(self, x: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k <= 2048 best for each query x (n, d): D (n, k) float32, best first, and I (n, k) int64.

        Where fewer than k are there, or a score is NaN, D ends in the lowest float32 and I in -1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found = scan(self._checked(x), self._rows[: self.ntotal], k=int(k))
        scores = found.scores.masked_fill(found.ids < 0, torch.finfo(torch.float32).min)
        return scores.numpy(), found.ids.numpy()

    def reset(self) -> None:
        """Forgets all vectors."""
        self.ntotal = 0
        self._rows = self._rows.new_empty(0, self.d)

    def reconstruct(self, key: int) -> np.ndarray:
        """The vector (d,) float32 with id `key`."""
        return self.reconstruct_n(key, 1)[0]

    def reconstruct_n(self, n0: int = 0, ni: int = -1) -> np.ndarray:
        """Vectors n0 .. n0 + ni, all from n0 on for ni = -1: (ni, d) float32, a copy."""
        count = self.ntotal - n0 if ni == -1 else ni
        if n0 < 0 or count < 0 or n0 + count > self.ntotal:
            raise IndexError(f"vectors {n0} to {n0 + count} were asked for, the index holds {self.ntotal}")
        return self._rows[n0 : n0 + count].to(torch.float32, copy=True).numpy()

    def remove_ids(self, x: Any) -> int:
        """Removes vectors by id, an array (n,) int64 or a FAISS IDSelector; later ones move up. Returns how many went.

        Ids that are not there do no harm.
        """
        if hasattr(x, "is_member"):
            gone = torch.tensor([x.is_member(row) for row in range(self.ntotal)], dtype=torch.bool)
        else:
            ids = np.asarray(x)
            if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
                raise ValueError(f"ids must be whole numbers of shape (n,), got {ids.dtype} {ids.shape}")
            gone = torch.zeros(self.ntotal, dtype=torch.bool)
            gone[torch.from_numpy(ids[(ids >= 0) & (ids < self.ntotal)].astype(np.int64))] = True
        kept = self._rows[: self.ntotal][~gone]
        removed = self.ntotal - len(kept)
        self._rows[: len(kept)] = kept
        self.ntotal = len(kept)
        return removed

    def _checked(self, x: Any) -> torch.Tensor:
        vectors = np.ascontiguousarray(x, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.d:
            raise ValueError(f"vectors must have shape (n, {self.d}), got {vectors.shape}")
        return CorpusMatrix(vectors).rows
