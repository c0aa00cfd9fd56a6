"""How training went: the log's numbers against steps, those a reader looks for first before all others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vsr1.eval import figures
from vsr1.eval.page import figure, fold, note, section, table

Json = dict[str, Any]
Series = dict[str, tuple[list[float], list[float]]]

STAGES = {
    "world": "World",
    "data": "Data",
    "vision": "Vision tower",
    "embedder": "Embedder",
    "sft": "Stage 1: SFT",
    "grpo": "Stage 2: GRPO",
    "eval": "Evaluation",
}
_UNPLOTTED = {"time", "step", "stage"}
# What stage 2 is watched by; the rest of its numbers stand behind a fold.
_WATCHED = ("reward", "loss", "vcmr", "ver", "refine_gain_", "held_out_")


def learning(log: Sequence[Json], torn: int) -> str:
    """The section of the report; torn: lines of the log that could not be read."""
    parts = []
    for stage in dict.fromkeys(record["stage"] for record in log):
        by_step = {record["step"]: record for record in log if record["stage"] == stage}  # a resumed run repeats steps
        records = [by_step[step] for step in sorted(by_step)]
        series = _series(records)
        if series:
            caption = f"{len(records)} logged steps. Thin: as logged; thick: mean over a twentieth of the stage."
            parts.append(f"<h3>{escape(STAGES.get(stage, str(stage)))}</h3>{_panels(stage, series, caption)}")
    if torn:
        parts.append(note(f"Torn lines of log.jsonl, as a killed run may leave them, that are not shown: {torn}."))
    return section("Learning", *parts) if parts else ""


def _series(records: Sequence[Json]) -> Series:
    """Steps and values of every number that was logged."""
    series: Series = {}
    for key in dict.fromkeys(key for record in records for key in record if key not in _UNPLOTTED):
        points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            series[key] = ([step for step, _ in points], [value for _, value in points])
    return {key: series[key] for key in sorted(series, key=lambda key: key != "loss")}


def _panels(stage: str, series: Mapping[str, tuple[list[float], list[float]]], caption: str) -> str:
    colour = figures.COLOURS.get(stage, figures.MUTED)
    if stage != "grpo":
        return figure(figures.curves(series, colour), caption, _numbers(series))
    watched = {
        name: series[name]
        for prefix in _WATCHED
        for name in series
        if name == prefix or (prefix.endswith("_") and name.startswith(prefix))
    }
    rest = {name: values for name, values in series.items() if name not in watched}
    shown = ""
    if watched:
        held_out = (
            " <b>Held out</b>: the loop on validation queries, greedy, where the gain of refining is that of the reciprocal "
            "rank."
        )
        shown = figure(
            figures.curves(watched, colour),
            f"{caption} Of the sampled rollouts: reward, VCMR at IoU ≥ 0.5, right answers, and what refining at turn t "
            "added to the right video's probability."
            + (held_out if any(name.startswith("held_out_") for name in watched) else ""),
            _numbers(watched),
        )
    if not rest:
        return shown
    return shown + fold("All other numbers", figure(figures.curves(rest, colour), caption, _numbers(rest)))


def _numbers(series: Mapping[str, tuple[list[float], list[float]]]) -> str:
    rows = [
        [escape(name), *(f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values)))]
        for name, (_, values) in series.items()
    ]
    return table(["", "first", "last", "least", "most"], rows)
