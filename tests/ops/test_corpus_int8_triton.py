"""The exact int8 top-k in Triton: against float64 on a GPU or, without one, in the interpreter; and what ptxas makes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels import DEVICE, INTERPRETED, SHARED_MEMORY, compile_ahead, compiles, runs
from vsr1.ops import last_backend
from vsr1.ops.corpus_scan import CorpusMatrix, scan

tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("vsr1.kernels.corpus_int8", reason="vsr1 is not installed: pip install -e .")
exact = pytest.importorskip("vsr1.kernels.corpus_exact")
scan_kernels = pytest.importorskip("vsr1.kernels.corpus_scan")

HALF = torch.float16 if INTERPRETED else torch.bfloat16


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one program after another; few of them, each with a longer share."""
    if INTERPRETED:
        monkeypatch.setattr(exact, "PROGRAMS", 8)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return F.normalize(torch.randn(shape, generator=generator), dim=-1).to(DEVICE, dtype)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = CorpusMatrix(rows).quantize().quantized
    assert parts is not None
    return parts.codes, parts.scales, parts.residuals


def exact_scores(query: Tensor, rows: Tensor, exclude: Tensor | None) -> Tensor:
    """(B, N) float64, summed row by row so that copies tie; -inf for excluded rows."""
    scores = torch.stack([(rows.double() * line.double()).sum(dim=1) for line in query])
    for b in range(0 if exclude is None else len(query)):
        scores[b, exclude[b][exclude[b] >= 0]] = -math.inf
    return scores


