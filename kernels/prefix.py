"""Attention over shared prefixes on a GPU, for few queries a row: two launches, bound by reading keys and values once.

A decoder asks one query a row, and all rows of a prefix, with all query heads that read one key head, see the same keys. They
are folded into one axis of queries, so that a tile of keys is read once and met by all of them in one matrix product; a suffix is
met by the queries of its own row in the same way. Few prompts would keep few multiprocessors busy, so the keys are split into
spans of equal length, those of the prefixes and those of the suffixes, each a program: `part_kernel` leaves for every query and
span the output and the log-partition of a softmax over the span alone, in float32. `merge_kernel` adds up what a query has in all
spans, each weighted by its share of the whole partition, which gives the softmax over all keys.

Which rows belong to a prefix is found by its programs, each of which counts through the owners: sorting them would be a handful
of launches more. Log-partitions are to the base 2 inside, scores are scaled to it. No sum depends on the order of programs;
lengths and numbers of rows are run-time values, and offsets of 64 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 2  # spans for every multiprocessor; more cost more partial outputs than they hide latency
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST_SPAN = 128  # keys; below that writing and reading a partial output takes longer than the keys


@triton.jit
def visible(mask, o_query, o_key, m_key, query_stride, PER_QUERY: tl.constexpr):
    """Which keys of a set may be seen, by its mask's one row or by the row of each query; the two indices are broadcast."""
    seen = m_key
    if mask is not None:
        p_mask = mask + o_key
        if PER_QUERY:
            p_mask += o_query.to(tl.int64) * query_stride
        seen = tl.load(p_mask, mask=m_key, other=0) != 0
    return seen


