"""The corpus catalogue: one SQLite file that says which videos exist, where their vectors lie, and who made them.

The file is in WAL mode and is the only truth: a segment of vectors exists once a commit here names it. Connections live
for one operation, so readers on any thread and a writer never share one, and nothing stays open across a fork. SQLite's
own header fields carry our mark (`application_id`) and the format version (`user_version`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vsr1.corpus.segments import Segment, flush
from vsr1.errors import CorpusError

FILE = "catalogue.sqlite"
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


@dataclass(frozen=True)
class Identity:
    """What every vector of one corpus has in common."""

    embedder_id: str
    dimension: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Video:
    """One live video: `segment` and `position` say where its vector lies; duration in seconds."""

    video_id: str
    path: str | None
    duration: float | None
    segment: int
    position: int


@dataclass(frozen=True)
class Contents:
    """The catalogue at one commit: its `generation` counts commits; videos in the order they were added."""

    generation: int
    segments: tuple[Segment, ...]
    videos: tuple[Video, ...]


def create_catalogue(folder: Path, identity: Identity) -> None:
    """Makes an empty catalogue in `folder`; it appears whole or not at all."""
    aside = folder / (FILE + ".aside")
    for leftover in folder.glob(f"{aside.name}*"):
        leftover.unlink()
    connection = sqlite3.connect(aside, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
        connection.execute(
            "INSERT INTO corpus VALUES (?, ?, ?, 0)", (identity.embedder_id, identity.dimension, identity.dtype)
        )
        connection.execute(f"PRAGMA application_id = {_MARK}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
    finally:
        connection.close()
    flush(aside)
    aside.rename(folder / FILE)
    flush(folder)


@contextmanager
def connect(folder: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection for one operation, inside one transaction; `write` takes the corpus' one write lock.

    The transaction is committed when the block ends and rolled back when it raises. Raises CorpusError where the folder
    is missing, is no corpus, is of another format, is damaged, or where another process holds the lock too long.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise CorpusError(f"no corpus at '{folder}': there is no such folder; make one with Corpus.create")
    if not path.is_file():
        raise CorpusError(f"folder '{folder}' is not a corpus: it has no {FILE}; make one with Corpus.create")
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
        try:
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
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise CorpusError(
                f"corpus '{folder}' has been locked by another writer for {_LOCK_SECONDS:g} s: wait until it ends"
            ) from error
        raise CorpusError(f"catalogue '{path}' cannot be used: {error}") from error
    except sqlite3.DatabaseError as error:
        raise CorpusError(
            f"catalogue '{path}' is damaged ({error}): restore the folder from a copy, or build the corpus again"
        ) from error


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


def insert(connection: sqlite3.Connection, segment: Segment, videos: Sequence[Video]) -> None:
    """Names a segment and its videos; they exist once the transaction is committed."""
    connection.execute(
        "INSERT INTO segments VALUES (?, ?, ?, ?)", (segment.number, segment.file, segment.rows, segment.sha256)
    )
    connection.executemany(
        "INSERT INTO videos (video_id, path, duration, segment, position) VALUES (?, ?, ?, ?, ?)",
        [(v.video_id, v.path, v.duration, v.segment, v.position) for v in videos],
    )
    _count_commit(connection)


def mark_deleted(connection: sqlite3.Connection, video_ids: Sequence[str]) -> None:
    """Takes live videos out of the corpus; their vectors stay in the segments, unused."""
    connection.executemany(
        "UPDATE videos SET state = 'deleted' WHERE video_id = ? AND state = 'live'", [(v,) for v in video_ids]
    )
    _count_commit(connection)


def _count_commit(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE corpus SET generation = generation + 1")
