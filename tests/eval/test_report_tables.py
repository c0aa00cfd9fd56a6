"""The paper's table with published rows beside ours, and the figures that are drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from typing import Any

import pytest

from tests.eval.made_up_run import Page, share, stage
from vsr1.eval import calibration, figures, published, tables

Json = dict[str, Any]


def evaluation(dataset: str | None, **facts: Any) -> Json:
    baselines = {
        "zero-shot": {
            "vcmr": {"0.3": share(0.13), "0.5": share(0.07), "0.7": None},
            "ver": share(0.31),
            "R@1": share(0.2),
        },
        "fine-tuned one-shot": {"vcmr": {"0.3": share(0.2)}, "ver": share(0.7)},
    }
    found = {"split": "test", "baselines": baselines, "sft": stage(0.05), "grpo": stage(0.08), **facts}
    return found if dataset is None else {"dataset": dataset, **found}


def paper(given: Json) -> Page:
    return Page(tables.main_table(given, {name: given[name] for name in ("sft", "grpo") if name in given}))


def test_rows_are_the_papers_in_its_order() -> None:
    found = paper(evaluation(None))
    assert [row[0] for row in found.tables[0][2:]] == [
        "zero-shot", "fine-tuned one-shot", "first query, no loop", "ours, after SFT", "ours, after GRPO",
    ]  # fmt: skip
    assert found.tables[0][1] == ["", "0.3", "0.5", "0.7", "all turns", "R@1", "R@5", "R@10", "R@100"]
    assert found.rows("zero-shot") == [
        ["13.0 10.0 to 16.0", "7.0 4.0 to 10.0", "—", "31.0 28.0 to 34.0", "20.0 17.0 to 23.0", "—", "—", "—"]
    ]
    assert found.rows("ours, after GRPO")[0][3:5] == ["95.6 92.6 to 98.6", "45.0 42.0 to 48.0"]
    assert found.rows("first query, no loop")[0][4] == "37.0 34.0 to 40.0"


@pytest.mark.parametrize("dataset", [None, "tiny", "world"])
def test_nothing_is_said_to_be_published_of_other_data(dataset: str | None) -> None:
    text = tables.main_table(evaluation(dataset), {"sft": stage(0.05)})
    assert "published" not in text.lower()
    assert "public" not in text.lower()
    assert "points" not in text
    assert "Zero-shot</b>: the policy before any training" in text


def test_published_rows_stand_beside_ours_with_the_difference() -> None:
    found = paper(evaluation("charades", queries=3720, corpus_size=1334))
    lines = [row[0] for row in found.tables[0][2:]]
    assert lines.count("published") == lines.count("difference, points") == 4  # none was published after SFT alone
    after = lines.index("ours, after GRPO")
    assert lines[after + 1 :] == ["published", "difference, points"]
    ours, theirs, points = (row[1:] for row in found.tables[0][2 + after :])
    # VCMR at 0.3, 0.5, 0.7; VER over all turns and as the public code counts it; R@1, 5, 10, 100
    assert theirs == ["16.5", "13.4", "8.2", "75.7", "75.7", "24.6", "42.9", "52.2", "84.7"]
    assert points == ["+41.5", "+40.6", "+30.8", "+19.9", "+17.4", "+20.4", "+25.1", "+26.8", "+12.3"]
    assert ours[4] == "93.1"
    assert "VER, public" in found.text
    assert "2 queries failed" in found.text


def test_points_are_grey_where_the_published_figure_lies_in_our_interval() -> None:
    text = tables.main_table(evaluation("charades"), {})
    lines = re.findall(r'<tr class="points">.*?</tr>', text)
    zero_shot, one_shot = (re.findall(r'<span class="([a-z]*)">([-+][0-9.]+)<', line) for line in lines)
    assert zero_shot == [("", "+0.8"), ("", "-0.2"), ("", "+1.0")]
    assert one_shot == [("above", "+7.1"), ("below", "-4.7")]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"queries": 500, "corpus_size": 1334}, "these have 500 queries and not 3,720"),
        ({"queries": 3720, "corpus_size": 400}, "these have 400 videos in the corpus and not 1,334"),
        ({"split": "train"}, "these are of its split &#x27;train&#x27;"),
        ({"queries": 3720, "corpus_size": 1334}, "2 queries failed and are left out"),
    ],
)
def test_what_is_not_comparable_is_said(facts: Json, said: str) -> None:
    text = tables.main_table(evaluation("charades", **facts), {"grpo": stage(0.0)})
    assert said in text
    assert "not like for like" in text


@pytest.mark.parametrize(
    ("dataset", "facts", "said"),
    [
        (
            "activitynet",
            {"queries": 4, "corpus_size": 3},
            "its number of queries (these have 4) and of videos in the corpus",
        ),
        ("charades", {"queries": 3720}, "Not known here: its number of videos in the corpus."),
        ("charades", {"queries": 3720, "corpus_size": 1334}, "as ours are: as many queries and videos."),
    ],
)
def test_what_may_be_comparable_is_said(dataset: str, facts: Json, said: str) -> None:
    whole = {name: stage(0.0) | {"failed": 0} for name in ("sft", "grpo")}
    text = tables.main_table(evaluation(dataset, **facts, **whole), whole)
    assert said in text
    assert "not like for like" not in text


def test_points_of_a_figure_without_a_width_are_grey() -> None:
    given = evaluation("charades")
    given["baselines"] = {"zero-shot": {"vcmr": {"0.3": share(0.0, 0.0)}, "ver": share(0.9)}}
    points = re.search(r'<tr class="points">.*?</tr>', tables.main_table(given, {}))
    assert points is not None
    assert re.findall(r'<span class="([a-z]*)">([-+][0-9.]+)<', points[0]) == [("", "-12.2"), ("above", "+60.0")]


def test_published_figures_are_whole_rows() -> None:
    assert list(published.BENCHMARKS) == ["charades", "didemo", "activitynet"]
    for benchmark in published.BENCHMARKS.values():
        assert list(benchmark.rows) == [published.ZERO_SHOT, published.ONE_SHOT, published.EMBEDDER, published.METHOD]
        method = benchmark.rows[published.METHOD]
        values = [*method.vcmr.values(), *[-one for one in method.recall.values()]]
        assert all(high > low for high, low in pairwise(values[:3]))
        assert all(high > low for high, low in pairwise(values[3:]))
        for name in (published.ZERO_SHOT, published.ONE_SHOT):
            assert benchmark.rows[name].vcmr["0.5"] < method.vcmr["0.5"]
            assert (benchmark.rows[name].ver or 0) < (method.ver or 0)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_a_figure_is_the_same_each_time() -> None:
    points = {"sft": [(n, share(0.1 * n)) for n in range(3)]}
    assert figures.against({"a": points}, "turns") == figures.against({"a": points}, "turns")


def test_names_of_lines_that_end_together_stand_apart() -> None:
    lines = {
        name: [(turn, share(0.4 + place / 1000)) for turn in (1, 2, 3)] for place, name in enumerate(("sft", "grpo"))
    }
    texts = [
        one for one in parsed(figures.against({"panel": lines}, "turns")).iter("text") if one.text in ("SFT", "GRPO")
    ]
    heights = sorted(float(one.get("y", "nan")) for one in texts)
    assert len(heights) == 2
    assert heights[1] - heights[0] >= 10, heights


def test_bars_leave_out_columns_that_nobody_has() -> None:
    rows = {"soft": {"sft": {"R@1": share(0.4), "Time": None}}, "in words": {"sft": {"R@1": share(0.0, 0.0)}}}
    drawn = parsed(figures.bars({"R@1": ("percent", 100.0), "Time": ("seconds", 1.0)}, rows))
    texts = [one.text for one in drawn.iter("text")]
    assert "R@1" in texts
    assert "40.0" in texts
    assert "Time" not in texts


def test_a_cloud_of_ranks_is_one_query_a_dot() -> None:
    groups = {"right": [(5, 1), (1, 1)], "wrong": [(200, 3000)], "none": []}
    drawn = figures.ranks(groups)
    assert drawn.count("<use ") >= 3
    assert "right: 2 queries; wrong: 1 queries; none: 0 queries" in drawn
    assert "1,000" in [one.text for one in parsed(drawn).iter("text")]


def test_long_series_are_thinned_from_end_to_end() -> None:
    shown = figures.thinned(100_000, 400)
    assert (len(shown), shown[0], shown[-1]) == (400, 0, 99_999)
    assert figures.thinned(3).tolist() == [0, 1, 2]


def test_bins_of_probabilities() -> None:
    import numpy as np

    chance = np.array([0.02, 0.04, 0.95, 1.0, 0.5])
    right = np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    bins = calibration.reliability(chance, right)
    assert [(one.count, round(one.centre, 2), round(one.chance, 3), one.right) for one in bins] == [
        (2, 0.05, 0.03, 0.5), (1, 0.55, 0.5, 0.0), (2, 0.95, 0.975, 1.0),
    ]  # fmt: skip
    assert calibration.expected_error(bins) == pytest.approx((2 * 0.47 + 0.5 + 2 * 0.025) / 5)
    low, high = calibration.Bin(0.5, 50, 0.5, 0.5).interval()  # Wilson 1927; 25 of 50
    assert (low, high) == (pytest.approx(0.3664, abs=1e-4), pytest.approx(0.6336, abs=1e-4))
    assert calibration.Bin(0.5, 3, 0.5, 1.0).interval()[1] == 1.0
    assert "50 answers" in figures.reliability([calibration.Bin(0.5, 50, 0.5, 0.5)], figures.COLOURS["sft"])
