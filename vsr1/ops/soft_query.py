"""One soft-token step: a hidden state of the policy becomes a soft query token and the policy's own next input.

The refine head maps the state to the mean of a Gaussian, an action is drawn around it (or is the mean itself when
nothing is to be explored), and the action, not the mean, is what both readers get: it is inserted into the next query
and, projected, fed back to the policy. So the reward depends on what was drawn and the action's log-probability carries
a gradient that means something. The noise comes from a counter-based generator: the same (seed, offset) gives the same
numbers on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vsr1.ops._dispatch import Backend, register, resolve

register("soft_query", reference=Backend())


class RefineModules(Protocol):
    """The part of a refine head this op reads (see `vsr1.models.refine`); H: the policy's width, D: the query's."""

    @property
    def refine_projector(self) -> nn.Module:
        """Linear(H, D) - LayerNorm - GELU - Linear(D, D)."""
        ...

    @property
    def refine_gate(self) -> nn.Module | None:
        """Linear(H, 1), whose sigmoid scales the mean; None for no gate."""
        ...

    @property
    def refine_latent_input_projector(self) -> nn.Module:
        """LayerNorm - Linear(D, H)."""
        ...


@dataclass(frozen=True)
class NoiseStream:
    """A position in the stream of normal numbers that `seed` names; `offset` counts the blocks of four drawn before.

    Immutable: a step returns the stream to go on with, so keeping a stream is enough to draw the same noise again.
    """

    seed: int
    offset: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.seed < 2**64 and 0 <= self.offset < 2**62):
            raise ValueError(f"seed must lie in [0, 2^64) and offset in [0, 2^62); got {self.seed}, {self.offset}")

    def after(self, count: int) -> NoiseStream:
        """The stream behind `count` numbers; a block that was begun is not used again."""
        return NoiseStream(self.seed, self.offset + -(-count // 4))


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

    Raises:
        TypeError: `hidden` is not a floating point tensor. ValueError: not (B, H), a negative or non-finite sigma, or
        sigma > 0 without a generator.
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
    if not torch.compiler.is_compiling():  # the reference is plain torch and traces by itself; the choice does not
        resolve("soft_query", backend, device=hidden.device, dtype=hidden.dtype)
    return reference(hidden, head, sigma, generator)


def reference(hidden: Tensor, head: RefineModules, sigma: float, noise: NoiseStream | None) -> SoftStep:
    """The op in plain torch; arguments as in `soft_token_step`.

    It calls the head's modules rather than reading their weights, so hooks on them (sharding, adapters) keep working.
    """
    dtype = next(head.refine_projector.parameters()).dtype
    state = hidden.to(dtype)
    mean = head.refine_projector(state)
    if head.refine_gate is not None:
        mean = mean * torch.sigmoid(head.refine_gate(state))
    # A half-precision action would round the noise away and its log-probability with it.
    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
    if sigma > 0 and noise is not None:
        action = mean + sigma * philox_normal(mean.shape, noise, device=mean.device).to(mean.dtype)
        logp = gaussian_logp(action.detach(), mean, sigma)
        noise = noise.after(mean.numel())
    else:
        action, logp = mean, mean.new_zeros(mean.shape[0])
    policy_input = head.refine_latent_input_projector(action.to(dtype)).to(hidden.dtype)
    return SoftStep(mean, action, logp, policy_input, noise)


def gaussian_logp(action: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """Log-density of `action` (..., D) under N(mean, sigma^2 I), **averaged over the D coordinates**; shape (...).

    (1/D) sum_d [ -(a_d - m_d)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2 ].

    The average and not the sum, because what it feeds is a clipped probability ratio: for D = 2048 the joint density
    ratio leaves any clip range after a step no single coordinate would notice, while the geometric mean over
    coordinates keeps the scale of one token's ratio. At ratio 1 the gradient is the true score divided by D: same
    direction, a scale that belongs to the loss weight. GSPO makes the same choice for the tokens of a sequence (arXiv
    2507.18071).

    Raises ValueError for sigma <= 0 or shapes that differ.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"a density needs a finite sigma above 0; got {sigma}")
    if action.shape != mean.shape:
        raise ValueError(f"action {tuple(action.shape)} and mean {tuple(mean.shape)} must have one shape")
    return -((action - mean) / sigma).square().mean(-1) / 2 - math.log(sigma) - math.log(2 * math.pi) / 2


def philox_normal(
    shape: torch.Size | tuple[int, ...], noise: NoiseStream, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers of `shape`, float32, that depend on (seed, offset) and the position alone.

    Block i of four consecutive numbers is Philox4x32-10 of counter offset + i under the key `seed`, turned into normals
    pair by pair (Box-Muller, in float64). Devices agree to float32 rounding.
    """
    count = math.prod(shape)
    counter = torch.arange(noise.offset, noise.after(count).offset, dtype=torch.int64, device=device)
    zero = torch.zeros_like(counter)
    words = philox4x32(torch.stack([counter & _MASK, counter >> 32, zero, zero]), noise.seed)
    # (0, 1] for the radius, whose logarithm must exist; [0, 1) for the angle
    radius = torch.sqrt(-2 * torch.log((words[0::2].double() + 1) / 2**32))
    angle = 2 * math.pi * (words[1::2].double() / 2**32)
    normal = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)])
    return normal.permute(2, 1, 0).reshape(-1)[:count].reshape(shape).float()


_MASK = 0xFFFFFFFF


def philox4x32(counter: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    `counter` (4, n) int64 holds 32-bit words, least significant first; `seed` is the 64-bit key. Returns (4, n) int64
    words in [0, 2^32). The 32 x 32 bit products wrap around in int64; shift and mask recover both halves of them all
    the same.
    """
    c0, c1, c2, c3 = counter.unbind()
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3])
