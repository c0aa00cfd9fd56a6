"""Relevance feedback without a policy: the next query is a mean of vectors that are there already.

It is the baseline that needs no training. The verdicts say which videos were rejected, the last ranking which ones look
most like the query; the query moves from the former to the latter. Nothing enters that the loop does not know by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vsr1.ops.corpus_scan import CorpusMatrix, rocchio


@dataclass(frozen=True)
class Rocchio:
    """Weights of the first query (alpha), of the mean of the videos taken for relevant (beta) and of that of the rejected
    ones (gamma); the usual values. relevant: how many of the best videos of the last ranking, less the rejected ones, are
    taken for relevant. Source: Rocchio 1971; pseudo-relevance as in Buckley et al. 1994."""

    alpha: float = 1.0
    beta: float = 0.75
    gamma: float = 0.15
    relevant: int = 10


def moved(
    queries: Tensor,
    matrix: CorpusMatrix,
    rankings: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    weights: Rocchio,
) -> Tensor:
    """normalise(alpha * query + beta * mean(relevant) - gamma * mean(rejected)) for each query (B, D), in its dtype.

    rankings: corpus rows, best first, for each query; rows of -1 and rejected ones are passed over. The vectors are read
    from the rows themselves, whatever their dtype, also where the matrix is quantized.
    """
    relevant = []
    for ranking, gone in zip(rankings, rejected, strict=True):
        standing = [row for row in ranking if row >= 0 and row not in gone]
        relevant.append(standing[: weights.relevant])
    towards, away = (_vectors(matrix, rows) for rows in (relevant, rejected))
    return rocchio(weights.alpha * queries, towards, away, weights.beta, weights.gamma)


def _vectors(matrix: CorpusMatrix, rows: Sequence[Sequence[int]]) -> Tensor:
    """The vectors (B, n, D) of these rows, zeros behind those of a query that has fewer."""
    ids = pad_sequence([torch.tensor(one, dtype=torch.int64) for one in rows], True, padding_value=-1)
    ids = ids.to(matrix.device)
    return matrix.rows[ids.clamp(min=0)].masked_fill((ids < 0)[:, :, None], 0.0)
