"""The Triton sweep: against the reference on a GPU or, without one, in Triton's interpreter; and what ptxas makes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels import DEVICE, INTERPRETED, SHARED_MEMORY, compile_ahead, compiles, runs
from vsr1.errors import BackendUnavailable
from vsr1.ops import last_backend
from vsr1.ops._cuda_code import missing
from vsr1.ops.corpus_scan import HiddenState, ScanResult, SoftQuery, info_nce, refine_and_scan, scan

tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("vsr1.kernels.corpus_scan", reason="vsr1 is not installed: pip install -e .")
expected = pytest.importorskip("vsr1.kernels.corpus_expected")

PAIRS = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float16)]
if DEVICE == "cuda":
    PAIRS += [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SHAPES = [(1, 1, 1, 1), (3, 300, 40, 5), (17, 70, 70, 100)]


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return F.normalize(torch.randn(shape, generator=generator), dim=-1).to(DEVICE, dtype)


def both(query: Tensor, rows: Tensor, **options: Any) -> tuple[ScanResult, ScanResult]:
    found = scan(query, rows, backend="triton", **options)
    assert last_backend() == "triton"
    return found, scan(query, rows, backend="reference", **options)


@runs
@pytest.mark.parametrize(("query_dtype", "dtype"), PAIRS, ids=[f"{NAMES[q]}-{NAMES[r]}" for q, r in PAIRS])
@pytest.mark.parametrize(("B", "N", "D", "k"), SHAPES, ids=[f"B{b}-N{n}-D{d}-k{k}" for b, n, d, k in SHAPES])
def test_matches_the_reference(B: int, N: int, D: int, k: int, query_dtype: torch.dtype, dtype: torch.dtype) -> None:
    if INTERPRETED and B > 16 and query_dtype != torch.float16:
        pytest.skip("the interpreter is slow; smaller shapes have the other types")
    query, rows = unit(B, D, dtype=query_dtype), unit(N, D, seed=1, dtype=dtype)
    exclude = torch.randint(-1, N, (B, 3), generator=torch.Generator().manual_seed(0)) if N > 1 else None
    found, wanted = both(query, rows, k=k, positive=torch.arange(B) % N, temperature=0.1, exclude=exclude)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.rank, wanted.rank)
    assert torch.equal(found.nan_count, wanted.nan_count)
    for name in ("scores", "positive_score", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=2e-6)
    # Between equal half types the softmax weights are rounded to that type, as torch's own half softmax is.
    half = query_dtype == dtype != torch.float32
    allowed = 2.0 * torch.finfo(dtype).eps if half else 1e-6
    assert (found.expected - wanted.expected).norm() <= allowed * wanted.expected.norm()


@runs
def test_ties_nan_and_infinities() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(-2, 3, (200, 9), generator=generator).float()
    rows[[3, 64, 199], 2] = math.nan
    rows[130] = torch.tensor([math.inf, -math.inf] + [0.0] * 7)
    query = torch.randint(-2, 3, (4, 9), generator=generator).float()
    query[2] = 0.0  # all ties
    query[3, 0] = math.nan
    positive = torch.tensor([3, 64, -1, 5])
    found, wanted = both(query.to(DEVICE), rows.to(DEVICE), k=40, positive=positive, temperature=2.0)
    for name in ("ids", "scores", "rank", "nan_count"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for name in ("positive_score", "lse", "expected"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), equal_nan=True)


@pytest.mark.skipif(
    DEVICE == "cpu", reason="numpy, which is the interpreter's tl.dot, sums in an order that depends on place"
)
def test_a_copy_of_the_positive_ties_with_it() -> None:
    rows = unit(150, 48, seed=1)
    rows[[7, 100, 149]] = rows[60].clone()
    found = scan(unit(4, 48), rows, k=1, positive=torch.full((4,), 60), backend="triton")
    exact = unit(4, 48).double() @ rows.double().T
    wanted = 1 + (exact > exact[:, 60:61] + 1e-9).sum(dim=1)
    assert torch.equal(found.rank, wanted)


@runs
def test_info_nce_gradient_and_empty_inputs() -> None:
    query, rows, positive = unit(3, 20).requires_grad_(), unit(140, 20, seed=1), torch.tensor([0, 139, 7])
    gradients = [
        torch.autograd.grad(info_nce(query, rows, positive, 0.1, backend=name).sum(), query)[0]
        for name in ("triton", "reference")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    found, wanted = both(query.detach(), rows[:0], k=2, temperature=1.0)
    assert torch.equal(found.ids, wanted.ids)
    assert both(query.detach()[:0], rows, k=2)[0].scores.shape == (0, 2)


@runs
def test_the_best_rows_may_share_a_group() -> None:
    rows = 0.1 * unit(330, 40, seed=1)
    query = unit(2, 40)
    rows[70:80] = query[:1] + 0.01 * unit(10, 40, seed=2)  # nine of ten lose their group and still are among the best
    rows[[33, 200, 201]] = query[1]  # equal scores within a group and across groups
    found, wanted = both(query, rows, k=8)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=2e-6)


@runs
@pytest.mark.parametrize(("width", "k"), [(1, 1), (5000, 3), (5000, 1100)], ids=str)
def test_select_takes_the_first_of_equals(width: int, k: int) -> None:
    values = torch.randint(-4, 5, (2, width), generator=torch.Generator().manual_seed(0)).float()
    values[0, ::3] = -math.inf
    values[1, : width // 2] *= 0.0  # 0.0 and -0.0 are equal
    best, ids = kernels.select(values.to(DEVICE), None, k)
    for line, found, columns in zip(values, best.cpu(), ids.cpu(), strict=True):
        order = line.sort(descending=True, stable=True)
        wanted = order.indices[order.values > -math.inf][:k].sort().values
        assert columns.tolist() == wanted.tolist() + [-1] * (k - len(wanted))
        assert found.tolist() == line[wanted].tolist() + [-math.inf] * (k - len(wanted))


needs_cuda = pytest.mark.skipif(DEVICE == "cpu" or missing() is not None, reason=str(missing()))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("B", "N", "D", "k"), [(1, 1, 1024, 1), (3, 300, 1536, 5), (16, 30_011, 2048, 100)], ids=str)
def test_cuda_matches_the_reference(B: int, N: int, D: int, k: int, dtype: torch.dtype) -> None:
    query, rows = unit(B, D, dtype=dtype), unit(N, D, seed=1, dtype=dtype)
    exclude = torch.randint(-1, N, (B, 3), generator=torch.Generator().manual_seed(0)) if N > 1 else None
    options = {"k": k, "positive": torch.arange(B) % N, "temperature": 0.1, "exclude": exclude}
    found, again = (scan(query, rows, backend="cuda", **options) for _ in range(2))
    assert last_backend() == "cuda"
    wanted = scan(query, rows, backend="reference", **options)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.nan_count, wanted.nan_count)
    exact = query.double() @ rows.double().T
    if exclude is not None:
        rows_out = exclude.to(DEVICE)
        exact.scatter_(
            1, rows_out.clamp(min=0), exact.gather(1, rows_out.clamp(min=0)).masked_fill(rows_out >= 0, -math.inf)
        )
    own = (query.double() * rows[torch.arange(B, device=DEVICE) % N].double()).sum(dim=1, keepdim=True)
    # Rows closer to the positive than float32's rounding may count as above it or not.
    assert (found.rank >= 1 + (exact > own + 1e-6).sum(dim=1)).all()
    assert (found.rank <= 1 + (exact > own - 1e-6).sum(dim=1)).all()
    for name in ("scores", "positive_score", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=2e-6)
    assert (found.expected - wanted.expected).norm() <= 2.0 * torch.finfo(dtype).eps * wanted.expected.norm()
    for name in ("scores", "ids", "nan_count", "positive_score", "rank", "lse", "expected"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name


@needs_cuda
def test_cuda_ties_nan_and_infinities() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.zeros(9000, 1024)
    rows[:, :9] = torch.randint(-2, 3, (9000, 9), generator=generator).float()
    rows[[3, 64, 8999], 2] = math.nan
    rows[130, :2] = torch.tensor([math.inf, -math.inf])
    rows[7000, 0] = -math.inf
    query = torch.zeros(4, 1024)
    query[:, :9] = torch.randint(1, 3, (4, 9), generator=generator).float()
    query[2, 1:] = 0.0
    query[3, 0] = math.nan
    positive = torch.tensor([3, 64, -1, 5])
    both_halves = query.to(DEVICE, torch.bfloat16), rows.to(DEVICE, torch.bfloat16)
    options = {"k": 40, "positive": positive, "temperature": 2.0}
    found, wanted = (scan(*both_halves, backend=name, **options) for name in ("cuda", "reference"))
    for name in ("ids", "scores", "rank", "nan_count"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for name in ("positive_score", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), equal_nan=True)
    torch.testing.assert_close(found.expected, wanted.expected, rtol=2e-2, atol=2e-2, equal_nan=True)


@needs_cuda
def test_cuda_ties_a_copy_of_the_positive() -> None:
    rows = unit(15_000, 1024, seed=1, dtype=torch.bfloat16)
    rows[[7, 100, 14_999]] = rows[60].clone()
    query = unit(4, 1024, dtype=torch.bfloat16)
    found = scan(query, rows, k=1, positive=torch.full((4,), 60), backend="cuda")
    exact = query.double() @ rows.double().T
    assert torch.equal(found.rank, 1 + (exact > exact[:, 60:61] + 1e-9).sum(dim=1))


def states(B: int, D: int) -> dict[str, SoftQuery | HiddenState]:
    half: dict[str, Any] = {"dtype": torch.bfloat16}
    soft, weight = unit(B, 4, D, seed=2, **half), unit(D + 256, seed=3, **half)
    return {
        "number": SoftQuery(unit(B, D, **half), soft, 0.5),
        "gates": SoftQuery(unit(B, D, **half), soft, torch.linspace(-1.0, 1.0, B, device=DEVICE)[:, None]),
        "no-soft": SoftQuery(unit(B, D, **half), soft[:, :0]),
        "hidden": HiddenState(unit(B, D + 256, **half), weight, dim=D),
        "head": HiddenState(unit(B, D + 256, **half), weight, unit(D + 16, D + 256, seed=4, **half), dim=D),
    }


@needs_cuda
@pytest.mark.parametrize("state", ["number", "gates", "no-soft", "hidden", "head"])
@pytest.mark.parametrize(("B", "D"), [(1, 1024), (16, 2048)], ids=str)
def test_cuda_refines_and_scans(B: int, D: int, state: str) -> None:
    made, rows = states(B, D)[state], unit(9000, D, seed=1, dtype=torch.bfloat16)
    options = {"k": 20, "positive": torch.arange(B), "temperature": 0.1, "backend": "cuda"}
    query, found = refine_and_scan(made, rows, **options)
    wanted = made.query()
    assert (query.float() - wanted.float()).abs().max() <= 2.0**-7 * wanted.float().abs().max()
    assert (query != wanted).float().mean() < 0.01
    again = scan(query, rows, **options)
    for name in ("scores", "ids", "nan_count", "positive_score", "rank", "lse", "expected"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    top = refine_and_scan(made, rows, k=20, backend="cuda")[1]
    assert torch.equal(top.ids, found.ids)


@needs_cuda
def test_a_call_can_be_captured_in_a_graph() -> None:
    rows, query = unit(5000, 1024, seed=1, dtype=torch.bfloat16), unit(3, 1024, dtype=torch.bfloat16)
    options = {"k": 7, "positive": torch.arange(3, device=DEVICE), "temperature": 0.1}
    for backend in ("cuda", "triton"):
        scan(query, rows, backend=backend, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = scan(query, rows, backend=backend, **options)
        query.copy_(unit(3, 1024, seed=9, dtype=torch.bfloat16))
        graph.replay()
        wanted = scan(query, rows, backend="reference", **options)
        assert torch.equal(found.ids, wanted.ids)
        assert torch.equal(found.rank, wanted.rank)


@runs
def test_it_says_what_it_cannot_do() -> None:
    with pytest.raises(BackendUnavailable, match="'candidates' are for the other backends"):
        scan(unit(1, 4), unit(3, 4), k=1, candidates=torch.tensor([[0]]), backend="triton")
    if INTERPRETED:
        with pytest.raises(BackendUnavailable, match="interpreter only, which computes bfloat16 wrongly"):
            scan(unit(1, 4), unit(3, 4, dtype=torch.bfloat16), k=1, backend="triton")


INT32_ARRAYS = {"greater", "nan_count", "runner_up", "unclean"}
INT64_ARRAYS = {"exclude", "positive", "ids", "group_ids", "best_ids"}
SIZES = {"N", "B", "D", "E", "groups", "chosen", "width", "stride", "k", "chunks", "chunk", "splits", "count", "first_row",
         "first_tile", "query_stride", "row_stride", "weight_stride"}  # fmt: skip
OPTIONAL = ("exclude", "positive", "bar", "greater", "peak", "mass", "weights", "chunk_peak", "unclean")
TILES = {("sweep", "query"): "BD", ("sweep", "rows"): "ND", ("expected", "weights"): "BN", ("expected", "rows"): "ND"}
ALIGNED = {"D", "query_stride", "row_stride", "weight_stride"}
COMPILED = [
    (kernel, dtype, count, cap)
    for kernel in ("sweep", "bulk-sweep", "lean-sweep", "expected", "bulk-expected", "positive", "gather", "select")
    for dtype, count, cap in (
        ("bf16", 128, 90),
        ("bf16", 128, 80),
        ("bf16", 64, 90),
        ("bf16", 1, 90),
        ("fp32", 128, 90),
    )
    if kernel not in ("positive", "gather", "select") or (dtype, count, cap) == ("bf16", 128, 90)
    if ("-" in kernel and (dtype, cap) == ("bf16", 90)) or ("-" not in kernel and count != 64)
]


def compiled(kernel: str, dtype: str, count: int, cap: int) -> tuple[dict[str, int], bool]:
    """What `compile_ahead` says of a kernel for `count` queries, and whether its registers are capped."""
    variant, _, kernel = kernel.rpartition("-")
    bulk, lean = variant in ("bulk", "lean"), variant == "lean"
    function = getattr(expected if kernel == "expected" else kernels, f"{kernel}_kernel")
    row_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    query, rows = torch.empty(count, 8, dtype=row_dtype), torch.empty(1, 8, dtype=row_dtype)
    sweeping = kernels.blocks(query, rows, bulk, lean)
    options = {
        "expected": expected.blocks(count, dtype == "fp32", bulk),
        "gather": {"BLOCK_D": 1024, "num_warps": 4, "num_stages": 3},
        "select": {
            "KEY": tl.int32,
            "BLOCK": kernels.select_block(2048),
            "wanted": None,
            "num_warps": 4,
            "num_stages": 3,
        },
    }.get(kernel, sweeping)
    constants: dict[str, Any] = {
        "BULK": bulk,
        "GROUP": kernels.group_size(count),
        "TILE": sweeping["BLOCK_N"],
        **options,
    }
    if lean:
        constants |= dict.fromkeys(OPTIONAL)
    types = {name: "i32" if name in SIZES else "*fp32" for name in function.arg_names}
    types |= dict.fromkeys(("query", "rows", "weights"), f"*{dtype}")
    types |= dict.fromkeys(INT32_ARRAYS, "*i32") | dict.fromkeys(INT64_ARRAYS, "*i64") | {"temperature": "fp32"}
    for (owner, name), axes in TILES.items():
        if bulk and owner == kernel:
            types[name] = f"tensordesc<{dtype}[{constants[f'BLOCK_{axes[0]}']}, {constants[f'BLOCK_{axes[1]}']}]>"
    return compile_ahead(function, constants, types, ALIGNED, cap), "maxnreg" in constants


@compiles
@pytest.mark.parametrize(
    ("kernel", "dtype", "count", "cap"), COMPILED, ids=[f"{k}-{d}-B{b}-sm_{c}" for k, d, b, c in COMPILED]
)
def test_compiles_for_gpus_without_spills(kernel: str, dtype: str, count: int, cap: int) -> None:
    used, capped = compiled(kernel, dtype, count, cap)
    # A cap on registers that lets a second program in may spill behind the product, once a tile.
    assert used["spills"] <= (1024 if capped else 0)
    assert used["shared"] <= SHARED_MEMORY[cap]
