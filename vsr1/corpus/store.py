"""The corpus: what is searched, as one folder on disk and one matrix in memory.

`add` writes the vectors as a new segment file and then commits their videos to the catalogue; `search` gathers the live
vectors, once, into one (N, D) matrix in the order they were added and hands it to `vsr1.ops.corpus_scan`. Row i of that
matrix is `video_ids[i]`; a deletion moves later rows up. One process writes at a time; what other processes commit is
seen by `refresh`, by the next write, or when a compaction has replaced segments that were still to be read.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from vsr1.corpus import exchange
from vsr1.corpus.catalogue import (
    FileMark,
    Identity,
    Video,
    connect,
    count_commit,
    insert,
    mark_deleted,
    next_number,
    read_contents,
    read_generation,
    read_identity,
    read_marks,
    write_marks,
)
from vsr1.corpus.compaction import is_compact, rewrite
from vsr1.corpus.creation import VECTORS, making
from vsr1.corpus.segments import (
    DTYPES,
    SEGMENT_BYTES,
    Segment,
    SegmentMissing,
    read_segment,
    remove_leftovers,
    storable,
    write_segment,
)
from vsr1.corpus.view import View, gather
from vsr1.errors import CorpusError
from vsr1.ops.corpus_scan import CorpusMatrix, scan


class Corpus:
    """Videos and their vectors (N, D), searched by inner product. Make one with `create`, `open` or an import.

    The vectors are compared as they are: for cosine similarity add unit vectors. Methods may be called from several
    threads. A corpus is also a context manager that closes itself; after that every method raises CorpusError.
    """

    def __init__(self, folder: Path, identity: Identity, view: View) -> None:
        self.folder = folder
        self.embedder_id = identity.embedder_id
        self.dimension = identity.dimension
        self.dtype = DTYPES[identity.dtype]
        self._view: View | None = view
        self._verified: set[int] = set()
        self._lock = threading.RLock()

    @classmethod
    def create(cls, folder: str | Path, dimension: int, embedder_id: str, dtype: str = "float32") -> Corpus:
        """An empty corpus of D = `dimension` in a new or empty folder; `dtype` is how vectors are stored and searched.

        `embedder_id` names the model whose vectors these are, so that no other model's query can be asked by mistake.
        Raises CorpusError if the folder holds anything already.
        """
        with making(Path(folder), Identity.checked(embedder_id, dimension, dtype)):
            pass
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, embedder_id: str | None = None) -> Corpus:
        """The corpus in `folder` at its last commit. Vectors are read, and their checksums compared, when first used.

        Raises CorpusError where the folder is missing, foreign or damaged, or was built by another embedder.
        """
        folder = Path(folder)
        with connect(folder) as connection:
            identity = read_identity(connection)
            view = View.of(read_contents(connection))
        if embedder_id is not None and embedder_id != identity.embedder_id:
            raise CorpusError(
                f"corpus '{folder}' was built by embedder '{identity.embedder_id}', the one asked for is "
                f"'{embedder_id}': use that embedder, or index the videos again into another folder"
            )
        return cls(folder, identity, view)

    @classmethod
    def import_faiss(
        cls,
        folder: str | Path,
        index: Any,
        video_ids: Sequence[str] | Mapping[int, str],
        embedder_id: str,
        dtype: str = "float32",
        *,
        paths: Mapping[str, str | Path] | None = None,
        durations: Mapping[str, float] | None = None,
    ) -> Corpus:
        """A new corpus of the vectors of a FAISS index, given itself or as the path of its file, in the order of its rows.

        The index is an IndexFlatIP or an IndexIDMap over one. `video_ids` is looked up by FAISS's ids, those that its
        searches return: for an IndexFlatIP a list of one video id a vector, for an IndexIDMap usually a dictionary.
        `paths` and `durations` (seconds) say more about some videos, by their ids. The corpus appears whole or not at
        all. Raises CorpusError for another type of index, an id without a video, vectors that are not finite in
        `dtype`, or a folder that holds anything; BackendUnavailable without FAISS.
        """
        vectors, ids = exchange.from_faiss(index, video_ids)
        exchange.make(Path(folder), vectors, ids, embedder_id, dtype, paths, durations)
        return cls.open(folder)

    @classmethod
    def import_prepared(
        cls,
        folder: str | Path,
        npy_path: str | Path,
        docid2row_path: str | Path,
        embedder_id: str,
        dtype: str = "float32",
        *,
        paths: Mapping[str, str | Path] | None = None,
        durations: Mapping[str, float] | None = None,
    ) -> Corpus:
        """A new corpus of vectors in an .npy file (N, D) and a JSON file {video id: row}, in the order of the rows.

        The vectors are mapped into memory and copied in parts, so they may be larger than it. `paths` and `durations`
        (seconds) say more about some videos, by their ids. The corpus appears whole or not at all. Raises CorpusError
        for files that cannot be read, a row that is named twice, by nobody, or is not there, vectors that are not
        finite in `dtype`, or a folder that holds anything.
        """
        vectors, ids = exchange.from_prepared(Path(npy_path), Path(docid2row_path))
        exchange.make(Path(folder), vectors, ids, embedder_id, dtype, paths, durations)
        return cls.open(folder)

    def add(
        self,
        video_ids: Sequence[str],
        vectors: Any,
        *,
        paths: Sequence[str | Path | None] | None = None,
        durations: Sequence[float | None] | None = None,
        marks: Mapping[str, FileMark] | None = None,
        replacing: Iterable[str] = (),
    ) -> None:
        """Appends M videos with their vectors (M, D), torch or numpy, all or none; durable when this returns.

        `paths` are kept absolute, `durations` in seconds, `marks` say what some of the files are, by video id. Videos
        named in `replacing` leave in the same commit, as far as they are there; their ids may be among the new ones.
        One call writes one file: add many videos at a time.
        Raises CorpusError for an id given twice or already there, vectors of another dimension, or numbers that are not
        finite in the corpus' dtype.
        """
        ids = list(video_ids)
        files = [None] * len(ids) if paths is None else [p if p is None else os.path.abspath(p) for p in paths]
        seconds = [None] * len(ids) if durations is None else list(durations)
        if not len(ids) == len(files) == len(seconds):
            raise ValueError(f"{len(ids)} video ids, {len(files)} paths and {len(seconds)} durations: give one each")
        exchange.check_ids(ids)
        stored = self._checked(ids, torch.as_tensor(vectors))
        with self._lock:
            with self._writing() as (connection, view):
                if not ids:
                    return
                gone = {video_id for video_id in replacing if video_id in view.row_of}
                there = {video_id for video_id in ids if video_id in view.row_of and video_id not in gone}
                twice = [v for v, times in Counter(ids).items() if times > 1 or v in there]
                if twice:
                    where = "already in" if twice[0] in there else "given twice for"
                    raise CorpusError(
                        f"video '{twice[0]}' is {where} corpus '{self.folder}' ({len(twice)} such of {len(ids)}): "
                        "delete it first, or leave it out"
                    )
                segment = write_segment(self.folder / VECTORS, next_number(connection), stored)
                videos = [
                    Video(video_id, file, duration, segment.number, position)
                    for position, (video_id, file, duration) in enumerate(zip(ids, files, seconds, strict=True))
                ]
                mark_deleted(connection, sorted(gone))
                insert(connection, segment, videos)
                write_marks(connection, marks or {})
                count_commit(connection)
            if gone:
                view = view.without(gone)
            view.segments[segment.number] = segment
            view.append(videos)
            view.generation += 1
            self._view = view

    def delete(self, video_ids: Iterable[str]) -> None:
        """Takes videos out, all or none; their ids may be added again. `compact` frees their space.

        Raises CorpusError if one of them is not there.
        """
        gone = set(video_ids)
        with self._lock:
            with self._writing() as (connection, view):
                missing = sorted(gone - view.row_of.keys())
                if missing:
                    raise CorpusError(f"corpus '{self.folder}' holds no video '{missing[0]}' ({len(missing)} such)")
                mark_deleted(connection, sorted(gone))
                count_commit(connection)
            self._view = view.without(gone)
            self._view.generation += 1

    def compact(self, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Frees what deletions left behind and gathers many small files in few of at most `segment_bytes` of vectors.

        Rows and ids stay as they are. Every vector is read, verified and written again, in bounded memory, while other
        processes search; those that want to write wait. A compact corpus is left alone. Other processes that had not
        read all their segments go on with the corpus as it is then. A kill at any instant loses nothing.
        Raises CorpusError for damaged segments, and changes nothing then.
        """
        if segment_bytes < 1:
            raise ValueError(f"segment_bytes must be at least 1, got {segment_bytes}")
        with self._lock:
            with self._writing() as (connection, view):
                if is_compact(view, self.dimension * self.dtype.itemsize, segment_bytes):
                    return
                folder = self.folder / VECTORS

                def read(number: int) -> torch.Tensor:
                    # Verified even if it was before: a new checksum over bytes gone bad since would hide them for good.
                    return read_segment(folder, view.segments[number], self.dimension, self.dtype, verify=True)

                contents = rewrite(connection, folder, view, read, self.dimension, self.dtype, segment_bytes)
            compacted = View.of(contents)
            compacted.matrix = view.matrix  # the same rows
            self._view = compacted
            for segment in view.segments.values():  # no later writer can have used these names
                (folder / segment.file).unlink(missing_ok=True)

    def refresh(self) -> bool:
        """Takes in what other processes have committed; returns whether there was anything.

        Vectors in memory are kept, except that after another process' compaction all are read again at the next use.
        """
        with self._lock:
            view = self._seen
            with connect(self.folder) as connection:
                if read_generation(connection) == view.generation:
                    return False
                contents = read_contents(connection)
            self._view = View.of(contents, view)
            return True

    def close(self) -> None:
        """Forgets everything in memory; arrays that were handed out stay valid. Closing twice does no harm."""
        with self._lock:
            self._view = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def search(
        self,
        query: Any,
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        int8: bool = False,
        backend: str = "auto",
    ) -> tuple[list[list[str]], torch.Tensor]:
        """The k best videos for each query (B, D): ids, best first, and scores (B, k) float32.

        `exclude` holds, for each query, ids not to return; ids that are not in the corpus do no harm. Where fewer than
        k remain a list is shorter and its scores end in -inf; a query with a NaN finds nothing. Ties go to the video added
        first. With `int8` the vectors' int8 codes are swept (`CorpusMatrix.quantize`), which are made when they are first
        needed after a change: less to read, and the order is that of float64 scores.
        Raises CorpusError for a query of another dimension, ValueError for k above 2048.
        """
        queries = torch.as_tensor(query).cpu()
        if queries.dtype == torch.float64:
            queries = queries.float()
        if queries.ndim != 2:
            raise ValueError(f"query must have shape (B, {self.dimension}), got {tuple(queries.shape)}")
        if queries.shape[1] != self.dimension:
            raise CorpusError(
                f"corpus '{self.folder}' holds {self.dimension}-d vectors of embedder '{self.embedder_id}'; the query "
                f"has {queries.shape[1]}: was it made by another embedder?"
            )
        if exclude is not None and len(exclude) != len(queries):
            raise ValueError(f"exclude must list ids for each of the {len(queries)} queries, got {len(exclude)} lists")
        view, matrix = self._gathered(int8)
        rows = None if exclude is None else view.excluded(exclude, len(matrix))
        found = scan(queries, matrix if int8 else matrix.rows, k=k, exclude=rows, backend=backend)
        ids = [[view.ids[row] for row in best if row >= 0] for best in found.ids.tolist()]
        return ids, found.scores

    def matrix(self) -> CorpusMatrix:
        """All live vectors (N, D) in row order, in memory; read at the first use and kept until the corpus changes.

        It shares its memory with torch (`.rows`) and whatever speaks DLPack (`cupy.from_dlpack(matrix)` once it is on a
        GPU: `.to`). Neither can be told not to write: writing changes what is searched, never what is on disk.
        """
        return self._gathered()[1]

    def numpy(self) -> np.ndarray:
        """All live vectors (N, D) in row order as a read-only array that shares the memory of `matrix()`.

        Raises TypeError for a bfloat16 corpus: NumPy has no such dtype.
        """
        rows = self.matrix().rows
        if rows.dtype == torch.bfloat16:
            raise TypeError(
                f"corpus '{self.folder}' is bfloat16, which NumPy lacks: use corpus.matrix().rows.float().numpy() for a "
                "float32 copy, corpus.matrix().rows.view(torch.uint16).numpy() for the bits"
            )
        view = rows.numpy()
        view.flags.writeable = False
        return view

    def export_faiss(self, path: str | Path) -> Path:
        """Writes a faiss.IndexFlatIP (float32) of all vectors to `path`, and the video ids in its order, a JSON list, to
        `path` + ".ids.json", which is returned. Raises BackendUnavailable without FAISS."""
        view, matrix = self._gathered()
        return exchange.to_faiss(Path(path), matrix, view.ids[: len(matrix)])

    def export_prepared(self, npy_path: str | Path, docid2row_path: str | Path) -> None:
        """Writes all vectors to an .npy file, float16 or (also from bfloat16) float32, and {video id: row} as JSON."""
        view, matrix = self._gathered()
        exchange.to_prepared(Path(npy_path), Path(docid2row_path), matrix, view.ids[: len(matrix)])

    @property
    def video_ids(self) -> list[str]:
        """Ids in row order."""
        return list(self._seen.ids)

    def row(self, video_id: str) -> int:
        """The row of a video in `matrix()`."""
        return self._row(self._seen, video_id)

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

    def places(self) -> dict[str, str]:
        """Where the videos' files lie, by video id, of those of which that was said."""
        return {video.video_id: video.path for video in self._seen.videos if video.path is not None}

    def marks(self) -> dict[str, FileMark]:
        """What the videos' files were when they were added, by video id, of those of which that was said; read from the
        disk."""
        with connect(self.folder) as connection:
            return read_marks(connection)

    def mark(self, marks: Mapping[str, FileMark]) -> None:
        """Notes that these videos' files are now so. Raises CorpusError if one of the videos is not there."""
        with self._lock, self._writing() as (connection, view):
            for video_id in marks:
                self._row(view, video_id)
            write_marks(connection, marks)

    @property
    def segment_count(self) -> int:
        """How many files hold the vectors; `compact` makes them few."""
        return len(self._seen.segments)

    def __len__(self) -> int:
        return len(self._seen.ids)

    def __contains__(self, video_id: object) -> bool:
        return video_id in self._seen.row_of

    def __repr__(self) -> str:
        count = "closed" if self._view is None else f"{len(self)} videos"
        return f"Corpus('{self.folder}', {count}, {self.dimension}-d, embedder '{self.embedder_id}')"

    def _video(self, video_id: str) -> Video:
        view = self._seen
        return view.videos[self._row(view, video_id)]

    def _row(self, view: View, video_id: str) -> int:
        if video_id not in view.row_of:
            raise CorpusError(f"corpus '{self.folder}' holds no video '{video_id}'")
        return view.row_of[video_id]

    @property
    def _seen(self) -> View:
        """The view; raises where `close` took it away."""
        view = self._view
        if view is None:
            raise CorpusError(f"corpus '{self.folder}' is closed: open it again with Corpus.open")
        return view

    @contextmanager
    def _writing(self) -> Iterator[tuple[sqlite3.Connection, View]]:
        """A write transaction, and the view it begins from: read again if another process has committed since, and with
        no leftovers beside it."""
        view = self._seen
        with connect(self.folder, write=True) as connection:
            if read_generation(connection) != view.generation:
                self._view = view = View.of(read_contents(connection), view)
            remove_leftovers(self.folder / VECTORS, {segment.file for segment in view.segments.values()})
            yield connection, view

    def _checked(self, ids: Sequence[str], vectors: torch.Tensor) -> torch.Tensor:
        """Vectors as they will be stored: on the CPU, in the corpus' dtype, owned and finite."""
        if vectors.ndim != 2 or len(vectors) != len(ids):
            raise ValueError(f"vectors must have shape ({len(ids)}, {self.dimension}), got {tuple(vectors.shape)}")
        if vectors.shape[1] != self.dimension:
            raise CorpusError(
                f"corpus '{self.folder}' holds {self.dimension}-d vectors, the new ones have {vectors.shape[1]}: were "
                f"they made by '{self.embedder_id}'?"
            )
        return storable(ids, vectors, self.dtype)

    def _gathered(self, quantized: bool = False) -> tuple[View, CorpusMatrix]:
        """The view and the matrix of all its rows; only rows that were added since the last time are read."""
        with self._lock:
            while True:
                view = self._seen
                try:
                    return view, self._gather(view, quantized)
                except SegmentMissing:
                    if not self.refresh():  # no compaction moved it
                        raise

    def _gather(self, view: View, quantized: bool) -> CorpusMatrix:
        known = 0 if view.matrix is None else len(view.matrix)
        if view.matrix is None or known < len(view.ids):
            rows = torch.empty(len(view.ids), self.dimension, dtype=self.dtype)
            if view.matrix is not None:
                rows[:known] = view.matrix.rows
            gather(view.videos[known:], lambda number: self._read(view.segments[number]), rows[known:])
            view.matrix = CorpusMatrix(rows)
        if quantized and view.matrix.quantized is None:
            view.matrix = view.matrix.quantize()
        return view.matrix

    def _read(self, segment: Segment) -> torch.Tensor:
        verify = segment.number not in self._verified
        vectors = read_segment(self.folder / VECTORS, segment, self.dimension, self.dtype, verify)
        self._verified.add(segment.number)
        return vectors
