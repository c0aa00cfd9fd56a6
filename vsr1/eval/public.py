"""The figures that result files of the public VideoSearch-R1 code hold, under their names and by their definitions.

They are there to be set beside published files. Where a definition says something else than its name, the house's own
figures (`vsr1.eval.metrics`) are those to quote; docs/evaluation.md lists the differences. Ranks are the true video's; a
turn's `policy_rank` is the one after its refinement. What no query reached is 0 with N = 0, as in those files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vsr1.eval import metrics
from vsr1.eval.metrics import RECALL_AT, THRESHOLDS, Results
from vsr1.eval.outcomes import MATCHED, NOT_MATCHED, UNPARSABLE, Floats, Outcomes


def result(results: Results, turns: int) -> dict[str, Any]:
    """Of the queries that did not fail: `num_examples`; `original_retrieval`, `final_retrieval`, `final_temporal`; `turns`
    (1, .., `turns`: retrieval of the queries that executed it, temporal with 0 for those that did not);
    `retrieval_policy_by_turn` and `temporal_policy_by_turn` (a stopped query keeps its last turn's values); `verification`
    (`turn1`, `final`; unparsable answers left out); and the counts `answer_counts`, `stop_reason_counts`,
    `matched_by_turn`, `refine`. Raises ValueError as `metrics.per_query` does."""
    table = metrics.measurable(results)
    first, last = table.first[:-1], table.first[1:] - 1
    executed, rows = np.diff(table.first), len(table.rank)
    accepted = table.answer == MATCHED
    overlap = np.where(accepted, table.overlap(), 0.0)
    spoken = accepted & ~np.isnan(table.turn_start) & ~np.isnan(table.turn_end)
    counted = np.where(table.right, overlap, 0.0)
    ranks = metrics.next_rank(table)

    by_turn, rank_policy, time_policy = {}, {}, {}
    for turn in range(1, turns + 1):
        there = executed >= turn
        row = np.minimum(first + turn - 1, rows - 1)
        by_turn[str(turn)] = {
            "retrieval": _ranks(ranks[row[there]]),
            "temporal": _times(np.where(there, counted[row], 0.0)),
        }
        kept = np.minimum(first + turn - 1, last)
        rank_policy[f"policy@{turn}"] = _ranks(ranks[kept])
        time_policy[f"policy@{turn}"] = _times(counted[kept]) | _matched_only(overlap[kept][spoken[kept]])
    return {
        "num_examples": len(table),
        "final_retrieval": _ranks(table.final_rank),
        "original_retrieval": _ranks(table.rank[first]),
        "final_temporal": _times(counted[last]) | _matched_only(overlap[last][spoken[last]]),
        "turns": by_turn,
        "retrieval_policy_by_turn": rank_policy,
        "temporal_policy_by_turn": time_policy,
        "verification": {
            "turn1": _answers(table.answer[first], table.right[first]),
            # the last answer, given before the last refinement, against the ranking after it
            "final": _answers(table.answer[last], table.final_rank == 1),
        },
        **_counts(table, last),
    }


def _ranks(ranks: Floats) -> dict[str, float]:
    shares = {f"R@{k}": float((ranks <= k).mean()) if len(ranks) else 0.0 for k in RECALL_AT}
    if not len(ranks):
        return {"N": 0, **shares, "MRR": 0.0, "mean_rank": 0.0, "median_rank": 0.0}
    means = {"MRR": float((1 / ranks).mean()), "mean_rank": float(ranks.mean()), "median_rank": float(np.median(ranks))}
    return {"N": len(ranks), **shares, **means}


def _times(overlaps: Floats) -> dict[str, float]:
    shares = {f"IoU@{threshold:.1f}@R1": float((overlaps >= threshold).mean()) for threshold in THRESHOLDS}
    return {"N": len(overlaps), "mIoU@R1": float(overlaps.mean()), **shares}


def _matched_only(overlaps: Floats) -> dict[str, float]:
    """Over answers "matched" with a span, whatever video they were given for."""
    mean = float(overlaps.mean()) if len(overlaps) else 0.0
    return {"matched_with_time_count": len(overlaps), "mIoU_matched_only": mean}


def _answers(answer: NDArray[np.int8], right: NDArray[np.bool_]) -> dict[str, float]:
    said = {"match": answer == MATCHED, "not_match": answer == NOT_MATCHED}
    hits = {"match": said["match"] & right, "not_match": said["not_match"] & ~right}
    count = {name: int(one.sum()) for name, one in said.items()}
    known = count["match"] + count["not_match"]
    shares = {f"{name}_acc_pred": int(hits[name].sum()) / count[name] if count[name] else 0.0 for name in said}
    overall = sum(int(one.sum()) for one in hits.values()) / known if known else 0.0
    predicted = {f"pred_{name}ed": count[name] for name in said}
    return {"N": known, "overall_acc": overall, **predicted, **shares}


def _counts(table: Outcomes, last: NDArray[np.int64]) -> dict[str, Any]:
    refined = ~np.isnan(table.soft) | ~np.isnan(table.hard)
    answer = table.answer[last]
    names = {"matched": MATCHED, "not_matched": NOT_MATCHED, "unknown": UNPARSABLE}
    # why the public loop ends without a match, the first of these that holds
    reasons = {
        "matched": table.matched,
        "limit": table.stop == "limit",
        "max_turn_reached_with_refine": refined[last],
        "refine_token_no_update": table.refine[last],
        "not_matched_no_refine_token": answer == NOT_MATCHED,
        "unknown_no_refine_token": answer == UNPARSABLE,
    }
    reason = np.select(list(reasons.values()), list(reasons), default="other")
    accepted = table.number[last][table.matched]
    return {
        "answer_counts": {name: int((answer == code).sum()) for name, code in names.items()},
        "stop_reason_counts": {name: int((reason == name).sum()) for name in reasons if (reason == name).any()},
        "matched_by_turn": {str(turn): int((accepted == turn).sum()) for turn in np.unique(accepted)},
        "refine": {
            "samples_with_refine": int(np.unique(table.query[refined]).size),
            "refine_token_generated_turns": int(table.refine.sum()),
            "refine_applied_turns": int(refined.sum()),
        },
    }
