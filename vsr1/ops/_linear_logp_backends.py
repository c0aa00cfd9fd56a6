"""How linear_logp is computed: the custom ops `vsr1::linear_logp` and its backward, and their backends.

Arguments arrive checked (`vsr1.ops.linear_logp`). Backward first drops the rows without upstream gradient, whatever the
backend, and is served by the same backend as forward: the choice depends on the device and the dtype alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vsr1.ops import _linear_logp_tiles as tiles
from vsr1.ops._dispatch import Backend, cpu_only, cuda_only, extension_missing, register, resolve, triton_missing
from vsr1.ops._linear_logp_kernels import CpuKernels, TritonKernels
from vsr1.ops._linear_logp_tiles import Upstream

CHUNK_BYTES = 32 << 20
"""Scratch of the reference: 18 rows at V = 151,936."""

Three = tuple[Tensor, Tensor, Tensor]

# Not torch.library.custom_op, whose first call imports torch._dynamo: two seconds.
torch.library.define(
    "vsr1::linear_logp",
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float temperature, bool entropy, int? chunk_bytes, "
    "str backend) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "vsr1::linear_logp_backward",
    "(Tensor? grad_logp, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor entropy, "
    "Tensor lse, float temperature, bool[] needs, int? chunk_bytes, str backend) -> (Tensor, Tensor, Tensor)",
)
linear_logp = torch.ops.vsr1.linear_logp.default
linear_logp_backward = torch.ops.vsr1.linear_logp_backward.default


def values(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    entropy: bool,
    chunk_bytes: int | None,
    backend: str,
) -> Three:
    """logp (T,), entropy (T,) or (0,) where it is not asked for, and the log-partition (T,) for backward."""
    name = resolve("linear_logp", backend, device=hidden.device, dtype=hidden.dtype)
    if hidden.is_cpu and target.numel() and not 0 <= target.min() <= target.max() < weight.shape[0]:
        raise ValueError(
            f"target must lie in [0, {weight.shape[0]}); its range is [{target.min()}, {target.max()}]: "
            "select the rows to score before the call instead of marking the others with -100"
        )
    return _FORWARD[name](hidden, weight, target.contiguous(), bias, temperature, entropy, chunk_bytes)


torch.library.impl("vsr1::linear_logp", "default", values)


@torch.library.register_fake("vsr1::linear_logp")
def _(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, _: float, entropy: bool, *__: Any) -> Three:
    dtype, rows = accumulator(hidden), hidden.shape[0]
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if entropy else 0, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
    )


def gradients(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    needs: list[bool],
    chunk_bytes: int | None,
    backend: str,
) -> Three:
    """Gradients of hidden, weight and bias, each empty where `needs` says it is not wanted."""
    name = resolve("linear_logp", backend, device=hidden.device, dtype=hidden.dtype)
    if grad_logp is None:
        grad_logp = torch.zeros_like(lse)
    kept = _rows_with_gradient(grad_logp, grad_entropy)
    upstream = Upstream(
        lse,
        grad_logp.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        None if grad_entropy is None else entropy,
    )
    if kept is None:
        return _dense(name, upstream, hidden, weight, target, bias, temperature, needs, chunk_bytes)
    some_hidden, grad_weight, grad_bias = _dense(
        name, upstream.rows(kept), hidden[kept], weight, target[kept], bias, temperature, needs, chunk_bytes
    )
    if needs[0]:
        some_hidden = hidden.new_zeros(hidden.shape).index_copy_(0, kept, some_hidden)
    return some_hidden, grad_weight, grad_bias


torch.library.impl("vsr1::linear_logp_backward", "default", gradients)


@torch.library.register_fake("vsr1::linear_logp_backward")
def _(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    needs: list[bool],
    *_: Any,
) -> Three:
    return _nothing(hidden, weight, needs, Tensor.new_empty)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    hidden, weight, target, bias, ctx.temperature, _, ctx.chunk_bytes, ctx.backend = inputs
    _, entropy, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(hidden, weight, target, bias, entropy, lse)


def _differentiate(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple[Any, ...]:
    hidden, weight, target, bias, entropy, lse = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    grads = linear_logp_backward(
        grad_logp, grad_entropy if len(entropy) else None, hidden, weight, target, bias, entropy, lse, ctx.temperature, needs,
        ctx.chunk_bytes, ctx.backend,
    )  # fmt: skip
    grad_hidden, grad_weight, grad_bias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None


torch.library.register_autograd("vsr1::linear_logp", _differentiate, setup_context=_remember)


def _rows_with_gradient(grad_logp: Tensor, grad_entropy: Tensor | None) -> Tensor | None:
    """The numbers of the rows that have an upstream gradient, or None for all of them.

    On a GPU the answer is awaited, but for rows that all have the same gradient, as those of a sum or a mean have, and in a
    capture, which cannot wait.
    """
    if grad_logp.is_cuda:
        alike = all(grad is None or grad.stride(0) == 0 for grad in (grad_logp, grad_entropy))
        if alike or torch.cuda.is_current_stream_capturing():
            return None
    live = grad_logp != 0
    if grad_entropy is not None:
        live |= grad_entropy != 0
    kept = live.nonzero()[:, 0]
    return None if len(kept) == len(live) else kept


def _dense(
    name: str,
    upstream: Upstream,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    needs: list[bool],
    chunk_bytes: int | None,
) -> Three:
    """The gradients of these rows, in the inputs' dtypes."""
    if not len(hidden) or not any(needs):
        return _nothing(hidden, weight, needs, Tensor.new_zeros)
    grad_hidden, grad_weight, grad_bias = _BACKWARD[name](
        upstream, hidden, weight, target.contiguous(), bias, temperature, needs, chunk_bytes
    )
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _nothing(hidden: Tensor, weight: Tensor, needs: list[bool], new: Callable[..., Tensor]) -> Three:
    need_hidden, need_weight, need_bias = needs
    return (
        new(hidden, hidden.shape if need_hidden else (0,)),
        new(weight, weight.shape if need_weight else (0,)),
        new(weight, weight.shape[:1] if need_bias else (0,)),
    )


