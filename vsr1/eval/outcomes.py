"""What became of every query, in columns: the one table all metrics are computed from.

Trajectories in memory and files of results (`vsr1.eval.exchange`) both become an `Outcomes`: a row a query, and a row an
executed turn, the turns of query i being rows `first[i]` to `first[i + 1]`. A metric is then a few passes over arrays,
whatever the number of queries. Nothing is judged here: a table may hold queries that no metric accepts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vsr1.eval.spans import ious
from vsr1.records import Stop, Trajectory

Floats = NDArray[np.float64]
MATCHED, NOT_MATCHED, UNPARSABLE = 1, 0, -1
_BATCH = 4096  # queries that are turned into columns together
ANSWERS: dict[str | None, int] = {"matched": MATCHED, "not_matched": NOT_MATCHED, None: UNPARSABLE}


class Shown(NamedTuple):
    """One executed turn of one query. `right`: the video shown is the true one. `refine`: not accepted, and a refinement was
    asked for. `soft` and `hard` are the tokens of the refinement that followed, None where there was none of that kind; None
    in `text` where the tokens are not known."""

    number: int
    rank: float | None
    right: bool
    answer: int
    start: float | None
    end: float | None
    refine: bool
    text: float | None
    soft: float | None
    hard: float | None


class Fallback(NamedTuple):
    """An answer fallen back on where nothing was accepted: does it show the true video, and its span."""

    right: bool
    start: float | None
    end: float | None


class Query(NamedTuple):
    """One query and its turns."""

    query_id: str
    video_id: str | None
    start: float | None
    end: float | None
    stop: Stop
    final_rank: float | None
    fallback: Fallback | None
    turns: Sequence[Shown]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """N queries and their M executed turns.

    A query: `query_ids`, `video_ids` (the true one, or None) and `stop` are (N,) objects; `start`, `end` (seconds),
    `final_rank` and `fallback` are (N,) float64, NaN where there is none; `fallback` is the IoU of the answer fallen back
    on, 0 for one without a span and NaN for one that shows another video. `first` (N + 1,) int64 bounds its turns.

    A turn, (M,) each: `number` int64, which rises within a query; `rank`, `start`, `end` as in `turn_start`, `text`, `soft`
    and `hard` float64, NaN for None; `right` and `refine` bool; `answer` int8, one of MATCHED, NOT_MATCHED, UNPARSABLE.
    """

    query_ids: NDArray[np.object_]
    video_ids: NDArray[np.object_]
    stop: NDArray[np.object_]
    start: Floats
    end: Floats
    final_rank: Floats
    fallback: Floats
    first: NDArray[np.int64]
    number: NDArray[np.int64]
    rank: Floats
    right: NDArray[np.bool_]
    answer: NDArray[np.int8]
    turn_start: Floats
    turn_end: Floats
    refine: NDArray[np.bool_]
    text: Floats
    soft: Floats
    hard: Floats

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def failed(self) -> NDArray[np.bool_]:
        """(N,) bool: queries whose loop broke off; metrics leave them out and count them."""
        return self.stop == "failed"

    @property
    def matched(self) -> NDArray[np.bool_]:
        """(N,) bool: queries whose last turn was accepted."""
        return self.stop == "matched"

    @property
    def query(self) -> NDArray[np.int64]:
        """(M,) int64: the query of each turn."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    def overlap(self) -> Floats:
        """(M,) float64: IoU of each turn's span with the true one, whatever was shown; 0 without a span."""
        query = self.query
        return ious(self.turn_start, self.turn_end, self.start[query], self.end[query])

    def take(self, queries: NDArray[np.int64]) -> Outcomes:
        """The table of these queries (indices into this one), in the order they are given."""
        counts = np.diff(self.first)[queries]
        first = np.concatenate([[0], np.cumsum(counts)])
        rows = np.repeat(self.first[queries] - first[:-1], counts) + np.arange(first[-1])
        columns = {name: getattr(self, name)[rows if name in _OF_TURNS else queries] for name in _COLUMNS}
        return Outcomes(first=first, **columns)


_COLUMNS = tuple(field.name for field in dataclasses.fields(Outcomes) if field.name != "first")
_OF_TURNS = frozenset(_COLUMNS[_COLUMNS.index("number") :])


def table(queries: Iterable[Query]) -> Outcomes:
    """The columns of these queries, in their order."""
    # in batches, so that few tuples live at a time: the garbage collector would walk over all of them again and again
    left, parts = iter(queries), []
    while batch := list(islice(left, _BATCH)):
        parts.append(_table(batch))
    if len(parts) < 2:
        return parts[0] if parts else _table([])
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
    counts = np.concatenate([np.diff(part.first) for part in parts])
    return Outcomes(first=np.concatenate([[0], np.cumsum(counts)]), **columns)


