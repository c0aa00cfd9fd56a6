"""The CUDA C++ sweep without a GPU: its arithmetic function by function, and whole kernels with a fiber for every thread.

g++ compiles csrc/cuda with tests/ops/cuda_emulation.h in place of the instructions that only a GPU has. What this cannot show is
what those instructions do on the hardware, and time. What nvcc and NVRTC make of the sources: test_corpus_scan_cuda_build.py.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.ops.emulated import compile_host, needs_compiler
from vsr1.ops import _corpus_cuda, _cuda_code, last_backend
from vsr1.ops.corpus_scan import HiddenState, ScanResult, SoftQuery, refine_and_scan, scan

triton = pytest.importorskip("triton")
INTERPRETED = triton.knobs.runtime.interpret
pytestmark = needs_compiler
FLOATS = st.floats(-100, 100, width=32)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compile_host(tmp_path_factory.mktemp("cuda_host"), ("corpus_scan.cuh", "projection.cuh"), "cuda_host.cpp")
    library.walk.restype = library.row_at.restype = ctypes.c_int64
    library.share_of.restype = library.length_of.restype = ctypes.c_float
    return library


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("levels", [3, 1000])
def test_sets_of_rows_join_in_any_order(host: ctypes.CDLL, levels: int) -> None:
    @given(st.lists(st.integers(0, levels), min_size=1, max_size=32), st.randoms(use_true_random=False))
    @settings(deadline=None, max_examples=40)
    def check(numbers: list[int], random: Any) -> None:
        scores = np.array(numbers, dtype=np.float32) - levels // 2
        scores[scores == levels // 2] = -np.inf
        rows = np.array(random.sample(range(32), len(scores)), dtype=np.int32)
        left, order = list(range(len(scores))), []
        while len(left) > 1:
            pair = random.sample(left, 2)
            order += pair
            left.remove(pair[1])
        found = [ctypes.c_float(), ctypes.c_float(), ctypes.c_int()]
        pairs = np.array(order or [0], dtype=np.int32)
        word = host.join_all(
            pointer(scores), pointer(rows), len(scores), pointer(pairs), *(ctypes.byref(one) for one in found)
        )
        score, second, row = (one.value for one in found)
        ranked = sorted(zip(-scores, rows, strict=True))
        assert (score, row) == (-ranked[0][0], ranked[0][1])
        assert second == (-ranked[1][0] if len(ranked) > 1 else -np.inf)
        # As gather_kernel of kernels/corpus_scan.py reads the word: the winner's number, and a bound on the runner-up.
        assert word & 31 == row
        bound = np.int32(word & -32 if word < 0 else word | 31).view(np.float32)
        assert np.isnan(bound) if second == np.inf else bound >= second
        assert second == -np.inf or abs(bound - second) <= 2.0**-18 * abs(second) + 1e-40

    check()


@pytest.mark.parametrize(("row_count", "blocks"), [(1, 1), (16, 1), (33, 2), (700, 3), (10_000, 132)], ids=str)
def test_every_row_is_met_once(host: ctypes.CDLL, row_count: int, blocks: int) -> None:
    met = []
    for block in range(blocks):
        rows, readable = (np.zeros(row_count + 64, dtype=np.int64) for _ in range(2))
        steps = host.walk(ctypes.c_int64(row_count), block, blocks, pointer(rows), pointer(readable), len(rows))
        met.append(rows[:steps])
        assert steps % 32 == 0
        assert np.array_equal(readable[:steps], np.minimum(rows[:steps], row_count - 1))
        assert np.array_equal(rows[:steps].reshape(-1, 32) % 32, np.tile(np.arange(32), (steps // 32, 1)))
    together = np.sort(np.concatenate(met))
    assert np.array_equal(together, np.arange(-(-row_count // 32) * 32))


def test_row_numbers_have_64_bits(host: ctypes.CDLL) -> None:
    tile = 2 * (2**26 - 1) + 1
    found = host.row_at(ctypes.c_int64(2**40), 131, 132, tile, 15)
    assert found == (131 + (2**26 - 1) * 132) * 32 + 31 > 2**31


@given(st.integers(1, 6), st.sampled_from([1, 16]), st.data())
@settings(deadline=None, max_examples=40)
def _softmax(host: ctypes.CDLL, tiles: int, width: int, data: Any) -> None:
    entry = FLOATS | st.just(-math.inf)
    scores = np.array(data.draw(st.lists(entry, min_size=tiles * width, max_size=tiles * width)), dtype=np.float32)
    temperature = data.draw(st.sampled_from([0.07, 1.0, 30.0]))
    peak, mass = ctypes.c_float(), ctypes.c_float()
    weights = np.full_like(scores, np.nan)
    slope = ctypes.c_float(math.log2(math.e) / temperature)
    host.softmax(pointer(scores), tiles, width, slope, ctypes.byref(peak), ctypes.byref(mass), pointer(weights))
    exact = torch.tensor(scores).double() / temperature
    if exact.max() == -math.inf:
        assert peak.value == -math.inf and mass.value == 0.0 and not weights.any()
        return
    assert peak.value == scores.max()
    assert peak.value / temperature + math.log(mass.value) == pytest.approx(exact.logsumexp(0).item(), abs=1e-4)
    np.testing.assert_allclose(weights, (exact - exact.max()).exp().numpy(), rtol=1e-3, atol=1e-6)


def test_the_running_softmax_is_the_whole_one(host: ctypes.CDLL) -> None:
    _softmax(host)


@given(st.integers(1, 5), st.integers(1, 200_000), st.data())
@settings(deadline=None, max_examples=150)
def _excluded(host: ctypes.CDLL, blocks: int, row_count: int, data: Any) -> None:
    rows = st.integers(0, row_count - 1)
    listed = data.draw(st.lists(rows | st.just(-1), max_size=20))
    row = data.draw(st.sampled_from(listed) | rows if listed else rows)
    block = row // 32 % blocks
    entries = np.array(listed or [-1], dtype=np.int64)
    found = host.excluded(
        pointer(entries), ctypes.c_int64(len(entries)), ctypes.c_int64(row_count), block, blocks, ctypes.c_int64(row)
    )
    assert found == (row >= 0 and row in listed)


def test_a_row_is_left_out_where_it_is_listed(host: ctypes.CDLL) -> None:
    _excluded(host)


def test_the_update_of_a_query(host: ctypes.CDLL) -> None:
    assert host.share_of(ctypes.c_float(0.5), 4) == 0.125
    assert host.share_of(ctypes.c_float(0.5), 0) == 0.0
    assert host.length_of(ctypes.c_float(0.0)) == pytest.approx(1e-12)
    assert host.length_of(ctypes.c_float(9.0)) == 3.0
    assert [host.finite_value(ctypes.c_float(value)) for value in (1e38, math.inf, -math.inf, math.nan)] == [1, 0, 0, 0]


def test_structs_and_shared_memory_are_as_python_has_them(host: ctypes.CDLL) -> None:
    sizes = np.zeros(8, dtype=np.int64)
    host.layout(pointer(sizes))
    ours, projection = _corpus_cuda.Arguments, _corpus_cuda.Projection
    fields = [getattr(ours, name).offset for name in ("partial", "query_stride", "slope", "queries")]
    theirs = [getattr(projection, name).offset for name in ("hidden_stride", "queries")]
    assert sizes.tolist() == [ctypes.sizeof(ours), *fields, ctypes.sizeof(projection), *theirs]
    for dim, stages in ((1024, 3), (2048, 2)):
        name = f"vsr1::sweep_kernel<vsr1::Half, {dim // 16}, {stages}>".encode()
        assert host.shared_bytes(name) == _corpus_cuda.shared_bytes(dim, stages)


def test_stages_fit_the_device() -> None:
    hopper, ampere, ada = 227 * 1024, 163 * 1024, 99 * 1024
    assert [_corpus_cuda.stages(dim, hopper) for dim in (1024, 1536, 2048)] == [3, 3, 3]
    assert [_corpus_cuda.stages(dim, ampere) for dim in (1024, 1536, 2048)] == [3, 2, 2]
    assert [_corpus_cuda.stages(dim, ada) for dim in (1024, 1536, 2048)] == [2, None, None]


# Whole kernels.


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return F.normalize(torch.randn(shape, generator=generator), dim=-1).to(dtype)


@pytest.fixture(params=["bulk", "threads"])
def emulated(request: pytest.FixtureRequest, host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CUDA kernels run in the emulation, on what looks like a GPU of three multiprocessors; yields the kernels started."""
    started: list[str] = []

    def launch(
        name: str, arguments: ctypes.Structure, *, blocks: int, threads: int, shared: int, device: torch.device
    ) -> None:
        seed = len(started)
        started.append(name)
        bulk = request.param == "bulk"
        code = host.run_kernel(name.encode(), ctypes.byref(arguments), blocks, threads, shared, bulk, seed)
        assert code == 0, f"{name}: {code}"

    monkeypatch.setattr(_cuda_code, "launch", launch)
    monkeypatch.setattr(_corpus_cuda, "shared_limit", lambda device: 163 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))
    return started


