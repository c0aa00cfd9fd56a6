"""Results on disk, one query a line: our own records, and the field names of the public VideoSearch-R1 code.

`as_json` is a trajectory as `trajectories.jsonl` of a run holds it; `public_row` is the same record in the public names, for
programs that read those; `read` takes files of either kind, or a run folder, back to the table that metrics are computed
from. What a field means stands in docs/evaluation.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vsr1.errors import Vsr1Error
from vsr1.eval import outcomes
from vsr1.eval.outcomes import ANSWERS, MATCHED, Fallback, Outcomes, Query, Shown
from vsr1.eval.spans import iou
from vsr1.files import write_whole
from vsr1.records import Stop, Trajectory

Json = dict[str, Any]

_STOPS: tuple[Stop, ...] = ("matched", "turns", "limit", "failed")
_PUBLIC_ANSWERS = {"matched": "matched", "not_matched": "not_matched"}  # anything else, as "unknown", is unparsable
_SAME = 1e-6  # a stored IoU further than this from that of its spans was computed from something else


@dataclass(frozen=True)
class Found:
    """What a file of results holds. `turns`: length of the loop, as far as the file shows; `public`: which names it is in;
    `repeated`: lines that a later line with the same `index` replaced, as in a merged public file."""

    outcomes: Outcomes
    turns: int
    public: bool
    repeated: int = 0


def as_json(one: Trajectory) -> Json:
    """A trajectory as the report and other programs read it: no tensors, times in seconds."""
    moment = one.moment
    return {
        "query_id": moment.query_id,
        "text": moment.text,
        "video_id": moment.video_id,
        "start": moment.start,
        "end": moment.end,
        "duration": moment.duration,
        "stop": one.stop,
        "failure": one.failure,
        "first_rank": one.turns[0].rank if one.turns else None,
        "final_rank": one.final_rank,
        "fallback": None
        if one.fallback is None
        else {
            "video_id": one.fallback.video_id,
            "start": one.fallback.reply.start,
            "end": one.fallback.reply.end,
        },
        "turns": [
            {
                "number": turn.number,
                "video_id": turn.video_id,
                "score": turn.score,
                "rank": turn.rank,
                "answer": turn.reply.answer,
                "probability": turn.probability,
                "start": turn.reply.start,
                "end": turn.reply.end,
                "refine": turn.reply.refine,
                "text_tokens": len(turn.token_ids),
                "soft_tokens": None if turn.actions is None else turn.actions.shape[0],
                "hard_tokens": len(turn.rewriting) or None,
                "text": turn.text,
            }
            for turn in one.turns
        ],
    }


def write_public(path: Path, records: Iterable[Json], turns: int) -> None:
    """Write records, as `as_json` makes them, in the public names; `turns` is the length of the loop that was run.

    The file appears whole or not at all. Raises ValueError for a query without a true video or ranks.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            for index, record in enumerate(records):
                file.write(json.dumps(public_row(record, index, turns), ensure_ascii=False) + "\n")
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def public_row(record: Mapping[str, Any], index: int, turns: int) -> Json:
    """One record of `as_json` in the public names, row `index` of its file. See docs/evaluation.md for what has no
    equal there: a failed query has no turns and a `failure`; a fall-back answer stands in fields of its own."""
    if record["video_id"] is None:
        raise ValueError(f"query '{record['query_id']}' has no true video: the public fields need annotated queries")
    taken = _public_turns(record)
    row: Json = {
        "index": index,
        "qid": record["query_id"],
        "query": record["text"],
        "gt_pos_doc_id": record["video_id"],
        "gt_start": record["start"],
        "gt_end": record["end"],
        "orig_rank": record["first_rank"],
    }
    if taken:
        first, last = taken[0], taken[-1]
        row["turn1_rank"] = first["policy_rank"]
        names = (
            "rank_before_refine",
            "top1_doc_id",
            "top1_is_gt",
            "policy_top1_doc_id",
            "policy_top1_is_gt",
            *_VERDICT,
        )
        row |= {f"turn1_{name}": first[name] for name in names}
        row["final_rank"] = record["final_rank"]
        row["final_top1_doc_id"], row["final_top1_is_gt"] = last["policy_top1_doc_id"], last["policy_top1_is_gt"]
        row |= {f"final_{name}": last[name] for name in _VERDICT}
    else:
        row["final_rank"] = record["final_rank"]
    matched = record["stop"] == "matched"
    return row | {
        "matched_turn": taken[-1]["turn"] if matched else 0,
        "stop_turn": len(taken),
        "stop_reason": record["stop"] if record["stop"] != "turns" or not taken else _stop_reason(taken[-1]),
        "used_refine_any": any(turn["refine_applied"] for turn in taken),
        "refine_token_generated_turns": sum(turn["refine_token_generated"] for turn in taken),
        "refine_applied_turns": sum(turn["refine_applied"] for turn in taken),
        "max_turn": turns,
        "failure": record["failure"],
        "fallback": record["fallback"],
        "turns": taken,
    }


