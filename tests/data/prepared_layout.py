"""A small data set as it is published: annotations, vectors, frame arrays, queries and training rows of a train split."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.video.arrays import write_array
from vsr1.data.layout import Layout

DIMENSION = 8
VIDEOS = ("V1", "V2", "V3", "V4")
SYSTEM = "Compare the video with the query. End with <REFINE>."


def unit(*numbers: int) -> np.ndarray:
    """Rows (N, 8) of length 1, one a number; other numbers, other directions."""
    rows = np.stack([np.random.default_rng(number).normal(size=DIMENSION) for number in numbers])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def annotation(number: int, video: str, duration: float = 20.0) -> dict[str, Any]:
    return {
        "video": video,
        "time": [2.0, 6.5],
        "desc_id": number,
        "duration": duration,
        "cog_desc": "",
        "fig_desc": f"a person does thing {number}",
        "fig_desc_score": 0.9,
    }


def sft(number: int, shown: str, right: str, reply: str | None = None) -> dict[str, Any]:
    span = "<answer>matched</answer> <start>2</start> <end>6.5</end>"
    said = span if shown == right else "<answer>not_matched</answer>"
    query = f"a person does thing {number}"
    return {
        "qid": f"{number}_fig",
        "query": query,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f'Query: "{query}"\nRetrieved video: <video>'},
            {"role": "assistant", "content": reply or f"<think> It is so. </think> {said} <REFINE>"},
        ],
        "videos": [f"{shown}.npy"],
        "meta": {
            "gold_label": "pos" if shown == right else "neg",
            "video_id": shown,
            "query_pos_video_id": right,
        },
    }


def grpo(number: int, shown: str, right: str, **changes: Any) -> dict[str, Any]:
    return {
        "qid": f"{number}_fig",
        "query": f"a person does thing {number}",
        "path": f"{shown}.npy",
        "gt_video": right,
        "gt_time": [2.0, 6.5],
        "gt_duration": 20.0,
        "retrieved_video": shown,
        "label": "matched" if shown == right else "not_matched",
        "hard_negative_ids": [video for video in VIDEOS if video != right],
        "is_augmented": False,
    } | changes


def write_split(root: Path, split: str = "train") -> Layout:
    """Four videos with vectors, arrays and a query each; query 2 is nearest to another video than its own."""
    layout = Layout(root)
    write_lines(root / "raw_annotation" / f"{split}.jsonl", [annotation(n, f"V{n}") for n in (1, 2, 3, 4)])
    (root / split).mkdir()
    vectors = unit(1, 2, 3, 4)
    layout.segment_embeddings(split).parent.mkdir()
    np.save(layout.segment_embeddings(split), vectors)
    write_json(layout.docid2row(split), {video: row for row, video in enumerate(VIDEOS)})
    for number, video in enumerate(VIDEOS):
        write_array(layout.frame_arrays(split), video, [0.0, 9.0, 19.0], 19.5 + number)
    meta = [
        {"qid": f"{n}_fig", "query": "a person", "pos_doc_id": f"V{n}", "weight": 1.0, "fig_score": 0.9}
        for n in (1, 2, 3, 4)  # one text for all: queries are told apart by id
    ]
    write_lines(layout.query_meta(split), meta)
    queries = vectors.copy()
    queries[1] = vectors[0]
    np.save(layout.query_embeddings(split), 3 * queries)
    return layout


def write_training_rows(layout: Layout) -> None:
    write_json(
        layout.hard_negatives, {f"{n}_fig": [video for video in VIDEOS if video != f"V{n}"] for n in (1, 2, 3, 4)}
    )
    write_json(layout.sft, [sft(1, "V1", "V1"), sft(2, "V1", "V2")])
    write_lines(layout.grpo, [grpo(1, "V1", "V1"), grpo(2, "V1", "V2"), grpo(2, "V2", "V2", is_augmented=True)])
