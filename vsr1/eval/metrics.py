"""From trajectories to figures: retrieval, video corpus moment retrieval (VCMR), verification, and their intervals.

Every metric starts as one number a query (`per_query`), NaN where a query does not enter it; a figure is the mean of
those numbers, weighted by executed turns or refinements where the metric counts these instead of queries. Point values
and bootstrap intervals therefore come from the same arrays. Failed trajectories are left out everywhere and counted in
`summary`. All shares are in [0, 1]; times are seconds.

Definitions follow VideoSearch-R1 (arXiv 2607.00446); `tvr_recall` follows TVR (arXiv 2001.09099).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vsr1.records import Moment, Trajectory, Turn

Span = tuple[float, float]
Floats = NDArray[np.float64]

RECALL_AT = (1, 5, 10, 100)
THRESHOLDS = (0.3, 0.5, 0.7)
TVR_PREDICTIONS = 100
_BOOTSTRAP_CELLS = 1 << 22  # resampled indices held at once: 32 MiB

_WEIGHT_OF = {"ver": "turns", "unparsable": "turns", "text": "turns", "soft": "refinements"}


@dataclass(frozen=True)
class Interval:
    """A figure and its confidence bounds; NaN where nothing entered it."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN: an undefined number becomes null."""
        return {name: None if math.isnan(x) else x for name, x in vars(self).items()}


def iou(a: Span, b: Span) -> float:
    """Intersection over union of two spans in seconds; 0 where one of them is empty or reversed."""
    if a[1] <= a[0] or b[1] <= b[0]:
        return 0.0
    overlap = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return overlap / ((a[1] - a[0]) + (b[1] - b[0]) - overlap)


def per_query(
    trajectories: Sequence[Trajectory], *, thresholds: Sequence[float] = THRESHOLDS, turns: int | None = None
) -> dict[str, Floats]:
    """One number a query and metric, over the trajectories that did not fail, in their order.

    Keys: `before R@k`, `after R@k`, `before MRR`, `after MRR`, `vcmr θ`, `answered θ` (vcmr with the answers fallen back
    on), `ver`, `ver_turn1`, `ver_final`, `unparsable`, `mean_iou`, `text`, `soft`, `hard` (tokens of a refinement in
    words), and the weights `turns` and `refinements`; each value is (N,) float64. `turns` cuts every trajectory after that
    many turns, as if the loop had been that long; the `after` figures, `answered`, `soft` and `hard` are left out then,
    because the queries of a shorter loop were not run.

    Raises ValueError where a trajectory lacks its truth, a rank or any turn, or where none is left.
    """
    if turns is not None and turns < 1:
        raise ValueError(f"turns must be at least 1, got {turns}")
    kept = [t for t in trajectories if t.stop != "failed"]
    if not kept:
        raise ValueError(f"no trajectory to measure: {len(trajectories)} given, all of them failed")
    for trajectory in kept:
        _check(trajectory)
    values: dict[str, Floats] = {}
    stages = {"before": [t.turns[0].rank for t in kept]}
    if turns is None:
        stages["after"] = [t.final_rank for t in kept]
    for stage, ranks_ in stages.items():
        ranks = np.array(ranks_, dtype=np.float64)
        for k in RECALL_AT:
            values[f"{stage} R@{k}"] = (ranks <= k).astype(np.float64)
        values[f"{stage} MRR"] = 1.0 / ranks

    overlaps = np.array([_accepted_iou(t, turns) for t in kept])
    for threshold in thresholds:
        # NaN (nothing accepted, a wrong video, or no span) compares false: these queries count as 0.
        values[f"vcmr {threshold:g}"] = (overlaps >= threshold).astype(np.float64)
    values["mean_iou"] = overlaps

    seen = [[turn for turn in t.turns if turns is None or turn.number <= turns] for t in kept]
    right = [[_answer_is_right(t, turn) for turn in shown] for t, shown in zip(kept, seen, strict=True)]
    values["ver"] = np.array([np.mean(row) for row in right])
    values["ver_turn1"] = np.array([row[0] for row in right], dtype=np.float64)
    values["ver_final"] = np.array([row[-1] for row in right], dtype=np.float64)
    values["unparsable"] = np.array([np.mean([turn.reply.answer is None for turn in shown]) for shown in seen])
    values["text"] = np.array([np.mean([len(turn.token_ids) for turn in shown]) for shown in seen])
    values["turns"] = np.array([len(row) for row in right], dtype=np.float64)
    if turns is None:
        soft = [[len(turn.actions) for turn in t.turns if turn.actions is not None] for t in kept]
        values["soft"] = np.array([np.mean(row) if row else math.nan for row in soft])
        hard = [[len(turn.rewriting) for turn in t.turns if turn.rewriting] for t in kept]
        values["hard"] = np.array([np.mean(row) if row else math.nan for row in hard])
        fallen = np.array([_fallback_iou(t) for t in kept])
        for threshold in thresholds:
            values[f"answered {threshold:g}"] = (np.fmax(overlaps, fallen) >= threshold).astype(np.float64)
        values["refinements"] = np.array([len(row) for row in soft], dtype=np.float64)
    return values


