"""From what became of queries to figures: retrieval, video corpus moment retrieval (VCMR), verification, intervals.

Every metric starts as one number a query (`per_query`), NaN where a query does not enter it; a figure is the mean of
those numbers, weighted by executed turns or refinements where the metric counts these instead of queries. Point values
and bootstrap intervals therefore come from the same arrays. Failed trajectories are left out everywhere and counted in
`summary`. All shares are in [0, 1]; times are seconds.

`Results` are trajectories, or the table of them that `vsr1.eval.outcomes` makes and `vsr1.eval.exchange` reads from files.
Definitions follow VideoSearch-R1 (arXiv 2607.00446); `tvr_recall` follows TVR (arXiv 2001.09099).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vsr1.eval import outcomes, resampling
from vsr1.eval.outcomes import MATCHED, UNPARSABLE, Floats, Outcomes
from vsr1.eval.spans import iou as iou
from vsr1.eval.tvr import RECALL_AT as RECALL_AT
from vsr1.eval.tvr import tvr_recall as tvr_recall
from vsr1.records import Trajectory

Results = Sequence[Trajectory] | Outcomes
Side = tuple[Floats, Floats]  # what each query adds to a figure's numerator and to its denominator

THRESHOLDS = (0.3, 0.5, 0.7)
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


def per_query(
    trajectories: Results, *, thresholds: Sequence[float] = THRESHOLDS, turns: int | None = None
) -> dict[str, Floats]:
    """One number a query and metric, over the trajectories that did not fail, in their order.

    Keys: `before R@k`, `after R@k`, `before MRR`, `after MRR`, `vcmr θ`, `answered θ` (vcmr with the answers fallen back
    on), `ver`, `ver_turn1`, `ver_final`, `unparsable`, `mean_iou`, `text`, `soft`, `hard` (tokens of a refinement in
    words), and the weights `turns` and `refinements`; each value is (N,) float64. `turns` cuts every trajectory after that
    many turns, as if the loop had been that long (`outcomes.cut`); `answered` is left out then, because a shorter loop was
    not asked for the answers it would have fallen back on.

    Raises ValueError where a trajectory lacks its truth, a rank or any turn, or where none is left.
    """
    if turns is not None and turns < 1:
        raise ValueError(f"turns must be at least 1, got {turns}")
    kept = measurable(trajectories)
    if turns is not None:
        kept = outcomes.cut(kept, turns)
    values = _per_query(kept, thresholds)
    if turns is not None:
        for threshold in thresholds:
            del values[f"answered {threshold:g}"]
    return values


def _per_query(kept: Outcomes, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Floats]:
    first = kept.first[:-1]
    values: dict[str, Floats] = {}
    for stage, ranks in {"before": kept.rank[first], "after": kept.final_rank}.items():
        for k in RECALL_AT:
            values[f"{stage} R@{k}"] = (ranks <= k).astype(np.float64)
        values[f"{stage} MRR"] = 1.0 / ranks

    overlaps = _accepted_iou(kept)
    for threshold in thresholds:
        # NaN (nothing accepted, a wrong video, or no span) compares false: these queries count as 0.
        values[f"vcmr {threshold:g}"] = (overlaps >= threshold).astype(np.float64)
    values["mean_iou"] = overlaps

    executed, right = _executed(kept), _right(kept)
    values["ver"] = _totals(kept, right) / executed
    values["ver_turn1"] = right[first].astype(np.float64)
    values["ver_final"] = right[kept.first[1:] - 1].astype(np.float64)
    values["unparsable"] = _totals(kept, kept.answer == UNPARSABLE) / executed
    values["text"] = _totals(kept, kept.text) / executed
    values["turns"] = executed
    refinements = _totals(kept, ~np.isnan(kept.soft))
    values["soft"] = _ratio(_totals(kept, np.nan_to_num(kept.soft)), refinements)
    rewritings = _totals(kept, ~np.isnan(kept.hard))
    values["hard"] = _ratio(_totals(kept, np.nan_to_num(kept.hard)), rewritings)
    for threshold in thresholds:
        values[f"answered {threshold:g}"] = (np.fmax(overlaps, kept.fallback) >= threshold).astype(np.float64)
    values["refinements"] = refinements
    return values


def _executed(kept: Outcomes) -> Floats:
    """How many turns each query took."""
    return np.diff(kept.first).astype(np.float64)


def _right(kept: Outcomes) -> Any:
    """Whether each turn's answer is right."""
    return kept.answer == kept.right  # 1 for "matched" and 0 for "not_matched" are what `right` should be


