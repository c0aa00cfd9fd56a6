"""What a search finds for the training queries: one exact sweep of the corpus, from which pool, negatives and practice come.

The sweep keeps for each query its best videos and, whatever its place, the right one with its score and rank. A hard
negative is a video that is not the right one, the most alike first. Videos that outrank the right one stay among them:
they are what the policy has to learn to tell apart. The public training code drops them (`margin`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vsr1.ops.corpus_scan import CorpusMatrix, scan
from vsr1.records import Moment

BATCH = 1024  # queries swept together


@dataclass(frozen=True)
class Found:
    """A video that a sweep found: its score, and its rank from 1 among all videos."""

    video_id: str
    score: float
    rank: int


@dataclass(frozen=True)
class Candidates:
    """The sweep of Q queries over N videos, on the CPU.

    moments: the queries; video_ids: the corpus, by row; rows (Q, k) int64 and scores (Q, k) float32 of the best, best
    first; truth_scores (Q,) and truth_ranks (Q,) of the right videos.
    """

    moments: Sequence[Moment]
    video_ids: Sequence[str]
    rows: Tensor
    scores: Tensor
    truth_scores: Tensor
    truth_ranks: Tensor

    def best(self, index: int) -> Found:
        """What comes first for query `index`."""
        return Found(self.video_ids[int(self.rows[index, 0])], float(self.scores[index, 0]), 1)

    def truth(self, index: int) -> Found:
        """The right video of query `index`."""
        video_id = self.moments[index].video_id
        assert video_id is not None
        return Found(video_id, float(self.truth_scores[index]), int(self.truth_ranks[index]))

    def negatives(self, index: int, count: int, margin: float | None = None) -> list[Found]:
        """The `count` best wrong videos of query `index`, fewer where the sweep kept fewer.

        With a `margin`, as in the public training code, those that score at least as much as the right video less the
        margin are taken out of these, and nothing takes their place.
        """
        right = self.moments[index].video_id
        found = [
            Found(video_id, score, rank)
            for rank, (row, score) in enumerate(
                zip(self.rows[index].tolist(), self.scores[index].tolist(), strict=True), 1
            )
            if row >= 0 and (video_id := self.video_ids[row]) != right
        ][:count]
        if margin is None:
            return found
        limit = float(self.truth_scores[index]) - margin
        return [one for one in found if one.score < limit]

    def recall(self, depths: Sequence[int] = (1, 5, 10, 100)) -> dict[str, float]:
        """The share of queries whose right video is among the first k, as `R@k`."""
        return {f"R@{depth}": float((self.truth_ranks <= depth).double().mean()) for depth in depths}


def sweep(
    moments: Sequence[Moment],
    queries: Tensor,
    matrix: CorpusMatrix,
    video_ids: Sequence[str],
    depth: int,
    progress: Callable[[int, int], None] | None = None,
) -> Candidates:
    """Search for all queries and keep the best `depth` wrong videos of each, at least.

    moments: Q queries whose videos are in the corpus; queries (Q, D) their vectors; matrix (N, D), video_ids by row.
    """
    row_of = {video_id: row for row, video_id in enumerate(video_ids)}
    right = torch.tensor([row_of[str(moment.video_id)] for moment in moments])
    k = min(depth + 1, len(video_ids))
    parts = []
    for begin in range(0, len(moments), BATCH):
        part = slice(begin, begin + BATCH)
        found = scan(queries[part].to(matrix.device), matrix, k=k, positive=right[part])
        truth = (one for one in (found.positive_score, found.rank) if one is not None)
        parts.append([one.cpu() for one in (found.ids, found.scores, *truth)])
        if progress is not None:
            progress(min(begin + BATCH, len(moments)), len(moments))
    rows, scores, truth_scores, truth_ranks = (torch.cat(column) for column in zip(*parts, strict=True))
    return Candidates(moments, video_ids, rows, scores, truth_scores, truth_ranks)


def hard_negatives(candidates: Candidates, count: int, margin: float | None = None) -> dict[str, tuple[str, ...]]:
    """Query id -> ids of its `count` best wrong videos, best first; `margin` as in `Candidates.negatives`."""
    return {
        moment.query_id: tuple(one.video_id for one in candidates.negatives(index, count, margin))
        for index, moment in enumerate(candidates.moments)
    }


def known(moments: Sequence[Moment], video_ids: Container[str | None]) -> list[Moment]:
    """The moments that can be trained on: those with a span, in a video that the corpus has."""
    return [one for one in moments if one.video_id in video_ids and one.start is not None and one.end is not None]