def accumulator(hidden: Tensor) -> torch.dtype:
    """The type of log-probabilities and entropies."""
    return torch.promote_types(hidden.dtype, torch.float32)


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    want_entropy: bool,
    chunk_bytes: int | None,
) -> Three:
    """Forward in plain torch, some rows at a time."""
    dtype, rows = accumulator(hidden), hidden.shape[0]
    logp, lse = hidden.new_empty(rows, dtype=dtype), hidden.new_empty(rows, dtype=dtype)
    entropy = hidden.new_empty(rows if want_entropy else 0, dtype=dtype)
    for chunk in _chunks(rows, weight, chunk_bytes):
        logits = _logits(hidden[chunk], weight, bias, temperature)
        picked = logits.gather(1, target[chunk, None])[:, 0]
        peak = logits.amax(1)
        odds = logits.sub_(peak[:, None]).exp_()
        total = odds.sum(1)
        # total >= 1 (the peak's own term), so lse >= peak >= picked in floating point too: logp <= 0.
        lse[chunk] = peak + total.log()
        logp[chunk] = picked - lse[chunk]
        if want_entropy:
            entropy[chunk] = torch.special.entr(odds.div_(total[:, None])).sum(1)
    return logp, entropy, lse


def reference_backward(
    upstream: Upstream,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    needs: list[bool],
    chunk_bytes: int | None,
) -> Three:
    """Backward in plain torch, some rows at a time."""
    need_hidden, need_weight, need_bias = needs
    dtype = accumulator(hidden)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,), dtype=dtype)
    grad_bias = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=dtype)
    for rows in _chunks(len(hidden), weight, chunk_bytes):
        of_logp = upstream.logp[rows, None]
        p = _logits(hidden[rows], weight, bias, temperature).sub_(upstream.lse[rows, None]).exp_()
        if upstream.entropy is not None and upstream.entropy_value is not None:
            # entr(p) = -p log p, and 0 where p is 0: a word with bias -inf has no gradient
            slope = upstream.entropy[rows, None]
            surprise = torch.special.entr(p).mul_(slope)
            grad = p.mul_(-(of_logp + slope * upstream.entropy_value[rows, None])).add_(surprise)
        else:
            grad = p.mul_(-of_logp)
        grad.scatter_add_(1, target[rows, None], of_logp).div_(temperature)
        if need_bias:
            grad_bias += grad.sum(0)
        grad = grad.to(hidden.dtype)
        if need_hidden:
            grad_hidden[rows] = grad @ weight
        if need_weight:
            if grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, hidden[rows])
            else:
                grad_weight += grad.T @ hidden[rows]
    return grad_hidden, grad_weight, grad_bias


def _chunks(rows: int, weight: Tensor, chunk_bytes: int | None) -> list[slice]:
    # Three arrays of rows x V are alive at the worst moment of backward: logits, surprise, and the gradient cast for
    # its product.
    per_row = 3 * weight.shape[0] * max(4, weight.element_size())
    return list(tiles.parts(rows, max(1, (chunk_bytes or CHUNK_BYTES) // per_row)))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.mm(hidden, weight.T).to(accumulator(hidden))
    if bias is not None:
        logits += bias
    return logits.div_(temperature)


def _not_double(dtype: torch.dtype) -> str | None:
    return "sums in float32; float64 is for the reference" if dtype == torch.float64 else None


def _cpu_refuses(*, device: torch.device, dtype: torch.dtype, **_: Any) -> str | None:
    return cpu_only(device=device) or _not_double(dtype)


def _triton_refuses(*, device: torch.device, dtype: torch.dtype, **_: Any) -> str | None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "runs on CPU tensors in Triton's interpreter only, which computes bfloat16 wrongly"
    return cuda_only(device=device) or _not_double(dtype)


_FORWARD: dict[str, Callable[..., Three]] = {
    "cpu": partial(tiles.forward, CpuKernels()),
    "triton": partial(tiles.forward, TritonKernels()),
    "reference": reference,
}
_BACKWARD: dict[str, Callable[..., Three]] = {
    "cpu": partial(tiles.backward, CpuKernels()),
    "triton": partial(tiles.backward, TritonKernels()),
    "reference": reference_backward,
}
register(
    "linear_logp",
    cpu=Backend(extension_missing, _cpu_refuses),
    triton=Backend(triton_missing, _triton_refuses),
    reference=Backend(),
)
