"""Compaction: the live vectors in few new segments, in the same order, so that deleted ones free their space.

It runs inside one write transaction of the catalogue. Until that is committed the old segments are the corpus and the
new files are leftovers; afterwards it is the other way round. A kill at any instant leaves one or the other.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from vsr1.corpus.catalogue import Contents, count_commit, forget_all, insert, next_number
from vsr1.corpus.segments import in_parts, write_segment
from vsr1.corpus.view import View, gather


def is_compact(view: View, row_bytes: int, segment_bytes: int) -> bool:
    """Whether nothing deleted takes up space and no fewer files could hold the rest."""
    needed = math.ceil(len(view.ids) / max(1, segment_bytes // row_bytes))
    return len(view.segments) <= needed and sum(s.rows for s in view.segments.values()) == len(view.ids)


def rewrite(
    connection: sqlite3.Connection,
    folder: Path,
    view: View,
    read: Callable[[int], torch.Tensor],
    dimension: int,
    dtype: torch.dtype,
    segment_bytes: int,
) -> Contents:
    """Writes the live rows of `view` as new segments in `folder` and names them instead of all there was.

    `read` gives the vectors (M, D) of a segment, verified. Takes memory for about three segments. Returns what the
    catalogue holds once the transaction of `connection` is committed.
    """
    last: dict[int, torch.Tensor] = {}  # one segment often feeds several parts

    def read_once(number: int) -> torch.Tensor:
        if number not in last:
            last.clear()
            last[number] = read(number)
        return last[number]

    forget_all(connection)
    segments, videos = [], []
    for part in in_parts(len(view.ids), dimension * dtype.itemsize, "compacting", segment_bytes):
        moved = view.videos[part]
        rows = torch.empty(len(moved), dimension, dtype=dtype)
        gather(moved, read_once, rows)
        segment = write_segment(folder, next_number(connection), rows)
        moved = [replace(v, segment=segment.number, position=position) for position, v in enumerate(moved)]
        insert(connection, segment, moved)
        segments.append(segment)
        videos += moved
    count_commit(connection)
    return Contents(view.generation + 1, tuple(segments), tuple(videos))
