"""TVR's way of measuring moment retrieval: is a right moment among the first k of up to 100 predictions?

Its prediction file is one JSON object, `{"video2idx": {name: index}, "VCMR": [...], "SVMR": [...], "VR": [...]}`; each task,
where present, lists `{"desc_id": .., "predictions": [[video index, start, end, score], ..]}`, best first. Its truths are one
JSON object a line with `desc_id`, `vid_name`, `ts` and `type`. `evaluate` gives the figures of TVR's released evaluator
(arXiv 2001.09099), to the last digit: times are float32, the IoU is over the hull of both spans, figures are percentages
rounded to two digits. `tvr_recall` is the same measure for predictions in memory, in float64 and as shares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vsr1.errors import Vsr1Error
from vsr1.eval.spans import Span, hull_ious, ious
from vsr1.records import Moment

RECALL_AT = (1, 5, 10, 100)
THRESHOLDS = (0.5, 0.7)
PREDICTIONS = 100
TASKS = "VCMR", "SVMR", "VR"
TYPES = "v", "t", "vt"  # a description of what is seen, said, or both
_SEVERAL = 4  # annotations of one moment from which on a prediction must agree with two of them (DiDeMo)


@dataclass(frozen=True)
class Truth:
    """One annotated description: its video, its span (or the spans several people gave it), seconds; and its type."""

    desc_id: int | str
    video: str
    spans: tuple[Span, ...]
    type: str | None


@dataclass(frozen=True, eq=False)
class Predictions:
    """What one task predicts: (P, 3) float32 rows of video index, start and end, best first, by description."""

    rows: dict[int | str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Submission:
    """A prediction file: the index of every video, and the predictions of each task it holds."""

    video2idx: dict[str, int]
    tasks: dict[str, Predictions]


def read_submission(path: Path) -> Submission:
    """Read a prediction file. Raises Vsr1Error naming the task and the description that cannot be read."""
    return submission(load(path), str(path))


def load(path: Path) -> Any:
    """The JSON value of a file; Vsr1Error where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Vsr1Error(f"'{path}' cannot be read as JSON: {error}") from error


def submission(value: Any, name: str) -> Submission:
    """A prediction file that was parsed already; `name` says where errors are."""
    if not isinstance(value, dict) or not isinstance(value.get("video2idx"), dict):
        raise Vsr1Error(f"'{name}' is no TVR prediction file: it needs an object 'video2idx'")
    tasks = {task: _predictions(value[task], f"'{name}', {task}") for task in TASKS if task in value}
    if not tasks:
        raise Vsr1Error(f"'{name}' predicts nothing: it has none of {', '.join(TASKS)}")
    return Submission(value["video2idx"], tasks)


def _predictions(entries: Any, where: str) -> Predictions:
    rows: dict[int | str, NDArray[np.float32]] = {}
    for number, entry in enumerate(entries, 1):
        try:
            desc_id, guesses = entry["desc_id"], entry["predictions"]
            found = np.array([guess[:3] for guess in guesses[:PREDICTIONS]], dtype=np.float32).reshape(-1, 3)
        except (KeyError, TypeError, ValueError) as error:
            raise Vsr1Error(
                f"{where}: entry {number} needs a desc_id and predictions [video, start, end, ..]"
            ) from error
        if desc_id in rows:
            raise Vsr1Error(f"{where}: entry {number} predicts desc_id {desc_id} a second time")
        rows[desc_id] = found
    return Predictions(rows)


