"""The report of a made-up run: complete, self-contained, and silent about what the run does not have."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsr1.errors import ConfigError
from vsr1.eval import figures, report
from vsr1.video import encode

Json = dict[str, Any]
NAMES = [
    "refinement + exclusion",
    "exclusion only",
    "refinement only",
    "no refinement",
    "random soft tokens",
    "blank video",
    "shuffled video",
]


def share(value: float, half: float = 0.03) -> Json:
    return {"value": value, "low": value - half, "high": value + half}


def stage(gain: float) -> Json:
    ranks = {"R@1": 0.37, "R@5": 0.6, "R@10": 0.71, "R@100": 0.96, "MRR": 0.48}
    overlaps = {"0.3": 0.5, "0.5": 0.46, "0.7": 0.31}
    ablations = {}
    for place, name in enumerate(NAMES):
        lost = gain - 0.012 * place
        ablations[name] = {
            "R@1": share(0.42 + lost),
            "R@1 wrong": share(0.2 + lost),
            "vcmr": {k: share(v + lost) for k, v in overlaps.items()},
        }
    return {
        "before": {k: share(v) for k, v in ranks.items()},
        "after": {k: share(min(v + gain, 0.97)) for k, v in ranks.items()},
        "vcmr": {k: share(v + gain) for k, v in overlaps.items()},
        "vcmr_one_turn": {k: share(v - 0.1) for k, v in overlaps.items()},
        **{"ver": share(0.956), "ver_turn1": share(0.94), "ver_final": share(0.96), "unparsable": share(0.004, 0.002)},
        "mean_iou": share(0.89),
        "tokens": {"text": share(41.3), "soft": {"value": 8.0, "low": 8.0, "high": 8.0}},
        "queries": 500,
        "failed": 2,
        "by_turns": [
            {"turns": t, "vcmr": {k: share(v - 0.1 / t + gain) for k, v in overlaps.items()}} for t in (1, 2, 3)
        ],
        "by_soft_tokens": [{"tokens": n, "R@1": share(0.37 + gain * (1 - math.exp(-n / 3)))} for n in range(9)],
        "ablations": ablations,
        "refinement_gain": {name: share(0.012 * place + 0.01) for place, name in enumerate(NAMES) if place},
    }


def turn(video: str, rank: int, answer: str | None, span: Any = (None, None)) -> Json:
    said = {
        "matched": f"0 to 3 s small != purple = cross = grow\n3 to 8 s small = purple = cross = grow\n"
        f"<answer>matched</answer><start>{span[0]}</start><end>{span[1]}</end>",
        "not_matched": "0 to 4 s large != red = ring = still != other <script>alert(1)</script>\n"
        "<answer>not_matched</answer><REFINE>",
        None: "0 to 4 s large != red",
    }[answer]
    score = 0.7 - 0.02 * rank
    return {
        "video_id": video, "score": score, "rank": rank, "text": said,
        "answer": answer, "start": span[0], "end": span[1],
    }  # fmt: skip


def trajectory(number: int, text: str, turns: list[Json], stop: str) -> Json:
    ranks = {"first_rank": turns[0]["rank"] if turns else None, "final_rank": turns[-1]["rank"] if turns else None}
    truth = {"video_id": "video-0", "start": 4.0, "end": 8.0, "duration": 12.0}
    return {"query_id": f"q{number}", "text": text, **truth, "stop": stop, **ranks, "turns": turns}


def write_run(folder: Path, grpo: bool = True, steps: int = 200) -> Path:
    """A run folder with four video files beside it, and everything else made up."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = np.full((12, 64, 64, 3), (36, 40, 60), dtype=np.uint8)
        for t in range(12):
            pixels[t, 20:36, 4 * t : 4 * t + 16] = [(200, 60, 160), (80, 190, 220), (240, 180, 60), (120, 220, 90)][
                number
            ]
        encode(folder / f"video-{number}.mp4", pixels, 1.0)
    (folder / "config.yaml").write_text("preset: tiny\nseed: 1\nsft:\n  learning_rate: 0.0015\n  steps: 540\n")
    clock, lines = 1_790_000_000.0, []
    keys = {
        "vision": ("loss", "accuracy"),
        "embedder": ("loss", "caption", "contrastive", "R@1"),
        "sft": ("loss", "answer", "retrieval", "learning_rate", "gradient_norm"),
    }
    if grpo:
        keys["grpo"] = ("reward", "answer_reward", "retrieval_reward", "kl", "entropy", "skipped_groups")
    for name, quantities in keys.items():
        for step in range(1, steps + 1):
            clock += 0.4
            falling = math.exp(-step / 50)
            numbers = {
                key: (falling if place == 0 and name != "grpo" else 1 - falling) + 0.08 * generator.standard_normal()
                for place, key in enumerate(quantities)
            }
            lines.append(json.dumps({"time": clock, "stage": name, "step": step, **numbers}))
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"time": 17900')
    result = {
        "seed": 1, "split": "test", "queries": 500, "corpus_size": 400,
        "stages_seconds": {"world": 31.0, "vision": 82.4, "embedder": 160.0, "sft": 201.2, "eval": 10.4},
        "sft": stage(0.05),
    }  # fmt: skip
    if grpo:
        result["grpo"] = stage(0.08)
        result["difference"] = {
            "before R@1": share(0.0, 0.0), "after R@1": share(0.03, 0.02), "vcmr 0.5": share(0.03, 0.035),
            "ver": share(-0.02, 0.01), "mean_iou": {"value": None, "low": None, "high": None},
            "text": share(0.4, 0.1),
        }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps(result))
    hit, miss = turn("video-0", 1, "matched", (3.5, 8.0)), turn("video-1", 5, "not_matched")
    query = "a small plum cross grows on a striped teal ground"
    rows = [
        trajectory(0, query, [miss, turn("video-2", 3, "not_matched"), hit], "matched"),
        trajectory(1, query, [hit], "matched"),
        trajectory(2, query, [miss, turn("video-3", 2, "matched", (0.0, 3.0))], "matched"),
        trajectory(3, query, [miss, turn("video-2", 4, None), turn("video-3", 4, "not_matched")], "turns"),
        trajectory(4, query, [miss, hit], "matched"),
        trajectory(5, "a query that failed", [], "failed"),
    ]
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """Headings, cards, and whether every element is closed."""

    void = frozenset({"meta", "br", "img", "rect", "path", "use", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attrs:
            if name == "class" and value:
                self.counts["." + value] = self.counts.get("." + value, 0) + 1
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_run(tmp_path_factory.mktemp("runs") / "tiny <1>")
    path = report.write_report(folder, lambda video_id: folder / f"{video_id}.mp4")
    assert path == folder / "report.html"
    assert not [path for path in folder.iterdir() if path.suffix in (".aside", ".tmp")]
    return path.read_text()


def test_the_page_has_every_section_and_is_well_formed(page: str) -> None:
    found = Page(page)
    assert found.open == ["html"] or not found.open
    assert found.headings == [
        "Results", "What GRPO changed", "Does refinement earn it?", "Soft tokens", "Turns", "Learning",
        "Trajectories", "Settings",
    ]  # fmt: skip
    assert found.counts["article"] == 5
    assert found.counts[".turn"] == 11
    assert (found.counts[".answer yes"], found.counts[".answer no"]) == (9, 2)
    assert found.counts["img"] == 11 * report.FRAMES
    assert "Stage 2: GRPO" in page
    assert "that are not shown: 1." in page


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    links = re.findall(r'(?:src|href|action|data)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<title>tiny &lt;1&gt;" in page


def test_figures_are_what_eval_json_says(page: str) -> None:
    text = re.sub(r"<[^>]+>", " ", page)
    text = re.sub(r"\s+", " ", text)
    assert "R@1 37.0 34.0 to 40.0 → 42.0 39.0 to 45.0 37.0 34.0 to 40.0 → 45.0 42.0 to 48.0" in text
    assert "IoU ≥ 0.5 51.0 48.0 to 54.0 54.0 51.0 to 57.0" in text
    assert "unparsable answers 0.4 0.2 to 0.6" in text
    assert "soft tokens a refinement 8.0 8.0 failed queries, left out 2 2" in text
    assert "2 of 3 do not" in text  # R@1 and VER; VCMR holds zero, mean IoU is undefined
    assert "Of 5: 2 won after refinement, 1 won at once, 1 false accept, 1 never found" in text
    assert "its rank: 5 → 3 → 1 → 1 (last query)" in text


def test_ids_of_inline_figures_do_not_collide(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used <= set(ids)
    by_id: dict[str, set[str]] = {}
    for match in re.finditer(
        r'<(?:clipPath|path) id="([^"]+)"[^>]*>.*?(?=<(?:/defs|path|clipPath|g)\b)', page, re.DOTALL
    ):
        by_id.setdefault(match[1], set()).add(re.sub(r"\s+", "", match[0]))
    assert all(len(bodies) == 1 for bodies in by_id.values())


def test_a_run_without_grpo_and_controls_leaves_them_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", grpo=False, steps=1)
    result = json.loads((folder / "eval.json").read_text())
    for key in ("ablations", "by_soft_tokens", "by_turns", "tokens", "refinement_gain"):
        del result["sft"][key]
    result["sft"]["mean_iou"] = {"value": None, "low": None, "high": None}
    del result["stages_seconds"]
    (folder / "eval.json").write_text(json.dumps(result))
    (folder / "trajectories.jsonl").write_text("")
    text = report.write_report(folder, lambda video_id: folder / "none").read_text()
    assert Page(text).headings == ["Results", "Learning", "Settings"]
    assert "GRPO" not in text
    assert "nan" not in text


def test_a_video_that_cannot_be_decoded_is_said_in_its_place(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", grpo=False, steps=1)
    (folder / "log.jsonl").write_text("")
    (folder / "video-1.mp4").write_bytes(b"not a video")
    text = report.write_report(folder, lambda video_id: folder / f"{video_id}.mp4").read_text()
    assert Page(text).counts[".broken"] == 4
    assert "video-1.mp4&#x27;:" in text


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "eval.json", "trajectories.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"has no {name}: "):
        report.write_report(folder, lambda video_id: folder / video_id)
    assert not (folder / "report.html").exists()


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    with (folder / "trajectories.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ConfigError, match=r"trajectories.jsonl line 7' is not JSON"):
        report.write_report(folder, lambda video_id: folder / video_id)
    (folder / "eval.json").write_text("{}")
    (folder / "trajectories.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"holds neither 'sft' nor 'grpo'"):
        report.write_report(folder, lambda video_id: folder / video_id)


def test_the_gallery_fills_places_a_kind_leaves_free() -> None:
    won = trajectory(0, "a", [turn("video-0", 1, "matched", (4.0, 8.0))], "matched")
    lost = trajectory(1, "b", [turn("video-1", 2, "not_matched")], "turns")
    failed = trajectory(2, "c", [], "failed")
    kinds = [kind for kind, _ in report._chosen([failed, won, lost, *[won] * 20])]
    assert kinds == ["won at once"] * 7 + ["never found"]
    assert report._chosen([failed]) == []


def test_a_figure_is_the_same_each_time() -> None:
    points = {"sft": [(n, share(0.1 * n)) for n in range(3)]}
    assert figures.against({"a": points}, "turns") == figures.against({"a": points}, "turns")


def test_a_span_bar_is_drawn_to_scale() -> None:
    drawn = ElementTree.fromstring(figures.span_bar({"true": (3.0, 6.0), "said": (9.0, 20.0)}, 12.0))
    boxes = [(box.get("x"), box.get("width")) for box in drawn.iter("rect")]
    assert boxes == [("0", "100%"), ("25.00%", "25.00%"), ("75.00%", "25.00%")]
    empty = ElementTree.fromstring(figures.span_bar({"true": None, "said": (None, 3.0)}, 12.0))
    assert len(list(empty.iter("rect"))) == 1


@pytest.mark.parametrize("height", [64, 480])
def test_frames_are_neither_tiny_nor_huge(height: int) -> None:
    import base64
    import io

    from PIL import Image

    page = figures.strip([np.zeros((height, 2 * height, 3), np.uint8)], [1.25])
    data = re.search(r"base64,([^\"]+)", page)
    assert data is not None
    image = Image.open(io.BytesIO(base64.b64decode(data[1])))
    assert image.size == ((384, 192) if height == 64 else (480, 240))
    assert "1.2 s" in page


def test_names_of_lines_that_end_together_stand_apart() -> None:
    lines = {name: [(turn, share(0.4 + place / 1000)) for turn in (1, 2, 3)] for place, name in enumerate("abc")}
    drawn = ElementTree.fromstring(figures.against({"panel": lines}, "turns"))
    texts = [one for one in drawn.iter("{http://www.w3.org/2000/svg}text") if one.text in lines]
    heights = sorted(float(one.get("y", "nan")) for one in texts)
    assert len(heights) == 3
    assert all(below - above >= 10 for above, below in pairwise(heights)), heights
