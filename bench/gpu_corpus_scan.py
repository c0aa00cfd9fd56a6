"""corpus_scan on a GPU: top-k and InfoNCE over one million 2048-d bfloat16 rows, beside its peers and reading the rows once.

The peers are torch, and FAISS-GPU, cuVS and FlashLib where they are installed. Every answer is checked at full size, against
float64, before it is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import TritonError

from bench import exact
from bench.gpu import milliseconds, replayed, workspace
from bench.harness import Measurement, mib_at_most, milliseconds_at_most, within
from vsr1.ops import last_backend
from vsr1.ops.corpus_scan import CorpusMatrix, ScanResult, SoftQuery, info_nce, refine_and_scan, scan

_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "ops"
TESTS = sorted({str(path) for kind in ("triton", "cuda") for path in _FOLDER.glob(f"test_corpus_*{kind}*.py")})
_KERNELS = f"{_FOLDER / 'test_corpus_scan_triton.py'}::"
SANITIZED = [
    _KERNELS + name
    for name in (
        "test_ties_nan_and_infinities",
        "test_cuda_ties_nan_and_infinities",
        "test_the_best_rows_may_share_a_group",
        "test_select_takes_the_first_of_equals",
    )
]
N, D = 1_000_000, 2048
COUNTS = (1, 8, 16, 32, 64, 128, 512)  # queries
KS = (10, 100)
INT8_COUNTS = (1, 8, 64, 128)  # queries of the int8 rows
REFINED = (1, 8, 16)  # as many as the CUDA kernel refines
COUNT = len(COUNTS) * (1 + len(KS)) + len(INT8_COUNTS) * len(KS) + len(REFINED)
"""How many measurements there are."""
TEMPERATURE = 0.07
TOKENS = 8  # soft tokens of a query
ROUNDING = 2e-6
"""Of scores of unit vectors, summed in float32."""
SCORE_ROUNDING = 2.0**-10
"""Of scores that are rounded to bfloat16; the best ones are below a quarter."""
NOTES: dict[str, str] = {}
"""Case: one line on why it misses its goal."""

Search = Callable[[Tensor, int], Tensor]
"""Queries (B, D) and k in, ids (B, k) out."""


def measurements() -> Iterator[Measurement]:
    """For each number of queries: top-10 and top-100 of the bfloat16 rows and of int8 rows, InfoNCE with its gradient."""
    rows = exact.unit_rows(N, D, torch.bfloat16, "cuda")
    floor = reading(rows)
    queries = exact.unit_rows(max(COUNTS), D, torch.bfloat16, "cuda", seed=1)
    truth = exact.top(queries, rows, max(KS))
    positive = torch.arange(max(COUNTS), device="cuda")
    loss_truth = exact.info_nce(queries, rows, positive, TEMPERATURE)
    searches, absent = peers(rows)
    matrix = CorpusMatrix(rows).quantize()
    code_floor = reading(matrix.quantized.codes)
    for count in COUNTS:
        query = queries[:count]
        for k in KS:
            line = top_k(query, rows, k, truth, searches)
            line.floor, line.absent = floor, {**absent, **line.absent}
            line.held_to(
                *([milliseconds_at_most(4.0), mib_at_most(64)] if count == 512 else [milliseconds_at_most(1.45)])
            )
            yield line
            if k == KS[0]:
                alone = line.ms
            if count in INT8_COUNTS:
                yield int8(query, rows, matrix, k, truth, line.ms, code_floor)
        line = loss_and_gradient(query, rows, positive[:count], loss_truth)
        line.floor, line.peers["own top-k"] = floor, alone
        yield line.held_to(*([within(1.5 if count <= 16 else 2.2, "own top-k")] if count in (1, 8, 16, 128) else []))
        if count in REFINED:
            yield refining(query, rows, floor)


def refining(query: Tensor, rows: Tensor, floor: float) -> Measurement:
    """The soft-query update with top-10 and softmax, in one call and in two; both must give the same bits for one query."""
    generator = torch.Generator("cuda").manual_seed(2)
    soft = torch.randn(len(query), TOKENS, D, device="cuda", generator=generator)
    state = SoftQuery(query, F.normalize(soft, dim=2).bfloat16(), 0.5)
    fused = partial(refine_and_scan, state, rows, k=KS[0], temperature=TEMPERATURE)
    made, found = fused()
    backend = last_backend()
    again = scan(made, rows, k=KS[0], temperature=TEMPERATURE)
    for name in ("scores", "ids", "lse", "expected"):
        if not torch.equal(getattr(found, name), getattr(again, name)):
            raise AssertionError(f"refine_and_scan and scan do not agree about {name}")
    if (made.float() - state.query().float()).abs().max() > 2.0**-7 * made.float().abs().max():
        raise AssertionError("refine_and_scan does not make the query that query() makes")
    apart = partial(refine_apart, state, rows)
    case = case_of(f"refine_and_scan of {TOKENS} tokens", len(query))
    return Measurement(
        case, replayed(fused), rows.nbytes, floor=floor, backend=backend, eager=milliseconds(fused), mib=workspace(fused),
        peers={"own query(), scan()": replayed(apart)}, note=NOTES.get(case, ""),
    )  # fmt: skip


def refine_apart(state: SoftQuery, rows: Tensor) -> ScanResult:
    return scan(state.query(), rows, k=KS[0], temperature=TEMPERATURE)


def case_of(what: str, count: int) -> str:
    return f"bf16 {N:,} x {D}, {what}, B = {count}"


def top_k(query: Tensor, rows: Tensor, k: int, truth: exact.Top, searches: dict[str, Search]) -> Measurement:
    ours = partial(scan, query, rows, k=k)
    found = ours()
    backend = last_backend()
    wanted = exact.Top(truth.scores[: len(query)], truth.ids[: len(query)])
    exact.check_top("vsr1", query, rows, found.ids, wanted, ROUNDING)
    exact.check_scores("vsr1", query, rows, found.ids, found.scores, ROUNDING)
    times, failed = {}, {}
    for name, search in searches.items():
        try:
            ids = search(query, k)
            exact.check_top(name, query, rows, ids, wanted, PEER_ROUNDING[name])
            times[name] = milliseconds(partial(search, query, k))
        except (RuntimeError, TritonError) as error:  # a peer that cannot do this shape keeps nobody from the others
            failed[name] = (
                f"{k} of {len(query)} queries: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
    case = case_of(f"top-{k}", len(query))
    return Measurement(
        case, replayed(ours), rows.nbytes, backend=backend, eager=milliseconds(ours), mib=workspace(ours), peers=times,
        absent=failed, note=NOTES.get(case, ""),
    )  # fmt: skip


def reading(array: Tensor) -> float:
    """Milliseconds of reading every byte once, in the faster of two ways."""
    return min(milliseconds(array.view(torch.int64).sum), milliseconds(array.view(torch.float32).amax))


def int8(
    query: Tensor, rows: Tensor, matrix: CorpusMatrix, k: int, truth: exact.Top, bf16: float, floor: float
) -> Measurement:
    ours = partial(scan, query, matrix, k=k)
    found = ours()
    backend = last_backend()
    if not torch.equal(found.ids, truth.ids[: len(query), :k]):
        raise AssertionError("exact int8 does not return the rows of float64, in that order")
    exact.check_scores("vsr1", query, rows, found.ids, found.scores, ROUNDING)
    case = f"exact int8 {N:,} x {D}, top-{k}, B = {len(query)}"
    line = Measurement(
        case, replayed(ours), rows.numel(), floor=floor, backend=backend, eager=milliseconds(ours), mib=workspace(ours),
        peers={"own bf16": bf16}, note=NOTES.get(case, ""),
    )  # fmt: skip
    return line.held_to(milliseconds_at_most(0.75))


def loss_and_gradient(query: Tensor, rows: Tensor, positive: Tensor, truth: tuple[Tensor, Tensor]) -> Measurement:
    leaf = query.clone().requires_grad_()

    def value_and_gradient(loss_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        loss = loss_of()
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    def torch_loss() -> Tensor:
        return F.cross_entropy((leaf @ rows.T).float() / TEMPERATURE, positive, reduction="none")

    ours = partial(value_and_gradient, partial(info_nce, leaf, rows, positive, TEMPERATURE))
    plain = partial(value_and_gradient, torch_loss)
    answer = ours()
    backend = last_backend()
    exact.check_info_nce("vsr1", answer, truth, 1e-4, torch.finfo(torch.bfloat16).eps)
    exact.check_info_nce("torch", plain(), truth, SCORE_ROUNDING / TEMPERATURE, 4 * torch.finfo(torch.bfloat16).eps)
    case = case_of("InfoNCE and its gradient", len(query))
    return Measurement(
        case, replayed(ours), rows.nbytes, backend=backend, eager=milliseconds(ours), mib=workspace(ours),
        peers={"torch": milliseconds(plain)}, note=NOTES.get(case, ""),
    )  # fmt: skip


def peers(rows: Tensor) -> tuple[dict[str, Search], dict[str, str]]:
    """The searches of those that are installed, and why the others are absent."""
    searches: dict[str, Search] = {"torch": lambda query, k: (query @ rows.T).topk(k, dim=1).indices}
    absent = {}
    for name, make in {"FAISS": faiss_gpu, "cuVS": cuvs_brute_force, "FlashLib": flashlib_knn}.items():
        try:
            searches[name] = make(rows)
        except (ImportError, OSError, RuntimeError) as error:  # not installed, or not for this machine
            absent[name] = str(error)
    return searches, absent


PEER_ROUNDING = {"torch": SCORE_ROUNDING, "FAISS": SCORE_ROUNDING, "cuVS": 1e-4, "FlashLib": SCORE_ROUNDING}
"""torch and FAISS may round scores to bfloat16; cuVS searches the same values in half precision; FlashLib ranks by distance,
which the rounding of the rows' lengths moves against the inner product."""


