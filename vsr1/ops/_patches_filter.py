"""The integer filters of the byte resize: which pixels of a line, and how much of each, make one pixel of the resized line.

The arithmetic of Pillow and of torch's byte kernel for CPUs: weights of the antialiased cubic are computed in float64 and made
int16, with as many bits behind the point as the largest of them leaves room for; a resized pixel is then a sum of integers,
rounded and clamped to a byte. Such sums have the same bits in any order, on a CPU and on a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

SHARPNESS = -0.5
"""The cubic's `a`: Catmull-Rom."""
REACH = 2.0
"""How far the cubic reaches from its centre, in pixels of the coarser grid."""
MOST_BITS = 22
"""Behind the point of a weight: the sum of 255 x the weights stays below 2^31."""


class Filter(NamedTuple):
    """A line of n pixels from one of another length: pixel i is sum_j weights[i, j] line[begin[i] + j] / 2^bits."""

    begin: Tensor
    """(n,) int32."""
    weights: Tensor
    """(n, taps) int16, taps even; 0 where begin + j is past the end of the line."""
    bits: int


@functools.lru_cache(maxsize=256)
def resize_filter(source: int, target: int, device: torch.device | str = "cpu") -> Filter:
    """The filter from `source` to `target` pixels, kept for the next call; on a GPU its first call waits for the copy."""
    if torch.device(device).type != "cpu":
        begin, weights, bits = resize_filter(source, target)
        return Filter(begin.to(device), weights.to(device), bits)
    scale = source / target
    stretch = max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    begin = (centre - REACH * stretch + 0.5).long().clamp_(min=0)
    count = (centre + REACH * stretch + 0.5).long().clamp_(max=source) - begin
    taps = torch.arange(int(count.max() + 1) // 2 * 2)
    distance = ((taps + begin[:, None]) - centre[:, None] + 0.5) * (1 / stretch)
    shares = _cubic(distance.abs()).masked_fill_(taps >= count[:, None], 0.0)
    shares /= shares.cumsum(1)[:, -1:]  # summed one after the other, as Pillow sums
    bits, largest = 0, shares.max().item()
    while bits < MOST_BITS and int(0.5 + largest * 2 ** (bits + 1)) < 2**15:
        bits += 1
    scaled = shares * 2.0**bits
    weights = (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc_().to(torch.int16)
    return Filter(begin.int(), weights, bits)


def _cubic(x: Tensor) -> Tensor:
    """The cubic convolution filter at distances x >= 0, by Horner's rule (Keys 1981, equation 4)."""
    near = ((SHARPNESS + 2) * x - (SHARPNESS + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * SHARPNESS
    return torch.where(x < 1, near, torch.where(x < REACH, far, 0.0))
