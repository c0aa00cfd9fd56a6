"""The noise of soft tokens: standard normal numbers that a seed and an offset name, the same bits on every machine.

Words come from Philox4x32-10, a counter-based generator, and pairs of words become pairs of normals by Box-Muller. Libraries
differ in the last bit of log, sin and cos, and compilers in whether they fuse a product into a sum; so the three functions are
polynomials evaluated in steps that leave neither any choice: float32 times float32 is exact in float64, hence the sum behind it
rounds once whether fused or not, and the result is rounded to float32 before the next step. Beside these steps there are only
conversions, float32 products and a square root, each of which IEEE 754 defines to the bit. csrc/cuda/noise.cuh (C++ and CUDA)
and kernels/soft_query.py (Triton) hold the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# Chebyshev fits, rounded to float32 and written in full; relative errors of the fits are below 2^-24.
LOG = (  # log(1 + x) / x on [sqrt(1/2) - 1, sqrt(2) - 1]
    1.0, -0.49999988079071045, 0.33333325386047363, -0.25001585483551025, 0.20002073049545288,
    -0.1660912185907364, 0.14180061221122742, -0.13240870833396912, 0.12914301455020905, -0.07638683915138245,
)  # fmt: skip
# sin(pi/4 x) / x, in x^2
SIN = (0.7853981852531433, -0.08074543625116348, 0.0024900068528950214, -3.5954399209003896e-05)
COS = (
    1.0,
    -0.3084251284599304,
    0.015854325145483017,
    -0.0003259385994169861,
    3.529804189383867e-06,
)  # cos(pi/4 x), in x^2
LN2 = (0.6931471824645996, -1.9046542121259336e-09)  # float32 each; their sum is log 2 to 2^-57
SQRT_HALF = 0x3FE6A09E00000000  # the bits of a double just below sqrt(1/2)


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


def philox_normal(
    shape: torch.Size | tuple[int, ...], noise: NoiseStream, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers of `shape`, float32, that depend on (seed, offset) and the position alone.

    Block i of four consecutive numbers is Philox4x32-10 of counter offset + i under the key `seed`, turned into normals
    pair by pair.
    """
    count = math.prod(shape)
    counter = torch.arange(noise.offset, noise.after(count).offset, dtype=torch.int64, device=device)
    zero = torch.zeros_like(counter)
    words = philox4x32(torch.stack([counter & MASK, counter >> 32, zero, zero]), noise.seed)
    normal = torch.stack(box_muller(words[0::2], words[1::2]))
    return normal.permute(2, 1, 0).reshape(-1)[:count].reshape(shape)


def philox4x32(counter: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    `counter` (4, n) int64 holds 32-bit words, least significant first; `seed` is the 64-bit key. Returns (4, n) int64
    words in [0, 2^32). The 32 x 32 bit products wrap around in int64; shift and mask recover both halves of them all
    the same.
    """
    c0, c1, c2, c3 = counter.unbind()
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack([c0, c1, c2, c3])


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, float32, from two int64 tensors of words in [0, 2^32).

    u = (first word + 1) / 2^32 lies in (0, 1] and gives the radius sqrt(-2 log u), at most 6.7; the second word is the
    angle in units of a full turn / 2^32.
    """
    # u = 2^e m with m in [sqrt(1/2), sqrt(2)), read from the bits of a double; m - 1 is exact there.
    bits = (radius_word + 1).double().view(torch.int64)
    exponent = (bits - SQRT_HALF) >> 52
    above_one = ((bits - (exponent << 52)).view(torch.float64) - 1).float()
    turns = (exponent - 32).double()
    log = turns * LN2[0] + (turns * LN2[1] + above_one.double() * _polynomial(above_one, LOG).double())
    radius = (-2 * log).float().double().sqrt().float()
    # The nearest quarter of a turn, and how far beyond it in eighths: x in [-1, 1).
    quarter = (angle_word + (1 << 29)) >> 30
    x = (angle_word - (quarter << 30)).float() * 2.0**-29
    square = x * x
    sin, cos = x * _polynomial(square, SIN), _polynomial(square, COS)
    odd = (quarter & 1) == 1
    first, second = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    first = torch.where(((quarter + 1) & 2) == 2, -first, first)
    second = torch.where((quarter & 2) == 2, -second, second)
    return radius * first, radius * second


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule in the steps that the head of this module describes; x float32, coefficients float32 numbers."""
    wide = x.double()
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = (value.double() * wide + coefficient).float()
    return value
