"""Query vectors that others have prepared: row i of query_embeddings.<split>.npy is line i of query_meta.<split>.jsonl.

`read_queries` reads them, by id and not by text; `recalls` says how well they find their videos, which is the published
baseline without refinement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from vsr1.corpus import Corpus
from vsr1.data.annotation_files import AnnotationError, read
from vsr1.data.annotation_values import text_of
from vsr1.data.layout import Layout
from vsr1.errors import CorpusError
from vsr1.ops.corpus_scan import scan

DEPTHS: Final = (1, 5, 10, 100)
_AT_ONCE: Final = 512  # queries a sweep


@dataclass(frozen=True)
class Queries:
    """Prepared queries: ids, texts, the right video of each, and unit `vectors` (N, D) float32 in the same order."""

    query_ids: list[str]
    texts: list[str]
    video_ids: list[str]
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.query_ids)

    def by_id(self) -> dict[str, np.ndarray]:
        """Query id -> its vector (D,), a view."""
        return dict(zip(self.query_ids, self.vectors, strict=True))


def read_queries(layout: Layout, split: str) -> Queries:
    """The query vectors of a split, one a line of its query_meta file.

    Raises:
        AnnotationError: a file cannot be read, they do not belong together, an id occurs twice, or a vector is 0 or not finite.
    """
    ids: list[str] = []
    texts: list[str] = []
    videos: list[str] = []
    for entry in read(layout.query_meta(split), layout="lines").entries:
        try:
            if entry.problem is not None:
                raise ValueError(entry.problem)
            for key, values in (("qid", ids), ("query", texts), ("pos_doc_id", videos)):
                values.append(text_of(entry.value, key))
        except ValueError as error:
            raise AnnotationError(f"queries '{layout.query_meta(split)}', {entry.place}: {error}") from error
    if not ids:
        raise AnnotationError(f"queries '{layout.query_meta(split)}': there are none")
    if len(set(ids)) < len(ids):
        twice = next(query for place, query in enumerate(ids) if query in ids[:place])
        raise AnnotationError(f"queries '{layout.query_meta(split)}': id '{twice}' occurs twice")
    return Queries(ids, texts, videos, unit_vectors(layout.query_embeddings(split), layout.query_meta(split), ids))


def unit_vectors(path: Path, meta: Path, ids: Sequence[str]) -> np.ndarray:
    """The vectors (N, D) of a file, float32 and of length 1; row i is that of ids[i], as `meta` says.

    Raises:
        AnnotationError: the file cannot be read, has another number of vectors, or one is 0 or not finite.
    """
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AnnotationError(f"query vectors '{path}' cannot be read as .npy: {error}") from error
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise AnnotationError(f"'{path}' must hold float vectors (N, D)")
    if len(vectors) != len(ids):
        raise AnnotationError(f"'{path}' holds {len(vectors)} vectors, '{meta.name}' {len(ids)} queries")
    vectors = vectors.astype(np.float32, copy=False)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    useless = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(useless):
        raise AnnotationError(f"'{path}': the vector of '{ids[useless[0]]}' is 0 or not finite ({len(useless)} such)")
    return vectors / lengths


def recalls(queries: Queries, corpus: Corpus) -> dict[int, float]:
    """How many of the queries have their video among the best 1, 5, 10 and 100 of the corpus: shares, without refinement.

    A query whose video is not in the corpus counts as not found.

    Raises:
        CorpusError: the queries' vectors have another dimension.
    """
    if queries.vectors.shape[1] != corpus.dimension:
        raise CorpusError(
            f"corpus '{corpus.folder}' holds {corpus.dimension}-d vectors, the queries {queries.vectors.shape[1]}-d ones"
        )
    rows = {video: row for row, video in enumerate(corpus.video_ids)}
    right = torch.tensor([rows.get(video, -1) for video in queries.video_ids])
    ranks = []
    for begin in range(0, len(queries), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        found = scan(torch.from_numpy(queries.vectors[part]), corpus.matrix().rows, k=1, positive=right[part])
        assert found.rank is not None
        ranks.append(found.rank)
    every = torch.cat(ranks)
    return {depth: float(((every > 0) & (every <= depth)).double().mean()) for depth in DEPTHS}
