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

METHOD = "refinement + exclusion"
ROWS: tuple[tuple[str, Callable[[Figures], Figures]], ...] = (
    ("VR R@1, first query", lambda stage: stage["before"]["R@1"]),
    ("VR R@1, last query", lambda stage: stage["after"]["R@1"]),
    ("VR R@10, first query", lambda stage: stage["before"]["R@10"]),
    ("VR R@10, last query", lambda stage: stage["after"]["R@10"]),
    ("R@1, last query, rejected videos excluded", lambda stage: stage["ablations"][METHOD]["R@1"]),
    ("the same, excluded only", lambda stage: stage["ablations"]["exclusion only"]["R@1"]),
    ("VCMR, IoU ≥ 0.5, one turn", lambda stage: stage["vcmr_one_turn"]["0.5"]),
    ("VCMR, IoU ≥ 0.5, three turns", lambda stage: stage["vcmr"]["0.5"]),
    ("the same, excluded only", lambda stage: stage["ablations"]["exclusion only"]["vcmr"]["0.5"]),
    ("the same, with answers fallen back on", lambda stage: stage["answered"]["0.5"]),
    ("verification", lambda stage: stage["ver"]),
    ("mean IoU on accepted right videos", lambda stage: stage["mean_iou"]),
    ("right video second, after a wrong first", lambda stage: stage["ablations"][METHOD]["R@1 wrong"]),
    *(
        (f"the same, {name}", lambda stage, key=key: stage["ablations"][key]["R@1 wrong"])
        for name, key in {
            "excluded only": "exclusion only",
            "refined in words": "refinement in words",
            "random soft tokens": "random soft tokens",
            "soft tokens made before a blank video": "blank video",
        }.items()
    ),
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


PAIRS: dict[str, Callable[[Figures], Figures]] = {
    "refinement + exclusion over exclusion only, right video second": lambda run: run["grpo"]["refinement_gain"][
        "exclusion only"
    ],
    "over refinement in words": lambda run: run["grpo"]["refinement_gain"]["refinement in words"],
    "over random soft tokens": lambda run: run["grpo"]["refinement_gain"]["random soft tokens"],
    "over soft tokens made before a blank video": lambda run: run["grpo"]["refinement_gain"]["blank video"],
    "GRPO over SFT, VCMR IoU ≥ 0.5": lambda run: run["difference"]["vcmr 0.5"],
    "GRPO over SFT, R@1, last query, rejected videos excluded": lambda run: run["difference"]["R@1 excluded"],
    "GRPO over SFT, verification": lambda run: run["difference"]["ver"],
}


def pooled(figures: Sequence[Figures]) -> Figures:
    """The mean of independent runs' differences, its interval by adding their variances (intervals of 1.96 deviations)."""
    deviations = [(one["high"] - one["low"]) / 3.92 for one in figures]
    value = mean(one["value"] for one in figures)
    reach = 1.96 * sum(one**2 for one in deviations) ** 0.5 / len(figures)
    return {"value": value, "low": value - reach, "high": value + reach}


def differences(figures: Sequence[Figures]) -> str:
    """`+all [low, high] (+run [low, high]; ..)` in points."""
    each = "; ".join(interval(one) for one in figures)
    return f"{interval(pooled(figures))} ({each})" if len(figures) > 1 else each


def table(runs: Sequence[Figures]) -> str:
    """The lines between the README's markers for these runs."""
    seeds = " and ".join(str(run["seed"]) for run in runs)
    first = runs[0]
    lines = [
        f"The default on 2 CPU cores, seeds {seeds}: {first['queries']} queries about {first['corpus_size']} test videos. "
        "Percent: mean (each seed).",
        "",
        "| test videos | after SFT | after GRPO |",
        "|---|---|---|",
    ]
    for name, read in ROWS:
        lines.append(
            f"| {name} | {cell([read(run['sft']) for run in runs])} | {cell([read(run['grpo']) for run in runs])} |"
        )
    lines += ["", "Differences in points, with 95 % intervals: all seeds (each seed).", ""]
    lines += [f"- {name}: {differences([read(run) for run in runs])}" for name, read in PAIRS.items()]
    soft, hard = (first["grpo"]["tokens"][kind]["value"] for kind in ("soft", "hard"))
    lines += ["", f"A refinement takes {soft:.0f} soft tokens; in words it takes {hard:.1f} generated ones."]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with an eval.json")
    replace("results", table([json.loads((run / "eval.json").read_text()) for run in parser.parse_args().runs]))
