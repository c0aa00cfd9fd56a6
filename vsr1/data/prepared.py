"""Vectors and frame arrays that others have prepared, made a corpus.

`import_split` reads a split of the public layout (`vsr1.data.layout`) and makes its corpus: vectors from segment_embeds.npy
or, where there is none, from the FAISS index; of each video where its frames lie and how long it is. What the public code
lets vanish is listed: videos that could not be embedded, annotated videos without a vector, arrays without times.
`closeness` says how near the vectors are to those that an embedder makes here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from vsr1.corpus import Corpus, exchange
from vsr1.corpus.catalogue import FILE
from vsr1.corpus.segments import in_parts
from vsr1.data.annotated_videos import Videos, files_below, plain_name
from vsr1.data.annotation_files import AnnotationError, read
from vsr1.data.layout import Layout
from vsr1.data.validation import validate_file
from vsr1.errors import ConfigError, CorpusError, VideoError
from vsr1.video import array

if TYPE_CHECKING:
    from vsr1.models.embedder import Embedder

UNNAMED: Final = "unnamed"  # the embedder of a corpus that was imported without saying which
UNIT: Final = 1e-3  # by how much a vector's length may differ from 1: float16 rounds it by half of that

# What may be found out about a video, whether it is lost to training by that, and what it means.
FINDINGS: Final[Mapping[str, tuple[bool, str]]] = {
    "failed": (True, "failed_docs.jsonl lists it, and it has no vector: embed it again"),
    "no vector": (True, "annotated, but without a vector: no query can find it"),
    "no frames": (True, "has a vector, but neither a frame array nor a video file: it cannot be shown"),
    "bad array": (False, "its frame array cannot be used; a video file takes its place where there is one"),
    "not annotated": (False, "has a vector, but no query asks for it"),
    "no duration": (False, "neither its frame array nor an annotation says how long it is"),
    "not unit": (False, "its vector was not of length 1, and was brought to it"),
}


@dataclass(frozen=True)
class Imported:
    """A corpus made of prepared artefacts: out of which file, where its frames come from, and what was found of which video.

    `findings` gives for the names in `FINDINGS` (video id, detail). `fresh`: False if the corpus stood there already.
    """

    split: str
    corpus: Corpus
    source: str
    arrays: int
    files: int
    fresh: bool = True
    findings: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """How many videos cannot be used."""
        return len({video for name, found in self.findings.items() if FINDINGS[name][0] for video, _ in found})

    def text(self, shown: int | None = 20) -> str:
        """Counts, then up to `shown` videos (None: all) of each finding."""
        corpus, done = self.corpus, "made" if self.fresh else "stands already"
        lines = [
            f"{self.split}: corpus '{corpus.folder}' {done}: {len(corpus)} videos, {corpus.dimension}-d, embedder "
            f"{corpus.embedder_id}, from {self.source}",
            f"  frames of {self.arrays} from arrays, of {self.files} from video files; {self.lost} videos are lost",
        ]
        for name, (lost, meaning) in FINDINGS.items():
            found = self.findings.get(name, ())
            if found:
                lines.append(f"  {len(found)} {'LOST, ' if lost else ''}{name}: {meaning}")
                lines += [f"    {video}{f': {detail}' if detail else ''}" for video, detail in found[:shown]]
                if shown is not None and len(found) > shown:
                    lines.append(f"    and {len(found) - shown} more")
        return "\n".join(lines)


def import_split(
    layout: Layout,
    split: str,
    *,
    embedder: Embedder | None = None,
    videos: str | os.PathLike[str] | None = None,
    again: bool = False,
) -> Imported:
    """Make ROOT/<split>/corpus of a split's prepared vectors. Where it stands already and is the same, it is left alone.

    Vectors are brought to unit length, as every part of the public code that compares them does.

    Args:
        embedder: the model that made the vectors, which the corpus remembers so that another one's queries are refused.
        videos: a folder of video files to be shown instead of the frame arrays.
        again: a corpus that stands there and is another one is replaced.

    Raises:
        ConfigError: there are no prepared vectors.
        CorpusError: the vectors cannot be used (damaged, not finite, of another dimension, of moments and not of videos), or
            another corpus stands there.
        AnnotationError: the annotations, or the list of failures, cannot be read.
        BackendUnavailable: there is only a FAISS index, and no FAISS.
    """
    source, ids = _vectors(layout, split)
    if embedder is not None and embedder.dimension != source.dimension:
        raise CorpusError(
            f"{source.name} holds {source.dimension}-d vectors, the embedder makes {embedder.dimension}-d ones: give the "
            "one that made them"
        )
    findings: dict[str, list[tuple[str, str]]] = {name: [] for name in FINDINGS}
    findings["not unit"] = _not_unit(source, ids)
    source = replace(source, read=_unit(source))
    annotated, durations = _annotated(layout, split)
    known = set(ids)
    failed = _failures(layout.failed(split))
    findings["failed"] = [(video, reason) for video, reason in failed.items() if video not in known]
    findings["no vector"] = [(video, "") for video in annotated if video not in known and video not in failed]
    findings["not annotated"] = [(video, "") for video in ids if annotated and video not in annotated]
    shown = _frames(layout, split, ids, videos, findings, durations)
    findings["no duration"] = [(video, "") for video in ids if video not in durations]
    identity = UNNAMED if embedder is None else embedder.identity
    lengths = {video: durations[video] for video in ids if video in durations}
    folder, wanted = layout.corpus(split), _Wanted(source, ids, identity, shown, lengths)
    corpus = _standing(folder, wanted)
    fresh = corpus is None
    if corpus is None:
        corpus = _made(folder, wanted, again)
    arrays = sum(map(array.is_array, shown.values()))
    return Imported(split, corpus, source.name, arrays, len(shown) - arrays, fresh, findings)


def _vectors(layout: Layout, split: str) -> tuple[exchange.Source, list[str]]:
    """The vectors of a split and the video of each, from whichever files there are."""
    vectors, rows = layout.segment_embeddings(split), layout.docid2row(split)
    index, names = layout.faiss_index(split), layout.id_map(split)
    if vectors.is_file() and rows.is_file():
        source, ids = exchange.from_prepared(vectors, rows)
    elif index.is_file() and names.is_file():
        source, ids = exchange.from_faiss(index, _names(names))
    else:
        raise ConfigError(
            f"split '{split}' has no prepared vectors: neither '{vectors}' with {rows.name}, nor '{index}' with {names.name}; "
            "make a corpus of the videos themselves with vsr1 data build"
        )
    moments = [video for video in ids if video.count("|") == 3]
    if moments:
        raise CorpusError(
            f"{source.name} holds vectors of moments ('{moments[0]}', {len(moments)} such): import those of whole videos"
        )
    return source, ids


def _names(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorpusError(f"ids '{path}' cannot be read as JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CorpusError(f"'{path}' must be a list of video ids, one a vector")
    return names


def _lengths(source: exchange.Source) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Parts of the vectors: where they are, they, float32, and their lengths."""
    for part in in_parts(source.count, 4 * source.dimension, "checking"):
        vectors = source.read(part).astype(np.float32, copy=False)
        yield part, vectors, np.linalg.norm(vectors, axis=1)


