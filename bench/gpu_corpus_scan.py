"""corpus_scan on a GPU: top-k and InfoNCE over one million 2048-d bfloat16 rows, beside torch and beside reading the rows once.

Every answer is checked at full size before it is timed: against float64 scores of the rows that are returned, and against
torch's own top-k of float32 scores for the rows that are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import Measurement, milliseconds, replayed
from vsr1.ops import last_backend
from vsr1.ops.corpus_scan import ScanResult, SoftQuery, info_nce, refine_and_scan, scan

TESTS = ["tests/ops/test_corpus_scan_triton.py", "tests/ops/test_corpus_scan_cuda_build.py"]
N, D = 1_000_000, 2048
COUNTS = (1, 8, 16, 32, 64, 128, 512)  # queries
TEMPERATURE = 0.07
TOKENS = 8  # soft tokens of a query
BLOCK = 50_000  # rows that are made or checked at a time


def measurements() -> Iterator[Measurement]:
    """The floor, then for each number of queries top-10, top-100 and InfoNCE with its gradient."""
    torch.manual_seed(0)
    rows = torch.empty(N, D, dtype=torch.bfloat16, device="cuda")
    for start in range(0, N, BLOCK):
        rows[start : start + BLOCK] = F.normalize(torch.randn(BLOCK, D, device="cuda"), dim=1)
    words = rows.view(torch.int64)
    floor = min(milliseconds(words.sum), milliseconds(rows.view(torch.float32).amax))
    yield Measurement("read the rows once", floor, floor)
    for count in COUNTS:
        query = F.normalize(torch.randn(count, D, device="cuda"), dim=1).bfloat16()
        check_top(query, rows, 100)
        for k in (10, 100):
            search = partial(scan, query, rows, k=k)
            yield Measurement(
                f"top-{k}, B = {count}", replayed(search), floor, backend=last_backend(), eager=milliseconds(search),
                workspace_mib=workspace(search), peers={"torch": milliseconds(partial(torch_top, query, rows, k))},
            )  # fmt: skip
        positive = torch.randint(N, (count,), device="cuda")
        leaf = query.clone().requires_grad_()
        ours, plain = partial(ours_info_nce, leaf, rows, positive), partial(torch_info_nce, leaf, rows, positive)
        check_info_nce(ours(), exact_info_nce(query, rows, positive), torch.finfo(torch.bfloat16).eps)
        yield Measurement(
            f"InfoNCE with gradient, B = {count}", replayed(ours), floor, backend=last_backend(), eager=milliseconds(ours),
            workspace_mib=workspace(ours), peers={"torch": milliseconds(plain)},
        )  # fmt: skip
        if count <= 16:  # as many as the kernel refines
            yield refining(query, rows, floor)


def refining(query: Tensor, rows: Tensor, floor: float) -> Measurement:
    """The soft-query update with top-10 and softmax, in one call and in two; both must give the same bits for one query."""
    state = SoftQuery(query, F.normalize(torch.randn(len(query), TOKENS, D, device="cuda"), dim=2).bfloat16(), 0.5)
    fused = partial(refine_and_scan, state, rows, k=10, temperature=TEMPERATURE)
    made, found = fused()
    backend = last_backend()
    again = scan(made, rows, k=10, temperature=TEMPERATURE)
    assert all(torch.equal(getattr(found, name), getattr(again, name)) for name in ("scores", "ids", "lse", "expected"))
    assert (made.float() - state.query().float()).abs().max() <= 2.0**-7 * made.float().abs().max()
    apart = partial(refine_apart, state, rows)
    return Measurement(
        f"refine_and_scan, {TOKENS} tokens, B = {len(query)}", replayed(fused), floor, backend=backend,
        eager=milliseconds(fused), peers={"query(), scan(): graph": replayed(apart), "eager": milliseconds(apart)},
    )  # fmt: skip


def refine_apart(state: SoftQuery, rows: Tensor) -> ScanResult:
    return scan(state.query(), rows, k=10, temperature=TEMPERATURE)


def torch_top(query: Tensor, rows: Tensor, k: int) -> Tensor:
    return (query @ rows.T).topk(k, dim=1).indices


def ours_info_nce(query: Tensor, rows: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    loss = info_nce(query, rows, positive, TEMPERATURE)
    return loss.detach(), torch.autograd.grad(loss.sum(), query)[0]


def torch_info_nce(query: Tensor, rows: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(query @ rows.T / TEMPERATURE, positive, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), query)[0]


def exact_info_nce(query: Tensor, rows: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (B,) and gradient (B, D) in float64, block by block; scores divided by a temperature this high need no peak."""
    query = query.double()
    mass = query.new_zeros(len(query))
    expected = torch.zeros_like(query)
    for start in range(0, N, BLOCK):
        block = rows[start : start + BLOCK].double()
        weights = (query @ block.T / TEMPERATURE).exp()
        mass += weights.sum(dim=1)
        expected += weights @ block
    own = rows[positive].double()
    loss = mass.log() - (query * own).sum(dim=1) / TEMPERATURE
    return loss, (expected / mass[:, None] - own) / TEMPERATURE


def check_info_nce(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], rounding: float) -> None:
    """The loss to float32's rounding; the gradient to that of the query's type, in which it is returned."""
    assert (found[0] - exact[0]).abs().max() < 1e-4
    assert (found[1] - exact[1]).norm() <= rounding * exact[1].norm()


def check_top(query: Tensor, rows: Tensor, k: int) -> None:
    """The scores are those of the rows named, in order, each row once, and no other row scores higher by more than rounding."""
    found = scan(query, rows, k=k)
    for b in range(len(query)):
        exact = rows[found.ids[b]].double() @ query[b].double()
        assert (found.scores[b] - exact).abs().max() < 1e-6
        assert found.ids[b].unique().numel() == k
    assert (found.scores.diff(dim=1) <= 0).all()
    above = torch.zeros(len(query), dtype=torch.int64, device="cuda")
    for start in range(0, N, BLOCK):
        scores = query.float() @ rows[start : start + BLOCK].float().T
        above += (scores > found.scores[:, -1:] + 1e-6).sum(dim=1)
    assert (above <= k - 1).all()


def workspace(call: partial[object]) -> float:
    """MiB that a call takes beside what was there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
