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

from vsr1.ops._prefix_backends import attention, forward, reference, reference_backward

__all__ = ["GroupBlock", "group_block_mask", "reference", "reference_backward", "shared_prefix_attention"]


def shared_prefix_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    *,
    group: int | Tensor,
    prefix_mask: Tensor | None = None,
    suffix_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q [K_prefix; K_suffix]^T) [V_prefix; V_suffix], with the prefix stored once per group of rows.

    N prefixes, R rows. Hq query heads share Hkv key heads (query head h reads key head h // (Hq / Hkv)). Differentiable in
    q, keys and values. Keys and values may be strided views of larger buffers.

    Args:
        q: (R, Hq, L, D), L queries per row (1 when decoding).
        k_prefix, v_prefix: (N, Hkv, P, D). k_suffix, v_suffix: (R, Hkv, S, D). P or S may be 0.
        group: which rows share a prefix. An int G: R = N * G, and row r belongs to prefix r // G. Or (R,) int64, the
            prefix of each row: in any order, and a prefix may have any number of rows, also none. Values outside 0..N-1
            raise ValueError on the CPU; on a GPU, where nobody waits to read them, their rows are NaN, or the reference
            trips the device's own bounds check.
        prefix_mask: (N, P) bool, True where the prefix may be seen (prompts of several lengths); all of it by default.
        suffix_mask: (R, S) or, one row per query, (R, L, S) bool, True where the suffix may be seen; all by default.
            There is no implied causality: with L > 1, pass the triangle.
        scale: of the scores, 1 / sqrt(D) by default.

    Returns:
        (R, Hq, L, D) in the dtype of q; softmax in float32 at least. A query that may see nothing gets zeros.

    Source: cascade inference (FlashInfer), Hydragen (arXiv 2402.05099). Raises ValueError naming the argument.
    """
    owner = group if isinstance(group, Tensor) else None
    _validate(q, k_prefix, v_prefix, k_suffix, v_suffix, group, prefix_mask, suffix_mask)
    if suffix_mask is not None and suffix_mask.dim() == 2:
        suffix_mask = suffix_mask[:, None]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    tensors = (q, k_prefix, v_prefix, k_suffix, v_suffix)
    if not _is_watched(tensors):
        # What the op does, without what torch asks around it: a decoder calls this for every token and layer.
        return forward(*tensors, owner, prefix_mask, suffix_mask, scale, backend, wants_lse=False)[0]
    return attention(*tensors, owner, prefix_mask, suffix_mask, scale, backend)[0]


def _is_watched(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the call is traced, or a gradient may be asked of it."""
    if torch.compiler.is_compiling() or type(tensors[0]) is not Tensor:
        return True
    return torch.is_grad_enabled() and any(part.requires_grad for part in tensors)


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
    group: int | Tensor,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
) -> None:
    if q.dim() != 4 or not q.is_floating_point() or q.shape[-1] == 0:
        raise ValueError(f"q must be floating point (R, Hq, L, D); got {tuple(q.shape)} {q.dtype}")
    rows, query_heads, queries, width = q.shape
    if isinstance(group, Tensor):
        if group.dtype != torch.int64 or group.shape != (rows,) or group.device != q.device:
            raise ValueError(
                f"group must be an int, or int64 ({rows},) on {q.device}, the prefix of each row; "
                f"got {tuple(group.shape)} {group.dtype} on {group.device}"
            )
        prefixes = len(k_prefix) if k_prefix.dim() else 0
    elif group < 1 or rows % group:
        raise ValueError(f"group={group} must divide the {rows} rows of q")
    else:
        prefixes = rows // group
    for name, keys, count in (("prefix", k_prefix, prefixes), ("suffix", k_suffix, rows)):
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
    _validate_mask("prefix_mask", prefix_mask, [(prefixes, k_prefix.shape[2])])
    _validate_mask("suffix_mask", suffix_mask, [(rows, suffix), (rows, queries, suffix)])


def _validate_mask(name: str, mask: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in shapes):
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must be bool {wanted}; got {tuple(mask.shape)} {mask.dtype}")
