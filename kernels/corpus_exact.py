"""Exact scores for the int8 sweep: from what the groups of rows may reach to the best rows, in float64.

Behind the sweep of corpus_int8.py stand, for each query, k rows that look best; scored exactly (`score_kernel`), the least of
them is a bar that the true top k reach. `list_kernel` lists every row whose upper bound reaches the bar, the same
`score_kernel` scores the list and `rank_kernel` orders it: a row's rank is the number of rows before it, which needs no sort
and does not ask in which order the list was written.

Where the list overflows, the rows themselves are swept in float64: `exhaust_kernel` leaves the exact maximum of each group, the
best k of the groups in the order (maximum descending, number ascending) hold the top k (the argument is in corpus_scan.py),
and `replace_kernel` puts their rows into the list. All of that is launched always, since the host does not wait for the answer,
and returns at once for a query whose list holds.

The products of two half types or of two float32 are exact in float64. Every row is scored by `_exact_scores` in blocks of one
shape, so copies of a row tie wherever they stand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from vsr1.kernels.corpus_scan import select

SPARE = 1024  # places in a query's list beside those for k whole groups, which the sweep in float64 needs
LISTED = 1 << 21  # places of all lists together: 32 MiB
PROGRAMS = 4096  # that share the listed rows of all queries
ROWS, BLOCK_D = 8, 256  # of `_exact_scores`
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32: what the upper bound of a row is at least


@triton.jit
def _exact_scores(query, rows, b_row, m_row, D, row_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """b_scores (ROWS,) float64 of one query, at `query`, and the rows b_row (int64)."""
    b_sum = tl.zeros((ROWS, BLOCK_D), tl.float64)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_query = tl.load(query + o_d, mask=m_d, other=0.0).to(tl.float32).to(tl.float64)
        b_rows = tl.load(
            rows + b_row[:, None] * row_stride + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0
        )
        b_sum += b_rows.to(tl.float32).to(tl.float64) * b_query[None, :]
    return tl.sum(b_sum, axis=1)


@triton.jit
def _without(b_row, exclude, b, E):
    """b_row with -1 for those that query b leaves out."""
    if exclude is not None:
        for e in range(E):
            b_row = tl.where(b_row == tl.load(exclude + b * E + e), -1, b_row)
    return b_row


@triton.jit(do_not_specialize=["E", "width", "programs"])
def score_kernel(
    query, rows, listed, counts, best, exclude, scores, E, D, width, programs, query_stride, row_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores (B, width) float64 of the first counts[b] rows in listed (B, width); excluded ones become -1 there.

    With best (B, width), the groups' best words, listed names groups, all of them count, and their winners are scored.
    """
    b = (tl.program_id(0) // programs).to(tl.int64)
    count = width
    if counts is not None:
        count = tl.minimum(tl.load(counts + b), width).to(tl.int32)
    for first in range((tl.program_id(0) % programs) * ROWS, count, programs * ROWS):
        o_slot = first + tl.arange(0, ROWS)
        m_slot = o_slot < count
        b_row = tl.load(listed + b * width + o_slot, mask=m_slot, other=-1)
        if best is not None:
            b_word = tl.load(best + b * width + o_slot, mask=m_slot, other=0.0).to(tl.int32, bitcast=True)
            b_row = tl.where(b_row >= 0, b_row * GROUP + (b_word & (GROUP - 1)), -1)
        b_row = _without(b_row, exclude, b, E)
        b_scores = _exact_scores(query + b * query_stride, rows, b_row, b_row >= 0, D, row_stride, ROWS, BLOCK_D)
        tl.store(scores + b * width + o_slot, tl.where(b_row >= 0, b_scores, float("-inf")), mask=m_slot)
        if best is None:
            tl.store(listed + b * width + o_slot, b_row, mask=m_slot)


@triton.jit(do_not_specialize=["N", "groups", "group_stride", "chunks", "chosen", "width"])
def list_kernel(
    best, bounds, winner_scores, unit, listed, counts, N, groups, group_stride, chunks, chosen, width,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """listed (B, width) and counts (B,), added to: the rows that may reach the least of winner_scores (B, chosen).

    counts goes on where the list is full. The order of the list is that in which the programs come.
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    bar = tl.full((), float("inf"), tl.float64)
    for start in range(0, chosen, BLOCK):
        o_winner = start + tl.arange(0, BLOCK)
        b_scores = tl.load(winner_scores + b * chosen + o_winner, mask=o_winner < chosen, other=float("inf"))
        bar = tl.minimum(bar, tl.min(tl.where(b_scores == b_scores, b_scores, float("-inf"))))
    # In the sweep's unit, and rounded so that it is not above the true quotient; infinities meet the ends of the bounds.
    bar = bar / tl.load(unit + b).to(tl.float64)
    bar = tl.minimum(tl.maximum(bar, LOWEST), -LOWEST)
    bar -= tl.abs(bar) * 2.4e-7 + 1e-44
    reach = tl.maximum(bar.to(tl.float32), LOWEST)

    o_group = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    m_group = o_group < groups
    b_word = tl.load(bounds + b * group_stride + o_group, mask=m_group, other=0)
    b_own = (b_word & -65536).to(tl.float32, bitcast=True)
    b_others = (b_word << 16).to(tl.float32, bitcast=True)
    m_all = m_group & (b_others >= reach)
    m_winner = m_group & (b_own >= reach) & (b_others < reach)
    b_size = tl.where(m_all, tl.minimum(N - o_group * GROUP, GROUP), m_winner.to(tl.int64)).to(tl.int32)
    total = tl.sum(b_size)
    if total > 0:
        first = tl.atomic_add(counts + b, total.to(tl.int64), sem="relaxed")
        o_slot = first + tl.cumsum(b_size) - b_size
        b_best = tl.load(best + b * group_stride + o_group, mask=m_winner, other=0.0).to(tl.int32, bitcast=True)
        p_list = listed + b * width + o_slot
        tl.store(p_list, o_group * GROUP + (b_best & (GROUP - 1)), mask=m_winner & (o_slot < width))
        if tl.sum(m_all.to(tl.int32)) > 0:
            for member in range(GROUP):
                m_member = m_all & (member < b_size) & (o_slot + member < width)
                tl.store(p_list + member, o_group * GROUP + member, mask=m_member)


@triton.jit(do_not_specialize=["N", "E", "groups", "programs", "width"])
def exhaust_kernel(
    query, rows, exclude, counts, fallbacks, maxima, nan_count, rescored, N, E, D, groups, programs, width,
    query_stride, row_stride, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """fallbacks (B,): whether counts passed width; if so, maxima (B, groups) float64, nan_count and rescored (B,) added to."""
    b = (tl.program_id(0) // programs).to(tl.int64)
    overflowed = tl.load(counts + b) > width
    if tl.program_id(0) % programs == 0:
        tl.store(fallbacks + b, overflowed.to(tl.int64))
    if overflowed:
        nan = tl.zeros((), tl.int64)
        scored = tl.zeros((), tl.int64)
        for group in range(tl.program_id(0) % programs, groups, programs):
            highest = tl.full((), float("-inf"), tl.float64)
            for member in range(0, GROUP, ROWS):
                b_row = group * tl.full((), GROUP, tl.int64) + member + tl.arange(0, ROWS)
                b_row = _without(tl.where(b_row < N, b_row, -1), exclude, b, E)
                m_row = b_row >= 0
                b_scores = _exact_scores(query + b * query_stride, rows, b_row, m_row, D, row_stride, ROWS, BLOCK_D)
                m_nan = m_row & (b_scores != b_scores)
                nan += tl.sum(m_nan.to(tl.int64))
                scored += tl.sum(m_row.to(tl.int64))
                highest = tl.maximum(highest, tl.max(tl.where(m_row & (b_scores == b_scores), b_scores, float("-inf"))))
            tl.store(maxima + b * groups + group, highest)
        tl.atomic_add(nan_count + b, nan, sem="relaxed")
        tl.atomic_add(rescored + b, scored, sem="relaxed")


@triton.jit(do_not_specialize=["N", "chosen", "width"])
def replace_kernel(group_ids, fallbacks, listed, counts, N, chosen, width, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """For a query with a fallback, the rows of group_ids (B, chosen) become its list, -1 among them where there are none."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(fallbacks + b) > 0:
        for start in range(0, chosen * GROUP, BLOCK):
            o_slot = start + tl.arange(0, BLOCK)
            m_slot = o_slot < chosen * GROUP
            b_group = tl.load(group_ids + b * chosen + o_slot // GROUP, mask=m_slot, other=-1)
            b_row = b_group * GROUP + o_slot % GROUP
            tl.store(listed + b * width + o_slot, tl.where((b_group >= 0) & (b_row < N), b_row, -1), mask=m_slot)
        tl.store(counts + b, (chosen * GROUP).to(tl.int64))


@triton.jit(do_not_specialize=["k", "width", "programs"])
def rank_kernel(
    scores, listed, counts, fallbacks, best, best_ids, nan_count, rescored, k, width, programs, BLOCK: tl.constexpr
):
    """best (B, k) float32 and best_ids from the lists, scores descending, equal ones by ascending row; -inf and -1 fill up.

    nan_count and rescored (B,) count the list, but for a query with a fallback, where they are known.
    """
    b = (tl.program_id(0) // programs).to(tl.int64)
    count = tl.load(counts + b).to(tl.int32)  # at most width: a longer list has been replaced
    scores += b * width
    listed += b * width
    if tl.program_id(0) % programs == 0:
        nan = tl.zeros((), tl.int32)
        scored = tl.zeros((), tl.int32)
        found = tl.zeros((), tl.int32)
        for start in range(0, count, BLOCK):
            o_other = start + tl.arange(0, BLOCK)
            b_other = tl.load(scores + o_other, mask=o_other < count, other=float("-inf"))
            m_other = tl.load(listed + o_other, mask=o_other < count, other=-1) >= 0
            nan += tl.sum((m_other & (b_other != b_other)).to(tl.int32))
            scored += tl.sum(m_other.to(tl.int32))
            found += tl.sum((b_other > float("-inf")).to(tl.int32))
        if tl.load(fallbacks + b) == 0:
            tl.store(nan_count + b, nan.to(tl.int64))
            tl.store(rescored + b, scored.to(tl.int64))
        for start in range(found, k, BLOCK):
            o_fill = start + tl.arange(0, BLOCK)
            tl.store(best + b * k + o_fill, float("-inf"), mask=o_fill < k)
            tl.store(best_ids + b * k + o_fill, -1, mask=o_fill < k)
    for first in range((tl.program_id(0) % programs) * BLOCK, count, programs * BLOCK):
        o_own = first + tl.arange(0, BLOCK)
        b_own = tl.load(scores + o_own, mask=o_own < count, other=float("-inf"))
        b_id = tl.load(listed + o_own, mask=o_own < count, other=-1)
        b_rank = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, count, BLOCK):
            o_other = start + tl.arange(0, BLOCK)
            b_other = tl.load(scores + o_other, mask=o_other < count, other=float("-inf"))
            b_other_id = tl.load(listed + o_other, mask=o_other < count, other=-1)
            m_lower = b_other_id[None, :] < b_id[:, None]
            m_before = (b_other[None, :] > b_own[:, None]) | ((b_other[None, :] == b_own[:, None]) & m_lower)
            b_rank += tl.sum(m_before.to(tl.int32), axis=1)
        m_found = (b_own > float("-inf")) & (b_rank < k)
        tl.store(best + b * k + b_rank, b_own.to(tl.float32), mask=m_found)
        tl.store(best_ids + b * k + b_rank, b_id, mask=m_found)


def exact_top(
    query: Tensor, rows: Tensor, left: Tensor, unit: Tensor, k: int, exclude: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores (B, k) float32, ids (B, k), nan_count, rescored and fallbacks (B,) int64 from what the int8 sweep has left.

    query (B, D), rows (N, D), N > 0; left (B, 2, groups) and unit (B,) as `corpus_int8.sweep` gives them; exclude (B, E) int64.
    left is overwritten.
    """
    width = min(min(k, left.shape[2]) * group + SPARE, len(rows))
    step = max(1, LISTED // width)
    parts = [
        _part(query[part], rows, left[part], unit[part], k, None if exclude is None else exclude[part], group, width)
        for part in (slice(first, first + step) for first in range(0, len(query), step))
    ]
    scores, ids, counted = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return scores, ids, counted[:, 0], counted[:, 1], counted[:, 2]


def _part(
    query: Tensor, rows: Tensor, left: Tensor, unit: Tensor, k: int, exclude: Tensor | None, group: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """scores and ids of these queries, and (B, 3) nan_count, rescored and fallbacks; width is the length of a list."""
    B, D = query.shape
    N, groups = rows.shape[0], left.shape[2]
    device = query.device
    left_out = 0 if exclude is None else exclude.shape[1]
    best, bounds = left[:, 0], left[:, 1].view(torch.int32)
    counted = torch.zeros((4, B), dtype=torch.int64, device=device)
    counts, nan_count, rescored, fallbacks = counted
    listed = torch.empty((B, width), dtype=torch.int64, device=device)
    scores = torch.empty((B, width), dtype=torch.float64, device=device)
    top = torch.empty((B, k), dtype=torch.float32, device=device)
    top_ids = torch.empty((B, k), dtype=torch.int64, device=device)
    shape = {"GROUP": group, "ROWS": ROWS, "BLOCK_D": BLOCK_D}

    def programs(length: int) -> int:
        """Of one query, for a list of this length."""
        return max(1, min(PROGRAMS // B, triton.cdiv(length, ROWS)))

    chosen = min(k, groups + 1)  # one more than there are lowers the bar to -inf
    words, group_ids = select(best, None, chosen)
    winner_scores = torch.empty((B, chosen), dtype=torch.float64, device=device)
    if chosen:
        score_kernel[(B * programs(chosen),)](
            query, rows, group_ids, None, words, exclude, winner_scores, left_out, D, chosen, programs(chosen),
            query.stride(0), rows.stride(0), **shape,
        )  # fmt: skip
    block = 2048
    chunks = triton.cdiv(groups, block)
    list_kernel[(B * chunks,)](
        best, bounds, winner_scores, unit, listed, counts, N, groups, left.stride(0), chunks, chosen, width,
        GROUP=group, BLOCK=block, num_warps=8,
    )  # fmt: skip

    each = programs(width)
    maxima = left.view(B, 2 * groups).view(torch.float64)
    exhaust_kernel[(B * each,)](
        query, rows, exclude, counts, fallbacks, maxima, nan_count, rescored, N, left_out, D, groups, each, width,
        query.stride(0), rows.stride(0), **shape,
    )  # fmt: skip
    group_ids = select(maxima, None, chosen, wanted=fallbacks)[1]
    replace_kernel[(B,)](group_ids, fallbacks, listed, counts, N, chosen, width, GROUP=group, BLOCK=1024)

    score_kernel[(B * each,)](
        query, rows, listed, counts, None, exclude, scores, left_out, D, width, each,
        query.stride(0), rows.stride(0), **shape,
    )  # fmt: skip
    rank_kernel[(B * each,)](
        scores, listed, counts, fallbacks, top, top_ids, nan_count, rescored, k, width, each, BLOCK=64
    )
    return top, top_ids, counted[1:].T