def read_truths(path: Path) -> list[Truth]:
    """Read TVR's annotations, one a line. Raises Vsr1Error naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Vsr1Error(f"'{path}' cannot be read: {error}") from error
    found: dict[int | str, Truth] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"'{path}' line {number}"
        try:
            row = json.loads(line)
            given = row["ts"] if len(row["ts"]) >= _SEVERAL else [row["ts"]]
            spans = tuple((float(start), float(end)) for start, end in given)
            truth = Truth(row["desc_id"], row["vid_name"], spans, row.get("type"))
        except json.JSONDecodeError as error:
            raise Vsr1Error(f"{where} is not JSON: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Vsr1Error(
                f"{where} is no TVR annotation: it needs desc_id, vid_name and ts, [start, end] or {_SEVERAL} of these"
            ) from error
        if truth.desc_id in found:
            raise Vsr1Error(f"{where} annotates desc_id {truth.desc_id} a second time")
        if truth.type not in (None, *TYPES):
            raise Vsr1Error(f"{where}: type must be one of {', '.join(TYPES)}, got {truth.type!r}")
        found[truth.desc_id] = truth
    return list(found.values())


def first_right(
    given: Submission, truths: Sequence[Truth], thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Where the first right prediction of each description stands, counted from 1, infinite where none is right: by task,
    then by threshold (a threshold's text; "" for VR), (N,) in the order of `truths`.

    VCMR: the video is the true one and its IoU reaches the threshold (with two of the spans where there are four or more).
    SVMR: as VCMR, counted among the predictions of the true video only. VR: the video is the true one.
    Raises Vsr1Error where a task and the truths do not hold the same descriptions, or a true video has no index.
    """
    unknown = sorted({truth.video for truth in truths} - given.video2idx.keys())
    if unknown:
        raise Vsr1Error(f"{len(unknown)} true videos have no index in video2idx, such as {unknown[:3]}")
    return {task: _first_right(task, given, truths, thresholds) for task in TASKS if task in given.tasks}


def _first_right(
    task: str, given: Submission, truths: Sequence[Truth], thresholds: Sequence[float]
) -> dict[str, NDArray[np.float64]]:
    rows = given.tasks[task].rows
    if rows.keys() != {truth.desc_id for truth in truths}:
        odd = sorted(rows.keys() ^ {truth.desc_id for truth in truths}, key=str)[:3]
        raise Vsr1Error(f"{task}: {len(rows)} descriptions predicted, {len(truths)} annotated; they differ in {odd}")
    parts = [rows[truth.desc_id] for truth in truths]
    counts = np.array([len(part) for part in parts], np.int64)
    flat = np.concatenate([np.zeros((0, 3), np.float32), *parts])
    query = np.repeat(np.arange(len(truths)), counts)
    true = np.array([given.video2idx[truth.video] for truth in truths], np.float32)
    right = flat[:, 0] == true[query]  # a prediction of another video is right at no threshold
    position = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    if task == "SVMR":
        among = np.cumsum(right)
        position = among - np.repeat(np.append(0, among)[np.cumsum(counts) - counts], counts)
    query, position, flat = query[right], position[right], flat[right]
    if task == "VR":
        return {"": _earliest(query, position, len(truths))}

    spans = np.array([span for truth in truths for span in truth.spans], np.float32).reshape(-1, 2)
    several = np.array([len(truth.spans) for truth in truths], np.int64)
    needed = np.where(several >= _SEVERAL, 2, 1)[query]
    # every prediction against every span of its description
    guess = np.repeat(np.arange(len(query)), several[query])
    place = np.arange(len(guess)) - np.repeat(np.cumsum(several[query]) - several[query], several[query])
    truth_span = spans[(np.cumsum(several) - several)[query[guess]] + place]
    overlap = hull_ious(flat[guess, 1], flat[guess, 2], truth_span[:, 0], truth_span[:, 1])
    found = {}
    for threshold in thresholds:
        # the threshold in float32 too: TVR compares so, and a float32 IoU of 0.7 lies below the double 0.7
        agrees = np.bincount(guess[overlap >= np.float32(threshold)], minlength=len(query)) >= needed
        found[f"{threshold:g}"] = _earliest(query[agrees], position[agrees], len(truths))
    return found


def _earliest(query: NDArray[np.int64], position: NDArray[np.int64], queries: int) -> NDArray[np.float64]:
    first = np.full(queries, np.inf)
    np.minimum.at(first, query, position)
    return first


