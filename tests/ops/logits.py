"""Shared by the tests of linear_logp: inputs, the same numbers through whole logits, and how far two answers are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vsr1.ops.linear_logp import linear_logp

Answer = tuple[Tensor, ...]
NAMES = ("logp", "entropy", "hidden", "weight", "bias")


def plain(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logp and entropy; log-softmax in float32 at least, as training code without the op does it."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = (logits if bias is None else logits + bias) / temperature
    logs = logits.log_softmax(-1)
    return logs.gather(1, target[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def inputs(
    rows: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    seed: int = 0,
    scale: float = 1.0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """hidden, weight, target, bias; all but the target want a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype).requires_grad_()

    target = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    return normal(rows, width), normal(vocabulary, width), target, normal(vocabulary) if bias else None


def upstream(rows: int, device: str = "cpu") -> Tensor:
    """(2, rows) gradients of logp and entropy, both zero for a third of the rows."""
    drawn = torch.randn(2, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn[:, 1::3] = 0.0
    return drawn.to(device)


def answer(function: Callable[..., Any], leaves: Sequence[Tensor | None], up: Tensor) -> Answer:
    """logp, entropy and the gradients of the leaves."""
    logp, entropy = function(*leaves)
    loss = (up[0].to(logp.dtype) * logp + up[1].to(logp.dtype) * entropy).sum()
    return logp.detach(), entropy.detach(), *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


def relative(got: Tensor, truth: Tensor) -> float:
    got, truth = got.detach().double(), truth.detach().double()
    return float((got - truth).norm() / truth.norm().clamp(min=1e-300))


def check(
    rows: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    device: str = "cpu",
    **options: Any,
) -> None:
    """The op's error against float64 is at most twice that of the plain expression of its own dtype, part by part."""
    *_, target, _ = made = inputs(rows, vocabulary, width, dtype, bias=bias, scale=0.5, device=device)
    leaves = (made[0], made[1], made[3])
    up = upstream(rows, device)

    def through_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return plain(hidden, weight, target, 0.9, bias)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        found = linear_logp(hidden, weight, target, temperature=0.9, bias=bias, entropy=True, **options)
        assert (found.logp <= 0).all()
        return found

    wide = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    three = partial(answer, up=up)
    truth, naive, found = three(through_logits, wide), three(through_logits, leaves), three(ours, leaves)
    for name, one, other, true in zip(NAMES, found, naive, truth, strict=False):
        assert one.dtype == other.dtype, name
        assert relative(one, true) <= 2 * relative(other, true) + 3e-7, name
