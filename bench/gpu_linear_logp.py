"""linear_logp on a GPU: bfloat16 rows over Qwen's vocabulary, forward and backward, beside plain torch and others' fused losses.

Every answer is checked at full size against float64 before it is timed. Times are of calls from Python: backward is autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from bench import logp_peers as peers
from bench.gpu import milliseconds, workspace
from bench.harness import Bound, Measurement, mib_at_most, milliseconds_at_most, within
from vsr1.ops import last_backend

TESTS = [str(Path(__file__).resolve().parent.parent / "tests" / "ops" / "test_linear_logp_triton.py")]
SANITIZED = [
    f"{TESTS[0]}::{name}"
    for name in (
        "test_triton_infinities_nan_and_a_target_outside",
        "test_triton_gives_a_row_without_upstream_gradient_none_where_it_takes_part",
    )
]
T, V = 8192, 151_936
LIMITS = {2048: 25.0, 4096: 48.0}
"""Hidden width: milliseconds that forward and backward with entropy may take."""
COUNT = 2 * len(LIMITS) + 2
NOTES: dict[str, str] = {}
"""Case: one line on why it misses its goal."""


def measurements() -> Iterator[Measurement]:
    """For both widths all rows and the mean; for the first one half the rows and a frozen head, too."""
    for width, limit in LIMITS.items():
        bounds = [milliseconds_at_most(limit)] + [mib_at_most(1.6 * 1024)] * (width == min(LIMITS))
        yield rows(width, bounds)
        if width == min(LIMITS):
            yield half(width)
            yield rows(width, [mib_at_most(0.4 * 1024)], frozen=True)
        yield mean(width)


def rows(width: int, bounds: list[Bound], *, frozen: bool = False) -> Measurement:
    hidden, weight, target = peers.inputs(T, V, width, torch.bfloat16, frozen=frozen, device="cuda")
    up = torch.randn(T, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    judge = peers.Judge(peers.row_step, peers.plain, hidden, weight, target, up)
    others, absent = peers.available(peers.ROWS)
    line = race(
        f"bf16 {shape(width)}{', frozen head' * frozen}",
        {
            name: partial(peers.row_step, function, hidden, weight, target, up)
            for name, function in {"vsr1": peers.ours, **others}.items()
        },
        judge,
    )
    line.absent |= absent
    return line.held_to(*bounds)


def half(width: int) -> Measurement:
    """Every second row without upstream gradient, beside all rows with one."""
    hidden, weight, target = peers.inputs(T, V, width, torch.bfloat16, device="cuda")
    up = torch.randn(T, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    some = up * (torch.arange(T, device="cuda") % 2)
    judges = [peers.Judge(peers.row_step, peers.plain, hidden, weight, target, one) for one in (some, up)]
    whole = "own, every row"
    line = race(
        f"bf16 {shape(width)}, 50% of rows with gradient",
        {
            "vsr1": partial(peers.row_step, peers.ours, hidden, weight, target, some),
            whole: partial(peers.row_step, peers.ours, hidden, weight, target, up),
        },
        lambda name, answer: judges[name == whole](name, answer),
    )
    return line.held_to(within(0.7, whole))


def mean(width: int) -> Measurement:
    hidden, weight, target = peers.inputs(T, V, width, torch.bfloat16, device="cuda")
    judge = peers.Judge(peers.mean_step, peers.plain_mean, hidden, weight, target)
    others, absent = peers.available(peers.MEANS)
    line = race(
        f"bf16 {shape(width)}, mean log-probability",
        {
            name: partial(peers.mean_step, function, hidden, weight, target)
            for name, function in {"vsr1": peers.ours_mean, **others}.items()
        },
        judge,
    )
    line.absent |= absent
    return line


def shape(width: int) -> str:
    return f"T = {T:,}, V = {V:,}, H = {width:,}"


def race(
    case: str, contenders: dict[str, Callable[[], tuple[Tensor, ...]]], check: Callable[[str, Any], None]
) -> Measurement:
    """Check all contenders, ours first, then time them and take their memory; a peer that cannot do it keeps nobody back."""
    (ours, call), *others = contenders.items()
    check(ours, call())
    backend = last_backend()
    times, mib, failed = {}, {}, {}
    for name, other in others:
        try:
            check(name, other())
            mib[name], times[name] = workspace(other), milliseconds(other)
        except (RuntimeError, AssertionError, TritonError) as error:
            failed[name] = f"{case}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return Measurement(
        case, milliseconds(call), backend=backend, mib=workspace(call), peers=times, peers_mib=mib, absent=failed,
        note=NOTES.get(case, ""),
    )  # fmt: skip
