"""Sums over bootstrap resamples: n times as many queries as there are, drawn with replacement.

Up to `DRAWN` queries every draw is made and its contribution looked up. For 100,000 queries that would be 2 x 10^8 draws a
figure, seconds each, and most of them are not needed: a sum does not tell queries apart that contribute the same. If c_k
of N queries contribute v_k, the times that v_k is drawn are multinomial(N, c_k / N) counts, and the sum is counts . v; for
a metric of 0 and 1 that is one binomial number a resample. Figures whose contributions are of many kinds (reciprocal ranks,
IoUs) share one set of draws instead: how often each query was drawn, times the matrix of all their columns. Both have
the distribution of the plain bootstrap; neither approximates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Group = Sequence[Floats]

DRAWN = 8192  # the benchmarks of the field have up to 17,000 test queries, most of them fewer than 5,000
_BLOCK = 8  # resamples drawn together
_FEW = 256  # kinds of contributions; counting more of them would take a good part of the time that drawing takes


def sums(groups: Sequence[Group], n: int, seed: int, cells: int) -> list[list[Floats]]:
    """Sums of every column (N,) over n resamples, n numbers each, in the groups the columns came in.

    The columns of a group share their resamples, so they can be divided and subtracted resample by resample; up to `DRAWN`
    queries all groups share them, also those of separate calls with one seed. At most about `cells` draws are held at once.
    """
    if not groups:
        return []
    if len(groups[0][0]) <= DRAWN:
        return _regrouped(groups, _drawn([column for group in groups for column in group], n, seed, cells))
    kinds = [_kinds(group) for group in groups]
    many = [group for group, found in zip(groups, kinds, strict=True) if found is None]
    drawn = iter(_regrouped(many, _multiplied([column for group in many for column in group], n, seed)))
    return [next(drawn) if found is None else _counted(*found, n, seed) for found in kinds]


def _regrouped(groups: Sequence[Group], columns: Iterable[Floats]) -> list[list[Floats]]:
    left = iter(columns)
    return [[next(left) for _ in group] for group in groups]


def _drawn(columns: Group, n: int, seed: int, cells: int) -> list[Floats]:
    """Every draw looked up in every column, and summed in the order of drawing."""
    generator, size = np.random.default_rng(seed), len(columns[0])
    block = max(1, cells // max(1, size))
    found = [_if_constant(column, n) for column in columns]
    uneven = [(column, total) for column, total in zip(columns, found, strict=True) if np.isnan(total[0])]
    for first in range(0, n, block):
        chosen = generator.integers(0, size, size=(min(block, n - first), size))
        for column, total in uneven:
            total[first : first + block] = column[chosen].sum(axis=1)
    return found


def _multiplied(columns: Group, n: int, seed: int) -> list[Floats]:
    """How often each query was drawn, times every column."""
    if not columns:
        return []
    generator, size = np.random.default_rng(seed), len(columns[0])
    found = [_if_constant(column, n) for column in columns]
    uneven = [place for place, total in enumerate(found) if np.isnan(total[0])]
    matrix = np.stack([columns[place] for place in uneven])

    def draw() -> NDArray[np.int32]:
        return generator.integers(0, size, size=(_BLOCK, size), dtype=np.int32)  # half the time of 64 bits

    # numpy draws without the interpreter: the next block, while this one is counted
    with ThreadPoolExecutor(1) as beside:
        coming = beside.submit(draw)
        for first in range(0, n, _BLOCK):
            drawn, coming = coming.result(), beside.submit(draw)
            for resample, chosen in enumerate(drawn[: n - first], first):
                times = np.bincount(chosen, minlength=size).astype(np.float64)
                # not by BLAS, whose threads wait for each other for seconds where other programs keep the cores busy
                for place, total in zip(uneven, np.einsum("q,cq->c", times, matrix), strict=True):
                    found[place][resample] = total
    return found


def _if_constant(column: Floats, n: int) -> Floats:
    """The n sums of a column of one whole number, as the weights of most figures are; of any other, n times NaN."""
    same = bool((column == column[:1]).all()) and float(column[0]).is_integer()
    return np.full(n, column.sum() if same else np.nan)


def _counted(values: Floats, counts: NDArray[np.int64], n: int, seed: int) -> list[Floats]:
    """values (K, C): what each kind of query contributes to each column; counts (K,): how many queries are of it."""
    size = counts.sum()
    times = np.random.default_rng(seed).multinomial(size, counts / size, size=n)
    return list((times @ values).T)


def _kinds(group: Group) -> tuple[Floats, NDArray[np.int64]] | None:
    """Queries that contribute the same to all columns of a group are of one kind: what each kind contributes (K, C), and
    how many queries are of it (K,). None where there are more kinds than `_FEW`."""
    kind = np.zeros(len(group[0]), np.int64)
    for column in group:
        if ((column == 0) | (column == 1)).all():
            values, place = np.zeros(2), column.astype(np.int64)
        else:
            values, place = np.unique(column, return_inverse=True)
        if len(values) > _FEW:
            return None
        kind = kind * len(values) + place
        if kind.max() > _FEW:
            kind = np.unique(kind, return_inverse=True)[1]  # numbered anew, lest products grow
    _, example, counts = np.unique(kind, return_index=True, return_counts=True)
    if len(counts) > _FEW:
        return None
    return np.stack([column[example] for column in group], axis=1), counts
