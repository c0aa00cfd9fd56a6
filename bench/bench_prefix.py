"""shared_prefix_attention on the CPU: decoding one token, beside torch's attention over a prefix copied to every row; and the
forward and backward of a packed group, beside the same of plain rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vsr1.ops.prefix import shared_prefix_attention

HEADS, KEY_HEADS, WIDTH, SUFFIX = 16, 8, 128, 64
BACKENDS = ("cpu", "reference")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("owner", "says"),
    [([0], "G = 1"), ([0] * 8, "G = 8"), ([2, 0, 0, 1, 2, 0, 0, 0], "8 rows of 3 prefixes, 5 + 1 + 2")],
    ids=["G1", "G8", "ragged"],
)
def test_decode(race: Callable[..., None], quick: bool, owner: list[int], says: str) -> None:
    """Prompts and their continuations, the suffixes being views of larger buffers as a decoder holds them."""
    prefix, generator = 64 if quick else 2048, torch.Generator().manual_seed(0)
    rows, group = len(owner), torch.tensor(owner)
    query = normal(generator, rows, HEADS, 1, WIDTH)
    shared = [normal(generator, max(owner) + 1, KEY_HEADS, prefix, WIDTH) for _ in range(2)]
    own = [normal(generator, rows, KEY_HEADS, 2 * SUFFIX, WIDTH)[:, :, :SUFFIX] for _ in range(2)]
    # What a cache holds that knows no groups: every row has the whole prompt.
    copied = [torch.cat([one[group], two], dim=2) for one, two in zip(shared, own, strict=True)]
    truth = F.scaled_dot_product_attention(*(part.double() for part in (query, *copied)), enable_gqa=True)

    def check(name: str, found: Tensor) -> None:
        if not (off := distance(found, truth)) <= 1e-5:
            raise AssertionError(f"{name} differs from float64 by {off:.1e} of its length")

    attend = partial(shared_prefix_attention, query, *shared, *own, group=group)
    race(
        f"fp32 prefix {prefix:,}, suffix {SUFFIX}, {HEADS}/{KEY_HEADS} heads x {WIDTH}, {says}",
        {f"vsr1 {backend}": partial(attend, backend=backend) for backend in BACKENDS}
        | {"torch, copied": partial(F.scaled_dot_product_attention, query, *copied, enable_gqa=True)},
        check,
        reads=torch.stack(shared),
    )


def test_training(race: Callable[..., None], quick: bool) -> None:
    """A group's forward and backward; the prefix's own queries, which both would have, are left out."""
    group, heads, width = 8, 8, 32
    prefix, suffix = (64, 16) if quick else (2048, 256)
    generator = torch.Generator().manual_seed(0)
    shapes = [(group, heads, suffix), *[(1, heads, prefix)] * 2, *[(group, heads, suffix)] * 2]
    inputs = [normal(generator, *shape, width).requires_grad_() for shape in shapes]
    upstream = normal(generator, group, heads, suffix, width)
    triangle = torch.ones(suffix, suffix, dtype=torch.bool).tril().expand(group, -1, -1)
    seen = torch.cat([triangle.new_ones(group, suffix, prefix), triangle], 2)[:, None]

    def plain(q: Tensor, k_prefix: Tensor, v_prefix: Tensor, k_suffix: Tensor, v_suffix: Tensor) -> Tensor:
        k, v = (
            torch.cat([one.expand(group, -1, -1, -1), two], 2)
            for one, two in ((k_prefix, k_suffix), (v_prefix, v_suffix))
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def both(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        out = attend(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]

    truth = both(plain, [part.detach().double().requires_grad_() for part in inputs])

    def check(name: str, found: list[Tensor]) -> None:
        if not (off := max(map(distance, found, truth))) <= 1e-5:
            raise AssertionError(f"{name} differs from float64 by {off:.1e} of its length")

    attend = partial(shared_prefix_attention, group=group, suffix_mask=triangle)
    race(
        f"packed group P={prefix} R={suffix} G={group} attention forward+backward, fp32, {heads} heads x {width}",
        {f"vsr1 {backend}": partial(both, partial(attend, backend=backend), inputs) for backend in BACKENDS}
        | {"torch, copied": partial(both, plain, inputs)},
        check,
    )