def checked(query: Tensor, rows: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """rescored and fallbacks of a call whose scores, ids and nan_count are those of float64."""
    found = scan(query, CorpusMatrix(rows).quantize(), k=k, exclude=exclude, backend="triton")
    assert last_backend() == "triton"
    scores, ids, nan_count, rescored, fallbacks = (
        found.scores,
        found.ids,
        found.nan_count,
        found.rescored,
        found.fallbacks,
    )
    assert rescored is not None
    assert fallbacks is not None
    true = exact_scores(query, rows, exclude)
    assert nan_count.tolist() == true.isnan().sum(dim=1).tolist()
    order = true.masked_fill(true.isnan(), -math.inf).sort(dim=1, descending=True, stable=True)
    order = order.values[:, :k], order.indices[:, :k].masked_fill(order.values[:, :k] == -math.inf, -1)
    missing = k - order[0].shape[1]
    assert torch.equal(ids, F.pad(order[1], (0, missing), value=-1))
    torch.testing.assert_close(scores, F.pad(order[0], (0, missing), value=-math.inf).float(), rtol=2e-7, atol=0.0)
    scored = torch.full_like(rescored, len(rows))
    if exclude is not None:
        scored -= torch.tensor([len({*line.tolist()} - {-1}) for line in exclude], device=DEVICE)
    assert (rescored <= scored).all()
    assert (rescored == scored)[fallbacks == 1].all()
    return rescored, fallbacks


@runs
@pytest.mark.parametrize(
    ("B", "N", "D", "k", "dtypes"),
    [
        (1, 1, 1, 1, (torch.float32, torch.float32)),
        (3, 300, 40, 5, (HALF, HALF)),
        (17, 40, 71, 100, (torch.float32, HALF)),
    ],
    ids=str,
)
def test_matches_float64(B: int, N: int, D: int, k: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    query, rows = unit(B, D, dtype=dtypes[0]), unit(N, D, seed=1, dtype=dtypes[1])
    exclude = torch.randint(-1, N, (B, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE) if N > 1 else None
    checked(query, rows, k, exclude)


@runs
def test_few_rows_are_scored_exactly() -> None:
    query, rows = unit(1, 512, dtype=HALF), unit(3000, 512, seed=1, dtype=HALF)
    rescored, fallbacks = checked(query, rows, 3)
    assert 3 <= rescored.item() < 100
    assert fallbacks.item() == 0


def near_copies() -> tuple[Tensor, Tensor]:
    """query (3, 40) and rows (210, 40): 80 of them copies of one, two thirds of these moved by one step in one component."""
    rows = unit(210, 40, seed=1, dtype=HALF)
    query = rows[:1].float() + 0.01 * unit(3, 40)
    rows[100:180] = rows[:1]
    for row in range(100, 180):
        if row % 3:
            rows[row].view(torch.int16)[row % 40] += 1 if row % 2 else -1
    return query, rows


@runs
def test_near_copies_are_told_apart_and_copies_tie() -> None:
    query, rows = near_copies()
    exclude = torch.tensor([[0, 102, 102], [105, -1, 0], [-1, -1, -1]], device=DEVICE)
    _, fallbacks = checked(query, rows, 9, exclude)
    assert not fallbacks.any()


@runs
def test_a_list_that_overflows_is_replaced_by_a_sweep_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    query, rows = near_copies()
    query[1] = -query[1]  # far from the copies: its list holds
    monkeypatch.setattr(exact, "SPARE", 0)
    _, fallbacks = checked(query, rows, 2, torch.tensor([[0, 102], [100, -1], [-1, -1]], device=DEVICE))
    assert fallbacks[0] == fallbacks[2] == 1
    monkeypatch.setattr(exact, "LISTED", 1)  # each query by itself
    again = checked(query[::2], rows, 2)[1]
    assert again.tolist() == [1, 1]


def hostile() -> tuple[Tensor, Tensor]:
    """query (4, 40) and rows (210, 40) with zeros, NaN and infinities in both."""
    rows, query = unit(210, 40, seed=1, dtype=HALF), unit(4, 40)
    rows[5:60] = 0.0
    rows[7] = math.nan
    rows[200, 3] = math.inf
    rows[201] = -math.inf
    rows[202, 1], rows[202, 2] = math.inf, -math.inf
    query[1] = 0.0
    query[2, 5] = math.nan
    query[3, 3] = math.inf
    return query, rows


@runs
@pytest.mark.parametrize(("k", "spare"), [(0, 1024), (12, 1024), (1, 0)], ids=["k0", "k12", "overflow"])
def test_zeros_nan_and_infinities(k: int, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "SPARE", spare)
    query, rows = hostile()
    exclude = torch.tensor([[7, 200, 7], [0, 1, 2], [7, -1, 8], [209, 208, 207]], device=DEVICE)
    _, fallbacks = checked(query, rows, k, exclude)
    assert fallbacks[1:].tolist() == [0 if spare else 1] * 3


@runs
@pytest.mark.parametrize(("query_size", "row_size"), [(1e-30, 1.0), (1e37, 1e10), (1e30, 1e-40)], ids=str)
def test_sizes_at_the_ends_of_float32(query_size: float, row_size: float) -> None:
    query, rows = unit(2, 40) * query_size, unit(200, 40, seed=1) * row_size
    rows[::2] *= torch.logspace(-20, 0, 100, device=DEVICE)[:, None]
    checked(query, rows, 7)


@runs
@pytest.mark.parametrize("B", [2, 130], ids=lambda count: f"B{count}")
def test_the_bounds_hold_where_they_are_tight(B: int) -> None:
    """Rows whose rest points along the query, and whose codes are highest where the query was rounded down, as it always is."""
    N, D = 150, 20
    direction = torch.full((D,), 1.499, device=DEVICE)
    direction[-1] = 8191
    query = (direction / 8191)[None] * torch.logspace(-3, 3, B, device=DEVICE)[:, None]
    codes = torch.full((N, D), 127, dtype=torch.int8, device=DEVICE)
    codes[:, -1] = 0
    scales = torch.logspace(-4, 4, N, device=DEVICE)
    residuals = 0.3 * scales
    left, step = kernels.sweep(query, codes, scales, residuals, None)
    bounds = left[:, 1].view(torch.int32)
    upper = torch.maximum((bounds & -65536).view(torch.float32), (bounds << 16).view(torch.float32)).double()
    double = query.double()
    scores = double @ codes.double().T * scales.double() + double.norm(dim=1)[:, None] * residuals.double()
    group = kernels.group_size(B, N)
    scores = F.pad(scores / step.double()[:, None], (0, -N % group), value=-math.inf).view(B, -1, group).amax(dim=2)
    assert (upper >= scores).all()
    assert (upper <= 1.01 * scores).all()  # rounded up to bfloat16


def test_groups_are_as_small_as_memory_allows() -> None:
    assert [kernels.group_size(queries, 1_000_000) for queries in (1, 128, 200, 512, 4096)] == [32, 32, 64, 128, 128]
    assert kernels.group_size(512, 60_011) == 32


@runs
def test_sums_over_long_rows_stay_integers() -> None:
    query, rows = torch.ones(1, 8200, device=DEVICE), torch.ones(40, 8200, device=DEVICE)
    for row in range(40):
        rows[row, : 200 * row] = 0.0  # the first row has the highest sum there can be
    rescored, _ = checked(query, rows, 1)
    assert rescored.item() == 1


@runs
def test_strided_and_empty_inputs() -> None:
    query, rows = unit(3, 20), unit(140, 40, seed=1)
    rows = rows[::2, :20]  # with a distance between them
    checked(query, rows, 4)
    arrays = quantized(rows)
    nothing = kernels.top_k(query, rows[:0], *(array[:0] for array in arrays), 2, None)
    assert nothing[1].tolist() == [[-1, -1]] * 3
    assert [counts.tolist() for counts in nothing[2:]] == [[0] * 3] * 3
    assert kernels.top_k(query[:0], rows, *arrays, 2, None)[0].shape == (0, 2)


@runs
@pytest.mark.parametrize(("width", "k"), [(300, 3), (5000, 1100)], ids=str)
def test_select_of_float64(width: int, k: int) -> None:
    values = torch.randn((3, 2 * width), generator=torch.Generator().manual_seed(0)).double()[:, :width]
    values[0] = 1.0 + torch.arange(width) % 5 * 1e-15  # equal as float32
    values[1, ::3] = -math.inf
    found = scan_kernels.select(values.to(DEVICE), None, k, torch.tensor([1, 1, 0], device=DEVICE))[1][:2].cpu()
    for line, columns in zip(values[:2], found, strict=True):
        order = line.sort(descending=True, stable=True)
        assert columns.tolist() == order.indices[order.values > -math.inf][:k].sort().values.tolist()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(
    ("B", "D"), [(1, 2048), (32, 2048), (64, 2048), (128, 2048), (300, 2048), (128, 1000)], ids=str
)
def test_large_corpora_on_a_gpu(B: int, D: int) -> None:
    query, rows = unit(B, D, dtype=HALF), unit(60_011, D, seed=1, dtype=HALF)
    rows[9000:9100] = rows[11]
    query[0] = rows[11]
    for k in (10, 100):
        rescored, fallbacks = checked(query, rows, k)
        assert not fallbacks.any() and rescored.double().mean() < 2000


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_call_can_be_captured_in_a_graph_and_repeats_itself() -> None:
    rows, query = unit(20_000, 1024, seed=1, dtype=HALF), unit(3, 1024, dtype=HALF)
    arguments = query, rows, *quantized(rows), 7, None
    kernels.top_k(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.top_k(*arguments)
    query.copy_(unit(3, 1024, seed=9, dtype=HALF))
    graph.replay()
    for captured, called in zip(found, kernels.top_k(*arguments), strict=True):
        assert torch.equal(captured, called)


FLOAT64 = {"scores", "winner_scores", "maxima"}
INT64 = {"exclude", "listed", "counts", "fallbacks", "nan_count", "rescored", "best_ids", "group_ids", "ids", "wanted"}
FLOAT32 = {"unit", "reach", "spread", "scales", "residuals", "best"}
LAUNCH = {"num_warps": 4, "num_stages": 3}
SHAPE = {"GROUP": 32, "ROWS": exact.ROWS, "BLOCK_D": exact.BLOCK_D, **LAUNCH}
SMALL: dict[str, tuple[Any, dict[str, Any]]] = {
    "quantise": (kernels.quantise_kernel, {"BLOCK_D": 1024, **LAUNCH}),
    "score": (exact.score_kernel, SHAPE),
    "list": (exact.list_kernel, {"GROUP": 32, "BLOCK": 2048, **LAUNCH, "num_warps": 8}),
    "exhaust": (exact.exhaust_kernel, SHAPE),
    "rank": (exact.rank_kernel, {"BLOCK": 64, **LAUNCH}),
    "select": (scan_kernels.select_kernel, {"KEY": tl.int64, "BLOCK": scan_kernels.select_block(2048), **LAUNCH}),
}


def compiled(function: Any, constants: dict[str, Any], cap: int, **types: str) -> dict[str, int]:
    known = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(INT64, "*i64") | dict.fromkeys(FLOAT64, "*fp64")
    known |= dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(("query", "rows"), "*bf16")
    known |= {"bounds": "*i32", "planes": "*i8", "codes": "*i8", "limit": "fp32"} | types
    aligned = {"D", "query_stride", "row_stride", "plane_stride", "code_stride"}
    return compile_ahead(function, constants, known, aligned, cap)


@compiles
@pytest.mark.parametrize(
    ("count", "group", "cap", "bulk"),
    [
        (1, 32, 90, True),
        (32, 32, 90, True),
        (64, 32, 90, True),
        (512, 32, 90, True),
        (512, 128, 90, True),
        (1, 32, 80, False),
        (512, 32, 80, False),
        (512, 128, 80, False),
    ],
    ids=lambda value: str(value),
)
def test_the_sweep_compiles_for_gpus_without_spills(count: int, group: int, cap: int, bulk: bool) -> None:
    options = kernels.blocks(count, bulk)
    types = {}
    if bulk:
        types = {
            "planes": f"tensordesc<i8[{2 * options['BLOCK_B']}, {options['BLOCK_D']}]>",
            "codes": f"tensordesc<i8[{options['BLOCK_N']}, {options['BLOCK_D']}]>",
        }
    constants = {"BULK": bulk, "GROUP": group, **options}
    used = compiled(kernels.int8_sweep_kernel, constants, cap, **types)
    assert used["spills"] == 0
    assert used["shared"] <= SHARED_MEMORY[cap]


@compiles
@pytest.mark.parametrize("name", SMALL)
def test_the_kernels_behind_it_compile_without_spills(name: str) -> None:
    function, constants = SMALL[name]
    types = {"values": "*fp64", "best": "*fp64"} if name == "select" else {}
    assert compiled(function, constants, 90, **types)["spills"] == 0
