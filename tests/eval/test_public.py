"""The public names: figures against their definitions written out literally, and files that come back as they went."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.eval import literal, shared
from vsr1.errors import Vsr1Error
from vsr1.eval import exchange, metrics, outcomes, public
from vsr1.eval.outcomes import Outcomes
from vsr1.records import Trajectory

# What the public per-query file of VideoSearch-R1 holds beside the fields that describe its own tensors.
ROW = {
    "index", "qid", "query", "gt_pos_doc_id", "gt_start", "gt_end", "orig_rank", "turn1_rank", "turn1_rank_before_refine",
    "turn1_top1_doc_id", "turn1_top1_is_gt", "turn1_policy_top1_doc_id", "turn1_policy_top1_is_gt", "turn1_answer",
    "turn1_time_parse_ok", "turn1_pred_start", "turn1_pred_end", "turn1_iou_raw", "turn1_iou_r1", "final_rank",
    "final_top1_doc_id", "final_top1_is_gt", "final_answer", "final_time_parse_ok", "final_pred_start", "final_pred_end",
    "final_iou_raw", "final_iou_r1", "matched_turn", "stop_turn", "stop_reason", "used_refine_any",
    "refine_token_generated_turns", "refine_applied_turns", "max_turn", "turns",
}  # fmt: skip
TURN = {
    "turn", "rank", "rank_before_refine", "policy_rank", "top1_doc_id", "top1_is_gt", "policy_top1_doc_id",
    "policy_top1_is_gt", "answer", "time_parse_ok", "pred_start", "pred_end", "iou_raw", "iou_r1", "refine_token_generated",
    "refine_applied", "rollout_depth_actual", "raw_output",
}  # fmt: skip


def rows_of(found: list[Trajectory]) -> list[dict[str, Any]]:
    rows = [exchange.public_row(exchange.as_json(one), index, 3) for index, one in enumerate(found)]
    return [json.loads(json.dumps(row)) for row in rows]


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Nested figures; those that are sums may differ by rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    else:
        assert one == pytest.approx(other, abs=1e-12), where


def assert_equal_tables(one: Outcomes, other: Outcomes) -> None:
    for field in dataclasses.fields(Outcomes):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert mine.dtype == theirs.dtype, field.name
        np.testing.assert_array_equal(mine, theirs, err_msg=field.name)


def test_a_thousand_trajectories_give_the_public_figures() -> None:
    found = shared.trajectories(1000, seed=1)
    assert_same(public.result(found, 3), literal.result(rows_of(found), 3))
    # a loop of one more turn than any query took: nobody executed it, and everybody keeps what came before
    longer = public.result(found, 4)
    assert longer["turns"]["4"]["retrieval"]["N"] == 0
    assert longer["retrieval_policy_by_turn"]["policy@4"] == longer["retrieval_policy_by_turn"]["policy@3"]


def test_a_thousand_trajectories_give_our_figures() -> None:
    found = shared.trajectories(1000, seed=2)
    rows = rows_of(found)
    for theta, value in metrics.vcmr(found).items():
        assert value == sum(literal.moment_found(row, float(theta)) for row in rows) / 1000
    right = [literal.answers_right(row) for row in rows]
    ver = metrics.verification(found)
    assert ver["ver"] == pytest.approx(sum(map(sum, right)) / sum(map(len, right)), abs=1e-12)
    assert ver["ver_turn1"] == sum(answers[0] for answers in right) / 1000
    assert ver["ver_final"] == sum(answers[-1] for answers in right) / 1000
    for when, name in (("before", "orig_rank"), ("after", "final_rank")):
        expected = literal.retrieval([row[name] for row in rows])
        assert_same(
            metrics.retrieval(found, when), {key: expected[key] for key in ("R@1", "R@5", "R@10", "R@100", "MRR")}
        )
    gains: dict[int, list[float]] = {}
    for row in rows:
        for place, turn in enumerate(row["turns"]):
            if turn["soft_tokens"] is not None:
                gains.setdefault(turn["turn"], []).append(1 / literal.rank_after(row, place) - 1 / turn["rank"])
    expected = {turn: (pytest.approx(sum(one) / len(one), abs=1e-12), len(one)) for turn, one in gains.items()}
    assert metrics.refine_gains(found) == expected and set(expected) == {1, 2, 3}


def test_rows_have_the_public_fields() -> None:
    for row in rows_of(shared.trajectories(30, seed=3)):
        assert row.keys() >= ROW
        assert all(turn.keys() >= TURN for turn in row["turns"])
        assert row["turn1_iou_r1"] == row["turns"][0]["iou_r1"] == literal.counted(row, row["turns"][0])
        after = [literal.rank_after(row, place) for place in range(len(row["turns"]))]
        assert [turn["policy_rank"] for turn in row["turns"]] == after
        assert [turn["policy_top1_is_gt"] for turn in row["turns"]] == [rank == 1 for rank in after]
        assert (row["stop_reason"] == "matched") == (row["matched_turn"] > 0)


@pytest.mark.parametrize("together", [False, True], ids=["one-a-turn", "several-a-turn"])
def test_files_come_back_as_they_went(tmp_path: Path, together: bool) -> None:
    found = shared.trajectories(200, seed=4, failures=0.1, together=together)
    # one without a true span, too
    found.append(
        replace(found[0], moment=replace(found[0].moment, query_id="no span", start=None, end=None), stop="turns")
    )
    found[-1] = replace(
        found[-1], turns=tuple(replace(t, reply=replace(t.reply, answer=None)) for t in found[-1].turns)
    )
    table = outcomes.of(found)
    own, theirs = tmp_path / "own.jsonl", tmp_path / "public.jsonl"
    own.write_text("".join(json.dumps(exchange.as_json(one)) + "\n\n" for one in found))
    exchange.write_public(theirs, map(exchange.as_json, found), 5)
    read = [exchange.read(path) for path in (own, theirs)]
    assert [one.public for one in read] == [False, True]
    assert [one.turns for one in read] == [max(turn.number for one in found for turn in one.turns), 5]
    assert_equal_tables(read[0].outcomes, table)
    assert_equal_tables(read[1].outcomes, table)
    assert metrics.summary(read[1].outcomes, n=50) == metrics.summary(found, n=50)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["own.jsonl", "public.jsonl"]


def test_videos_of_one_turn_share_the_rank_after_it() -> None:
    one = next(
        one for one in shared.trajectories(50, seed=10, together=True) if [t.number for t in one.turns] == [1, 1, 2]
    )
    turns = rows_of([one])[0]["turns"]
    assert [turn["policy_rank"] for turn in turns] == [turns[2]["rank"], turns[2]["rank"], one.final_rank]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_public_rows_without_our_fields_are_read(tmp_path: Path) -> None:
    found = shared.trajectories(50, seed=5)
    rows = [{key: value for key, value in row.items() if key in ROW} for row in rows_of(found)]
    for row in rows:
        row["turns"] = [{key: value for key, value in turn.items() if key in TURN} for turn in row["turns"]]
    read = exchange.read(write(tmp_path / "public.jsonl", rows)).outcomes
    given, expected = metrics.per_query(read), metrics.per_query(found)
    for name in expected:
        if name.split()[0] not in ("text", "hard", "soft", "refinements", "answered"):
            np.testing.assert_array_equal(given[name], expected[name], err_msg=name)
    assert np.isnan(given["text"]).all()
    refined = [[t.actions is not None for t in one.turns] for one in found]
    assert given["refinements"].tolist() == [sum(one) for one in refined]
    assert metrics.summary(read, n=10)["tokens"]["text"]["value"] is None


def test_lines_that_share_an_index_or_a_qid(tmp_path: Path) -> None:
    rows = rows_of(shared.trajectories(4, seed=6))
    for row in rows[:2]:
        row["qid"] = "one text"
    read = exchange.read(
        write(tmp_path / "merged.jsonl", [*rows, {**rows[1], "gt_start": 0.25, "turns": rows[1]["turns"]}])
    )
    assert read.outcomes.query_ids.tolist() == ["one text#0", "one text#1", "q2", "q3"]
    assert read.repeated == 1
    own = exchange.as_json(shared.trajectories(1, seed=6)[0])
    with pytest.raises(Vsr1Error, match=r"line 2: query 'q0' stands in line 1 already"):
        exchange.read(write(tmp_path / "own.jsonl", [own, own]))


def broken(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    turn = row["turns"][0]
    match kind:
        case "field":
            del row["orig_rank"]
        case "turn field":
            del turn["top1_doc_id"]
        case "rank":
            turn["rank"] = 0
        case "first rank":
            row["orig_rank"] += 1
        case "time":
            row["gt_start"] = "soon"
        case "nan":
            row["gt_end"] = float("nan")
        case "iou":
            turn["iou_raw"] += 0.25
        case "stop":
            row["stop_reason"] = "not_matched_no_refine_token"
    return row


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("field", "no field 'orig_rank'"),
        ("turn field", "no field 'top1_doc_id'"),
        ("rank", "rank must be a whole number from 1"),
        ("first rank", "but turn 1 has rank"),
        ("time", "gt_start must be a number or null, got 'soon'"),
        ("nan", "gt_end must be a number"),
        ("iou", "turn 1: iou_raw is"),
        ("stop", "stop_reason is 'not_matched_no_refine_token', but the last answer"),
    ],
    ids=lambda one: one.replace(" ", "-") if len(one) < 12 else "",
)
def test_a_broken_public_line_is_named(tmp_path: Path, kind: str, message: str) -> None:
    rows = rows_of([one for one in shared.trajectories(60, seed=7) if one.stop == "matched" and len(one.turns) == 1])
    spoken = next(i for i, row in enumerate(rows) if row["turns"][0]["time_parse_ok"])
    good, bad = rows[0], broken(kind, rows[spoken])
    path = write(tmp_path / "public.jsonl", [{**good, "index": 99}, bad])
    with pytest.raises(Vsr1Error, match=message) as error:
        exchange.read(path)
    assert f"'{path}' line 2" in str(error.value)


def test_files_that_are_no_results(tmp_path: Path) -> None:
    own = json.dumps(exchange.as_json(shared.trajectories(1, seed=8)[0]))
    for text, message in (
        ("", "holds no results"),
        (f"{own}\n{own[:40]}", "line 2 is not JSON"),
        (f"{own}\n[]\n", "line 2 holds a list"),
        (own.replace('"stop": "', '"stop": "un'), "line 1: stop must be one of"),
        (own.replace('"rank": ', '"rank": -'), "line 1: rank must be a whole number"),
    ):
        path = tmp_path / "results.jsonl"
        path.write_text(text)
        with pytest.raises(Vsr1Error, match=message):
            exchange.read(path)
    with pytest.raises(Vsr1Error, match=r"has no trajectories\.jsonl"):
        exchange.read(tmp_path)
    with pytest.raises(Vsr1Error, match="cannot be read"):
        exchange.read(tmp_path / "absent.jsonl")


def test_a_query_without_truth_has_no_public_row(tmp_path: Path) -> None:
    one = shared.trajectories(1, seed=9)[0]
    for other, message in (
        (replace(one, moment=replace(one.moment, video_id=None)), "no true video"),
        (replace(one, final_rank=None), "no rank"),
    ):
        with pytest.raises(ValueError, match=message):
            exchange.write_public(tmp_path / "out.jsonl", [exchange.as_json(one), exchange.as_json(other)], 3)
    assert not list(tmp_path.iterdir())