def _check(trajectory: Trajectory) -> None:
    name = f"query '{trajectory.moment.query_id}'"
    if not trajectory.turns:
        raise ValueError(f"{name} has no turn although it stopped with '{trajectory.stop}'")
    if trajectory.moment.video_id is None:
        raise ValueError(f"{name} has no true video: metrics need annotated queries")
    if trajectory.turns[0].rank is None or trajectory.final_rank is None:
        raise ValueError(f"{name} has a true video but no rank: was the rollout run without the truth?")


def _answer_is_right(trajectory: Trajectory, shown: Turn) -> bool:
    return shown.reply.answer == ("matched" if shown.video_id == trajectory.moment.video_id else "not_matched")


def _fallback_iou(trajectory: Trajectory) -> float:
    """As `_accepted_iou`, of the answer that was fallen back on."""
    fallback, moment = trajectory.fallback, trajectory.moment
    if fallback is None or fallback.video_id != moment.video_id or moment.start is None or moment.end is None:
        return math.nan
    reply = fallback.reply
    return (
        0.0 if reply.start is None or reply.end is None else iou((reply.start, reply.end), (moment.start, moment.end))
    )


def refine_gains(trajectories: Sequence[Trajectory]) -> dict[int, tuple[float, int]]:
    """What refining earned at each turn: the mean change of the true video's reciprocal rank from the turn's query to the
    next one, over the trajectories that refined there, and how many these are."""
    gains: dict[int, list[float]] = {}
    for one in trajectories:
        if one.stop == "failed":
            continue
        for turn in one.turns:
            after = next((later.rank for later in one.turns if later.number > turn.number), one.final_rank)
            if turn.actions is not None and turn.rank and after:
                gains.setdefault(turn.number, []).append(1 / after - 1 / turn.rank)
    return {number: (float(np.mean(found)), len(found)) for number, found in sorted(gains.items())}


def _accepted_iou(trajectory: Trajectory, turns: int | None) -> float:
    """IoU of the accepted span if the accepted video is the right one; 0 without a parsed span; NaN otherwise."""
    accepted, moment = trajectory.accepted, trajectory.moment
    if accepted is None or (turns is not None and accepted.number > turns):
        return math.nan
    reply = accepted.reply
    if reply.answer != "matched" or accepted.video_id != moment.video_id:
        return math.nan
    if moment.start is None or moment.end is None:
        raise ValueError(f"query '{moment.query_id}' has a true video but no true span")
    if reply.start is None or reply.end is None:
        return 0.0
    return iou((reply.start, reply.end), (moment.start, moment.end))


def _mean(values: Mapping[str, Floats], name: str) -> float:
    weights = values.get(_WEIGHT_OF.get(name, ""))
    numerator, denominator = _contributions(values[name], weights)
    return float(numerator.sum() / denominator.sum()) if denominator.any() else math.nan


def retrieval(trajectories: Sequence[Trajectory], when: Literal["before", "after"] = "after") -> dict[str, float]:
    """R@1, R@5, R@10, R@100 and MRR of the first query (`before`) or of the last one (`after`)."""
    if when not in ("before", "after"):
        raise ValueError(f"when must be 'before' or 'after', got {when!r}")
    values = per_query(trajectories)
    return {name: _mean(values, f"{when} {name}") for name in (*(f"R@{k}" for k in RECALL_AT), "MRR")}


def vcmr(
    trajectories: Sequence[Trajectory], thresholds: Sequence[float] = THRESHOLDS, turns: int | None = None
) -> dict[str, float]:
    """VCMR at R@1: share of queries whose accepted video is the right one with a span of IoU >= threshold.

    A wrong video accepted, an accept without a span, and a query never accepted count 0. With `turns=t` an accept
    counts only if it came within the first t turns. Keys are the thresholds, as "0.5".
    """
    values = per_query(trajectories, thresholds=thresholds, turns=turns)
    return {f"{threshold:g}": _mean(values, f"vcmr {threshold:g}") for threshold in thresholds}


