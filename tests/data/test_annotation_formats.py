"""Each public format is read by its own meaning and told by its contents; a bad row is named, the others are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vsr1.data.annotated_videos import EXTENSIONS, Videos, lengths, probed
from vsr1.data.annotation_formats import FORMATS, agreed
from vsr1.data.annotations import AnnotationError, read_moments
from vsr1.errors import ConfigError
from vsr1.ingest.listing import EXTENSIONS as INDEXED
from vsr1.records import Moment

FIG = {
    "video": "AO8RW", "time": [0.0, 6.9], "desc_id": 3, "duration": 33.67, "cog_desc": "a person works",
    "fig_desc": "a person in a blue coat puts a book down ", "fig_desc_score": 0.9,
}  # fmt: skip
CHARADES = "3MSZA 24.3 30.4##person turn a light on.\n3MSZA 24.3 30.4##person flipped the light switch.\n"
DIDEMO = {
    "num_segments": 6, "description": "someone kicks the ball.", "dl_link": "https://example.org", "annotation_id": 1,
    "times": [[4, 4], [4, 4], [0, 0], [4, 4], [0, 0], [0, 0], [4, 4]], "video": "262@N04_425_265c.m4v",
}  # fmt: skip
ACTIVITYNET = {
    "v_QOlSCBRmfWY": {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [17.37, 60.81]],
        "sentences": ["A young woman is seen standing.", " The girl dances."],
    },
    "v_ehGHCYKzyZ8": {"duration": 61.7, "timestamps": [[0, 5]], "sentences": [" A man rides."]},
}
TVR = {
    "vid_name": "friends_s01e03_seg02_clip_19", "duration": 61.46, "ts": [16.48, 33.87], "desc": "Phoebe eats. ",
    "type": "v", "desc_id": 90200,
}  # fmt: skip
QVHIGHLIGHTS = {
    "qid": 9467, "query": "Police stand in a group.", "duration": 142, "vid": "mpBDaqeaJIQ_60.0_210.0",
    "relevant_clip_ids": [35, 43], "saliency_scores": [[4, 3, 4], [4, 3, 2]],
    "relevant_windows": [[70, 72], [86, 112], [126, 130]],
}  # fmt: skip


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


FILES = {
    "fig": lines(FIG),
    "charades": CHARADES,
    "didemo": json.dumps([DIDEMO]),
    "activitynet": json.dumps(ACTIVITYNET),
    "tvr": lines(TVR),
    "qvhighlights": lines(QVHIGHLIGHTS),
    "generic": "text,video,start,end\na dog,v1,1.5,2\n",
}
READ = {
    "fig": [Moment("3_fig", "a person in a blue coat puts a book down ", "AO8RW", 0.0, 6.9, 33.67)],
    "charades": [
        Moment("3MSZA_1", "person turn a light on.", "3MSZA", 24.3, 30.4),
        Moment("3MSZA_2", "person flipped the light switch.", "3MSZA", 24.3, 30.4),
    ],
    "didemo": [Moment("1", "someone kicks the ball.", "262@N04_425_265c.m4v", 20.0, 25.0)],
    "activitynet": [
        Moment("v_QOlSCBRmfWY_1", "A young woman is seen standing.", "v_QOlSCBRmfWY", 0.83, 19.86, 82.73),
        Moment("v_QOlSCBRmfWY_2", "The girl dances.", "v_QOlSCBRmfWY", 17.37, 60.81, 82.73),
        Moment("v_ehGHCYKzyZ8_1", "A man rides.", "v_ehGHCYKzyZ8", 0.0, 5.0, 61.7),
    ],
    "tvr": [Moment("90200", "Phoebe eats.", "friends_s01e03_seg02_clip_19", 16.48, 33.87, 61.46)],
    "qvhighlights": [Moment("9467", "Police stand in a group.", "mpBDaqeaJIQ_60.0_210.0", 86.0, 112.0, 142.0)],
    "generic": [Moment("v1_1", "a dog", "v1", 1.5, 2.0)],
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_every_format_has_its_test() -> None:
    assert FILES.keys() == READ.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_read_and_told_by_its_contents(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "annotations", FILES[name])  # no ending to go by
    assert read_moments(path) == READ[name]
    assert read_moments(path, name) == READ[name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps([FIG], indent=2), "fig"),
        (json.dumps(ACTIVITYNET, indent=2), "activitynet"),
        (json.dumps(DIDEMO) + "\n", "didemo"),
        (json.dumps([TVR]), "tvr"),
        (json.dumps(QVHIGHLIGHTS, indent=1), "qvhighlights"),
        ("\n\n" + CHARADES.replace("\n", "\r\n"), "charades"),
        ("\ufeff" + FILES["generic"], "generic"),
        ("video\tstart\tend\ttext\nv1\t1.5\t2\ta dog\n", "generic"),
        ("Video;Start;End;Text\nv1;1.5;2;a dog\n", "generic"),
        (lines({"text": "a dog", "video": "v1", "span": [1.5, 2]}), "generic"),
        (lines({"sentence": " a dog", "video_id": "v1", "start_time": 1.5, "end_time": "2"}), "generic"),
    ],
)  # fmt: skip
def test_the_layout_does_not_matter(tmp_path: Path, text: str, expected: str) -> None:
    assert read_moments(write(tmp_path / "a", text)) == READ[expected]


def test_a_damaged_first_line_hides_no_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"video": \n' + lines(FIG))
    with pytest.raises(AnnotationError, match="line 1: not JSON"):  # as a FIG file, not as one unknown
        read_moments(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lines({"qid": 1, "query": "a", "pos_doc_id": "v"}), "JSON lines with 'qid', 'query', 'pos_doc_id'"),
        (json.dumps([{"a": 1}]), "a JSON array of objects with 'a'"),
        ("a,b\n1,2\n", "text that begins 'a,b'"),
        ("text,b\n1,2\n", "a table with 'text', 'b'"),
        ("[1, 2]", "nothing that can be read (entry 1: a row is an object, got int)"),
        ("", "nothing"),
        (lines({"desc": "a", "desc_id": 1, "clip": "v"}), "'clip'"),  # TVR's test file has nothing but the two
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "a.jsonl", text)
    with pytest.raises(AnnotationError, match="its format cannot be told") as caught:
        read_moments(path)
    assert str(path) in str(caught.value) and said in str(caught.value) and "qvhighlights" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("charades", CHARADES + "3MSZA 24.3##a light\n", "line 3: a line is 'VIDEO START END##sentence', got '3MSZA 24.3##"),
        ("charades", CHARADES + "3MSZA one 2##a light\n", "line 3: 'start' must be seconds, got 'one'"),
        ("didemo", json.dumps([DIDEMO, {**DIDEMO, "times": []}]), "entry 2: 'times' is empty"),
        ("didemo", json.dumps([DIDEMO, {**DIDEMO, "times": [[1, 2, 3]]}]), "entry 2: 'times' must be [start, end]"),
        ("didemo", lines(DIDEMO, {**DIDEMO, "annotation_id": None}), "line 2: 'annotation_id' must be int"),
        ("tvr", lines(TVR, {"desc": "a", "desc_id": 1, "ts": [0, 1]}), "line 2: key 'vid_name' is missing"),
        ("tvr", lines(TVR, {**TVR, "ts": [0, True]}), "line 2: 'ts' must be [start, end]"),
        ("qvhighlights", lines(QVHIGHLIGHTS, {**QVHIGHLIGHTS, "duration": "9"}), "line 2: 'duration' must be float"),
        ("qvhighlights", lines(QVHIGHLIGHTS, {**QVHIGHLIGHTS, "relevant_windows": 3}), "must be list, got 3"),
        ("activitynet", json.dumps({**ACTIVITYNET, "v_x": {"duration": 3}}), "video 'v_x': a video needs 'duration', 'times"),
        ("activitynet", json.dumps({**ACTIVITYNET, "v_x": {**ACTIVITYNET["v_ehGHCYKzyZ8"], "sentences": []}}), "got 1 and 0"),
        ("activitynet", json.dumps(ACTIVITYNET).replace("[17.37, 60.81]", "[17.37]"), "'v_QOlSCBRmfWY', sentence 2: 'timestamp'"),
        ("generic", FILES["generic"] + 'b,v1,1\n', "line 3: has 3 fields, the header 4"),
        ("generic", FILES["generic"] + '"b\n1",v1,1,2\nc,v1,x,2\n', "line 5: 'start' must be seconds, got 'x'"),
        ("generic", FILES["generic"] + "b" * 200_000 + ",v1,1,2\n", "line 3: field larger than field limit"),
        ("generic", FILES["generic"] + "b,v1,1,\n", "line 3: a span needs both ends, got '1' and ''"),
        ("generic", lines({"text": "a", "video": ["v"], "start": 0, "end": 1}), "line 1: 'video' must be a name"),
        ("generic", lines({"text": 3, "video": "v", "start": 0, "end": 1}), "line 1: 'text' must be str, got 3"),
        ("generic", lines({"text": "a", "start": 0, "end": 1}), "line 1: has no 'video' (or video_id, vid"),
        ("fig", lines({**FIG, "duration": 10**400}), "line 1: int too large"),
        ("fig", lines(FIG, "[" * 100_000), "line 2: not JSON"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(AnnotationError) as caught:
        read_moments(write(tmp_path / "a", text), name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "not JSON"),
        ('{"v_1": {"timestamps": [], "sentences": [], "duration": 1},\n "v_1": {}}', "key 'v_1' occurs twice"),
        ("text,video,start,end,text\na,v,0,1,b\n", "column 'text' occurs twice"),
    ],
)
def test_a_file_that_would_lose_something_is_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_moments(write(tmp_path / "a", text))


def test_wrong_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "a", CHARADES)
    with pytest.raises(ValueError, match="charades, didemo"):
        read_moments(path, "charade")
    with pytest.raises(ValueError, match="'one' or 'all'"):
        read_moments(path, spans="both")  # type: ignore[arg-type]


def test_queries_whose_truth_is_kept_back(tmp_path: Path) -> None:
    """The test files of TVR and QVHighlights, and rows of one's own with empty fields."""
    path = write(tmp_path / "a", lines({"desc": "Monica waves. ", "desc_id": 107711}))
    assert read_moments(path) == [Moment("107711", "Monica waves.")]
    kept_back = {key: QVHIGHLIGHTS[key] for key in ("qid", "query", "vid", "duration")}
    path = write(tmp_path / "b", lines(kept_back))
    assert read_moments(path) == [Moment("9467", "Police stand in a group.", "mpBDaqeaJIQ_60.0_210.0", duration=142.0)]
    path = write(tmp_path / "c.csv", "query_id,text,video,start,end,duration\nq7,a dog,,,,\n")
    assert read_moments(path) == [Moment("q7", "a dog")]


