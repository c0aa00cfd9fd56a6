"""What single queries tell together: ranks before and after the loop, and whether P(matched) means what it says.

The sections are made from the records of `trajectories.jsonl`, those of the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vsr1.eval import figures
from vsr1.eval.calibration import expected_error, reliability
from vsr1.eval.page import figure, note, section, table

Json = dict[str, Any]

_OUTCOMES = ("right video accepted", "wrong video accepted", "none accepted")


def single_queries(records: Sequence[Json]) -> str:
    """Both figures side by side."""
    parts = [part for part in (_ranks(records), _reliability(records)) if part]
    if not parts:
        return ""
    return section("Single queries", f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts)}</div>')


def _ranks(records: Sequence[Json]) -> str:
    ranked = [one for one in records if one.get("first_rank") is not None and one.get("final_rank") is not None]
    if not ranked:
        return ""
    groups: dict[str, list[tuple[int, int]]] = {outcome: [] for outcome in _OUTCOMES}
    for one in ranked:
        groups[_outcome(one)].append((one["first_rank"], one["final_rank"]))
    names = ("improved", "equal", "worse")
    rows = []
    for outcome, pairs in groups.items():
        sides = [sum(after < before for before, after in pairs), sum(after == before for before, after in pairs)]
        rows.append([outcome, *(f"{count:,}" for count in (*sides, len(pairs) - sum(sides)))])
    total = [sum(int(row[column].replace(",", "")) for row in rows) for column in (1, 2, 3)]
    rows.append(["all", *(f"{count:,}" for count in total)])
    shown = "" if len(ranked) <= figures.MOST_POINTS else f" {figures.MOST_POINTS:,} of {len(ranked):,} are drawn."
    drawn = figure(
        figures.ranks(groups),
        f"Each dot is a query, a little displaced, since ranks are whole numbers; below the line the loop brought the right "
        f"video nearer. A query accepted at once keeps its rank.{shown}",
    )
    said = ", ".join(f"{count:,} {name}" for name, count in zip(names, total, strict=True))
    return f"<h3>Rank before and after: {said}</h3>{drawn}{table(['queries', *names], rows)}"


def _outcome(record: Json) -> str:
    if record.get("stop") != "matched" or not record.get("turns"):
        return _OUTCOMES[2]
    return _OUTCOMES[0] if record["turns"][-1]["video_id"] == record["video_id"] else _OUTCOMES[1]


def _reliability(records: Sequence[Json]) -> str:
    said = [
        (turn["probability"], turn["video_id"] == one["video_id"])
        for one in records
        for turn in one.get("turns") or ()
        if turn.get("probability") is not None and one.get("video_id") is not None
    ]
    if not said:
        return ""
    chance, right = np.array(said, dtype=np.float64).T
    bins = reliability(chance, right)
    brier = float(((chance - right) ** 2).mean())
    rows = [[f"{one.chance:.2f}", f"{one.right:.2f}", f"{one.count:,}"] for one in bins]
    drawn = figure(
        figures.reliability(bins, figures.COLOURS["sft"]),
        "Answers by the probability that the policy gave the shown video of being the right one: on the line it can be "
        "believed, below it says too much. Lines are 95 % Wilson intervals, as if answers were independent.",
        table(["mean P(matched)", "share of right videos", "answers"], rows),
    )
    counts = f"{len(said):,} answers; expected calibration error {100 * expected_error(bins):.1f} %; Brier score {brier:.3f}."
    return f"<h3>Can P(matched) be believed?</h3>{drawn}{note(counts)}"
