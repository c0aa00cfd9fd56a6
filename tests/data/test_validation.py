"""Every rule of validation finds what it names, does what it says, and says where; `vsr1 data check` prints it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsr1 import cli
from vsr1.data import validation
from vsr1.data.annotations import AnnotationError, read_fig, read_moments, write_fig
from vsr1.data.validation import RULES, Report, validate, validate_file
from vsr1.records import Moment

DOCS = Path(__file__).parents[2] / "docs" / "annotations.md"
NAN, INFINITY = math.nan, math.inf


def moment(
    start: float | None = 1.0, end: float | None = 2.0, duration: float | None = 9.0, **fields: object
) -> Moment:
    return Moment(
        **{"query_id": "q", "text": "a dog", "video_id": "v"} | fields, start=start, end=end, duration=duration
    )


def found(report: Report) -> list[tuple[str, str]]:
    return [(finding.rule, finding.outcome) for finding in report.findings]


@pytest.mark.parametrize(
    ("bad", "rule", "detail"),
    [
        (moment(text=" \n"), "no text", r"' \n'"),
        (moment(end=None), "half a truth", "start 1.0, end None"),
        (moment(start=None), "half a truth", "start None, end 2.0"),
        (moment(video_id=None), "half a truth", "video None"),
        (moment(start=NAN), "not finite", "start nan"),
        (moment(end=INFINITY), "not finite", "end inf"),
        (moment(duration=NAN), "not finite", "duration nan"),
        (moment(duration=INFINITY), "not finite", "duration inf"),
        (moment(duration=0.0), "no length", "0.0 s"),
        (moment(None, None, -1.0), "no length", "-1.0 s"),
        (moment(3.0, 2.0), "reversed", "ends at 2.0 s before it starts at 3.0 s"),
        (moment(-1.0, -2.0), "reversed", "ends at -2.0 s"),
        (moment(2.0, 2.0), "empty span", "at 2.0 s"),
        (moment(9.0, 11.0), "outside", "9.0 to 11.0 s, the video is 9.0 s long"),
        (moment(-3.0, 0.0), "outside", "-3.0 to 0.0 s, the video begins at 0 s"),
        (moment(-3.0, 0.0, None), "outside", "the video begins at 0 s"),
        (moment(video_id="w"), "missing video", "'w' is not among the 2 videos that were given"),
    ],
)
def test_what_is_refused(bad: Moment, rule: str, detail: str) -> None:
    good = moment(query_id="good", text="a cat")
    report = validate([bad, good], videos=["v.mp4", "u.mp4"])
    assert found(report) == [(rule, "refused")]
    assert detail in str(report.findings[0])
    assert report.findings[0].place == "moments, row 1"
    assert (report.rows, report.moments, report.videos) == (2, [good], {"v": "v.mp4"})
    with pytest.raises(
        AnnotationError, match=f"moments: 1 of 2 rows are refused, the first: moments, row 1 .*: {rule}"
    ):
        validate([bad, good], videos=["v.mp4", "u.mp4"], strict=True)


@pytest.mark.parametrize(
    ("before", "after", "rules"),
    [
        (moment(8.0, 9.5), moment(8.0, 9.0), ["ends after"]),
        (moment(-0.5, 2.0), moment(0.0, 2.0), ["starts before"]),
        (moment(-0.5, 2.0, None), moment(0.0, 2.0, None), ["starts before"]),
        (moment(-1.0, 10.0), moment(0.0, 9.0), ["starts before", "ends after"]),
    ],
)
def test_what_is_repaired(before: Moment, after: Moment, rules: list[str]) -> None:
    report = validate([before], strict=True)
    assert report.moments == [after]
    assert [finding.rule for finding in report.of("repaired")] == rules
    report = validate([before], repair=False)
    assert report.moments == []
    assert [finding.rule for finding in report.of("refused")] == rules
    with pytest.raises(AnnotationError, match=rules[0]):
        validate([before], repair=False, strict=True)


def test_what_is_clipped_says_what_it_was() -> None:
    [finding] = validate([moment(8.0, 9.5)]).findings
    assert str(finding) == "moments, row 1 (q): ends after: the end was 9.5 s, the video is 9.0 s long"


def test_identical_rows_are_dropped() -> None:
    twin, other = moment(), moment(text="a cat", query_id="other")
    report = validate([twin, other, twin, twin])
    assert report.moments == [twin, other]
    assert found(report) == [("identical", "dropped")] * 2
    assert str(report.findings[0]).startswith("moments, row 3 (q): identical: the same as row 1")
    assert found(validate([twin, twin], repair=False)) == [("identical", "refused")]


def test_identical_rows_that_are_repaired_are_so_once() -> None:
    assert found(validate([moment(8.0, 9.5), moment(8.0, 9.5)])) == [
        ("ends after", "repaired"),
        ("identical", "dropped"),
    ]


def test_an_id_belongs_to_one_query() -> None:
    texts = ["a", "b", "c", "d"]
    ids = ["q", "q", "q_2", "q"]  # q_2 is somebody's already
    report = validate([moment(text=text, query_id=name) for text, name in zip(texts, ids, strict=True)])
    assert [(one.query_id, one.text) for one in report.moments] == [
        ("q", "a"),
        ("q_3", "b"),
        ("q_2", "c"),
        ("q_4", "d"),
    ]
    assert found(report) == [("same id", "repaired")] * 2
    assert "'q' became 'q_3'" in str(report.findings[0])
    assert len(validate([moment(text="a"), moment(text="b")], repair=False).moments) == 1


def test_an_id_that_was_refused_is_free() -> None:
    report = validate([moment(3.0, 2.0), moment()])
    assert [one.query_id for one in report.moments] == ["q"]


def test_shared_texts_are_reported_and_kept() -> None:
    others = [moment(query_id="r", video_id="w"), moment(query_id="s", start=0.5), moment(query_id="t")]
    report = validate([moment(), *others])
    assert report.moments == [moment(), *others]
    assert found(report) == [("shared text", "reported")] * 3
    assert str(report.findings[0]) == "moments, row 2 (r): shared text: the text of row 1"


def test_what_is_not_known_is_reported() -> None:
    report = validate(
        [moment(duration=None), Moment("r", "a cat"), Moment("s", "a bird", "v", duration=9.0)], videos=["v"]
    )
    assert len(report.moments) == 3
    assert found(report) == [("no duration", "reported"), ("no truth", "reported"), ("no truth", "reported")]
    assert "no video" in str(report.findings[1]) and "no span in 'v'" in str(report.findings[2])


def test_queries_without_truth_may_share_a_text() -> None:
    """TVR's test file: each id wants its own predictions."""
    report = validate([Moment("1", "a dog"), Moment("2", "a dog")])
    assert len(report.moments) == 2 and found(report) == [("no truth", "reported")] * 2


