"""What the rows of the public annotation files mean: one small function a format, from an entry to an `Annotation`.

Fields that are certain, since they stand in the published files or in the data sets' own documentation, are read and
must be there; others are left alone. How an unlabelled file is told by its keys is in `recognise`, in the table `FORMATS`.

Two data sets give a query several spans. DiDeMo has one from each of four or more annotators; the one taken is that on
which they agree best (`agreed`). QVHighlights has all windows that a query describes; the longest one is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from vsr1.data.annotation_files import AnnotationError, Layout, Sheet, is_sentence_line
from vsr1.data.annotation_values import Span, identity_of, list_of, number_of, pair, seconds, span_of, text_of, whole_of
from vsr1.errors import VideoError
from vsr1.records import Moment

Durations = Callable[[str], float | None]  # seconds of a video, None where nobody knows

CHUNK: Final = 5.0  # seconds; DiDeMo's annotators chose among chunks of this length
BEST_ANNOTATORS: Final = 3  # that many of DiDeMo's count in its own evaluation, the ones that agree best

# The keys (JSON) or columns (CSV) of one's own files. The first name of a line is the one to use; where a row has several,
# the first counts.
ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("text", "query", "sentence", "description", "caption", "desc"),
    "video": ("video", "video_id", "vid", "vid_name", "video_name"),
    "start": ("start", "start_time", "start_sec", "begin"),
    "end": ("end", "end_time", "end_sec", "stop"),
    "span": ("span", "time", "timestamp", "window"),
    "query_id": ("query_id", "qid", "desc_id", "annotation_id", "id"),
    "duration": ("duration", "video_duration", "length"),
}
COLUMNS: Final = frozenset(name for names in ALIASES.values() for name in names)


class Annotation(NamedTuple):
    """A query as its file has it: `spans` in seconds are all that count as right (none where the truth is kept back),
    `chosen` is the index of the one for a `Moment`. `query_id` is None where the file has no ids."""

    text: str
    video_id: str | None
    spans: Sequence[Span]
    duration: float | None
    query_id: str | None = None
    chosen: int = 0


class Row(NamedTuple):
    """A row that was read, or the `problem` why not. `spans` counts what the file offers for it."""

    place: str
    moment: Moment | None
    problem: str | None = None
    spans: int = 1


def fig(row: Mapping[str, Any], durations: Durations) -> Annotation:
    """VERIFIED FIG. The text is taken as it stands, as the published query vectors are of it."""
    return Annotation(
        text_of(row, "fig_desc"), text_of(row, "video"), [span_of(row, "time")], number_of(row, "duration"),
        f"{whole_of(row, 'desc_id')}_fig",
    )  # fmt: skip


def charades(line: str, durations: Durations) -> Annotation:
    """Charades-STA: `VIDEO START END##sentence`; durations come from elsewhere."""
    head, mark, text = line.partition("##")
    fields = head.split()
    if not mark or len(fields) != 3:
        raise ValueError(f"a line is 'VIDEO START END##sentence', got '{line.strip()[:80]}'")
    video = fields[0]
    span = seconds(fields[1], "start"), seconds(fields[2], "end")
    return Annotation(text.strip(), video, [span], durations(video))


def didemo(row: Mapping[str, Any], durations: Durations) -> Annotation:
    """DiDeMo: (first, last) chunks of 5 s, the last of which ends with the video."""
    chunks = [pair(times, "times") for times in list_of(row, "times")]
    if not chunks:
        raise ValueError("'times' is empty: nobody has annotated the moment")
    video = text_of(row, "video")
    duration = durations(video)
    limit = float("inf") if duration is None else duration
    spans = [(first * CHUNK, _last_end((last + 1) * CHUNK, first * CHUNK, limit)) for first, last in chunks]
    text = text_of(row, "description").strip()
    return Annotation(text, video, spans, duration, str(identity_of(row, "annotation_id")), agreed(chunks))


def _last_end(end: float, start: float, duration: float) -> float:
    return min(end, duration) if start < duration else end  # a chunk that begins after the video is the report's


def agreed(chunks: Sequence[Span]) -> int:
    """Index of the span on which DiDeMo's annotators agree best.

    It is the annotated span which the data set's own evaluation would rate highest: mean IoU with those three annotators
    that are nearest to it. Between equals the one nearer to all of them, then the earlier, then the shorter.
    """

    def rating(one: Span) -> tuple[float, ...]:
        overlaps = sorted((_overlap(one, other) for other in chunks), reverse=True)
        nearest = overlaps[:BEST_ANNOTATORS]
        return sum(nearest) / len(nearest), sum(overlaps), -one[0], -one[1]

    return chunks.index(max(chunks, key=rating))


def _overlap(one: Span, other: Span) -> float:
    """IoU of two (first, last) runs of chunks."""
    common = max(0.0, min(one[1], other[1]) + 1 - max(one[0], other[0]))
    together = max(one[1], other[1]) + 1 - min(one[0], other[0])
    return common / together if together > 0 else 0.0  # one of them is reversed


def activitynet(row: Mapping[str, Any], durations: Durations) -> Annotation:
    """ActivityNet Captions, a sentence of a video; the sentences of the files begin with a blank."""
    text = text_of(row, "sentence").strip()
    return Annotation(text, row["video"], [span_of(row, "timestamp")], number_of(row, "duration"))


def tvr(row: Mapping[str, Any], durations: Durations) -> Annotation:
    """TVR; the public test file has `desc` and `desc_id` only."""
    query_id, text = str(identity_of(row, "desc_id")), text_of(row, "desc").strip()
    if "vid_name" not in row and "ts" not in row:
        return Annotation(text, None, (), None, query_id)
    return Annotation(text, text_of(row, "vid_name"), [span_of(row, "ts")], number_of(row, "duration"), query_id)


def qvhighlights(row: Mapping[str, Any], durations: Durations) -> Annotation:
    """QVHighlights; its test file has no windows."""
    windows: list[Span] = []
    if "relevant_windows" in row:
        windows = [pair(window, "relevant_windows") for window in list_of(row, "relevant_windows")]
    longest = max(range(len(windows)), key=lambda index: windows[index][1] - windows[index][0], default=0)
    return Annotation(
        text_of(row, "query").strip(), text_of(row, "vid"), windows, number_of(row, "duration"), str(identity_of(row, "qid")),
        longest,
    )  # fmt: skip


def generic(row: Mapping[str, Any], durations: Durations) -> Annotation:
    """One's own JSON or CSV, with the names of `ALIASES`; an empty field or null is a truth that is not known."""
    names = _own_names(tuple(row))
    given = {field: value for field, name in names.items() if (value := row[name]) is not None and value != ""}
    text, video, query_id = given.get("text", ""), given.get("video"), given.get("query_id")
    if not isinstance(text, str):
        raise ValueError(f"'{names['text']}' must be str, got {text!r}")
    for field in ("video", "query_id"):
        if isinstance(given.get(field), (list, dict, bool)):
            raise ValueError(f"'{names[field]}' must be a name, got {given[field]!r}")
    video = None if video is None else str(video)
    spans: list[Span] = []
    if "span" in given:
        spans = [pair(given["span"], names["span"])]
    elif "start" in given and "end" in given:
        spans = [(seconds(given["start"], names["start"]), seconds(given["end"], names["end"]))]
    elif "start" in given or "end" in given:
        raise ValueError(f"a span needs both ends, got {row[names['start']]!r} and {row[names['end']]!r}")
    duration = seconds(given["duration"], names["duration"]) if "duration" in given else None
    if duration is None and video is not None:
        duration = durations(video)
    return Annotation(text.strip(), video, spans, duration, None if query_id is None else str(query_id))