def expect_sweep(query: Tensor, rows: Tensor, exclude: Tensor | None, positive: Tensor, temperature: float) -> None:
    """Every output of the sweep against float64."""
    swept = _corpus_cuda.sweep(query, rows, exclude, positive, temperature, expected=True)
    B, N = len(query), len(rows)
    scores = query.double() @ rows.double().T
    own = scores.gather(1, positive.clamp(min=0)[:, None])[:, 0].masked_fill(positive < 0, math.nan)
    nan = scores.isnan()
    if exclude is not None:
        for b in range(B):
            listed = exclude[b][exclude[b] >= 0]
            scores[b, listed], nan[b, listed] = -math.inf, False
    scores = scores.masked_fill(nan | scores.isnan(), -math.inf)
    torch.testing.assert_close(swept.positive_score, own.float(), equal_nan=True, rtol=1e-5, atol=1e-5)
    assert torch.equal(swept.nan_count, nan.sum(dim=1).int())
    bar = own.masked_fill(own.isnan(), -math.inf)[:, None]
    others = torch.arange(N) != positive[:, None]
    assert (swept.greater >= ((scores > bar + 1e-5) & others).sum(dim=1)).all()
    assert (swept.greater <= ((scores > bar - 1e-5) & others).sum(dim=1)).all()

    grouped = F.pad(scores, (0, -N % 32), value=-math.inf).reshape(B, -1, 32).float()
    torch.testing.assert_close(swept.maxima, grouped.amax(dim=2), rtol=1e-5, atol=1e-5)
    winner = (swept.runner_up & 31).long()
    torch.testing.assert_close(grouped.gather(2, winner[:, :, None])[:, :, 0], swept.maxima, rtol=1e-5, atol=1e-5)
    second = grouped.scatter(2, winner[:, :, None], -math.inf).amax(dim=2)
    torch.testing.assert_close((swept.runner_up & -32).view(torch.float32), second, rtol=1e-4, atol=1e-5)

    highest = swept.peak.amax(dim=0)
    torch.testing.assert_close(highest, scores.amax(dim=1).float(), rtol=1e-5, atol=1e-5)
    level = highest.masked_fill(highest == -math.inf, 0.0)
    mass = (swept.mass * ((swept.peak - level) / temperature).exp()).sum(dim=0)
    lse = (scores / temperature).logsumexp(dim=1)
    torch.testing.assert_close((level / temperature + mass.log()).double(), lse, rtol=1e-4, atol=1e-4)
    weights = ((scores - level[:, None]) / temperature).exp()
    wanted = weights @ rows.double().nan_to_num(0.0, 0.0, 0.0)
    assert (swept.expected - wanted).norm() <= 2.0 * torch.finfo(rows.dtype).eps * wanted.norm() + 1e-6


