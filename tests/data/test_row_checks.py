"""Training rows held against annotations and corpus: each finding, and what it makes of the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.prepared_layout import VIDEOS, grpo, sft, write_json, write_lines
from vsr1.agent.protocol import parse
from vsr1.data.row_checks import RULES, Checked, Known, check_grpo, check_hard_negatives, check_sft
from vsr1.data.rows import read_grpo, read_sft
from vsr1.records import Moment

MOMENTS = {f"{n}_fig": Moment(f"{n}_fig", "a person", f"V{n}", 2.0, 6.5, 20.0) for n in (1, 2, 3, 4)}
KNOWN = Known(MOMENTS, dict.fromkeys(VIDEOS, 20.0))


def sft_findings(tmp_path: Path, record: dict[str, Any], known: Known = KNOWN) -> list[str]:
    write_json(tmp_path / "a.json", [record])
    return [name for name, _, _ in check_sft("a", read_sft(tmp_path / "a.json"), known, parse).findings]


def grpo_findings(tmp_path: Path, record: dict[str, Any], known: Known = KNOWN) -> list[str]:
    write_lines(tmp_path / "a.jsonl", [record])
    return [name for name, _, _ in check_grpo("a", read_grpo(tmp_path / "a.jsonl"), known).findings]


def matched(span: str) -> str:
    return f"<think>t</think><answer>matched</answer>{span}<REFINE>"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (sft(1, "V1", "V1"), []),
        (sft(1, "V2", "V1"), []),
        (sft(1, "X9", "V1"), ["unknown video"]),
        (sft(9, "V1", "V1"), ["unknown query"]),
        (sft(1, "V1", "V2"), ["other video"]),
        (sft(1, "V2", "V1", "<think>t</think><REFINE>"), ["no answer"]),
        (sft(1, "V2", "V1", matched("<start>2</start><end>3</end>")), ["wrong answer"]),
        (sft(1, "V2", "V1", "<think><REFINE></think><answer>not_matched</answer>"), ["no refine"]),
        (sft(1, "V1", "V1", matched("")), ["no span"]),
        (sft(1, "V1", "V1", matched("<start>2</start><end>2</end>")), ["reversed"]),
        (sft(1, "V1", "V1", matched("<start>20</start><end>23</end>")), ["outside"]),
        (sft(1, "V1", "V1", matched("<start>2</start><end>20.04</end>")), []),
        (sft(1, "V1", "V1", matched("<start>2</start><end>20.5</end>")), ["ends after"]),
    ],
)
def test_sft_rows(tmp_path: Path, record: dict[str, Any], expected: list[str]) -> None:
    assert sft_findings(tmp_path, record) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (grpo(1, "V1", "V1"), []),
        (grpo(1, "V2", "V1"), []),
        (grpo(1, "V2", "V1", gt_time=None), []),
        (grpo(1, "V1", "V1", gt_time=None), ["no span"]),
        (grpo(1, "V1", "V1", gt_time=[6.0, 2.0]), ["reversed"]),
        (grpo(1, "V1", "V1", gt_time=[21.0, 22.0]), ["outside"]),
        (grpo(1, "V2", "V1", gt_time=[2.0, 21.0]), ["ends after"]),
        (grpo(1, "X9", "V1"), ["unknown video"]),
        (grpo(9, "V1", "V1"), ["unknown query"]),
        (grpo(1, "V2", "V2"), ["other video"]),
        (grpo(1, "V1", "V1", hard_negative_ids=["V2", "X8", "X9"]), ["lost negative"]),
    ],
)
def test_grpo_rows(tmp_path: Path, record: dict[str, Any], expected: list[str]) -> None:
    assert grpo_findings(tmp_path, record) == expected


def test_the_rows_duration_serves_where_the_corpus_has_none(tmp_path: Path) -> None:
    known = Known(MOMENTS, dict.fromkeys(VIDEOS))
    assert grpo_findings(tmp_path, grpo(1, "V1", "V1", gt_duration=5.0), known) == ["ends after"]
    assert sft_findings(tmp_path, sft(1, "V1", "V1"), known) == []


def test_without_annotations_ids_are_not_checked(tmp_path: Path) -> None:
    assert grpo_findings(tmp_path, grpo(9, "V1", "V1"), Known({}, KNOWN.videos)) == []


def test_hard_negatives() -> None:
    negatives = {"1_fig": ("V2", "V3"), "2_fig": ("V2", "X9"), "9_fig": ()}
    checked = check_hard_negatives("hard_negatives.json", negatives, KNOWN)
    assert [(name, query) for name, query, _ in checked.findings] == [
        ("own negative", "2_fig"),
        ("lost negative", "2_fig"),
        ("unknown query", "9_fig"),
    ]
    assert (checked.rows, checked.matched, checked.refused) == (3, None, 1)


def test_the_table_counts_and_names() -> None:
    findings = [("no span", f"{n}_fig", f"row {n}") for n in range(7)] + [("ends after", "8_fig", "row 8")]
    text = Checked("train_oneturn.json", 20, 8, findings).text().splitlines()
    assert text[0] == "train_oneturn.json: 20 rows, 8 matched, 12 not matched; 7 refused"
    assert text[1].split()[:4] == ["7", "no", "span", "refused"] and text[2].strip() == "0_fig: row 0"
    assert len(text) == 1 + (1 + 5) + (1 + 1)
    assert len(Checked("a", 20, 8, findings).text(None).splitlines()) == 1 + (1 + 7) + (1 + 1)
    assert all(len(name) <= 13 for name in RULES)