_VERDICT = "answer", "time_parse_ok", "pred_start", "pred_end", "iou_raw", "iou_r1"


def _stop_reason(last: Json) -> str:
    """Why the public loop ends without a match."""
    if last["refine_applied"]:
        return "max_turn_reached_with_refine"
    if last["refine_token_generated"]:
        return "refine_token_no_update"
    return f"{last['answer']}_no_refine_token"


def _public_turns(record: Mapping[str, Any]) -> list[Json]:
    turns, truth = record["turns"], record["video_id"]
    taken = []
    for place, turn in enumerate(turns, 1):
        later = next((other for other in turns[place:] if other["number"] > turn["number"]), None)
        rank = later["rank"] if later else record["final_rank"]
        if turn["rank"] is None or rank is None:
            raise ValueError(f"query '{record['query_id']}' has no rank: the public fields need annotated queries")
        parsed = turn["start"] is not None and turn["end"] is not None
        right, overlap = turn["video_id"] == truth, 0.0
        if turn["answer"] == "matched" and parsed and record["start"] is not None and record["end"] is not None:
            overlap = iou((turn["start"], turn["end"]), (record["start"], record["end"]))
        taken.append(
            {
                "turn": turn["number"],
                "rank": turn["rank"],
                "rank_before_refine": turn["rank"],
                "policy_rank": rank,
                "top1_doc_id": turn["video_id"],
                "top1_is_gt": right,
                # a search that excludes rejected videos shows the best of the others next
                "policy_top1_doc_id": truth if rank == 1 else later["video_id"] if later else None,
                "policy_top1_is_gt": rank == 1,
                "answer": turn["answer"] or "unknown",
                "time_parse_ok": parsed,
                "pred_start": turn["start"],
                "pred_end": turn["end"],
                "iou_raw": overlap,
                "iou_r1": overlap if right else 0.0,
                "refine_token_generated": turn["refine"] and turn["answer"] != "matched",
                "refine_applied": turn["soft_tokens"] is not None or turn["hard_tokens"] is not None,
                "rollout_depth_actual": turn["soft_tokens"] or 0,
                "raw_output": turn["text"],
                "text_tokens": turn["text_tokens"],
                "soft_tokens": turn["soft_tokens"],
                "hard_tokens": turn["hard_tokens"],
                "score": turn["score"],
                "probability": turn["probability"],
            }
        )
    return taken


def write_results(folder: Path, trajectories: Sequence[Trajectory], result: Json) -> None:
    """What an evaluation leaves in a folder: `trajectories.jsonl`, then `eval.json`, whose presence says that it is done."""
    write_whole(folder / "trajectories.jsonl", "".join(json.dumps(as_json(one)) + "\n" for one in trajectories))
    write_whole(folder / "eval.json", json.dumps(result, indent=1))


