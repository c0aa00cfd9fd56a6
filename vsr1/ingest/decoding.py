"""Decoding ahead of the model: batches of frames made by threads while the caller embeds.

`decoded` is the one place that decodes. `Batches` runs it in a thread of its own and hands over groups of videos,
bounded in number and in bytes: one group is being embedded, one waits, one is being filled.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING

from vsr1.corpus import FileMark
from vsr1.errors import VideoError
from vsr1.ingest.listing import Failure
from vsr1.ingest.plan import Video, changing, mark_of, still
from vsr1.video import Frames, Loader, Sampling

if TYPE_CHECKING:
    from vsr1.models.vision import VideoSettings

GROUP_BYTES = 512 << 20  # of frames in one group, which holds one video at least
_LOOK_SECONDS = 0.1  # between looks whether the caller has gone


def decoded(paths: Iterable[Path], settings: VideoSettings, workers: int) -> Iterator[tuple[Path, Frames | VideoError]]:
    """The frames of each path as the model samples them, or why there are none; in order, decoded by `workers` processes, so
    that a file that crashes or hangs its decoder is one failure and no more.

    `paths` is read as far ahead as decoding needs. Whatever decodes videos for an ingestion is called here and nowhere else.
    """
    with Loader(Sampling(fps=settings.fps, max_frames=settings.max_frames), workers=workers) as loader:
        yield from loader.results(paths)


@dataclass(frozen=True)
class Decoded:
    """A video that can be embedded; `mark` says what its file was."""

    video: Video
    mark: FileMark
    frames: Frames


@dataclass
class Group:
    """Videos to embed together, and what failed meanwhile."""

    videos: list[Decoded] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Batches:
    """Groups of at most `batch` decoded videos, in order. `seconds` is how long they took to make, waiting for the caller
    left out. To be used as a context manager, which ends the threads."""

    def __init__(self, videos: Sequence[Video], settings: VideoSettings, workers: int, batch: int) -> None:
        self.seconds = 0.0
        self._videos, self._settings, self._workers, self._batch = videos, settings, workers, batch
        self._queue: Queue[Group | None] = Queue(1)
        self._left = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vsr1-ingest")
        self._made: Future[None] = Future()

    def __enter__(self) -> Batches:
        self._made = self._pool.submit(self._make)
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._pool.shutdown()

    def __iter__(self) -> Iterator[Group]:
        while True:
            try:
                group = self._queue.get(timeout=_LOOK_SECONDS)  # so that Ctrl-C is heard
            except Empty:
                continue
            if group is None:
                return self._made.result()  # which raises what ended it
            yield group

    def _make(self) -> None:
        began = time.monotonic()
        try:
            for group in self._groups():
                self.seconds += time.monotonic() - began
                self._put(group)
                began = time.monotonic()
        finally:
            self._put(None)

    def _put(self, group: Group | None) -> None:
        while not self._left.is_set():
            try:
                self._queue.put(group, timeout=_LOOK_SECONDS)
            except Full:
                continue
            return

    def _groups(self) -> Iterator[Group]:
        group, held = Group(), 0
        for one in self._decoded():
            if isinstance(one, Failure):
                group.failures.append(one)
                continue
            weight = one.frames.pixels.nbytes
            if group.videos and held + weight > GROUP_BYTES:
                yield group
                group, held = Group(), 0
            group.videos.append(one)
            held += weight
            if len(group.videos) == self._batch:
                yield group
                group, held = Group(), 0
        if group.videos or group.failures:
            yield group

    def _decoded(self) -> Iterator[Decoded | Failure]:
        waiting: deque[tuple[Video, FileMark]] = deque()
        unread: deque[Failure] = deque()

        def readable() -> Iterator[Path]:
            for video, mark in self._marked():
                if isinstance(mark, Failure):
                    unread.append(mark)
                else:
                    waiting.append((video, mark))
                    yield Path(video.path)

        for _, frames in decoded(readable(), self._settings, self._workers):
            if self._left.is_set():
                return
            while unread:
                yield unread.popleft()
            video, mark = waiting.popleft()
            if isinstance(frames, VideoError):
                yield Failure(video.path, frames.reason)
            elif not still(video.path, (mark.size, mark.modified)):
                yield changing(video.path)
            else:
                yield Decoded(video, mark, frames)
        yield from unread

    def _marked(self) -> Iterator[tuple[Video, FileMark | Failure]]:
        """Each video with its mark; files are read a little ahead, which also brings them into memory."""
        pending: deque[tuple[Video, Future[FileMark | Failure]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="vsr1-hash")
        try:
            for video in self._videos:
                pending.append((video, pool.submit(mark_of, video)))
                if len(pending) > self._workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
