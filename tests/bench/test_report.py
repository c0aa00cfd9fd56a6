"""The tables of speed: what they show, what is kept where, and that the rest of the README stays as it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench import readme, report
from bench.harness import Goal, Measurement

MACHINE = {"name": "Some CPU (R) @ 2 GHz, 2 cores, avx2", "date": "2026-01-02", "torch": "2.13.0"}
MET = Measurement(
    "small", 2.0, bytes=10**8, floor=1.5, peers={"FAISS": 7.0}, goals=[Goal("x FAISS", 3, 3.5, least=True)]
)
MISSED = Measurement(
    "large",
    200.0,
    bytes=10**12,
    floor=100.0,
    mib=12.3,
    absent={"USearch": "pip install usearch"},
    goals=[Goal("x time of floor", 1.6, 2.0)],
    note="the product is bound by arithmetic",
)


def test_a_table_shows_ratios_and_leaves_out_empty_columns() -> None:
    lines = list(report.table([MET, MISSED]))
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "case", "ms", "GB/s", "% of floor speed", "x FAISS", "MiB", "goal",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "small", "2", "50", "75", "3.5", "", "≥ 3 x FAISS: 3.5, met",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "large", "200", "5000", "50", "", "12", "≤ 1.6 x time of floor: 2, **missed by 25 %**",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_what_was_counted_stands_beside_the_names_of_the_others() -> None:
    counts = {"passes": {"ours": 1, "public": 72}, "calls": {"ours": 3}}
    lines = list(report.table([dataclasses.replace(MET, counts=counts), MISSED]))
    columns = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert columns[0][-3:-1] == ["passes", "calls"]
    assert [row[-3:-1] for row in columns[2:]] == [["1, public 72", "3"], ["", ""]]


def test_remarks_say_why_but_not_of_goals_that_are_met() -> None:
    told = Measurement("small", 1.0, goals=[Goal("ms", 2.0, 1.0)], note="never shown")
    larger = dataclasses.replace(MISSED, case="larger")
    assert list(report.remarks([told, MISSED, larger])) == [
        "- missed, large; larger: the product is bound by arithmetic",
        "- absent, USearch: pip install usearch",
    ]


def test_published_files_keep_other_ops_and_the_readme_its_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, results, page = tmp_path / "last", tmp_path / "results", tmp_path / "README.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    report.publish({"patches": report.entry(MACHINE, [Measurement("untouched", 1.0)])}, results)
    ahead = Measurement("without a goal", 3.0, peers={"FAISS": 4.0, "own top-k": 2.0})
    behind = Measurement("behind a peer", 3.0, peers={"FAISS": 2.0})
    report.keep_last("corpus_scan", MACHINE, [MET, MISSED, ahead, behind], last)
    report.main(last, results, page)

    (path,) = results.iterdir()
    assert path.name == "Some-CPU-R-2-GHz-2-cores-avx2.json"
    kept = json.loads(path.read_text())
    assert list(kept) == ["patches", "corpus_scan"]
    assert kept["corpus_scan"]["machine"] == MACHINE
    assert [Measurement.read(line) for line in kept["corpus_scan"]["measurements"]][:2] == [MET, MISSED]

    text = page.read_text()
    assert text.startswith("before\n<!-- speed -->\n1 of 2 goals are met.\n")
    assert text.endswith("\n<!-- /speed -->\nafter\n")
    assert "**corpus_scan** on Some CPU (R) @ 2 GHz, 2 cores, avx2, 2026-01-02 (torch 2.13.0):" in text
    assert "missed by 25 %" in text
    assert "behind a peer" in text
    assert "without a goal" not in text
    assert "untouched" not in text
    printed = capsys.readouterr().out
    assert "without a goal" in printed
    assert "untouched" in printed


def test_only_the_part_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    readme.replace("results", "new", page)
    assert page.read_text() == "before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n"
    with pytest.raises(ValueError, match="speed"):
        readme.replace("speed", "new", page)
    assert page.read_text() == "before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n"
