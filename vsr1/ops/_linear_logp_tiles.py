"""linear_logp tile by tile: the matrix products and their order, the same for every backend but the reference.

The vocabulary passes by in tiles of words, and for each of them all rows, in blocks if they are many. So a tile of the weight is
read (and widened, where it must be) once, its gradient is complete when the next tile begins, and what is kept beside a tile of
logits is three or four numbers a row and the gradient of the hidden states. A backend adds what happens to a tile between its
products: `add` on the way forward, `differentiate` on the way back.

The products are those of the fastest library at hand. Half types are multiplied as they are where the hardware can, and summed in
float32; elsewhere a tile of the weight is widened to float32 first, which on such processors is several times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

LEAST_COLUMNS = 256
"""Words in the narrowest tile: below it the products are mostly overhead."""


@dataclass(frozen=True)
class Shape:
    """What bounds a tile: bytes of scratch unless the caller says otherwise, the bytes that one logit takes, rows, columns."""

    budget: int
    per_logit: int
    most_rows: int
    most_columns: int

    def tile(self, rows: int, vocabulary: int, budget: int | None) -> tuple[int, int]:
        """Rows and columns of a tile: as many rows as may be, columns for the rest of the budget, at least LEAST_COLUMNS."""
        logits = (budget or self.budget) // self.per_logit
        height = max(1, min(rows, self.most_rows))
        width = min(vocabulary, self.most_columns, max(LEAST_COLUMNS, logits // height // 64 * 64))
        return max(1, min(height, logits // width)), width


@dataclass(frozen=True)
class Tile:
    """Products of some rows with some words: logits before bias and temperature."""

    products: Tensor
    """(rows, words)"""
    first: int
    """The number of the first word."""
    target: Tensor
    """(rows,) int64"""
    bias: Tensor | None
    """(words,) float32, already divided by the temperature."""
    scale: float
    """1 / temperature."""


@dataclass(frozen=True)
class Sums:
    """(rows,) float32 each: what is known of the rows after some tiles."""

    peak: Tensor
    """The highest logit, -inf before the first tile."""
    total: Tensor
    """The sum of exp(logit - peak)."""
    weighted: Tensor | None
    """The sum of exp(logit - peak) (logit - peak); None where no entropy is asked for."""
    picked: Tensor
    """The target's logit."""

    def rows(self, block: slice) -> Sums:
        return Sums(*(None if one is None else one[block] for one in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Upstream:
    """(rows,) float32 each: what the gradient of a row's logits is made of."""

    lse: Tensor
    logp: Tensor
    """The gradient of the log-probability."""
    entropy: Tensor | None
    """The gradient of the entropy; None where there is none."""
    entropy_value: Tensor | None

    def rows(self, block: slice | Tensor) -> Upstream:
        return Upstream(*(None if one is None else one[block] for one in vars(self).values()))  # type: ignore[arg-type]


class Kernels(Protocol):
    """What a backend does to a tile."""

    shape: Shape

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which hidden states and weight of this type are multiplied."""
        ...

    def logit_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of the logits that products of that type give."""
        ...

    def add(self, tile: Tile, sums: Sums) -> None:
        """Adds the tile to the sums of its rows."""
        ...

    def differentiate(self, tile: Tile, upstream: Upstream, dtype: torch.dtype) -> Tensor:
        """The gradient (rows, words) of the products, of type `dtype`; the tile may be overwritten with it."""
        ...


def forward(
    kernels: Kernels,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    entropy: bool,
    budget: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp (T,), entropy (T,) or (0,), and the log-partition (T,), float32."""
    rows, vocabulary = len(hidden), len(weight)
    sums = Sums(
        peak=hidden.new_full((rows,), -math.inf, dtype=torch.float32),
        total=hidden.new_zeros(rows, dtype=torch.float32),
        weighted=hidden.new_zeros(rows, dtype=torch.float32) if entropy else None,
        # It stays so for a target outside the vocabulary.
        picked=hidden.new_full((rows,), math.nan, dtype=torch.float32),
    )
    dtype = kernels.product_dtype(hidden.dtype)
    hidden = hidden.to(dtype)
    height, width = kernels.shape.tile(rows, vocabulary, budget)
    scratch = hidden.new_empty((height, width), dtype=kernels.logit_dtype(dtype))
    for words in parts(vocabulary, width):
        some_weight = weight[words].to(dtype)
        for block in parts(rows, height):
            tile = _tile(scratch, hidden[block], some_weight, target[block], bias, temperature, words)
            kernels.add(tile, sums.rows(block))
    # total >= 1, the peak's own term, and picked <= peak, in floating point too: logp <= 0.
    logs = sums.total.log()
    logp = (sums.picked - sums.peak) - logs
    # What rounding leaves below 0 of a row that is certain; NaN stays.
    uncertainty = logp.new_empty(0) if sums.weighted is None else (logs - sums.weighted / sums.total).clamp_(min=0.0)
    return logp, uncertainty, sums.peak + logs


def backward(
    kernels: Kernels,
    upstream: Upstream,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    needs: list[bool],
    budget: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias of these rows, at least one, each empty where `needs` says it is not wanted.

    That of hidden is float32, the others are of the weight's type.
    """
    need_hidden, need_weight, need_bias = needs
    rows, vocabulary = len(hidden), len(weight)
    dtype = kernels.product_dtype(hidden.dtype)
    hidden = hidden.to(dtype)
    height, width = kernels.shape.tile(rows, vocabulary, budget)
    scratch = hidden.new_empty((height, width), dtype=kernels.logit_dtype(dtype))
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=torch.float32)
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    grad_bias = weight.new_empty(vocabulary if need_bias else 0)
    # Where a tile's gradient comes of one product, or its type loses nothing, it is made in its place.
    in_place = weight.dtype == dtype and (height >= rows or dtype == torch.float32)
    sums = weight.new_empty((width, weight.shape[1]) if need_weight and not in_place else (0, 0), dtype=torch.float32)
    for words in parts(vocabulary, width):
        some_weight = weight[words].to(dtype)
        words_sum = grad_weight[words] if in_place else sums[: len(some_weight)]
        bias_sum = hidden.new_zeros(len(some_weight), dtype=torch.float32)
        for block in parts(rows, height):
            tile = _tile(scratch, hidden[block], some_weight, target[block], bias, temperature, words)
            gradient = kernels.differentiate(tile, upstream.rows(block), dtype)
            if need_hidden:
                _multiply(gradient, some_weight, grad_hidden[block], add=True)
            if need_weight:
                _multiply(gradient.T, hidden[block], words_sum, add=block.start > 0)
            if need_bias:
                bias_sum += gradient.sum(0, dtype=torch.float32)
        if need_weight and not in_place:
            grad_weight[words] = words_sum
        if need_bias:
            grad_bias[words] = bias_sum
    return grad_hidden, grad_weight, grad_bias


def parts(length: int, step: int) -> Iterator[slice]:
    """[0, length) in steps, the last of which may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _tile(
    scratch: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    words: slice,
) -> Tile:
    products = scratch[: len(hidden), : len(weight)]
    _multiply(hidden, weight.T, products)
    some_bias = None if bias is None else bias[words].float() / temperature
    return Tile(products, words.start, target, some_bias, 1.0 / temperature)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b. `out` may be float32 where a and b are not."""
    options: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if options and not a.is_cuda:  # where torch knows no products with another result
        out.add_(torch.mm(a, b)) if add else out.copy_(torch.mm(a, b))
    elif add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)
