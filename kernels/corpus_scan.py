"""The sweep of the corpus on a GPU.

One program scores a tile of queries against a tile of rows with a matrix product, and keeps of the B x n scores only what the
merge needs: the highest score of every group of 32 rows, the tile's log-sum-exp (peak and mass), how many scores lie above the
positive's and how many are NaN. So the corpus is read once for all query tiles that run side by side (the query tile is the
fastest grid axis, later readers of a row tile find it in L2), and what is written is a 32nd of the scores.

Why group maxima are enough for an exact top-k: order groups by (maximum descending, group number ascending). If row r with
score s is in a group behind the first k groups, each of those k groups holds a row with a higher score, or an equal one and a
lower number; so r is not among the top k. The rows of the first k groups, k x 32 a query, are scored again one by one
(`gather_scores`), which also makes k a plain number: no kernel depends on it, and none is recompiled when N, B or k change.
The two scorings add in different orders, so rows whose scores differ by float32 rounding alone may trade places.

`expected` is a second sweep: with the log-sum-exp known, weights need no rescaling, and its B x D accumulator, which no block
could keep in registers, is summed in global memory by the one program that owns that copy of it.

Precision. Products of equal half types go to the tensor cores and are accumulated in float32; the softmax weights are rounded to
the row's type for their product. Any other pair of types is widened to float32 and multiplied in full precision. The sweep is
bound by reading the rows while a tile holds few queries, by the product for many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 32  # rows that share one maximum: fewer write more, more score more rows again
BLOCK_N = 128
EXPECTED_BYTES = 64 << 20  # for the copies of the (B, D) accumulator


@triton.jit
def _tile_scores(
    query, rows, o_b, o_row, m_b, m_row, D, query_stride, row_stride,
    UPCAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """b_scores (BLOCK_B, BLOCK_N) float32 of the queries o_b and the rows o_row (int64)."""
    b_scores = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_query = tl.load(
            query + o_b[:, None] * query_stride + o_d[None, :], mask=m_b[:, None] & m_d[None, :], other=0.0
        )
        b_rows = tl.load(
            rows + o_row[None, :] * row_stride + o_d[:, None], mask=m_row[None, :] & m_d[:, None], other=0.0
        )
        if UPCAST:
            b_query = b_query.to(tl.float32)
            b_rows = b_rows.to(tl.float32)
        b_scores = tl.dot(b_query, b_rows, b_scores, input_precision="ieee")
    return b_scores


@triton.jit
def _leave_out(b_scores, exclude, o_b, o_row, m_b, m_row, E):
    """-inf for the rows past the end and for those each query excludes."""
    b_scores = tl.where(m_row[None, :], b_scores, float("-inf"))
    for e in range(E):
        b_out = tl.load(exclude + o_b * E + e, mask=m_b, other=-1)
        b_scores = tl.where(o_row[None, :] == b_out[:, None], float("-inf"), b_scores)
    return b_scores


@triton.jit(do_not_specialize=["N", "B", "E", "groups"])
def sweep_kernel(
    query, rows, exclude, positive, bar, maxima, peak, mass, greater, nan_count,
    N, B, D, E, groups, query_stride, row_stride, temperature,
    UPCAST: tl.constexpr, RANK: tl.constexpr, SOFTMAX: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """maxima (B, groups); peak, mass, greater and nan_count (row tiles, B)."""
    query_tiles = tl.cdiv(B, BLOCK_B)
    tile = tl.program_id(0) // query_tiles
    o_b = (tl.program_id(0) % query_tiles) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    o_row = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_b = o_b < B
    m_row = o_row < N
    b_scores = _tile_scores(
        query, rows, o_b, o_row, m_b, m_row, D, query_stride, row_stride, UPCAST, BLOCK_B, BLOCK_N, BLOCK_D
    )
    b_scores = _leave_out(b_scores, exclude, o_b, o_row, m_b, m_row, E)
    m_nan = b_scores != b_scores
    b_scores = tl.where(m_nan, float("-inf"), b_scores)

    partial = tile.to(tl.int64) * B + o_b
    tl.store(nan_count + partial, tl.sum(m_nan.to(tl.int32), axis=1), mask=m_b)
    if RANK:
        b_bar = tl.load(bar + o_b, mask=m_b, other=float("inf"))
        b_positive = tl.load(positive + o_b, mask=m_b, other=-1)
        m_above = (b_scores > b_bar[:, None]) & (o_row[None, :] != b_positive[:, None])
        tl.store(greater + partial, tl.sum(m_above.to(tl.int32), axis=1), mask=m_b)
    if SOFTMAX:
        b_peak = tl.max(b_scores, axis=1)
        b_level = tl.where(b_peak == float("-inf"), 0.0, b_peak)
        b_mass = tl.sum(tl.exp((b_scores - b_level[:, None]) / temperature), axis=1)
        tl.store(peak + partial, b_peak, mask=m_b)
        tl.store(mass + partial, b_mass, mask=m_b)
    b_maxima = tl.max(tl.reshape(b_scores, (BLOCK_B, BLOCK_N // GROUP, GROUP)), axis=2)
    o_group = tile.to(tl.int64) * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    tl.store(
        maxima + o_b[:, None] * groups + o_group[None, :], b_maxima, mask=m_b[:, None] & (o_group < groups)[None, :]
    )


@triton.jit(do_not_specialize=["B"])
def positive_kernel(
    query, rows, positive, scores, B, D, query_stride, row_stride,
    UPCAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores (B,): each query's positive, in the sweep's own arithmetic, so that a copy of that row ties with it."""
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    o_column = tl.arange(0, BLOCK_N)
    m_b = o_b < B
    o_query = tl.program_id(0) * BLOCK_B + o_column
    b_row = tl.load(positive + o_query, mask=(o_column < BLOCK_B) & (o_query < B), other=-1)
    b_scores = _tile_scores(
        query, rows, o_b, b_row, m_b, b_row >= 0, D, query_stride, row_stride, UPCAST, BLOCK_B, BLOCK_N, BLOCK_D
    )
    m_own = tl.arange(0, BLOCK_B)[:, None] == o_column[None, :]
    b_own = tl.sum(tl.where(m_own, b_scores, 0.0), axis=1)
    known = tl.load(positive + o_b, mask=m_b, other=-1) >= 0
    tl.store(scores + o_b, tl.where(known, b_own, float("nan")), mask=m_b)