CASES = [
    (1, 1, 1024, torch.float16),
    (16, 205, 1024, torch.float16),
    (3, 97, 1024, torch.bfloat16),
    (5, 40, 2048, torch.float16),
]


@pytest.mark.parametrize(("B", "N", "D", "dtype"), CASES, ids=[f"B{b}-N{n}-D{d}-{str(t)[6:]}" for b, n, d, t in CASES])
def test_the_sweep(B: int, N: int, D: int, dtype: torch.dtype, emulated: list[str]) -> None:
    query, rows = unit(B, D, dtype=dtype), unit(N, D, seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(B)
    exclude = torch.randint(-1, N, (B, 7), generator=generator) if N > 1 else None
    positive = torch.randint(-1, N, (B,), generator=generator)
    expect_sweep(query, rows, exclude, positive, 0.1)


def test_the_sweep_with_nan_infinities_and_strides(emulated: list[str]) -> None:
    wide = unit(200, 1032, seed=1, dtype=torch.float16)
    rows = wide[:, :1024]
    rows[[3, 64, 199], 2] = math.nan
    rows[130, :2] = torch.tensor([math.inf, -math.inf])
    query = unit(4, 1024, dtype=torch.float16).abs()
    rows[70, 5] = -math.inf
    expect_sweep(query, rows, torch.tensor([[3, -1], [199, 5], [0, 0], [-1, -1]]), torch.tensor([3, 64, -1, 5]), 2.0)


def test_a_copy_of_the_positive_ties_with_it(emulated: list[str]) -> None:
    rows = unit(150, 1024, seed=1, dtype=torch.float16)
    rows[[7, 100, 149]] = rows[60].clone()
    query = unit(4, 1024, dtype=torch.float16)
    swept = _corpus_cuda.sweep(query, rows, None, torch.full((4,), 60), None)
    exact = query.double() @ rows.double().T
    assert torch.equal(swept.greater, (exact > exact[:, 60:61] + 1e-9).sum(dim=1).int())


def test_the_order_of_threads_and_blocks_changes_nothing(emulated: list[str]) -> None:
    query, rows = unit(4, 1024, dtype=torch.float16), unit(100, 1024, seed=1, dtype=torch.float16)
    once, again = (_corpus_cuda.sweep(query, rows, None, torch.arange(4), 0.1, expected=True) for _ in range(2))
    for name, one, other in zip(once._fields, once, again, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("emulated", ["bulk"], indirect=True)
@pytest.mark.parametrize(
    "gate", [0.5, torch.tensor(0.5), torch.tensor([0.0, 0.5, -2.0])], ids=["number", "scalar", "each"]
)
def test_the_sweep_refines_soft_queries(gate: float | Tensor, emulated: list[str]) -> None:
    base, soft = unit(3, 1024, dtype=torch.float16), unit(3, 5, 1024, seed=2, dtype=torch.float16)
    rows = unit(70, 1024, seed=1, dtype=torch.float16)
    lines = gate.reshape(-1) if isinstance(gate, Tensor) else gate
    query = torch.full_like(base, math.nan)
    front = _corpus_cuda.Front(base, soft=soft, gate=lines)
    assert front.refuses(rows) is None
    found = _corpus_cuda.sweep(query, rows, None, torch.arange(3), 0.1, expected=True, front=front)
    wanted = SoftQuery(base, soft, gate).query()
    assert (query.float() - wanted.float()).abs().max() <= 2.0**-10 * wanted.abs().max()
    assert (query != wanted).float().mean() < 0.01
    same = _corpus_cuda.sweep(query, rows, None, torch.arange(3), 0.1, expected=True)
    for name, one, other in zip(found._fields, found, same, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("emulated", ["bulk"], indirect=True)
@pytest.mark.parametrize("head", [False, True], ids=["as-it-is", "head"])
def test_the_sweep_refines_hidden_states(head: bool, emulated: list[str]) -> None:
    width = 200 if head else 1100 // 8 * 8
    hidden = (30 * unit(3, width + 8, dtype=torch.float16))[:, :width]
    weight = torch.rand(width, generator=torch.Generator().manual_seed(0)).half() + 0.5
    matrix = unit(1040, width, seed=4, dtype=torch.float16) if head else None
    rows = unit(30, 1024, seed=1, dtype=torch.float16)
    query = torch.full((3, 1024), math.nan, dtype=torch.float16)
    front = _corpus_cuda.Front(hidden, weight, matrix)
    assert front.refuses(rows) is None
    _corpus_cuda.sweep(query, rows, None, None, None, front=front)
    wanted = HiddenState(hidden, weight, matrix, dim=1024).query()
    assert (query.float() - wanted.float()).abs().max() <= 2.0**-10 * wanted.abs().max()
    assert (query != wanted).float().mean() < 0.02
    assert len(emulated) == (2 if head else 1)


def test_a_front_says_what_it_cannot_do() -> None:
    rows, base = torch.zeros(4, 1024, dtype=torch.float16), torch.zeros(2, 1032, dtype=torch.float16)
    soft = torch.zeros(2, 3, 1024, dtype=torch.float16)
    plain = base[:, :1024].contiguous()
    assert _corpus_cuda.Front(plain, soft=soft).refuses(rows) is None
    assert "rows' type" in str(_corpus_cuda.Front(plain, soft=soft.float()).refuses(rows))
    assert "multiples of 16 bytes" in str(_corpus_cuda.Front(base[:, 1:1025], soft=soft).refuses(rows))
    assert "contiguous" in str(
        _corpus_cuda.Front(plain, soft=soft.transpose(0, 1)[:2].expand(2, 2, 1024)).refuses(rows)
    )
    assert "up to 16 soft tokens" in str(_corpus_cuda.Front(plain, soft=soft[:, :1].repeat(1, 17, 1)).refuses(rows))
    hidden = torch.zeros(2, 16, dtype=torch.float16)[:, :12]
    head = torch.zeros(1024, 16, dtype=torch.float16)[:, :12]
    assert "multiple of 8" in str(_corpus_cuda.Front(hidden, torch.zeros(12).half(), head).refuses(rows))


# The whole op, with the merge in Triton's interpreter: in a process of its own, as TRITON_INTERPRET is read at import.


@pytest.fixture
def served(emulated: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(_cuda_code, "missing", lambda: None)
    return emulated


def same(found: ScanResult, wanted: ScanResult) -> None:
    for name in ("ids", "nan_count", "rank"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for name in ("scores", "positive_score", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)
    assert (found.expected - wanted.expected).norm() <= 2e-3 * wanted.expected.norm()


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("emulated", ["bulk"], indirect=True)
def test_whole_op_scan_and_refine(served: list[str]) -> None:
    rows = unit(70, 1024, seed=1, dtype=torch.float16)
    base, soft = unit(2, 1024, dtype=torch.float16), unit(2, 2, 1024, seed=2, dtype=torch.float16)
    options: dict[str, Any] = {"k": 2, "positive": torch.tensor([4, 69]), "exclude": torch.tensor([[7], [-1]])}
    options["temperature"] = 0.1
    gate = torch.tensor([[0.7]]).expand(2, 1)
    query, found = refine_and_scan(SoftQuery(base, soft, gate), rows, backend="cuda", **options)
    torch.testing.assert_close(query, SoftQuery(base, soft, 0.7).query(), rtol=2e-3, atol=1e-5)
    assert last_backend() == "cuda" and len(served) == 1
    again = scan(query, rows, backend="cuda", **options)
    assert last_backend() == "cuda" and len(served) == 2
    for name in ("scores", "ids", "rank", "positive_score", "lse", "expected"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    same(found, scan(query, rows, backend="reference", **options))

    # What the kernel cannot refine is composed, with the kernel as its sweep; without a temperature it serves where it is named.
    refine_and_scan(SoftQuery(base[:1], soft[:1].float(), 0.7), rows[:30], backend="cuda", k=1)
    assert len(served) == 3
    leaf = soft[:1].clone().requires_grad_()
    refine_and_scan(SoftQuery(base[:1], leaf, 0.7), rows[:30], backend="cuda", k=1)[1].scores.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
