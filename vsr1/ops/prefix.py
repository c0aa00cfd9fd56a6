"""Attention over a prefix that the rows of a group share: one prompt (text and video), many continuations of it.

When decoding, the keys and values of the prompt are kept once per group and only the suffixes per row. Queries of all
rows of a group meet the prefix in one product, then each meets its own suffix, and the two partial softmaxes are merged
by their log-partitions, which gives the softmax over both exactly. When training, a group is packed into one sequence
`[prefix | s_1 | .. | s_G]`; `group_block_mask` gives the mask and the positions under which that equals G plain rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vsr1.ops._dispatch import Backend, register, resolve

register("prefix", reference=Backend())


def shared_prefix_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    *,
    group: int,
    prefix_mask: Tensor | None = None,
    suffix_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q [K_prefix; K_suffix]^T) [V_prefix; V_suffix], with the prefix stored once per group of rows.

    N groups of G = `group` rows, R = N * G; row r belongs to group r // G. Hq query heads share Hkv key heads (query
    head h reads key head h // (Hq / Hkv)). Differentiable in q, keys and values.

    Args:
        q: (R, Hq, L, D), L queries per row (1 when decoding).
        k_prefix, v_prefix: (N, Hkv, P, D). k_suffix, v_suffix: (R, Hkv, S, D). P or S may be 0.
        prefix_mask: (N, P) bool, True where the prefix may be seen (prompts of several lengths); all of it by default.
        suffix_mask: (R, S) or, one row per query, (R, L, S) bool, True where the suffix may be seen; all by default.
            There is no implied causality: with L > 1, pass the triangle.
        scale: of the scores, 1 / sqrt(D) by default.

    Returns:
        (R, Hq, L, D) in the dtype of q; softmax in float32 at least. A query that may see nothing gets zeros.

    Source: cascade inference (FlashInfer), Hydragen (arXiv 2402.05099). Raises ValueError naming the argument.
    """
    _validate(q, k_prefix, v_prefix, k_suffix, v_suffix, group, prefix_mask, suffix_mask)
    if suffix_mask is not None and suffix_mask.dim() == 2:
        suffix_mask = suffix_mask[:, None]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    out, _ = _shared_prefix_attention(
        q, k_prefix, v_prefix, k_suffix, v_suffix, prefix_mask, suffix_mask, scale, backend
    )
    return out


class GroupBlock(NamedTuple):
    """How to attend inside one packed group of L = P + sum of suffix lengths tokens."""

    mask: Tensor
    """(L, L) bool, [query, key], True where the query may see the key."""
    positions: Tensor
    """(L,) int64: 0..P-1 for the prefix, then every suffix counting on from P."""


def group_block_mask(
    prefix_length: int, suffix_lengths: Sequence[int], device: torch.device | str = "cpu"
) -> GroupBlock:
    """Mask and positions of the packed sequence `[prefix | s_1 | .. | s_G]`.

    Causal; a suffix token sees the prefix and its own suffix only. Lengths may be 0; negative ones raise ValueError.
    """
    if min(prefix_length, *suffix_lengths, 0) < 0:
        raise ValueError(f"lengths must be at least 0; got prefix {prefix_length}, suffixes {list(suffix_lengths)}")
    lengths = torch.tensor([prefix_length, *suffix_lengths], device=device)
    member = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    index = torch.arange(len(member), device=device)
    start = (lengths.cumsum(0) - lengths)[member]
    positions = index - start + (member > 0) * prefix_length
    same = member[:, None] == member[None, :]
    mask = (same | (member == 0)[None, :]) & (index[:, None] >= index[None, :])
    return GroupBlock(mask, positions)


