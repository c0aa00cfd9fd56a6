"""TVR's files and figures, against its evaluator's definition written out literally, in its own precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsr1.errors import Vsr1Error
from vsr1.eval import metrics, tvr

KS, THRESHOLDS = (1, 5, 10, 100), (0.5, 0.7)


def literal(submission: dict[str, Any], truths: list[dict[str, Any]]) -> dict[str, Any]:
    """One description, one prediction and one span at a time; numbers are float32, as TVR reads them."""
    found: dict[str, Any] = {}
    for task in ("VCMR", "SVMR", "VR"):
        if task not in submission:
            continue
        predicted = {entry["desc_id"]: entry["predictions"][:100] for entry in submission[task]}
        hits: dict[str, list[bool]] = {}
        for truth in truths:
            index = np.float32(submission["video2idx"][truth["vid_name"]])
            rows = [
                (np.float32(v) == index, np.float32(s), np.float32(e)) for v, s, e, *_ in predicted[truth["desc_id"]]
            ]
            if task == "SVMR":
                rows = [row for row in rows if row[0]]
            for k in KS:
                if task == "VR":
                    hits.setdefault(f"r{k}", []).append(any(right for right, _, _ in rows[:k]))
                    continue
                for threshold in THRESHOLDS:
                    good = any(right and agrees(s, e, truth["ts"], threshold) for right, s, e in rows[:k])
                    hits.setdefault(f"{threshold}-r{k}", []).append(good)
        order = list(hits) if task == "VR" else [f"{threshold}-r{k}" for threshold in THRESHOLDS for k in KS]
        found[task] = {key: round(np.mean(hits[key]) * 100, 2) for key in order}
        by_type: dict[str, Any] = {}
        for kind in ("v", "t", "vt"):
            of_kind = [truth["type"] == kind for truth in truths]
            for key in order:
                both = [hit and here for hit, here in zip(hits[key], of_kind, strict=True)]
                by_type[f"{kind}-{key}"] = round(1.0 * np.sum(both) / np.sum(of_kind) * 100, 2)
        shares = [
            round(1.0 * np.sum([t["type"] == kind for t in truths]) / len(truths) * 100, 2) for kind in ("v", "t", "vt")
        ]
        by_type["desc_type_ratio"] = "v {} t {} vt {}".format(*shares)
        found[f"{task}_by_type"] = by_type
    return found


def agrees(start: np.float32, end: np.float32, ts: list[Any], threshold: float) -> bool:
    spans = ts if len(ts) >= 4 else [ts]
    count = 0
    for span in spans:
        true_start, true_end = np.float32(span[0]), np.float32(span[1])
        inside = np.maximum(np.float32(0), np.minimum(end, true_end) - np.maximum(start, true_start))
        hull = np.maximum(end, true_end) - np.minimum(start, true_start)
        count += bool((inside / hull if hull != 0 else np.float32(0)) >= np.float32(threshold))
    return count >= (2 if len(ts) >= 4 else 1)


def random_files(seed: int, queries: int = 300) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Spans lie on a grid of tenths, so IoUs of exactly 0.5 and 0.7 occur, which float32 and float64 judge differently."""
    generator = np.random.default_rng(seed)
    video2idx = {f"clip_{i}": 19_000 + 3 * i for i in range(12)}

    def span(width: int) -> list[float]:
        start = int(generator.integers(0, 100))
        return [start / 10, (start + int(generator.integers(-2, width))) / 10]

    truths = []
    for desc in range(queries):
        several = desc % 7 == 0
        ts = [span(60) for _ in range(4 + desc % 2)] if several else span(60)
        name = f"clip_{generator.integers(12)}"
        truths.append(
            {"desc_id": 90_000 + desc, "desc": "", "vid_name": name, "ts": ts, "type": ["v", "t", "vt"][desc % 3]}
        )
    submission: dict[str, Any] = {"video2idx": video2idx}
    for task in ("VR", "VCMR", "SVMR"):
        entries = []
        for truth in truths:
            count = int(generator.integers(1, 130))
            videos = [19_000 + 3 * int(v) for v in generator.integers(12, size=count)]
            guesses = [[video, *span(70), float(-place)] for place, video in enumerate(videos)]
            entries.append({"desc_id": truth["desc_id"], "desc": "", "predictions": guesses})
        order = generator.permutation(queries)  # predictions need not be in the order of the truths
        submission[task] = [entries[i] for i in order]
    return submission, truths


def save(folder: Path, submission: Any, truths: list[Any]) -> tuple[Path, Path]:
    predictions, annotations = folder / "predictions.json", folder / "truths.jsonl"
    predictions.write_text(json.dumps(submission))
    annotations.write_text("".join(json.dumps(truth) + "\n" for truth in truths))
    return predictions, annotations


@pytest.mark.parametrize("seed", range(3))
def test_a_random_prediction_file_gives_the_figures_of_tvr(tmp_path: Path, seed: int) -> None:
    submission, truths = random_files(seed)
    predictions, annotations = save(tmp_path, submission, truths)
    found = tvr.evaluate(tvr.read_submission(predictions), tvr.read_truths(annotations))
    assert found == literal(submission, truths)
    assert list(found) == ["VCMR", "SVMR", "VR", "VCMR_by_type", "SVMR_by_type", "VR_by_type"]
    assert list(found["VCMR"]) == list(literal(submission, truths)["VCMR"])
    assert 0 < found["VCMR"]["0.7-r10"] < found["VCMR"]["0.5-r10"] < found["VCMR"]["0.5-r100"] < 100
    json.dumps(found, allow_nan=False)