def test_ids_of_files_without_are_those_of_distinct_rows(tmp_path: Path) -> None:
    text = "v 0 1##a\nw 0 1##a\nv 0 2##a\nv 0 1##a\n"
    assert [one.query_id for one in read_moments(write(tmp_path / "a", text))] == ["v_1", "w_1", "v_2", "v_1"]


def test_ends_of_a_span_count_before_both_in_one(tmp_path: Path) -> None:
    row = {"text": "a", "video": "v", "start": 1, "end": 2, "span": [3, 4]}
    assert [(one.start, one.end) for one in read_moments(write(tmp_path / "a", lines(row)), "generic")] == [(1, 2)]


# Several spans for a query.

MANY = [(3, 5), (4, 6), (3, 6), (3, 4), (5, 6), (4, 5)]


@pytest.mark.parametrize(
    ("times", "span"),
    [
        ([(4, 4), (0, 0), (4, 4), (0, 0), (4, 4), (0, 0), (4, 4)], (4, 4)),  # three agree on either, four on one
        ([(1, 1), (2, 2), (2, 2), (1, 1)], (1, 1)),  # as many: the earlier
        ([(0, 1), (0, 2), (1, 2), (5, 5), (5, 5)], (0, 2)),  # two agree exactly, but three nearly
        ([(0, 0), (2, 2), (4, 4)], (0, 0)),
        ([(3, 5), (3, 3), (3, 5), (3, 3)], (3, 3)),  # as many, as early: the shorter
        ([(0, 0), (0, 0), (0, 0), *MANY], (0, 0)),  # three agree, though more come near to (3, 6)
        ([(2, 3)], (2, 3)),
        ([(3, 1), (2, 3)], (2, 3)),  # reversed: agrees with nobody
    ],
)  # fmt: skip
def test_annotators_agree(times: list[tuple[float, float]], span: tuple[float, float]) -> None:
    assert times[agreed(times)] == span
    assert times[::-1][agreed(times[::-1])] == span  # in whatever order they were asked


