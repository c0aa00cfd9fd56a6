"""The exact top k of a corpus from its int8 copy: a sweep over bounds, half the bytes of the rows.

A row is v = scale x codes + rest with |rest|_2 <= residual, all three stored beside it. A query is q = unit x integers + error,
quantised here (`quantise_kernel`) to 14 bits, held as two int8 planes, integers = 128 x high + low, so that the products with the
codes are int8 products with int32 sums: exact. With Hoelder's and Cauchy's inequalities

    |q.v - unit x scale x (integers.codes)| <= |error|_1 x 127 x scale + |q|_2 x residual.

All bounds are in the query's unit: upper = scale x (integers.codes + spread) + reach x residual, where spread and reach hold the
two norms and what rounding of the bound itself in float32 can lose. A bound that is not a number (a row with a NaN or an
infinity has a scale of NaN; a query with one has a reach of infinity) is +inf, so such rows are candidates.

The sweep keeps of every group of rows two words: the highest estimate, scale x (integers.codes), with its row's number in the
low bits; and two bounds, rounded up to bfloat16: that of this row, and the highest of the group's other rows. corpus_exact.py
turns them into the exact top k.

The planes are stacked as rows of one matrix, eight queries of one plane, then the same eight of the other: the two products of a
query lie in one thread's registers. Counted in bytes, reading the codes takes longest up to 64 queries; for 128 it is fetching
codes and planes from the L2 cache, three times the codes' size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor
from vsr1.kernels.corpus_exact import LOWEST, exact_top
from vsr1.kernels.corpus_scan import bulk_serves, bulk_tile_scores, own_tile, tile_scores

MOST_GROUPS = 1 << 22  # of all queries together: 32 MiB of their two words
TINY = tl.constexpr(1e-37)  # added to every bound: more than products of subnormal numbers lose
HIGHEST = tl.constexpr(1.7014118346046923e38)  # 2^127: the range of estimates, in which their low bits are free
NOTHING = tl.constexpr(-3e38)  # the estimate of a row that is not to be chosen, and below it once its low bits are set


@triton.jit
def quantise_kernel(query, planes, unit, reach, spread, D, query_stride, plane_stride, limit, BLOCK_D: tl.constexpr):
    """planes (16 for 8 queries, D) int8 and unit, reach and spread (B,) float32 of query (B, D)."""
    b = tl.program_id(0).to(tl.int64)
    b_high = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        b_size = tl.abs(tl.load(query + b * query_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32))
        b_high = tl.where(b_size < float("inf"), tl.maximum(b_high, b_size), float("inf"))  # a NaN too
    high = tl.max(b_high)
    usable = high < float("inf")
    step = tl.where(usable, tl.maximum(high / limit, 1.1754944e-38), 1.0)  # any number would do: the error is measured
    b_square = tl.zeros((BLOCK_D,), tl.float64)
    b_whole = tl.zeros((BLOCK_D,), tl.float64)
    b_error = tl.zeros((BLOCK_D,), tl.float64)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        b_query = tl.load(query + b * query_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_scaled = tl.where(usable, b_query, 0.0).to(tl.float64) / step.to(tl.float64)
        b_integer = tl.minimum(tl.maximum(tl.floor(b_scaled + 0.5), -limit), limit)
        b_upper = tl.floor((b_integer + 64.0) * 0.0078125)
        p_plane = planes + (b // 8 * 16 + b % 8) * plane_stride + o_d
        tl.store(p_plane, b_upper.to(tl.int32).to(tl.int8), mask=o_d < D)
        tl.store(p_plane + 8 * plane_stride, (b_integer - 128.0 * b_upper).to(tl.int32).to(tl.int8), mask=o_d < D)
        b_square += b_scaled * b_scaled
        b_whole += tl.abs(b_integer)
        b_error += tl.abs(b_scaled - b_integer)
    # Slack: four float32 roundings of at most scale x (127 |integers|_1 + spread) + reach x residual each, and those here.
    square, whole, error = tl.sum(b_square), tl.sum(b_whole), tl.sum(b_error)
    slack = 1.000004
    norm = tl.sqrt(square.to(tl.float32))
    tl.store(unit + b, step)
    tl.store(reach + b, tl.where(usable, norm * slack, float("inf")))
    tl.store(spread + b, tl.where(usable, (127.0 * (error + whole * 1e-6)).to(tl.float32) * slack, float("inf")))


@triton.jit
def _rounded_up(b_values):
    """The bits of float32 values rounded up to bfloat16, in the high half of an int32."""
    bits = b_values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits, bits + 0xFFFF) & -65536


@triton.jit(do_not_specialize=["N", "B", "E", "groups", "group_stride"])
def int8_sweep_kernel(
    planes, codes, scales, residuals, reach, spread, exclude, best, bounds, N, B, D, E, groups, group_stride,
    plane_stride, code_stride, BULK: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """best float32 and bounds int32 (B, groups), rows group_stride apart."""
    tile, first_query, o_b, o_row = own_tile(0, B, BLOCK_B, BLOCK_N)
    m_b = o_b < B
    m_row = o_row < N
    if BULK:
        b_products = bulk_tile_scores(planes, codes, 2 * first_query, tile * BLOCK_N, D, 2 * BLOCK_B, BLOCK_N, BLOCK_D)
    else:
        o_plane = 2 * first_query + tl.arange(0, 2 * BLOCK_B).to(tl.int64)
        b_products = tile_scores(
            planes, codes, o_plane, o_row, o_plane < tl.cdiv(B, 8) * 16, m_row, D, plane_stride, code_stride,
            False, 2 * BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    b_weight = 128 - 127 * tl.arange(0, 2)
    b_products = tl.reshape(b_products, (BLOCK_B // 8, 2, 8, BLOCK_N)) * b_weight[None, :, None, None]
    b_dots = tl.reshape(tl.sum(b_products, axis=1), (BLOCK_B, BLOCK_N)).to(tl.float32)
    b_dots = tl.where(m_row[None, :], b_dots, float("-inf"))
    if exclude is not None:
        for e in range(E):
            b_out = tl.load(exclude + o_b * E + e, mask=m_b, other=-1)
            b_dots = tl.where(o_row[None, :] == b_out[:, None], float("-inf"), b_dots)

    b_scale = tl.load(scales + o_row, mask=m_row, other=0.0)
    b_residual = tl.load(residuals + o_row, mask=m_row, other=0.0)
    b_reach = tl.load(reach + o_b, mask=m_b, other=0.0)
    b_spread = tl.load(spread + o_b, mask=m_b, other=0.0)
    b_upper = b_scale[None, :] * (b_dots + b_spread[:, None]) + (b_reach[:, None] * b_residual[None, :] + TINY)
    b_upper = tl.where(b_upper < float("inf"), tl.maximum(b_upper, LOWEST), float("inf"))
    b_upper = tl.where(b_dots > float("-inf"), b_upper, float("-inf"))
    b_estimate = tl.minimum(tl.maximum(b_scale[None, :] * b_dots, -HIGHEST), HIGHEST)
    b_estimate = tl.where((b_dots > float("-inf")) & (b_scale == b_scale)[None, :], b_estimate, NOTHING)
    b_member = tl.arange(0, BLOCK_N) % GROUP
    b_estimate = ((b_estimate.to(tl.int32, bitcast=True) & -GROUP) | b_member[None, :]).to(tl.float32, bitcast=True)

    b_best = tl.max(tl.reshape(b_estimate, (BLOCK_B, BLOCK_N // GROUP, GROUP)), axis=2)
    b_winner = b_best.to(tl.int32, bitcast=True) & (GROUP - 1)
    m_winner = tl.arange(0, GROUP)[None, None, :] == b_winner[:, :, None]
    b_upper = tl.reshape(b_upper, (BLOCK_B, BLOCK_N // GROUP, GROUP))
    b_own = tl.max(tl.where(m_winner, b_upper, float("-inf")), axis=2)
    b_others = tl.max(tl.where(m_winner, float("-inf"), b_upper), axis=2)
    b_bounds = _rounded_up(b_own) | ((_rounded_up(b_others) >> 16) & 0xFFFF)
    o_group = tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    o_out = o_b[:, None] * group_stride + o_group[None, :]
    m_out = m_b[:, None] & (o_group < groups)[None, :]
    tl.store(best + o_out, tl.where(b_best > NOTHING * 0.99, b_best, float("-inf")), mask=m_out)
    tl.store(bounds + o_out, b_bounds, mask=m_out)


def blocks(queries: int, bulk: bool = False) -> dict[str, Any]:
    """The tile sizes and launch options, with the copy engine or without; no spills on sm_80 and sm_90."""
    size = min(128 if bulk else 64, max(16, triton.next_power_of_2(queries)))
    options = {"BLOCK_B": size, "BLOCK_N": 128, "BLOCK_D": 128, "num_warps": 4, "num_stages": 4}
    if size == 16:
        return {**options, "BLOCK_N": 64, "BLOCK_D": 256}
    if size == 32:
        return options
    if size == 64:
        return {**options, "num_warps": 4 if bulk else 8, "num_stages": 3}
    return {**options, "num_warps": 8}


def group_size(queries: int, rows: int) -> int:
    """Rows that share two words. Of each group only the best row helps to raise the bar, so groups are as small as memory
    allows: with few of them the bar stands so low that the lists overflow."""
    return next(size for size in (32, 64, 128) if size == 128 or queries * rows <= size * MOST_GROUPS)


def sweep(
    query: Tensor, codes: Tensor, scales: Tensor, residuals: Tensor, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """left (B, 2, groups) float32, the two words of each group for each query, and the queries' unit (B,) float32.

    query (B, D) float32, bfloat16 or float16; codes (N, D) int8, scales and residuals (N,) float32; B and N > 0; exclude (B, E)
    int64 rows or -1.
    """
    B, D = query.shape
    N = codes.shape[0]
    # Rows lie a multiple of 16 bytes apart, for the copy engine.
    planes = torch.empty((triton.cdiv(B, 8) * 16, triton.cdiv(D, 16) * 16), dtype=torch.int8, device=query.device)
    unit, reach, spread = torch.empty((3, B), dtype=torch.float32, device=query.device)
    # Above 14 bits the low plane would leave int8; the int32 sums of long rows leave fewer.
    limit = min(8191, (2**31 - 1) // (127 * D))
    quantise_kernel[(B,)](
        query, planes, unit, reach, spread, D, query.stride(0), planes.stride(0), float(limit), BLOCK_D=1024
    )
    bulk = bulk_serves(planes, codes)
    options, group = blocks(B, bulk), group_size(B, N)
    groups = triton.cdiv(N, group)
    left = torch.empty((B, 2, groups), dtype=torch.float32, device=query.device)
    sources = planes, codes
    if bulk:
        sources = (
            TensorDescriptor.from_tensor(planes[:, :D], [2 * options["BLOCK_B"], options["BLOCK_D"]]),
            TensorDescriptor.from_tensor(codes, [options["BLOCK_N"], options["BLOCK_D"]]),
        )
    int8_sweep_kernel[(triton.cdiv(N, options["BLOCK_N"]) * triton.cdiv(B, options["BLOCK_B"]),)](
        *sources, scales, residuals, reach, spread, exclude, left[:, 0], left[:, 1].view(torch.int32), N, B, D,
        0 if exclude is None else exclude.shape[1], groups, left.stride(0), planes.stride(0), codes.stride(0),
        BULK=bulk, GROUP=group, **options,
    )  # fmt: skip
    return left, unit


def top_k(
    query: Tensor, rows: Tensor, codes: Tensor, scales: Tensor, residuals: Tensor, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores (B, k) float32, ids (B, k), nan_count, rescored and fallbacks (B,) int64: the exact top k in float64.

    query (B, D) and rows (N, D) float32, bfloat16 or float16, one row contiguous; codes (N, D) int8, scales and residuals (N,)
    float32; exclude (B, E) int64 rows or -1, or None. Equal scores by ascending row; -inf and -1 fill up. rescored counts the
    rows whose exact score was computed, fallbacks is 1 where all of them were.
    """
    B = query.shape[0]
    if not B or not len(rows):  # nothing to launch
        counted = torch.zeros((3, B), dtype=torch.int64, device=query.device)
        return (
            torch.full((B, k), float("-inf"), device=query.device),
            torch.full((B, k), -1, dtype=torch.int64, device=query.device),
            *counted,
        )
    query = query.contiguous()
    left, unit = sweep(query, codes, scales, residuals, exclude)
    return exact_top(query, rows, left, unit, k, exclude, group_size(B, len(rows)))
