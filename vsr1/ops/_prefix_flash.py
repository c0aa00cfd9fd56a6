"""Shared-prefix attention on the CPU by torch's own flash kernels, with gradients: never more scores than a tile's are held.

The rows of a prefix are folded into one long axis of queries and meet it in one call, as every row meets its own suffix in
another; the two outputs are merged by their log-partitions. The backward of either part is torch's too, called with the
*merged* output and log-partition, from which it makes the weights under both: what ring attention does across machines.
With an `owner`, prefixes that have equally many rows go together, and their rows are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class _Bundle(NamedTuple):
    """Key sets and the rows that meet them, as many for each and side by side; None stands for all, in order."""

    sets: Tensor | None = None
    rows: Tensor | None = None


class _Side(NamedTuple):
    """The prefixes, or the suffixes: keys and values (n, Hkv, K, D), and what may be seen of them, (n, 1 or L, K)."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    bundles: list[_Bundle]

    def calls(self, q: Tensor) -> Iterator[tuple[_Bundle, Tensor, Tensor, Tensor, Tensor | None]]:
        """Bundle, folded queries, keys, values and mask (n, 1, 1 or M, K) of every call to torch."""
        for bundle in self.bundles:
            k, v = (dense(_pick(part, bundle.sets)) for part in (self.k, self.v))
            mask = None if self.mask is None else _pick(self.mask, bundle.sets)[:, None]
            if mask is not None and mask.shape[2] > 1:  # once for each query head that reads the key head
                mask = mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)
            yield bundle, _fold(q, bundle, k), k, v, mask


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
    """Out and log-partition as `_prefix_backends.forward` gives them, of float32 or bfloat16 tensors."""
    sides = _sides(q, k_prefix, v_prefix, k_suffix, v_suffix, owner, prefix_mask, suffix_mask)
    found = [_attend(q, side, scale) for side in sides if side.bundles]
    if not found:
        return q.new_zeros(q.shape), q.new_zeros(q.shape[:3], dtype=torch.float32)
    (out, lse), *others = found
    for other, level in others:
        both = torch.logaddexp(lse, level)
        centre = both.masked_fill(both == -torch.inf, 0)  # -inf less -inf would be NaN
        out = torch.mul(out, (lse - centre).exp_()[..., None]).addcmul(other, (level - centre).exp_()[..., None])
        lse = both
    return out.to(q.dtype).contiguous(), lse.masked_fill(lse == -torch.inf, 0).contiguous()


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
    """Gradients in q, keys and values; `out` and `lse` of the forward, whichever backend's."""
    sides = _sides(q, k_prefix, v_prefix, k_suffix, v_suffix, owner, prefix_mask, suffix_mask)
    grad_q = q.new_zeros(q.shape, dtype=torch.float32)
    found = []
    for side in sides:
        of_q, of_k, of_v = _differentiate(grad, q, side, out, lse, scale)
        grad_q += of_q
        found += [of_k.contiguous(), of_v.contiguous()]
    return grad_q.to(q.dtype), found[0], found[1], found[2], found[3]


def _attend(q: Tensor, side: _Side, scale: float) -> tuple[Tensor, Tensor]:
    """Out in the dtype of q and log-partition, -inf where nothing is seen, of one side alone."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    for bundle, query, k, v, mask in side.calls(q):
        found, level = _flash(query, k, v, attn_mask=_bias(mask, q.dtype), scale=scale)
        if mask is not None:
            level = level.masked_fill(~mask.any(-1), -torch.inf)  # torch says 0 of a query that sees nothing
        found, level = _unfold(found, q), _unfold(level, q)
        if bundle.rows is None:
            return found, level
        out[bundle.rows], lse[bundle.rows] = found, level
    return out, lse


def _differentiate(
    grad: Tensor, q: Tensor, side: _Side, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in q, keys and values of one side, from the output and log-partition of both."""
    grad_q, grad_k, grad_v = (part.new_zeros(part.shape) for part in (q, side.k, side.v))
    for bundle, query, k, v, mask in side.calls(q):
        upstream, merged, level = (_fold(part, bundle, k) for part in (grad, out, lse))
        bias = _bias(mask, q.dtype)
        of_q, of_k, of_v = _flash_backward(
            upstream, query, k, v, merged, level, 0.0, False, attn_mask=bias, scale=scale
        )
        of_q = _unfold(of_q, q)
        if bundle.rows is None:
            return of_q, of_k, of_v
        grad_q[bundle.rows], grad_k[bundle.sets], grad_v[bundle.sets] = of_q, of_k, of_v
    return grad_q, grad_k, grad_v


def _sides(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    owner: Tensor | None,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
) -> tuple[_Side, _Side]:
    """Prefix and suffix; without bundles where there is nothing to attend to, which torch's kernels do not take."""
    prefix = [_Bundle()] if owner is None else list(_bundles(owner, len(k_prefix)))
    return (
        _Side(
            k_prefix,
            v_prefix,
            None if prefix_mask is None else prefix_mask[:, None],
            prefix if _any(q, k_prefix) else [],
        ),
        _Side(k_suffix, v_suffix, suffix_mask, [_Bundle()] if _any(q, k_suffix) else []),
    )


def _any(q: Tensor, keys: Tensor) -> bool:
    return q.numel() > 0 and keys.numel() > 0


def _bundles(owner: Tensor, prefixes: int) -> Iterator[_Bundle]:
    """The prefixes by how many rows they have, those without rows left out."""
    order = owner.argsort(stable=True)
    counts = owner.bincount(minlength=prefixes)
    starts = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        if count:
            sets = (counts == count).nonzero()[:, 0]
            yield _Bundle(sets, order[(starts[sets, None] + torch.arange(count)).flatten()])


def _pick(part: Tensor, chosen: Tensor | None) -> Tensor:
    return part if chosen is None else part[chosen]


def dense(part: Tensor) -> Tensor:
    """With its last dimension dense, as torch's kernels read it."""
    return part if part.stride(-1) == 1 else part.contiguous()


def _fold(part: Tensor, bundle: _Bundle, k: Tensor) -> Tensor:
    """(R, Hq, L, ...) -> (n, Hkv, M, ...): every query that reads one key head of one set in a single axis."""
    split = _pick(part, bundle.rows).unflatten(1, (k.shape[1], -1)).unflatten(0, (k.shape[0], -1))
    return split.transpose(1, 2).flatten(2, 4)


def _unfold(part: Tensor, q: Tensor) -> Tensor:
    """The inverse of `_fold`, for the rows of its bundle."""
    heads = part.shape[1]
    split = part.unflatten(2, (-1, q.shape[1] // heads, q.shape[2]))
    return split.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What torch's kernels take for a mask."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
