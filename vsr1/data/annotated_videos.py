"""The videos that annotations speak of: which of them are there, under what name, and how long they are.

Annotations name a video `AO8RW` or `26292851@N04_4253489686_265c3c8051.m4v`; on disk it is `train/AO8RW.mp4`, in a corpus
perhaps `AO8RW.mp4`. `Videos` finds one by the other: names agree if they do so without folders and endings.
"""

from __future__ import annotations

import csv
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from vsr1.data.annotation_files import AnnotationError
from vsr1.errors import ConfigError

# Those that `vsr1 index` looks for; a test holds the two together.
EXTENSIONS: Final = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv",
)  # fmt: skip
_ENDINGS: Final = (*EXTENSIONS, ".npy", ".3g2", ".")  # frame arrays, and what DiDeMo's names of videos end in besides
META: Final = "meta.jsonl"  # beside frame arrays; an .npy without it is not taken for a video
ID_COLUMNS: Final = ("id", "video", "video_id")
LENGTH_COLUMNS: Final = ("length", "duration", "seconds")


Lengths = Mapping[str, float] | str | os.PathLike[str] | Callable[[str], float | None]


class Videos:
    """Videos to look names up in: those below a folder, or a collection of ids or paths.

    Raises:
        ConfigError: the folder is not there.
    """

    def __init__(self, videos: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> None:
        if isinstance(videos, (str, os.PathLike)):
            names = list(files_below(Path(videos)))
            self._source = f"below '{os.fspath(videos)}'"
        else:
            names = [os.fspath(video) for video in videos]
            self._source = "that were given"
        self._names: dict[str, str] = {}
        for spelled in (os.fspath, plain_name):  # a name as it is goes before one that is only alike
            for name in names:
                self._names.setdefault(spelled(name), name)
        self._count = len(names)

    def __str__(self) -> str:
        return f"the {self._count} videos {self._source}"

    def __iter__(self) -> Iterator[str]:
        """The paths or ids that were given."""
        return iter(dict.fromkeys(self._names.values()))

    def find(self, video_id: str) -> str | None:
        """The path or id that was given for this video, or None."""
        return self._names.get(video_id) or self._names.get(plain_name(video_id))


def plain_name(name: str) -> str:
    """A name without folders, and without an ending if it is a video's: ids hold dots, too (`x_60.0_210.0`)."""
    name = os.path.basename(name)
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in _ENDINGS else name


def files_below(folder: Path, arrays: bool = True) -> Iterator[str]:
    """Paths of the video files below a folder, and of the frame arrays that have times. ConfigError where it is not there."""
    if not folder.is_dir():
        raise ConfigError(f"'{folder}' is no folder: give the one that the videos lie in")
    entered = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # a link to where we were
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        endings = (*EXTENSIONS, ".npy") if arrays and META in files else EXTENSIONS
        yield from (os.path.join(place, name) for name in sorted(files) if name.lower().endswith(endings))


def probed(videos: Videos) -> Callable[[str], float | None]:
    """Durations from the files themselves, each opened once and only if it is asked for; None for one that is not there.

    What it gives out raises VideoError for a file that is no video.
    """
    from vsr1.video.sources import probe  # PyAV and numpy: only who probes pays for them

    @functools.cache
    def seconds(video_id: str) -> float | None:
        path = videos.find(video_id)
        return None if path is None else probe(path).seconds

    return seconds


def lengths(durations: Lengths | None) -> Callable[[str], float | None]:
    """A way to ask for a video's seconds (None where they are not known).

    From a mapping of ids, from such a function, or from a file: JSON (id -> seconds) or CSV with columns `id` (or `video`,
    `video_id`) and `length` (or `duration`, `seconds`), such as Charades_v1_train.csv.

    Raises:
        AnnotationError: the file cannot be read, has other columns, or holds something else than numbers.
    """
    if callable(durations):
        return durations
    if durations is None:
        return lambda video_id: None
    known = dict(durations if isinstance(durations, Mapping) else _read_durations(durations))
    alike = {plain_name(video): seconds for video, seconds in known.items()}
    return lambda video_id: known.get(video_id, alike.get(plain_name(video_id)))


def _read_durations(path: str | os.PathLike[str]) -> Iterator[tuple[str, float]]:
    where = f"file of durations '{os.fspath(path)}'"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if Path(path).suffix.lower() == ".json":
                yield from ((video, float(seconds)) for video, seconds in json.load(file).items())
                return
            rows = csv.DictReader(file)
            columns = rows.fieldnames or ()
            video = next((name for name in ID_COLUMNS if name in columns), None)
            length = next((name for name in LENGTH_COLUMNS if name in columns), None)
            if video is None or length is None:
                raise AnnotationError(f"{where}: needs columns 'id' and 'length', has {', '.join(columns) or 'none'}")
            yield from ((row[video], float(row[length])) for row in rows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{where} cannot be read: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise AnnotationError(f"{where}: must give each video its seconds ({error})") from error
