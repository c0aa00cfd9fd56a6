"""How a corpus comes to be: in a new or empty folder, whole or not at all.

Segments are written first and the catalogue that names them appears last, by a rename. An attempt that was killed is
known by its unfinished catalogue; nothing opens it, and the next attempt in that folder clears it away.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vsr1.corpus.catalogue import ASIDE, FILE, Identity, new_catalogue
from vsr1.corpus.segments import remove_leftovers
from vsr1.errors import CorpusError

VECTORS = "vectors"


@contextmanager
def making(folder: Path, identity: Identity) -> Iterator[sqlite3.Connection]:
    """A corpus being made in `folder`: it is there, with all that the block inserts, when the block ends.

    A block that raises leaves the folder as empty as it was. Raises CorpusError if the folder holds anything already,
    or if somebody else is making a corpus there.
    """
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"cannot make a corpus at '{folder}': it is a file")
    folder.mkdir(parents=True, exist_ok=True)
    vectors = folder / VECTORS
    with alone(folder, "made"):
        if (folder / FILE).exists():
            raise CorpusError(f"'{folder}' already holds a corpus: use Corpus.open, or choose another folder")
        foreign = [p.name for p in folder.iterdir() if p != vectors and not p.name.startswith(ASIDE)]
        unfinished = (folder / ASIDE).exists()
        if foreign or (not unfinished and vectors.exists() and any(vectors.iterdir())):
            raise CorpusError(
                f"folder '{folder}' is not empty (it holds {foreign or [VECTORS]}): choose another folder"
            )
        vectors.mkdir(exist_ok=True)
        remove_leftovers(vectors, ())  # while the unfinished catalogue still says whose they are
        try:
            with new_catalogue(folder, identity) as connection:
                yield connection
        except BaseException:
            remove_leftovers(vectors, ())
            for aside in folder.glob(f"{ASIDE}*"):
                aside.unlink()
            raise


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """The folder's lock, which ends with the process that holds it; CorpusError if another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CorpusError(
                f"a corpus is being {doing} at '{folder}' by another process: wait until it ends"
            ) from error
        yield
    finally:
        os.close(descriptor)