def read(path: Path) -> Found:
    """The results in a run folder, or in a file of our own or of public lines.

    Raises Vsr1Error naming the file, the line and the field. A query is named by its id; where lines of a public file share
    a `qid` (two annotations with one text do), each is named `qid#index`.
    """
    if path.is_dir():
        path = path / "trajectories.jsonl"
        if not path.is_file():
            raise Vsr1Error(f"run folder '{path.parent}' has no {path.name}: evaluate the run first")
    queries: dict[object, Query] = {}
    numbers: dict[object, int] = {}
    public, turns, repeated = False, 1, 0
    for number, row in lines(path):
        if not queries:
            if "video2idx" in row:
                raise Vsr1Error(f"'{path}' is a TVR prediction file: it needs its annotations (vsr1 eval --truth)")
            public = "query_id" not in row
        try:
            query = (_public_query if public else _query)(row)
            index = row.get("index") if public else None
            limit = int(row.get("max_turn") or 1) if public else 1
        except KeyError as error:
            raise Vsr1Error(f"'{path}' line {number} has no field {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise Vsr1Error(f"'{path}' line {number}: {error}") from error
        key = index if isinstance(index, int) else query.query_id
        if key in queries:
            if not isinstance(index, int):
                raise Vsr1Error(f"'{path}' line {number}: query '{key}' stands in line {numbers[key]} already")
            repeated += 1
        queries[key], numbers[key] = query, number
        turns = max(turns, limit, *(turn.number for turn in query.turns))
    if not queries:
        raise Vsr1Error(f"'{path}' holds no results: it has no lines")
    return Found(outcomes.table(_named_apart(queries)), turns, public, repeated)


def lines(path: Path) -> Iterator[tuple[int, Json]]:
    """(number, object) of every line that is not blank. Raises Vsr1Error naming a line that holds no JSON object."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise Vsr1Error(f"'{path}' line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise Vsr1Error(f"'{path}' line {number} holds a {type(row).__name__}, not an object")
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise Vsr1Error(f"'{path}' cannot be read: {error}") from error


def _named_apart(queries: Mapping[object, Query]) -> Iterator[Query]:
    count = Counter(query.query_id for query in queries.values())
    for key, query in queries.items():
        yield query if count[query.query_id] == 1 else query._replace(query_id=f"{query.query_id}#{key}")


def _query(row: Json) -> Query:
    truth, stop, fallback = row["video_id"], row["stop"], row.get("fallback")
    if stop not in _STOPS:
        raise ValueError(f"stop must be one of {', '.join(_STOPS)}, got {stop!r}")
    turns = [
        Shown(
            turn.get("number", place),
            _rank(turn, "rank"),
            turn["video_id"] == truth,
            ANSWERS[turn["answer"]],
            _number(turn, "start"),
            _number(turn, "end"),
            turn.get("refine", True) and turn["answer"] != "matched",
            turn.get("text_tokens"),
            turn.get("soft_tokens"),
            turn.get("hard_tokens"),
        )
        for place, turn in enumerate(row["turns"], 1)
    ]
    start, end = _number(row, "start"), _number(row, "end")
    return Query(row["query_id"], truth, start, end, stop, _rank(row, "final_rank"), _fallback(fallback, truth), turns)


def _public_query(row: Json) -> Query:
    truth, reason = row["gt_pos_doc_id"], row["stop_reason"]
    start, end = _number(row, "gt_start"), _number(row, "gt_end")
    turns = []
    for place, turn in enumerate(row["turns"], 1):
        answer = ANSWERS[_PUBLIC_ANSWERS.get(turn["answer"])]
        begins, ends = _number(turn, "pred_start"), _number(turn, "pred_end")
        if answer == MATCHED and None not in (begins, ends, start, end):
            overlap, stored = iou((begins, ends), (start, end)), _number(turn, "iou_raw")  # type: ignore[arg-type]
            if stored is not None and abs(overlap - stored) > _SAME:
                raise ValueError(f"turn {place}: iou_raw is {stored}, but its spans overlap by {overlap}")
        soft = turn.get("soft_tokens", turn.get("rollout_depth_actual") if turn["refine_applied"] else None)
        hard, refine = turn.get("hard_tokens"), turn["refine_token_generated"]
        right = turn["top1_doc_id"] == truth
        text = turn.get("text_tokens")
        number = turn.get("turn", place)
        turns.append(Shown(number, _rank(turn, "rank"), right, answer, begins, ends, refine, text, soft, hard))
    if turns and turns[0].rank != row["orig_rank"]:
        raise ValueError(f"orig_rank is {row['orig_rank']}, but turn 1 has rank {turns[0].rank}")
    if (reason == "matched") != bool(turns and turns[-1].answer == MATCHED):
        raise ValueError(f"stop_reason is '{reason}', but the last answer is '{turns[-1].answer if turns else None}'")
    stop: Stop = reason if reason in _STOPS else "turns"
    rank = _rank(row, "final_rank")
    return Query(str(row["qid"]), truth, start, end, stop, rank, _fallback(row.get("fallback"), truth), turns)


def _fallback(given: Json | None, truth: str | None) -> Fallback | None:
    if given is None:
        return None
    return Fallback(given["video_id"] == truth, _number(given, "start"), _number(given, "end"))


def _number(row: Json, name: str) -> float | None:
    value = row.get(name)
    if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
        raise ValueError(f"{name} must be a number or null, got {value!r}")
    return value


def _rank(row: Json, name: str) -> int | None:
    value = row[name]
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name} must be a whole number from 1 or null, got {value!r}")
    return value
