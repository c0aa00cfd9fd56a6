"""`expected` on a GPU: the rows weighted by the softmax of their scores, added up behind the sweep.

The B x D accumulator of a row tile fits no block's registers beside its scores, so the sum is a second pass: the sweep leaves the
weights of one chunk of rows, relative to the peak of their row tile, and the kernel here multiplies them with those rows, a
slice of D at a time, split over the chunk's rows. It runs chunk by chunk, so the weights need a fixed amount of memory whatever
N is. As in flash attention the sum is kept relative to the highest score so far: each chunk first shrinks what is there. Only
the program that owns a copy of the sum touches it, in the order of the chunks, so the result is the same in every run.

The weights are rounded to the rows' type for the tensor cores; with float32 rows, or a query of another type, nothing is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

PROGRAMS = 264  # two for each of an H100's multiprocessors; a constant, so that the result is the same elsewhere
WEIGHT_BYTES = 64 << 20  # for the weights of one chunk; smaller chunks spend more time between two kernels


@triton.jit
def _weighted_rows(
    weights, rows, peak, b_level, first_query, first_d, o_b, m_b, split, splits, first_row, count, N, B, D,
    weight_stride, row_stride, temperature, CLEAN: tl.constexpr, BULK: tl.constexpr, UPCAST: tl.constexpr, TILE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, BLOCK_D) float32: weights x rows over the blocks split, split + splits, .. of the chunk."""
    o_d = first_d + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for block in range(split, tl.cdiv(count, BLOCK_N), splits):
        o_weight = block * BLOCK_N + tl.arange(0, BLOCK_N)
        o_row = first_row.to(tl.int64) + o_weight
        m_row = o_row < N
        b_peak = tl.load(peak + ((first_row + block * BLOCK_N) // TILE).to(tl.int64) * B + o_b, mask=m_b, other=0.0)
        b_scale = tl.where(b_peak == float("-inf"), 0.0, tl.exp((b_peak - b_level) * (1.0 / temperature)))
        # Behind the last row the sweep has written weights of 0.
        if BULK:
            b_weights = weights.load([first_query, block * BLOCK_N])
            b_rows = rows.load([first_row + block * BLOCK_N, first_d])
        else:
            b_weights = tl.load(
                weights + o_b[:, None] * weight_stride + o_weight[None, :], mask=m_b[:, None], other=0.0
            )
            b_rows = tl.load(
                rows + o_row[:, None] * row_stride + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0
            )
        if UPCAST:
            b_rows = b_rows.to(tl.float32)
        if CLEAN:
            # Rows with a NaN or an infinity weigh 0 or NaN; 0 x NaN must not spoil the other rows.
            b_rows = tl.where(tl.abs(b_rows.to(tl.float32)) < float("inf"), b_rows, tl.zeros_like(b_rows))
        b_scaled = (b_weights.to(tl.float32) * b_scale[:, None]).to(b_rows.dtype)
        b_sum = tl.dot(b_scaled, b_rows, b_sum, input_precision="ieee")
    return b_sum


@triton.jit(do_not_specialize=["splits", "chunk", "first_row", "count", "N", "B"])
def expected_kernel(
    weights, rows, peak, chunk_peak, unclean, partial, splits, chunk, first_row, count, N, B, D,
    weight_stride, row_stride, temperature, BULK: tl.constexpr, UPCAST: tl.constexpr, TILE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial (splits, B, D), relative to the peak of the chunks before, becomes relative to the peak with this chunk."""
    slices = tl.cdiv(D, BLOCK_D)
    first_d = (tl.program_id(0) % slices) * BLOCK_D
    query_tiles = tl.cdiv(B, BLOCK_B)
    first_query = (tl.program_id(0) // slices % query_tiles) * BLOCK_B
    o_d = first_d + tl.arange(0, BLOCK_D)
    o_b = first_query + tl.arange(0, BLOCK_B).to(tl.int64)
    split = tl.program_id(0) // (slices * query_tiles)
    m_b = o_b < B
    b_before = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    for earlier in range(chunk):
        b_before = tl.maximum(b_before, tl.load(chunk_peak + earlier * B + o_b, mask=m_b, other=0.0))
    b_now = tl.maximum(b_before, tl.load(chunk_peak + chunk * B + o_b, mask=m_b, other=0.0))
    b_level = tl.where(b_now == float("-inf"), 0.0, b_now)
    if tl.load(unclean + chunk) == 0:
        b_sum = _weighted_rows(
            weights, rows, peak, b_level, first_query, first_d, o_b, m_b, split, splits, first_row, count, N, B, D,
            weight_stride, row_stride, temperature, False, BULK, UPCAST, TILE, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        b_sum = _weighted_rows(
            weights, rows, peak, b_level, first_query, first_d, o_b, m_b, split, splits, first_row, count, N, B, D,
            weight_stride, row_stride, temperature, True, BULK, UPCAST, TILE, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    p_sum = partial + (split.to(tl.int64) * B + o_b)[:, None] * D + o_d[None, :]
    m_sum = m_b[:, None] & (o_d < D)[None, :]
    if chunk > 0:
        b_shrink = tl.where(b_before == float("-inf"), 0.0, tl.exp((b_before - b_level) * (1.0 / temperature)))
        b_sum += tl.load(p_sum, mask=m_sum, other=0.0) * b_shrink[:, None]
    tl.store(p_sum, b_sum, mask=m_sum)


def blocks(queries: int, upcast: bool, bulk: bool = False) -> dict[str, Any]:
    """The tile sizes and launch options, with the copy engine or without; no spills on sm_80 and sm_90."""
    size = min(32 if upcast else 128, max(16, triton.next_power_of_2(queries)))
    options = {"UPCAST": upcast, "BLOCK_B": size, "BLOCK_N": 64, "BLOCK_D": 256, "num_warps": 8, "num_stages": 3}
    if upcast:
        return {**options, "BLOCK_N": 16, "BLOCK_D": 128}
    if size <= 32:
        return {**options, "num_warps": 4}
    if size == 64:
        return options
    return {**options, "BLOCK_D": 128, **({"num_stages": 4} if bulk else {"BLOCK_N": 32})}


@dataclass
class SecondPass:
    """The buffers of one call: weights (B, chunk rows), peak (chunks, B), unclean (chunks,) and partial (splits, B, D)."""

    options: dict[str, Any]
    tile: int
    chunk_tiles: int
    splits: int
    weights: Tensor
    peak: Tensor
    unclean: Tensor
    partial: Tensor

    @classmethod
    def start(cls, query: Tensor, rows: Tensor, tile: int, upcast: bool, bulk: bool) -> SecondPass:
        """For query (B, D) and rows (N, D) that are swept in row tiles of `tile` rows."""
        B, D = query.shape
        options = {"BULK": bulk, **blocks(B, upcast, bulk)}
        dtype = torch.float32 if upcast else rows.dtype
        tiles = triton.cdiv(rows.shape[0], tile)
        chunk_tiles = max(1, min(tiles, WEIGHT_BYTES // (B * dtype.itemsize * tile)))
        chunks = triton.cdiv(tiles, chunk_tiles)
        beside = triton.cdiv(D, options["BLOCK_D"]) * triton.cdiv(B, options["BLOCK_B"])
        splits = max(1, min(PROGRAMS // beside, triton.cdiv(chunk_tiles * tile, options["BLOCK_N"])))
        device = query.device
        return cls(
            options,
            tile,
            chunk_tiles,
            splits,
            torch.empty((B, chunk_tiles * tile), dtype=dtype, device=device),
            torch.full((chunks, B), float("-inf"), dtype=torch.float32, device=device),
            torch.zeros(chunks, dtype=torch.int32, device=device),
            torch.empty((splits, B, D), dtype=torch.float32, device=device),
        )

    def add(self, rows: Tensor, peak: Tensor, chunk: int, temperature: float) -> None:
        """Adds the rows of this chunk, whose weights and peak (row tiles, B) the sweep has just written."""
        _, B, D = self.partial.shape
        first_row = chunk * self.chunk_tiles * self.tile
        count = min(self.chunk_tiles * self.tile, rows.shape[0] - first_row)
        programs = triton.cdiv(D, self.options["BLOCK_D"]) * triton.cdiv(B, self.options["BLOCK_B"]) * self.splits
        sources = self.weights, rows
        if self.options["BULK"]:
            block_b, block_n, block_d = (self.options[f"BLOCK_{axis}"] for axis in "BND")
            sources = (
                TensorDescriptor.from_tensor(self.weights, [block_b, block_n]),
                TensorDescriptor.from_tensor(rows, [block_n, block_d]),
            )
        expected_kernel[(programs,)](
            *sources, peak, self.peak, self.unclean, self.partial, self.splits, chunk, first_row, count,
            rows.shape[0], B, D, self.weights.shape[1], rows.stride(0), temperature, TILE=self.tile, **self.options,
        )  # fmt: skip
