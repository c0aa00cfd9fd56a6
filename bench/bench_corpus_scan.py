"""corpus_scan on the CPU beside its peers: torch's matmul + topk and FAISS' IndexFlatIP, on the same vectors.

    python -m pytest bench/bench_corpus_scan.py --benchmark-group-by=group

Before anything is timed, every contender must find the rows that ours finds. Change the corpus with VECTORS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from vsr1.ops.corpus_scan import info_nce, scan

VECTORS = (100_000, 512)  # N, D
K = 10
TEMPERATURE = 0.07
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@cache
def corpus(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(VECTORS, generator=generator), dim=1).to(dtype)


def queries(count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(count, VECTORS[1], generator=generator), dim=1).to(dtype)


def ours(query: Tensor, rows: Tensor) -> Callable[[], Tensor]:
    return lambda: scan(query, rows, k=K, backend="cpu").ids


def torch_topk(query: Tensor, rows: Tensor) -> Callable[[], Tensor]:
    return lambda: (query @ rows.T).topk(K, dim=1).indices


def faiss_flat(query: Tensor, rows: Tensor) -> Callable[[], Tensor]:
    faiss = pytest.importorskip("faiss")
    if rows.dtype != torch.float32:
        pytest.skip("IndexFlatIP holds float32")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows.numpy())
    return lambda: torch.from_numpy(index.search(query.numpy(), K)[1])


CONTENDERS = {"vsr1": ours, "torch": torch_topk, "faiss": faiss_flat}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k(benchmark: BenchmarkFixture, dtype: str, count: int, contender: str) -> None:
    query, rows = queries(count, DTYPES[dtype]), corpus(DTYPES[dtype])
    search = CONTENDERS[contender](query, rows)
    exact = query.double() @ rows.double().T
    found, wanted = exact.gather(1, search()), exact.topk(K).values
    # torch's bfloat16 product rounds scores to 8 bits, so its choice among near-equals is its own.
    rounding = 2.0**-8 if (contender, dtype) == ("torch", "bf16") else 1e-6
    assert (wanted - found.sort(dim=1, descending=True).values).abs().max() <= rounding
    benchmark.group = f"top-{K} of {VECTORS[0]} x {VECTORS[1]} {dtype}, {count} queries"
    benchmark.pedantic(search, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("contender", ["vsr1", "torch"])
@pytest.mark.parametrize("count", [1, 8, 64])
def test_info_nce_with_gradient(benchmark: BenchmarkFixture, count: int, contender: str) -> None:
    rows, positive = corpus(torch.float32), torch.arange(count)

    def value_and_gradient(name: str = contender) -> tuple[Tensor, Tensor]:
        query = queries(count, torch.float32).requires_grad_()
        if name == "vsr1":
            loss = info_nce(query, rows, positive, TEMPERATURE, backend="cpu")
        else:
            loss = F.cross_entropy(query @ rows.T / TEMPERATURE, positive, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), query)[0]

    for left, right in zip(value_and_gradient("vsr1"), value_and_gradient("torch"), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    benchmark.group = f"InfoNCE over {VECTORS[0]} x {VECTORS[1]} fp32 with gradient, {count} queries"
    benchmark.pedantic(value_and_gradient, rounds=5, warmup_rounds=1)
