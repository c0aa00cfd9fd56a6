"""corpus_scan on the CPU: every backend and instruction set against float64, an exact oracle, and the op rules."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vsr1.errors import BackendUnavailable
from vsr1.ops import last_backend
from vsr1.ops._dispatch import extension_missing, table
from vsr1.ops.corpus_scan import (
    CorpusMatrix,
    ScanResult,
    info_nce,
    scan,
)

WORST = 2.0  # allowed error as a multiple of the same-dtype torch expression's


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def rms_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=1e-300))


def softmax_sweep(query: Tensor, rows: Tensor, positive: Tensor, temperature: float) -> dict[str, Tensor]:
    """The outputs as a plain torch expression in the dtype of its arguments."""
    scores = query @ rows.T
    return {
        "scores": scores.sort(dim=1, descending=True).values,
        "positive_score": scores.gather(1, positive[:, None])[:, 0],
        "lse": (scores / temperature).logsumexp(dim=1),
        "expected": (scores / temperature).softmax(dim=1) @ rows,
    }


SHAPES = [
    (1, 1, 1, 1),
    (1, 2000, 64, 10),
    (2, 49, 1025, 7),
    (3, 97, 37, 5),
    (8, 1000, 100, 16),
    (11, 300, 17, 400),
    (70, 500, 48, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("B", "N", "D", "k"), SHAPES, ids=[f"B{b}-N{n}-D{d}-k{k}" for b, n, d, k in SHAPES])
def test_error_is_within_twice_that_of_torch(backend: str, B: int, N: int, D: int, k: int, dtype: torch.dtype) -> None:
    query, rows = unit(B, D, dtype=dtype), unit(N, D, seed=1, dtype=dtype)
    positive = torch.arange(B) * 7 % N
    found = scan(query, rows, k=k, positive=positive, temperature=0.07, backend=backend)
    truth = softmax_sweep(query.double(), rows.double(), positive, 0.07)
    plain = softmax_sweep(query, rows, positive, 0.07)
    kept = min(k, N)
    for name in ("scores", "positive_score", "lse", "expected"):
        columns = slice(kept) if name == "scores" else slice(None)
        ours = getattr(found, name)
        if name == "scores":
            assert torch.equal(ours[:, kept:], torch.full((B, k - kept), -math.inf))
        allowed = WORST * rms_error(plain[name][..., columns], truth[name][..., columns]) + 1e-7
        assert rms_error(ours[..., columns], truth[name][..., columns]) <= allowed, name

    exact = query.double() @ rows.double().T
    assert torch.allclose(exact.gather(1, found.ids[:, :kept]), found.scores[:, :kept].double(), rtol=0, atol=1e-6)
    assert all(len(set(ids)) == kept for ids in found.ids[:, :kept].tolist())
    assert (found.ids[:, kept:] == -1).all()
    assert (found.nan_count == 0).all()
    own = exact.gather(1, positive[:, None])
    assert found.rank is not None
    assert (found.rank >= 1 + (exact > own + 1e-6).sum(dim=1)).all()
    assert (found.rank <= 1 + (exact > own - 1e-6).sum(dim=1)).all()


def oracle(
    scores: np.ndarray, rows: np.ndarray, k: int, positive: list[int], exclude: list[list[int]], candidates: Any
) -> list[SimpleNamespace]:
    """What `scan` promises, one query at a time, from exact scores (B, N)."""
    results = []
    for b, line in enumerate(scores):
        listed = range(len(line)) if candidates is None else sorted(set(candidates[b]) - {-1})
        allowed = [i for i in listed if i not in exclude[b]]
        usable = [i for i in allowed if not math.isnan(line[i])]
        order = sorted(usable, key=lambda i: (-line[i], i))[:k]
        fill = k - len(order)
        own = line[positive[b]] if positive[b] >= 0 else math.nan
        bar = -math.inf if math.isnan(own) else own
        weights = np.exp(line[usable] - line[usable].max()) if usable else np.zeros(0)
        results.append(
            SimpleNamespace(
                ids=order + [-1] * fill,
                scores=[line[i] for i in order] + [-math.inf] * fill,
                nan_count=len(allowed) - len(usable),
                positive_score=own,
                rank=1 + sum(line[i] > bar for i in usable) if positive[b] >= 0 else -1,
                lse=math.log(weights.sum()) + line[usable].max() if usable else -math.inf,
                expected=weights @ rows[usable] / weights.sum() if usable else np.zeros(rows.shape[1]),
            )
        )
    return results


@st.composite
def sweeps(draw: st.DrawFn) -> dict[str, Any]:
    """Small integers, so that every backend's scores are exact and ties abound; some rows are NaN."""
    B, N, D = draw(st.integers(0, 10)), draw(st.integers(0, 150)), draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = generator.integers(-2, 3, (N, D)).astype(np.float32)
    rows[generator.random(N) < draw(st.sampled_from([0.0, 0.1, 1.0])), generator.integers(D)] = math.nan
    width = draw(st.sampled_from([None, 0, 1, 5, 70]))
    return {
        "query": generator.integers(-2, 3, (B, D)).astype(np.float32),
        "rows": rows,
        "k": draw(st.sampled_from([0, 1, 3, 50, 200])),
        "positive": generator.integers(-1, N, B),
        "exclude": generator.integers(-1, N, (B, draw(st.sampled_from([0, 1, 6, 200])))),
        "candidates": None if width is None else generator.integers(-1, N, (B, width)),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
    }


