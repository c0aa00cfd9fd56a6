"""Training rows: the public schemas are read, written back key by key, and what contradicts itself is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vsr1.data.annotations import AnnotationError
from vsr1.data.rows import (
    GrpoRow,
    SftRow,
    protocol_text,
    read_grpo,
    read_hard_negatives,
    read_sft,
    write_grpo,
    write_hard_negatives,
    write_sft,
)
from vsr1.models.tokenizer import IM_END

SYSTEM = "Compare the video with the query.\nEnd with <REFINE>."
REPLY = "<think> The door is shut. </think> <answer>not_matched</answer> <REFINE>"
SFT: dict[str, Any] = {
    "qid": "7_fig",
    "query": "a person opens a red door",
    "messages": [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": 'Query: "a person opens a red door"\nRetrieved video: <video>'},
        {"role": "assistant", "content": REPLY},
    ],
    "videos": ["AO8RW.npy"],
    "meta": {
        "source": "charades",
        "gold_label": "neg",
        "video_id": "AO8RW",
        "query_pos_video_id": "3MSZA",
        "pair_id": "7_fig::top1",
        "episode_type": "T1",
        "num_negs": 1,
        "top1_video_id": "AO8RW",
        "top1_gold_label": "neg",
    },
}
GRPO: dict[str, Any] = {
    "problem_id": 0,
    "qid": "7_fig",
    "problem": "Analyze the retrieved video.",
    "data_type": "video",
    "options": ["<answer>matched</answer> <REFINE>", "<answer>not_matched</answer> <REFINE>"],
    "solution": "<answer>matched</answer><start>2.00</start><end>5.50</end><REFINE>",
    "path": "3MSZA.npy",
    "query": "a person opens a red door",
    "gt_video": "3MSZA",
    "gt_time": [2.0, 5.5],
    "gt_duration": 30.5,
    "retrieved_video": "3MSZA",
    "label": "matched",
    "hard_negative_ids": ["AO8RW", "X1"],
    "hard_negative_scores": [0.61, 0.6],
    "hard_negative_ranks": [1, 3],
    "is_augmented": True,
    "augmentation_type": "gt_video_positive",
    "source_label": "not_matched",
}


def written(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_a_public_sft_file_is_read_and_written_back(tmp_path: Path) -> None:
    [row] = read_sft(written(tmp_path / "a.json", [SFT]))
    assert row == SftRow("7_fig", SFT["query"], "AO8RW", False, "3MSZA", REPLY, SYSTEM, SFT["meta"])
    write_sft(tmp_path / "b.json", [row])
    assert json.loads((tmp_path / "b.json").read_text()) == [SFT]


def test_sharegpt_names_and_a_closed_turn(tmp_path: Path) -> None:
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in SFT["messages"]]
    turns[-1]["value"] += f"{IM_END}\n"
    record = {key: value for key, value in SFT.items() if key != "messages"} | {"conversations": turns[1:]}
    [row] = read_sft(written(tmp_path / "a.json", [record]))
    assert (row.reply, row.system) == (REPLY, None)


def test_the_label_is_whether_the_shown_video_is_the_right_one(tmp_path: Path) -> None:
    meta = {"query_pos_video_id": "3MSZA"}
    [row] = read_sft(written(tmp_path / "a.json", [SFT | {"meta": meta, "videos": ["3MSZA.npy"]}]))
    assert (row.shown, row.matched) == ("3MSZA", True)


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without(SFT, "qid"), "key 'qid' is missing"),
        (SFT | {"qid": ""}, "'qid' is empty"),
        (without(SFT, "messages"), "key 'messages' is missing"),
        (SFT | {"messages": SFT["messages"][:2]}, "must be one question and one reply, has the turns system, user"),
        (SFT | {"messages": [*SFT["messages"], *SFT["messages"][1:]]}, "must be one question and one reply"),
        (SFT | {"messages": [{"role": "tool", "content": "x"}]}, "a turn must have a role"),
        (SFT | {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a turn must have a role"),
        (SFT | {"messages": ["hello"]}, "a turn must have a role"),
        (SFT | {"videos": ["a.npy", "b.npy"]}, "'videos' must be a list of one name"),
        (SFT | {"videos": ["X1.npy"]}, "'videos' shows 'X1.npy', 'meta' says 'AO8RW'"),
        (SFT | {"meta": without(SFT["meta"], "query_pos_video_id")}, "key 'query_pos_video_id' is missing"),
        (SFT | {"meta": SFT["meta"] | {"gold_label": "pos"}}, "'gold_label' is 'pos', but the shown video is 'AO8RW'"),
        (SFT | {"meta": SFT["meta"] | {"gold_label": "maybe"}}, "'gold_label' is 'maybe'"),
        (SFT | {"meta": 3}, "'meta' must be an object"),
        (7, "a row is an object"),
    ],
)
def test_a_broken_sft_row_is_named(tmp_path: Path, broken: Any, message: str) -> None:
    path = written(tmp_path / "a.json", [SFT, broken])
    with pytest.raises(AnnotationError) as caught:
        read_sft(path)
    assert f"SFT file '{path}', entry 2: " in str(caught.value)
    assert message in str(caught.value)


def test_a_public_grpo_file_is_read_and_written_back(tmp_path: Path) -> None:
    unknown = GRPO | {"qid": "8_fig", "retrieved_video": "AO8RW", "label": "not_matched", "is_augmented": False}
    unknown |= {"gt_time": None, "gt_duration": None}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GRPO)}\n{json.dumps(unknown)}\n")
    first, second = read_grpo(path)
    extra = without(
        GRPO, "qid", "query", "gt_video", "gt_time", "gt_duration", "retrieved_video", "label", "hard_negative_ids",
        "is_augmented",
    )  # fmt: skip
    assert first == GrpoRow(
        "7_fig", GRPO["query"], "3MSZA", True, "3MSZA", 2.0, 5.5, 30.5, ("AO8RW", "X1"), True, extra
    )
    assert (second.shown, second.matched, second.start, second.end, second.duration) == ("AO8RW", False, *[None] * 3)
    write_grpo(tmp_path / "b.jsonl", [first, second])
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == [GRPO, unknown]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without(GRPO, "gt_video"), "key 'gt_video' is missing"),
        (GRPO | {"label": "not_matched"}, "'label' is 'not_matched', but the shown video is '3MSZA'"),
        (GRPO | {"gt_time": [2.0]}, "'gt_time' must be [start, end]"),
        (GRPO | {"gt_time": [2.0, float("nan")]}, "times must be finite"),
        (GRPO | {"gt_duration": "30"}, "'gt_duration' must be float"),
        (GRPO | {"hard_negative_ids": ["AO8RW", 3]}, "'hard_negative_ids' must be video ids"),
        (GRPO | {"hard_negative_ids": ["AO8RW", "3MSZA"]}, "the right video '3MSZA' is among its own"),
        (GRPO | {"is_augmented": "yes"}, "'is_augmented' must be true or false"),
    ],
)
def test_a_broken_grpo_row_is_named(tmp_path: Path, broken: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GRPO)}\n\n{json.dumps(broken)}\n")
    with pytest.raises(AnnotationError) as caught:
        read_grpo(path)
    assert f"GRPO file '{path}', line 3: " in str(caught.value)
    assert message in str(caught.value)


def test_rows_that_are_made_here_come_back(tmp_path: Path) -> None:
    """What a row says of itself goes before what its `meta` or `extra` may say."""
    made = SftRow(
        "1_fig", "ein Öltanker", "A", True, "A", "<answer>matched</answer>", None, {"video_id": "B", "made_by": 1}
    )
    write_sft(tmp_path / "a.json", [made])
    [row] = read_sft(tmp_path / "a.json")
    meta = {"gold_label": "pos", "video_id": "A", "query_pos_video_id": "A", "made_by": 1}
    assert row == SftRow("1_fig", "ein Öltanker", "A", True, "A", "<answer>matched</answer>", None, meta)
    practice = GrpoRow(
        "1_fig", "ein Öltanker", "A", False, "B", None, None, None, extra={"label": "matched", "path": "A.npy"}
    )
    write_grpo(tmp_path / "a.jsonl", [practice])
    assert read_grpo(tmp_path / "a.jsonl") == [
        GrpoRow("1_fig", "ein Öltanker", "A", False, "B", None, None, None, extra={"path": "A.npy"})
    ]


def test_hard_negatives(tmp_path: Path) -> None:
    path = tmp_path / "hard_negatives.json"
    write_hard_negatives(path, {"7_fig": ["AO8RW", "X1"], "8_fig": ()})
    assert read_hard_negatives(path) == {"7_fig": ("AO8RW", "X1"), "8_fig": ()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be one object"),
        ('{"7_fig": "AO8RW"}', "query '7_fig' must have a list of video ids"),
        ('{"7_fig": [1]}', "query '7_fig' must have a list of video ids"),
        ('{"7_fig": ["a", "a"]}', "query '7_fig' has a video twice"),
    ],
)
def test_broken_hard_negatives_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hard_negatives.json"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=message):
        read_hard_negatives(path)


@pytest.mark.parametrize("read", [read_sft, read_grpo, read_hard_negatives])
def test_a_missing_file_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(AnnotationError, match=r"absent\.json"):
        read(tmp_path / "absent.json")


def test_the_protocol_is_the_system_turn_word_for_word(tmp_path: Path) -> None:
    assert protocol_text(written(tmp_path / "a.json", [SFT, SFT | {"qid": "8_fig"}])) == SYSTEM


def test_a_protocol_needs_one_system_turn(tmp_path: Path) -> None:
    other = SFT | {"messages": [{"role": "system", "content": "Another."}, *SFT["messages"][1:]]}
    silent = SFT | {"messages": SFT["messages"][1:]}
    with pytest.raises(AnnotationError, match=r"4 rows have 3 different system turns \(2 x 'Compare.*1 x none"):
        protocol_text(written(tmp_path / "a.json", [SFT, other, SFT, silent]))
    for rows in ([silent, silent], []):
        with pytest.raises(AnnotationError, match=f"none of its {len(rows)} rows has a system turn"):
            protocol_text(written(tmp_path / "b.json", rows))