def _table(found: Sequence[Query]) -> Outcomes:
    ask = _columns(Query, found)
    shown = _columns(Shown, [turn for query in found for turn in query.turns])
    answers = _columns(Fallback, [query.fallback or Fallback(False, None, None) for query in found])
    start, end = _floats(ask["start"]), _floats(ask["end"])
    known = np.array(answers["right"], np.bool_) & ~np.isnan(start) & ~np.isnan(end)
    return Outcomes(
        query_ids=np.array(ask["query_id"], object),
        video_ids=np.array(ask["video_id"], object),
        stop=np.array(ask["stop"], object),
        start=start,
        end=end,
        final_rank=_floats(ask["final_rank"]),
        fallback=np.where(known, ious(_floats(answers["start"]), _floats(answers["end"]), start, end), np.nan),
        first=np.concatenate([[0], np.cumsum([len(turns) for turns in ask["turns"]], dtype=np.int64)]),
        number=np.array(shown["number"], np.int64),
        rank=_floats(shown["rank"]),
        right=np.array(shown["right"], np.bool_),
        answer=np.array(shown["answer"], np.int8),
        turn_start=_floats(shown["start"]),
        turn_end=_floats(shown["end"]),
        refine=np.array(shown["refine"], np.bool_),
        text=_floats(shown["text"]),
        soft=_floats(shown["soft"]),
        hard=_floats(shown["hard"]),
    )


def _columns(kind: Any, rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """The fields of many named tuples of one kind, a tuple each."""
    return dict(zip(kind._fields, zip(*rows, strict=True) if rows else ((),) * len(kind._fields), strict=True))


def _floats(column: Any) -> Floats:
    return np.array(column, np.float64)  # None becomes NaN


def shared(first: Outcomes, second: Outcomes) -> tuple[Outcomes, Outcomes]:
    """The queries that both hold and that failed in neither, in the order of `first`.

    Raises ValueError where a query has another truth in the one than in the other: then they are not of one split.
    """
    place = {query: i for i, query in enumerate(second.query_ids)}
    mine = np.array([i for i, query in enumerate(first.query_ids) if query in place], np.int64)
    theirs = np.array([place[first.query_ids[i]] for i in mine], np.int64)
    ran = ~(first.failed[mine] | second.failed[theirs])
    one, other = first.take(mine[ran]), second.take(theirs[ran])
    spans = [np.nan_to_num(np.stack([side.start, side.end]), nan=-1.0) for side in (one, other)]
    for i in np.flatnonzero((one.video_ids != other.video_ids) | (spans[0] != spans[1]).any(axis=0))[:1]:
        truths = [f"{side.video_ids[i]} {side.start[i]} to {side.end[i]} s" for side in (one, other)]
        raise ValueError(f"query '{one.query_ids[i]}' is about {truths[0]} in one and about {truths[1]} in the other")
    return one, other


def cut(given: Outcomes, turns: int) -> Outcomes:
    """What a loop of at most `turns` turns leaves of these queries: later turns are gone, and the final rank is that under the
    query that the last turn left behind, which the next turn searched with. An answer that a longer loop fell back on is
    none of the shorter one's. Failed queries stay failed, so that all lengths are about the same queries."""
    counts = np.bincount(given.query, weights=given.number <= turns, minlength=len(given)).astype(np.int64)
    goes_on = counts < np.diff(given.first)
    following = given.first[:-1] + counts
    kept = {name: getattr(given, name)[given.number <= turns] for name in _OF_TURNS}
    return dataclasses.replace(
        given,
        stop=np.where(goes_on & ~given.failed, "turns", given.stop),
        final_rank=np.where(goes_on, np.append(given.rank, np.nan)[following], given.final_rank),
        fallback=np.where(goes_on, np.nan, given.fallback),
        first=np.concatenate([[0], np.cumsum(counts)]),
        **kept,
    )


def of(results: Sequence[Trajectory] | Outcomes) -> Outcomes:
    """The table of these trajectories, in their order; a table is returned as it is."""
    return results if isinstance(results, Outcomes) else table(_query(one) for one in results)


def _query(one: Trajectory) -> Query:
    moment, fallback = one.moment, one.fallback
    turns = [
        Shown(
            turn.number,
            turn.rank,
            turn.video_id == moment.video_id,
            ANSWERS[turn.reply.answer],
            turn.reply.start,
            turn.reply.end,
            turn.reply.refine and turn.reply.answer != "matched",
            len(turn.token_ids),
            None if turn.actions is None else turn.actions.shape[0],
            len(turn.rewriting) or None,
        )
        for turn in one.turns
    ]
    return Query(
        moment.query_id,
        moment.video_id,
        moment.start,
        moment.end,
        one.stop,
        one.final_rank,
        None
        if fallback is None
        else Fallback(fallback.video_id == moment.video_id, fallback.reply.start, fallback.reply.end),
        turns,
    )
