"""linear_logp on the CPU, values and gradients, beside log_softmax on full logits: T = 2048, V = 32,000, H = 256."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.harness import memory_within, within
from vsr1.ops.linear_logp import linear_logp

Answer = tuple[Tensor, ...]
"""logp (T,), entropy (T,), and the gradients of hidden (T, H) and weight (V, H)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logs = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
    return logs.gather(1, target[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp, entropy = linear_logp(hidden, weight, target, entropy=True)
    assert entropy is not None
    return logp, entropy


def step(
    function: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, target: Tensor, up: Tensor
) -> Answer:
    logp, entropy = function(hidden, weight, target)
    grads = torch.autograd.grad((up * (logp + 0.01 * entropy)).sum(), (hidden, weight))
    return logp.detach(), entropy.detach(), *grads


def off(found: Answer, truth: Answer) -> list[float]:
    """The distance of each part from the truth, as a share of its length."""
    return [float((one.double() - true).norm() / true.norm()) for one, true in zip(found, truth, strict=True)]


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all-rows", "half-the-rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(race: Callable[..., None], quick: bool, dtype: str, share: float) -> None:
    """`share` of the rows have an upstream gradient; the others should cost nothing in the backward pass."""
    T, V, H = (128, 1000, 64) if quick else (2048, 32_000, 256)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).to(DTYPES[dtype]).requires_grad_()
    weight = (0.05 * torch.randn(V, H, generator=generator)).to(DTYPES[dtype]).requires_grad_()
    target = torch.randint(V, (T,), generator=generator)
    upstream = (torch.rand(T, generator=generator) < share).float()
    every = torch.ones(T)
    wide = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())

    def judge(up: Tensor) -> tuple[Answer, list[float]]:
        """The truth, and how far from it an answer may be: twice as far as the plain expression of the same dtype."""
        truth = step(plain, *wide, target, up)
        return truth, [2 * distance + 1e-7 for distance in off(step(plain, hidden, weight, target, up), truth)]

    contenders = {
        "vsr1": partial(step, ours, hidden, weight, target, upstream),
        "plain": partial(step, plain, hidden, weight, target, upstream),
    }
    judges = dict.fromkeys(contenders, judge(upstream))
    bounds = [within(1.25 if dtype == "fp32" else 1.0, "plain"), memory_within(1 / 8, "plain")]
    if share < 1:
        contenders["own, every row"] = partial(step, ours, hidden, weight, target, every)
        judges["own, every row"] = judge(every)
        bounds = [within(0.7, "own, every row")]

    def check(name: str, answer: Answer) -> None:
        truth, allowed = judges[name]
        distances = off(answer, truth)
        if any(not one <= most for one, most in zip(distances, allowed, strict=True)):
            raise AssertionError(f"{name}: logp, entropy and gradients are off by {distances}; {allowed} is allowed")

    race(f"{dtype} T = {T:,}, V = {V:,}, H = {H}, {share:.0%} of rows with gradient", contenders, check, bounds=bounds)