def _not_unit(source: exchange.Source, ids: Sequence[str]) -> list[tuple[str, str]]:
    """The videos whose vectors are not of length 1. Raises CorpusError for those that have no direction."""
    found, useless = [], []
    for part, _, lengths in _lengths(source):
        for video, length in zip(ids[part], lengths, strict=True):
            if not np.isfinite(length) or length == 0:
                useless.append(video)
            elif abs(length - 1) > UNIT:
                found.append((video, f"length {length:.4g}"))
    if useless:
        raise CorpusError(
            f"{source.name} holds vectors that are 0 or not finite, of {', '.join(map(repr, useless[:3]))} "
            f"({len(useless)} of {len(ids)}): embed these videos again, or leave them out"
        )
    return found


def _unit(source: exchange.Source) -> Any:
    def read_unit(part: slice) -> np.ndarray:
        vectors = source.read(part).astype(np.float32, copy=False)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.where(np.abs(lengths - 1) > UNIT, vectors / lengths, vectors)  # those that are unit stay as they are

    return read_unit


def _annotated(layout: Layout, split: str) -> tuple[dict[str, None], dict[str, float]]:
    """The annotated videos of a split, in order, and their durations as annotated; nothing where there is no annotation."""
    path = layout.annotations(split)
    moments = validate_file(path).moments if path.is_file() else []
    durations = {one.video_id: one.duration for one in moments if one.video_id and one.duration and one.duration > 0}
    return dict.fromkeys(one.video_id for one in moments if one.video_id), durations


