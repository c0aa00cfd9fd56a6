r"""Log-probabilities of chosen tokens without logits: hidden states and the output matrix in, one number per row out.

The logits of T rows over a vocabulary of V words are never held together. Forward walks over chunks of rows, as many as
a byte budget allows, and keeps the log-partition of each row. Backward walks over them again, recomputes a chunk's
logits and turns them in place into their own gradient, which the two products with the weight and the hidden states
consume at once. Rows whose upstream gradient is zero (masked tokens, zero advantages) are dropped before any product.

With logits x = (hidden W^T + bias) / temperature, p = softmax(x), y the target and H the entropy:
    logp = x_y - lse(x)          d logp / d x_j = [j = y] - p_j
    H = - sum_j p_j log p_j      d H / d x_j    = - p_j (log p_j + H)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vsr1.ops._dispatch import Backend, register, resolve

register("linear_logp", reference=Backend())

CHUNK_BYTES = 32 << 20
"""Default scratch budget. At V = 151,936 it is 18 rows a chunk, at V = 32,000 87: enough for the products to run near
their speed on a CPU, and small beside the gradient of the weight."""


class LinearLogp(NamedTuple):
    """T rows; float32, or float64 for float64 inputs."""

    logp: Tensor
    """(T,) log-probability of the target, never above 0."""
    entropy: Tensor | None
    """(T,) entropy of the distribution in nats, or None if it was not asked for."""


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> LinearLogp:
    """Log-probability of `target` under softmax((hidden @ weight.T + bias) / temperature), and the entropy.

    Differentiable in `hidden`, `weight` and `bias`, through both results; whatever needs no gradient (a frozen head)
    costs no product. Once: there is no second derivative.

    Args:
        hidden: (T, H) floating point. weight: (V, H), bias: (V,), of the dtype of `hidden`. H, V >= 1.
            T may be 0.
        target: (T,) int64 in [0, V). Out of range is an error on the CPU; on a GPU the check would stall the stream,
            and the gather asserts instead.
        temperature: above 0.
        chunk_bytes: scratch for one chunk of logits; a single row is the least. Speed and memory depend on it, and the
            results only in rounding.

    The product runs in the dtype of the inputs; maximum, log-sum-exp and entropy in float32 at least. A NaN in a row of
    `hidden` gives a NaN for that row. In half precision the gradients of weight and bias are summed over chunks in
    float32. Backward reads the list of rows to keep on the host, which waits for a GPU once.

    Raises ValueError / TypeError naming the argument.
    """
    _validate(hidden, weight, target, temperature, bias, chunk_bytes)
    logp, row_entropy, _ = _linear_logp(hidden, weight, target, bias, temperature, entropy, chunk_bytes, backend)
    return LinearLogp(logp, row_entropy if entropy else None)


def _validate(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, bias: Tensor | None, chunk_bytes: int
) -> None:
    if not hidden.is_floating_point() or hidden.dim() != 2:
        raise ValueError(f"hidden must be floating point (T, H); got {tuple(hidden.shape)} {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or 0 in weight.shape:
        raise ValueError(f"weight must be (V, H) with H = {hidden.shape[1]} and V >= 1; got {tuple(weight.shape)}")
    if target.dtype != torch.int64 or target.shape != hidden.shape[:1]:
        raise ValueError(f"target must be int64 ({hidden.shape[0]},); got {tuple(target.shape)} {target.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype != hidden.dtype or other.device != hidden.device):
            raise TypeError(
                f"{name} is {other.dtype} on {other.device}, hidden {hidden.dtype} on {hidden.device}: they must agree"
            )
    if target.device != hidden.device:
        raise TypeError(f"target is on {target.device}, hidden on {hidden.device}: they must agree")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0; got {temperature}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1; got {chunk_bytes}")


@torch.library.custom_op("vsr1::linear_logp", mutates_args=())
def _linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    entropy: bool,
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    resolve("linear_logp", backend, device=hidden.device, dtype=hidden.dtype)
    if hidden.is_cpu and target.numel() and not 0 <= target.min() <= target.max() < weight.shape[0]:
        raise ValueError(
            f"target must lie in [0, {weight.shape[0]}); its range is [{target.min()}, {target.max()}]: "
            "select the rows to score before the call instead of marking the others with -100"
        )
    return reference(hidden, weight, target, bias, temperature, entropy, chunk_bytes)


@_linear_logp.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    entropy: bool,
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, rows = _accumulator(hidden), hidden.shape[0]
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if entropy else 0, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
    )


@torch.library.custom_op("vsr1::linear_logp_backward", mutates_args=())
def _linear_logp_backward(
    grad_logp: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    needs: list[bool],
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference_backward(
        grad_logp, grad_entropy, hidden, weight, target, bias, entropy, lse, temperature, needs, chunk_bytes
    )


@_linear_logp_backward.register_fake
def _(
    grad_logp: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    needs: list[bool],
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = needs
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, weight, target, bias, ctx.temperature, _, ctx.chunk_bytes, _ = inputs
    _, entropy, lse = output
    ctx.save_for_backward(hidden, weight, target, bias, entropy, lse)


def _backward(ctx, grad_logp, grad_entropy, _grad_lse):  # type: ignore[no-untyped-def]
    hidden, weight, target, bias, entropy, lse = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    grads = _linear_logp_backward(
        grad_logp, grad_entropy, hidden, weight, target, bias, entropy, lse, ctx.temperature, needs, ctx.chunk_bytes
    )
    grad_hidden, grad_weight, grad_bias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None


_linear_logp.register_autograd(_backward, setup_context=_setup_context)


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    want_entropy: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward in plain torch, chunk by chunk: logp (T,), entropy (T,) or (0,), log-partition (T,)."""
    dtype, rows = _accumulator(hidden), hidden.shape[0]
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
    grad_logp: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    needs: list[bool],
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward in plain torch: gradients of hidden, weight and bias, each empty where `needs` says it is not wanted."""
    need_hidden, need_weight, need_bias = needs
    with_entropy = entropy.numel() > 0
    dtype = _accumulator(hidden)
    grad_hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if need_bias else weight.new_empty(0)
    live = grad_logp != 0
    if with_entropy:
        live |= grad_entropy != 0
    kept = live.nonzero()[:, 0]
    for chunk in _chunks(len(kept), weight, chunk_bytes):
        rows = kept[chunk]
        some_hidden, upstream = hidden[rows], grad_logp[rows, None]
        logits = _logits(some_hidden, weight, bias, temperature)
        p = logits.sub_(lse[rows, None]).exp_()
        if with_entropy:
            # entr(p) = -p log p, and 0 where p is 0: a word with bias -inf has no gradient
            slope = grad_entropy[rows, None]
            surprise = torch.special.entr(p).mul_(slope)
            grad = p.mul_(-(upstream + slope * entropy[rows, None])).add_(surprise)
        else:
            grad = p.mul_(-upstream)
        grad.scatter_add_(1, target[rows, None], upstream).div_(temperature)
        if need_bias:
            grad_bias += grad.sum(0)
        grad = grad.to(hidden.dtype)
        if need_hidden:
            grad_hidden[rows] = grad @ weight
        if need_weight:
            if grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, some_hidden)
            else:
                grad_weight += grad.T @ some_hidden
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _chunks(rows: int, weight: Tensor, chunk_bytes: int) -> Iterator[slice]:
    # Three arrays of rows x V are alive at the worst moment of backward: logits, surprise, and the gradient cast for
    # its product.
    per_row = 3 * weight.shape[0] * max(4, weight.element_size())
    step = max(1, chunk_bytes // per_row)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.mm(hidden, weight.T).to(_accumulator(hidden))
    if bias is not None:
        logits += bias
    return logits.div_(temperature)
