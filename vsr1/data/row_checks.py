"""Whether training rows fit what they speak of: queries that are annotated, videos that are there, replies that parse.

Rows that are wrong in themselves are refused when they are read (`vsr1.data.rows`). Here they are held against a split's
annotations and corpus. A row with a refused finding cannot be learnt from; the others are worth knowing of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vsr1.data.rows import GrpoRow, SftRow
from vsr1.records import Moment, Reply

LATE: Final = 0.05  # seconds by which a span may end after its video: texts round, containers do too

# Of each finding whether the row is refused, and when it is one.
RULES: Final[Mapping[str, tuple[bool, str]]] = {
    "unknown video": (True, "a video that is shown, or that is the right one, is not in the corpus"),
    "no answer": (True, "the reply has no answer that can be read"),
    "wrong answer": (True, "the reply's answer is not the row's label"),
    "no span": (True, "the video matches, and no span is given"),
    "no refine": (True, "the reply does not end with <REFINE>"),
    "reversed": (True, "the span does not end after it starts"),
    "outside": (True, "the span lies wholly outside the right video"),
    "ends after": (False, "the span ends after the right video"),
    "unknown query": (False, "the query's id is not annotated"),
    "other video": (False, "the annotation of this id has another right video: ids were joined by text"),
    "lost negative": (False, "a negative is not in the corpus"),
    "own negative": (True, "the right video is among the query's negatives"),
}


@dataclass(frozen=True)
class Known:
    """What rows may speak of: annotated `moments` by query id, and the videos of the corpus with their seconds, if known."""

    moments: Mapping[str, Moment]
    videos: Mapping[str, float | None]


@dataclass(frozen=True)
class Checked:
    """A file of training rows: how many rows, how many of them show the right video, and (finding, query id, detail)."""

    name: str
    rows: int
    matched: int | None
    findings: Sequence[tuple[str, str, str]]

    @property
    def refused(self) -> int:
        """How many findings make a row useless."""
        return sum(RULES[name][0] for name, _, _ in self.findings)

    def text(self, shown: int | None = 5) -> str:
        """A line of counts, then each finding with its count and up to `shown` rows (None: all)."""
        labels = "" if self.matched is None else f", {self.matched} matched, {self.rows - self.matched} not matched"
        lines = [f"{self.name}: {self.rows} rows{labels}; {self.refused} refused"]
        counts = Counter(name for name, _, _ in self.findings)
        for name, (refused, when) in RULES.items():
            if not counts[name]:
                continue
            lines.append(f"  {counts[name]:>7}  {name:<13}  {'refused' if refused else 'reported'}  {when}")
            rows = [f"{query}: {detail}" for found, query, detail in self.findings if found == name]
            lines += [f"           {row}" for row in rows[:shown]]
        return "\n".join(lines)


def check_sft(name: str, rows: Sequence[SftRow], known: Known, parse: Callable[[str], Reply]) -> Checked:
    """Hold SFT rows against what is known; `parse` reads a reply (`vsr1.agent.protocol.parse`)."""

    def findings(row: SftRow) -> Iterator[tuple[str, str]]:
        yield from _places(row.query_id, (row.shown, row.video_id), row.video_id, known)
        reply = parse(row.reply)
        expected = "matched" if row.matched else "not_matched"
        if reply.answer is None:
            yield "no answer", row.reply[-60:]
        elif reply.answer != expected:
            yield "wrong answer", f"it says {reply.answer}, the label is {expected}"
        if not reply.refine:
            yield "no refine", row.reply[-60:]
        if row.matched:
            yield from _span(reply.start, reply.end, known.videos.get(row.video_id))

    found = [(rule, row.query_id, detail) for row in rows for rule, detail in findings(row)]
    return Checked(name, len(rows), sum(row.matched for row in rows), found)


def check_grpo(name: str, rows: Sequence[GrpoRow], known: Known) -> Checked:
    """Hold GRPO rows against what is known."""

    def findings(row: GrpoRow) -> Iterator[tuple[str, str]]:
        yield from _places(row.query_id, (row.shown, row.video_id), row.video_id, known)
        if row.matched or row.start is not None:
            duration = known.videos.get(row.video_id)
            yield from _span(row.start, row.end, row.duration if duration is None else duration)
        yield from _negatives(row.negatives, known)

    found = [(rule, row.query_id, detail) for row in rows for rule, detail in findings(row)]
    return Checked(name, len(rows), sum(row.matched for row in rows), found)


def check_hard_negatives(name: str, negatives: Mapping[str, Sequence[str]], known: Known) -> Checked:
    """Hold hard negatives against what is known."""

    def findings(query_id: str, videos: Sequence[str]) -> Iterator[tuple[str, str]]:
        moment = known.moments.get(query_id)
        if known.moments and moment is None:
            yield "unknown query", f"no annotation has the id '{query_id}'"
        if moment is not None and moment.video_id in videos:
            yield "own negative", f"'{moment.video_id}'"
        yield from _negatives(videos, known)

    found = [(rule, query, detail) for query, videos in negatives.items() for rule, detail in findings(query, videos)]
    return Checked(name, len(negatives), None, found)


def _places(query_id: str, videos: Iterable[str], right: str, known: Known) -> Iterator[tuple[str, str]]:
    for video in dict.fromkeys(videos):
        if video not in known.videos:
            yield "unknown video", f"'{video}'"
    if not known.moments:  # no annotations to hold it against
        return
    moment = known.moments.get(query_id)
    if moment is None:
        yield "unknown query", f"no annotation has the id '{query_id}'"
    elif moment.video_id != right:
        yield "other video", f"the row has '{right}', the annotation '{moment.video_id}'"


def _span(start: float | None, end: float | None, duration: float | None) -> Iterator[tuple[str, str]]:
    said = f"{start} to {end} s of {duration} s"
    if start is None or end is None:
        yield "no span", said
    elif end <= start:
        yield "reversed", said
    elif end <= 0 or (duration is not None and start >= duration):
        yield "outside", said
    elif duration is not None and end > duration + LATE:
        yield "ends after", said


def _negatives(videos: Iterable[str], known: Known) -> Iterator[tuple[str, str]]:
    lost = [video for video in videos if video not in known.videos]
    if lost:
        yield "lost negative", f"'{lost[0]}' ({len(lost)} such)"
