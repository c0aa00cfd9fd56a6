r"""Log-probabilities of chosen tokens without logits: hidden states and the output matrix in, one number per row out.

The logits of T rows over a vocabulary of V words are never held together. Forward walks over tiles of them, as large as a
byte budget allows, and keeps a running peak and sum of each row, from which its log-partition comes. Backward walks over
them again, recomputes a tile's logits and turns them into their own gradient, which the two products with the weight and
the hidden states consume at once. Rows whose upstream gradient is zero (masked tokens, zero advantages) are dropped before
any product.

With logits x = (hidden W^T + bias) / temperature, p = softmax(x), y the target and H the entropy:
    logp = x_y - lse(x)          d logp / d x_j = [j = y] - p_j
    H = - sum_j p_j log p_j      d H / d x_j    = - p_j (log p_j + H)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vsr1.ops import _linear_logp_backends as backends


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
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> LinearLogp:
    """Log-probability of `target` under softmax((hidden @ weight.T + bias) / temperature), and the entropy.

    Differentiable in `hidden`, `weight` and `bias`, through both results; whatever needs no gradient (a frozen head)
    costs no product. Once: there is no second derivative.

    Args:
        hidden: (T, H) floating point. weight: (V, H), bias: (V,), of the dtype of `hidden`. H, V >= 1.
            T may be 0.
        target: (T,) int64 in [0, V). Out of range is an error on the CPU; on a GPU, where looking would stall the stream,
            the row's log-probability is NaN ("triton") or the gather asserts ("reference").
        temperature: above 0.
        chunk_bytes: scratch for the logits that exist at a time: 8 MiB on the CPU and 192 MiB on a GPU unless given; a tile of
            256 words of one row is the least, of the reference one row. Speed and memory depend on it, and the results only in
            rounding.
        backend: "auto", "cpu" (C++ between torch's products), "triton" (GPU, between cuBLAS') or "reference" (torch; the one
            that takes float64). Backward runs on the same.

    Maximum, log-sum-exp and entropy are float32 at least, and so are logits, but for those that the reference, or a CPU with
    products of bfloat16, makes in the dtype of the inputs. A NaN in a row of `hidden` gives a NaN for that row. In half
    precision the gradients are summed over tiles in float32. The same call gives the same bits; those of the "cpu" backend
    depend on the number of threads only as far as torch's matrix products do.

    Backward reads the list of rows to keep on the host, which waits for a GPU once; not where all rows have the same upstream
    gradient (a plain sum or mean), nor while a CUDA graph is captured. There, all rows take part.

    Raises ValueError / TypeError naming the argument, BackendUnavailable for a named backend that cannot serve.
    """
    _validate(hidden, weight, target, temperature, bias, chunk_bytes)
    logp, row_entropy, _ = backends.linear_logp(
        hidden, weight, target, bias, temperature, entropy, chunk_bytes, backend
    )
    return LinearLogp(logp, row_entropy if entropy else None)


def _validate(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, bias: Tensor | None, chunk_bytes: int | None
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
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1; got {chunk_bytes}")
