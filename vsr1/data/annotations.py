"""Annotated moments on disk: the FIG files of VERIFIED (Charades, DiDeMo, ActivityNet), one JSON object a line.

`read_fig` turns a file into `Moment`s, `write_fig` the other way; `read_rows` gives the checked rows themselves to
whoever needs the extra keys. Keys of a row: `video` (id), `time` ([start, end] seconds), `desc_id` (int), `duration`
(seconds), `cog_desc` (coarse sentence), `fig_desc` (fine sentence, the query), `fig_desc_score`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vsr1.errors import Vsr1Error
from vsr1.records import Moment

_KINDS: dict[str, tuple[type, ...]] = {
    "video": (str,),
    "time": (list,),
    "desc_id": (int,),
    "duration": (int, float),
    "fig_desc": (str,),
}


class AnnotationError(Vsr1Error):
    """An annotation file that cannot be read; the message names the file and the line."""


def read_fig(path: str | os.PathLike[str]) -> list[Moment]:
    """Read a FIG file. `query_id` is `<desc_id>_fig`; a repeated one gets `_2`, `_3`, ... behind it.

    Spans are kept as annotated: in the public files 1 row in 7 ends after the video's duration.

    Raises:
        AnnotationError: the file is missing, or a line is no JSON object, lacks a key or holds a reversed span.
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
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _checked(line, f"annotation file '{path}', line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"annotation file '{path}' cannot be read: {error}") from error


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
    rows = [_row(moment) | dict(extra[index] if extra else {}) for index, moment in enumerate(moments)]
    target = Path(path)
    aside = target.with_name(f".{target.name}.tmp")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, target)


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


def _checked(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise AnnotationError(f"{where}: a row is an object, got {type(row).__name__}")
    for key, kinds in _KINDS.items():
        if key not in row:
            raise AnnotationError(f"{where}: key '{key}' is missing; the row has {sorted(row)}")
        if not isinstance(row[key], kinds) or isinstance(row[key], bool):
            raise AnnotationError(f"{where}: '{key}' must be {kinds[-1].__name__}, got {row[key]!r}")
    span = row["time"]
    if len(span) != 2 or not all(isinstance(time, (int, float)) and math.isfinite(time) for time in span):
        raise AnnotationError(f"{where}: 'time' must be [start, end] in seconds, got {span}")
    if span[1] < span[0]:
        raise AnnotationError(f"{where}: the span ends at {span[1]} s before it starts at {span[0]} s")
    if not (math.isfinite(row["duration"]) and row["duration"] > 0):
        raise AnnotationError(f"{where}: 'duration' must be above 0 s, got {row['duration']}")
    return row
