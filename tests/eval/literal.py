"""The definitions of the public VideoSearch-R1 evaluation, written down one row and one turn at a time.

It works on rows of the public per-query file, as plain dicts, and knows nothing of `vsr1`. Nothing here is meant to be fast.
"""

from __future__ import annotations

from statistics import median
from typing import Any

Row = dict[str, Any]
THRESHOLDS = (0.3, 0.5, 0.7)
RECALL_AT = (1, 5, 10, 100)


def iou(start: Any, end: Any, true_start: float, true_end: float) -> float:
    if start is None or end is None or end <= start or true_end <= true_start:
        return 0.0
    inside = min(end, true_end) - max(start, true_start)
    return inside / (max(end, true_end) - min(start, true_start)) if inside > 0 else 0.0


def overlap(row: Row, turn: Row) -> float:
    """IoU of a turn whose answer is "matched"; whether its video is the right one does not matter here."""
    if turn["answer"] != "matched":
        return 0.0
    return iou(turn["pred_start"], turn["pred_end"], row["gt_start"], row["gt_end"])


def counted(row: Row, turn: Row) -> float:
    """The overlap, if the video shown first is the right one."""
    return overlap(row, turn) if turn["top1_doc_id"] == row["gt_pos_doc_id"] else 0.0


def rank_after(row: Row, place: int) -> int:
    """The true video's rank once turn `place` has refined."""
    turns = row["turns"]
    return turns[place + 1]["rank"] if place + 1 < len(turns) else row["final_rank"]


def retrieval(ranks: list[int]) -> Row:
    found: Row = {"N": len(ranks)}
    for k in RECALL_AT:
        found[f"R@{k}"] = sum(rank <= k for rank in ranks) / len(ranks) if ranks else 0.0
    found["MRR"] = sum(1 / rank for rank in ranks) / len(ranks) if ranks else 0.0
    found["mean_rank"] = sum(ranks) / len(ranks) if ranks else 0.0
    found["median_rank"] = median(ranks) if ranks else 0.0
    return found


def temporal(overlaps: list[float]) -> Row:
    found: Row = {"N": len(overlaps), "mIoU@R1": sum(overlaps) / len(overlaps)}
    for threshold in THRESHOLDS:
        found[f"IoU@{threshold}@R1"] = sum(one >= threshold for one in overlaps) / len(overlaps)
    return found


def matched_only(pairs: list[tuple[Row, Row]]) -> Row:
    values = [
        overlap(row, turn)
        for row, turn in pairs
        if turn["answer"] == "matched" and turn["pred_start"] is not None and turn["pred_end"] is not None
    ]
    return {"matched_with_time_count": len(values), "mIoU_matched_only": sum(values) / len(values) if values else 0.0}


def accuracy(pairs: list[tuple[str, bool]]) -> Row:
    """Answers against whether the video is the right one; what is neither "matched" nor "not_matched" is dropped."""
    known = [(answer, right) for answer, right in pairs if answer in ("matched", "not_matched")]
    matched = [right for answer, right in known if answer == "matched"]
    rejected = [not right for answer, right in known if answer == "not_matched"]
    return {
        "N": len(known),
        "overall_acc": (sum(matched) + sum(rejected)) / len(known) if known else 0.0,
        "pred_matched": len(matched),
        "pred_not_matched": len(rejected),
        "match_acc_pred": sum(matched) / len(matched) if matched else 0.0,
        "not_match_acc_pred": sum(rejected) / len(rejected) if rejected else 0.0,
    }


def result(rows: list[Row], most: int) -> Row:
    """All figures of the public result files, of rows that have turns."""
    turns, rank_policy, time_policy = {}, {}, {}
    for t in range(1, most + 1):
        strict_ranks, strict_overlaps, ranks, overlaps, kept = [], [], [], [], []
        for row in rows:
            if len(row["turns"]) >= t:
                strict_ranks.append(rank_after(row, t - 1))
                strict_overlaps.append(counted(row, row["turns"][t - 1]))
            else:
                strict_overlaps.append(0.0)
            place = min(t, len(row["turns"])) - 1
            ranks.append(rank_after(row, place))
            overlaps.append(counted(row, row["turns"][place]))
            kept.append((row, row["turns"][place]))
        turns[str(t)] = {"retrieval": retrieval(strict_ranks), "temporal": temporal(strict_overlaps)}
        rank_policy[f"policy@{t}"] = retrieval(ranks)
        time_policy[f"policy@{t}"] = {**temporal(overlaps), **matched_only(kept)}
    last = [(row, row["turns"][-1]) for row in rows]
    answers = [turn["answer"] for _, turn in last]
    reasons = [row["stop_reason"] for row in rows]
    matched = [row["matched_turn"] for row in rows if row["matched_turn"]]
    return {
        "num_examples": len(rows),
        "final_retrieval": retrieval([row["final_rank"] for row in rows]),
        "original_retrieval": retrieval([row["orig_rank"] for row in rows]),
        "final_temporal": {**temporal([counted(row, turn) for row, turn in last]), **matched_only(last)},
        "turns": turns,
        "retrieval_policy_by_turn": rank_policy,
        "temporal_policy_by_turn": time_policy,
        "verification": {
            "turn1": accuracy([(row["turn1_answer"], row["turn1_top1_is_gt"]) for row in rows]),
            "final": accuracy([(row["final_answer"], row["final_top1_is_gt"]) for row in rows]),
        },
        "answer_counts": {name: answers.count(name) for name in ("matched", "not_matched", "unknown")},
        "stop_reason_counts": {name: reasons.count(name) for name in reasons},
        "matched_by_turn": {str(turn): matched.count(turn) for turn in matched},
        "refine": {
            "samples_with_refine": sum(row["used_refine_any"] for row in rows),
            "refine_token_generated_turns": sum(row["refine_token_generated_turns"] for row in rows),
            "refine_applied_turns": sum(row["refine_applied_turns"] for row in rows),
        },
    }


def moment_found(row: Row, threshold: float) -> bool:
    """A right video accepted with a right span, and no wrong one accepted before."""
    for turn in row["turns"]:
        if turn["answer"] == "matched":
            return turn["top1_doc_id"] == row["gt_pos_doc_id"] and overlap(row, turn) >= threshold
    return False


def answers_right(row: Row) -> list[bool]:
    """Of every executed turn: "matched" for the right video and "not_matched" for any other; anything else is wrong."""
    return [
        turn["answer"] == ("matched" if turn["top1_doc_id"] == row["gt_pos_doc_id"] else "not_matched")
        for turn in row["turns"]
    ]
