"""Frames of many videos in the order they are asked for, decoded ahead of the caller, whatever the files are like.

    with Loader(Sampling(fps=1, max_frames=64), failures="skip") as loader:
        for sample in loader.load(paths):
            use(sample.row, sample.frames)
    print(loader.report.failures)

Decoding begins with the call of `load`. Each of `workers` threads drives one decoding process (`vsr1.video.pool`) through
the rows ahead of the caller. Frames come back in shared memory and are handed over as tensors without a copy. What waits for
the caller is bounded in bytes: a process that has a file's first frame may go on only when there is room for all of its
frames, except for the one that the caller waits for, which is never held up. So at most `queue_bytes` and one more video wait.

A row fails by its file's fault or the decoder's: it cannot be decoded, crashes or hangs its process, or takes too
much memory. Only that row is lost, and the report names it.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from vsr1.errors import VideoError
from vsr1.video.cache import FrameCache, cache_key
from vsr1.video.decode import as_frames, check_size
from vsr1.video.frames import Frames
from vsr1.video.pool import Admit, Room, Worker
from vsr1.video.pyav import Pictures
from vsr1.video.sampling import Sampling
from vsr1.video.sources import pictures
from vsr1.video.worker import Decode

log = logging.getLogger(__name__)

ISOLATION = ("process", "thread")
FAILURES = ("raise", "skip", "replace")
REPLACEMENTS = 8  # in a row for one row; who gives eight broken files has no good ones
KILL_SECONDS = 0.02  # between looks whether a killed process' thread has ended

Row = str | os.PathLike[str] | tuple[str | os.PathLike[str], Sampling]
Wanted = tuple[str, Sampling]
Outcome = tuple[int, str, Pictures | VideoError]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """Frames for row `row` of what was asked for; `frames.source` is the file, another than asked if it was replaced."""

    row: int
    frames: Frames


@dataclass(frozen=True)
class Failure:
    """A file that could not be decoded for a row, why, and which file took its place, if any did."""

    row: int
    path: Path
    reason: str
    replacement: Path | None = None


@dataclass
class Report:
    """What a loader has done: rows `given`; files `decoded`, and those found in the `cache`; what failed, in order."""

    given: int = 0
    decoded: int = 0
    cached: int = 0
    failures: list[Failure] = field(default_factory=list)


@dataclass(eq=False)
class _Job:
    """A video to decode once for all of the waiting rows that want it."""

    wanted: Wanted
    rows: int = 0
    bytes: int = 0
    future: Future[Pictures] = field(default_factory=Future)


class Loader:
    """Decodes videos ahead of its caller.

    Args:
        sampling: which frames of every video; a row may bring its own.
        size: (height, width) that frames are resized to; None keeps each video's own.
        workers: processes or threads that decode; 0: one per core.
        isolation: "process": a file that crashes, hangs, or takes too much memory costs its row and nothing else; each
            process takes about a quarter of a second of computing to start, and 60 MB. "thread": nothing to start, and
            half a millisecond less for each file, which tiny clips may notice; but a crash of the decoder ends the
            run, and `seconds` and `memory` are not kept.
        failures: "raise": a file that fails raises its VideoError when its row is due. "skip": its row is left out.
            "replace": `replacement` names another file.
        replacement: is told the VideoError and the row, and gives a path (or path and Sampling) to take instead; it is
            called in the caller's thread, in the order of rows.
        seconds: in which a file must be decoded; then its process is killed and replaced.
        memory: bytes that decoding a file may take, and its frames as well (the former is kept on Linux alone).
        queue_bytes: of decoded frames that may wait for the caller, and one video more.
        ahead: rows that are looked at ahead of the caller. Rows among them that want the same video share one decoding,
            unless `queue_bytes` are too few to keep it.
        cache: keeps decoded frames on disk for later; see `FrameCache`.
        decode: what decodes a file, given as a function of a module; tests pass others.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        size: tuple[int, int] | None = None,
        workers: int = 0,
        isolation: str = "process",
        failures: str = "raise",
        replacement: Callable[[VideoError, int], Row] | None = None,
        seconds: float = 60.0,
        memory: int = 2 << 30,
        queue_bytes: int = 1 << 30,
        ahead: int = 64,
        cache: FrameCache | None = None,
        decode: Decode = pictures,
    ) -> None:
        check_size(size)
        for name, value, choices in (("isolation", isolation, ISOLATION), ("failures", failures, FAILURES)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got '{value}'")
        if (failures == "replace") != (replacement is not None):
            raise ValueError("failures='replace' and a replacement go together")
        for name, number, least in (("workers", workers, 0), ("memory", memory, 1), ("queue_bytes", queue_bytes, 1)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if not seconds > 0 or ahead < 1:
            raise ValueError(f"seconds must be above 0 and ahead at least 1, got {seconds} and {ahead}")
        self.sampling, self.size, self.failures, self.replacement = sampling, size, failures, replacement
        self.queue_bytes, self.ahead, self.cache, self.decode = queue_bytes, ahead, cache, decode
        self.report = Report()
        number = workers or os.cpu_count() or 1
        self.isolated = isolation == "process"
        # The last one is for what is wanted at once when the others are busy with what is wanted later.
        self.workers = [Worker(decode, seconds, memory) for _ in range(number + 1)]
        self._current: _Load | None = None
        self._finalizer = weakref.finalize(self, _stop, self.workers)

    def load(self, rows: Iterable[Row]) -> Loading[Sample]:
        """Frames for each row, a path or (path, Sampling), in the order of rows; rows are taken at most `ahead` ahead.

        Decoding begins at once. Rows of the same video may be given the same tensors: do not write into them. Ending the
        iterator early (closing it, losing it, an exception, Ctrl-C) ends what is being decoded; one load runs at a time.

        Raises:
            VideoError: a file cannot be decoded, and `failures` is "raise"; or replacements fail as well.
            BackendUnavailable: a decoding process cannot be started.
            RuntimeError: another load of this loader has not ended.
        """
        load = self._begin(rows, self.failures)

        def samples() -> Iterator[Sample]:
            for row, path, found in load.outcomes():
                assert not isinstance(found, VideoError)
                yield Sample(row, as_frames(path, found))

        return Loading(load, samples())

    def results(self, rows: Iterable[Row]) -> Loading[tuple[Path, Frames | VideoError]]:
        """As `load`, but each row's path with its frames or, whatever `failures` says, its VideoError."""
        load = self._begin(rows, "give")

        def pairs() -> Iterator[tuple[Path, Frames | VideoError]]:
            for _, path, found in load.outcomes():
                yield Path(path), found if isinstance(found, VideoError) else as_frames(path, found)

        return Loading(load, pairs())

    def _begin(self, rows: Iterable[Row], failures: str) -> _Load:
        if self._current is not None:
            raise RuntimeError("this loader is loading already: end that iterator first, or take another loader")
        self._current = load = _Load(self, iter(rows), failures)
        try:
            load.look_ahead()
        except BaseException:
            load.close()
            raise
        return load

    def close(self) -> None:
        """End the decoding processes; a later load starts new ones."""
        if self._current is not None:
            self._current.close()
        _stop(self.workers)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stop(workers: list[Worker]) -> None:
    for worker in workers:
        worker.stop()


class Loading(Iterator[Item]):
    """What a load hands over; the load ends with it, be it by an error, by `close`, or because nobody holds it any more."""

    def __init__(self, load: _Load, items: Iterator[Item]) -> None:
        self._load, self._items = load, items

    def __next__(self) -> Item:
        try:
            return next(self._items)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._load.close()

    def __del__(self) -> None:
        self.close()


class _Load:
    """One run over rows: what waits to be decoded, what waits for the caller, and the threads between."""

    def __init__(self, loader: Loader, rows: Iterator[Row], failures: str) -> None:
        self.loader, self.rows, self.failures = loader, rows, failures
        self.room = Room(loader.queue_bytes)
        self.jobs: dict[Wanted, _Job] = {}
        self.queue: deque[_Job] = deque()
        self.ahead: deque[Wanted] = deque()
        self.closed = False
        self.changed = threading.Condition()
        *self.workers, self.spare = loader.workers
        self.threads: list[threading.Thread] = []

    def look_ahead(self) -> None:
        """Take as many more rows as may be looked at, and have them decoded."""
        self.ahead.extend(self._expect(item) for item in islice(self.rows, self.loader.ahead - len(self.ahead)))

    def outcomes(self) -> Iterator[Outcome]:
        """Row by row its file and what came of it; rows that are skipped are left out."""
        for row in count():
            if self.closed:
                raise RuntimeError("this loader was closed while it was loading")
            self.look_ahead()
            if not self.ahead:
                return
            outcome = self._row(row, self.ahead.popleft())
            if outcome is not None:
                self.loader.report.given += not isinstance(outcome[1], VideoError)
                yield row, *outcome

    def close(self) -> None:
        """End all that is going on; what the caller has stays his."""
        if self.closed:
            return
        with self.changed:
            self.closed = True
            self.queue.clear()
            self.changed.notify_all()
        self.room.close()
        for thread, worker in zip(self.threads, self.workers, strict=False):
            while thread.is_alive():
                if worker.busy:
                    worker.kill()
                thread.join(KILL_SECONDS)
        for job in self.jobs.values():
            job.future.cancel()
        self.loader._current = None

    def _wanted(self, item: Row) -> Wanted:
        path, sampling = item if isinstance(item, tuple) else (item, self.loader.sampling)
        return os.fspath(path), sampling

    def _expect(self, item: Row) -> Wanted:
        """Note that one more row wants this video; the first one has it decoded."""
        wanted = self._wanted(item)
        job = self.jobs.get(wanted)
        if job is None:
            job = self.jobs[wanted] = _Job(wanted)
            with self.changed:
                self.queue.append(job)
                self.changed.notify()
            if len(self.threads) < len(self.workers):  # no more of them, and of processes, than there are files
                self._start(self.workers[len(self.threads)])
        job.rows += 1
        return wanted

    def _start(self, worker: Worker) -> None:
        name = f"vsr1-load-{len(self.threads)}"
        thread = threading.Thread(target=self._drive, args=(worker,), name=name, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _row(self, row: int, wanted: Wanted) -> tuple[str, Pictures | VideoError] | None:
        """The file and the frames for the row that is due, or why there are none; None if it is skipped."""
        loader = self.loader
        take = self._due
        for _ in range(REPLACEMENTS + 1):
            try:
                return wanted[0], take(wanted)
            except VideoError as error:
                failed = error
            replacement = None
            if self.failures == "replace" and loader.replacement is not None:
                wanted, take = self._wanted(loader.replacement(failed, row)), self._at_once
                replacement = Path(wanted[0])
            loader.report.failures.append(Failure(row, Path(failed.path), failed.reason, replacement))
            log.warning("row %d: %s%s", row, failed, f"; '{replacement}' takes its place" if replacement else "")
            if self.failures == "raise":
                raise failed
            if self.failures == "skip":
                return None
            if self.failures == "give":
                return wanted[0], failed
        raise VideoError(
            failed.path, f"{failed.reason}; row {row} has had {REPLACEMENTS} replacements, and none is any good"
        )

    def _due(self, wanted: Wanted) -> Pictures:
        """What was decoded for the row that is due; it is kept only if a row that waits wants it, and there is room."""
        job = self.jobs.get(wanted)
        if job is None:
            return self._at_once(wanted)
        self.room.due(job)
        try:
            return job.future.result()
        finally:
            job.rows -= 1
            if job.rows == 0 or self.room.used > self.room.limit:
                del self.jobs[wanted]
                self.room.free(job.bytes)

    def _at_once(self, wanted: Wanted) -> Pictures:
        """What no thread is to decode: a replacement, or what there was no room to keep."""
        job = self.jobs.get(wanted)
        if job is not None and job.future.done():
            return job.future.result()
        decoded, key = self._obtain(self.spare, wanted, lambda bytes: None)
        self._keep(key, decoded)
        return decoded

    def _drive(self, worker: Worker) -> None:
        """What each thread does: job after job, with a process of its own."""
        while (job := self._next()) is not None:
            try:
                decoded, key = self._obtain(worker, job.wanted, partial(self._admit, job))
            except BaseException as error:  # whatever it is, it is the caller's, who waits for the outcome
                self.room.free(job.bytes)
                job.bytes = 0
                job.future.set_exception(error)
            else:
                job.future.set_result(decoded)
                self._keep(key, decoded)

    def _next(self) -> _Job | None:
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.queue)
            return None if self.closed else self.queue.popleft()

    def _admit(self, job: _Job, bytes: int) -> None:
        self.room.take(job, bytes)
        job.bytes = bytes

    def _obtain(self, worker: Worker, wanted: Wanted, admit: Admit) -> tuple[Pictures, str | None]:
        """Frames out of the cache or the file; if they are fresh, with the key to keep them by."""

        def allocate(shape: tuple[int, int, int, int]) -> np.ndarray:
            admit(math.prod(shape))
            return np.empty(shape, np.uint8)

        loader = self.loader
        path, sampling = wanted
        key = None
        if loader.cache is not None:
            key = cache_key(path, sampling, loader.size)
            if (found := loader.cache.get(key, allocate)) is not None:
                self._count(cached=1)
                return found, None
        if loader.isolated:
            decoded = worker.decode(path, sampling, loader.size, admit)
        else:
            decoded = loader.decode(path, sampling, size=loader.size, threads=1, allocate=allocate)
        self._count(decoded=1)
        return decoded, key

    def _keep(self, key: str | None, decoded: Pictures) -> None:
        if key is not None and self.loader.cache is not None:
            try:
                self.loader.cache.put(key, decoded)
            except OSError as error:
                log.warning("frames are not kept in '%s': %s", self.loader.cache.folder, error)

    def _count(self, decoded: int = 0, cached: int = 0) -> None:
        with self.changed:
            self.loader.report.decoded += decoded
            self.loader.report.cached += cached