def faiss_gpu(rows: Tensor) -> Search:
    faiss = importlib.import_module("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("the faiss that is installed is built for CPUs")
    importlib.import_module("faiss.contrib.torch_utils")  # lets knn_gpu take tensors, on torch's stream
    resources = faiss.StandardGpuResources()
    return lambda query, k: faiss.knn_gpu(resources, query, rows, k, metric=faiss.METRIC_INNER_PRODUCT)[1]


def cuvs_brute_force(rows: Tensor) -> Search:
    brute_force = importlib.import_module("cuvs.neighbors.brute_force")
    refusal = importlib.import_module("cuvs.common.exceptions").CuvsException
    handle = importlib.import_module("cuvs.common").Resources(stream=torch.cuda.current_stream().cuda_stream)
    half = rows.half()  # it takes float32 and float16; these values lose nothing worth a name
    index = brute_force.build(half, metric="inner_product", resources=handle)
    handle.sync()

    def search(query: Tensor, k: int) -> Tensor:
        ids = torch.empty(
            len(query), k, dtype=torch.int64, device=half.device
        )  # `half` lives as long as what points at it
        distances = torch.empty(len(query), k, dtype=torch.float32, device=half.device)
        try:
            brute_force.search(index, query.half(), k, neighbors=ids, distances=distances, resources=handle)
        except refusal as error:
            raise RuntimeError(str(error)) from error
        return ids

    return search


def flashlib_knn(rows: Tensor) -> Search:
    flash_knn = importlib.import_module("flashlib.primitives.knn").flash_knn
    return lambda query, k: flash_knn(query, rows, k, return_distances=False)
