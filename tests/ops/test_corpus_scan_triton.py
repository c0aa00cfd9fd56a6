"""The Triton sweep: against the reference on a GPU or, without one, in Triton's interpreter; and what ptxas makes of it.

TRITON_INTERPRET is read when a kernel is decorated, so without a GPU this file runs itself again in a process that has it set.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vsr1.errors import BackendUnavailable
from vsr1.ops import last_backend
from vsr1.ops.corpus_scan import ScanResult, info_nce, scan

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("vsr1.kernels.corpus_scan", reason="vsr1 is not installed: pip install -e .")
expected = pytest.importorskip("vsr1.kernels.corpus_expected")

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

PAIRS = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float16)]
if DEVICE == "cuda":
    PAIRS += [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SHAPES = [(1, 1, 1, 1), (3, 300, 40, 5), (17, 130, 70, 200)]


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return F.normalize(torch.randn(shape, generator=generator), dim=-1).to(DEVICE, dtype)


def both(query: Tensor, rows: Tensor, **options: Any) -> tuple[ScanResult, ScanResult]:
    found = scan(query, rows, backend="triton", **options)
    assert last_backend() == "triton"
    return found, scan(query, rows, backend="reference", **options)


@compiles
@pytest.mark.skipif(DEVICE == "cuda", reason="the tests run on the GPU itself")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@runs
@pytest.mark.parametrize(("query_dtype", "dtype"), PAIRS, ids=[f"{NAMES[q]}-{NAMES[r]}" for q, r in PAIRS])
@pytest.mark.parametrize(("B", "N", "D", "k"), SHAPES, ids=[f"B{b}-N{n}-D{d}-k{k}" for b, n, d, k in SHAPES])
def test_matches_the_reference(B: int, N: int, D: int, k: int, query_dtype: torch.dtype, dtype: torch.dtype) -> None:
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
def test_it_says_what_it_cannot_do() -> None:
    with pytest.raises(BackendUnavailable, match="'candidates' are for the other backends"):
        scan(unit(1, 4), unit(3, 4), k=1, candidates=torch.tensor([[0]]), backend="triton")
    if INTERPRETED:
        with pytest.raises(BackendUnavailable, match="interpreter only, which computes bfloat16 wrongly"):
            scan(unit(1, 4), unit(3, 4, dtype=torch.bfloat16), k=1, backend="triton")


INT32_ARRAYS = {"greater", "nan_count", "runner_up", "unclean"}
INT64_ARRAYS = {"exclude", "positive", "ids", "group_ids", "best_ids"}
SIZES = {"N", "B", "D", "E", "groups", "chosen", "width", "k", "chunks", "chunk", "splits", "count", "first_row", "first_tile",
         "query_stride", "row_stride", "weight_stride"}  # fmt: skip
ALIGNED = {"D", "query_stride", "row_stride", "weight_stride"}
COMPILED = [
    (kernel, dtype, count, cap)
    for kernel in ("sweep", "bulk-sweep", "expected", "positive", "gather", "select")
    for dtype, count, cap in (
        ("bf16", 128, 90),
        ("bf16", 128, 80),
        ("bf16", 64, 90),
        ("bf16", 1, 90),
        ("fp32", 128, 90),
    )
    if kernel not in ("gather", "select") or (dtype, count, cap) == ("bf16", 128, 90)
    if kernel != "bulk-sweep" or (dtype, cap) == ("bf16", 90)
]


def compile_ahead(kernel: str, dtype: str, count: int, cap: int) -> dict[str, int]:
    """Registers' spills and shared memory of a kernel for sm_<cap>, by the ptxas that Triton itself would take."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    bulk = kernel == "bulk-sweep"
    kernel = kernel.removeprefix("bulk-")
    function = getattr(expected if kernel == "expected" else kernels, f"{kernel}_kernel")
    row_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    query, rows = torch.empty(count, 8, dtype=row_dtype), torch.empty(1, 8, dtype=row_dtype)
    options = kernels.blocks(query, rows, bulk)
    constants = {"BULK": bulk, "GROUP": kernels.group_size(count), "TILE": options["BLOCK_N"], **options}
    if kernel == "expected":
        constants |= expected.blocks(count, dtype == "fp32")
    constants |= {"gather": {"BLOCK_D": 256}, "select": {"BLOCK": kernels.SELECT_BLOCK}}.get(kernel, {})
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature: dict[str, str] = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif bulk and name in ("query", "rows"):
            tile = constants["BLOCK_B" if name == "query" else "BLOCK_N"], constants["BLOCK_D"]
            signature[name] = f"tensordesc<{dtype}[{tile[0]}, {tile[1]}]>"
        elif name in ("query", "rows", "weights"):
            signature[name] = f"*{dtype}"
        elif name in INT32_ARRAYS | INT64_ARRAYS:
            signature[name] = "*i32" if name in INT32_ARRAYS else "*i64"
        elif name == "temperature":
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if name in SIZES else "*fp32"
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name in ALIGNED
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in function.arg_names},
        attrs=aligned,
    )
    built = triton.compile(source, target=GPUTarget("cuda", cap, 32), options=launch)
    arch = f"sm_{cap}a" if cap >= 90 else f"sm_{cap}"
    done = subprocess.run(
        [get_ptxas(cap).path, "-v", f"--gpu-name={arch}", "-", "-o", os.devnull],
        input=built.asm["ptx"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)]
    assert spills
    return {"spills": sum(spills), "shared": built.metadata.shared}


@compiles
@pytest.mark.parametrize(
    ("kernel", "dtype", "count", "cap"), COMPILED, ids=[f"{k}-{d}-B{b}-sm_{c}" for k, d, b, c in COMPILED]
)
def test_compiles_for_gpus_without_spills(kernel: str, dtype: str, count: int, cap: int) -> None:
    used = compile_ahead(kernel, dtype, count, cap)
    assert used["spills"] == 0
    assert used["shared"] <= {80: 163, 90: 227}[cap] * 1024
