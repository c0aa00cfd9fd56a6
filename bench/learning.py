"""What a run learns: the README's table of results, written from the `eval.json` of finished runs.

    python -m bench.learning runs/tiny runs/tiny-seed-2

Every run is printed, with the mean of the runs behind it; the figures with an interval are those a conclusion rests on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.readme import replace

Figures = dict[str, Any]

ROWS: tuple[tuple[str, Callable[[Figures], Figures]], ...] = (
    ("VR R@1, first query", lambda stage: stage["before"]["R@1"]),
    ("VR R@1, last query", lambda stage: stage["after"]["R@1"]),
    ("VR R@10, first query", lambda stage: stage["before"]["R@10"]),
    ("VR R@10, last query", lambda stage: stage["after"]["R@10"]),
    ("VCMR, IoU ≥ 0.5, one turn", lambda stage: stage["vcmr_one_turn"]["0.5"]),
    ("VCMR, IoU ≥ 0.5, three turns", lambda stage: stage["vcmr"]["0.5"]),
    ("the same, excluded only", lambda stage: stage["ablations"]["exclusion only"]["vcmr"]["0.5"]),
    ("verification", lambda stage: stage["ver"]),
    ("mean IoU on accepted right videos", lambda stage: stage["mean_iou"]),
    (
        "right video second, after a wrong first",
        lambda stage: stage["ablations"]["refinement + exclusion"]["R@1 wrong"],
    ),
    ("the same, excluded only", lambda stage: stage["ablations"]["exclusion only"]["R@1 wrong"]),
    ("the same, random soft tokens", lambda stage: stage["ablations"]["random soft tokens"]["R@1 wrong"]),
    ("the same, soft tokens made before a blank video", lambda stage: stage["ablations"]["blank video"]["R@1 wrong"]),
)


def percent(value: float | None) -> str:
    """A share as a number of percent; a dash where there was nothing to measure."""
    return "-" if value is None else f"{100 * value:.1f}"


def cell(figures: Sequence[Figures]) -> str:
    """`mean (run, run)` of one figure over the runs."""
    values = [one.get("value") for one in figures]
    known = [value for value in values if value is not None]
    each = ", ".join(percent(value) for value in values)
    return f"{percent(mean(known) if known else None)} ({each})"


def interval(figure: Figures) -> str:
    """`+difference [low, high]` in points."""
    return f"{100 * figure['value']:+.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def table(runs: Sequence[Figures]) -> str:
    """The lines between the README's markers for these runs."""
    seeds = " and ".join(str(run["seed"]) for run in runs)
    minutes = ", ".join(f"{sum(run['stages_seconds'].values()) / 60:.0f}" for run in runs)
    first = runs[0]
    lines = [
        f"The default on 2 CPU cores, seeds {seeds}: {first['queries']} queries about {first['corpus_size']} test videos; "
        f"{minutes} minutes. Percent: mean (each seed).",
        "",
        "| test videos | after SFT | after GRPO |",
        "|---|---|---|",
    ]
    for name, read in ROWS:
        lines.append(
            f"| {name} | {cell([read(run['sft']) for run in runs])} | {cell([read(run['grpo']) for run in runs])} |"
        )
    lines += ["", "Differences in points, with 95 % intervals, seed by seed:", ""]
    pairs = {
        "refinement + exclusion over exclusion only, right video second": lambda run: run["grpo"]["refinement_gain"][
            "exclusion only"
        ],
        "over random soft tokens": lambda run: run["grpo"]["refinement_gain"]["random soft tokens"],
        "over soft tokens made before a blank video": lambda run: run["grpo"]["refinement_gain"]["blank video"],
        "GRPO over SFT, VCMR IoU ≥ 0.5": lambda run: run["difference"]["vcmr 0.5"],
        "GRPO over SFT, verification": lambda run: run["difference"]["ver"],
    }
    lines += [f"- {name}: " + "; ".join(interval(read(run)) for run in runs) for name, read in pairs.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with an eval.json")
    replace("results", table([json.loads((run / "eval.json").read_text()) for run in parser.parse_args().runs]))
