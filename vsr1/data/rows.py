"""Training rows in the public schemas: replies to learn (SFT), queries to practise on (GRPO), and hard negatives.

A row speaks of one query and one shown video. SFT files are a JSON list in the ShareGPT manner, GRPO files have one JSON
object a line, hard negatives are one JSON object: query id -> video ids, best first. What is read is checked; keys that
nobody here needs are kept and written back. Rows are told apart by query id, never by text: texts occur twice.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from vsr1.data.annotated_videos import plain_name
from vsr1.data.annotation_files import AnnotationError, read
from vsr1.data.annotation_values import list_of, number_of, pair, text_of
from vsr1.files import write_whole

_TURN_END: Final = "<|im_end|>"  # what closes a turn of Qwen's chat form: the trainer sets it, a reply does not hold it
_ROLES: Final = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
_LABELS: Final = {
    "pos": True, "match": True, "matched": True, "neg": False, "not_match": False, "not_matched": False,
}  # fmt: skip
_GRPO_KEYS: Final = (
    "qid", "query", "retrieved_video", "label", "gt_video", "gt_time", "gt_duration", "hard_negative_ids", "is_augmented",
)  # fmt: skip

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class SftRow:
    """A reply to learn.

    `shown` is the id of the video that the policy sees, `video_id` of the right one, and `matched` whether they are the
    same. `reply` is the assistant's text without the token that closes its turn, `system` the system turn where the file
    has one. `meta` is the row's other knowledge, written back.
    """

    query_id: str
    query: str
    shown: str
    matched: bool
    video_id: str
    reply: str
    system: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GrpoRow:
    """A query to practise on, with the video shown first.

    `start`, `end` (the moment in the right video) and `duration` (of the right video) are in seconds, None where the file
    does not know them. `negatives` are wrong videos, the most alike first. `augmented`: a copy of a not matched row that
    shows the right video. `extra` holds every other key of the row, written back.
    """

    query_id: str
    query: str
    shown: str
    matched: bool
    video_id: str
    start: float | None
    end: float | None
    duration: float | None
    negatives: tuple[str, ...] = ()
    augmented: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_sft(path: str | os.PathLike[str]) -> list[SftRow]:
    """Read an SFT file: a JSON list (or JSON lines) of {qid, query, messages | conversations, videos, meta}.

    Raises:
        AnnotationError: the file cannot be read, or a row lacks a key, has more than one reply or video, or says that a
            video matches which is not the right one, or the reverse; it is named.
    """
    return list(_rows(path, "SFT file", _sft))


def write_sft(path: str | os.PathLike[str], rows: Sequence[SftRow]) -> None:
    """Write an SFT file, aside and then renamed; `read_sft` gives the rows back."""
    write_whole(path, json.dumps([_sft_record(row) for row in rows], ensure_ascii=False, indent=2))


def protocol_text(path: str | os.PathLike[str]) -> str:
    """The system turn of an SFT file, word for word: what a policy that learned from the file expects before each query.

    Raises:
        AnnotationError: as `read_sft`, or the file has no rows, rows without a system turn, or more than one text.
    """
    rows = read_sft(path)
    texts = Counter(row.system for row in rows)
    if len(texts) == 1 and (text := rows[0].system) is not None:
        return text
    if set(texts) <= {None}:
        raise AnnotationError(
            f"SFT file '{path}': none of its {len(rows)} rows has a system turn to take the protocol from"
        )
    counts = ", ".join(
        f"{count} x {'none' if text is None else repr(text[:40])}" for text, count in texts.most_common(3)
    )
    raise AnnotationError(
        f"SFT file '{path}': its {len(rows)} rows have {len(texts)} different system turns ({counts}"
        f"{', ...' if len(texts) > 3 else ''}); the protocol needs one: leave the rows that have it"
    )


def read_grpo(path: str | os.PathLike[str]) -> list[GrpoRow]:
    """Read a GRPO file: one JSON object a line.

    Raises:
        AnnotationError: the file cannot be read, or a row lacks a key or contradicts itself; it is named.
    """
    return list(_rows(path, "GRPO file", _grpo))


def write_grpo(path: str | os.PathLike[str], rows: Sequence[GrpoRow]) -> None:
    """Write a GRPO file, aside and then renamed; `read_grpo` gives the rows back."""
    write_whole(path, "".join(json.dumps(_grpo_record(row), ensure_ascii=False) + "\n" for row in rows))


def read_hard_negatives(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Query id -> ids of wrong videos, best first.

    Raises:
        AnnotationError: the file cannot be read, or is anything else than that.
    """
    where = f"hard negatives '{os.fspath(path)}'"
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AnnotationError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise AnnotationError(f"{where}: must be one object, query id -> [video ids], is a {type(found).__name__}")
    for query_id, videos in found.items():
        if not isinstance(videos, list) or not all(isinstance(video, str) and video for video in videos):
            raise AnnotationError(f"{where}: query '{query_id}' must have a list of video ids, has {str(videos)[:80]}")
        if len(set(videos)) < len(videos):
            raise AnnotationError(f"{where}: query '{query_id}' has a video twice among its negatives")
    return {query_id: tuple(videos) for query_id, videos in found.items()}


def write_hard_negatives(path: str | os.PathLike[str], negatives: Mapping[str, Sequence[str]]) -> None:
    """Write hard negatives, aside and then renamed."""
    write_whole(path, json.dumps({query: list(videos) for query, videos in negatives.items()}, ensure_ascii=False))