def measurable(results: Results) -> Outcomes:
    """The queries that metrics are over: those that did not fail. Raises ValueError as `per_query` does."""
    given = outcomes.of(results)
    kept = given.take(np.flatnonzero(~given.failed))
    if not len(kept):
        raise ValueError(f"no trajectory to measure: {len(given)} given, all of them failed")
    empty = np.diff(kept.first) == 0
    untrue = kept.video_ids == None  # noqa: E711
    # a query without turns has no first row; whatever stands there is not asked
    before = np.append(kept.rank, np.nan)[kept.first[:-1]]
    unranked = np.isnan(before) | np.isnan(kept.final_rank)
    for i in np.flatnonzero(empty | untrue | unranked)[:1]:
        name = f"query '{kept.query_ids[i]}'"
        if empty[i]:
            raise ValueError(f"{name} has no turn although it stopped with '{kept.stop[i]}'")
        if untrue[i]:
            raise ValueError(f"{name} has no true video: metrics need annotated queries")
        raise ValueError(f"{name} has a true video but no rank: was the rollout run without the truth?")
    return kept


def _totals(table: Outcomes, column: Any) -> Floats:
    """Sums (N,) of a column (M,) over the turns of each query."""
    return np.bincount(table.query, weights=column, minlength=len(table)).astype(np.float64, copy=False)


def refine_gains(trajectories: Results) -> dict[int, tuple[float, int]]:
    """What refining earned at each turn: the mean change of the true video's reciprocal rank from the turn's query to the
    next one, over the trajectories that refined there, and how many these are."""
    given = outcomes.of(trajectories)
    kept = given.take(np.flatnonzero(~given.failed))
    after = next_rank(kept)
    refined = ~np.isnan(kept.soft) & ~np.isnan(kept.rank) & ~np.isnan(after)
    gains = {}
    for number in np.unique(kept.number[refined]):
        here = refined & (kept.number == number)
        gains[int(number)] = (float(np.mean(1 / after[here] - 1 / kept.rank[here])), int(here.sum()))
    return gains


def next_rank(table: Outcomes) -> Floats:
    """(M,) float64: the true video's rank under the query that followed each turn, the final one's behind the last."""
    query = table.query
    # rows of one query and one number are one turn of the loop; the next of them begins where either changes
    begins = np.flatnonzero(np.append(True, (np.diff(query) != 0) | (np.diff(table.number) != 0)))
    following = np.append(begins, len(query))[np.searchsorted(begins, np.arange(len(query)), side="right")]
    goes_on = following < table.first[query + 1]
    return np.where(goes_on, np.append(table.rank, np.nan)[following], table.final_rank[query])


def _accepted_iou(table: Outcomes) -> Floats:
    """IoU of the accepted span if the accepted video is the right one; 0 without a parsed span; NaN otherwise."""
    last = table.first[1:] - 1
    right = table.matched & (table.answer[last] == MATCHED) & table.right[last]
    for i in np.flatnonzero(right & (np.isnan(table.start) | np.isnan(table.end)))[:1]:
        raise ValueError(f"query '{table.query_ids[i]}' has a true video but no true span")
    return np.where(right, table.overlap()[last], math.nan)


def _mean(values: Mapping[str, Floats], name: str) -> float:
    weights = values.get(_WEIGHT_OF.get(name, ""))
    numerator, denominator = _contributions(values[name], weights)
    return float(numerator.sum() / denominator.sum()) if denominator.any() else math.nan


