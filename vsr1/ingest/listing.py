"""Which video files lie in the folders that were given, and by what name each is to be known.

Links are followed, to files and to folders; a folder is entered once, by its own name rather than by a link's, so
loops end and adding a link renames nothing. Hidden files and folders (a leading dot) are passed over. What cannot be
listed is a `Failure`, like a video that cannot be read: it never ends the run.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vsr1.errors import ConfigError

EXTENSIONS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A file or folder that did not go in, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """A video file: its absolute path, its `name` (its path below the folder that was given), size in bytes and time of
    change in nanoseconds."""

    path: str
    name: str
    size: int
    modified: int


def find(
    paths: Iterable[str | os.PathLike[str]], extensions: Collection[str] = EXTENSIONS
) -> tuple[list[Found], list[Failure]]:
    """The video files among `paths`: files whatever they are called, and those with one of the `extensions` below folders.

    In order, each path once. Raises ConfigError for a path that is not there.
    """
    found: dict[str, Found] = {}
    failures: list[Failure] = []
    wanted = tuple(extension.lower() for extension in extensions)
    for given in paths:
        root = os.path.abspath(given)
        if not os.path.lexists(root):
            raise ConfigError(f"'{os.fspath(given)}' is not there: give folders of videos, or video files")
        files = _walk(root, wanted, failures) if os.path.isdir(root) else iter([root])
        base = root if os.path.isdir(root) else os.path.dirname(root)
        for path in files:
            if path in found:
                continue
            one = _looked_at(path, os.path.relpath(path, base))
            if isinstance(one, Failure):
                failures.append(one)
            else:
                found[path] = one
    return list(found.values()), list(dict.fromkeys(failures))


def _walk(root: str, extensions: tuple[str, ...], failures: list[Failure]) -> Iterator[str]:
    own, links = deque([root]), deque[str]()
    entered: set[tuple[int, int]] = set()
    while own or links:
        folder = (own or links).popleft()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            failures.append(Failure(folder, f"the folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else own).append(entry.path)
            elif entry.name.lower().endswith(extensions):
                yield entry.path


def _looked_at(path: str, name: str) -> Found | Failure:
    try:
        path.encode()
    except UnicodeEncodeError:
        return Failure(path, "its name is not UTF-8: rename it")
    status = look(path)
    return status if isinstance(status, Failure) else Found(path, Path(name).as_posix(), *status)


def look(path: str) -> tuple[int, int] | Failure:
    """Size and time of change of a file that holds something and can be read from its beginning to its end."""
    try:
        status = os.stat(path)
    except OSError as error:
        return Failure(path, error.strerror or str(error))
    if not stat.S_ISREG(status.st_mode):
        return Failure(path, "is no regular file")  # to open a pipe is to wait for ever
    if status.st_size == 0:
        return Failure(path, "the file is empty")
    return status.st_size, status.st_mtime_ns
