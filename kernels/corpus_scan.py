"""The sweep of the corpus on a GPU.

One program scores a tile of queries against a tile of rows with a matrix product, and keeps of the B x n scores only what the
merge needs. Of every group of 32 rows (more for many queries): its highest score, and in one word its runner-up and who won. Of
every tile: its log-sum-exp (peak and mass). Of the corpus: how many scores lie above the positive's and how many are NaN. So
the corpus is read once for all query tiles that run side by side (the query tile is the fastest grid axis, later readers of a
row tile find it in L2), and what is written is a sixteenth of the scores.

Why groups are enough for an exact top-k: order groups by (maximum descending, group number ascending). If row r with score s is
in a group behind the first k groups, each of those k groups holds a row with a higher score, or an equal one and a lower number;
so r is not among the top k. Of the first k groups, a row that did not win its group can be among the top k only if it reaches
the lowest of the k maxima, and the runner-up says whether any does: `gather_kernel` scores the winner alone, or the whole group
where the runner-up reaches that bar. So k rows a query are read again, k x 32 at worst, and k is a plain number: no kernel is
recompiled when N, B or k change. All that is returned was scored by `gather_kernel`, so copies of a row tie. The two scorings
add in different orders: rows whose scores differ by float32 rounding alone may trade places.

Precision. Products of equal half types go to the tensor cores and are accumulated in float32; any other pair of types is widened
to float32 and multiplied in full precision. The sweep is bound by reading the rows up to 128 queries, by the product above.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_scores(
    query, rows, o_b, o_row, m_b, m_row, D, query_stride, row_stride,
    UPCAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """b_scores (BLOCK_B, BLOCK_N) of the queries o_b and the rows o_row (int64): float32, of int8 matrices int32."""
    b_scores = tl.zeros((BLOCK_B, BLOCK_N), tl.int32 if rows.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_query = tl.load(
            query + o_b[:, None] * query_stride + o_d[None, :], mask=m_b[:, None] & m_d[None, :], other=0.0
        )
        b_rows = tl.load(
            rows + o_row[None, :] * row_stride + o_d[:, None], mask=m_row[None, :] & m_d[:, None], other=0.0
        )
        if UPCAST:
            b_query = b_query.to(tl.float32)
            b_rows = b_rows.to(tl.float32)
        b_scores = tl.dot(b_query, b_rows, b_scores, input_precision="ieee", out_dtype=b_scores.dtype)
    return b_scores


@triton.jit
def bulk_tile_scores(
    query, rows, first_query, first_row, D, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The same of consecutive queries and rows, through Hopper's copy engine: query and rows are tensor descriptors."""
    b_scores = tl.zeros((BLOCK_B, BLOCK_N), tl.int32 if rows.dtype == tl.int8 else tl.float32)
    for start in range(0, D, BLOCK_D):
        b_query = query.load([first_query, start])
        b_rows = rows.load([first_row, start])
        b_scores = tl.dot(b_query, b_rows.T, b_scores, out_dtype=b_scores.dtype)
    return b_scores


