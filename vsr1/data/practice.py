"""What stage 2 practises on: each training query with the video that the sweep puts first and its hard negatives.

Where the sweep's first is wrong more often than right, copies of such rows that show the right video are added until there
are as many rows that match as there are others, so that to reject everything does not pay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from vsr1.data.negatives import Candidates
from vsr1.data.rows import GrpoRow
from vsr1.models.tokenizer import REFINE


def practice(
    candidates: Candidates,
    seconds: Callable[[str], float | None],
    problem: Callable[[str], str],
    *,
    negatives: int = 24,
    ratio: float = 1.0,
    seed: int = 42,
) -> list[GrpoRow]:
    """One row a query, in order, then the copies: rows that match are at least `ratio` times the others, if copies can do it.

    Args:
        seconds: a video's length, for queries whose annotation does not give it.
        problem: the public field of that name, made of the query's text.
        negatives: how many hard negatives a row has; with their scores and ranks in the sweep.
    """
    rows = [_row(candidates, index, negatives, seconds, problem) for index in range(len(candidates.moments))]
    others = [row for row in rows if not row.matched]
    missing = math.ceil(ratio * len(others)) - (len(rows) - len(others))
    rng, copies = Random(seed), list[GrpoRow]()
    while others and len(copies) < missing:
        cycle = rng.sample(others, len(others))
        copies += [_copy(row) for row in cycle[: missing - len(copies)]]
    return [replace(row, extra={**row.extra, "problem_id": number}) for number, row in enumerate([*rows, *copies])]


def statistics(rows: Sequence[GrpoRow]) -> dict[str, Any]:
    """Counts of a GRPO file, by the public names."""
    own = [row for row in rows if not row.augmented]
    return {
        "rows_written": len(rows),
        "rows_matched": sum(row.matched for row in rows),
        "rows_not_matched": sum(not row.matched for row in rows),
        "rows_written_raw": len(own),
        "rows_matched_raw": sum(row.matched for row in own),
        "rows_not_matched_raw": sum(not row.matched for row in own),
        "rows_augmented_match_added": len(rows) - len(own),
        "hard_negative_avg_count": sum(len(row.negatives) for row in rows) / max(len(rows), 1),
    }


def _row(
    candidates: Candidates,
    index: int,
    count: int,
    seconds: Callable[[str], float | None],
    problem: Callable[[str], str],
) -> GrpoRow:
    moment, shown = candidates.moments[index], candidates.best(index)
    assert moment.video_id is not None
    found = candidates.negatives(index, count)
    matched = shown.video_id == moment.video_id
    return GrpoRow(
        query_id=moment.query_id,
        query=moment.text,
        shown=shown.video_id,
        matched=matched,
        video_id=moment.video_id,
        start=moment.start,
        end=moment.end,
        duration=seconds(moment.video_id) if moment.duration is None else moment.duration,
        negatives=tuple(one.video_id for one in found),
        extra={
            "problem": problem(moment.text),
            "data_type": "video",
            "problem_type": "multiple choice",
            "options": [f"<answer>{label}</answer> {REFINE}" for label in ("matched", "not_matched")],
            "solution": _solution(matched, moment.start, moment.end),
            "path": f"{shown.video_id}.npy",
            "data_source": "vsr1",
            "hard_negative_scores": [one.score for one in found],
            "hard_negative_ranks": [one.rank for one in found],
        },
    )


def _copy(row: GrpoRow) -> GrpoRow:
    """The row with the right video shown."""
    extra = {
        **row.extra,
        "solution": _solution(True, row.start, row.end),
        "path": f"{row.video_id}.npy",
        "augmentation_type": "gt_video_positive",
        "source_label": "not_matched",
        "source_retrieved_video": row.shown,
    }
    return replace(row, shown=row.video_id, matched=True, augmented=True, extra=extra)


def _solution(matched: bool, start: float | None, end: float | None) -> str:
    if not matched:
        return f"<answer>not_matched</answer>{REFINE}"
    return f"<answer>matched</answer><start>{start:g}</start><end>{end:g}</end>{REFINE}"