def test_an_iou_is_compared_in_single_precision() -> None:
    truth = [tvr.Truth(1, "a", ((0.0, 1.0),), None)]
    just = tvr.submission({"video2idx": {"a": 4}, "VCMR": [{"desc_id": 1, "predictions": [[4, 0, 0.7]]}]}, "here")
    assert float(np.float32(0.7)) < 0.7  # in double precision it would not reach the threshold
    assert tvr.evaluate(just, truth)["VCMR"]["0.7-r1"] == 100


def test_what_is_averaged_is_what_stands_in_the_table() -> None:
    submission, rows = random_files(9, queries=70)
    given = tvr.submission(submission, "here")
    truths = [
        tvr.Truth(row["desc_id"], row["vid_name"], tuple(row["ts"] if len(row["ts"]) > 2 else [row["ts"]]), None)
        for row in rows
    ]
    figures = tvr.evaluate(given, truths)
    assert list(figures) == ["VCMR", "SVMR", "VR"]  # without types none are told apart
    found = metrics.intervals(tvr.hits(given, truths), n=20)
    flat = {f"{task} {key}": value for task, one in figures.items() for key, value in one.items()}
    assert {name: round(100 * one.value, 2) for name, one in found.items()} == flat


def test_a_type_that_does_not_occur_has_no_figure() -> None:
    submission, rows = random_files(3, queries=4)
    truths = [tvr.Truth(row["desc_id"], row["vid_name"], ((0.0, 1.0),), "v") for row in rows]
    by_type = tvr.evaluate(tvr.submission(submission, "here"), truths)["VCMR_by_type"]
    assert by_type["t-0.5-r1"] is None and by_type["v-0.5-r100"] is not None
    assert by_type["desc_type_ratio"] == "v 100.0 t 0.0 vt 0.0"


def test_what_cannot_be_evaluated_is_named(tmp_path: Path) -> None:
    submission, truths = random_files(4, queries=5)
    entry = submission["VCMR"][0]
    for change, message in (
        ({"video2idx": None}, "needs an object 'video2idx'"),
        ({"VCMR": None, "SVMR": None, "VR": None}, "predictions.json'"),
        ({"VCMR": [*submission["VCMR"], entry]}, r"VCMR: entry 6 predicts desc_id \d+ a second time"),
        ({"VCMR": [{"desc_id": 1}]}, "VCMR: entry 1 needs a desc_id and predictions"),
        ({"SVMR": [{"desc_id": 1, "predictions": [[1, 2]]}]}, "SVMR: entry 1 needs"),
        ({"VR": [{"desc_id": 1, "predictions": [[1, "soon", 2]]}]}, "VR: entry 1 needs"),
    ):
        value = {**submission, **change}
        value = {key: one for key, one in value.items() if one is not None}
        predictions, _ = save(tmp_path, value, truths)
        with pytest.raises(Vsr1Error, match=message):
            tvr.read_submission(predictions)
    predictions.write_text("{")
    with pytest.raises(Vsr1Error, match="cannot be read as JSON"):
        tvr.read_submission(predictions)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is no TVR annotation"),
        ('{"desc_id": 1, "vid_name": "clip_0"}', "line 2 is no TVR annotation"),
        ('{"desc_id": 1, "vid_name": "clip_0", "ts": [1, 2, 3]}', "line 2 is no TVR annotation"),
        ('{"desc_id": 1, "vid_name": "clip_0", "ts": [1, 2], "type": "x"}', "type must be one of v, t, vt, got 'x'"),
        ('{"desc_id": 90000, "vid_name": "clip_0", "ts": [1, 2]}', "line 2 annotates desc_id 90000 a second time"),
    ],
    ids=["json", "list", "field", "span", "type", "twice"],
)
def test_a_broken_annotation_is_named(tmp_path: Path, row: str, message: str) -> None:
    _, annotations = save(tmp_path, {}, random_files(5, queries=1)[1])
    annotations.write_text(f"{annotations.read_text()}{row}\n")
    with pytest.raises(Vsr1Error, match=message):
        tvr.read_truths(annotations)


def test_predictions_of_other_descriptions_are_refused() -> None:
    submission, rows = random_files(6, queries=5)
    given = tvr.submission(submission, "here")
    truths = [tvr.Truth(row["desc_id"], row["vid_name"], ((0.0, 1.0),), None) for row in rows]
    with pytest.raises(Vsr1Error, match=r"VCMR: 5 descriptions predicted, 4 annotated; they differ in \[90004\]"):
        tvr.evaluate(given, truths[:4])
    lost = [*truths[:4], tvr.Truth(90_004, "clip_99", ((0.0, 1.0),), None)]
    with pytest.raises(Vsr1Error, match=r"1 true videos have no index in video2idx, such as \['clip_99'\]"):
        tvr.evaluate(given, lost)
