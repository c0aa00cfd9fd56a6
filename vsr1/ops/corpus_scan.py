"""One sweep of the corpus: the best k rows for every query and, if asked, the true row's rank and the whole softmax.

Retrieval is attention over the corpus with K = V: a block of rows is scored against all queries, its scores go into the
running top-k, the count of rows above the true one and the running log-sum-exp, and the block's softmax-weighted sum
joins the running `expected` vector; then the block is forgotten. Nothing of size B x N exists. Because `expected` is
the gradient of the log-partition, the InfoNCE loss over the whole corpus and its gradient come out of the same sweep.

Which rows count. The *selectable* rows of a query are all rows, or its `candidates`, less its `exclude`, less rows
whose score is NaN (`nan_count` says how many). Top-k, rank, lse and expected all run over exactly these; a true row
need not be selectable to have a score and a rank, and it never counts against itself. Equal scores: lower id first. A
score of -inf is never selected, a score of +inf makes lse and expected NaN. Scores are accumulated in float32.

On the CPU a score depends on its query and its row alone, not on where they stand or on the number of threads; only
between small batches and large ones (from 8, 16 or 32 queries on, by instruction set), which are summed in another
order, may the last bits differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vsr1.ops._corpus_backends import corpus_scan
from vsr1.ops._corpus_front import HiddenState, SoftQuery, refined_scan, rocchio
from vsr1.ops._corpus_int8 import corpus_scan_int8
from vsr1.ops.corpus_matrix import ROW_DTYPES, CorpusMatrix

__all__ = ["CorpusMatrix", "HiddenState", "ScanResult", "SoftQuery", "info_nce", "refine_and_scan", "rocchio", "scan"]

MAX_K = 2048


@dataclass(frozen=True)
class ScanResult:
    """What a sweep found. Fields that were not asked for are None.

    scores (B, k) float32, descending, and ids (B, k) int64; -inf and -1 where fewer than k rows were selectable.
    nan_count (B,) int64: rows that were left out because their score is NaN.
    positive_score (B,) float32; rank (B,) int64 = 1 + selectable rows with a strictly greater score (every selectable
    row if the positive's own score is NaN). NaN and -1 where positive is -1.
    lse (B,) float32 = logsumexp(score / temperature), -inf without a selectable row.
    expected (B, D) float32 = sum of the rows weighted by softmax(score / temperature), zeros without a selectable row.
    rescored (B,) int64 and fallbacks (B,) int64 where int8 codes were swept: how many rows were scored exactly, and 1
    where the codes could not tell enough rows apart, so that all of them were.
    """

    scores: Tensor
    ids: Tensor
    nan_count: Tensor
    positive_score: Tensor | None = None
    rank: Tensor | None = None
    lse: Tensor | None = None
    expected: Tensor | None = None
    rescored: Tensor | None = None
    fallbacks: Tensor | None = None


def scan(
    query: Tensor,
    corpus: Any,
    *,
    k: int,
    positive: Tensor | None = None,
    temperature: float | None = None,
    exclude: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str = "auto",
) -> ScanResult:
    """Sweep the corpus once for all queries.

    query (B, D) float32, bfloat16 or float16 on the corpus' device; corpus a `CorpusMatrix` or anything it wraps.
    k in [0, 2048].
    positive (B,) int64 rows, -1 for "not known": asks for positive_score and rank.
    temperature > 0: asks for lse and expected.
    exclude (B, E) int64 rows that are left out, -1 padded.
    candidates (B, C) int64 rows, -1 padded: only these are scored; a row listed twice counts once.
    backend "auto", "cpu" (compiled C++; float32 and bfloat16 rows), "cuda" (Ampere GPUs and newer, up to 16 queries of
    1024, 1536 or 2048 half-type components), "triton" (GPU) or "reference" (torch).
    The int64 arguments may lie on the CPU or with the corpus.

    A quantized corpus (`CorpusMatrix.quantize`) is swept by its codes where the best k are all that is asked for, with
    or without `exclude`: the result is that of scoring every row in float64. Whatever else is asked for is computed
    from the rows themselves.

    scores, positive_score and lse are differentiable in query; the corpus gets no gradient. Differentiating scores
    gathers (B, k, D) rows in the backward pass.

    Raises ValueError or TypeError for arguments that do not fit (row numbers outside the corpus are an error on CPU; on
    CUDA, where looking would stall the stream, they count as -1), BackendUnavailable for a named backend that cannot
    serve.
    """
    matrix = corpus if isinstance(corpus, CorpusMatrix) else CorpusMatrix(corpus)
    _check_query(query, matrix)
    asked = _asked(query.shape[0], matrix, k, positive, temperature, exclude, candidates, backend)
    if matrix.quantized is not None and positive is None and temperature is None and candidates is None:
        codes = matrix.quantized
        *_, left_out, _, _ = asked
        scores, ids, nan_count, rescored, fallbacks = corpus_scan_int8(
            query, matrix.rows, codes.codes, codes.scales, codes.residuals, k, left_out, backend
        )
        return ScanResult(scores, ids, nan_count, rescored=rescored, fallbacks=fallbacks)
    return _result(corpus_scan(query, *asked), asked)


def info_nce(
    query: Tensor,
    corpus: Any,
    positive: Tensor,
    temperature: float,
    candidates: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE loss of every query against the whole corpus, or against `candidates`, without a (B, N) tensor.

    query (B, D), corpus (N, D), positive (B,) int64 rows, candidates (B, C) int64 rows, -1 padded; the positive takes
    part whether it is listed or not, once. Returns (B,) float32, >= 0 up to rounding:
    logsumexp(score / temperature) - positive_score / temperature, differentiable in query with gradient
    (expected - V_positive) / temperature. Source: van den Oord et al. 2018, equation 4.
    Raises as `scan` does; a positive of -1 gives NaN.
    """
    matrix = corpus if isinstance(corpus, CorpusMatrix) else CorpusMatrix(corpus)
    _check_query(query, matrix)
    _check_temperature(temperature)
    positive_rows = _rows_argument("positive", positive, query.shape[0], 1, matrix.device)
    if positive_rows is None:
        raise TypeError("positive is None; info_nce needs the true row of every query")
    candidate_rows = _rows_argument("candidates", candidates, query.shape[0], 2, matrix.device)
    if candidate_rows is not None:
        candidate_rows = torch.cat([candidate_rows, positive_rows[:, None]], dim=1)
    with_gradient = query.requires_grad and torch.is_grad_enabled()
    outputs = corpus_scan(
        query, matrix.rows, 0, positive_rows, float(temperature), with_gradient, None, candidate_rows, backend
    )
    return outputs[5] - outputs[3] / temperature


def refine_and_scan(state: HiddenState | SoftQuery, corpus: Any, **options: Any) -> tuple[Tensor, ScanResult]:
    """Make the query out of `state`, scan with it, and return both: query (B, D) of length 1 and the `ScanResult`.

    `options` are those of `scan` (k, positive, ...). Differentiable in the tensors of `state`.

    Where the "cuda" backend sweeps rows and no gradient is asked for, the sweep's own launch makes the query, if everything
    in `state` has the rows' half type (a gate aside); a head adds one launch before it. Elsewhere it is one call:
    `state.query()`, then the scan. The query is the one that was scored, bit for bit: `scan(query, ...)` gives the same
    result. Raises as `scan` does.
    """
    matrix = corpus if isinstance(corpus, CorpusMatrix) else CorpusMatrix(corpus)
    if matrix.quantized is not None or (torch.is_grad_enabled() and state.needs_gradient()):
        query = state.query()
        return query, scan(query, matrix, **options)
    _check_query(state.outline(), matrix)
    asked = _asked(len(state.outline()), matrix, **options)
    query, *outputs = refined_scan(*state.parts(), *asked)
    return query, _result(outputs, asked)


def _asked(
    count: int,
    matrix: CorpusMatrix,
    k: int,
    positive: Tensor | None = None,
    temperature: float | None = None,
    exclude: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """The arguments of the op behind the query, checked: those of `scan` for `count` queries."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is a {type(k).__name__}; expected an int")
    if not 0 <= k <= MAX_K:
        raise ValueError(f"k is {k}; expected 0 <= k <= {MAX_K}")
    if temperature is not None:
        _check_temperature(temperature)
    return (
        matrix.rows,
        k,
        _rows_argument("positive", positive, count, 1, matrix.device),
        None if temperature is None else float(temperature),
        temperature is not None,
        _rows_argument("exclude", exclude, count, 2, matrix.device),
        _rows_argument("candidates", candidates, count, 2, matrix.device),
        backend,
    )


def _result(outputs: Sequence[Tensor], asked: tuple[Any, ...]) -> ScanResult:
    """The op's outputs, less those that were not asked for."""
    _, _, positive, temperature, *_ = asked
    scores, ids, nan_count, positive_score, rank, lse, expected = outputs
    result = ScanResult(scores, ids, nan_count)
    if positive is not None:
        result = replace(result, positive_score=positive_score, rank=rank)
    if temperature is not None:
        result = replace(result, lse=lse, expected=expected)
    return result


def _check_query(query: Tensor, matrix: CorpusMatrix) -> None:
    if not isinstance(query, Tensor) or query.dtype not in ROW_DTYPES:
        raise TypeError(
            f"query is {getattr(query, 'dtype', type(query).__name__)}; expected a float32, bfloat16 or float16 tensor"
        )
    if query.ndim != 2:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected (B, D)")
    if query.shape[1] != matrix.dim:
        raise ValueError(
            f"the corpus holds {matrix.dim}-d vectors; the query has {query.shape[1]}: "
            "was it built with another embedder?"
        )
    if query.device != matrix.device:
        raise ValueError(f"query is on {query.device}, the corpus on {matrix.device}: move one of them")


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number > 0")


def _rows_argument(name: str, rows: Tensor | None, count: int, ndim: int, device: torch.device) -> Tensor | None:
    if rows is None:
        return None
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        raise TypeError(
            f"{name} is {getattr(rows, 'dtype', type(rows).__name__)}; expected an int64 tensor of row numbers"
        )
    if rows.ndim != ndim or rows.shape[0] != count:
        wanted = f"({count},)" if ndim == 1 else f"({count}, n)"
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; expected {wanted}, one entry for every query")
    return rows.to(device)