def test_ties_nan_exclusion_and_candidates_match_an_exact_oracle(backend: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(sweeps())
    def check(sweep: dict[str, Any]) -> None:
        query, rows, candidates = sweep["query"], sweep["rows"], sweep["candidates"]
        found = scan(
            torch.from_numpy(query).to(sweep["dtype"]),
            torch.from_numpy(rows).to(sweep["dtype"]),
            k=sweep["k"],
            positive=torch.from_numpy(sweep["positive"]),
            temperature=1.0,
            exclude=torch.from_numpy(sweep["exclude"]),
            candidates=None if candidates is None else torch.from_numpy(candidates),
            backend=backend,
        )
        wanted = oracle(
            query.astype(np.float64) @ rows.T.astype(np.float64),
            rows,
            sweep["k"],
            sweep["positive"].tolist(),
            sweep["exclude"].tolist(),
            None if candidates is None else candidates.tolist(),
        )
        for b, want in enumerate(wanted):
            assert found.ids[b].tolist() == want.ids
            assert found.scores[b].tolist() == want.scores
            assert found.nan_count[b].item() == want.nan_count
            assert found.rank[b].item() == want.rank
            np.testing.assert_equal(found.positive_score[b].item(), want.positive_score)
            assert found.lse[b].item() == pytest.approx(want.lse, rel=1e-5, abs=1e-5)
            np.testing.assert_allclose(found.expected[b].numpy(), want.expected, rtol=1e-4, atol=1e-5)

    check()


def everything(query: Tensor, rows: Tensor, backend: str, **options: Any) -> ScanResult:
    positive = torch.arange(len(query)) % len(rows)
    return scan(query, rows, k=20, positive=positive, temperature=0.1, backend=backend, **options)


def assert_bitwise(left: ScanResult, right: ScanResult) -> None:
    for name in ("scores", "ids", "nan_count", "positive_score", "rank", "lse", "expected"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_and_runs_do_not_change_a_bit(backend: str, dtype: torch.dtype) -> None:
    if backend == "reference":
        pytest.skip("the reference's products are torch's own")
    query, rows = unit(12, 96, dtype=dtype), unit(9001, 96, seed=1, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything(query, rows, backend)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert_bitwise(everything(query, rows, backend), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batches", ["few", "many"])
def test_a_score_depends_on_its_query_and_row_alone(backend: str, dtype: torch.dtype, batches: str) -> None:
    """Among batches of few queries, and among those of many: other tiles, but one order of summation for all of them."""
    if backend == "reference":
        pytest.skip("torch's matmul sums in an order that depends on the shape")
    query, rows = unit(85, 1030, dtype=dtype), unit(50, 1030, seed=1, dtype=dtype)
    # How many other queries are in the batch; 32 are many for every instruction set.
    beside = {"few": [0, 1, 2, 6], "many": [32, 33, 53, 84]}[batches]
    together = scan(query[: beside[-1] + 1], rows.repeat(2, 1), k=100, backend=backend)
    for b in (0, 1, 5):
        for others in beside:
            at = others // 2
            batch = torch.cat([query[10 : 10 + at], query[b : b + 1], query[30 : 30 + others - at]])
            single = scan(batch, rows, k=50, backend=backend, positive=torch.arange(others + 1) % 50)
            assert torch.equal(single.scores[at], together.scores[b, ::2])
            assert torch.equal(single.ids[at], together.ids[b, ::2])
            assert torch.equal(single.ids[at] + 50, together.ids[b, 1::2])
            assert (single.scores[at] == single.positive_score[at]).any()


def test_non_finite_rows_and_queries(backend: str) -> None:
    query, rows = unit(3, 40), unit(200, 40, seed=1)
    clean = everything(query, rows, backend, exclude=torch.tensor([[7, 8]] * 3))
    rows[7, 3] = math.nan
    rows[8] = -math.inf * query[0].sign()
    dirty = everything(query, rows, backend, exclude=torch.tensor([[-1, 8]] * 3))
    assert dirty.nan_count.tolist() == [1, 1, 1]
    assert torch.equal(dirty.ids, clean.ids)
    assert torch.allclose(dirty.expected, clean.expected, atol=1e-6)
    minus = everything(query[:1], rows, backend)  # row 8 scores -inf with query 0: selectable by nobody, and no NaN
    assert torch.equal(minus.ids, clean.ids[:1])
    assert torch.allclose(minus.expected, clean.expected[:1], atol=1e-6)
    rows[8] *= -1
    plus = everything(query[:1], rows, backend)
    assert plus.ids[0, 0].item() == 8
    assert plus.scores[0, 0].item() == math.inf
    assert plus.lse.isnan().all()
    assert plus.expected.isnan().all()
    nothing = everything(query * math.nan, rows, backend)
    assert (nothing.ids == -1).all()
    assert nothing.nan_count.tolist() == [200] * 3
    assert nothing.lse.tolist() == [-math.inf] * 3
    assert (nothing.expected == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("listed", ["corpus", "candidates", "candidates-without-positive"])
def test_info_nce_and_its_gradient(backend: str, dtype: torch.dtype, listed: str) -> None:
    query, rows, positive = (
        unit(5, 33, dtype=dtype),
        unit(140, 33, seed=1, dtype=dtype),
        torch.tensor([0, 3, 139, 7, 3]),
    )
    candidates = None
    if listed != "corpus":
        candidates = torch.stack(
            [torch.randperm(140, generator=torch.Generator().manual_seed(b))[:60] for b in range(5)]
        )
        candidates[candidates == positive[:, None]] = -1
        if listed == "candidates":
            candidates[:, 30] = positive

    def plain(of: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = query.to(of).requires_grad_()
        scores = leaf @ rows.to(of).T / 0.1
        if candidates is not None:
            kept = torch.zeros(5, 141, dtype=torch.bool).scatter_(1, candidates.where(candidates >= 0, 140), True)[
                :, :140
            ]
            scores = scores.masked_fill(~kept.scatter(1, positive[:, None], True), -math.inf)
        loss = F.cross_entropy(scores, positive, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    leaf = query.clone().requires_grad_()
    loss = info_nce(leaf, rows, positive, 0.1, candidates, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.dtype == dtype
    true_loss, true_gradient = plain(torch.float64)
    plain_loss, plain_gradient = plain(dtype)
    assert rms_error(loss.detach(), true_loss) <= WORST * rms_error(plain_loss, true_loss) + 1e-7
    assert rms_error(gradient, true_gradient) <= WORST * rms_error(plain_gradient, true_gradient) + 1e-7
    with torch.no_grad():
        assert torch.equal(info_nce(leaf, rows, positive, 0.1, candidates, backend=backend), loss)


def test_scores_positive_score_and_lse_are_differentiable(backend: str) -> None:
    query, rows, positive = unit(4, 19), unit(60, 19, seed=1), torch.tensor([5, -1, 0, 59])
    exclude = torch.tensor([[5, 6]] * 4)
    weights = unit(4, 7, seed=2)

    def total(scores: Tensor, lse: Tensor, own: Tensor) -> Tensor:
        return (scores * weights[:, : scores.shape[1]]).sum() + lse.sum() + 3 * own[[0, 2, 3]].sum()

    leaf = query.clone().requires_grad_()
    found = scan(leaf, rows, k=5, positive=positive, temperature=0.3, exclude=exclude, backend=backend)
    (ours,) = torch.autograd.grad(total(found.scores, found.lse, found.positive_score), leaf)
    assert not found.expected.requires_grad
    truth = query.double().requires_grad_()
    scores = truth @ rows.double().T
    masked = scores.scatter(1, exclude, -math.inf)
    own = scores.gather(1, positive.clamp(min=0)[:, None])[:, 0]
    (wanted,) = torch.autograd.grad(total(masked.topk(5).values, (masked / 0.3).logsumexp(1), own), truth)
    assert rms_error(ours, wanted) < 1e-6


def test_nothing_as_large_as_the_scores_is_saved_for_the_backward_pass() -> None:
    query, rows = unit(16, 8).requires_grad_(), unit(4096, 8, seed=1)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel() * (t.data_ptr() != rows.data_ptr())) or t, lambda t: t
    ):
        info_nce(query, rows, torch.arange(16), 0.1)
    assert saved
    assert max(saved) <= 16 * 8


def test_empty_inputs_are_defined(backend: str) -> None:
    rows, none = unit(6, 4), torch.empty(0, 4)
    no_queries = everything(none, rows, backend)
    assert no_queries.scores.shape == (0, 20)
    assert no_queries.expected.shape == (0, 4)
    no_rows = scan(rows, none, k=3, positive=torch.full((6,), -1), temperature=1.0, backend=backend)
    assert (no_rows.ids == -1).all()
    assert no_rows.lse.tolist() == [-math.inf] * 6
    assert (no_rows.expected == 0).all()
    assert no_rows.rank.tolist() == [-1] * 6
    unlisted = scan(rows, rows, k=3, candidates=torch.empty(6, 0, dtype=torch.int64), backend=backend)
    assert (unlisted.ids == -1).all()
    leaf = rows.clone().requires_grad_()
    scan(leaf, none, k=2, backend=backend).scores.sum().backward()
    assert (leaf.grad == 0).all()


OPCHECKS = {
    "topk": {"k": 4},
    "all": {"k": 4, "positive": True, "temperature": 0.5, "expected": True, "exclude": True},
    "candidates": {"k": 0, "positive": True, "temperature": 0.5, "expected": True, "candidates": True},
}


@pytest.mark.parametrize("name", OPCHECKS)
@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_opcheck(path: str, name: str) -> None:
    from vsr1.ops._corpus_backends import corpus_scan

    if path == "cpu" and extension_missing():
        pytest.skip(f"cpu {extension_missing()}")
    asked = OPCHECKS[name]
    arguments = (
        unit(3, 12).requires_grad_(),
        unit(30, 12, seed=1),
        asked["k"],
        torch.tensor([1, 2, 3]) if "positive" in asked else None,
        asked.get("temperature"),
        "expected" in asked,
        torch.tensor([[1, -1]] * 3) if "exclude" in asked else None,
        torch.tensor([[1, 9, 1, -1]] * 3) if "candidates" in asked else None,
        path,
    )
    torch.library.opcheck(corpus_scan, arguments)


def test_compiles_without_a_graph_break() -> None:
    query, rows, positive = unit(3, 12), unit(30, 12, seed=1), torch.tensor([1, 2, 3])

    def loss(query: Tensor) -> Tensor:
        return info_nce(query, rows, positive, 0.1).sum() + scan(query, rows, k=3).scores.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours, wanted = query.clone().requires_grad_(), query.clone().requires_grad_()
    compiled(ours).backward()
    loss(wanted).backward()
    assert torch.equal(ours.grad, wanted.grad)


def test_matrix_shares_memory_and_sees_changes(backend: str) -> None:
    array = unit(10, 6).numpy()
    matrix = CorpusMatrix(array)
    assert (len(matrix), matrix.dim, matrix.dtype, matrix.device.type) == (10, 6, torch.float32, "cpu")
    query = torch.ones(1, 6)
    array[4] = 9.0
    assert scan(query, matrix, k=1, backend=backend).ids.item() == 4
    array[8] = 10.0
    assert scan(query, matrix, k=1, backend=backend).ids.item() == 8
    exported = SimpleNamespace(__dlpack__=matrix.rows.__dlpack__, __dlpack_device__=matrix.rows.__dlpack_device__)
    assert CorpusMatrix(exported).rows.data_ptr() == matrix.rows.data_ptr()
    array.flags.writeable = False
    assert CorpusMatrix(array).rows.data_ptr() == matrix.rows.data_ptr()


def test_rows_may_lie_apart_and_beyond_four_gibibytes(backend: str, tmp_path: Path) -> None:
    # A sparse file: 3 rows of 8 floats, 2^30 floats apart; only the touched pages exist.
    vectors = np.memmap(tmp_path / "vectors", dtype=np.float32, mode="w+", shape=(3, 2**30))[:, :8]
    vectors[:] = unit(3, 8).numpy()
    dense = np.ascontiguousarray(vectors)
    query = unit(2, 8, seed=3)
    for options in ({}, {"candidates": torch.tensor([[0, 2], [1, 2]])}):
        found = scan(query, vectors, k=3, positive=torch.tensor([2, 2]), backend=backend, **options)
        wanted = scan(query, dense, k=3, positive=torch.tensor([2, 2]), backend=backend, **options)
        assert torch.equal(found.scores, wanted.scores)
        assert torch.equal(found.rank, wanted.rank)


def test_the_backend_is_chosen_and_told(caplog: pytest.LogCaptureFixture) -> None:
    query, rows = unit(1, 8), unit(5, 8)
    with caplog.at_level(logging.DEBUG, logger="vsr1.ops"):
        scan(query, rows.half(), k=1)
    assert last_backend() == "reference"
    assert "corpus_scan: backend reference (asked for auto)" in caplog.text
    with pytest.raises(ValueError, match="unknown backend 'gpu'; it has 'auto', 'cpu', 'cuda', 'triton', 'reference'"):
        scan(query, rows, k=1, backend="gpu")
    assert {(row.op, row.backend) for row in table()} >= {
        ("corpus_scan", b) for b in ("cpu", "cuda", "triton", "reference")
    }
    if extension_missing():
        with pytest.raises(BackendUnavailable, match="compiled extension"):
            scan(query, rows, k=1, backend="cpu")
    else:
        scan(query, rows, k=1)
        assert last_backend() == "cpu"
        with pytest.raises(BackendUnavailable, match="backend 'cpu' takes float32 and bfloat16 rows"):
            scan(query, rows.half(), k=1, backend="cpu")


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"the corpus holds 8-d vectors; the query has 6: was it built", {"query": torch.zeros(2, 6)}),
        (ValueError, r"query has shape \(8,\)", {"query": torch.zeros(8)}),
        (TypeError, r"query is torch.float64", {"query": torch.zeros(2, 8, dtype=torch.float64)}),
        (ValueError, r"k is 2049; expected 0 <= k <= 2048", {"k": 2049}),
        (TypeError, r"k is a float", {"k": 3.0}),
        (ValueError, r"temperature is 0", {"temperature": 0}),
        (ValueError, r"temperature is nan", {"temperature": math.nan}),
        (TypeError, r"positive is torch.int32", {"positive": torch.zeros(2, dtype=torch.int32)}),
        (ValueError, r"positive has shape \(3,\); expected \(2,\)", {"positive": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, r"positive lists row 5; the corpus has 5 rows", {"positive": torch.tensor([0, 5])}),
        (ValueError, r"exclude lists row -2", {"exclude": torch.tensor([[0], [-2]])}),
        (ValueError, r"candidates has shape \(2,\); expected \(2, n\)", {"candidates": torch.tensor([0, 1])}),
        (TypeError, r"corpus rows are torch.int64", {"corpus": torch.zeros(5, 8, dtype=torch.int64)}),
        (TypeError, r"corpus is a list", {"corpus": [[1.0]]}),
        (ValueError, r"corpus has shape \(5,\)", {"corpus": torch.zeros(5)}),
        (ValueError, r"not contiguous", {"corpus": torch.zeros(8, 5).T}),
        (ValueError, r"query is on meta, the corpus on cpu: move one", {"query": torch.zeros(2, 8, device="meta")}),
        (ValueError, r"require a gradient", {"corpus": torch.zeros(5, 8, requires_grad=True)}),
    ],
)
def test_wrong_arguments_are_named(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    arguments = {"query": torch.zeros(2, 8), "corpus": torch.zeros(5, 8), "k": 1, **change}
    with pytest.raises(error, match=message):
        scan(**arguments)