def test_agreement_is_what_the_benchmark_rates_highest() -> None:
    """No annotated span has a higher mean IoU with the three annotators nearest to it."""
    for times in ([(0, 1), (0, 2), (1, 2), (5, 5), (5, 5)], [(0, 0), (0, 0), (0, 0), *MANY], [(0, 0), (0, 1), (1, 1)]):

        def rated(one: tuple[int, int], times: list[tuple[int, int]] = times) -> float:
            sets = [set(range(first, last + 1)) for first, last in times]
            own = set(range(one[0], one[1] + 1))
            return sum(sorted((len(own & other) / len(own | other) for other in sets), reverse=True)[:3]) / 3

        assert rated(times[agreed(times)]) == pytest.approx(max(map(rated, times)))


def test_a_chunk_ends_with_its_video(tmp_path: Path) -> None:
    """The last of DiDeMo's chunks is shorter than 5 s in most videos; one that begins behind the end is left to the report."""
    path = write(tmp_path / "a", json.dumps([{**DIDEMO, "times": [[4, 5]]}, {**DIDEMO, "times": [[6, 6]]}]))
    spans = [(one.start, one.end, one.duration) for one in read_moments(path, durations={"262@N04_425_265c": 28.2})]
    assert spans == [(20.0, 28.2, 28.2), (30.0, 35.0, 28.2)]


