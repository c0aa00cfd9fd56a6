"""From an annotation file to its entries: what stands in it and where, before anybody asks what it means.

Files keep their rows in five layouts: one JSON object a line, a JSON array of objects, a JSON object with an object a
video (ActivityNet Captions), a table with a header (CSV), and lines `VIDEO START END##sentence` (Charades-STA). `read`
tells them apart by their contents. A damaged row becomes an entry with a problem, so that one bad line among a hundred
thousand is named and the others are used; only a file of which nothing can be made is an error.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice
from typing import Any, Final, Literal, NamedTuple

from vsr1.errors import Vsr1Error

Layout = Literal["lines", "array", "videos", "table", "sentences"]
SAMPLE: Final = 20  # rows looked at to tell what a file is: the first may be damaged
_DELIMITERS: Final = (",", "\t", ";")
_SENTENCE_LINE: Final = re.compile(r"\s*\S+\s+\S+\s+\S+\s*##")


class AnnotationError(Vsr1Error):
    """An annotation file that cannot be read, or must not be used; the message names the file and the row."""


class _Twice(Exception):
    """A JSON object that has a key twice, of which a parser would keep the last."""


class Entry(NamedTuple):
    """A row as it stands in the file: `value` is a dict, or a line of a Charades-STA file; `problem` says why it is neither.
    `place` is where: "line 7", "entry 7" of an array, "'v_x' sentence 2"."""

    place: str
    value: Any
    problem: str | None = None


class Sheet:
    """The entries of a file, which can be gone through once, and the layout they were found in."""

    def __init__(self, layout: Layout, entries: Iterable[Entry]) -> None:
        self.layout = layout
        rest = iter(entries)
        self._first = list(islice(rest, SAMPLE))
        self.entries = chain(self._first, rest)

    def sample(self) -> list[Any]:
        """The first values that could be read."""
        return [entry.value for entry in self._first if entry.problem is None]

    def __str__(self) -> str:
        if not self._first:
            return "nothing"
        sample = self.sample()
        if not sample:
            return f"nothing that can be read ({self._first[0].place}: {self._first[0].problem})"
        if isinstance(sample[0], str):
            return f"text that begins '{sample[0].strip()[:60]}'"
        called = {"lines": "JSON lines", "array": "a JSON array of objects", "table": "a table"}
        return f"{called[self.layout]} with {', '.join(map(repr, sample[0]))}"


def read(path: str | os.PathLike[str], columns: Collection[str] = (), layout: Layout | None = None) -> Sheet:
    """The entries of a file, blank lines left out.

    Args:
        columns: names that the header of a table may have; its delimiter is the one that gives most of them.
        layout: "lines" (any JSON), "table" (or JSON) or "sentences" if that is known; otherwise the contents decide.

    Raises:
        AnnotationError: the file is missing or not UTF-8, or it is a JSON array or a table that cannot be parsed.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # "sig": Excel begins its files with a mark
            text = file.read()
        return _sheet(text, columns, layout)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"annotation file '{path}' cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"annotation file '{path}': not JSON ({error})") from error
    except _Twice as error:
        raise AnnotationError(f"annotation file '{path}': {error}") from error


def _sheet(text: str, columns: Collection[str], layout: Layout | None) -> Sheet:
    beginning = text[:1024].lstrip()[:1]
    if layout == "lines" or (layout != "sentences" and beginning in ("{", "[")):
        return _json(text, beginning)
    lines = list(islice(_lines(text), SAMPLE))
    if layout is None and lines:
        header = lines[0].value
        layout = "sentences"
        if not _SENTENCE_LINE.match(header) and _known(header, _delimiter(header, columns), columns):
            layout = "table"
    if layout == "table":
        return Sheet("table", _table(text, columns))
    return Sheet("sentences", _lines(text))


def is_sentence_line(line: str) -> bool:
    """Whether a line is one of Charades-STA, whatever its numbers are."""
    return _SENTENCE_LINE.match(line) is not None