@triton.jit(do_not_specialize=["C", "E"])
def gather_kernel(
    query, rows, ids, exclude, scores, C, E, D, query_stride, row_stride,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores (B, C) of the listed rows; -inf where an id is -1 or excluded."""
    tiles = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    o_c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_row = tl.load(ids + b * C + o_c, mask=o_c < C, other=-1)
    m_row = b_row >= 0
    b_scores = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_query = tl.load(query + b * query_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_rows = tl.load(
            rows + b_row[:, None] * row_stride + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0
        )
        b_scores += tl.sum(b_rows.to(tl.float32) * b_query[None, :], axis=1)
    b_scores = tl.where(m_row, b_scores, float("-inf"))
    for e in range(E):
        b_out = tl.load(exclude + b * E + e)
        b_scores = tl.where(b_row == b_out, float("-inf"), b_scores)
    tl.store(scores + b * C + o_c, b_scores, mask=o_c < C)


@triton.jit(do_not_specialize=["N", "B", "E", "splits"])
def expected_kernel(
    query, rows, exclude, lse, partial, N, B, D, E, splits, query_stride, row_stride, temperature,
    UPCAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial (splits, B, D) += softmax weights x rows over the split's row tiles; it comes full of zeros."""
    query_tiles = tl.cdiv(B, BLOCK_B)
    split = tl.program_id(0) // query_tiles
    o_b = (tl.program_id(0) % query_tiles) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    m_b = o_b < B
    b_lse = tl.load(lse + o_b, mask=m_b, other=0.0)
    p_partial = partial + (split.to(tl.int64) * B + o_b)[:, None] * D
    for tile in range(split, tl.cdiv(N, BLOCK_N), splits):
        o_row = tl.full((BLOCK_N,), tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_row = o_row < N
        b_scores = _tile_scores(
            query, rows, o_b, o_row, m_b, m_row, D, query_stride, row_stride, UPCAST, BLOCK_B, BLOCK_N, BLOCK_D
        )
        b_scores = _leave_out(b_scores, exclude, o_b, o_row, m_b, m_row, E)
        # A NaN score fails the comparison, so such a row weighs nothing.
        b_weights = tl.where(b_scores > float("-inf"), tl.exp(b_scores / temperature - b_lse[:, None]), 0.0)
        for start in range(0, D, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            b_rows = tl.load(
                rows + o_row[:, None] * row_stride + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0
            )
            if UPCAST:
                b_rows = b_rows.to(tl.float32)
            # Rows with a NaN or an infinity weigh 0 or NaN; 0 x NaN must not spoil the other rows.
            b_rows = tl.where(tl.abs(b_rows) < float("inf"), b_rows, tl.zeros_like(b_rows))
            b_sum = tl.dot(b_weights.to(b_rows.dtype), b_rows, input_precision="ieee")
            m_sum = m_b[:, None] & m_d[None, :]
            p_sum = p_partial + o_d[None, :]
            tl.store(p_sum, tl.load(p_sum, mask=m_sum, other=0.0) + b_sum, mask=m_sum)
        tl.debug_barrier()  # the next tile's loads may come from other threads than this tile's stores


def blocks(query: Tensor, rows: Tensor, sums: bool = False) -> dict[str, int | bool]:
    """The tile sizes and launch options for these dtypes and this number of queries; `sums` for the kernel of `expected`.

    Chosen so that ptxas spills no register on sm_80 and sm_90 (two products in one kernel need 8 warps).
    """
    half = query.dtype == rows.dtype and rows.dtype != torch.float32
    return {
        "UPCAST": not half,
        "BLOCK_B": min(64 if half else 32, max(16, triton.next_power_of_2(query.shape[0]))),
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": 64 if half else (16 if sums else 32),
        "num_warps": 8 if sums else 4,
        "num_stages": 3 if half else 2,
    }


def sweep(
    query: Tensor,
    rows: Tensor,
    exclude: Tensor | None,
    positive: Tensor | None,
    bar: Tensor | None,
    temperature: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """maxima (B, groups) float32, and of each row tile nan_count, greater (int32), peak and mass (float32): (tiles, B).

    query (B, D), rows (N, D), B and N > 0; exclude (B, E) int64; positive (B,) int64 and bar (B,) float32, what a score must
    pass to be counted in `greater` (empty without them); temperature for peak and mass (empty without it).
    """
    options = blocks(query, rows)
    B, D = query.shape
    N = rows.shape[0]
    tiles, groups = triton.cdiv(N, BLOCK_N), triton.cdiv(N, GROUP)
    float_options = {"dtype": torch.float32, "device": query.device}
    maxima = torch.empty((B, groups), **float_options)
    nan_count = torch.empty((tiles, B), dtype=torch.int32, device=query.device)
    greater = torch.empty((0 if positive is None else tiles, B), dtype=torch.int32, device=query.device)
    peak = torch.empty((0 if temperature is None else tiles, B), **float_options)
    mass = torch.empty_like(peak)
    sweep_kernel[(tiles * triton.cdiv(B, options["BLOCK_B"]),)](
        query, rows, exclude, positive, bar, maxima, peak, mass, greater, nan_count,
        N, B, D, 0 if exclude is None else exclude.shape[1], groups, query.stride(0), rows.stride(0), temperature or 1.0,
        RANK=positive is not None, SOFTMAX=temperature is not None, GROUP=GROUP, **options,
    )  # fmt: skip
    return maxima, nan_count, greater, peak, mass


def positive_scores(query: Tensor, rows: Tensor, positive: Tensor) -> Tensor:
    """(B,) float32 scores of the positive rows as `sweep` computes them, NaN for -1."""
    options = blocks(query, rows)
    B, D = query.shape
    scores = torch.empty(B, dtype=torch.float32, device=query.device)
    positive_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
        query, rows, positive, scores, B, D, query.stride(0), rows.stride(0), **options
    )
    return scores


def gather_scores(query: Tensor, rows: Tensor, ids: Tensor, exclude: Tensor | None) -> Tensor:
    """(B, C) float32 scores of the rows in ids (B, C), -inf for -1 and for rows in exclude (B, E)."""
    B, C = ids.shape
    scores = torch.empty((B, C), dtype=torch.float32, device=query.device)
    if scores.numel():
        gather_kernel[(B * triton.cdiv(C, 32),)](
            query, rows, ids, exclude, scores, C, 0 if exclude is None else exclude.shape[1], query.shape[1],
            query.stride(0), rows.stride(0), BLOCK_C=32, BLOCK_D=128,
        )  # fmt: skip
    return scores


def expected(query: Tensor, rows: Tensor, exclude: Tensor | None, lse: Tensor, temperature: float) -> Tensor:
    """(B, D) float32: the rows weighted by exp(score / temperature - lse); B and N > 0."""
    options = blocks(query, rows, sums=True)
    B, D = query.shape
    N = rows.shape[0]
    query_tiles = triton.cdiv(B, options["BLOCK_B"])
    affordable = max(1, EXPECTED_BYTES // (4 * B * D))
    splits = min(triton.cdiv(N, BLOCK_N), affordable, triton.cdiv(512, query_tiles))  # 512 programs fill a GPU
    partial = torch.zeros((splits, B, D), dtype=torch.float32, device=query.device)
    expected_kernel[(query_tiles * splits,)](
        query, rows, exclude, lse, partial, N, B, D, 0 if exclude is None else exclude.shape[1], splits,
        query.stride(0), rows.stride(0), temperature, **options,
    )  # fmt: skip
    return partial.sum(dim=0)
