"""Exact top-k from int8 codes: the same rows, in the same order, as scoring every row in float64, whatever the rows are like."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vsr1.errors import BackendUnavailable
from vsr1.ops import last_backend
from vsr1.ops._dispatch import extension_missing
from vsr1.ops.corpus_scan import CorpusMatrix, ScanResult, scan


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return F.normalize(torch.randn(shape, generator=generator), dim=-1).to(dtype)


def oracle(
    query: Tensor, rows: Tensor, k: int, exclude: list[list[int]] | None = None
) -> tuple[list[list[int]], list[int]]:
    """ids of the best k by correctly rounded float64 sums, and the number of NaN scores, one query at a time."""
    ids, nan_counts = [], []
    for b, one in enumerate(query.double()):
        left_out = set() if exclude is None else set(exclude[b])
        scores = [math.fsum(products) if all(map(math.isfinite, products)) else sum(products)
                  for products in (one * rows.double()).tolist()]  # fmt: skip
        kept = [i for i in range(len(scores)) if i not in left_out]
        order = [i for i in kept if not math.isnan(scores[i]) and scores[i] > -math.inf]
        order = sorted(order, key=lambda i: (-scores[i], i))[:k]
        ids.append(order + [-1] * (k - len(order)))
        nan_counts.append(sum(math.isnan(scores[i]) for i in kept))
    return ids, nan_counts


def nudged(rows: Tensor, steps: Tensor) -> Tensor:
    """bfloat16 rows moved by so many units in the last place, away from zero where positive."""
    return (rows.view(torch.int16) + steps.to(torch.int16)).view(torch.bfloat16)


@st.composite
def crowded(draw: st.DrawFn) -> dict[str, Any]:
    """Corpora of a few vectors and many copies of them, most of them one bfloat16 step away in one component."""
    N, D, B = draw(st.integers(1, 400)), draw(st.sampled_from([1, 7, 33, 64, 130])), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    seeds = torch.randn(draw(st.integers(1, 4)), D, generator=generator).bfloat16()
    rows = seeds[torch.randint(len(seeds), (N,), generator=generator)]
    steps = torch.zeros(N, D, dtype=torch.int64)
    at = torch.randint(D, (N, 1), generator=generator)
    steps.scatter_(1, at, torch.randint(-1, 2, (N, 1), generator=generator))
    rows = nudged(rows, steps)
    rows[torch.rand(N, generator=generator) < draw(st.sampled_from([0.0, 0.1]))] = 0.0
    scale = draw(st.sampled_from([1.0, 1e-30, 1e30]))
    query = torch.randn(B, D, generator=generator)
    query[::2] += 3 * seeds[0].float()
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    exclude = torch.randint(-1, N, (B, 3), generator=generator) if draw(st.booleans()) else None
    return {
        "query": query.to(dtype),
        "rows": (rows * scale).to(torch.bfloat16),
        "k": draw(st.sampled_from([0, 1, 5, 50, 500])),
        "exclude": exclude,
    }


@settings(max_examples=40, deadline=None)
@given(crowded())
def test_ids_are_those_of_a_float64_scan(crowd: dict[str, Any]) -> None:
    matrix = CorpusMatrix(crowd["rows"]).quantize()
    exclude = crowd["exclude"]
    wanted, _ = oracle(crowd["query"], crowd["rows"], crowd["k"], None if exclude is None else exclude.tolist())
    for name in ("reference",) if extension_missing() else ("reference", "cpu"):
        found = scan(crowd["query"], matrix, k=crowd["k"], exclude=exclude, backend=name)
        assert found.ids.tolist() == wanted, name
        exact = crowd["query"].double() @ crowd["rows"].double().T
        scores = exact.gather(1, found.ids.clamp(min=0)).masked_fill(found.ids < 0, -math.inf)
        torch.testing.assert_close(found.scores.double(), scores, rtol=1e-6, atol=1e-300)


def sane(found: ScanResult, query: Tensor, rows: Tensor, k: int, exclude: list[list[int]] | None = None) -> None:
    wanted, nan_counts = oracle(query, rows, k, exclude)
    assert found.ids.tolist() == wanted
    assert found.nan_count.tolist() == nan_counts
    assert (found.scores.diff(dim=1) <= 0).all() or k < 2 or (found.ids < 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("B", "N", "D", "k"), [(1, 1, 1, 1), (3, 700, 1100, 7), (9, 2000, 37, 300), (2, 90, 2048, 90)], ids=str
)
def test_every_path_finds_them(backend: str, B: int, N: int, D: int, k: int, dtype: torch.dtype) -> None:
    query, rows = unit(B, D), unit(N, D, seed=1, dtype=dtype)
    exclude = torch.randint(-1, N, (B, 4), generator=torch.Generator().manual_seed(0))
    found = scan(query, CorpusMatrix(rows).quantize(), k=k, exclude=exclude, backend=backend)
    assert last_backend() == backend
    sane(found, query, rows, k, exclude.tolist())
    assert found.rescored is not None
    assert found.fallbacks is not None
    assert (found.rescored >= found.ids.ge(0).sum(dim=1)).all()
    assert (found.fallbacks == 0).all()


def test_few_rows_are_rescored_and_all_where_copies_abound(backend: str) -> None:
    if backend == "reference":
        pytest.skip("it scores every row")
    rows, query = unit(20_000, 64, seed=1, dtype=torch.bfloat16), unit(3, 64)
    found = scan(query, CorpusMatrix(rows).quantize(), k=5, backend=backend)
    assert found.rescored is not None
    assert found.fallbacks is not None
    assert found.rescored.max() < 200
    rows[:15_000] = rows[0].clone()
    query[1] = rows[0].float()
    crowded = scan(query, CorpusMatrix(rows).quantize(), k=5, backend=backend)
    assert crowded.fallbacks.tolist() == [0, 1, 0]
    assert crowded.rescored[1].item() == 20_000
    assert crowded.ids[1].tolist() == [0, 1, 2, 3, 4]
    assert crowded.ids[[0, 2]].tolist() == oracle(query[[0, 2]], rows, 5)[0]


def test_rows_and_queries_that_are_not_finite(backend: str) -> None:
    rows, query = unit(300, 40, seed=1), unit(4, 40)
    rows[7, 3] = math.nan
    rows[8] = math.inf * query[0].sign()
    rows[9] = -math.inf * query[0].sign()
    rows[10] = 0.0
    query[3, 5] = math.nan
    exclude = torch.tensor([[-1], [7], [8], [-1]])
    matrix = CorpusMatrix(rows).quantize()
    assert matrix.quantized is not None
    assert matrix.quantized.scales.isnan().nonzero().flatten().tolist() == [7, 8, 9]
    found = scan(query, matrix, k=300, exclude=exclude, backend=backend)
    sane(found, query, rows, 300, exclude.tolist())
    assert found.scores[0, 0].item() == math.inf
    assert (found.ids[3] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_rest_is_no_longer_than_the_residual(dtype: torch.dtype) -> None:
    rows = torch.cat([unit(50, 300), 1e-6 * unit(50, 300, seed=1), torch.zeros(1, 300), torch.eye(300)[:5]]).to(dtype)
    if dtype != torch.float16:
        rows = torch.cat([rows, (1e-30 * unit(20, 300)).to(dtype), (1e35 * unit(20, 300)).to(dtype)])
        rows = torch.cat([rows, torch.full((1, 300), 1e-40).to(dtype)])
    quantized = CorpusMatrix(rows).quantize().quantized
    assert quantized is not None
    rest = rows.double() - quantized.codes.double() * quantized.scales.double()[:, None]
    assert (rest.norm(dim=1) <= quantized.residuals.double()).all()
    assert (rows.double().abs().amax(dim=1) <= 127.0001 * quantized.scales.double()).all()
    # and not much longer, so that it tells rows apart
    usual = slice(0, 50)
    assert (quantized.residuals[usual].double() <= 1.001 * rest[usual].norm(dim=1)).all()


def test_products_of_long_rows_do_not_overflow(backend: str) -> None:
    rows = torch.ones(5, 40_000)
    rows[3] = -1.0
    found = scan(torch.ones(1, 40_000), CorpusMatrix(rows).quantize(), k=5, backend=backend)
    assert found.ids.tolist() == [[0, 1, 2, 4, 3]]
    assert found.scores.tolist() == [[40_000.0] * 4 + [-40_000.0]]
    with pytest.raises(ValueError, match="rows of 65537 components cannot be quantized; expected at most 65536"):
        CorpusMatrix(torch.ones(1, 65_537)).quantize()


def test_threads_do_not_matter(backend: str) -> None:
    query, matrix = unit(12, 96), CorpusMatrix(unit(9001, 96, seed=1, dtype=torch.bfloat16)).quantize()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(scan(query, matrix, k=20, backend=backend))
    finally:
        torch.set_num_threads(before)
    for name in ("scores", "ids", "rescored", "fallbacks"):
        assert all(torch.equal(getattr(one, name), getattr(results[0], name)) for one in results), name


def test_what_the_codes_cannot_answer_comes_from_the_rows(backend: str) -> None:
    query, rows = unit(3, 24), unit(80, 24, seed=1)
    matrix = CorpusMatrix(rows).quantize()
    for options in ({"positive": torch.arange(3)}, {"temperature": 0.1}, {"candidates": torch.tensor([[3, 5]] * 3)}):
        found, wanted = (scan(query, corpus, k=4, backend=backend, **options) for corpus in (matrix, rows))
        assert found.rescored is None
        assert torch.equal(found.ids, wanted.ids)
        assert found.lse is None or torch.equal(found.lse, wanted.lse)


def test_empty_and_shifted_inputs(backend: str) -> None:
    rows, query = unit(60, 24, seed=1, dtype=torch.bfloat16), unit(3, 12)
    part = CorpusMatrix(rows[::2, 4:16]).quantize()  # rows apart from each other
    sane(scan(query, part, k=9, backend=backend), query, rows[::2, 4:16], 9)
    none = scan(query[:0], part, k=9, backend=backend)
    assert none.scores.shape == (0, 9)
    empty = scan(query, CorpusMatrix(rows[:0, :12]).quantize(), k=2, backend=backend)
    assert empty.ids.tolist() == [[-1, -1]] * 3
    assert empty.scores.tolist() == [[-math.inf] * 2] * 3


def test_scores_are_differentiable_and_the_op_keeps_the_rules() -> None:
    from vsr1.ops._corpus_int8 import corpus_scan_int8

    rows, query = unit(40, 12, seed=1), unit(3, 12).requires_grad_()
    matrix = CorpusMatrix(rows).quantize()
    found = scan(query, matrix, k=4)
    (gradient,) = torch.autograd.grad(found.scores.sum(), query)
    torch.testing.assert_close(gradient, rows[found.ids].sum(dim=1))
    quantized = matrix.quantized
    assert quantized is not None
    for path in ("reference", "cpu") if not extension_missing() else ("reference",):
        arguments = (
            query,
            rows,
            quantized.codes,
            quantized.scales,
            quantized.residuals,
            4,
            torch.tensor([[1, -1]] * 3),
            path,
        )
        torch.library.opcheck(corpus_scan_int8, arguments)


def test_what_cannot_be_served_is_said() -> None:
    matrix = CorpusMatrix(unit(5, 8).half()).quantize()
    assert scan(unit(1, 8), matrix, k=1).rescored is not None
    assert last_backend() == "reference"
    with pytest.raises(
        BackendUnavailable, match=r"corpus_scan_int8: backend 'cpu' takes float32 and bfloat16 rows|extension"
    ):
        scan(unit(1, 8), matrix, k=1, backend="cpu")
    with pytest.raises(ValueError, match="exclude lists row 9; the corpus has 5 rows"):
        scan(unit(1, 8), matrix, k=1, exclude=torch.tensor([[9]]))
