"""What is to be done with each file, from what the corpus knows of it.

A video's id is the name its file had when it first came in: one path, one id, for as long as the file lies there. The
content decides the rest. Size and time of change stand for it where both are as they were; a file is read and its
SHA-256 taken only where they are not, or where another video has just its size:

- same path, same content: unchanged; nothing is decoded.
- same path, other content: embedded again, and the new row replaces the old one in one commit.
- another path, content that the corpus has: its vector is taken over, nothing is decoded. If the old file is gone this
  is a renamed video, and the old id leaves in the same commit; if not, both are there.
- anything else is new.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from vsr1.corpus import Corpus, FileMark
from vsr1.errors import ConfigError
from vsr1.ingest.listing import Failure, Found, look


@dataclass(frozen=True)
class Video:
    """A file under the id it has or gets."""

    video_id: str
    path: str


@dataclass(frozen=True)
class Twin:
    """A video whose content the corpus has as `twin`; the twin leaves if it `leaves`."""

    video: Video
    mark: FileMark
    twin: str
    leaves: bool


@dataclass
class Plan:
    """What is to be done: nothing but noting a mark (`touched`), taking over a vector (`twins`), or `embed`."""

    unchanged: int = 0
    touched: dict[str, FileMark] = field(default_factory=dict)
    twins: list[Twin] = field(default_factory=list)
    embed: list[Video] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


def make(
    corpus: Corpus, found: Sequence[Found], workers: int, progress: Callable[[int, int], None] | None = None
) -> Plan:
    """Compare `found` with the corpus; files that must be read for it are read by `workers` threads, and `progress` is
    told (files read, all such). Raises ConfigError where two files would have one id."""
    plan, marks, places = Plan(), corpus.marks(), corpus.places()
    ids = _ids(found, places)
    sizes = {mark.size for mark in marks.values()}
    doubtful = []
    for one in found:
        video = Video(ids[one.path], one.path)
        mark = marks.get(video.video_id)
        if mark and places.get(video.video_id) == one.path and (mark.size, mark.modified) == (one.size, one.modified):
            plan.unchanged += 1
        elif one.size in sizes:
            doubtful.append(video)
        else:
            plan.embed.append(video)
    content = _Content(marks, places)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vsr1-hash")
    try:
        for count, (video, now) in enumerate(zip(doubtful, pool.map(mark_of, doubtful), strict=True), 1):
            if isinstance(now, Failure):
                plan.failures.append(now)
            elif (mark := marks.get(video.video_id)) and mark.sha256 == now.sha256 and content.lies(video):
                plan.unchanged += 1
                plan.touched[video.video_id] = now
            elif (twin := content.twin(video, now)) is not None:
                plan.twins.append(twin)
            else:
                plan.embed.append(video)
            if progress is not None:
                progress(count, len(doubtful))
    finally:
        pool.shutdown(cancel_futures=True)
    return plan


class _Content:
    """The videos of the corpus by what their files held."""

    def __init__(self, marks: Mapping[str, FileMark], places: Mapping[str, str]) -> None:
        self.places = places
        self.left: set[str] = set()
        self.ids: dict[str, list[str]] = {}
        for video_id, mark in marks.items():
            self.ids.setdefault(mark.sha256, []).append(video_id)

    def lies(self, video: Video) -> bool:
        """Whether the video lies where the corpus says."""
        return self.places.get(video.video_id) == video.path

    def twin(self, video: Video, mark: FileMark) -> Twin | None:
        """The video with this content: the one of this id, else one whose file is gone and which leaves, else any."""
        same = self.ids.get(mark.sha256, [])
        if video.video_id in same:
            return Twin(video, mark, video.video_id, True)
        for twin in same:
            place = self.places.get(twin)
            if twin not in self.left and place is not None and not os.path.exists(place):
                self.left.add(twin)
                return Twin(video, mark, twin, True)
        return Twin(video, mark, same[0], False) if same else None


def vectors_of(corpus: Corpus, twins: Sequence[Twin]) -> Tensor:
    """The vectors (M, D) of the twins as the corpus has them now."""
    with Corpus.open(corpus.folder) as seen:  # its own memory: what is written meanwhile moves rows
        return seen.matrix().rows[[seen.row(one.twin) for one in twins]]


def mark_of(video: Video) -> FileMark | Failure:
    """Read a file and say what it is; a Failure where it cannot be read or changes meanwhile."""
    before = look(video.path)
    if isinstance(before, Failure):
        return before
    try:
        with open(video.path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return Failure(video.path, error.strerror or str(error))
    return FileMark(*before, content) if still(video.path, before) else changing(video.path)


def still(path: str, before: tuple[int, int]) -> bool:
    """Whether a file has the size and the time of change it had."""
    return look(path) == before


def changing(path: str) -> Failure:
    """The failure of a file that somebody writes while it is read."""
    return Failure(path, "the file changed while it was read; the next run takes it as it is then")


def _ids(found: Sequence[Found], places: dict[str, str]) -> dict[str, str]:
    """The id of each path: the one the corpus has for it, or else its name."""
    known = {path: video_id for video_id, path in places.items()}
    taken: dict[str, str] = {}
    for one in found:
        video_id = known.get(one.path, one.name)
        other = taken.get(video_id)
        place = places.get(video_id)
        if place not in (None, one.path) and os.path.exists(place) and not os.path.samefile(place, one.path):
            other = place
        if other is not None:
            raise ConfigError(
                f"'{one.path}' would have the video id '{video_id}', which is that of '{other}': give the folder above "
                "both instead, or rename one"
            )
        taken[video_id] = one.path
    return {path: video_id for video_id, path in taken.items()}
