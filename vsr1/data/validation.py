"""What is wrong with annotations, what is mended, what is refused: `validate` for moments, `validate_file` for a file.

Both give a `Report`: the moments that can be used, and a `Finding` with file and line for every row that was changed, left
out, or is worth knowing of. Nothing is lost silently. These are the rules; the report prints them with their counts:

    unreadable     refused    the row is damaged, lacks a key, or holds a value of another kind
    no text        refused    the text is empty
    half a truth   refused    the span lacks an end, a start or a video
    not finite     refused    a start, an end or a duration is NaN or infinite
    no length      refused    the duration of the video is 0 s or less
    reversed       refused    the span ends before it starts
    empty span     refused    the span ends where it starts
    outside        refused    the span lies wholly before 0 s or after the end of the video
    missing video  refused    the video is not among those given
    starts before  repaired   the span starts before 0 s: cut off there
    ends after     repaired   the span ends after the video: cut off there
    same id        repaired   another query has the id: a number is put behind it (_2, _3, ...)
    identical      dropped    the row repeats an earlier one, id and all
    shared text    reported   an earlier row has the same text, for this moment or another
    several spans  reported   the file gives the query more spans than the one that was taken
    no duration    reported   the length of the video is not known, so the end of the span was not checked
    no truth       reported   the row names no video or no span

With `repair=False` what would be repaired or dropped is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from vsr1.data.annotated_videos import Lengths, Videos
from vsr1.data.annotation_files import AnnotationError
from vsr1.data.annotation_formats import Row
from vsr1.data.annotations import read_annotations
from vsr1.records import Moment

Outcome = Literal["refused", "repaired", "dropped", "reported"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("refused", "repaired", "dropped", "reported")


@dataclass(frozen=True)
class Rule:
    """A kind of finding: its name, what comes of it, and when it is one."""

    name: str
    outcome: Outcome
    when: str


RULES: Final[Mapping[str, Rule]] = {
    rule.name: rule
    for rule in (
        Rule("unreadable", "refused", "the row is damaged, lacks a key, or holds a value of another kind"),
        Rule("no text", "refused", "the text is empty"),
        Rule("half a truth", "refused", "the span lacks an end, a start or a video"),
        Rule("not finite", "refused", "a start, an end or a duration is NaN or infinite"),
        Rule("no length", "refused", "the duration of the video is 0 s or less"),
        Rule("reversed", "refused", "the span ends before it starts"),
        Rule("empty span", "refused", "the span ends where it starts"),
        Rule("outside", "refused", "the span lies wholly before 0 s or after the end of the video"),
        Rule("missing video", "refused", "the video is not among those given"),
        Rule("starts before", "repaired", "the span starts before 0 s: cut off there"),
        Rule("ends after", "repaired", "the span ends after the video: cut off there"),
        Rule("same id", "repaired", "another query has the id: a number is put behind it (_2, _3, ...)"),
        Rule("identical", "dropped", "the row repeats an earlier one, id and all"),
        Rule("shared text", "reported", "an earlier row has the same text, for this moment or another"),
        Rule("several spans", "reported", "the file gives the query more spans than the one that was taken"),
        Rule("no duration", "reported", "the length of the video is not known, so the end of the span was not checked"),
        Rule("no truth", "reported", "the row names no video or no span"),
    )
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found in a row: the name of the rule, what came of it, where, in which query, and the values concerned."""

    rule: str
    outcome: Outcome
    place: str
    query_id: str | None
    detail: str

    def __str__(self) -> str:
        line = f"{self.place}{f' ({self.query_id})' if self.query_id else ''}: {self.rule}: {self.detail}"
        return line if line.isprintable() else repr(line)[1:-1]  # ids and texts may hold anything


@dataclass(frozen=True)
class Report:
    """What validation made of `rows` rows of `source`: the `moments` to use, in their order, and the `findings`.

    `videos` gives for each annotated video that was looked up the path or id by which it was found.
    """

    source: str
    rows: int
    moments: list[Moment]
    findings: list[Finding]
    videos: dict[str, str] = field(default_factory=dict)

    def of(self, outcome: Outcome) -> list[Finding]:
        """The findings that came to this, in the order of the rows."""
        return [finding for finding in self.findings if finding.outcome == outcome]

    def __str__(self) -> str:
        return self.text()

    def text(self, shown: int | None = 20) -> str:
        """The counts, the rules with theirs, and up to `shown` rows (None: all) for each rule that found any."""
        rows_of = {outcome: len({finding.place for finding in self.of(outcome)}) for outcome in OUTCOMES}
        videos = len({moment.video_id for moment in self.moments} - {None})
        lines = [
            f"{self.source}: {self.rows} rows; {len(self.moments)} moments of {videos} videos; "
            + ", ".join(f"{count} {outcome}" for outcome, count in rows_of.items()),
            "",
        ]
        by_rule: dict[tuple[str, str], list[Finding]] = {(rule.name, rule.outcome): [] for rule in RULES.values()}
        for finding in self.findings:
            by_rule.setdefault((finding.rule, finding.outcome), []).append(finding)
        for (name, outcome), found in by_rule.items():
            lines.append(f"{len(found):>7}  {name:<13}  {outcome:<8}  {RULES[name].when}")
        for found in filter(None, by_rule.values()):
            lines += ["", f"{found[0].outcome}, {found[0].rule}:", *map(str, found[:shown])]
            if shown is not None and len(found) > shown:
                lines.append(f"and {len(found) - shown} more")
        return "\n".join(lines)