def _validate(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    group: int,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
) -> None:
    if q.dim() != 4 or not q.is_floating_point() or q.shape[-1] == 0:
        raise ValueError(f"q must be floating point (R, Hq, L, D); got {tuple(q.shape)} {q.dtype}")
    rows, query_heads, queries, width = q.shape
    if group < 1 or rows % group:
        raise ValueError(f"group={group} must divide the {rows} rows of q")
    for name, keys, count in (("prefix", k_prefix, rows // group), ("suffix", k_suffix, rows)):
        if keys.dim() != 4 or keys.shape[0] != count or keys.shape[3] != width:
            raise ValueError(f"k_{name} must have shape ({count}, Hkv, length, {width}); got {tuple(keys.shape)}")
    heads = k_prefix.shape[1]
    if k_suffix.shape[1] != heads or heads == 0 or query_heads % heads:
        raise ValueError(
            f"prefix ({heads}) and suffix ({k_suffix.shape[1]}) must have the same number of key heads, "
            f"a divisor of the {query_heads} query heads"
        )
    for name, keys, values in (("prefix", k_prefix, v_prefix), ("suffix", k_suffix, v_suffix)):
        if values.shape != keys.shape:
            raise ValueError(f"v_{name} must have the shape of k_{name} {tuple(keys.shape)}; got {tuple(values.shape)}")
        for letter, tensor in (("k", keys), ("v", values)):
            if tensor.dtype != q.dtype or tensor.device != q.device:
                raise ValueError(
                    f"{letter}_{name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}: must agree"
                )
    suffix = k_suffix.shape[2]
    _validate_mask("prefix_mask", prefix_mask, [(rows // group, k_prefix.shape[2])])
    _validate_mask("suffix_mask", suffix_mask, [(rows, suffix), (rows, queries, suffix)])


def _validate_mask(name: str, mask: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in shapes):
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must be bool {wanted}; got {tuple(mask.shape)} {mask.dtype}")


@torch.library.custom_op("vsr1::shared_prefix_attention", mutates_args=())
def _shared_prefix_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    resolve("prefix", backend, device=q.device, dtype=q.dtype)
    return reference(q, k_prefix, v_prefix, k_suffix, v_suffix, prefix_mask, suffix_mask, scale)


@_shared_prefix_attention.register_fake
def _(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("vsr1::shared_prefix_attention_backward", mutates_args=())
def _shared_prefix_attention_backward(
    grad: Tensor,
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference_backward(
        grad, q, k_prefix, v_prefix, k_suffix, v_suffix, prefix_mask, suffix_mask, out, lse, scale
    )


@_shared_prefix_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q_like, kp, vp, ks, vs = (t.new_empty(t.shape) for t in (q, k_prefix, v_prefix, k_suffix, v_suffix))
    return q_like, kp, vp, ks, vs


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _grad_lse):  # type: ignore[no-untyped-def]
    return (*_shared_prefix_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None, None)


_shared_prefix_attention.register_autograd(_backward, setup_context=_setup_context)


def reference(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Forward in plain torch: out (R, Hq, L, D) and the log-partition (R, Hq, L), 0 where a query sees nothing."""
    wide = torch.promote_types(q.dtype, torch.float32)
    query = q.to(wide)
    parts = [
        (_scores(query, k_prefix.to(wide), _visible_prefix(prefix_mask), scale), v_prefix.to(wide)),
        (_scores(query, k_suffix.to(wide), _visible_suffix(suffix_mask, q, k_suffix), scale), v_suffix.to(wide)),
    ]
    lse = torch.logaddexp(*(_unfold(scores.logsumexp(-1, keepdim=True), q) for scores, _ in parts))
    # Scores and log-partition both -inf would make NaN; with 0 the weights of such a query are all exp(-inf) = 0.
    lse = lse.masked_fill_(lse == -torch.inf, 0)
    weighted = (_unfold((scores - _fold(lse, values)).exp() @ values, q) for scores, values in parts)
    return sum(weighted, torch.zeros_like(query)).to(q.dtype), lse[..., 0].contiguous()


def reference_backward(
    grad: Tensor,
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward in plain torch: each part by itself, tied to the other only through the common log-partition.

    With weights w = exp(scores - lse): dV = w^T dO, dScores = w (dO V^T - sum_d dO_d O_d), dQ = dScores K, dK =
    dScores^T Q.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    query, upstream = q.to(wide), grad.to(wide)
    shared = (upstream * out.to(wide)).sum(-1, keepdim=True)
    grad_query = torch.zeros_like(query)
    grads = []
    for k, v, mask in (
        (k_prefix, v_prefix, _visible_prefix(prefix_mask)),
        (k_suffix, v_suffix, _visible_suffix(suffix_mask, q, k_suffix)),
    ):
        keys, values = k.to(wide), v.to(wide)
        weights = (_scores(query, keys, mask, scale) - _fold(lse[..., None], keys)).exp()
        folded = _fold(upstream, keys)
        slope = weights * (folded @ values.mT - _fold(shared, keys)) * scale
        grad_query += _unfold(slope @ keys, q)
        grads += [(slope.mT @ _fold(query, keys)).to(q.dtype), (weights.mT @ folded).to(q.dtype)]
    grad_k_prefix, grad_v_prefix, grad_k_suffix, grad_v_suffix = grads
    return grad_query.to(q.dtype), grad_k_prefix, grad_v_prefix, grad_k_suffix, grad_v_suffix


def _fold(x: Tensor, keys: Tensor) -> Tensor:
    """(R, Hq, L, .) -> (N, Hkv, M, .): every query that reads one key head of one group (or row) in a single axis."""
    rows, heads = keys.shape[:2]
    return x.unflatten(1, (heads, -1)).unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 4)


def _unfold(x: Tensor, q: Tensor) -> Tensor:
    """The inverse of `_fold`, back to (R, Hq, L, .) of `q`."""
    rows, query_heads, queries = q.shape[:3]
    groups, heads = x.shape[:2]
    split = x.unflatten(2, (rows // groups, query_heads // heads, queries)).transpose(1, 2)
    return split.flatten(0, 1).flatten(1, 2)


def _scores(query: Tensor, keys: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    scores = _fold(query, keys) @ keys.mT * scale
    return scores if visible is None else scores.masked_fill_(~visible, -torch.inf)


def _visible_prefix(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None]


def _visible_suffix(mask: Tensor | None, q: Tensor, keys: Tensor) -> Tensor | None:
    return None if mask is None else _fold(mask[:, None].expand(*q.shape[:3], -1), keys)
