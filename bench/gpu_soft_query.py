"""soft_token_step on a GPU beside the head's modules in torch and reading the weights once: H = D = 2048, bfloat16.

Both backends are measured by name, so that "auto" can be told which one serves better. The step's graph is captured with its
noise inside, as generation would replay it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bench.gpu import milliseconds, replayed, workspace
from bench.gpu_corpus_scan import reading
from bench.harness import Measurement, within
from bench.soft_steps import check_step, in_torch, make_case, truth_of, weights_read
from vsr1.errors import BackendUnavailable
from vsr1.ops import last_backend
from vsr1.ops.soft_query import soft_token_step

_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "ops"
TESTS = [str(_FOLDER / f"test_soft_query_{part}.py") for part in ("triton", "noise", "cuda")]
SANITIZED = [f"{TESTS[0]}::{name}" for name in ("test_triton_matches_float64", "test_cuda_matches_float64")]
ROWS = (1, 8, 16, 64)
BACKENDS = ("cuda", "triton")
COUNT = len(ROWS) * len(BACKENDS)
"""How many measurements there are where both backends serve."""
ROUNDING = 2e-2
"""Of a step in bfloat16, relative to float64."""


def measurements() -> Iterator[Measurement]:
    """Every number of rows on every backend that serves here."""
    for count in ROWS:
        case = make_case(count, 2048, torch.bfloat16, "cuda")
        truth = truth_of(case)
        weights = weights_read(case)
        floor = reading(weights)
        plain = partial(in_torch, case)
        check_step(case, truth, ROUNDING, "torch", plain())
        peers = {"torch": replayed(plain), "torch from Python": milliseconds(plain)}
        for backend in BACKENDS:
            ours = partial(soft_token_step, *case.arguments, **case.options, backend=backend)
            try:
                step = ours()
            except BackendUnavailable as error:
                print(error)
                continue
            check_step(case, truth, ROUNDING, backend, step)
            line = Measurement(
                f"{case.name}, {backend}", replayed(ours), weights.nbytes, floor=floor, backend=last_backend(),
                eager=milliseconds(ours), mib=workspace(ours), peers=peers,
            )  # fmt: skip
            yield line.held_to(within(1.3))