def _lines(text: str) -> Iterator[Entry]:
    # Not splitlines: it also splits at U+2028, which a sentence may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line and not line.isspace():
            yield Entry(f"line {number}", line)


def _json(text: str, beginning: str) -> Sheet:
    if beginning == "[":
        return Sheet("array", (_checked(f"entry {number}", one) for number, one in enumerate(_document(text), start=1)))
    head = list(islice(_lines(text), 2))
    if head and (len(head) == 1 or _parsed(head[0]).problem is not None):
        # One object, on one line or on many: that of the videos, or a row.
        try:
            whole = _document(text)
        except ValueError:
            whole = None
        if isinstance(whole, dict):
            described = [value for value in islice(whole.values(), SAMPLE) if isinstance(value, dict)]
            if any({"timestamps", "sentences"} <= value.keys() for value in described):
                return Sheet("videos", (entry for video, value in whole.items() for entry in _sentences(video, value)))
            return Sheet("lines", [Entry(head[0].place, whole)])
    return Sheet("lines", map(_parsed, _lines(text)))


def _document(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise _Twice(f"key '{next(name for name in found if names.count(name) > 1)}' occurs twice in one object")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _parsed(line: Entry) -> Entry:
    try:
        return _checked(line.place, json.loads(line.value))
    except (ValueError, RecursionError) as error:
        return Entry(line.place, None, f"not JSON ({error})")


def _checked(place: str, value: Any) -> Entry:
    problem = None if isinstance(value, dict) else f"a row is an object, got {type(value).__name__}"
    return Entry(place, value, problem)


def _sentences(video: str, value: Any) -> Iterator[Entry]:
    """A video of ActivityNet Captions as one entry a sentence: `video`, `duration`, `timestamp`, `sentence`."""
    whole = f"video '{video}'"
    if not isinstance(value, dict) or not {"duration", "timestamps", "sentences"} <= value.keys():
        yield Entry(whole, value, "a video needs 'duration', 'timestamps' and 'sentences'")
        return
    spans, texts = value["timestamps"], value["sentences"]
    if not isinstance(spans, list) or not isinstance(texts, list) or len(spans) != len(texts):
        counts = " and ".join(str(len(one)) if isinstance(one, list) else type(one).__name__ for one in (spans, texts))
        yield Entry(whole, value, f"'timestamps' and 'sentences' must be lists of one length, got {counts}")
        return
    for number, (span, text) in enumerate(zip(spans, texts, strict=True), start=1):
        row = {"video": video, "duration": value["duration"], "timestamp": span, "sentence": text}
        yield Entry(f"{whole}, sentence {number}", row)


def _known(header: str, delimiter: str, columns: Collection[str]) -> int:
    return sum(name in columns for name in _names(next(csv.reader([header], delimiter=delimiter), [])))


def _delimiter(header: str, columns: Collection[str]) -> str:
    return max(_DELIMITERS, key=lambda delimiter: _known(header, delimiter, columns))


def _names(header: list[str]) -> list[str]:
    return [name.strip().lower() for name in header]


def _table(text: str, columns: Collection[str]) -> Iterator[Entry]:
    first = next(_lines(text), None)
    if first is None:
        return
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(first.value, columns))
    names: list[str] = []
    while True:
        place = f"line {rows.line_num + 1}"  # before it is read: a quoted field may hold line breaks
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Entry(place, None, str(error))
            continue
        if row is None:
            return
        if not any(map(str.strip, row)):
            continue
        if not names:
            names = _names(row)
            if twice := [name for name in columns if names.count(name) > 1]:
                raise csv.Error(f"column '{twice[0]}' occurs twice")
        elif len(row) != len(names):
            yield Entry(place, None, f"has {len(row)} fields, the header {len(names)}")
        else:
            yield Entry(place, dict(zip(names, row, strict=True)))