@functools.lru_cache(64)  # the rows of a file have the same keys
def _own_names(keys: tuple[str, ...]) -> Mapping[str, str]:
    """By which of its keys a row gives each field; of a span its ends or both in one. ValueError where one lacks."""
    names = {field: name for field, known in ALIASES.items() if (name := next(filter(keys.__contains__, known), None))}
    if {"start", "end"} <= names.keys():
        names.pop("span", None)
    for field in ("text", "video") if "span" in names else ("text", "video", "start", "end"):
        if field not in names:
            raise ValueError(f"has no '{field}' (or {', '.join(ALIASES[field][1:])}), only {', '.join(keys)}")
    return names


@dataclass(frozen=True)
class Format:
    """A format by its name: how an entry is read, the layouts it occurs in, the `keys` by which it is known or all that
    a row without a truth may have (`bare`), and the layout to take a file for that is said to be in it."""

    name: str
    read: Callable[[Any, Durations], Annotation]
    layouts: tuple[Layout, ...]
    keys: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()
    assumed: Layout = "lines"

    def suits(self, sheet: Sheet) -> bool:
        """Whether the file looks like one in this format."""
        return sheet.layout in self.layouts and any(map(self._known, sheet.sample()))

    def _known(self, value: Any) -> bool:
        if isinstance(value, str):
            return is_sentence_line(value)
        if self.keys:
            return self.keys <= value.keys() or self.bare == value.keys()
        try:
            return bool(_own_names(tuple(value)))
        except ValueError:
            return False