def _rows(path: str | os.PathLike[str], name: str, checked: Callable[[Mapping[str, Any]], _Row]) -> Iterator[_Row]:
    where = f"{name} '{os.fspath(path)}'"
    try:
        sheet = read(path)
    except AnnotationError as error:
        raise AnnotationError(f"{where}: {error}") from error
    if sheet.layout not in ("array", "lines") and sheet.sample():
        raise AnnotationError(f"{where}: must hold JSON rows, is {sheet}")
    for entry in sheet.entries:
        problem = entry.problem
        if problem is None:
            try:
                yield checked(entry.value)
            except ValueError as error:
                problem = str(error)
        if problem is not None:
            raise AnnotationError(f"{where}, {entry.place}: {problem}")


def _sft(record: Mapping[str, Any]) -> SftRow:
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise ValueError(f"'meta' must be an object, got {meta!r}")
    turns = _turns(record)
    replies = [text for role, text in turns if role == "assistant"]
    systems = [text for role, text in turns if role == "system"]
    if len(replies) != 1 or len(systems) > 1 or turns[-1][0] != "assistant":
        raise ValueError(f"must be one question and one reply, has the turns {', '.join(role for role, _ in turns)}")
    videos = record.get("videos", [])
    if not isinstance(videos, list) or len(videos) > 1 or not all(isinstance(video, str) for video in videos):
        raise ValueError(f"'videos' must be a list of one name, got {videos!r}")
    shown = _text(meta, "video_id") if "video_id" in meta or not videos else plain_name(videos[0])
    if videos and plain_name(videos[0]) != plain_name(shown):
        raise ValueError(f"'videos' shows '{videos[0]}', 'meta' says '{shown}'")
    right = _text(meta, "query_pos_video_id")
    matched = _agreed(meta.get("gold_label"), "gold_label", shown, right)
    reply = replies[0].strip().removesuffix(_TURN_END).rstrip()
    system = systems[0] if systems else None
    return SftRow(_text(record, "qid"), text_of(record, "query"), shown, matched, right, reply, system, meta)


def _turns(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of each turn, whichever names the file has for them."""
    turns = []
    for turn in list_of(record, "conversations" if "conversations" in record else "messages"):
        said = turn if isinstance(turn, dict) else {}
        role = _ROLES.get(str(said.get("role", said.get("from"))))
        text = said.get("content", said.get("value"))
        if role is None or not isinstance(text, str):
            raise ValueError(f"a turn must have a role ({', '.join(_ROLES)}) and a text, got {str(turn)[:80]}")
        turns.append((role, text))
    return turns


def _sft_record(row: SftRow) -> dict[str, Any]:
    question = f'Query: "{row.query}"\nRetrieved video: <video>'
    turns = [("system", row.system), ("user", question), ("assistant", row.reply)]
    known = {"gold_label": "pos" if row.matched else "neg", "video_id": row.shown, "query_pos_video_id": row.video_id}
    return {
        "qid": row.query_id,
        "query": row.query,
        "messages": [{"role": role, "content": text} for role, text in turns if text is not None],
        "videos": [f"{row.shown}.npy"],
        "meta": {**row.meta, **known},
    }


def _grpo(record: Mapping[str, Any]) -> GrpoRow:
    shown, right = _text(record, "retrieved_video"), _text(record, "gt_video")
    start, end = (None, None) if record.get("gt_time") is None else pair(record["gt_time"], "gt_time")
    duration = None if record.get("gt_duration") is None else number_of(record, "gt_duration")
    if not all(math.isfinite(number) for number in (start, end, duration) if number is not None):
        raise ValueError(f"times must be finite, got {record['gt_time']} of {record['gt_duration']} s")
    negatives = list_of(record, "hard_negative_ids") if "hard_negative_ids" in record else []
    if not all(isinstance(video, str) and video for video in negatives):
        raise ValueError(f"'hard_negative_ids' must be video ids, got {str(negatives)[:80]}")
    if right in negatives:
        raise ValueError(f"the right video '{right}' is among its own 'hard_negative_ids'")
    augmented = record.get("is_augmented", False)
    if not isinstance(augmented, bool):
        raise ValueError(f"'is_augmented' must be true or false, got {augmented!r}")
    return GrpoRow(
        _text(record, "qid"),
        text_of(record, "query"),
        shown,
        _agreed(record.get("label"), "label", shown, right),
        right,
        start,
        end,
        duration,
        tuple(negatives),
        augmented,
        {key: value for key, value in record.items() if key not in _GRPO_KEYS},
    )


def _grpo_record(row: GrpoRow) -> dict[str, Any]:
    values = (
        row.query_id,
        row.query,
        row.shown,
        "matched" if row.matched else "not_matched",
        row.video_id,
        None if row.start is None or row.end is None else [row.start, row.end],
        row.duration,
        list(row.negatives),
        row.augmented,
    )
    known = dict(zip(_GRPO_KEYS, values, strict=True))
    return {**known, **row.extra, **known}  # the row's own keys first in the file, and last in the say


def _text(record: Mapping[str, Any], key: str) -> str:
    """A text that is not empty: an id."""
    text = text_of(record, key)
    if not text:
        raise ValueError(f"'{key}' is empty")
    return text


def _agreed(label: object, key: str, shown: str, right: str) -> bool:
    """Whether the shown video is the right one, if the row's label says so too."""
    matched = plain_name(shown) == plain_name(right)
    if label is not None and (not isinstance(label, str) or _LABELS.get(label) is not matched):
        raise ValueError(f"'{key}' is {label!r}, but the shown video is '{shown}' and the right one '{right}'")
    return matched