def verification(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Share of right answers: `ver` over all executed turns, `ver_turn1`, `ver_final`; and the share `unparsable`.

    An answer is right when it is "matched" for the true video and "not_matched" for any other; an answer that could
    not be parsed is wrong and is also counted in `unparsable` (over executed turns).
    """
    values = per_query(trajectories)
    return {name: _mean(values, name) for name in ("ver", "ver_turn1", "ver_final", "unparsable")}


def mean_iou_accepted(trajectories: Sequence[Trajectory]) -> float:
    """Mean IoU where the right video was accepted (0 for an accept without a span); NaN if that never happened."""
    return _mean(per_query(trajectories), "mean_iou")


def tokens(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean `text` tokens a reply and mean `soft` tokens a refinement (NaN where nothing was refined)."""
    values = per_query(trajectories)
    return {name: _mean(values, name) for name in ("text", "soft")}


def _contributions(values: Floats, weights: Floats | None) -> tuple[Floats, Floats]:
    """What each query adds to the numerator and to the denominator of a figure; NaN adds nothing."""
    entered = np.isfinite(values)
    weight = entered.astype(np.float64) if weights is None else np.where(entered, weights, 0.0)
    return np.where(entered, values, 0.0) * weight, weight


def _resampled(arrays: Sequence[Floats], n: int, seed: int) -> list[Floats]:
    """Sums of every array over `n` resamples of the queries with replacement, the same ones for all: n numbers each."""
    size = len(arrays[0])
    generator = np.random.default_rng(seed)
    block = max(1, _BOOTSTRAP_CELLS // max(1, size))
    parts = []
    for first in range(0, n, block):
        chosen = generator.integers(0, size, size=(min(block, n - first), size))
        parts.append([array[chosen].sum(axis=1) for array in arrays])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.full_like(numerator, math.nan), where=denominator > 0)


def _interval(value: float, samples: Floats, level: float) -> Interval:
    samples = samples[np.isfinite(samples)]
    if math.isnan(value) or not len(samples):
        return Interval(math.nan, math.nan, math.nan)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _sums(values: object, weights: object | None) -> tuple[Floats, Floats]:
    """Checked inputs as numerator and denominator (N,) of one figure."""
    array = np.asarray(values, dtype=np.float64)
    weight = None if weights is None else np.asarray(weights, dtype=np.float64)
    if array.ndim != 1 or (weight is not None and weight.shape != array.shape):
        shape = "none" if weight is None else weight.shape
        raise ValueError(f"values and weights must have one shape (N,), one number a query; got {array.shape}, {shape}")
    return _contributions(array, weight)


def bootstrap(
    values: object, n: int = 2000, seed: int = 0, level: float = 0.95, weights: object | None = None
) -> Interval:
    """Mean of values (N,) with its percentile-bootstrap interval over queries; NaN entries do not count.

    `weights` (N,) makes it the ratio of sums, sum(w * v) / sum(w): a figure counted over turns stays honest, because
    whole queries are resampled and never single turns of one.
    """
    top, bottom = _sums(values, weights)
    if not bottom.any():
        return Interval(math.nan, math.nan, math.nan)
    tops, bottoms = _resampled([top, bottom], n, seed)
    return _interval(float(top.sum() / bottom.sum()), _ratio(tops, bottoms), level)


def paired(
    values_a: object,
    values_b: object,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    weights_a: object | None = None,
    weights_b: object | None = None,
) -> Interval:
    """Mean of a minus mean of b, both (N,) over the same queries in the same order, with its bootstrap interval.

    Each resample draws the same queries from both sides, so what makes a query hard for both cancels out.
    """
    top_a, bottom_a = _sums(values_a, weights_a)
    top_b, bottom_b = _sums(values_b, weights_b)
    if len(top_a) != len(top_b):
        raise ValueError(f"paired values must be over the same queries; got {len(top_a)} and {len(top_b)}")
    if not (bottom_a.any() and bottom_b.any()):
        return Interval(math.nan, math.nan, math.nan)
    value = float(top_a.sum() / bottom_a.sum() - top_b.sum() / bottom_b.sum())
    tops_a, bottoms_a, tops_b, bottoms_b = _resampled([top_a, bottom_a, top_b, bottom_b], n, seed)
    return _interval(value, _ratio(tops_a, bottoms_a) - _ratio(tops_b, bottoms_b), level)


def intervals(values: Mapping[str, Floats], n: int = 2000, seed: int = 0, level: float = 0.95) -> dict[str, Interval]:
    """An interval for every metric of a `per_query` result (its weights left out)."""
    return {
        name: bootstrap(array, n, seed, level, weights=values.get(_WEIGHT_OF.get(name, "")))
        for name, array in values.items()
        if name not in _WEIGHT_OF.values()
    }


def summary(trajectories: Sequence[Trajectory], turns: int = 3, n: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Everything one list of trajectories tells, with intervals, in the shape of one stage of `eval.json`.

    `turns` is the length of the loop that was run; `by_turns` cuts the trajectories after 1, .., `turns` turns.
    """
    found = {name: interval.as_dict() for name, interval in intervals(per_query(trajectories), n, seed).items()}
    keys = [f"{threshold:g}" for threshold in THRESHOLDS]
    by_turns = []
    for t in range(1, turns + 1):
        cut = per_query(trajectories, turns=t)
        by_turns.append({"turns": t, "vcmr": {key: bootstrap(cut[f"vcmr {key}"], n, seed).as_dict() for key in keys}})
    ranks = [*(f"R@{k}" for k in RECALL_AT), "MRR"]
    return {
        "queries": len(trajectories),
        "failed": sum(t.stop == "failed" for t in trajectories),
        "before": {name: found[f"before {name}"] for name in ranks},
        "after": {name: found[f"after {name}"] for name in ranks},
        "vcmr": {key: found[f"vcmr {key}"] for key in keys},
        "vcmr_one_turn": by_turns[0]["vcmr"],
        **{name: found[name] for name in ("ver", "ver_turn1", "ver_final", "unparsable", "mean_iou")},
        "answered": {key: found[f"answered {key}"] for key in keys},
        "tokens": {name: found[name] for name in ("text", "soft", "hard")},
        "refine_gain": [
            {"turn": turn, "mrr": gain, "refined": count} for turn, (gain, count) in refine_gains(trajectories).items()
        ],
        "by_turns": by_turns,
    }


def difference(
    first: Sequence[Trajectory], second: Sequence[Trajectory], n: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """`second` minus `first` for every metric, over the queries that failed in neither (paired bootstrap).

    Both hold the same queries, in any order. Raises ValueError naming queries that only one of them holds.
    """
    sides = [{t.moment.query_id: t for t in side} for side in (first, second)]
    for side, by_id in zip((first, second), sides, strict=True):
        if len(by_id) != len(side):
            raise ValueError(f"a query appears twice: {len(side)} trajectories, {len(by_id)} query ids")
    lonely = sorted(sides[0].keys() ^ sides[1].keys())
    if lonely:
        raise ValueError(f"{len(lonely)} queries are in one run only, such as {lonely[:3]}: were both on one split?")
    both = [q for q in sides[0] if all(side[q].stop != "failed" for side in sides)]
    old, new = (per_query([side[q] for q in both]) for side in sides)
    found = {}
    for name in old:
        if name not in _WEIGHT_OF.values():
            weights = [values.get(_WEIGHT_OF.get(name, "")) for values in (new, old)]
            found[name] = paired(new[name], old[name], n, seed, weights_a=weights[0], weights_b=weights[1])
    return found


def tvr_recall(
    predictions: Mapping[str, Sequence[tuple[str, float, float]]],
    truths: Sequence[Moment],
    ks: Sequence[int] = RECALL_AT,
    thresholds: Sequence[float] = (0.5, 0.7),
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
    overlap = _hull_iou if union == "hull" else iou
    ids = [moment.query_id for moment in truths]
    if not ids or len(set(ids)) != len(ids) or set(ids) != predictions.keys():
        odd = sorted(set(ids) ^ predictions.keys())[:3]
        raise ValueError(f"{len(predictions)} queries predicted, {len(ids)} annotated; they must be the same: {odd}")
    # first[i, j]: position of the first right prediction of query i at threshold j, infinite if there is none
    first = np.full((len(truths), len(thresholds)), np.inf)
    for i, moment in enumerate(truths):
        if moment.video_id is None or moment.start is None or moment.end is None:
            raise ValueError(f"query '{moment.query_id}' has no true moment")
        for position, (video_id, start, end) in enumerate(predictions[moment.query_id][:TVR_PREDICTIONS], start=1):
            score = overlap((start, end), (moment.start, moment.end)) if video_id == moment.video_id else -1.0
            for j, threshold in enumerate(thresholds):
                if score >= threshold:
                    first[i, j] = min(first[i, j], position)
    return {
        f"{threshold:g}-r{k}": float((first[:, j] <= k).mean()) for j, threshold in enumerate(thresholds) for k in ks
    }


def _hull_iou(a: Span, b: Span) -> float:
    overlap = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    hull = max(a[1], b[1]) - min(a[0], b[0])
    return overlap / hull if hull != 0 else 0.0
