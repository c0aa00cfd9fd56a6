"""`add`: the files of some folders into a corpus, batch by batch.

The corpus is told of a batch in one commit: new rows, the rows they replace, and what the files were. So whatever ends a
run, the corpus is what it was after some batch, and the next run finds by the marks what is still to be done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from vsr1.corpus import Corpus, FileMark
from vsr1.corpus.catalogue import FILE
from vsr1.corpus.creation import alone
from vsr1.errors import ConfigError, CorpusError
from vsr1.ingest import plan as planning
from vsr1.ingest.decoding import Batches, Decoded
from vsr1.ingest.listing import EXTENSIONS, Failure, find
from vsr1.ingest.plan import Plan, Twin
from vsr1.ingest.report import IngestReport, keep

if TYPE_CHECKING:
    from vsr1.models.embedder import Embedder

TWINS_AT_ONCE = 1024  # rows in one commit where there is nothing to compute
MANY_SEGMENTS = 64  # files of vectors; with more of them the run ends with a compaction


class Progress(Protocol):
    """Is told how far a phase is: `name` of it, steps `done` of `total`, and the rates so far."""

    def __call__(self, name: str, done: int, total: int, note: str = "") -> None: ...


def add(
    corpus: Corpus | str | os.PathLike[str],
    paths: Iterable[str | os.PathLike[str]],
    embedder: Embedder,
    *,
    workers: int = 0,
    batch: int = 16,
    extensions: Collection[str] = EXTENSIONS,
    names: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> IngestReport:
    """Add the videos among `paths` (files, and folders with all that lies below) to a corpus; call it again to go on after
    a kill, to take in changes, and to try again what failed.

    Args:
        corpus: a corpus or its folder, where one is made if there is none.
        embedder: what the corpus was, or will be, made with.
        workers: files decoded at a time; 0: one per core.
        batch: videos embedded and committed together.
        extensions: what a video's name ends with, below folders; case does not matter.
        names: the ids of videos by their absolute paths, where they are not to be known by their files' names.
        progress: called from this thread.

    A file that cannot be read, decoded or embedded is one of the report's `failures`, which are written to `failures.jsonl`
    in the corpus folder as well; a row that it had before stays. What each file becomes: `vsr1.ingest.plan`.

    Raises:
        ConfigError: a path is not there, there is no video at all, or two files would have one id.
        CorpusError: the corpus is another embedder's, damaged, cannot be written, or is being written by another run.
        ValueError: `workers` or `batch` is out of range.
    """
    if workers < 0 or batch < 1:
        raise ValueError(f"workers must not be negative and batch at least 1, got {workers} and {batch}")
    began = time.monotonic()
    roots = [os.path.abspath(path) for path in paths]
    found, failures = find(roots, extensions)
    if names:
        found = [replace(one, name=names.get(one.path, one.name)) for one in found]
    if not found and not failures:
        raise ConfigError(f"no video below {', '.join(map(repr, roots))} (a name must end with {' '.join(extensions)})")
    opened = corpus if isinstance(corpus, Corpus) else _opened(Path(corpus), embedder)
    if opened.embedder_id != embedder.identity:
        Corpus.open(opened.folder, embedder.identity)  # says so
    with alone(opened.folder, "added to"):
        opened.refresh()
        run = _Run(opened, embedder, workers or os.cpu_count() or 1, batch, progress)
        report = run.report
        report.failures = tuple(failures)
        run.run(planning.make(opened, found, run.workers, run.checking), len(found))
        listed = {one.path for one in found}
        report.missing = tuple(
            video_id
            for video_id, path in opened.places().items()
            if path not in listed and _below(path, roots) and not os.path.exists(path)
        )
        report.seconds = time.monotonic() - began
        run.writing(lambda: keep(report.failures, opened.folder))
    return report


def _opened(folder: Path, embedder: Embedder) -> Corpus:
    if (folder / FILE).exists():
        return Corpus.open(folder, embedder.identity)
    try:
        return Corpus.create(folder, embedder.dimension, embedder.identity)
    except OSError as error:
        raise CorpusError(f"cannot make a corpus at '{folder}': {error.strerror}") from error


def _below(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(os.path.join(root, "")) for root in roots)


class _Run:
    """One call of `add`, after the files are known."""

    def __init__(self, corpus: Corpus, embedder: Embedder, workers: int, batch: int, progress: Progress | None) -> None:
        self.corpus, self.embedder, self.workers, self.batch = corpus, embedder, workers, batch
        self.progress = progress
        self.report = IngestReport(corpus.folder)

    def checking(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("check", done, total)

    def run(self, plan: Plan, total: int) -> None:
        """Do what the plan says; `total` files were found."""
        report = self.report
        report.unchanged = plan.unchanged
        report.failures += tuple(plan.failures)
        done = total - len(plan.embed)
        if plan.touched:
            self.writing(lambda: self.corpus.mark(plan.touched))
        if plan.twins:
            self._take_over(plan.twins)
        if self.progress is not None and plan.embed:
            self.progress("index", done, total)
        began = time.monotonic()
        with Batches(plan.embed, self.embedder.videos.settings, self.workers, self.batch) as batches:
            for group in batches:
                report.failures += tuple(group.failures)
                report.decoded += len(group.videos)
                started = time.monotonic()
                embedded = self._embed(group.videos)
                report.embed_seconds += time.monotonic() - started
                self._commit(embedded)
                report.embedded += len(embedded)
                report.decode_seconds, report.seconds = batches.seconds, time.monotonic() - began
                done += len(group.videos) + len(group.failures)
                if self.progress is not None:
                    self.progress("index", done, total, report.rates())
        if self.corpus.segment_count > MANY_SEGMENTS:
            self.writing(self.corpus.compact)

    def _take_over(self, twins: Sequence[Twin]) -> None:
        """Rows of known content: all of it is read before any row moves."""
        vectors = planning.vectors_of(self.corpus, twins)
        durations = [self.corpus.duration(one.twin) for one in twins]
        for begin in range(0, len(twins), TWINS_AT_ONCE):
            part = slice(begin, begin + TWINS_AT_ONCE)
            marks = {one.video.video_id: one.mark for one in twins[part]}
            paths = [one.video.path for one in twins[part]]
            leaving = {one.twin for one in twins[part] if one.leaves}
            self.report.renamed += len(leaving)
            self._count([one.video.video_id for one in twins[part] if not one.leaves])
            self._add(marks, vectors[part], paths, durations[part], leaving)

    def _embed(self, videos: Sequence[Decoded]) -> list[tuple[Decoded, Tensor]]:
        """The videos with their vectors (D,). What the model cannot take, whole or in ever smaller parts, is a failure of
        the file: a shape it has no size for, more frames than fit into its memory, numbers that are not finite."""
        if not videos:
            return []
        try:
            with torch.no_grad():
                vectors = self.embedder.embed_videos(self.embedder.videos.encode_frames([one.frames for one in videos]))
        except (ValueError, torch.OutOfMemoryError) as error:
            if len(videos) > 1:
                middle = len(videos) // 2
                return self._embed(videos[:middle]) + self._embed(videos[middle:])
            self.report.failures += (Failure(videos[0].video.path, f"cannot be embedded: {error}"),)
            return []
        stored = vectors.to("cpu", self.corpus.dtype)
        finite = stored.isfinite().all(dim=1).tolist()
        self.report.failures += tuple(
            Failure(one.video.path, "cannot be embedded: its vector is not finite")
            for one, well in zip(videos, finite, strict=True)
            if not well
        )
        return [(one, vector) for one, vector, well in zip(videos, stored, finite, strict=True) if well]

    def _commit(self, embedded: Sequence[tuple[Decoded, Tensor]]) -> None:
        if not embedded:
            return
        videos = [one for one, _ in embedded]
        marks = {one.video.video_id: one.mark for one in videos}
        self._count(list(marks))
        vectors = torch.stack([vector for _, vector in embedded])
        self._add(marks, vectors, [one.video.path for one in videos], [one.frames.duration for one in videos], ())

    def _count(self, video_ids: Sequence[str]) -> None:
        replaced = sum(video_id in self.corpus for video_id in video_ids)
        self.report.replaced += replaced
        self.report.added += len(video_ids) - replaced

    def _add(
        self,
        marks: Mapping[str, FileMark],
        vectors: Tensor,
        paths: Sequence[str],
        durations: Sequence[float | None],
        leaving: Collection[str],
    ) -> None:
        """One commit: the videos of `marks`, in order, instead of those of the same ids and of those that are `leaving`."""
        ids = list(marks)
        self.writing(
            lambda: self.corpus.add(
                ids, vectors, paths=paths, durations=durations, marks=marks, replacing={*ids, *leaving}
            )
        )

    def writing(self, write: Callable[[], None]) -> None:
        """Run `write`, which touches the disk; CorpusError where that is full or may not be written."""
        try:
            write()
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CorpusError(
                f"corpus '{self.corpus.folder}' cannot be written: {reason}; all batches before this one are in it, and "
                "the same command goes on"
            ) from error