@triton.jit
def own_tile(first_tile, B, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's row tile, first query, queries and rows (int64): the query tile is the fastest axis of the grid."""
    query_tiles = tl.cdiv(B, BLOCK_B)
    tile = first_tile + tl.program_id(0) // query_tiles
    first_query = (tl.program_id(0) % query_tiles) * BLOCK_B
    o_b = first_query + tl.arange(0, BLOCK_B).to(tl.int64)
    o_row = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return tile, first_query, o_b, o_row


@triton.jit(do_not_specialize=["first_tile", "N", "B", "E", "groups", "chunk"])
def sweep_kernel(
    query, rows, exclude, positive, bar, maxima, runner_up, nan_count, greater, peak, mass, weights, chunk_peak, unclean,
    first_tile, N, B, D, E, groups, chunk, weight_stride, query_stride, row_stride, temperature,
    BULK: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """maxima and runner_up (B, groups); nan_count and greater (B,), added to; peak and mass (row tiles, B).

    Optional are exclude; positive with bar and greater; peak with mass; and weights (B, rows from first_tile on), the tile's
    exp((score - peak) / temperature), with chunk_peak and unclean (chunks, ...), raised to the highest peak and to 1 where a
    score is not finite.
    """
    tile, first_query, o_b, o_row = own_tile(first_tile, B, BLOCK_B, BLOCK_N)
    m_b = o_b < B
    m_row = o_row < N
    if BULK:
        b_scores = bulk_tile_scores(query, rows, first_query, tile * BLOCK_N, D, BLOCK_B, BLOCK_N, BLOCK_D)
    else:
        b_scores = tile_scores(
            query, rows, o_b, o_row, m_b, m_row, D, query_stride, row_stride, UPCAST, BLOCK_B, BLOCK_N, BLOCK_D
        )
    if weights is not None:
        b_unclean = tl.where(tl.abs(b_scores) < float("inf"), 0, m_row[None, :].to(tl.int32))
        tl.atomic_max(unclean + chunk, 1, mask=tl.sum(b_unclean) > 0, sem="relaxed")
    b_scores = tl.where(m_row[None, :], b_scores, float("-inf"))
    if exclude is not None:
        for e in range(E):
            b_out = tl.load(exclude + o_b * E + e, mask=m_b, other=-1)
            b_scores = tl.where(o_row[None, :] == b_out[:, None], float("-inf"), b_scores)
    m_nan = b_scores != b_scores
    b_scores = tl.where(m_nan, float("-inf"), b_scores)

    b_nan = tl.sum(m_nan.to(tl.int32), axis=1)
    tl.atomic_add(nan_count + o_b, b_nan, mask=m_b & (b_nan > 0), sem="relaxed")
    if positive is not None:
        b_bar = tl.load(bar + o_b, mask=m_b, other=float("inf"))
        b_positive = tl.load(positive + o_b, mask=m_b, other=-1)
        m_above = (b_scores > b_bar[:, None]) & (o_row[None, :] != b_positive[:, None])
        b_above = tl.sum(m_above.to(tl.int32), axis=1)
        tl.atomic_add(greater + o_b, b_above, mask=m_b & (b_above > 0), sem="relaxed")
    if peak is not None:
        b_peak = tl.max(b_scores, axis=1)
        b_level = tl.where(b_peak == float("-inf"), 0.0, b_peak)
        b_weights = tl.exp((b_scores - b_level[:, None]) * (1.0 / temperature))
        tl.store(peak + tile.to(tl.int64) * B + o_b, b_peak, mask=m_b)
        tl.store(mass + tile.to(tl.int64) * B + o_b, tl.sum(b_weights, axis=1), mask=m_b)
        if weights is not None:
            o_weight = (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
            p_weights = weights + o_b[:, None] * weight_stride + o_weight[None, :]
            tl.store(p_weights, b_weights.to(weights.dtype.element_ty), mask=m_b[:, None])
            tl.atomic_max(chunk_peak + chunk * B + o_b, b_peak, mask=m_b, sem="relaxed")

    b_grouped = tl.reshape(b_scores, (BLOCK_B, BLOCK_N // GROUP, GROUP))
    b_best, b_winner = tl.max(b_grouped, axis=2, return_indices=True)
    b_winner = b_winner.to(tl.int32)
    m_winner = tl.arange(0, GROUP)[None, None, :] == b_winner[:, :, None]
    b_second = tl.max(tl.where(m_winner, float("-inf"), b_grouped), axis=2)
    b_word = (b_second.to(tl.int32, bitcast=True) & -GROUP) | b_winner
    o_group = tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    o_out = o_b[:, None] * groups + o_group[None, :]
    m_out = m_b[:, None] & (o_group < groups)[None, :]
    tl.store(maxima + o_out, b_best, mask=m_out)
    tl.store(runner_up + o_out, b_word, mask=m_out)


@triton.jit(do_not_specialize=["B"])
def positive_kernel(
    query, rows, positive, scores, B, D, query_stride, row_stride,
    UPCAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores (B,): each query's positive, in the sweep's own arithmetic, so that a copy of that row ties with it."""
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    o_column = tl.arange(0, BLOCK_N)
    m_b = o_b < B
    o_query = tl.program_id(0) * BLOCK_B + o_column
    b_row = tl.load(positive + o_query, mask=(o_column < BLOCK_B) & (o_query < B), other=-1)
    b_scores = tile_scores(
        query, rows, o_b, b_row, m_b, b_row >= 0, D, query_stride, row_stride, UPCAST, BLOCK_B, BLOCK_N, BLOCK_D
    )
    m_own = tl.arange(0, BLOCK_B)[:, None] == o_column[None, :]
    b_own = tl.sum(tl.where(m_own, b_scores, 0.0), axis=1)
    known = tl.load(positive + o_b, mask=m_b, other=-1) >= 0
    tl.store(scores + o_b, tl.where(known, b_own, float("nan")), mask=m_b)


@triton.jit(do_not_specialize=["width", "stride", "k", "chunks"])
def select_kernel(
    values, ids, wanted, best, best_ids, width, stride, k, chunks, KEY: tl.constexpr, BLOCK: tl.constexpr
):
    """best, best_ids (B, chunks, k): of each BLOCK columns of values (B, width) the k highest, equal ones in column order.

    They keep the order of the columns; -inf and -1 fill up. ids (B, width) names the columns, None means their numbers. wanted
    (B,) is 0 where nothing is to be done. KEY is the integer type as wide as values.
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    if wanted is not None:  # noqa: SIM102 (a compile-time choice)
        if tl.load(wanted + b) == 0:
            return
    o_column = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < width
    b_values = tl.load(values + b * stride + o_column, mask=m_column, other=float("-inf"))
    bits = tl.where(b_values == 0.0, 0.0, b_values).to(KEY, bitcast=True)  # -0.0 equals 0.0
    highest_bit: tl.constexpr = KEY.primitive_bitwidth - 2
    b_keys = tl.where(bits < 0, bits ^ ((1 << (highest_bit + 1)) - 1), bits)  # integers in the order of the values
    # The k-th highest key, bit by bit: the largest number that at least k keys reach; any that exactly k reach will do.
    reached = tl.sum((b_keys >= 0).to(tl.int32))
    bar = tl.where(reached >= k, 0, -(1 << (highest_bit + 1))).to(KEY)
    bit = highest_bit
    while (bit >= 0) & (reached != k):
        trial = bar | (tl.full((), 1, KEY) << bit)
        count = tl.sum((b_keys >= trial).to(tl.int32))
        bar = tl.where(count >= k, trial, bar)
        reached = tl.where(count >= k, count, reached)
        bit -= 1
    m_above = b_keys > bar
    m_equal = b_keys == bar
    room = k - tl.sum(m_above.to(tl.int32))
    m_taken = m_above | (m_equal & (tl.cumsum(m_equal.to(tl.int32)) <= room))
    m_taken = m_taken & (b_values > float("-inf"))
    if ids is None:  # noqa: SIM108 (a compile-time choice)
        b_ids = o_column.to(tl.int64)
    else:
        b_ids = tl.load(ids + b * width + o_column, mask=m_column, other=-1)
    first = tl.program_id(0).to(tl.int64) * k
    o_taken = first + tl.cumsum(m_taken.to(tl.int32)) - 1
    tl.store(best + o_taken, b_values, mask=m_taken)
    tl.store(best_ids + o_taken, b_ids, mask=m_taken)
    o_fill = tl.arange(0, BLOCK)
    m_fill = (o_fill >= tl.sum(m_taken.to(tl.int32))) & (o_fill < k)
    tl.store(best + first + o_fill, float("-inf"), mask=m_fill)
    tl.store(best_ids + first + o_fill, -1, mask=m_fill)


@triton.jit(do_not_specialize=["N", "E", "groups", "chosen"])
def gather_kernel(
    query, rows, runner_up, exclude, group_ids, lowest, ids, scores,
    N, E, D, groups, chosen, query_stride, row_stride, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ids and scores (B, chosen, GROUP): the rows of each chosen group that can be among the best; others -1 and -inf.

    group_ids (B, chosen) as `select` gives them, lowest (B,) the least of their maxima, -inf if
    fewer than chosen groups exist.
    """
    b = (tl.program_id(0) // chosen).to(tl.int64)
    group = tl.load(group_ids + tl.program_id(0))
    word = tl.load(runner_up + b * groups + group, mask=group >= 0, other=0)
    # The winner's number took the place of the low bits: the runner-up's score is at most this.
    second = tl.where(word < 0, word & -GROUP, word | (GROUP - 1)).to(tl.float32, bitcast=True)
    first = word & (GROUP - 1)
    last = first + 1
    alone = second < tl.load(lowest + b)  # false also where +inf and the winner's number made a NaN
    first = tl.where(alone, first, 0)
    last = tl.where(alone, last, GROUP)
    last = tl.minimum(last.to(tl.int64), N - group * GROUP)
    last = tl.where(group >= 0, last, 0).to(tl.int32)
    o_member = tl.arange(0, GROUP)
    b_scores = tl.full((GROUP,), float("-inf"), tl.float32)
    for member in range(first, last):
        row = group * GROUP + member
        b_sum = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, D, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            b_query = tl.load(query + b * query_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            b_sum += tl.load(rows + row * row_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32) * b_query
        score = tl.sum(b_sum)
        if exclude is not None:
            for e in range(E):
                score = tl.where(tl.load(exclude + b * E + e) == row, float("-inf"), score)
        score = tl.where(score == score, score, float("-inf"))
        b_scores = tl.where(o_member == member, score, b_scores)
    o_out = tl.program_id(0).to(tl.int64) * GROUP + o_member
    tl.store(scores + o_out, b_scores)
    tl.store(ids + o_out, tl.where(b_scores > float("-inf"), group * GROUP + o_member, -1))


def blocks(query: Tensor, rows: Tensor, bulk: bool = False, lean: bool = False) -> dict[str, Any]:
    """The tile sizes and launch options for these dtypes and this number of queries.

    `bulk` says whether the copy engine serves, `lean` that nothing but the maxima is asked for. Chosen so that ptxas spills
    no register in a product's loop on sm_80 and sm_90, and among those by the time on an H100.
    """
    half = query.dtype == rows.dtype and rows.dtype != torch.float32
    size = min(128 if half else 32, max(16, triton.next_power_of_2(query.shape[0])))
    options: dict[str, Any] = {"UPCAST": not half, "BLOCK_B": size, "BLOCK_N": 128, "BLOCK_D": 64}
    if not half:
        return {**options, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    if size < 128:
        return {**options, "BLOCK_N": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": {16: 5, 32: 4, 64: 3}[size]}
    if not bulk:
        return {**options, "num_warps": 8, "num_stages": 3}
    if not lean:  # 128 registers leave room for a second program on a multiprocessor: 8 % less time, spills included
        return {**options, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
    if query.shape[0] > 128:
        return {**options, "BLOCK_N": 256, "num_warps": 8, "num_stages": 4}
    return {**options, "num_warps": 4, "num_stages": 3}


def group_size(queries: int) -> int:
    """Rows that share one maximum; more of them for many queries, so that 512 queries x 1M rows leave 31 MiB."""
    return 32 if queries <= 128 else 64 if queries <= 256 else 128


def select_block(k: int) -> int:
    """Columns that one program of `select_kernel` looks at: at least 2 k, so that every round at least halves what is left."""
    return 2048 if k <= 1024 else 4096


def bulk_serves(*matrices: Tensor) -> bool:
    """Whether the copy engine takes these: Hopper or newer, rows that begin at multiples of 16 bytes."""
    return all(
        matrix.is_cuda
        and torch.cuda.get_device_capability(matrix.device) >= (9, 0)
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.stride(0) >= matrix.shape[1]
        for matrix in matrices
    )


class Sweep(NamedTuple):
    """What one sweep leaves; None where not asked for.

    maxima (B, groups) float32; runner_up (B, groups) int32: in the low bits which row of the group won, in the others the
    runner-up's score; nan_count and greater (B,) int32; peak and mass (row tiles, B) float32; expected (B, D) float32, the sum of
    exp((score - highest score) / temperature) x row; positive_score (B,) float32, NaN for a positive of -1.
    """

    maxima: Tensor
    runner_up: Tensor
    nan_count: Tensor
    greater: Tensor | None
    peak: Tensor | None
    mass: Tensor | None
    expected: Tensor | None
    positive_score: Tensor | None


def sweep(
    query: Tensor,
    rows: Tensor,
    exclude: Tensor | None,
    positive: Tensor | None,
    temperature: float | None,
    second_pass: Any = None,
) -> Sweep:
    """The first pass over the rows, and chunk by chunk the second one, for `expected`.

    query (B, D), rows (N, D), B and N > 0; exclude (B, E) int64; positive (B,) int64 asks for positive_score and for `greater`,
    the count of scores above it; temperature for peak and mass; second_pass is `SecondPass` of corpus_expected.py to ask for
    expected, which needs a temperature.
    """
    B, D = query.shape
    N = rows.shape[0]
    bulk = query.dtype == rows.dtype != torch.float32 and bulk_serves(query, rows)
    options = blocks(query, rows, bulk, lean=exclude is None and positive is None and temperature is None)
    block_rows, group = options["BLOCK_N"], group_size(B)
    tiles, groups = triton.cdiv(N, block_rows), triton.cdiv(N, group)

    def new(asked: bool, dtype: torch.dtype, *shape: int) -> Tensor | None:
        return torch.zeros(shape, dtype=dtype, device=query.device) if asked else None

    maxima = torch.empty((B, groups), dtype=torch.float32, device=query.device)
    runner_up = torch.empty((B, groups), dtype=torch.int32, device=query.device)
    nan_count = torch.zeros(B, dtype=torch.int32, device=query.device)
    greater = new(positive is not None, torch.int32, B)
    peak = new(temperature is not None, torch.float32, tiles, B)
    mass = new(temperature is not None, torch.float32, tiles, B)
    second = None if second_pass is None else second_pass.start(query, rows, block_rows, options["UPCAST"], bulk)
    chunk_tiles = tiles if second is None else second.chunk_tiles
    positive_score = bar = None
    if positive is not None:
        positive_score = positive_scores(query, rows, positive)
        bar = positive_score.masked_fill(positive_score.isnan(), float("-inf"))
    sources = query, rows
    if bulk:
        sources = (
            TensorDescriptor.from_tensor(query, [options["BLOCK_B"], options["BLOCK_D"]]),
            TensorDescriptor.from_tensor(rows, [block_rows, options["BLOCK_D"]]),
        )
    for chunk, first in enumerate(range(0, tiles, chunk_tiles)):
        count = min(chunk_tiles, tiles - first)
        sweep_kernel[(count * triton.cdiv(B, options["BLOCK_B"]),)](
            *sources, exclude, positive, bar, maxima, runner_up, nan_count, greater, peak, mass,
            *((None, None, None) if second is None else (second.weights, second.peak, second.unclean)),
            first, N, B, D, 0 if exclude is None else exclude.shape[1], groups, chunk,
            0 if second is None else second.weights.shape[1], query.stride(0), rows.stride(0), temperature or 1.0,
            BULK=bulk, GROUP=group, **options,
        )  # fmt: skip
        if second is not None:
            second.add(rows, peak, chunk, temperature)
    total = None if second is None else second.partial.sum(dim=0)
    return Sweep(maxima, runner_up, nan_count, greater, peak, mass, total, positive_score)


def positive_scores(query: Tensor, rows: Tensor, positive: Tensor) -> Tensor:
    """(B,) float32 scores of the positive rows as `sweep` computes them, NaN for -1."""
    options = blocks(query, rows)
    options["BLOCK_N"] = max(options["BLOCK_N"], options["BLOCK_B"])
    B, D = query.shape
    scores = torch.empty(B, dtype=torch.float32, device=query.device)
    positive_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
        query, rows, positive, scores, B, D, query.stride(0), rows.stride(0), **options
    )
    return scores


def select(values: Tensor, ids: Tensor | None, k: int, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k highest columns of values (B, width) in column order: values (B, k) and their ids (B, k) int64.

    values are float32 or float64. Of equal columns the first ones; -inf is never taken; -inf and -1 fill up. ids (B, width) int64
    or None for column numbers. wanted (B,) integers or None: what is returned for a query with 0 is undefined.
    """
    block = select_block(k)
    key = tl.int64 if values.dtype == torch.float64 else tl.int32
    while True:
        B, width = values.shape
        chunks = max(1, triton.cdiv(width, block))
        best = torch.empty((B, chunks * k), dtype=values.dtype, device=values.device)
        best_ids = torch.empty((B, chunks * k), dtype=torch.int64, device=values.device)
        if best.numel():
            select_kernel[(B * chunks,)](
                values, ids, wanted, best, best_ids, width, values.stride(0), k, chunks,
                KEY=key, BLOCK=block, num_warps=4,
            )  # fmt: skip
        if chunks == 1 or k == 0:
            return best[:, :k], best_ids[:, :k]
        values, ids = best, best_ids


def gather_scores(
    query: Tensor,
    rows: Tensor,
    swept: Sweep,
    first: int,
    group_scores: Tensor,
    group_ids: Tensor,
    exclude: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """scores float32 and ids int64 (n, chosen x group) of the rows in the chosen groups that may be among the best.

    query (n, D) are the queries from number `first` on; group_scores and group_ids (n, chosen) what `select` took of their
    maxima, exclude (n, E) theirs.
    """
    B, chosen = group_ids.shape
    group = group_size(swept.maxima.shape[0])
    scores = torch.empty((B, chosen * group), dtype=torch.float32, device=query.device)
    ids = torch.empty((B, chosen * group), dtype=torch.int64, device=query.device)
    if scores.numel():
        gather_kernel[(B * chosen,)](
            query, rows, swept.runner_up[first:], exclude, group_ids, group_scores.amin(dim=1), ids, scores,
            rows.shape[0], 0 if exclude is None else exclude.shape[1], query.shape[1], swept.maxima.shape[1], chosen,
            query.stride(0), rows.stride(0), GROUP=group, BLOCK_D=1024,
        )  # fmt: skip
    return scores, ids