def test_all_spans(tmp_path: Path) -> None:
    windows = read_moments(write(tmp_path / "a", lines(QVHIGHLIGHTS)), spans="all")
    assert [(one.query_id, one.start, one.end) for one in windows] == [
        ("9467", 70, 72), ("9467_2", 86, 112), ("9467_3", 126, 130),
    ]  # fmt: skip
    annotators = read_moments(write(tmp_path / "b", json.dumps([DIDEMO])), spans="all")
    assert [one.start for one in annotators] == [20, 20, 0, 20, 0, 0, 20]
    assert read_moments(write(tmp_path / "c", CHARADES), spans="all") == READ["charades"]


# Durations and videos.


def charades_csv(path: Path) -> Path:
    header = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
    return write(path, header + '3MSZA,X,"Room, 2",6,6,Yes,"A person, ""there""",light,on,c104 1.0 2.0;c1 0 3,30.96\n')


def test_durations_come_from_a_table_a_mapping_or_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", CHARADES + "OTHER 0 1##a\n")
    seconds = write(tmp_path / "lengths.json", '{"3MSZA": 30.96}')
    for durations in (
        charades_csv(tmp_path / "Charades_v1_train.csv"),
        {"3MSZA.mp4": 30.96},
        seconds,
        {"3MSZA": 30.96}.get,
    ):
        assert [one.duration for one in read_moments(path, durations=durations)] == [30.96, 30.96, None]


def test_what_a_row_says_of_its_duration_counts_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,video,start,end,length\na,v,0,1,9\nb,v,0,1,\n")
    assert [one.duration for one in read_moments(path, durations={"v": 5.0})] == [9.0, 5.0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "name,length\nv,3\n", "needs columns 'id' and 'length', has name, length"),
        ("a.csv", "id,length\nv,long\n", "must give each video its seconds"),
        ("a.csv", "id,length\nv\n", "must give each video its seconds"),
        ("a.json", "[1]", "must give each video its seconds"),
        ("a.json", None, "cannot be read"),
    ],
)
def test_durations_that_are_none(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(AnnotationError, match=message):
        lengths(tmp_path / name)


def test_videos_are_found_whatever_they_are_called(tmp_path: Path) -> None:
    for name in ("train/AO8RW.mp4", "x_60.0_210.0.MKV", "262@N04_425_265c.mp4", "note.txt", "AO8RX.mp4.part"):
        file = tmp_path / "videos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "videos" / "train" / "loop").symlink_to(tmp_path / "videos")
    videos = Videos(tmp_path / "videos")
    assert str(videos) == f"the 3 videos below '{tmp_path / 'videos'}'"
    assert videos.find("AO8RW") == str(tmp_path / "videos" / "train" / "AO8RW.mp4")
    assert videos.find("262@N04_425_265c.m4v") == str(tmp_path / "videos" / "262@N04_425_265c.mp4")
    assert (
        videos.find("262@N04_425_265c.") == videos.find("262@N04_425_265c.3g2") == videos.find("262@N04_425_265c.m4v")
    )
    assert videos.find("x_60.0_210.0") is not None
    assert [videos.find(name) for name in ("note", "AO8RX", "x_60", "")] == [None] * 4
    given = Videos(["a/v.mp4", "v", Path("w.webm"), "x_60.0"])
    assert given.find("x_60.5") is None  # what follows a dot is no ending unless it is a video's
    assert (given.find("v"), given.find("v.mp4"), given.find("w"), given.find("x")) == ("v", "v", "w.webm", None)
    with pytest.raises(ConfigError, match="is no folder"):
        Videos(tmp_path / "nowhere")


def test_the_videos_looked_for_are_those_that_are_indexed() -> None:
    assert EXTENSIONS == INDEXED


def test_durations_from_the_files(tmp_path: Path, films: Any) -> None:
    path = write(tmp_path / "a.txt", "good 0 1##a\nbad 0 1##b\nnone 0 1##c\ngood 1 2##d\n")
    found = read_moments(write(tmp_path / "b.txt", "good 0 1##a\nnone 0 1##c\n"), durations=probed(Videos(films)))
    assert [one.duration for one in found] == [pytest.approx(3.0), None]
    with pytest.raises(AnnotationError, match=r"line 2: video '.*bad\.mp4': the file is empty"):
        read_moments(path, durations=probed(Videos(films)))


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder with a video of 3 s and a file that is none."""
    import numpy as np

    from vsr1.video.encode import encode

    folder = tmp_path / "films"
    folder.mkdir()
    encode(folder / "good.mp4", np.zeros((6, 32, 32, 3), np.uint8), 2.0)
    (folder / "bad.mp4").touch()
    return folder