_ROWS: Final[tuple[Layout, ...]] = ("lines", "array")
# In the order they are tried; what none of the published files looks like may be a file of one's own.
FORMATS: Final[Mapping[str, Format]] = {
    one.name: one
    for one in (
        Format("fig", fig, _ROWS, frozenset({"fig_desc", "video", "time"})),
        Format("charades", charades, ("sentences",), assumed="sentences"),
        Format("didemo", didemo, _ROWS, frozenset({"description", "times", "video"})),
        Format("activitynet", activitynet, ("videos",), frozenset({"timestamp", "sentence"})),
        Format(
            "tvr", tvr, _ROWS, frozenset({"desc", "desc_id", "vid_name", "ts"}), bare=frozenset({"desc", "desc_id"})
        ),
        Format("qvhighlights", qvhighlights, _ROWS, frozenset({"qid", "query", "vid"})),
        Format("generic", generic, (*_ROWS, "table"), assumed="table"),
    )
}


def recognise(sheet: Sheet, source: str) -> Format:
    """The format of a file by what stands in it; raises AnnotationError, which names what does, where that tells nothing."""
    for one in FORMATS.values():
        if one.suits(sheet):
            return one
    raise AnnotationError(
        f"annotation file '{source}': its format cannot be told, it holds {sheet}; name one of {', '.join(FORMATS)}, "
        "or give it the keys or columns text, video, start, end"
    )


def rows(sheet: Sheet, form: Format, durations: Durations, spans: Literal["one", "all"]) -> Iterator[Row]:
    """The rows of a file in its order: one a query, or one a span of it."""
    names = _Names()
    for entry in sheet.entries:
        if entry.problem is not None:
            yield Row(entry.place, None, entry.problem)
            continue
        try:
            one = form.read(entry.value, durations)
        except (ValueError, OverflowError, VideoError) as error:
            yield Row(entry.place, None, str(error))
            continue
        taken = one.spans if spans == "all" else one.spans[one.chosen : one.chosen + 1]
        offered = len(set(one.spans)) if len(one.spans) > len(taken) else 1
        for number, (start, end) in enumerate(taken or [(None, None)], start=1):
            query_id = names(one, (start, end)) if one.query_id is None else one.query_id
            if number > 1:
                query_id = f"{query_id}_{number}"
            yield Row(entry.place, Moment(query_id, one.text, one.video_id, start, end, one.duration), spans=offered)


class _Names:
    """Ids for the queries of files without: `<video>_<n>`, the n-th query of the video. Identical rows share one."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[object, int]] = {}

    def __call__(self, one: Annotation, span: object) -> str:
        video = one.video_id or "query"
        numbers = self._numbers.setdefault(video, {})
        return f"{video}_{numbers.setdefault((one.text, span), len(numbers) + 1)}"
