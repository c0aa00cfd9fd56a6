"""FIG files: what is read is what was written, and a bad line is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vsr1.data.annotations import AnnotationError, read_fig, read_rows, write_fig
from vsr1.records import Moment

ROW = {
    "video": "AO8RW",
    "time": [0.0, 6.9],
    "desc_id": 3,
    "duration": 33.67,
    "cog_desc": "a person works",
    "fig_desc": "a person in a blue coat puts a book down",
    "fig_desc_score": 0.9,
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_reads_a_row(tmp_path: Path) -> None:
    moments = read_fig(write(tmp_path / "a.jsonl", ROW))
    assert moments == [Moment("3_fig", ROW["fig_desc"], "AO8RW", 0.0, 6.9, 33.67)]


def test_repeated_ids_become_distinct_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    moments = read_fig(write(tmp_path / "a.jsonl", ROW, "", ROW, {**ROW, "desc_id": 4}))
    assert [moment.query_id for moment in moments] == ["3_fig", "3_fig_2", "4_fig"]


def test_a_span_past_the_duration_is_kept(tmp_path: Path) -> None:
    """1,770 of 12,408 rows of the public Charades file end after their video."""
    [moment] = read_fig(write(tmp_path / "a.jsonl", {**ROW, "time": [30.0, 35.5]}))
    assert (moment.end, moment.duration) == (35.5, 33.67)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"video": ', "not JSON"),
        ("[1, 2]", "a row is an object"),
        ({key: value for key, value in ROW.items() if key != "fig_desc"}, "key 'fig_desc' is missing"),
        ({**ROW, "time": [7.0, 3.0]}, "ends at 3.0 s before it starts at 7.0 s"),
        ({**ROW, "time": [1.0]}, "'time' must be"),
        ({**ROW, "time": [0.0, float("nan")]}, "'time' must be"),
        ({**ROW, "time": "0-3"}, "'time' must be [start, end]"),
        ({**ROW, "video": 7}, "'video' must be str"),
        ({**ROW, "desc_id": True}, "'desc_id' must be int"),
        ({**ROW, "duration": 0}, "'duration' must be above 0"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", ROW, ROW, bad)
    with pytest.raises(AnnotationError, match="line 3") as caught:
        read_fig(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_fig(tmp_path / "missing.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_fig(tmp_path / "b.jsonl")


def test_round_trip(tmp_path: Path) -> None:
    moments = [Moment("3_fig", "a naïve café", "v1", 1.0, 2.5, 9.0), Moment("4_fig", "b", "v2", 0.0, 9.0, 9.0)]
    write_fig(tmp_path / "a.jsonl", moments, [{"cog_desc": "c", "event": 1}, {"fig_desc_score": 0.5}])
    assert read_fig(tmp_path / "a.jsonl") == moments
    first, second = read_rows(tmp_path / "a.jsonl")
    assert (first["cog_desc"], first["event"], first["fig_desc_score"], first["desc_id"]) == ("c", 1, 1.0, 3)
    assert (second["cog_desc"], second["fig_desc_score"]) == ("", 0.5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a video"):
        write_fig(tmp_path / "a.jsonl", [Moment("3_fig", "a")])
    with pytest.raises(ValueError, match="7_fig"):
        write_fig(tmp_path / "a.jsonl", [Moment("third", "a", "v", 0.0, 1.0, 2.0)])
    with pytest.raises(ValueError, match="as many"):
        write_fig(tmp_path / "a.jsonl", [], [{}])
    assert list(tmp_path.iterdir()) == []
