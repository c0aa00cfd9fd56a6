"""The corpus: what is searched, as one folder on disk and one matrix in memory.

`add` writes the vectors as a new segment file and then commits their videos to the catalogue; `search` gathers the live
vectors, once, into one (N, D) matrix in the order they were added and hands it to `vsr1.ops.corpus_scan`. Row i of that
matrix is `video_ids[i]`; a deletion moves later rows up. One process writes at a time; what other processes commit is
seen by the next write or by opening the folder again.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from vsr1.corpus.catalogue import (
    FILE,
    Contents,
    Identity,
    Video,
    connect,
    create_catalogue,
    insert,
    mark_deleted,
    read_contents,
    read_generation,
    read_identity,
)
from vsr1.corpus.segments import Segment, read_segment, remove_leftovers, write_segment
from vsr1.errors import CorpusError
from vsr1.ops.corpus_scan import CorpusMatrix, scan

_VECTORS = "vectors"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class _View:
    """The catalogue in memory. Additions append to it, so a search may go on using it; a deletion makes a new one."""

    generation: int
    segments: dict[int, Segment]
    videos: list[Video]
    ids: list[str]
    row_of: dict[str, int]
    matrix: CorpusMatrix | None = None  # the first M <= N rows, gathered so far

    @classmethod
    def of(cls, contents: Contents) -> _View:
        view = cls(contents.generation, {s.number: s for s in contents.segments}, [], [], {})
        view.append(contents.videos)
        return view

    def append(self, videos: Iterable[Video]) -> None:
        for video in videos:
            self.videos.append(video)
            self.ids.append(video.video_id)
            self.row_of[video.video_id] = len(self.ids) - 1  # last, so that a reader without the lock finds it whole


class Corpus:
    """Videos and their vectors (N, D), searched by inner product. Make one with `create` or `open`.

    The vectors are compared as they are: for cosine similarity add unit vectors. Methods may be called from several
    threads.
    """

    def __init__(self, folder: Path, identity: Identity, view: _View) -> None:
        self.folder = folder
        self.embedder_id = identity.embedder_id
        self.dimension = identity.dimension
        self.dtype = _DTYPES[identity.dtype]
        self._view = view
        self._verified: set[int] = set()
        self._lock = threading.RLock()

    @classmethod
    def create(cls, folder: str | Path, dimension: int, embedder_id: str, dtype: str = "float32") -> Corpus:
        """An empty corpus of D = `dimension` in a new or empty folder; `dtype` is how vectors are stored and searched.

        `embedder_id` names the model whose vectors these are, so that no other model's query can be asked by mistake.
        Raises CorpusError if the folder holds anything already.
        """
        folder = Path(folder)
        if dimension < 1:
            raise ValueError(f"dimension must be at least 1, got {dimension}")
        if not embedder_id:
            raise ValueError("embedder_id must name the model whose vectors the corpus holds; got an empty string")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {dtype!r}")
        if folder.exists() and not folder.is_dir():
            raise CorpusError(f"cannot make a corpus at '{folder}': it is a file")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / FILE).exists():
            raise CorpusError(f"'{folder}' already holds a corpus: use Corpus.open, or choose another folder")
        vectors = folder / _VECTORS
        # A creation killed half-way leaves no catalogue, an empty vectors folder and files named aside: no one's data.
        foreign = [p.name for p in folder.iterdir() if p != vectors and not p.name.startswith(f"{FILE}.aside")]
        if foreign or (vectors.exists() and any(vectors.iterdir())):
            raise CorpusError(
                f"folder '{folder}' is not empty (it holds {foreign or [_VECTORS]}): choose another folder"
            )
        vectors.mkdir(exist_ok=True)
        create_catalogue(folder, Identity(embedder_id, dimension, dtype))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, embedder_id: str | None = None) -> Corpus:
        """The corpus in `folder` at its last commit. Vectors are read, and their checksums compared, when first used.

        Raises CorpusError where the folder is missing, foreign or damaged, or was built by another embedder.
        """
        folder = Path(folder)
        with connect(folder) as connection:
            identity = read_identity(connection)
            view = _View.of(read_contents(connection))
        if embedder_id is not None and embedder_id != identity.embedder_id:
            raise CorpusError(
                f"corpus '{folder}' was built by embedder '{identity.embedder_id}', the one asked for is "
                f"'{embedder_id}': use that embedder, or index the videos again into another folder"
            )
        return cls(folder, identity, view)

    def add(
        self,
        video_ids: Sequence[str],
        vectors: Any,
        *,
        paths: Sequence[str | Path | None] | None = None,
        durations: Sequence[float | None] | None = None,
    ) -> None:
        """Appends M videos with their vectors (M, D), torch or numpy, all or none; durable when this returns.

        `paths` are kept absolute, `durations` in seconds. One call writes one file: add many videos at a time.
        Raises CorpusError for an id given twice or already there, vectors of another dimension, or numbers that are not
        finite in the corpus' dtype.
        """
        ids = list(video_ids)
        files = [None] * len(ids) if paths is None else [p if p is None else os.path.abspath(p) for p in paths]
        seconds = [None] * len(ids) if durations is None else list(durations)
        if not len(ids) == len(files) == len(seconds):
            raise ValueError(f"{len(ids)} video ids, {len(files)} paths and {len(seconds)} durations: give one each")
        strange = [video_id for video_id in ids if not isinstance(video_id, str) or not video_id]
        if strange:
            raise TypeError(f"video ids must be strings that are not empty, got {strange[0]!r}")
        stored = self._checked(ids, torch.as_tensor(vectors))
        if not ids:
            return
        with self._lock:
            with connect(self.folder, write=True) as connection:
                view = self._current(connection)
                twice = [v for v, times in Counter(ids).items() if times > 1 or v in view.row_of]
                if twice:
                    where = "already in" if twice[0] in view.row_of else "given twice for"
                    raise CorpusError(
                        f"video '{twice[0]}' is {where} corpus '{self.folder}' ({len(twice)} such of {len(ids)}): "
                        "delete it first, or leave it out"
                    )
                segment = write_segment(self.folder / _VECTORS, max(view.segments, default=0) + 1, stored)
                videos = [
                    Video(video_id, file, duration, segment.number, position)
                    for position, (video_id, file, duration) in enumerate(zip(ids, files, seconds, strict=True))
                ]
                insert(connection, segment, videos)
            view.segments[segment.number] = segment
            view.append(videos)
            view.generation += 1
            self._view = view

    def delete(self, video_ids: Iterable[str]) -> None:
        """Takes videos out, all or none; their ids may be added again. The files keep their size.

        Raises CorpusError if one of them is not there.
        """
        gone = set(video_ids)
        with self._lock:
            with connect(self.folder, write=True) as connection:
                view = self._current(connection)
                missing = sorted(gone - view.row_of.keys())
                if missing:
                    raise CorpusError(f"corpus '{self.folder}' holds no video '{missing[0]}' ({len(missing)} such)")
                mark_deleted(connection, sorted(gone))
            keep = [row for row, video_id in enumerate(view.ids) if video_id not in gone]
            videos = tuple(view.videos[row] for row in keep)
            left = _View.of(Contents(view.generation + 1, tuple(view.segments.values()), videos))
            if view.matrix is not None:
                left.matrix = CorpusMatrix(view.matrix.rows[[row for row in keep if row < len(view.matrix)]])
            self._view = left

    def search(
        self,
        query: Any,
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        backend: str = "auto",
    ) -> tuple[list[list[str]], torch.Tensor]:
        """The k best videos for each query (B, D): ids, best first, and scores (B, k) float32.

        `exclude` holds, for each query, ids not to return; ids that are not in the corpus do no harm. Where fewer than
        k remain a list is shorter and its scores end in -inf. Ties go to the video added first.
        Raises CorpusError for a query of another dimension.
        """
        queries = torch.as_tensor(query).cpu()
        if queries.ndim != 2:
            raise ValueError(f"query must have shape (B, {self.dimension}), got {tuple(queries.shape)}")
        if queries.shape[1] != self.dimension:
            raise CorpusError(
                f"corpus '{self.folder}' holds {self.dimension}-d vectors of embedder '{self.embedder_id}'; the query "
                f"has {queries.shape[1]}: was it made by another embedder?"
            )
        if exclude is not None and len(exclude) != len(queries):
            raise ValueError(f"exclude must list ids for each of the {len(queries)} queries, got {len(exclude)} lists")
        view, matrix = self._gathered()
        rows = None if exclude is None else _excluded(view, exclude, len(matrix))
        found = scan(queries, matrix, k=k, exclude=rows, backend=backend)
        ids = [[view.ids[row] for row in best if row >= 0] for best in found.ids.tolist()]
        return ids, found.scores

    def matrix(self) -> CorpusMatrix:
        """All live vectors (N, D) in row order, in memory; read at the first use and kept until the corpus changes."""
        return self._gathered()[1]

    @property
    def video_ids(self) -> list[str]:
        """Ids in row order."""
        return list(self._view.ids)

    def row(self, video_id: str) -> int:
        """The row of a video in `matrix()`."""
        return self._row(self._view, video_id)

    def path(self, video_id: str) -> Path:
        """Where the video's file lies. Raises CorpusError if that was not said when it was added."""
        path = self._video(video_id).path
        if path is None:
            raise CorpusError(
                f"corpus '{self.folder}' does not know where the file of video '{video_id}' lies: delete it and add it "
                "again with its path"
            )
        return Path(path)

    def duration(self, video_id: str) -> float | None:
        """The video's length in seconds; None if that was not said."""
        return self._video(video_id).duration

    def __len__(self) -> int:
        return len(self._view.ids)

    def __contains__(self, video_id: object) -> bool:
        return video_id in self._view.row_of

    def __repr__(self) -> str:
        return f"Corpus('{self.folder}', {len(self)} videos, {self.dimension}-d, embedder '{self.embedder_id}')"

    def _video(self, video_id: str) -> Video:
        view = self._view
        return view.videos[self._row(view, video_id)]

    def _row(self, view: _View, video_id: str) -> int:
        if video_id not in view.row_of:
            raise CorpusError(f"corpus '{self.folder}' holds no video '{video_id}'")
        return view.row_of[video_id]

    def _current(self, connection: Any) -> _View:
        """How a write begins: the view, read again if another process has committed since, and no leftovers beside it."""
        if read_generation(connection) != self._view.generation:
            self._view = _View.of(read_contents(connection))
        remove_leftovers(self.folder / _VECTORS, {segment.file for segment in self._view.segments.values()})
        return self._view

    def _checked(self, ids: Sequence[str], vectors: torch.Tensor) -> torch.Tensor:
        """Vectors as they will be stored: on the CPU, in the corpus' dtype, owned and finite."""
        if vectors.ndim != 2 or len(vectors) != len(ids):
            raise ValueError(f"vectors must have shape ({len(ids)}, {self.dimension}), got {tuple(vectors.shape)}")
        if vectors.shape[1] != self.dimension:
            raise CorpusError(
                f"corpus '{self.folder}' holds {self.dimension}-d vectors, the new ones have {vectors.shape[1]}: were "
                f"they made by '{self.embedder_id}'?"
            )
        if not vectors.is_floating_point():
            raise TypeError(f"vectors must be floating point, got {vectors.dtype}")
        stored = vectors.detach().to("cpu", self.dtype)
        bad = (~stored.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad):
            raise CorpusError(
                f"the vector of video '{ids[int(bad[0])]}' is not finite in {self.dtype} ({len(bad)} such of "
                f"{len(ids)}): embed it again, or leave it out"
            )
        return stored

    def _gathered(self) -> tuple[_View, CorpusMatrix]:
        """The view and the matrix of all its rows; only rows that were added since the last time are read."""
        with self._lock:
            view = self._view
            known = 0 if view.matrix is None else len(view.matrix)
            if view.matrix is None or known < len(view.ids):
                rows = torch.empty(len(view.ids), self.dimension, dtype=self.dtype)
                if view.matrix is not None:
                    rows[:known] = view.matrix.rows
                for number, group in groupby(view.videos[known:], key=lambda video: video.segment):
                    positions = [video.position for video in group]
                    rows[known : known + len(positions)] = self._read(view.segments[number])[positions]
                    known += len(positions)
                view.matrix = CorpusMatrix(rows)
            return view, view.matrix

    def _read(self, segment: Segment) -> torch.Tensor:
        verify = segment.number not in self._verified
        vectors = read_segment(self.folder / _VECTORS, segment, self.dimension, self.dtype, verify)
        self._verified.add(segment.number)
        return vectors


def _excluded(view: _View, exclude: Sequence[Collection[str]], count: int) -> torch.Tensor | None:
    """Lists of ids as rows (B, E) int64, padded with -1; None if none of them is among the first `count` rows."""
    rows = [[row for video_id in ids if (row := view.row_of.get(video_id, count)) < count] for ids in exclude]
    width = max((len(r) for r in rows), default=0)
    if width == 0:
        return None
    return torch.tensor([[*r, *[-1] * (width - len(r))] for r in rows], dtype=torch.int64)
