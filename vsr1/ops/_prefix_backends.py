"""How shared-prefix attention is computed: the custom ops `vsr1::shared_prefix_attention` and its backward, their backends, and
the reference in plain torch.

Rows come to their prefix in one of two ways: `owner` None, and then R // N consecutive rows belong to each of the N prefixes;
or `owner` (R,), which names the prefix of each row. Forward gives the log-partition beside the output; the backward of either
part needs no more of the other than that and the common output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vsr1.ops import _prefix_flash
from vsr1.ops._dispatch import Backend, cpu_only, cuda_only, extension_missing, register, resolve, triton_missing

# Not torch.library.custom_op, whose first call imports torch._dynamo: two seconds of everybody's first step.
_INPUTS = (
    "Tensor q, Tensor k_prefix, Tensor v_prefix, Tensor k_suffix, Tensor v_suffix, "
    "Tensor? owner, Tensor? prefix_mask, Tensor? suffix_mask"
)
torch.library.define("vsr1::shared_prefix_attention", f"({_INPUTS}, float scale, str backend) -> (Tensor, Tensor)")
torch.library.define(
    "vsr1::shared_prefix_attention_backward",
    f"(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
attention = torch.ops.vsr1.shared_prefix_attention.default
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
MOST_COMPILED_QUERIES = 8  # of a row; behind that the suffix is worth the matrix products of torch's kernels
WIDEST_COMPILED_HEAD = 256  # csrc/include/vsr1/prefix.h
# Of a row; behind that its tiles of queries are enough for a GPU without splitting the keys.
MOST_GPU_DECODED_QUERIES = 16
WIDEST_GPU_HEAD = 256


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
    backend: str,
    wants_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Out (R, Hq, L, D) in the dtype of q, and the log-partition (R, Hq, L), 0 where a query sees nothing.

    The log-partition is there at least where it is wanted.

    suffix_mask is (R, 1 or L, S). The values of `owner` are checked here, not at the door, where tracing would see it.
    """
    tensors = q, k_prefix, v_prefix, k_suffix, v_suffix, owner, prefix_mask, suffix_mask
    name = resolve("prefix", backend, device=q.device, dtype=q.dtype, width=q.shape[3])
    if name == "cpu" and q.shape[2] <= MOST_COMPILED_QUERIES and q.shape[3] <= WIDEST_COMPILED_HEAD:
        return decode(*tensors, scale, wants_lse)  # checks the owner itself
    _check_owner(owner, len(k_prefix))
    return _FORWARD[name](*tensors, scale)


@torch.library.impl("vsr1::shared_prefix_attention", "default")
def _attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    out, lse = forward(*inputs)
    assert lse is not None
    return out, lse


@torch.library.register_fake("vsr1::shared_prefix_attention")
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.impl("vsr1::shared_prefix_attention_backward", "default")
def backward(grad: Tensor, q: Tensor, *rest: Any) -> Gradients:
    """Gradients in q, keys and values, from that of the output and what `forward` took and gave."""
    *tensors, scale, backend = rest
    name = resolve("prefix", backend, device=q.device, dtype=q.dtype, width=q.shape[3])
    return _BACKWARD[name](grad, q, *tensors, scale)


@torch.library.register_fake("vsr1::shared_prefix_attention_backward")
def _(
    grad: Tensor, q: Tensor, k_prefix: Tensor, v_prefix: Tensor, k_suffix: Tensor, v_suffix: Tensor, *_: Any
) -> Gradients:
    q_like, kp, vp, ks, vs = (t.new_empty(t.shape) for t in (q, k_prefix, v_prefix, k_suffix, v_suffix))
    return q_like, kp, vp, ks, vs


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Any, ...]:
    backward = torch.ops.vsr1.shared_prefix_attention_backward.default
    return (*backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None, None, None)


torch.library.register_autograd("vsr1::shared_prefix_attention", _gradient, setup_context=_remember)


def _check_owner(owner: Tensor | None, prefixes: int) -> None:
    """Raise ValueError for a value that names no prefix; on a GPU reading it would wait for the device, and none is read."""
    if owner is None or owner.device.type != "cpu" or not len(owner):
        return
    lowest, highest = (int(bound) for bound in owner.aminmax())
    if lowest < 0 or highest >= prefixes:
        raise ValueError(f"group must name prefixes 0 to {prefixes - 1}; it has {lowest if lowest < 0 else highest}")


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
    wants_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """In C++ (csrc/cpu/prefix.cpp), which reads strided keys and values where they lie.

    A decoder calls this for every layer and token, each time with little to do: what is said to C++ is gathered in few steps.
    """
    from vsr1._C import prefix_attention

    parts = [q, k_prefix, v_prefix, k_suffix, v_suffix]
    strides = [part.stride() for part in parts]
    if any(stride[3] != 1 for stride in strides):
        parts = [part if part.stride(3) == 1 else part.contiguous() for part in parts]
        strides = [part.stride() for part in parts]
    arrays = [part.data_ptr() for part in parts]
    owner = None if owner is None else owner.contiguous()
    arrays += [0 if part is None else part.data_ptr() for part in (owner, prefix_mask, suffix_mask)]
    rows, query_heads, queries, width = q.shape
    prefixes, key_heads, prefix, _ = k_prefix.shape
    sizes = rows, query_heads, key_heads, queries, width, prefixes, prefix, k_suffix.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32) if wants_lse else None
    prefix_attention(
        q.dtype == torch.bfloat16,
        sizes,
        arrays,
        [*strides, _mask_strides(prefix_mask), _mask_strides(suffix_mask)],
        scale,
        torch.get_num_threads(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
    )
    return out, lse


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int, int]:
    """Of sets, queries and keys, and a place left over; all queries read the one row of a mask that has no other."""
    if mask is None:
        return 0, 0, 0, 0
    return mask.stride(0), 0 if mask.dim() == 2 or mask.shape[1] == 1 else mask.stride(1), mask.stride(-1), 1