def retrieval(trajectories: Results, when: Literal["before", "after"] = "after") -> dict[str, float]:
    """R@1, R@5, R@10, R@100 and MRR of the first query (`before`) or of the last one (`after`)."""
    if when not in ("before", "after"):
        raise ValueError(f"when must be 'before' or 'after', got {when!r}")
    values = per_query(trajectories)
    return {name: _mean(values, f"{when} {name}") for name in (*(f"R@{k}" for k in RECALL_AT), "MRR")}


def vcmr(trajectories: Results, thresholds: Sequence[float] = THRESHOLDS, turns: int | None = None) -> dict[str, float]:
    """VCMR at R@1: share of queries whose accepted video is the right one with a span of IoU >= threshold.

    A wrong video accepted, an accept without a span, and a query never accepted count 0. With `turns=t` an accept
    counts only if it came within the first t turns. Keys are the thresholds, as "0.5".
    """
    values = per_query(trajectories, thresholds=thresholds, turns=turns)
    return {f"{threshold:g}": _mean(values, f"vcmr {threshold:g}") for threshold in thresholds}


def verification(trajectories: Results) -> dict[str, float]:
    """Share of right answers: `ver` over all executed turns, `ver_turn1`, `ver_final`; and the share `unparsable`.

    An answer is right when it is "matched" for the true video and "not_matched" for any other; an answer that could
    not be parsed is wrong and is also counted in `unparsable` (over executed turns).
    """
    values = per_query(trajectories)
    return {name: _mean(values, name) for name in ("ver", "ver_turn1", "ver_final", "unparsable")}


def mean_iou_accepted(trajectories: Results) -> float:
    """Mean IoU where the right video was accepted (0 for an accept without a span); NaN if that never happened."""
    return _mean(per_query(trajectories), "mean_iou")


def tokens(trajectories: Results) -> dict[str, float]:
    """Mean `text` tokens a reply and mean `soft` tokens a refinement (NaN where nothing was refined)."""
    values = per_query(trajectories)
    return {name: _mean(values, name) for name in ("text", "soft")}


def _contributions(values: Floats, weights: Floats | None) -> Side:
    """What each query adds to the numerator and to the denominator of a figure; NaN adds nothing."""
    entered = np.isfinite(values)
    weight = entered.astype(np.float64) if weights is None else np.where(entered, weights, 0.0)
    return np.where(entered, values, 0.0) * weight, weight


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.full_like(numerator, math.nan), where=denominator > 0)


def _intervals(sides: Mapping[str, Sequence[Side]], n: int, seed: int, level: float) -> dict[str, Interval]:
    """The interval of each figure: the ratio of its one side's sums, or that of its first side minus that of its second."""
    defined = {name: figure for name, figure in sides.items() if all(bottom.any() for _, bottom in figure)}
    columns = [[column for side in figure for column in side] for figure in defined.values()]
    found = {name: Interval(math.nan, math.nan, math.nan) for name in sides}
    for name, sums in zip(defined, resampling.sums(columns, n, seed, _BOOTSTRAP_CELLS), strict=True):
        values = [float(top.sum() / bottom.sum()) for top, bottom in defined[name]]
        samples = [_ratio(top, bottom) for top, bottom in zip(sums[::2], sums[1::2], strict=True)]
        value, drawn = (values[0], samples[0]) if len(values) == 1 else (values[0] - values[1], samples[0] - samples[1])
        drawn = drawn[np.isfinite(drawn)]
        if len(drawn):
            low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
            found[name] = Interval(value, float(low), float(high))
    return found


def _side(values: object, weights: object | None) -> Side:
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
    return _intervals({"": [_side(values, weights)]}, n, seed, level)[""]


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
    sides = _side(values_a, weights_a), _side(values_b, weights_b)
    if len(sides[0][0]) != len(sides[1][0]):
        raise ValueError(f"paired values must be over the same queries; got {len(sides[0][0])} and {len(sides[1][0])}")
    return _intervals({"": sides}, n, seed, level)[""]


def intervals(values: Mapping[str, Floats], n: int = 2000, seed: int = 0, level: float = 0.95) -> dict[str, Interval]:
    """An interval for every metric of a `per_query` result (its weights left out)."""
    return _intervals({name: [side] for name, side in _sides(values).items()}, n, seed, level)