def test_a_file_is_named_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "sta.txt"
    path.write_text("v 1 2##a dog\n\nv 3 2##a cat\nnonsense##\nv 8 12##a bird\nv 1 2##a dog\n")
    report = validate_file(path, durations={"v": 9.0})
    assert [(one.query_id, one.start, one.end) for one in report.moments] == [("v_1", 1, 2), ("v_3", 8, 9)]
    assert found(report) == [
        ("reversed", "refused"), ("unreadable", "refused"), ("ends after", "repaired"), ("identical", "dropped")
    ]  # fmt: skip
    assert [finding.place for finding in report.findings] == [f"{path}, line {number}" for number in (3, 4, 5, 6)]
    assert report.source == f"{path} (charades)" and report.rows == 5
    with pytest.raises(AnnotationError, match=r"2 of 5 rows are refused, the first: .*line 3"):
        validate_file(path, durations={"v": 9.0}, strict=True)
    assert validate_file(path, format="charades").of("reported")[0].rule == "no duration"


def test_spans_that_were_not_taken_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "qv.jsonl"
    row = {"qid": 1, "query": "a", "vid": "v", "duration": 9, "relevant_windows": [[0, 2], [4, 8]]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"qid": 2, "query": "b", "relevant_windows": [[0, 2]]}))
    report = validate_file(path)
    assert found(report) == [("several spans", "reported")]
    assert report.findings[0].detail == "4.0 to 8.0 s of 2 spans"
    assert len(validate_file(path, spans="all").moments) == 3


def test_the_report_prints_all_rules_and_the_rows_it_is_asked_for() -> None:
    rows = [moment(8.0, 9.0 + number, query_id=str(number), text=str(number)) for number in range(1, 6)]
    text = str(validate([moment(3.0, 2.0), *rows], source="x"))
    assert text.startswith("x: 6 rows; 5 moments of 1 videos; 1 refused, 5 repaired, 0 dropped, 0 reported\n")
    for rule in RULES.values():
        count = {"reversed": 1, "ends after": 5}.get(rule.name, 0)
        assert re.search(rf"^ +{count}  {rule.name} +{rule.outcome} +{re.escape(rule.when)}$", text, re.MULTILINE)
    assert "\nrefused, reversed:\nx, row 1 (q): reversed:" in text
    assert text.count("ends after: the end was") == 5
    short = validate([moment(3.0, 2.0), *rows], source="x").text(2)
    assert short.count("ends after: the end was") == 2 and "\nand 3 more" in short
    refused = validate(rows, repair=False).text()
    assert re.search(r"^ +5  ends after +refused ", refused, re.MULTILINE) and "\nrefused, ends after:\n" in refused


