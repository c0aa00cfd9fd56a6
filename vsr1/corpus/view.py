"""One commit of the catalogue in memory: which video is which row, and the rows gathered so far."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from vsr1.corpus.catalogue import Contents, Video
from vsr1.corpus.segments import Segment
from vsr1.ops.corpus_scan import CorpusMatrix


@dataclass
class View:
    """The catalogue in memory. Additions append to it, so a search may go on using it; a deletion makes a new one."""

    generation: int
    segments: dict[int, Segment]
    videos: list[Video]
    ids: list[str]
    row_of: dict[str, int]
    matrix: CorpusMatrix | None = None  # the first M <= N rows, gathered so far; never changed in place

    @classmethod
    def of(cls, contents: Contents, before: View | None = None) -> View:
        """A view of `contents`; rows that `before` has gathered and that lie where they lay are not read again."""
        view = cls(contents.generation, {s.number: s for s in contents.segments}, [], [], {})
        view.append(contents.videos)
        if before is not None and before.matrix is not None:
            view.matrix = _still_there(before.videos, before.matrix, view.videos)
        return view

    def without(self, gone: Collection[str]) -> View:
        """A view of the same segments without some videos."""
        left = tuple(video for video in self.videos if video.video_id not in gone)
        return View.of(Contents(self.generation, tuple(self.segments.values()), left), self)

    def append(self, videos: Iterable[Video]) -> None:
        """Adds rows at the end."""
        for video in videos:
            self.videos.append(video)
            self.ids.append(video.video_id)
            self.row_of[video.video_id] = len(self.ids) - 1  # last, so that a reader without the lock finds it whole

    def excluded(self, exclude: Sequence[Collection[str]], count: int) -> torch.Tensor | None:
        """Lists of ids as rows (B, E) int64, padded with -1; None if none of them is among the first `count` rows."""
        rows = [[row for video_id in ids if (row := self.row_of.get(video_id, count)) < count] for ids in exclude]
        width = max((len(r) for r in rows), default=0)
        if width == 0:
            return None
        return torch.tensor([[*r, *[-1] * (width - len(r))] for r in rows], dtype=torch.int64)


def gather(videos: Sequence[Video], read: Callable[[int], torch.Tensor], rows: torch.Tensor) -> None:
    """Fills rows (M, D) with the vectors of M videos; `read` gives all vectors of a segment by its number."""
    begin = 0
    for number, group in groupby(videos, key=lambda video: video.segment):
        positions = [video.position for video in group]
        rows[begin : begin + len(positions)] = read(number)[positions]
        begin += len(positions)


def _still_there(before: Sequence[Video], matrix: CorpusMatrix, videos: Sequence[Video]) -> CorpusMatrix:
    """The leading rows of `videos` that are in the matrix of `before`, known by segment and position."""
    row_of = {(video.segment, video.position): row for row, video in enumerate(before[: len(matrix)])}
    rows = []
    for video in videos:
        row = row_of.get((video.segment, video.position))
        if row is None:
            break
        rows.append(row)
    return matrix if rows == list(range(len(matrix))) else CorpusMatrix(matrix.rows[rows])
