"""Attention over shared prefixes on a GPU, for many queries a row, and its backward for any number: bound by matrix products.

With many queries a row there are tiles enough, and a program of `forward_kernel` carries its tile of one row's queries over
all keys: those of the prefix, which rows share in the L2 cache and not in a tile, then those of the suffix. Backward makes
the weights anew from the log-partition over both. `query_gradient_kernel` walks the same way, and leaves for every query the
product of output and its gradient, which `key_gradient_kernel` needs; that one holds a tile of keys and walks over the
queries that saw them, row after row, so that a gradient of the prefix is summed in the order of its rows, by one program.
Nothing of queries x keys lies in memory, nothing is added atomically, and a suffix is again the prefix of one row.

Why not torch's own kernels, as on the CPU: its flash attention takes no masks, its memory-efficient attention wants them as
numbers for every query and key, both add gradients in no fixed order, and rows that are shared unevenly would have to be
sorted and counted on the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from vsr1.kernels.prefix import LN2, LOG2E, attend, finished, mask_strides, per_query, visible

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
NUMBERS = ["group", "P", "S", "prefixes", "pm_set"]  # no length makes a new kernel


@triton.jit
def prefix_of(r, owner, group, prefixes):
    """The prefix of row r, int64, 0 where it has none, and whether it has one."""
    n = r // group if owner is None else tl.load(owner + r)
    known = (n >= 0) & (n < prefixes)
    return tl.where(known, n, 0), known


@triton.jit
def own_queries(L, HEADS: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's row and key head, int64; the numbers of its tile's queries among the SHARE x L that read this head, and
    which of them there are; their numbers among all queries."""
    tiles = tl.cdiv(SHARE * L, BLOCK_M)
    r = (tl.program_id(0) // (tiles * HEADS)).to(tl.int64)
    head = (tl.program_id(0) // tiles % HEADS).to(tl.int64)
    o_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return r, head, o_m, o_m < SHARE * L, (r * HEADS + head) * SHARE * L + o_m


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q, k_prefix, v_prefix, k_suffix, v_suffix, owner, prefix_mask, suffix_mask, out, lse,
    group, prefixes, L, P, S, scale,
    kp_set, kp_head, kp_key, vp_set, vp_head, vp_key, ks_set, ks_head, ks_key, vs_set, vs_head, vs_key,
    pm_set, pm_query, sm_set, sm_query,
    HEADS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (R, Hq, L, D) and lse (R, Hq, L); NaN for a row whose owner is no prefix. A program: a tile of a row and key head."""
    r, head, o_m, m_m, o_out = own_queries(L, HEADS, SHARE, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_out = m_m[:, None] & (o_d < D)[None, :]
    b_q = tl.load(q + o_out[:, None] * D + o_d[None, :], mask=m_out, other=0.0)
    n, known = prefix_of(r, owner, group, prefixes)
    if prefix_mask is not None:
        prefix_mask += n * pm_set
    if suffix_mask is not None:
        suffix_mask += r * sm_set
    b_out, b_peak, b_mass = attend(
        b_q, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32), k_prefix + n * kp_set + head * kp_head, v_prefix + n * vp_set + head * vp_head,
        prefix_mask, o_m % L, 0, P, scale * LOG2E, kp_key, vp_key, pm_query, D, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    b_out, b_peak, b_mass = attend(
        b_q, b_out, b_peak, b_mass, k_suffix + r * ks_set + head * ks_head, v_suffix + r * vs_set + head * vs_head,
        suffix_mask, o_m % L, 0, S, scale * LOG2E, ks_key, vs_key, sm_query,
        D, PER_QUERY, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    b_out, b_level = finished(b_out, b_peak, b_mass)
    b_level = tl.where(b_mass == 0.0, 0.0, b_level * LN2)
    tl.store(lse + o_out, tl.where(known, b_level, float("nan")), mask=m_m)
    b_out = tl.where(known, b_out, float("nan"))
    tl.store(out + o_out[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def differentiate(
    b_gradient, b_q, b_upstream, b_lse, b_delta, keys, values, mask, o_query, K, scale,
    key_stride, value_stride, mask_query,
    D: tl.constexpr, PER_QUERY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries, but for the scale, with what the K keys of one set and head add; b_lse to the base 2."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    for start in range(0, K, BLOCK_N):
        o_key = start + tl.arange(0, BLOCK_N)
        m_key = o_key < K
        p_k = keys + o_key[:, None].to(tl.int64) * key_stride + o_d[None, :]
        b_k = tl.load(p_k, mask=m_key[:, None] & m_d[None, :], other=0.0)
        p_v = values + o_key[None, :].to(tl.int64) * value_stride + o_d[:, None]
        b_v = tl.load(p_v, mask=m_key[None, :] & m_d[:, None], other=0.0)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2E)
        seen = visible(mask, o_query[:, None], o_key[None, :], m_key[None, :], mask_query, PER_QUERY)
        b_weight = tl.exp2(tl.where(seen, b_scores - b_lse[:, None], float("-inf")))
        b_slope = b_weight * (tl.dot(b_upstream, b_v, input_precision="ieee") - b_delta[:, None])
        b_gradient = tl.dot(b_slope.to(b_k.dtype), b_k, b_gradient, input_precision="ieee")
    return b_gradient


@triton.jit(do_not_specialize=NUMBERS)
def query_gradient_kernel(
    q, k_prefix, v_prefix, k_suffix, v_suffix, owner, prefix_mask, suffix_mask, upstream, out, lse, delta, gradient,
    group, prefixes, L, P, S, scale,
    kp_set, kp_head, kp_key, vp_set, vp_head, vp_key, ks_set, ks_head, ks_key, vs_set, vs_head, vs_key,
    pm_set, pm_query, sm_set, sm_query,
    HEADS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gradient (R, Hq, L, D) of q, and delta (R, Hq, L), the products of out and upstream; programs as those of forward."""
    r, head, o_m, m_m, o_out = own_queries(L, HEADS, SHARE, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_out = m_m[:, None] & (o_d < D)[None, :]
    o_tile = o_out[:, None] * D + o_d[None, :]
    b_q = tl.load(q + o_tile, mask=m_out, other=0.0)
    b_upstream = tl.load(upstream + o_tile, mask=m_out, other=0.0)
    b_out = tl.load(out + o_tile, mask=m_out, other=0.0)
    b_delta = tl.sum(b_upstream.to(tl.float32) * b_out.to(tl.float32), axis=1)
    tl.store(delta + o_out, b_delta, mask=m_m)
    b_lse = tl.load(lse + o_out, mask=m_m, other=0.0) * LOG2E
    n, _ = prefix_of(r, owner, group, prefixes)
    if prefix_mask is not None:
        prefix_mask += n * pm_set
    if suffix_mask is not None:
        suffix_mask += r * sm_set
    b_gradient = differentiate(
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32), b_q, b_upstream, b_lse, b_delta,
        k_prefix + n * kp_set + head * kp_head, v_prefix + n * vp_set + head * vp_head, prefix_mask, o_m % L, P, scale,
        kp_key, vp_key, pm_query, D, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    b_gradient = differentiate(
        b_gradient, b_q, b_upstream, b_lse, b_delta,
        k_suffix + r * ks_set + head * ks_head, v_suffix + r * vs_set + head * vs_head, suffix_mask, o_m % L, S, scale,
        ks_key, vs_key, sm_query, D, PER_QUERY, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    tl.store(gradient + o_tile, (b_gradient * scale).to(gradient.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["group", "R", "K"])
def key_gradient_kernel(
    q, k, v, owner, mask, upstream, lse, delta, k_gradient, v_gradient, group, R, L, K, scale,
    k_set, k_head, k_key, v_set, v_head, v_key, mask_set, mask_query,
    HEADS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients (sets, HEADS, K, D) of the prefixes or of the suffixes. One program a tile of keys of one set and head."""
    tiles = tl.cdiv(K, BLOCK_N)
    n = (tl.program_id(0) // (tiles * HEADS)).to(tl.int64)
    head = (tl.program_id(0) // tiles % HEADS).to(tl.int64)
    o_key = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_key = o_key < K
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_tile = m_key[:, None] & m_d[None, :]
    p_k = k + n * k_set + head * k_head + o_key[:, None].to(tl.int64) * k_key + o_d[None, :]
    p_v = v + n * v_set + head * v_head + o_key[:, None].to(tl.int64) * v_key + o_d[None, :]
    b_k = tl.load(p_k, mask=m_tile, other=0.0)
    b_v = tl.load(p_v, mask=m_tile, other=0.0)
    if mask is not None:
        mask += n * mask_set
    b_of_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_of_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first, last = n * group, n * group + group
    if owner is not None:
        first, last = n * 0, n * 0 + R
    for r in range(first, last):
        queries = SHARE * L
        if owner is not None:
            queries = tl.where(tl.load(owner + r) == n, queries, 0)
        for start in range(0, queries, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < queries
            o_out = (r * HEADS + head) * SHARE * L + o_m
            m_q = m_m[:, None] & m_d[None, :]
            b_q = tl.load(q + o_out[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
            b_upstream = tl.load(upstream + o_out[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
            b_lse = tl.load(lse + o_out, mask=m_m, other=0.0) * LOG2E
            b_delta = tl.load(delta + o_out, mask=m_m, other=0.0)
            b_scores = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * (scale * LOG2E)
            met = m_key[:, None] & m_m[None, :]
            seen = visible(mask, (o_m % L)[None, :], o_key[:, None], met, mask_query, PER_QUERY)
            b_weight = tl.exp2(tl.where(seen, b_scores - b_lse[None, :], float("-inf")))
            b_of_v = tl.dot(b_weight.to(b_upstream.dtype), b_upstream, b_of_v, input_precision="ieee")
            b_slope = b_weight * (tl.dot(b_v, tl.trans(b_upstream), input_precision="ieee") - b_delta[None, :])
            b_of_k = tl.dot(b_slope.to(b_q.dtype), b_q, b_of_k, input_precision="ieee")
    o_tile = ((n * HEADS + head) * K + o_key[:, None]) * D + o_d[None, :]
    tl.store(k_gradient + o_tile, (b_of_k * scale).to(k_gradient.dtype.element_ty), mask=m_tile)
    tl.store(v_gradient + o_tile, b_of_v.to(v_gradient.dtype.element_ty), mask=m_tile)


def blocks(kernel: str, width: int, dtype: torch.dtype, hopper: bool) -> dict[str, Any]:
    """Tile sizes and launch options of "forward", "query_gradient" or "key_gradient", as measured on an H100.

    They spill no register but for float32 heads of more than 128 numbers, and on Hopper the gradient of keys, where four
    warps that spill a few are twice as fast as eight that spill none.
    """
    size = max(16, triton.next_power_of_2(width))
    warps, stages = 8, 2
    if dtype == torch.float32:  # multiplied in full, without tensor cores
        rows, keys, stages = 16, 16, 1
    elif size > 128:
        rows, keys = (32, 32) if kernel == "key_gradient" else (64, 32)
    elif hopper and kernel != "key_gradient":
        rows, keys, stages = 128, 64, 3 if kernel == "forward" else 2
    else:
        rows, keys, warps = 64, 64, 4 if hopper else 8
    return {"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_D": size, "num_warps": warps, "num_stages": stages}


def forward(
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
    """Out and log-partition, of the tensors that `vsr1.kernels.prefix.decode` takes."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sides = k_prefix, v_prefix, k_suffix, v_suffix
    _walk(forward_kernel, q, sides, owner, prefix_mask, aligned(suffix_mask), (out, lse), scale)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    owner: Tensor | None,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Gradients:
    """Gradients in q, keys and values, from that of the output and what forward gave; all three contiguous."""
    of_q, delta = torch.empty_like(q), torch.empty_like(lse)
    suffix_mask = aligned(suffix_mask)
    sides = k_prefix, v_prefix, k_suffix, v_suffix
    _walk(query_gradient_kernel, q, sides, owner, prefix_mask, suffix_mask, (grad, out, lse, delta, of_q), scale)
    R, query_heads, L, D = q.shape
    of_keys = []
    for k, v, owns, mask in ((k_prefix, v_prefix, owner, prefix_mask), (k_suffix, v_suffix, None, suffix_mask)):
        sets, heads, K, _ = k.shape
        gradients = [torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2)]
        chosen = blocks("key_gradient", D, q.dtype, is_hopper(q.device))
        if sets and K:
            key_gradient_kernel[(sets * heads * triton.cdiv(K, chosen["BLOCK_N"]),)](
                q, k, v, owns, mask, grad, lse, delta, *gradients, triton.cdiv(R, sets), R, L, K, scale,
                *k.stride()[:3], *v.stride()[:3], *mask_strides(mask),
                HEADS=heads, SHARE=query_heads // heads, D=D, PER_QUERY=per_query(mask), **chosen,
            )  # fmt: skip
        of_keys += gradients
    return of_q, of_keys[0], of_keys[1], of_keys[2], of_keys[3]


def _walk(
    kernel: Any,
    q: Tensor,
    sides: tuple[Tensor, ...],
    owner: Tensor | None,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    others: tuple[Tensor, ...],
    scale: float,
) -> None:
    """Launches `kernel`, which takes tiles of queries over all their keys, with what is its own in `others`."""
    (R, query_heads, L, D), (prefixes, heads, P, _), S = q.shape, sides[0].shape, sides[2].shape[2]
    chosen = blocks(kernel.fn.__name__.removesuffix("_kernel"), D, q.dtype, is_hopper(q.device))
    share = query_heads // heads
    kernel[(R * heads * triton.cdiv(share * L, chosen["BLOCK_M"]),)](
        q, *sides, owner, prefix_mask, suffix_mask, *others, triton.cdiv(R, max(prefixes, 1)), prefixes, L, P, S, scale,
        *(stride for side in sides for stride in side.stride()[:3]),
        *mask_strides(prefix_mask), *mask_strides(suffix_mask),
        HEADS=heads, SHARE=share, D=D, PER_QUERY=per_query(suffix_mask), **chosen,
    )  # fmt: skip


def aligned(mask: Tensor | None) -> Tensor | None:
    """With rows that begin at multiples of 16 bytes: read byte by byte, a mask's addresses alone would fill the registers."""
    if mask is None or not per_query(mask) or not any(stride % 16 for stride in mask.stride()[:2]):
        return mask
    return F.pad(mask, (0, -mask.shape[2] % 16))[..., : mask.shape[2]]


def is_hopper(device: torch.device) -> bool:
    """Whether the GPU has the shared memory and the products of one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
