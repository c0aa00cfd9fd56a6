"""What a sweep reads: `CorpusMatrix`, the corpus vectors as one (N, D) array in memory, wrapped without a copy.

The matrix stays where it is (a numpy memory map, a tensor on a GPU, anything that speaks DLPack) and is read anew by
every sweep, so rows changed in place are seen by the next one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CorpusMatrix:
    """The corpus vectors: `rows` (N, D) float32, bfloat16 or float16, one row a video.

    Accepts a tensor, a numpy array or any DLPack exporter and never copies: a row must lie contiguous in memory (the
    distance between rows is free, so slices such as `vectors[::2]` or `vectors[:, :512]` are fine). Raises TypeError
    for another dtype or object and ValueError for another shape or layout, or for rows that require a gradient (a sweep
    has none for them).
    """

    rows: Tensor

    def __init__(self, rows: Any) -> None:
        rows = _as_tensor(rows)
        if rows.dtype not in ROW_DTYPES:
            raise TypeError(f"corpus rows are {rows.dtype}; expected float32, bfloat16 or float16")
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise ValueError(f"corpus has shape {tuple(rows.shape)}; expected (N, D) with D > 0")
        if rows.numel() > len(rows) and rows.stride(1) != 1:
            raise ValueError(f"corpus rows are not contiguous (strides {rows.stride()}): pass rows.contiguous()")
        if rows.requires_grad:
            raise ValueError("corpus rows require a gradient, and a sweep gives none for them: pass rows.detach()")
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        """D, the length of one vector."""
        return self.rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows lie; queries must lie there too."""
        return self.rows.device

    def __dlpack__(self, **options: Any) -> Any:
        """The rows for any library that speaks DLPack (`np.from_dlpack(matrix)`, `cupy.from_dlpack(matrix)`), uncopied."""
        return self.rows.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        """Where the rows lie, in DLPack's numbers."""
        return self.rows.__dlpack_device__()

    def to(self, device: torch.device) -> CorpusMatrix:
        """The same rows on `device`; this matrix itself, uncopied, if it lies there."""
        return self if device == self.device else CorpusMatrix(self.rows.to(device))


def _as_tensor(rows: Any) -> Tensor:
    if isinstance(rows, Tensor):
        return rows
    if isinstance(rows, np.ndarray):
        with warnings.catch_warnings():
            # A sweep only reads, so a read-only memory map is as good as any array.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(rows)
    if hasattr(rows, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(rows)
    raise TypeError(
        f"corpus is a {type(rows).__name__}; expected a CorpusMatrix, a tensor, a numpy array or a DLPack exporter"
    )
