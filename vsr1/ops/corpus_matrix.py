"""What a sweep reads: `CorpusMatrix`, the corpus vectors as one (N, D) array in memory, wrapped without a copy.

The matrix stays where it is (a numpy memory map, a tensor on a GPU, anything that speaks DLPack) and is read anew by
every sweep, so rows changed in place are seen by the next one. `quantize` puts int8 codes beside the rows, half of what
has to be read of bfloat16; they are a snapshot, and rows that change must be quantized again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_QUANTIZED_DIM = 1 << 16  # so that the sum of D products of a code with a query's integer fits 32 bits, 8 bits each
QUANTIZED_AT_ONCE = 1 << 20  # elements in float32: 4 MiB, which stay in a cache


@dataclass(frozen=True)
class Quantized:
    """Rows as small integers: row = scale * codes + rest, where the length of `rest` is at most `residual`.

    codes (N, D) int8; scales (N,) and residuals (N,) float32. The scale is the row's largest component / 127; of a row
    with a NaN or an infinity it is NaN, and the codes are 0.
    """

    codes: Tensor
    scales: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class CorpusMatrix:
    """The corpus vectors: `rows` (N, D) float32, bfloat16 or float16, one row a video; `quantized` after `quantize`.

    Accepts a tensor, a numpy array or any DLPack exporter and never copies: a row must lie contiguous in memory (the
    distance between rows is free, so slices such as `vectors[::2]` or `vectors[:, :512]` are fine). Raises TypeError
    for another dtype or object and ValueError for another shape or layout, or for rows that require a gradient (a sweep
    has none for them).
    """

    rows: Tensor
    quantized: Quantized | None = None

    def __init__(self, rows: Any, quantized: Quantized | None = None) -> None:
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
        object.__setattr__(self, "quantized", quantized)

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
        if device == self.device:
            return self
        moved = self.quantized and Quantized(*(part.to(device) for part in vars(self.quantized).values()))
        return CorpusMatrix(self.rows.to(device), moved)

    def quantize(self) -> CorpusMatrix:
        """The same rows with int8 codes beside them, from which `scan` finds the exact top-k with half the reading.

        Takes N x (D + 8) bytes more. Raises ValueError for more than 65536 components.
        """
        if self.dim > MAX_QUANTIZED_DIM:
            raise ValueError(f"rows of {self.dim} components cannot be quantized; expected at most {MAX_QUANTIZED_DIM}")
        count, device = len(self), self.device
        codes = torch.empty((count, self.dim), dtype=torch.int8, device=device)
        scales = torch.empty(count, dtype=torch.float32, device=device)
        residuals = torch.empty(count, dtype=torch.float32, device=device)
        step = max(1, QUANTIZED_AT_ONCE // self.dim)
        for start in range(0, count, step):
            part = slice(start, start + step)
            rows = self.rows[part].float()
            finite = rows.isfinite().all(dim=1)
            largest = rows.abs().amax(dim=1).where(finite, 0.0)
            # Never below the smallest normal number, so that 127 scales reach every component and no division overflows.
            scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny).where(largest > 0, 0.0)
            ratio = (rows / scale[:, None]).masked_fill(~(finite & (largest > 0))[:, None], 0.0)
            whole = ratio.round().clamp(-127, 127)
            codes[part] = whole.to(torch.int8)
            # What the division rounded away, at most 127 / 2^24 a component, and the norm's own rounding come on top.
            rest = (ratio - whole).norm(dim=1) * (1 + 1e-4) + 1e-5 * self.dim**0.5
            residuals[part] = rest * scale
            scales[part] = scale.where(finite, torch.nan)
        return CorpusMatrix(self.rows, Quantized(codes, scales, residuals))


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
