"""The pool that stage 1 learns from: queries, each with a video that is shown for it and is or is not the right one.

Most pairs are what a searcher meets, a query and the video that the sweep puts first. Half of the pool shows the right
video and half a wrong one; where the sweep is too seldom right, or wrong, to fill its half, other queries are shown
their own video, or the wrong one that comes nearest, until the halves are equal. In a file each pair is one JSON object
on a line with the public field names (`top1_*` is the video shown), and later also the rationale's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Literal

from vsr1.data.annotation_files import AnnotationError, read
from vsr1.data.annotation_values import number_of, text_of, whole_of
from vsr1.data.negatives import Candidates, Found
from vsr1.files import write_whole
from vsr1.records import Moment

Shown = Literal["top1", "truth", "wrong"]
_EXTRA: Final = ("model_", "parsed_", "fig_score", "query_index")


@dataclass(frozen=True)
class Pair:
    """A query (its video and span are known), the video shown for it, with its score and its rank from 1, and why that
    one: it came first, it is the right one, or it is the first wrong one. `extra`: what else stands in the file."""

    moment: Moment
    shown: str
    score: float
    rank: int
    why: Shown = "top1"
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def pair_id(self) -> str:
        """`<query id>::<video id>`."""
        return f"{self.moment.query_id}::{self.shown}"

    @property
    def matched(self) -> bool:
        """Whether the video shown is the right one."""
        return self.shown == self.moment.video_id


def draw(candidates: Candidates, count: int, seed: int = 42) -> list[Pair]:
    """At most `count` pairs that match and `count` that do not, as many of each; in the order of the queries.

    If the corpus holds a single video nothing can be wrong, and there are only pairs that match.
    """
    rng = Random(seed)
    indices = range(len(candidates.moments))

    def pair(index: int, found: Found, why: Shown) -> Pair:
        return Pair(candidates.moments[index], found.video_id, found.score, found.rank, why)

    first = [pair(index, candidates.best(index), "top1") for index in indices]
    right = [index for index in indices if first[index].matched]
    wrong = [index for index in indices if not first[index].matched]
    half = min(count, max(len(right), len(wrong)))
    drawn = [(index, first[index]) for group in (right, wrong) for index in rng.sample(group, min(half, len(group)))]
    for index in rng.sample(wrong, max(0, half - len(right))):
        drawn.append((index, pair(index, candidates.truth(index), "truth")))
    for index in rng.sample(right, max(0, half - len(wrong))):
        drawn += [(index, pair(index, found, "wrong")) for found in candidates.negatives(index, 1)]
    return [one for _, one in sorted(drawn, key=lambda placed: (placed[0], placed[1].rank))]


def write_pairs(
    path: str | os.PathLike[str], pairs: Sequence[Pair], place: Callable[[str], tuple[str | None, float | None]]
) -> None:
    """Write pairs, aside and then renamed; `place` gives a video's path and its seconds."""
    lines = []
    for pair in pairs:
        moment = pair.moment
        path_shown, seconds = place(pair.shown)
        length = None if moment.start is None or moment.end is None else moment.end - moment.start
        known = {
            "pair_id": pair.pair_id,
            "qid": moment.query_id,
            "query": moment.text,
            "query_pos_doc_id": moment.video_id,
            "top1_doc_id": pair.shown,
            "top1_score": pair.score,
            "top1_rank": pair.rank,
            "gold_label": "match" if pair.matched else "not_match",
            "shown_because": pair.why,
            "top1_video_id": pair.shown,
            "top1_video_path": path_shown,
            "top1_start": 0.0,
            "top1_end": seconds,
            "top1_duration": seconds,
            "gt_video_id": moment.video_id,
            "gt_video_path": place(str(moment.video_id))[0],
            "gt_start": moment.start,
            "gt_end": moment.end,
            "gt_duration": length,
        }
        lines.append(json.dumps({**known, **pair.extra, **known}, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def read_pairs(path: str | os.PathLike[str], moments: Mapping[str, Moment]) -> list[Pair]:
    """Read a pool, ours or a public one; `moments`, by query id, say what is asked and where the truth lies.

    Raises:
        AnnotationError: the file cannot be read, a row lacks a key, speaks of a query that is not among the moments, or
            calls a video right that is not, or the reverse; it is named.
    """
    pairs = []
    for entry in read(path, layout="lines").entries:
        try:
            if entry.problem is not None:
                raise ValueError(entry.problem)
            row = entry.value
            query_id, shown, label = (text_of(row, key) for key in ("qid", "top1_doc_id", "gold_label"))
            if query_id not in moments:
                raise ValueError(f"query '{query_id}' is not among the annotations that are used")
            why = row.get("shown_because", "top1")
            extra = {key: value for key, value in row.items() if key.startswith(_EXTRA)}
            pair = Pair(moments[query_id], shown, number_of(row, "top1_score"), whole_of(row, "top1_rank"), why, extra)
            if label != ("match" if pair.matched else "not_match"):
                raise ValueError(
                    f"the label is '{label}', but '{shown}' is shown and '{pair.moment.video_id}' is right"
                )
        except ValueError as error:
            raise AnnotationError(f"pool '{os.fspath(path)}', {entry.place}: {error}") from error
        pairs.append(pair)
    return pairs