def evaluate(
    given: Submission,
    truths: Sequence[Truth],
    ks: Sequence[int] = RECALL_AT,
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, dict[str, Any]]:
    """TVR's figures in percent under TVR's own keys: `VCMR`, `SVMR`, `VR` as far as predicted (`0.5-r1`; VR: `r1`), then,
    where every description has a type, the same by type under `VCMR_by_type` .. (`v-0.5-r1`; None for a type that does
    not occur, and `desc_type_ratio`)."""
    found = first_right(given, truths, thresholds)
    everything = np.ones(len(truths), np.bool_)
    tasks = {task: _percentages(firsts, ks, everything) for task, firsts in found.items()}
    types = np.array([truth.type or "" for truth in truths])
    if not len(truths) or (types == "").any():
        return tasks
    ratio = " ".join(f"{kind} {_percent(types == kind)}" for kind in TYPES)
    for task, firsts in found.items():
        by_type: dict[str, Any] = {}
        for kind in TYPES:
            by_type |= {f"{kind}-{key}": share for key, share in _percentages(firsts, ks, types == kind).items()}
        tasks[f"{task}_by_type"] = {**by_type, "desc_type_ratio": ratio}
    return tasks


def hits(
    given: Submission,
    truths: Sequence[Truth],
    ks: Sequence[int] = RECALL_AT,
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, NDArray[np.float64]]:
    """What `evaluate` averages, as `metrics.intervals` and `metrics.paired` take it: by task and key (`VCMR 0.5-r1`), (N,)
    float64, 1 for every description with a right prediction among the first k."""
    return {
        f"{task} {_key(threshold, k)}": (first <= k).astype(np.float64)
        for task, firsts in first_right(given, truths, thresholds).items()
        for threshold, first in firsts.items()
        for k in ks
    }


def _key(threshold: str, k: int) -> str:
    return f"{threshold}-r{k}" if threshold else f"r{k}"


def _percentages(
    firsts: Mapping[str, NDArray[np.float64]], ks: Sequence[int], asked: NDArray[np.bool_]
) -> dict[str, Any]:
    return {
        _key(threshold, k): _percent(first[asked] <= k) if asked.any() else None
        for threshold, first in firsts.items()
        for k in ks
    }


def _percent(hits: NDArray[np.bool_]) -> float:
    return float(np.round(hits.mean() * 100, 2))


def tvr_recall(
    predictions: Mapping[str, Sequence[tuple[str, float, float]]],
    truths: Sequence[Moment],
    ks: Sequence[int] = RECALL_AT,
    thresholds: Sequence[float] = THRESHOLDS,
    union: Literal["hull", "true"] = "hull",
) -> dict[str, float]:
    """TVR's VCMR recall: share of queries with a right moment among the first k predictions.

    `predictions[query_id]` lists (video_id, start, end), best first; only the first 100 count. A prediction is right
    when its video is the true one and its IoU reaches the threshold. TVR's released evaluator divides by the hull of
    both spans; `union="true"` divides by their union. The hull is the union wherever spans overlap, and both scores are
    0 where they do not, so the two can differ by rounding only. Keys are TVR's own, as "0.5-r1"; values are shares.

    Raises ValueError where predictions and truths do not hold the same queries.
    """
    if union not in ("hull", "true"):
        raise ValueError(f"union must be 'hull' or 'true', got {union!r}")
    ids = [moment.query_id for moment in truths]
    if not ids or len(set(ids)) != len(ids) or set(ids) != predictions.keys():
        odd = sorted(set(ids) ^ predictions.keys())[:3]
        raise ValueError(f"{len(predictions)} queries predicted, {len(ids)} annotated; they must be the same: {odd}")
    for moment in truths:
        if moment.video_id is None or moment.start is None or moment.end is None:
            raise ValueError(f"query '{moment.query_id}' has no true moment")
    hits = [
        (i, position, start, end, moment.start, moment.end)
        for i, moment in enumerate(truths)
        for position, (video_id, start, end) in enumerate(predictions[moment.query_id][:PREDICTIONS], start=1)
        if video_id == moment.video_id
    ]
    query, position, *spans = np.array(hits, dtype=np.float64).reshape(-1, 6).T
    overlap = (hull_ious if union == "hull" else ious)(*spans)
    shares: dict[str, float] = {}
    for threshold in thresholds:
        right = overlap >= threshold
        first = _earliest(query[right].astype(np.int64), position[right].astype(np.int64), len(truths))
        shares |= {f"{threshold:g}-r{k}": float((first <= k).mean()) for k in ks}
    return shares
