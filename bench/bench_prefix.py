"""shared_prefix_attention on the CPU, decoding one token, beside torch's attention over a prefix copied to every row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vsr1.ops.prefix import shared_prefix_attention

HEADS, KEY_HEADS, WIDTH, SUFFIX = 16, 8, 128, 64


@pytest.mark.parametrize("group", [1, 8])
def test_decode(race: Callable[..., None], quick: bool, group: int) -> None:
    """One prompt and `group` continuations of it."""
    prefix = 64 if quick else 2048
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query = normal(group, HEADS, 1, WIDTH)
    shared = [normal(1, KEY_HEADS, prefix, WIDTH) for _ in range(2)]
    own = [normal(group, KEY_HEADS, SUFFIX, WIDTH) for _ in range(2)]
    # What a cache holds that knows no groups: every row has the whole prompt.
    copied = [torch.cat([one.expand(group, -1, -1, -1), two], dim=2) for one, two in zip(shared, own, strict=True)]
    wide = [part.double() for part in (query, *copied)]
    truth = F.scaled_dot_product_attention(*wide, enable_gqa=True)

    def check(name: str, found: Tensor) -> None:
        off = float((found.double() - truth).norm() / truth.norm())
        if not off <= 1e-5:
            raise AssertionError(f"{name} differs from float64 by {off:.1e} of its length")

    race(
        f"fp32 prefix {prefix:,}, suffix {SUFFIX}, {HEADS}/{KEY_HEADS} heads x {WIDTH}, G = {group}",
        {
            "vsr1": partial(shared_prefix_attention, query, *shared, *own, group=group),
            "torch, copied": partial(F.scaled_dot_product_attention, query, *copied, enable_gqa=True),
        },
        check,
        reads=torch.stack(shared),
    )
