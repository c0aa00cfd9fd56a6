"""A run folder with everything in it that a report can show, all of it made up, and a page that is read back."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

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
            {
                "turns": t,
                "vcmr": {k: share(v - 0.1 / t + gain) for k, v in overlaps.items()},
                **{"R@1": share(0.3 + 0.04 * t), "ver": share(0.95 - 0.01 * t), "answered": share(0.5 + 0.1 * t)},
            }
            for t in (1, 2, 3)
        ],
        "by_soft_tokens": [
            {"tokens": n, "R@1": share(0.37 + gain * (1 - math.exp(-n / 3)))}
            | ({"R@1 excluded": share(0.41 + 0.01 * n), "vcmr": {"0.5": share(0.4)}} if n in (0, 1, 2, 4, 8) else {})
            for n in range(9)
        ],
        "refinements": {
            "soft": {"tokens": share(8.0, 0.0), "R@1": share(0.42 + gain), "seconds": share(0.012, 0.001)},
            "hard": {"tokens": share(26.8, 1.5), "R@1": share(0.33), "seconds": share(0.41, 0.02)},
        },
        "public": {"verification": {"final": {"N": 480, "overall_acc": 0.931}}},
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
        "probability": {"matched": 0.93, "not_matched": 0.08, None: None}[answer],
        "soft_tokens": 8 if answer == "not_matched" else None, "hard_tokens": None,
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
    keys: dict[str, tuple[str, ...]] = {"sft": ("answer", "loss")}
    if grpo:
        keys["grpo"] = ("reward", "loss", "kl")
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
        {**trajectory(5, "a query that failed", [], "failed"), "failure": "video 'x.mp4': cannot be <read>"},
    ]
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """A page read back: headings, tables as text, how often each element and class occurs, and text without markup.

    An element that is not closed, or closed out of turn, fails.
    """

    void = frozenset({"meta", "br", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.counts: dict[str, int] = {}
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [tag, *(f".{name}" for name in (dict(attrs).get("class") or "").split())]
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + 1
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def rows(self, name: str) -> list[list[str]]:
        """The cells behind every row heading of that name."""
        return [row[1:] for table in self.tables for row in table if row[:1] == [name]]
