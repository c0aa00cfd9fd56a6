"""soft_token_step on the CPU beside the head's modules in torch and reading the weights once. Its goal is one for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench.soft_steps import check_step, in_torch, make_case, truth_of, weights_read
from vsr1.ops.soft_query import soft_token_step

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.bfloat16, 2048), (torch.float32, 2048), (torch.float32, 64)],
    ids=["bf16-D2048", "fp32-D2048", "fp32-D64"],
)
def test_step(race: Callable[..., None], quick: bool, dtype: torch.dtype, width: int, count: int) -> None:
    case = make_case(count, min(width, 256) if quick else width, dtype, "cpu")
    truth = truth_of(case)
    race(
        case.name,
        {"vsr1": partial(soft_token_step, *case.arguments, **case.options), "torch": partial(in_torch, case)},
        partial(check_step, case, truth, ROUNDING[dtype]),
        reads=weights_read(case),
    )
