"""The row kernels of linear_logp on a GPU: what happens to a tile of logits between its matrix products, which are cuBLAS'.

Why not one kernel. With T = 8192 rows, V = 151,936 words and H = 2048 a product is 5.1 TFLOP: 7.0 ms at the 728 TFLOP/s that
cuBLAS reaches on an H100 at such shapes (TRL #7244). Forward is one product, backward three (logits again, hidden, weight),
28 ms together. A row kernel fused into forward's product would save writing and reading the logits, 8 bytes each, at most 3 ms;
but Triton's own products reach some 80 % of cuBLAS' there, which costs 1.7 ms each. In backward the gradient of a tile feeds two
products with different inner axes and has to lie in memory anyway. All that ever lies there is a tile of 8192 x 4096 logits,
128 MiB, and its gradient, 64 MiB; of either, L2 keeps a part. Expected are 28 ms of products and 5 to 7 ms of row kernels, so
33 to 35 ms forward and backward; it is not measured. 25 ms would take three products in place of four, for which the logits
(2.3 GiB in bfloat16) would have to be kept from forward to backward.

One program takes one row of a tile. It carries a running peak from block to block, so the row is read once; in tiles of 4096
words the row is one block. Sizes are run-time values, offsets 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@triton.jit
def _logits(products, bias, i, o_column, m_column, stride, scale):
    """(BLOCK,) float32 logits of row i, -inf past the tile's end."""
    b_logits = tl.load(products + i * stride + o_column, mask=m_column, other=0.0).to(tl.float32) * scale
    if bias is not None:
        b_logits += tl.load(bias + o_column, mask=m_column, other=0.0)
    return tl.where(m_column, b_logits, float("-inf"))


@triton.jit
def _bounded(b_x):
    """x, or -87 below it, where its product with exp(x) is 0 for all purposes, also for -inf."""
    return tl.where(b_x < -87.0, -87.0, b_x)


@triton.jit(do_not_specialize=["columns", "first"])
def add_kernel(
    products, bias, target, peak, total, weighted, picked, columns, stride, first, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds a tile (rows, columns) of the words from `first` on to its rows' peak, total, weighted (optional) and picked."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.load(target + i) - first
    highest = tl.load(peak + i)
    mass = tl.load(total + i)
    if weighted is not None:
        moment = tl.load(weighted + i)
    for start in range(0, columns, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        b_logits = _logits(products, bias, i, o_column, o_column < columns, stride, scale)
        raised = tl.maximum(highest, tl.max(b_logits))
        level = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - -inf would be NaN
        drop = tl.where(highest == float("-inf"), 0.0, highest - level)
        shrink = tl.exp(drop)
        b_below = b_logits - level
        b_weight = tl.exp(b_below)
        if weighted is not None:
            moment = shrink * (moment + drop * mass) + tl.sum(b_weight * _bounded(b_below))
        mass = shrink * mass + tl.sum(b_weight)
        highest = raised
        if (column >= start) & (column < tl.minimum(start + BLOCK, columns)):
            tl.store(picked + i, tl.sum(tl.where(o_column == column, b_logits, 0.0)))
    tl.store(peak + i, highest)
    tl.store(total + i, mass)
    if weighted is not None:
        tl.store(weighted + i, moment)


@triton.jit(do_not_specialize=["columns", "first"])
def differentiate_kernel(
    products, bias, target, lse, upstream, slope, entropy, gradient, columns, stride, gradient_stride, first, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient (rows, columns) of the products, which it may overwrite; slope and entropy (rows,) are optional."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.load(target + i) - first
    row_lse = tl.load(lse + i)
    up = tl.load(upstream + i)
    level = up
    steep = 0.0
    if slope is not None:
        steep = tl.load(slope + i)
        level = up + steep * tl.load(entropy + i)
    # A row without upstream gradient gets none, though its hidden state be NaN.
    dead = (up == 0.0) & (steep == 0.0)
    for start in range(0, columns, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        m_column = o_column < columns
        b_log_p = _logits(products, bias, i, o_column, m_column, stride, scale) - row_lse
        b_slope = level
        if slope is not None:
            b_slope = level + steep * _bounded(b_log_p)
        b_gradient = tl.where(o_column == column, up, 0.0) - tl.exp(b_log_p) * b_slope
        b_gradient = tl.where(dead, 0.0, b_gradient * scale)
        tl.store(gradient + i * gradient_stride + o_column, b_gradient.to(gradient.dtype.element_ty), mask=m_column)


def add_logits(
    products: Tensor,
    first: int,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    peak: Tensor,
    total: Tensor,
    weighted: Tensor | None,
    picked: Tensor,
) -> None:
    """Adds a tile of products (rows, columns) to the (rows,) float32 sums of its rows: vsr1.ops._linear_logp_tiles.Sums."""
    rows, columns = products.shape
    add_kernel[(rows,)](
        products, bias, target, peak, total, weighted, picked, columns, products.stride(0), first, scale,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def logits_to_gradient(
    products: Tensor,
    first: int,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    upstream: Tensor,
    slope: Tensor | None,
    entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient (rows, columns) of the products: in their place, or in a tile of its own where `dtype` is another."""
    rows, columns = products.shape
    gradient = products
    if dtype != products.dtype:
        gradient = products.new_empty((rows, products.stride(0)), dtype=dtype)[:, :columns]  # its rows begin aligned
    differentiate_kernel[(rows,)](
        products, bias, target, lse, upstream, slope, entropy, gradient, columns, products.stride(0), gradient.stride(0),
        first, scale, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return gradient