def reference(
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
    """Forward in plain torch, as `forward` returns it. With an `owner` every row gets its own copy of its prefix."""
    k_prefix, v_prefix, prefix_mask = _of_rows(owner, k_prefix, v_prefix, prefix_mask)
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
    owner: Tensor | None,
    prefix_mask: Tensor | None,
    suffix_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Gradients:
    """Backward in plain torch: each part by itself, tied to the other only through the common log-partition.

    With weights w = exp(scores - lse): dV = w^T dO, dScores = w (dO V^T - sum_d dO_d O_d), dQ = dScores K, dK =
    dScores^T Q.
    """
    prefixes = len(k_prefix)
    k_prefix, v_prefix, prefix_mask = _of_rows(owner, k_prefix, v_prefix, prefix_mask)
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
        grads += [slope.mT @ _fold(query, keys), weights.mT @ folded]
    of_prefix = (_add_rows(owner, part, prefixes) for part in grads[:2])
    grad_q, kp, vp, ks, vs = (part.to(q.dtype) for part in (grad_query, *of_prefix, *grads[2:]))
    return grad_q, kp, vp, ks, vs


def _of_rows(
    owner: Tensor | None, k_prefix: Tensor, v_prefix: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What belongs to the prefix of each row; without an `owner` whatever belongs to each prefix."""
    if owner is None:
        return k_prefix, v_prefix, mask
    return k_prefix[owner], v_prefix[owner], None if mask is None else mask[owner]


def _add_rows(owner: Tensor | None, part: Tensor, prefixes: int) -> Tensor:
    """The transpose of `_of_rows`; sums in the order of the rows."""
    if owner is None:
        return part
    total = part.new_zeros(prefixes, *part.shape[1:])
    # Each is in order on one device and adds atomically on the other.
    return total.index_add_(0, owner, part) if part.device.type == "cpu" else total.index_put_((owner,), part, True)


def _fold(x: Tensor, keys: Tensor) -> Tensor:
    """(R, Hq, L, .) -> (N, Hkv, M, .): every query that reads one key head of one group (or row) in a single axis."""
    rows, heads = keys.shape[:2]
    split = x.unflatten(0, (rows, len(x) // max(rows, 1))).unflatten(2, (heads, x.shape[1] // heads))
    return split.transpose(1, 2).flatten(2, 4)


def _unfold(x: Tensor, q: Tensor) -> Tensor:
    """The inverse of `_fold`, back to (R, Hq, L, .) of `q`."""
    rows, query_heads, queries = q.shape[:3]
    groups, heads = x.shape[:2]
    split = x.unflatten(2, (rows // max(groups, 1), query_heads // heads, queries)).transpose(1, 2)
    return split.flatten(0, 1).flatten(1, 2)


def _scores(query: Tensor, keys: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    scores = _fold(query, keys) @ keys.mT * scale
    return scores if visible is None else scores.masked_fill_(~visible, -torch.inf)


def _visible_prefix(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None]


def _visible_suffix(mask: Tensor | None, q: Tensor, keys: Tensor) -> Tensor | None:
    return None if mask is None else _fold(mask[:, None].expand(*q.shape[:3], -1), keys)


def _triton(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """In Triton: few queries a row split their keys among programs (kernels/prefix.py), many do not need to."""
    from vsr1.kernels import prefix, prefix_training

    if not q.numel():
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    compute = prefix.decode if q.shape[2] <= MOST_GPU_DECODED_QUERIES else prefix_training.forward
    *others, scale = rest
    return compute(q.contiguous(), *_dense(others), scale)


def _triton_backward(grad: Tensor, q: Tensor, *rest: Any) -> Gradients:
    """In Triton (kernels/prefix_training.py), for any number of queries."""
    from vsr1.kernels import prefix_training

    *others, out, lse, scale = rest
    if not q.numel():
        of_q, kp, vp, ks, vs = (part.new_zeros(part.shape) for part in (q, *others[:4]))
        return of_q, kp, vp, ks, vs
    grad, q, out, lse = (part.contiguous() for part in (grad, q, out, lse))
    return prefix_training.backward(grad, q, *_dense(others), out, lse, scale)


def _dense(parts: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    return (None if part is None else _prefix_flash.dense(part) for part in parts)


def _cpu_refuses(*, device: torch.device, dtype: torch.dtype, **_: Any) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16 tensors; these are {str(dtype).removeprefix('torch.')}"
    return cpu_only(device=device)


def _triton_refuses(*, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 and bfloat16 tensors; these are {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "runs on CPU tensors in Triton's interpreter only, which computes bfloat16 wrongly"
    if width > WIDEST_GPU_HEAD:
        return f"takes heads of at most {WIDEST_GPU_HEAD} numbers; these have {width}"
    return cuda_only(device=device)


_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": _prefix_flash.forward,
    "triton": _triton,
    "reference": reference,
}
_BACKWARD: dict[str, Callable[..., Gradients]] = {
    "cpu": _prefix_flash.backward,
    "triton": _triton_backward,
    "reference": reference_backward,
}
register(
    "prefix",
    cpu=Backend(extension_missing, _cpu_refuses),
    triton=Backend(triton_missing, _triton_refuses),
    reference=Backend(),
)