def validate(
    moments: Sequence[Moment],
    *,
    videos: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
    repair: bool = True,
    strict: bool = False,
    source: str = "moments",
) -> Report:
    """Check moments by the rules above; a row is named by its number, from 1.

    Args:
        videos: a folder, or ids or paths: moments of other videos are refused. None: not checked.
        repair: False refuses what would be repaired or dropped.
        strict: raise if anything is refused.
        source: what the report calls them.

    Raises:
        AnnotationError: `strict`, and a row is refused; the message names the first.
        ConfigError: the folder of the videos is not there.
    """
    rows = [Row(f"row {number}", moment) for number, moment in enumerate(moments, start=1)]
    return _judged(source, source, rows, videos, repair, strict)


def validate_file(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    durations: Lengths | None = None,
    spans: Literal["one", "all"] = "one",
    videos: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
    repair: bool = True,
    strict: bool = False,
) -> Report:
    """Read a file like `read_moments` and check it by the rules above; rows that cannot be read are findings, too.

    Raises:
        AnnotationError: the file cannot be read at all, or its format cannot be told; or `strict`, and a row is refused.
        ConfigError: the folder of the videos is not there.
    """
    found, rows = read_annotations(path, format, durations, spans)
    return _judged(f"{os.fspath(path)} ({found})", os.fspath(path), list(rows), videos, repair, strict)


def _judged(
    source: str,
    file: str,
    rows: Sequence[Row],
    videos: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None,
    repair: bool,
    strict: bool,
) -> Report:
    available = None if videos is None else Videos(videos)
    report = Report(source, len(rows), [], [])
    known_ids = {row.moment.query_id for row in rows if row.moment is not None}
    used_ids: set[str] = set()
    places: dict[Moment, str] = {}
    texts: dict[str, str] = {}

    def note(row: Row, rule: str, detail: str, mended: bool = True) -> None:
        outcome = RULES[rule].outcome if mended else "refused"
        query_id = row.moment.query_id if row.moment else None
        report.findings.append(Finding(rule, outcome, f"{file}, {row.place}", query_id, detail))

    for row in rows:
        moment = row.moment
        if moment is None:
            note(row, "unreadable", row.problem or "")
            continue
        path = None if available is None or moment.video_id is None else available.find(moment.video_id)
        refusal = _refusal(moment)
        if refusal is None and available is not None and moment.video_id is not None and path is None:
            refusal = "missing video", f"'{moment.video_id}' is not among {available}"
        if refusal is not None:
            note(row, *refusal)
            continue
        if moment in places:
            note(row, "identical", f"the same as {places[moment]}", repair)
            continue
        mended, repairs = _mended(moment, used_ids, known_ids)
        for rule, detail in repairs:
            note(row, rule, detail, repair)
        if repairs and not repair:
            continue
        for rule, detail in _remarks(mended, row.spans, texts):
            note(row, rule, detail)
        places[moment] = row.place
        texts.setdefault(mended.text.strip(), row.place)
        used_ids.add(mended.query_id)
        known_ids.add(mended.query_id)
        report.moments.append(mended)
        if path is not None and mended.video_id is not None:
            report.videos[mended.video_id] = path
    refused = report.of("refused")
    if strict and refused:
        raise AnnotationError(
            f"{source}: {len({one.place for one in refused})} of {len(rows)} rows are refused, the first: {refused[0]}"
        )
    return report


def _refusal(moment: Moment) -> tuple[str, str] | None:
    """The rule by which a moment cannot be used, and why, or None."""
    start, end, duration = moment.start, moment.end, moment.duration
    if not moment.text.strip():
        return "no text", f"the text is {moment.text!r}"
    if (start is None) != (end is None) or (start is not None and moment.video_id is None):
        return "half a truth", f"start {start}, end {end}, video {moment.video_id}"
    if not all(math.isfinite(time) for time in (start, end, duration) if time is not None):
        return "not finite", f"start {start}, end {end}, duration {duration}"
    if duration is not None and duration <= 0:
        return "no length", f"the duration is {duration} s"
    if start is None or end is None:
        return None
    if end < start:
        return "reversed", f"the span ends at {end} s before it starts at {start} s"
    if end == start:
        return "empty span", f"the span starts and ends at {start} s"
    if end <= 0 or (duration is not None and start >= duration):
        length = "the video begins at 0 s" if end <= 0 else f"the video is {duration} s long"
        return "outside", f"the span is {start} to {end} s, {length}"
    return None


def _mended(moment: Moment, used: set[str], known: set[str]) -> tuple[Moment, list[tuple[str, str]]]:
    """The moment with its span inside the video and an id of its own, and the rules that called for it."""
    repairs = []
    if moment.start is not None and moment.start < 0:
        repairs.append(("starts before", f"the start was {moment.start} s"))
        moment = replace(moment, start=0.0)
    if moment.end is not None and moment.duration is not None and moment.end > moment.duration:
        repairs.append(("ends after", f"the end was {moment.end} s, the video is {moment.duration} s long"))
        moment = replace(moment, end=moment.duration)
    if moment.query_id in used:
        number = 2
        while (name := f"{moment.query_id}_{number}") in known:
            number += 1
        repairs.append(("same id", f"'{moment.query_id}' became '{name}'"))
        moment = replace(moment, query_id=name)
    return moment, repairs


def _remarks(moment: Moment, spans: int, texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What is worth knowing of a moment that is used."""
    if moment.video_id is None or moment.start is None:
        yield "no truth", "no video" if moment.video_id is None else f"no span in '{moment.video_id}'"
    elif moment.text.strip() in texts:
        yield "shared text", f"the text of {texts[moment.text.strip()]}"
    if spans > 1:
        yield "several spans", f"{moment.start} to {moment.end} s of {spans} spans"
    if moment.start is not None and moment.duration is None:
        yield "no duration", f"of '{moment.video_id}'"
