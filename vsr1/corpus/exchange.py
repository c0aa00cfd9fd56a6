"""Vectors from elsewhere and for elsewhere: FAISS indexes, and .npy files with a JSON of rows ("prepared").

An import reads its source in parts, so memory stays bounded, and the corpus appears when all of it is on disk
(`creation.making`). An export writes beside the final names and puts the vectors in place last: where they are, the ids
beside them are theirs.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vsr1.corpus.catalogue import Identity, Video, insert, next_number
from vsr1.corpus.creation import VECTORS, making
from vsr1.corpus.segments import DTYPES, flush, in_parts, storable, write_segment
from vsr1.errors import BackendUnavailable, CorpusError
from vsr1.ops.corpus_scan import CorpusMatrix


@dataclass(frozen=True)
class Source:
    """Vectors (count, dimension) to be imported: `name` for messages; `read` gives those of a slice of rows."""

    name: str
    count: int
    dimension: int
    read: Callable[[slice], np.ndarray]


def make(
    folder: Path,
    source: Source,
    ids: Sequence[str],
    embedder_id: str,
    dtype: str,
    paths: Mapping[str, str | Path] | None,
    durations: Mapping[str, float] | None,
) -> None:
    """Makes a corpus of all vectors of `source`; row i is `ids[i]`. Raises as `Corpus.import_prepared` does."""
    identity = Identity.checked(embedder_id, source.dimension, dtype)
    check_ids(ids)
    twice = [video_id for video_id, times in Counter(ids).items() if times > 1]
    if twice:
        raise CorpusError(f"{source.name} gives video '{twice[0]}' several vectors ({len(twice)} such): leave one each")
    known = set(ids)
    for name, given in (("paths", paths or {}), ("durations", durations or {})):
        unknown = sorted(given.keys() - known)
        if unknown:
            raise CorpusError(f"{name} speaks of video '{unknown[0]}', which {source.name} lacks ({len(unknown)} such)")
    files = {video_id: os.path.abspath(path) for video_id, path in (paths or {}).items()}
    seconds = durations or {}
    row_bytes = source.dimension * torch.float32.itemsize
    with making(folder, identity) as connection:
        for part in in_parts(source.count, row_bytes, "importing"):
            stored = storable(ids[part], torch.from_numpy(source.read(part)), DTYPES[dtype])
            segment = write_segment(folder / VECTORS, next_number(connection), stored)
            videos = [
                Video(video_id, files.get(video_id), seconds.get(video_id), segment.number, position)
                for position, video_id in enumerate(ids[part])
            ]
            insert(connection, segment, videos)


def check_ids(ids: Sequence[Any]) -> None:
    """Raises TypeError for a video id that is not a string or is empty."""
    strange = [video_id for video_id in ids if not isinstance(video_id, str) or not video_id]
    if strange:
        raise TypeError(f"video ids must be strings that are not empty, got {strange[0]!r}")


def from_faiss(index: Any, video_ids: Sequence[str] | Mapping[int, str]) -> tuple[Source, list[str]]:
    """The vectors of an IndexFlatIP, or an IndexIDMap over one, and the video id of each row."""
    faiss = _faiss()
    name = "the FAISS index"
    if isinstance(index, str | Path):
        name = f"FAISS index '{index}'"
        try:
            index = faiss.read_index(str(index), faiss.IO_FLAG_MMAP_IFC)  # mapped: it may be larger than memory
        except RuntimeError as error:
            raise CorpusError(f"{name} cannot be read: {error}") from error
    outer = flat = faiss.downcast_index(index)
    numbers = range(outer.ntotal)
    if isinstance(outer, faiss.IndexIDMap):  # IndexIDMap2 is one
        flat, numbers = faiss.downcast_index(outer.index), faiss.vector_to_array(outer.id_map).tolist()
    if not isinstance(flat, faiss.IndexFlat) or flat.metric_type != faiss.METRIC_INNER_PRODUCT:
        kind = type(flat).__name__ if flat is outer else f"{type(outer).__name__} over {type(flat).__name__}"
        raise CorpusError(
            f"{name} is a {kind}, and only IndexFlatIP, alone or in an IndexIDMap, can be imported: another index holds "
            "other distances or rounded vectors; import the vectors it was made of with Corpus.import_prepared"
        )
    if flat is outer and len(video_ids) != flat.ntotal:
        raise CorpusError(f"{name} holds {flat.ntotal} vectors, {len(video_ids)} video ids were given: give one each")

    def read(part: slice, owner: Any = index) -> np.ndarray:
        # `owner` is not used but kept: FAISS frees what a downcast looks into together with the index itself.
        return flat.reconstruct_n(part.start, part.stop - part.start)

    return Source(name, flat.ntotal, flat.d, read), [_video_id(name, video_ids, number) for number in numbers]


def from_prepared(npy_path: Path, docid2row_path: Path) -> tuple[Source, list[str]]:
    """The vectors of an .npy file, mapped into memory, and the video id of each row."""
    try:
        vectors = np.load(npy_path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorpusError(f"vectors '{npy_path}' cannot be read as .npy: {error}") from error
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.shape[1] == 0:
        found = getattr(vectors, "shape", "an archive of arrays")
        raise CorpusError(f"'{npy_path}' holds {found}; expected vectors (N, D) with D > 0")
    if vectors.dtype.kind != "f" or vectors.dtype.itemsize > 8:
        raise CorpusError(f"'{npy_path}' holds {vectors.dtype}; expected float16, float32 or float64")
    try:
        row_of = json.loads(docid2row_path.read_bytes(), object_pairs_hook=_without_repetition)
    except (OSError, ValueError) as error:
        raise CorpusError(f"rows '{docid2row_path}' cannot be read as JSON: {error}") from error
    ids: list[str | None] = [None] * len(vectors)
    if not isinstance(row_of, dict):
        raise CorpusError(f"'{docid2row_path}' holds a {type(row_of).__name__}; expected an object {{video id: row}}")
    for video_id, row in row_of.items():
        if type(row) is not int or not 0 <= row < len(vectors):
            raise CorpusError(
                f"'{docid2row_path}' says row {row!r} for video '{video_id}'; '{npy_path}' has {len(vectors)} rows"
            )
        if ids[row] is not None:
            raise CorpusError(f"'{docid2row_path}' gives row {row} to both video '{ids[row]}' and video '{video_id}'")
        ids[row] = video_id
    whole = [video_id for video_id in ids if video_id is not None]
    if len(whole) < len(ids):
        raise CorpusError(
            f"'{docid2row_path}' names no video for row {ids.index(None)} of '{npy_path}' ({len(ids) - len(whole)} such)"
        )

    def read(part: slice) -> np.ndarray:
        # A copy of the part: torch wants native byte order and memory it may write.
        return np.array(vectors[part], dtype=vectors.dtype.newbyteorder("="), order="C")

    return Source(f"'{npy_path}'", len(vectors), vectors.shape[1], read), whole


def to_faiss(path: Path, matrix: CorpusMatrix, ids: Sequence[str]) -> Path:
    """Writes an IndexFlatIP to `path` and the ids beside it; returns where those are."""
    faiss = _faiss()
    index = faiss.IndexFlatIP(matrix.dim)
    for part in in_parts(len(matrix), matrix.dim * torch.float32.itemsize, "exporting"):
        index.add(matrix.rows[part].float().numpy())
    ids_path = path.with_name(path.name + ".ids.json")

    def write(aside: Path) -> None:
        try:
            faiss.write_index(index, str(aside))
        except RuntimeError as error:
            raise CorpusError(f"FAISS cannot write '{aside}': {error}") from error

    _put(path, ids_path, list(ids), write)
    return ids_path


def to_prepared(npy_path: Path, docid2row_path: Path, matrix: CorpusMatrix, ids: Sequence[str]) -> None:
    """Writes an .npy file and {video id: row}."""
    dtype, descr = (torch.float16, "<f2") if matrix.dtype == torch.float16 else (torch.float32, "<f4")

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            header = {"descr": descr, "fortran_order": False, "shape": (len(matrix), matrix.dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in in_parts(len(matrix), matrix.dim * dtype.itemsize, "exporting"):
                matrix.rows[part].to(dtype).numpy().astype(descr, copy=False).tofile(file)

    _put(npy_path, docid2row_path, {video_id: row for row, video_id in enumerate(ids)}, write)


def _put(path: Path, names_path: Path, names: Any, write: Callable[[Path], None]) -> None:
    """Two files that belong together: where `path` is, `names_path` is its own."""
    aside, names_aside = path.with_name(path.name + ".aside"), names_path.with_name(names_path.name + ".aside")
    try:
        write(aside)
        flush(aside)
        names_aside.write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
        flush(names_aside)
        path.unlink(missing_ok=True)  # an older pair is taken apart before its names change
        names_aside.rename(names_path)
        aside.rename(path)
        flush(names_path.parent)
        flush(path.parent)
    except OSError as error:
        raise CorpusError(f"cannot write '{path}' and '{names_path}': {error}") from error
    finally:
        aside.unlink(missing_ok=True)
        names_aside.unlink(missing_ok=True)


def _video_id(name: str, video_ids: Sequence[str] | Mapping[int, str], number: int) -> str:
    known = number in video_ids if isinstance(video_ids, Mapping) else 0 <= number < len(video_ids)
    if not known:
        raise CorpusError(f"{name} holds a vector of id {number}, for which video_ids has no video")
    return video_ids[number]


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"it names '{twice}' twice")
    return found


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise BackendUnavailable("FAISS is not installed: pip install faiss-cpu") from error
    return faiss