def _sides(values: Mapping[str, Floats]) -> dict[str, Side]:
    weights = set(_WEIGHT_OF.values())
    return {
        name: _side(array, values.get(_WEIGHT_OF.get(name, "")))
        for name, array in values.items()
        if name not in weights
    }


def summary(trajectories: Results, turns: int = 3, n: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Everything one list of trajectories tells, with intervals, in the shape of one stage of `eval.json`.

    `turns` is the length of the loop that was run; `by_turns` cuts the trajectories after 1, .., `turns` turns.
    """
    table = outcomes.of(trajectories)
    kept = measurable(table)
    found = {name: interval.as_dict() for name, interval in intervals(_per_query(kept), n, seed).items()}
    keys = [f"{threshold:g}" for threshold in THRESHOLDS]
    by_turns = [turn_figures(t, _after_turns(kept, t), n, seed) for t in range(1, turns + 1)]
    ranks = [*(f"R@{k}" for k in RECALL_AT), "MRR"]
    return {
        "queries": len(table),
        "failed": int(table.failed.sum()),
        "before": {name: found[f"before {name}"] for name in ranks},
        "after": {name: found[f"after {name}"] for name in ranks},
        "vcmr": {key: found[f"vcmr {key}"] for key in keys},
        "vcmr_one_turn": by_turns[0]["vcmr"],
        **{name: found[name] for name in ("ver", "ver_turn1", "ver_final", "unparsable", "mean_iou")},
        "answered": {key: found[f"answered {key}"] for key in keys},
        "tokens": {name: found[name] for name in ("text", "soft", "hard")},
        "refine_gain": [
            {"turn": turn, "mrr": gain, "refined": count} for turn, (gain, count) in refine_gains(table).items()
        ],
        "by_turns": by_turns,
    }


def after_turns(given: Outcomes, turns: int) -> dict[str, Floats]:
    """What the loop has reached after that many turns, one number a query that did not fail: `R@1` and `vcmr θ` there, `ver`
    with its weight `turns`, and `answered`, whether a video was accepted by then."""
    return _after_turns(measurable(given), turns)


def _after_turns(kept: Outcomes, turns: int) -> dict[str, Floats]:
    cut = outcomes.cut(kept, turns)
    executed, right, overlaps = _executed(cut), _right(cut), _accepted_iou(cut)
    return {
        "R@1": (cut.final_rank <= 1).astype(np.float64),
        "answered": cut.matched.astype(np.float64),
        "ver": _totals(cut, right) / executed,
        "turns": executed,
        **{f"vcmr {at:g}": (overlaps >= at).astype(np.float64) for at in THRESHOLDS},
    }


def turn_figures(turns: int, values: Mapping[str, Floats], n: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The figures of `after_turns`, in the shape of an entry of `by_turns` in `eval.json`."""
    shares = {name: one.as_dict() for name, one in intervals(values, n, seed).items()}
    vcmr = {f"{at:g}": shares.pop(f"vcmr {at:g}") for at in THRESHOLDS}
    return {"turns": turns, "vcmr": vcmr, **shares}


def difference(first: Results, second: Results, n: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """`second` minus `first` for every metric, over the queries that failed in neither (paired bootstrap).

    Both hold the same queries, in any order. Raises ValueError naming queries that only one of them holds, or one whose
    truth is another in the second.
    """
    old, new = (outcomes.of(side) for side in (first, second))
    for side in (old, new):
        if len(set(side.query_ids)) != len(side):
            raise ValueError(f"a query appears twice: {len(side)} trajectories, {len(set(side.query_ids))} query ids")
    lonely = sorted(set(old.query_ids) ^ set(new.query_ids))
    if lonely:
        raise ValueError(f"{len(lonely)} queries are in one run only, such as {lonely[:3]}: were both on one split?")
    was, now = (_sides(per_query(side)) for side in outcomes.shared(old, new))
    return _intervals({name: (now[name], was[name]) for name in was}, n, seed, 0.95)
