"""One soft-token step: a hidden state of the policy becomes a soft query token and the policy's own next input.

The refine head maps the state to the mean of a Gaussian, an action is drawn around it (or is the mean itself when
nothing is to be explored), and the action, not the mean, is what both readers get: it is inserted into the next query
and, projected, fed back to the policy. So the reward depends on what was drawn and the action's log-probability carries
a gradient that means something. The noise comes from a counter-based generator: the same (seed, offset) gives the same
bits on every machine and backend (`vsr1.ops._noise`).

Which backend. The fast ones read the head's weights and are for steps without a gradient, as generation takes them; the
reference calls the head's modules, so hooks on them (sharding, adapters) keep working. "auto" takes the reference
where a gradient is asked for, because there the others compute the step twice; named, they give the gradient too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vsr1.errors import BackendUnavailable
from vsr1.ops._dispatch import resolve
from vsr1.ops._noise import NoiseStream, philox4x32, philox_normal
from vsr1.ops._soft_backends import compute, gaussian_logp, soft_step
from vsr1.ops._soft_head import HeadWeights, RefineModules, plain_weights

__all__ = [
    "NoiseStream",
    "RefineModules",
    "SoftStep",
    "gaussian_logp",
    "philox4x32",
    "philox_normal",
    "reference",
    "soft_token_step",
]


class SoftStep(NamedTuple):
    """What a step returns; B rows, query width D, policy width H."""

    mean: Tensor
    """(B, D), float32 (float64 for a float64 head): the latent z."""
    action: Tensor
    """(B, D) like `mean`: z + sigma * noise. Gradients reach the head through it (the path-wise derivative)."""
    logp: Tensor
    """(B,) like `mean`: `gaussian_logp` of the drawn action held constant: its gradient is the score. 0 at sigma 0."""
    policy_input: Tensor
    """(B, H) in the dtype of `hidden`: the projected action, the policy's next input embedding."""
    noise: NoiseStream | None
    """The stream to draw the next step from; None if none was given."""


def soft_token_step(
    hidden: Tensor,
    head: RefineModules,
    *,
    sigma: float = 0.0,
    generator: NoiseStream | None = None,
    backend: str = "auto",
) -> SoftStep:
    """Take one soft-token step; differentiable in `hidden` and in the parameters of `head`.

    Args:
        hidden: (B, H) floating point, the policy's last hidden states (after the final norm). Cast to the head's dtype.
        head: the refine modules. The mean is `refine_projector(hidden)`, times `sigmoid(refine_gate(hidden))` if
            there is a gate.
        sigma: standard deviation of every coordinate of the action; 0 takes the mean.
        generator: where the noise comes from; needed when sigma > 0, returned unchanged when it is 0.
        backend: "auto", "cpu" (compiled C++; float32 and bfloat16 heads), "cuda" (one launch on Ampere GPUs and newer),
            "triton" (GPU), both for up to 64 rows, or "reference" (torch).

    Raises:
        TypeError: `hidden` is not a floating point tensor. ValueError: not (B, H), a negative or non-finite sigma, or
        sigma > 0 without a generator. BackendUnavailable: the named backend cannot serve this call.
    """
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise TypeError(
            f"hidden must be a floating point tensor; got {getattr(hidden, 'dtype', type(hidden).__name__)}"
        )
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape (B, H); got {tuple(hidden.shape)}")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be finite and at least 0; got {sigma}")
    if sigma > 0 and generator is None:
        raise ValueError(f"sigma={sigma} needs noise: pass generator=NoiseStream(seed)")
    weights = plain_weights(head)
    unfit = _unfit(hidden, weights, backend)
    if unfit is not None or backend == "reference" or isinstance(weights, str):
        # The reference is plain torch and traces by itself; the choice does not.
        if not torch.compiler.is_compiling():
            resolve("soft_query", backend, device=hidden.device, dtype=hidden.dtype, unfit=unfit)
        elif backend not in ("auto", "reference"):
            raise BackendUnavailable(f"soft_query: backend {backend!r} {unfit}")
        return reference(hidden, head, sigma, generator)
    noise = generator if sigma > 0 and generator is not None else NoiseStream(0)
    seed = noise.seed - 2**64 if noise.seed >= 2**63 else noise.seed  # a torch op takes signed numbers
    state = hidden.to(weights.tensors[0].dtype)
    outputs = soft_step(state, weights.tensors, weights.epsilons, sigma, seed, noise.offset, backend)
    mean, action, logp, policy_input = outputs
    return SoftStep(mean, action, logp, policy_input.to(hidden.dtype), _behind(generator, sigma, mean))


def reference(hidden: Tensor, head: RefineModules, sigma: float, noise: NoiseStream | None) -> SoftStep:
    """The op in plain torch; arguments as in `soft_token_step`.

    It calls the head's modules rather than reading their weights.
    """
    state = hidden.to(next(head.refine_projector.parameters()).dtype)
    maps = head.refine_projector, head.refine_gate, head.refine_latent_input_projector
    mean, action, logp, policy_input = compute(state, *maps, sigma, noise)
    return SoftStep(mean, action, logp, policy_input.to(hidden.dtype), _behind(noise, sigma, mean))


def _behind(noise: NoiseStream | None, sigma: float, mean: Tensor) -> NoiseStream | None:
    return noise.after(mean.numel()) if sigma > 0 and noise is not None else noise


def _unfit(hidden: Tensor, weights: HeadWeights | str, backend: str) -> str | None:
    """Why this call is for the reference, as half a sentence about any other backend; or None."""
    if isinstance(weights, str):
        return weights
    if torch.is_autocast_enabled(hidden.device.type):
        return "computes in the head's own type; torch.autocast asks for another"
    if hidden.device != weights.tensors[0].device or hidden.shape[1] != weights.tensors[0].shape[1]:
        first = weights.tensors[0]
        return (
            f"takes (B, {first.shape[1]}) hidden states on {first.device}; got {tuple(hidden.shape)} on {hidden.device}"
        )
    asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, *weights.tensors))
    if asked and backend == "auto":
        return "would compute the step twice for its gradient; it does where it is named"
    return None
