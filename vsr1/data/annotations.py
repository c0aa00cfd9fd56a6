"""Annotated moments on disk: `read_moments` turns the files of the public data sets, or one's own, into `Moment`s.

| format         | a row                                                                                     |
|----------------|-------------------------------------------------------------------------------------------|
| `fig`          | VERIFIED FIG, JSON: video, time, desc_id, duration, fig_desc (the query), cog_desc        |
| `charades`     | Charades-STA, text: `VIDEO START END##sentence`; durations from Charades_v1_train.csv     |
| `didemo`       | DiDeMo, JSON: video, description, annotation_id, times (chunks of 5 s, several annotators) |
| `activitynet`  | ActivityNet Captions, JSON: video -> duration, timestamps, sentences                      |
| `tvr`          | TVR, JSON: vid_name, duration, ts, desc, desc_id                                          |
| `qvhighlights` | QVHighlights, JSON: vid, duration, relevant_windows, query, qid                           |
| `generic`      | your own JSON or CSV: text, video, start, end (seconds), if you like query_id, duration   |

Moments come as they are annotated: in the public FIG files 1 row in 7 ends after its video. `vsr1.data.validation` says what
is wrong with them and mends what can be mended. `write_fig` writes FIG files, `read_rows` gives their rows with all keys.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from vsr1.data.annotated_videos import Lengths, lengths
from vsr1.data.annotation_files import AnnotationError, read
from vsr1.data.annotation_formats import COLUMNS, FORMATS, Row, fig, recognise, rows
from vsr1.files import write_whole
from vsr1.records import Moment

__all__ = ["AnnotationError", "read_annotations", "read_fig", "read_moments", "read_rows", "write_fig"]


def read_moments(
    path: str | os.PathLike[str],
    format: str = "auto",
    durations: Lengths | None = None,
    spans: Literal["one", "all"] = "one",
) -> list[Moment]:
    """Read an annotation file, in its order and as it is annotated.

    Query ids are those of the file (`<desc_id>_fig` for FIG); where it has none, `<video>_<n>` for the n-th query of a video.

    Args:
        format: one of the table above; "auto" tells by the contents.
        durations: seconds of the videos, for rows that do not say: a mapping of ids, a file (CSV with the columns id and
            length, or JSON), or a function such as `annotated_videos.probed(Videos(folder))`.
        spans: what becomes of several spans for one query. "one": DiDeMo's is the annotated span on which its annotators
            agree best, QVHighlights' the longest window. "all": a moment for each, with the ids `7`, `7_2`, `7_3`, ...

    Raises:
        AnnotationError: the file is missing, its format cannot be told, or a row cannot be read; it is named.
        ValueError: no such format or `spans`.
    """
    _, found = read_annotations(path, format, durations, spans)
    return [_moment(row, path) for row in found]


def read_annotations(
    path: str | os.PathLike[str],
    format: str = "auto",
    durations: Lengths | None = None,
    spans: Literal["one", "all"] = "one",
) -> tuple[str, Iterator[Row]]:
    """The name of a file's format, and its rows with their places, those too that cannot be read; else as `read_moments`."""
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format must be one of auto, {', '.join(FORMATS)}, got '{format}'")
    if spans not in ("one", "all"):
        raise ValueError(f"spans must be 'one' or 'all', got '{spans}'")
    if format == "auto":
        sheet = read(path, COLUMNS)
        form = recognise(sheet, os.fspath(path))
    else:
        form = FORMATS[format]
        sheet = read(path, COLUMNS, form.assumed)
    return form.name, rows(sheet, form, lengths(durations), spans)


def _moment(row: Row, path: str | os.PathLike[str]) -> Moment:
    if row.moment is None:
        raise AnnotationError(f"annotation file '{path}', {row.place}: {row.problem}")
    return row.moment


def read_fig(path: str | os.PathLike[str]) -> list[Moment]:
    """Read a FIG file strictly. `query_id` is `<desc_id>_fig`; a repeated one gets `_2`, `_3`, ... behind it.

    Raises:
        AnnotationError: the file is missing, or a line is no JSON object, lacks a key or holds an impossible span.
    """
    seen: dict[str, int] = {}
    moments = []
    for row in read_rows(path):
        query_id = f"{row['desc_id']}_fig"
        seen[query_id] = seen.get(query_id, 0) + 1
        if seen[query_id] > 1:
            query_id = f"{query_id}_{seen[query_id]}"
        start, end = row["time"]
        moments.append(
            Moment(query_id, row["fig_desc"], row["video"], float(start), float(end), float(row["duration"]))
        )
    return moments


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The checked rows of a FIG file, blank lines skipped; raises `AnnotationError` like `read_fig`."""
    for entry in read(path, layout="lines").entries:
        problem = entry.problem or _impossible(entry.value)
        if problem is not None:
            raise AnnotationError(f"annotation file '{path}', {entry.place}: {problem}")
        yield entry.value


def _impossible(row: Mapping[str, Any]) -> str | None:
    try:
        one = fig(row, lambda video_id: None)
    except (ValueError, OverflowError) as error:
        return str(error)
    [(start, end)] = one.spans
    if not (math.isfinite(start) and math.isfinite(end)):
        return f"'time' must be [start, end] in finite seconds, got {row['time']}"
    if end < start:
        return f"the span ends at {end} s before it starts at {start} s"
    if one.duration is None or not (math.isfinite(one.duration) and one.duration > 0):
        return f"'duration' must be above 0 s, got {row['duration']}"
    return None


def write_fig(
    path: str | os.PathLike[str], moments: Sequence[Moment], extra: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Write moments as a FIG file, aside and then renamed.

    Args:
        extra: one mapping a moment, laid over its row: `cog_desc`, `fig_desc_score` or keys of your own. Without one
            the coarse sentence is empty and the score 1.

    Raises:
        ValueError: a moment has no video, span, duration or `<desc_id>_fig` id, or `extra` has another length.
    """
    if extra is not None and len(extra) != len(moments):
        raise ValueError(f"{len(moments)} moments need as many extra rows, got {len(extra)}")
    lines = [_row(moment) | dict(extra[index] if extra else {}) for index, moment in enumerate(moments)]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))


def _row(moment: Moment) -> dict[str, Any]:
    number = moment.query_id.split("_fig")[0]
    if None in (moment.video_id, moment.start, moment.end, moment.duration) or not number.isdecimal():
        raise ValueError(f"a FIG row needs a video, a span, a duration and an id like '7_fig', got {moment}")
    return {
        "video": moment.video_id,
        "time": [moment.start, moment.end],
        "desc_id": int(number),
        "duration": moment.duration,
        "cog_desc": "",
        "fig_desc": moment.text,
        "fig_desc_score": 1.0,
    }