@triton.jit
def attend(
    b_q, b_out, b_peak, b_mass, keys, values, mask, o_query, first, last, scale,
    key_stride, value_stride, mask_query,
    D: tl.constexpr, PER_QUERY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax of a tile of queries, carried over keys `first` to `last` of one set and head."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    for start in range(first, last, BLOCK_N):
        o_key = start + tl.arange(0, BLOCK_N)
        m_key = o_key < last
        p_k = keys + o_key[None, :].to(tl.int64) * key_stride + o_d[:, None]
        b_k = tl.load(p_k, mask=m_key[None, :] & m_d[:, None], other=0.0)
        b_scores = tl.dot(b_q, b_k, input_precision="ieee") * scale
        seen = visible(mask, o_query[:, None], o_key[None, :], m_key[None, :], mask_query, PER_QUERY)
        b_scores = tl.where(seen, b_scores, float("-inf"))
        b_raised = tl.maximum(b_peak, tl.max(b_scores, axis=1))
        b_level = tl.where(b_raised == float("-inf"), 0.0, b_raised)  # -inf less -inf would be NaN
        b_shrink = tl.exp2(b_peak - b_level)
        b_weight = tl.exp2(b_scores - b_level[:, None])
        b_mass = b_mass * b_shrink + tl.sum(b_weight, axis=1)
        p_v = values + o_key[:, None].to(tl.int64) * value_stride + o_d[None, :]
        b_v = tl.load(p_v, mask=m_key[:, None] & m_d[None, :], other=0.0)
        b_out = tl.dot(b_weight.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
        b_peak = b_raised
    return b_out, b_peak, b_mass


@triton.jit
def finished(b_out, b_peak, b_mass):
    """Output and log-partition, to the base 2, of a running softmax: 0 and -inf of a query that has seen nothing."""
    b_whole = tl.where(b_mass == 0.0, 1.0, b_mass)
    return b_out / b_whole[:, None], b_peak + tl.log2(b_whole)


@triton.jit
def rows_of(n, slot, owner, group, R, BLOCK_R: tl.constexpr):
    """The rows at places `slot` among those of prefix n, int64, and how many it has."""
    b_row = n * group + slot
    count = group
    if owner is not None:
        b_row = tl.zeros(slot.shape, tl.int64)
        count = 0
        for start in range(0, R, BLOCK_R):
            o_row = start + tl.arange(0, BLOCK_R)
            b_mine = (tl.load(owner + o_row, mask=o_row < R, other=-1) == n).to(tl.int32)
            b_place = count + tl.cumsum(b_mine, axis=0) - b_mine
            b_here = (b_place[None, :] == slot[:, None]) & (b_mine[None, :] != 0)
            b_row += tl.sum(tl.where(b_here, o_row[None, :], 0), axis=1)
            count += tl.sum(b_mine, axis=0)
    return b_row, count


@triton.jit
def part(
    job, q, k, v, owner, mask, parts, levels, group, R, L, K, tiles, span, splits, first_split, all_splits, scale,
    k_set, k_head, k_key, v_set, v_head, v_key, mask_set, mask_query,
    HEADS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One span of one set of keys and head, and one tile of the queries that meet it."""
    split = job % splits
    tile = job // splits % tiles
    head = job // (splits * tiles) % HEADS
    n = (job // (splits * tiles * HEADS)).to(tl.int64)
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row, count = rows_of(n, o_m // (SHARE * L), owner, group, R, 64)
    m_m = o_m < count * SHARE * L
    o_out = (o_row * HEADS + head) * SHARE * L + o_m % (SHARE * L)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_q = tl.load(q + o_out[:, None] * D + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    first = split * span
    last = tl.where(tile * BLOCK_M < count * SHARE * L, tl.minimum(first + span, K), first)
    if mask is not None:
        mask += n * mask_set
    b_out, b_peak, b_mass = attend(
        b_q, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32), k + n * k_set + head.to(tl.int64) * k_head,
        v + n * v_set + head.to(tl.int64) * v_head, mask, o_m % L, first, last, scale,
        k_key, v_key, mask_query, D, PER_QUERY, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    b_out, b_level = finished(b_out, b_peak, b_mass)
    o_part = o_out * all_splits + first_split + split
    tl.store(levels + o_part, b_level, mask=m_m)
    tl.store(parts + o_part[:, None] * D + o_d[None, :], b_out, mask=m_m[:, None] & m_d[None, :])


@triton.jit(
    do_not_specialize=[
        "group", "R", "prefixes", "P", "S", "prefix_tiles", "suffix_tiles", "span", "prefix_splits", "suffix_splits",
        "pm_set", "pm_query", "sm_set", "sm_query",
    ]
)  # fmt: skip
def part_kernel(
    q, k_prefix, v_prefix, k_suffix, v_suffix, owner, prefix_mask, suffix_mask, parts, levels,
    group, R, prefixes, L, P, S, prefix_tiles, suffix_tiles, span, prefix_splits, suffix_splits, scale,
    kp_set, kp_head, kp_key, vp_set, vp_head, vp_key, ks_set, ks_head, ks_key, vs_set, vs_head, vs_key,
    pm_set, pm_query, sm_set, sm_query,
    HEADS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, PER_QUERY: tl.constexpr,
    PREFIX_M: tl.constexpr, SUFFIX_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts (R, Hq, L, splits, D) and levels (R, Hq, L, splits), of the prefix's spans and behind them of the suffix's."""
    job = tl.program_id(0)
    all_splits = prefix_splits + suffix_splits
    prefix_jobs = prefixes * HEADS * prefix_tiles * prefix_splits
    if job < prefix_jobs:
        part(
            job, q, k_prefix, v_prefix, owner, prefix_mask, parts, levels,
            group, R, L, P, prefix_tiles, span, prefix_splits, 0, all_splits, scale,
            kp_set, kp_head, kp_key, vp_set, vp_head, vp_key, pm_set, pm_query,
            HEADS, SHARE, D, False, PREFIX_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:  # a suffix is the prefix of one row
        part(
            job - prefix_jobs, q, k_suffix, v_suffix, None, suffix_mask, parts, levels,
            1, R, L, S, suffix_tiles, span, suffix_splits, prefix_splits, all_splits, scale,
            ks_set, ks_head, ks_key, vs_set, vs_head, vs_key, sm_set, sm_query,
            HEADS, SHARE, D, PER_QUERY, SUFFIX_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "prefixes", "queries"])
def merge_kernel(
    parts, levels, owner, out, lse, splits, prefixes, queries,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (R, queries, D) and lse (R, queries) from the parts; NaN for a row whose owner is no prefix. One program a query."""
    i = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    top = float("-inf")
    for start in range(0, splits, BLOCK_S):
        o_split = start + tl.arange(0, BLOCK_S)
        b_level = tl.load(levels + i * splits + o_split, mask=o_split < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(b_level, axis=0))
    top = tl.where(top == float("-inf"), 0.0, top)
    mass = 0.0
    b_out = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        o_split = start + tl.arange(0, BLOCK_S)
        m_split = o_split < splits
        b_weight = tl.exp2(tl.load(levels + i * splits + o_split, mask=m_split, other=float("-inf")) - top)
        p_part = parts + (i * splits + o_split[:, None]) * D + o_d[None, :]
        b_part = tl.load(p_part, mask=m_split[:, None] & m_d[None, :], other=0.0)
        mass += tl.sum(b_weight, axis=0)
        b_out += tl.sum(b_weight[:, None] * b_part, axis=0)
    whole = tl.where(mass == 0.0, 1.0, mass)  # of a query that sees nothing; its top is 0, and so is its log-partition
    b_out = b_out / whole
    log_partition = (top + tl.log2(whole)) * LN2
    if owner is not None:
        n = tl.load(owner + i // queries)
        known = (n >= 0) & (n < prefixes)
        b_out = tl.where(known, b_out, float("nan"))
        log_partition = tl.where(known, log_partition, float("nan"))
    tl.store(out + i * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)
    tl.store(lse + i, log_partition)


def part_blocks(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes and launch options but for the rows; with tensor cores, tiles of 16 KiB of keys and of values."""
    size = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:  # multiplied in full
        return {"BLOCK_N": 16, "BLOCK_D": size, "num_warps": 8, "num_stages": 1}
    return {
        "BLOCK_N": 64 if size <= 128 else 32,
        "BLOCK_D": size,
        "num_warps": 4 if size <= 128 else 8,
        "num_stages": 3,
    }


def tile_rows(queries: int, width: int, dtype: torch.dtype) -> int:
    """Of a tile for that many queries; no larger one fits into the registers."""
    most = 64 if width <= 128 and dtype != torch.float32 else 32
    return max(16, min(most, triton.next_power_of_2(queries)))


def decode(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    owner: Tensor | None,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out (R, Hq, L, D) in the dtype of q and log-partition (R, Hq, L), of at least one query; the sizes are those of
    `vsr1.ops._prefix_backends.forward`. Keys and values are dense in their last dimension, q and owner contiguous."""
    (R, query_heads, L, D), (prefixes, heads, P, _), S = q.shape, k_prefix.shape, k_suffix.shape[2]
    share = query_heads // heads
    group = triton.cdiv(R, max(prefixes, 1))
    usual, most = (group, group) if owner is None else (min(2 * group, R), R)
    prefix_rows, suffix_rows = (tile_rows(count * share * L, D, q.dtype) for count in (usual, 1))
    prefix_tiles, suffix_tiles = triton.cdiv(most * share * L, prefix_rows), triton.cdiv(share * L, suffix_rows)
    blocks = part_blocks(D, q.dtype)
    keys = heads * (prefixes * triton.cdiv(usual * share * L, prefix_rows) * P + R * suffix_tiles * S)
    span = max(LEAST_SPAN, triton.cdiv(keys, PROGRAMS * multiprocessors(q.device)))
    span = triton.cdiv(span, blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    prefix_splits, suffix_splits = triton.cdiv(P, span), triton.cdiv(S, span)
    splits = prefix_splits + suffix_splits
    parts = torch.empty((R, query_heads, L, splits, D), dtype=torch.float32, device=q.device)
    levels = torch.empty((R, query_heads, L, splits), dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((R, query_heads, L), dtype=torch.float32, device=q.device)
    jobs = heads * (prefixes * prefix_tiles * prefix_splits + R * suffix_tiles * suffix_splits)
    if jobs:
        part_kernel[(jobs,)](
            q, k_prefix, v_prefix, k_suffix, v_suffix, owner, prefix_mask, suffix_mask, parts, levels,
            group, R, prefixes, L, P, S, prefix_tiles, suffix_tiles, span, prefix_splits, suffix_splits,
            scale * LOG2E.value, *k_prefix.stride()[:3], *v_prefix.stride()[:3], *k_suffix.stride()[:3],
            *v_suffix.stride()[:3], *mask_strides(prefix_mask), *mask_strides(suffix_mask),
            HEADS=heads, SHARE=share, D=D, PER_QUERY=per_query(suffix_mask), PREFIX_M=prefix_rows, SUFFIX_M=suffix_rows,
            **blocks,
        )  # fmt: skip
    merge_kernel[(R * query_heads * L,)](
        parts, levels, owner, out, lse, splits, prefixes, query_heads * L,
        D=D, BLOCK_S=32, BLOCK_D=blocks["BLOCK_D"], num_warps=4,
    )  # fmt: skip
    return out, lse


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    """Of sets and of queries, 0 where all queries share one row."""
    if mask is None:
        return 0, 0
    return mask.stride(0), mask.stride(1) if per_query(mask) else 0


def per_query(mask: Tensor | None) -> bool:
    """Whether a mask has a row for each of several queries."""
    return mask is not None and mask.dim() == 3 and mask.shape[1] > 1


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; in the interpreter, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
