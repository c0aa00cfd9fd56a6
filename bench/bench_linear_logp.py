"""linear_logp on the CPU, forward and backward, beside plain torch on whole logits and beside others' chunked losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import logp_peers as peers
from bench.harness import Bound, memory_within, within
from vsr1.ops._linear_logp_kernels import multiplies_bfloat16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"T2048-V32000-H256": (2048, 32_000, 256), "T256-V151936-H512": (256, 151_936, 512)}
EMULATED_ROWS = 64  # where torch emulates products of bfloat16: its own path takes a minute for 2048 rows
QUICK = {"T2048-V32000-H256": (128, 1000, 64), "T256-V151936-H512": (16, 3001, 32)}
MAIN, WIDE = SIZES
SHARES = {1.0: "all", 0.5: "half", 0.1: "tenth"}
CASES = [
    (MAIN, "fp32", 1.0, False),
    (MAIN, "fp32", 0.5, False),
    (MAIN, "fp32", 0.1, False),
    (MAIN, "fp32", 1.0, True),
    (MAIN, "bf16", 1.0, False),
    (WIDE, "fp32", 1.0, False),
]
OWN = "own, every row"


@cache
def judged(
    size: tuple[int, int, int], dtype: str, share: float, frozen: bool
) -> tuple[tuple[Tensor, ...], peers.Judge]:
    """hidden, weight, target and the gradient of logp, which `share` of the rows have, and who knows the truth of them."""
    hidden, weight, target = peers.inputs(*size, DTYPES[dtype], frozen=frozen)
    up = (torch.rand(size[0], generator=torch.Generator().manual_seed(1)) < share).float()
    return (hidden, weight, target, up), peers.Judge(peers.row_step, peers.plain, hidden, weight, target, up)


@pytest.mark.parametrize(
    ("size", "dtype", "share", "frozen"),
    CASES,
    ids=[f"{size}-{dtype}-{SHARES[share]}{'-frozen' * frozen}" for size, dtype, share, frozen in CASES],
)
def test_rows(race: Callable[..., None], quick: bool, size: str, dtype: str, share: float, frozen: bool) -> None:
    """Log-probabilities and entropy. Rows without upstream gradient should cost nothing in the backward pass."""
    T, V, H = (QUICK if quick else SIZES)[size]
    emulated = dtype == "bf16" and not multiplies_bfloat16()
    if emulated:
        T = min(T, EMULATED_ROWS)
    sizes = T, V, H
    given, judge = judged(sizes, dtype, share, frozen)
    judges = {"vsr1": judge}
    others: dict[str, Any] = {}
    absent: dict[str, str] = {}
    bounds: list[Bound] = []
    contenders = {"vsr1": partial(peers.row_step, peers.ours, *given)}
    if share < 1:
        all_given, judges[OWN] = judged(sizes, dtype, 1.0, frozen)
        contenders[OWN] = partial(peers.row_step, peers.ours, *all_given)
        bounds = [within(0.7, OWN)] if share == 0.5 else []
    else:
        others, absent = peers.available(peers.ROWS)
    contenders |= {name: partial(peers.row_step, function, *given) for name, function in others.items()}
    if size == MAIN and share == 1 and not frozen:
        bounds = [within(1.25 if dtype == "fp32" else 1.0, "plain")]
        bounds += [memory_within(1 / 8, "plain")] * (
            not emulated
        )  # few rows have few logits beside the weight's gradient
    race(
        f"{dtype} T = {T:,}, V = {V:,}, H = {H}, {share:.0%} of rows with gradient{', frozen head' * frozen}",
        {**contenders, **absent},
        lambda name, answer: judges.get(name, judge)(name, answer),
        bounds=bounds,
    )


def test_mean(race: Callable[..., None], quick: bool) -> None:
    """The gradient of the mean log-probability alone, which every fused loss has."""
    T, V, H = (QUICK if quick else SIZES)[MAIN]
    hidden, weight, target = peers.inputs(T, V, H, torch.float32)
    others, absent = peers.available(peers.MEANS)
    contenders = {
        name: partial(peers.mean_step, function, hidden, weight, target)
        for name, function in {"vsr1": peers.ours_mean, **others}.items()
    }
    judge = peers.Judge(peers.mean_step, peers.plain_mean, hidden, weight, target)
    race(f"fp32 T = {T:,}, V = {V:,}, H = {H}, mean log-probability", {**contenders, **absent}, judge)
