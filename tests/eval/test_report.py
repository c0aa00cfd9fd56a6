"""The report of a made-up run: complete, self-contained, and silent about what the run does not have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.eval.made_up_run import Page, share, write_run
from vsr1.errors import ConfigError
from vsr1.eval import report
from vsr1.eval.stills import FRAMES

HOSTILE = "</pre></script><script>alert('x')</script><img src=http://bad.example/x onerror=y>&amp;\"' $\\frac{$"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_run(tmp_path_factory.mktemp("runs") / "tiny <1>", steps=60)
    path = report.write_report(folder, lambda video_id: folder / f"{video_id}.mp4")
    assert path == folder / "report.html"
    assert not [path for path in folder.iterdir() if path.suffix in (".aside", ".tmp")]
    return path.read_text()


def test_the_page_has_every_section_and_is_well_formed(page: str) -> None:
    found = Page(page)
    assert not found.open
    assert found.headings == [
        "As in the paper", "What GRPO changed", "Soft tokens", "Turns", "Soft or in words", "Does refinement earn it?",
        "Single queries", "Learning", "Trajectories", "All figures", "Settings",
    ]  # fmt: skip
    assert found.counts["article"] == 6
    assert found.counts[".turn"] == 11
    assert (found.counts[".yes"], found.counts[".no"]) == (9, 2)
    assert found.counts["img"] == 10 * FRAMES + 4  # around 0 to 3 s there are but four, at one a second
    assert "Stage 2: GRPO" in found.text
    assert "that are not shown: 1." in found.text
    assert "Not in this folder" not in found.text


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    links = re.findall(r'(?:src|href|action|data)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", page))
    assert "http" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert "<title>tiny &lt;1&gt;" in page


def test_lines_of_facts_and_links_can_break(page: str) -> None:
    assert page.count("</span> <span>") == 4
    assert "</a><a" not in page


def keep(folder: Path, *names: str) -> None:
    """Leave in eval.json only these figures of the first stage, so that no others are drawn."""
    result = json.loads((folder / "eval.json").read_text())
    result["sft"] = {name: result["sft"][name] for name in names}
    (folder / "eval.json").write_text(json.dumps(result))


def test_links_and_ids_of_the_page_fit_each_other(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r'(?:href="#|url\(#|for=")([^")]+)', page))
    assert used <= set(ids)
    by_id: dict[str, set[str]] = {}
    for match in re.finditer(
        r'<(?:clipPath|path) id="([^"]+)"[^>]*>.*?(?=<(?:/defs|path|clipPath|g)\b)', page, re.DOTALL
    ):
        by_id.setdefault(match[1], set()).add(re.sub(r"\s+", "", match[0]))
    assert all(len(bodies) == 1 for bodies in by_id.values())


def test_every_figure_is_named_and_its_colours_are_the_pages(page: str) -> None:
    drawn = re.findall(r"<figure><svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 12
    for svg in drawn:
        named = re.search(r' role="img"><title>(.+?)</title><desc>(.+?)</desc>', svg)
        assert named is not None
        assert "nan" not in named[2]
        colours = set(re.findall(r"(?:fill|stroke): *(#[0-9a-f]+)", svg))
        assert colours <= {"#ffffff"}, colours
        variables = set(re.findall(r"var\(--([a-z]+)\)", svg))
        assert variables
        assert all(page.count(f"--{name}:") == 2 for name in variables)  # by day and by night


def test_figures_are_what_eval_json_says(page: str) -> None:
    found = Page(page)
    assert found.rows("R@1")[-1] == ["37.0 34.0 to 40.0 → 42.0 39.0 to 45.0", "37.0 34.0 to 40.0 → 45.0 42.0 to 48.0"]
    assert found.rows("IoU ≥ 0.5")[0] == ["51.0 48.0 to 54.0", "54.0 51.0 to 57.0"]
    assert found.rows("unparsable answers") == [["0.4 0.2 to 0.6", "0.4 0.2 to 0.6"]]
    assert found.rows("soft tokens a refinement") == [["8.0", "8.0"]]
    assert found.rows("failed queries, left out") == [["2", "2"]]
    assert "2 of 3 do not" in found.text  # R@1 and VER; VCMR holds zero, mean IoU is undefined
    assert found.rows("right answers, all turns")[0] == ["-2.0 -3.0 to -1.0"]


def test_what_varies_is_in_tables_beside_its_figures(page: str) -> None:
    found = Page(page)
    by_tokens = next(table for table in found.tables if table[0][0] == "soft tokens")
    assert by_tokens[0][3] == "R@1, rejected videos excluded, SFT"
    assert by_tokens[3][0:2] == ["2", "39.4 36.4 to 42.4"]
    assert by_tokens[4][3] == "—"  # three soft tokens: only R@1 is there
    assert by_tokens[5][3] == "45.0 42.0 to 48.0"
    by_turns = [table for table in found.tables if table[0][0] == "turns"]
    assert [table[2][1] for table in by_turns] == ["50.0 47.0 to 53.0", "38.0 35.0 to 41.0"]
    assert by_turns[1][0][1::2] == ["R@1, last query, SFT", "VER, all turns, SFT", "Queries with a video accepted, SFT"]
    assert found.rows("in words") == [
        ["26.8 25.3 to 28.3"] * 2 + ["33.0 30.0 to 36.0"] * 2 + ["0.410 0.390 to 0.430"] * 2
    ]
    assert found.rows("exclusion only")[0][:3] == ["45.8 42.8 to 48.8", "48.8 45.8 to 51.8", "23.8 20.8 to 26.8"]


def test_ranks_and_probabilities_are_counted(page: str) -> None:
    found = Page(page)
    assert "Rank before and after: 4 improved, 1 equal, 0 worse" in found.text
    assert found.rows("right video accepted") == [["2", "1", "0"]]
    assert found.rows("wrong video accepted") == [["1", "0", "0"]]
    assert found.rows("none accepted") == [["1", "0", "0"]]
    # of ten answers six say 0.08, all of them of wrong videos; four say 0.93, one of them of a wrong one
    assert found.rows("0.08") == [["0.00", "6"]]
    assert found.rows("0.93") == [["0.75", "4"]]
    assert "10 answers; expected calibration error 12.0 %" in found.text


@pytest.mark.parametrize("queries", [50, 500, 900])
def test_figures_of_ablations_json_join_those_of_eval_json(tmp_path: Path, queries: int) -> None:
    """One by one where both are over as many queries; else those over more are shown, and never both side by side."""
    folder = write_run(tmp_path / "run", grpo=False, steps=1)
    keep(folder, "ablations", "by_turns", "queries")
    (folder / "log.jsonl").unlink()
    more = {
        "queries": queries,
        "sft": {"ablations": {"rocchio": {"R@1": share(0.271)}, "exclusion only": {"R@1": share(0.111)}}},
        "baselines": {"zero-shot": {"vcmr": {"0.5": share(0.07)}, "ver": share(0.3), "R@1": share(0.2)}},
    }
    (folder / "ablations.json").write_text(json.dumps(more))
    (folder / "trajectories.jsonl").write_text("")
    found = Page(report.write_report(folder, lambda video_id: folder / "none").read_text())
    left, rocchio = ["23.8 20.8 to 26.8", "49.8 46.8 to 52.8"], ["27.1 24.1 to 30.1"]
    if queries == 50:
        assert not found.rows("rocchio")
        assert found.rows("exclusion only")[0] == ["45.8 42.8 to 48.8", *left]
        assert "Not shown: ablations.json after SFT, over 50 queries and not 500." in found.text
    elif queries == 500:
        assert found.rows("rocchio")[0] == [*rocchio, "—", "—"]
        assert found.rows("exclusion only")[0] == ["11.1 8.1 to 14.1", *left]
    else:
        assert found.rows("rocchio")[0] == rocchio
        assert found.rows("exclusion only") == [["11.1 8.1 to 14.1"]]
        assert not found.rows("random soft tokens")
    assert found.rows("zero-shot")[0][1] == "7.0 4.0 to 10.0"
    assert (f"Of ablations.json, over {queries} queries and not 500: zero-shot." in found.text) == (queries != 500)
    assert "queries 500" in found.text
    assert len(next(table for table in found.tables if table[0][0] == "turns")) == 4


def test_baselines_of_fewer_queries_replace_none(tmp_path: Path) -> None:
    for name, queries, value in (("eval.json", 500, 0.2), ("ablations.json", 50, 0.9)):
        given = {"queries": queries, "baselines": {"zero-shot": {"ver": share(value)}}}
        (tmp_path / name).write_text(json.dumps(given))
    found = Page(report.write_report(tmp_path, lambda video_id: tmp_path / "none").read_text())
    assert found.rows("zero-shot")[0][3] == "20.0 17.0 to 23.0"
    assert ".warning" not in found.counts


def test_conditions_over_some_of_the_queries_say_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", grpo=False, steps=1)
    keep(folder, "ablations", "by_soft_tokens", "refinements", "queries")
    result = json.loads((folder / "eval.json").read_text())
    result["sft"]["compared"] = {"queries": 100, "measured": 98}
    (folder / "eval.json").write_text(json.dumps(result))
    text = Page(report.write_report(folder, lambda video_id: folder / "none").read_text()).text
    assert text.count("All conditions are over the same 98 of 500 queries after SFT.") == 3


@pytest.mark.parametrize("queries", [4, 500])
def test_few_queries_are_called_few(tmp_path: Path, queries: int) -> None:
    (tmp_path / "eval.json").write_text(json.dumps({"queries": queries, "sft": {"vcmr": {"0.5": share(0.5)}}}))
    text = Page(report.write_report(tmp_path, lambda video_id: tmp_path / "none").read_text()).text
    assert ("4 queries are few" in text) == (queries == 4)


def test_a_run_without_grpo_and_controls_leaves_them_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", grpo=False, steps=1)
    result = json.loads((folder / "eval.json").read_text())
    for key in ("ablations", "by_soft_tokens", "by_turns", "tokens", "refinement_gain", "refinements"):
        del result["sft"][key]
    result["sft"]["mean_iou"] = {"value": None, "low": None, "high": None}
    del result["stages_seconds"]
    (folder / "eval.json").write_text(json.dumps(result))
    (folder / "trajectories.jsonl").write_text("")
    text = report.write_report(folder, lambda video_id: folder / "none").read_text()
    assert Page(text).headings == ["As in the paper", "Learning", "All figures", "Settings"]
    assert "GRPO" not in text
    assert "nan" not in text


@pytest.mark.parametrize("stage", [{"queries": 3}, {"vcmr": {"0.5": None}, "by_turns": [], "ablations": {"a": {}}}])
def test_a_stage_that_holds_next_to_nothing_makes_no_holes(tmp_path: Path, stage: dict[str, Any]) -> None:
    (tmp_path / "eval.json").write_text(json.dumps({"sft": stage}))
    text = report.write_report(tmp_path, lambda video_id: tmp_path / "none").read_text()
    found = Page(text)
    assert found.headings in (["Settings"], ["As in the paper", "Settings"])
    assert not any(hole in text for hole in ("nan", "None", "<tbody></tbody>", "<div></div>"))
    assert "Not in this folder, and so not in this report: log.jsonl, trajectories.jsonl." in found.text


@pytest.mark.parametrize("name", report.PARTS)
def test_one_part_of_a_run_is_enough(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", grpo=False, steps=1)
    keep(folder, "before", "after", "vcmr")
    for other in (*report.PARTS, "config.yaml"):
        if other != name:
            (folder / other).unlink()
    shown = {"eval.json": "All figures", "log.jsonl": "Learning", "trajectories.jsonl": "Trajectories"}
    headings = Page(report.write_report(folder, lambda video_id: folder / "none").read_text()).headings
    assert shown.pop(name) in headings
    assert not set(shown.values()) & set(headings)


def test_a_folder_without_any_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match=r"has none of eval.json, log.jsonl, trajectories.jsonl"):
        report.write_report(tmp_path, lambda video_id: tmp_path / video_id)
    assert not (tmp_path / "report.html").exists()


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", grpo=False, steps=1)
    with (folder / "trajectories.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ConfigError, match=r"trajectories.jsonl line 7' is not JSON"):
        report.write_report(folder, lambda video_id: folder / video_id)
    (folder / "trajectories.jsonl").write_text("")
    (folder / "eval.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds none of sft, grpo, given"):
        report.write_report(folder, lambda video_id: folder / video_id)


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", grpo=False, steps=1)
    keep(folder, "vcmr")
    result = json.loads((folder / "eval.json").read_text())
    result |= {"dataset": HOSTILE, "split": HOSTILE, "seed": HOSTILE, "stages_seconds": {HOSTILE: 1.0}}
    result["sft"]["ablations"] = {HOSTILE: {"R@1": share(0.2)}}
    result["sft"]["refinement_gain"] = {HOSTILE: share(0.2)}
    (folder / "eval.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text(HOSTILE)
    (folder / "log.jsonl").write_text(json.dumps({"time": 1, "stage": HOSTILE, "step": 1, HOSTILE: 2.0}))
    rows = [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"text": HOSTILE, "query_id": HOSTILE, "failure": HOSTILE}
        row["video_id"] = HOSTILE if row["video_id"] == "video-0" else row["video_id"]
        for turn in row["turns"]:
            turn |= {"text": HOSTILE, "video_id": HOSTILE if turn["video_id"] == "video-0" else turn["video_id"]}
    rows[0]["fallback"] = {"video_id": HOSTILE, "start": 1.0, "end": 2.0}
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.write_report(folder, lambda video_id: folder / "none" / video_id[:20]).read_text()
    found = Page(text)
    assert not found.open
    assert "script" not in found.counts
    assert "img" not in found.counts
    assert found.text.count("onerror=y") > 20


def test_a_large_run_makes_no_large_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", grpo=False, steps=1)
    keep(folder, "vcmr")
    clock = ({"time": 1.0, "stage": "sft", "step": n, "loss": 1.0 / (n + 1) + n % 7} for n in range(10_000))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in clock))
    (folder / "config.yaml").write_text("a: 1\n" * 200_000)
    rows = [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] *= 100
        row["turns"] = [turn | {"text": turn["text"] * 100} for turn in row["turns"]] * 5
    many = [row | {"text": "a", "turns": [turn | {"text": "b"} for turn in row["turns"][:1]]} for row in rows * 400]
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *many]))
    text = report.write_report(folder, lambda video_id: folder / "none").read_text()
    assert len(text) < 1 << 20
    assert f"{figures_drawn(text):,} of 2,005 are drawn" in text
    assert "more characters)" in text
    assert "more turns." in text


def figures_drawn(text: str) -> int:
    """Dots of the scatter plot of ranks; three more stand in its legend."""
    drawn = re.search(r"<title>Rank of the right video.*?</svg>", text, re.DOTALL)
    assert drawn is not None
    return drawn[0].count("<use ") - 3