def test_a_finding_is_one_printable_line() -> None:
    [finding] = validate([moment(3.0, 2.0, query_id="a\n\x1b[2J")]).findings
    assert str(finding).isprintable() and "a\\n\\x1b[2J" in str(finding)


def test_docstring_and_docs_have_the_rules_as_they_are() -> None:
    assert validation.__doc__ is not None
    table = [" ".join(line.split()) for line in validation.__doc__.splitlines() if line.startswith("    ")]
    assert table == [f"{rule.name} {rule.outcome} {rule.when}" for rule in RULES.values()]
    rows = [f"| {rule.name} | {rule.outcome} | {rule.when} |" for rule in RULES.values()]
    assert "\n".join(rows) in DOCS.read_text()


# What is written is what is read, whatever the texts and ids hold.

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SECONDS = st.floats(0, 1e6)


@st.composite
def written(draw: st.DrawFn) -> list[Moment]:
    numbers = draw(st.lists(st.integers(0, 10**6), unique=True, max_size=5))
    moments = []
    for number in numbers:
        start, end = sorted((draw(SECONDS), draw(SECONDS)))
        duration = draw(st.floats(1e-3, 1e6))
        moments.append(Moment(f"{number}_fig", draw(TEXT), draw(TEXT), start, end, duration))
    return moments


@settings(max_examples=60, deadline=None)
@given(written())
def test_fig_round_trip(tmp_path_factory: pytest.TempPathFactory, moments: list[Moment]) -> None:
    path = tmp_path_factory.mktemp("fig") / "a.jsonl"
    write_fig(path, moments)
    assert read_fig(path) == read_moments(path, "fig") == moments
    if moments:
        assert read_moments(path) == moments


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(moment, *[st.floats() | st.none()] * 3, text=st.text(max_size=2), query_id=st.text(max_size=1)),
        max_size=8,
    )
)
def test_what_is_left_has_nothing_wrong(moments: list[Moment]) -> None:
    """Whatever goes in, what comes out is inside its video, has an id of its own, and comes out of a second round as it is."""
    report = validate(moments)
    gone = {finding.place for finding in report.findings if finding.outcome in ("refused", "dropped")}
    assert len(report.moments) + len(gone) == len(moments)
    assert len({one.query_id for one in report.moments}) == len(report.moments)
    for one in report.moments:
        if one.start is not None and one.end is not None:
            assert 0 <= one.start < one.end <= (INFINITY if one.duration is None else one.duration)
    again = validate(report.moments, strict=True)
    assert again.moments == report.moments and {finding.outcome for finding in again.findings} <= {"reported"}


# The command.


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `vsr1 data check ...`; returns exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["data", "check", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_check_prints_the_report(check: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    path = tmp_path / "sta.txt"
    path.write_text("".join(f"v 8 {10 + number}##a {number}\n" for number in range(25)))
    (tmp_path / "lengths.csv").write_text("id,length\nv,9\n")
    code, out, err = check(path, "--durations", tmp_path / "lengths.csv")
    assert (code, err) == (0, "")
    assert out == str(validate_file(path, durations={"v": 9.0})) + "\n" and "\nand 5 more\n" in out
    assert check(path, "--durations", tmp_path / "lengths.csv", "--all")[1].count("ends after: ") == 25
    code, out, _ = check(path, "--durations", tmp_path / "lengths.csv", "--no-repair")
    assert code == 1 and "0 moments of 0 videos; 25 refused" in out
    (tmp_path / "videos").mkdir()
    code, out, _ = check(path, "--videos", tmp_path / "videos")
    assert (
        code == 1
        and "line 25 (v_25): missing video: 'v' is not among the 0 videos below"
        in check(path, "--videos", tmp_path / "videos", "--all")[1]
    )
    (tmp_path / "videos" / "v.mp4").touch()
    assert check(path, "--videos", tmp_path / "videos")[0] == 0
    code, out, _ = check(path, "--videos", tmp_path / "videos", "--probe")
    assert code == 1 and "unreadable: video" in out and "the file is empty" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl"], "cannot be read"),
        (["own.txt"], "its format cannot be told"),
        (["own.txt", "--format", "webvtt"], "--format must be one of auto, fig, charades"),
        (["own.txt", "--probe"], "--videos FOLDER"),
        (["own.txt", "--format", "charades", "--videos", "nowhere"], "is no folder"),
        (["own.txt", "--probe", "--durations", "x"], "not allowed with"),
        ([], "file"),
    ],
)
def test_what_ends_with_2(
    check: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text("once upon a time\n")
    code, out, err = check(*arguments)
    assert (code, out) == (2, "")
    assert said in err and err.startswith("vsr1: ") and err.count("\n") == 1