def _failures(path: Path) -> dict[str, str]:
    """Video -> why it could not be embedded, the last reason."""
    if not path.is_file():
        return {}
    failures = {}
    for entry in read(path, layout="lines").entries:
        if entry.problem is not None or "doc_id" not in entry.value:
            raise AnnotationError(f"failures '{path}', {entry.place}: {entry.problem or 'key doc_id is missing'}")
        failures[str(entry.value["doc_id"])] = str(entry.value.get("error", ""))
    return failures


def _frames(
    layout: Layout,
    split: str,
    ids: Iterable[str],
    folder: str | os.PathLike[str] | None,
    findings: Mapping[str, list[tuple[str, str]]],
    durations: dict[str, float],
) -> dict[str, str]:
    """Where each video's frames lie, in a file of `folder` or in an array; the arrays' durations are put into `durations`."""
    films = layout.root / "videos"
    below = films if films.is_dir() else layout.root
    files = Videos(folder if folder is not None else files_below(below, arrays=False))
    place = layout.frame_arrays(split)
    arrays = {path.stem: path for path in sorted(place.glob("*.npy"))}
    shown = {}
    for video in ids:
        file, path = files.find(video), arrays.get(video, arrays.get(plain_name(video)))
        if path is not None:
            try:
                durations[video] = array.read(path).duration
            except VideoError as error:
                findings["bad array"].append((video, error.reason))
                path = None
        if file is not None and (folder is not None or path is None):
            shown[video] = os.path.abspath(file)
        elif path is not None:
            shown[video] = os.path.abspath(path)
        else:
            findings["no frames"].append((video, ""))
    return shown


@dataclass(frozen=True)
class _Wanted:
    """The corpus to be made: vectors, the video of each, their embedder, and what is known of the videos."""

    source: exchange.Source
    ids: list[str]
    identity: str
    paths: Mapping[str, str]
    lengths: Mapping[str, float]


def _standing(folder: Path, wanted: _Wanted) -> Corpus | None:
    """The corpus in the folder if it is the one that would be made."""
    source = wanted.source
    try:
        corpus = Corpus.open(folder)
        same = (
            (corpus.embedder_id, corpus.video_ids, corpus.dtype) == (wanted.identity, wanted.ids, torch.float32)
            and corpus.dimension == source.dimension
            and corpus.places() == dict(wanted.paths)
            and all(corpus.duration(video) == wanted.lengths.get(video) for video in wanted.ids)
            and all(
                np.array_equal(source.read(part), corpus.numpy()[part])
                for part in in_parts(source.count, 4 * source.dimension, "comparing")
            )
        )
    except CorpusError:  # none, or a damaged one: making one says so
        return None
    return corpus if same else None


def _made(folder: Path, wanted: _Wanted, again: bool) -> Corpus:
    """A new corpus, made aside: one that stood there goes when the new one is whole."""
    import shutil

    aside, former = (folder.with_name(f"{folder.name}.{state}") for state in ("new", "former"))
    there = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if there and not again:
        raise CorpusError(
            f"'{folder}' holds something else than this import would make: move it, or replace it (--again)"
        )
    if there:
        Corpus.open(folder).close()  # nothing that is no corpus is replaced
    if (aside / FILE).exists():  # left whole by a kill; what is not whole is taken over
        shutil.rmtree(aside)
    exchange.make(aside, wanted.source, wanted.ids, wanted.identity, "float32", wanted.paths, wanted.lengths)
    if there:
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    aside.rename(folder)
    shutil.rmtree(former, ignore_errors=True)
    return Corpus.open(folder)


def closeness(corpus: Corpus, embedder: Embedder, count: int) -> dict[str, float]:
    """How near the corpus' vectors are to those that `embedder` makes of the same frames here: cosines of up to `count`
    videos, spread over the corpus; those without frames, and those that cannot be decoded, are passed over."""
    places = corpus.places()
    spread = list(places)[:: max(1, len(places) // max(1, count))][:count]
    cosines = {}
    with torch.no_grad():
        for video in spread:
            try:
                [features] = embedder.videos.encode_all([Path(places[video])])
            except VideoError:
                continue
            [vector] = embedder.embed_videos([features]).cpu()
            cosines[video] = float(vector @ corpus.matrix().rows[corpus.row(video)].float())
    return cosines
