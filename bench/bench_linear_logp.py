"""linear_logp on the CPU, forward and backward, beside plain torch on whole logits and beside others' chunked losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench import logp_peers as peers
from bench.harness import Bound, memory_within, within

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"T2048-V32000-H256": (2048, 32_000, 256), "T256-V151936-H512": (256, 151_936, 512)}
QUICK = {"T2048-V32000-H256": (128, 1000, 64), "T256-V151936-H512": (16, 3001, 32)}
MAIN, WIDE = SIZES
CASES = [
    (MAIN, "fp32", 1.0, False),
    (MAIN, "fp32", 0.5, False),
    (MAIN, "fp32", 0.1, False),
    (MAIN, "fp32", 1.0, True),
    (MAIN, "bf16", 1.0, False),
    (MAIN, "bf16", 0.5, False),
    (WIDE, "fp32", 1.0, False),
]


@pytest.mark.parametrize(
    ("size", "dtype", "share", "frozen"),
    CASES,
    ids=[f"{size}-{dtype}-{share:.0%}{'-frozen' * frozen}" for size, dtype, share, frozen in CASES],
)
def test_rows(race: Callable[..., None], quick: bool, size: str, dtype: str, share: float, frozen: bool) -> None:
    """Log-probabilities and entropy; `share` of the rows have an upstream gradient, the others should cost nothing."""
    T, V, H = (QUICK if quick else SIZES)[size]
    hidden, weight, target = peers.inputs(T, V, H, DTYPES[dtype], frozen=frozen)
    up = (torch.rand(T, generator=torch.Generator().manual_seed(1)) < share).float()
    others, absent = peers.available(peers.ROWS)
    if dtype == "bf16" and share < 1:
        others = {}  # seconds a call where torch emulates bfloat16; the whole rows show them
    bounds: list[Bound] = []
    judge = peers.Judge(peers.row_step, peers.plain, hidden, weight, target, up)
    contenders = {
        name: partial(peers.row_step, function, hidden, weight, target, up)
        for name, function in {"vsr1": peers.ours, **others}.items()
    }
    if size == MAIN and share == 1 and not frozen:
        bounds = [within(1.25 if dtype == "fp32" else 1.0, "plain"), memory_within(1 / 8, "plain")]
    if share < 1:
        every = torch.ones(T)
        whole = "own, every row"
        contenders[whole] = partial(peers.row_step, peers.ours, hidden, weight, target, every)
        judges = {whole: peers.Judge(peers.row_step, peers.plain, hidden, weight, target, every)}
        bounds = [within(0.7, whole)] if share == 0.5 else []
    else:
        judges = {}

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
