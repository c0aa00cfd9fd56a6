"""The corpus catalogue: one SQLite file that says which videos exist, where their vectors lie, and who made them.

The file is in WAL mode and is the only truth: a segment of vectors exists once a commit here names it. Connections live
for one operation, so readers on any thread and a writer never share one, and nothing stays open across a fork. SQLite's
own header fields carry our mark (`application_id`) and the format version (`user_version`).

What a video's file was when it was embedded (`FileMark`) is kept beside the videos, in the same commits, so that it can
be told later whether the file is still that. Not every video has one; the table is made with the first.

`videos.added` only ever grows, and a segment has the number its first video gets there. So no number is used twice, not
even after a compaction has emptied the table: a segment's number and a position name one vector for good.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vsr1.corpus.segments import DTYPES, Segment, flush
from vsr1.errors import CorpusError

FILE = "catalogue.sqlite"
ASIDE = FILE + ".aside"  # a catalogue that is being made
FORMAT = 1
_MARK = 0x76737231  # "vsr1"
_LOCK_SECONDS = 10.0

_SCHEMA = """
CREATE TABLE corpus (
    embedder_id TEXT NOT NULL, dimension INTEGER NOT NULL, dtype TEXT NOT NULL, generation INTEGER NOT NULL
);
CREATE TABLE segments (
    number INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, rows INTEGER NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE videos (
    added INTEGER PRIMARY KEY AUTOINCREMENT, video_id TEXT NOT NULL, path TEXT, duration REAL,
    segment INTEGER NOT NULL REFERENCES segments (number), position INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'live' CHECK (state IN ('live', 'deleted'))
);
CREATE UNIQUE INDEX live_videos ON videos (video_id) WHERE state = 'live';
"""
_FILES = """
CREATE TABLE IF NOT EXISTS files (
    video_id TEXT PRIMARY KEY, size INTEGER NOT NULL, modified INTEGER NOT NULL, sha256 TEXT NOT NULL
)
"""


@dataclass(frozen=True)
class Identity:
    """What every vector of one corpus has in common."""

    embedder_id: str
    dimension: int
    dtype: str

    @classmethod
    def checked(cls, embedder_id: str, dimension: int, dtype: str) -> Identity:
        """The same, of values somebody gave; raises ValueError for those no corpus can have."""
        if dimension < 1:
            raise ValueError(f"dimension must be at least 1, got {dimension}")
        if not embedder_id:
            raise ValueError("embedder_id must name the model whose vectors the corpus holds; got an empty string")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        return cls(embedder_id, dimension, dtype)


@dataclass(frozen=True, slots=True)
class Video:
    """One live video: `segment` and `position` say where its vector lies; duration in seconds."""

    video_id: str
    path: str | None
    duration: float | None
    segment: int
    position: int


@dataclass(frozen=True, slots=True)
class FileMark:
    """A file as it was when it was embedded: `size` in bytes, `modified` in nanoseconds since the epoch, and the SHA-256
    of its content in hex."""

    size: int
    modified: int
    sha256: str


@dataclass(frozen=True)
class Contents:
    """The catalogue at one commit: its `generation` counts commits; videos in the order they were added."""

    generation: int
    segments: tuple[Segment, ...]
    videos: tuple[Video, ...]


@contextmanager
def new_catalogue(folder: Path, identity: Identity) -> Iterator[sqlite3.Connection]:
    """A new catalogue in `folder`: it appears, with all that the block inserts, when the block ends, or not at all."""
    for leftover in folder.glob(f"{ASIDE}*"):
        leftover.unlink()
    aside = folder / ASIDE
    connection = sqlite3.connect(aside, isolation_level=None)
    try:
        connection.executescript(_SCHEMA)
        connection.execute("BEGIN")
        connection.execute(
            "INSERT INTO corpus VALUES (?, ?, ?, 0)", (identity.embedder_id, identity.dimension, identity.dtype)
        )
        yield connection
        connection.execute("COMMIT")
        connection.execute(f"PRAGMA application_id = {_MARK}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        # Last: a log beside this name would not follow the rename, and what fails to leave it fails in silence.
        connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()
    flush(aside)
    aside.rename(folder / FILE)
    flush(folder)


@contextmanager
def connect(folder: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection for one operation, inside one transaction; `write` takes the corpus' one write lock.

    The transaction is committed when the block ends and rolled back when it raises. Raises CorpusError where the folder
    is missing, is no corpus, is of another format, is damaged, may not be written, or where another process holds the
    lock too long.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise CorpusError(f"no corpus at '{folder}': there is no such folder; make one with Corpus.create")
    if not path.is_file():
        if (folder / ASIDE).exists():
            raise CorpusError(
                f"folder '{folder}' is not a corpus yet: its making has not ended; make or import it again"
            )
        raise CorpusError(f"folder '{folder}' is not a corpus: it has no {FILE}; make one with Corpus.create")
    writable = os.access(folder, os.W_OK) and os.access(path, os.W_OK)
    if write and not writable:
        raise CorpusError(f"corpus '{folder}' may only be read here: copy the folder to where you may write")
    try:
        with _opened(path) if writable else _opened_read_only(path) as connection:
            connection.execute(f"PRAGMA busy_timeout = {int(_LOCK_SECONDS * 1000)}")
            _check_format(path, connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back after a full disk
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise CorpusError(
                f"corpus '{folder}' has been locked by another writer for {_LOCK_SECONDS:g} s: try again when it has "
                "ended (a compaction can take long)"
            ) from error
        raise CorpusError(f"catalogue '{path}' cannot be used: {error}") from error
    except sqlite3.DatabaseError as error:
        raise CorpusError(
            f"catalogue '{path}' is damaged ({error}): restore the folder from a copy, or build the corpus again"
        ) from error


@contextmanager
def _opened(path: Path, options: str = "mode=rw") -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def _opened_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """The catalogue in a folder that may not be written, where SQLite cannot make the files it keeps beside a log.

    Without a log the file is whole and read as it lies (`immutable`), unlocked: should a writer elsewhere fold a log
    into it meanwhile, that is an error here, not a mixture. With a log, SQLite needs the files its writer made.
    """
    log = path.with_name(path.name + "-wal")
    if log.exists() and log.stat().st_size > 0:
        if not path.with_name(path.name + "-shm").exists():
            raise CorpusError(
                f"the last commits of '{path}' are still in '{log.name}', which cannot be read in a folder that may not "
                "be written: copy the folder to where you may write, and open it there once"
            )
        with _opened(path, "mode=ro") as connection:
            yield connection
        return
    before = path.stat()
    with _opened(path, "mode=ro&immutable=1") as connection:
        yield connection
    after = path.stat()
    if (before.st_ino, before.st_mtime_ns, before.st_size) != (after.st_ino, after.st_mtime_ns, after.st_size):
        raise CorpusError(f"catalogue '{path}' was written while it was read: try again")


def _check_format(path: Path, connection: sqlite3.Connection) -> None:
    mark = connection.execute("PRAGMA application_id").fetchone()[0]
    if mark != _MARK:
        raise CorpusError(f"'{path}' was not written by vsr1 (its mark is {mark:#x}, ours {_MARK:#x}): choose a corpus")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != FORMAT:
        raise CorpusError(f"'{path}' has format {version}, this vsr1 reads format {FORMAT}: use a matching version")


def read_identity(connection: sqlite3.Connection) -> Identity:
    """Who made the corpus and what its vectors are."""
    return Identity(*connection.execute("SELECT embedder_id, dimension, dtype FROM corpus").fetchone())


def read_generation(connection: sqlite3.Connection) -> int:
    """How many commits changed the corpus."""
    return int(connection.execute("SELECT generation FROM corpus").fetchone()[0])


def read_contents(connection: sqlite3.Connection) -> Contents:
    """All live videos and all segments, at the commit this connection's transaction sees."""
    segments = connection.execute("SELECT number, file, rows, sha256 FROM segments ORDER BY number")
    videos = connection.execute(
        "SELECT video_id, path, duration, segment, position FROM videos WHERE state = 'live' ORDER BY added"
    )
    return Contents(
        read_generation(connection), tuple(Segment(*row) for row in segments), tuple(Video(*row) for row in videos)
    )


def next_number(connection: sqlite3.Connection) -> int:
    """The number of the segment to write next."""
    last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'videos'").fetchone()
    return 1 if last is None else int(last[0]) + 1


def insert(connection: sqlite3.Connection, segment: Segment, videos: Sequence[Video]) -> None:
    """Names a segment and its videos; they exist once the transaction is committed."""
    connection.execute(
        "INSERT INTO segments VALUES (?, ?, ?, ?)", (segment.number, segment.file, segment.rows, segment.sha256)
    )
    connection.executemany(
        "INSERT INTO videos (video_id, path, duration, segment, position) VALUES (?, ?, ?, ?, ?)",
        [(v.video_id, v.path, v.duration, v.segment, v.position) for v in videos],
    )


def mark_deleted(connection: sqlite3.Connection, video_ids: Sequence[str]) -> None:
    """Takes live videos out of the corpus; their vectors stay in the segments, unused, until a compaction."""
    connection.executemany(
        "UPDATE videos SET state = 'deleted' WHERE video_id = ? AND state = 'live'", [(v,) for v in video_ids]
    )
    if _has_marks(connection):
        connection.executemany("DELETE FROM files WHERE video_id = ?", [(v,) for v in video_ids])


def read_marks(connection: sqlite3.Connection) -> dict[str, FileMark]:
    """The marks of the videos that have one."""
    if not _has_marks(connection):
        return {}
    rows = connection.execute("SELECT video_id, size, modified, sha256 FROM files")
    return {video_id: FileMark(*mark) for video_id, *mark in rows}


def write_marks(connection: sqlite3.Connection, marks: Mapping[str, FileMark]) -> None:
    """Notes the marks of live videos, instead of those they had."""
    if not marks:
        return
    connection.execute(_FILES)
    connection.executemany(
        "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
        [(video_id, mark.size, mark.modified, mark.sha256) for video_id, mark in marks.items()],
    )


def _has_marks(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'files'").fetchone() is not None


def forget_all(connection: sqlite3.Connection) -> None:
    """Takes out every video, live or deleted, and every segment: how a compaction begins."""
    connection.execute("DELETE FROM videos")
    connection.execute("DELETE FROM segments")


def count_commit(connection: sqlite3.Connection) -> None:
    """What ends every transaction that changed the corpus: others see by the generation that they are behind."""
    connection.execute("UPDATE corpus SET generation = generation + 1")
