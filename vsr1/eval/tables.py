"""The report's tables: the rows of the paper with the published ones beside them, and all figures of both stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vsr1.eval import published
from vsr1.eval.figures import STAGE_NAMES, is_defined, triple
from vsr1.eval.page import NOTHING, note, percent, quantity, section, table

Json = dict[str, Any]

THRESHOLDS = ("0.3", "0.5", "0.7")
RANKS = ("R@1", "R@5", "R@10", "R@100", "MRR")
METRICS = {
    **{f"after {name}": f"{name}, last query" for name in RANKS},
    **{f"vcmr {t}": f"VCMR, IoU ≥ {t}" for t in THRESHOLDS},
    "ver": "right answers, all turns",
    "ver_turn1": "right answers, first turn",
    "ver_final": "right answers, last turn",
    "unparsable": "unparsable answers",
    "mean_iou": "mean IoU, right video accepted",
    "R@1 excluded": "R@1, last query, rejected videos excluded",
}


def group(figures: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The figures under a key, none where it is absent or null."""
    return figures.get(key) or {}


def tiles(stages: Mapping[str, Json]) -> str:
    """The last stage's main figures, large."""
    name, last = list(stages.items())[-1]
    first = group(last, "before").get("R@1")
    chosen = [
        ("VCMR, IoU ≥ 0.5", group(last, "vcmr").get("0.5"), "right video accepted, right span, within the whole loop"),
        ("the same, one turn", group(last, "vcmr_one_turn").get("0.5"), "without a second look"),
        (
            "VR R@1, last query",
            group(last, "after").get("R@1"),
            f"first query {triple(first)[0]:.1f}" if is_defined(first) else "",
        ),
        ("Verification", last.get("ver"), "right answers over all turns"),
        ("Mean IoU", last.get("mean_iou"), "where the right video was accepted"),
    ]
    cells = []
    for label, share, hint in chosen:
        if share is None:
            continue
        value, low, high = triple(share)
        shown, bounds = ("—", "") if math.isnan(value) else (f"{value:.1f}<small>%</small>", f"{low:.1f} to {high:.1f}")
        cells.append(
            f'<div class="tile"><h3>{label}</h3><div class="big">{shown}</div><div class="interval">{bounds}</div>'
            f"<p>{hint}</p></div>"
        )
    if not cells:
        return ""
    said = f"Figures after {STAGE_NAMES[name]}, in percent; small numbers are 95 % bootstrap intervals."
    return f'<section><div class="tiles">{"".join(cells)}</div>{note(said)}</section>'


def main_table(evaluation: Json, stages: Mapping[str, Json]) -> str:
    """The paper's table: zero-shot, fine-tuned one-shot, and ours; published rows where the data set has them."""
    benchmark = published.BENCHMARKS.get(str(evaluation.get("dataset")))
    baselines = group(evaluation, "baselines")
    rows: list[tuple[str, Json, str | None]] = [
        (name, baselines[name], name) for name in (published.ZERO_SHOT, published.ONE_SHOT) if baselines.get(name)
    ]
    first = next(iter(stages.values()), {})
    if group(first, "before"):
        rows.append((published.EMBEDDER, dict(group(first, "before")), published.EMBEDDER))
    for stage, figures in stages.items():
        final = group(group(figures, "public"), "verification").get("final") or {}
        flat = {"vcmr": figures.get("vcmr"), "ver": figures.get("ver"), **group(figures, "after")}
        flat["public ver"] = {"value": final.get("overall_acc")} if final.get("N") else None
        rows.append((f"ours, after {STAGE_NAMES[stage]}", flat, published.METHOD if stage == "grpo" else None))
    if not rows:
        return ""
    body = [_three_lines(*row, benchmark) for row in rows]
    both = benchmark is not None
    top = (
        f'<tr><th></th><th colspan="3" scope="colgroup">VCMR R@1, IoU ≥</th><th colspan="{2 if both else 1}" '
        'scope="colgroup">VER</th><th colspan="4" scope="colgroup">Video retrieval</th></tr>'
    )
    heads = [*THRESHOLDS, "all turns", *(["public"] if both else []), *RANKS[:4]]
    names = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return section(
        "As in the paper",
        _comparable(evaluation, benchmark),
        f'<div class="wide"><table class="paper"><thead>{top}<tr><th></th>{names}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>",
        note(
            f"Percent with 95 % bootstrap intervals over queries. {_about_baselines(baselines)}"
            "<b>First query, no loop</b>: the embedder alone. "
            "<b>VER, all turns</b>: share of right answers over all executed turns, an unreadable one being wrong."
            + (_about_published() if both else "")
        ),
    )


def _about_baselines(baselines: Mapping[str, Any]) -> str:
    meanings = {
        published.ZERO_SHOT: "the policy before any training on this data, asked about the first video only; where nothing "
        "pretrained went into it, as in the rendered world, a floor and no more",
        published.ONE_SHOT: "a trained policy, asked about the first video only",
    }
    return "".join(
        f"<b>{name.capitalize()}</b>: {meaning}. " for name, meaning in meanings.items() if baselines.get(name)
    )


def _about_published() -> str:
    return (
        f" <b>Published</b>: {escape(published.SOURCE)}; points are ours minus published, grey where the published figure "
        "lies inside our interval, or ours has none. <b>VER, public</b>: the public code's own count, which holds the last "
        "answer against the ranking after the last refinement and leaves unreadable answers out. Which count was published "
        "is not known here, so the published figure stands beside both."
    )


def _comparable(evaluation: Json, benchmark: published.Benchmark | None) -> str:
    """Whether the published rows are comparable, and what keeps them from it, as far as the evaluation shows it."""
    if benchmark is None:
        return ""
    reasons, unknown = [], []
    if evaluation.get("split") not in (None, *benchmark.splits):
        reasons.append(f"these are of its split '{evaluation['split']}'")
    for key, whole, what in (
        ("queries", benchmark.queries, "queries"),
        ("corpus_size", benchmark.videos, "videos in the corpus"),
    ):
        found = evaluation.get(key)
        if found is None or whole is None:
            unknown.append(what if found is None else f"{what} (these have {found:,})")
        elif found != whole:
            reasons.append(f"these have {found:,} {what} and not {whole:,}")
    if failed := max((group(evaluation, stage).get("failed") or 0 for stage in STAGE_NAMES), default=0):
        reasons.append(f"{failed:,} queries failed and are left out")
    said = f"Published rows are over the whole test split of {benchmark.title}"
    if reasons:
        return f'<p class="warning">{escape(said)}; {escape(", ".join(reasons))}. The differences are not like for like.</p>'
    if unknown:
        return (
            f'<p class="warning">{escape(said)}. Not known here: its number of {escape(" and of ".join(unknown))}.</p>'
        )
    return note(f"{escape(said)}, as ours are: as many queries and videos.")


def _three_lines(label: str, figures: Json, name: str | None, benchmark: published.Benchmark | None) -> str:
    """Ours, and where there is one the published row and the difference."""
    cells: list[tuple[Any, float | None]] = []
    row = benchmark.rows.get(name) if benchmark is not None and name is not None else None
    for threshold in THRESHOLDS:
        cells.append((group(figures, "vcmr").get(threshold), row.vcmr.get(threshold) if row else None))
    cells.append((figures.get("ver"), row.ver if row else None))
    if benchmark is not None:
        cells.append((figures.get("public ver"), row.ver if row else None))
    for depth in RANKS[:4]:
        cells.append((figures.get(depth), row.recall.get(depth) if row else None))
    lines = [_line("ours", label, [percent(ours) for ours, _ in cells])]
    if row is not None:
        theirs = [NOTHING if one is None else f"{one:.1f}" for _, one in cells]
        lines.append(_line("published", "published", theirs))
        lines.append(_line("points", "difference, points", [_points(*pair) for pair in cells]))
    return "".join(lines)


def _line(kind: str, label: str, cells: Sequence[str]) -> str:
    return (
        f'<tr class="{kind}"><th scope="row">{escape(label)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    )


def _points(ours: Any, theirs: float | None) -> str:
    if theirs is None or not is_defined(ours):
        return NOTHING
    value, low, high = triple(ours)
    # a figure without an interval proves nothing, nor does one of no width: so few queries that all of them agree
    unsure = ours.get("low") is None or low == high or low <= theirs <= high
    kind = "" if unsure else "above" if value > theirs else "below"
    return f'<span class="{kind}">{value - theirs:+.1f}</span>'


def results(stages: Mapping[str, Json]) -> str:
    """All figures of each stage."""
    rows: list[Sequence[str]] = []

    def add(title: str, lines: Sequence[tuple[str, Sequence[str]]]) -> None:
        kept = [(name, cells) for name, cells in lines if any(cell and cell != NOTHING for cell in cells)]
        rows.extend([[title], *([name, *cells] for name, cells in kept)] if kept else [])

    def change(figures: Json, metric: str) -> str:
        sides = [group(figures, side).get(metric) for side in ("before", "after")]
        if not any(is_defined(side) for side in sides):
            return NOTHING
        return f'{percent(sides[0])} <span class="arrow">→</span> {percent(sides[1])}'

    add(
        "Video retrieval, first query → last query",
        [(metric, [change(one, metric) for one in stages.values()]) for metric in RANKS],
    )
    for title, key in (
        ("Moment retrieval (VCMR, R@1)", "vcmr"),
        ("Moment retrieval, one turn", "vcmr_one_turn"),
        ("Moment retrieval, fallen back where nothing was accepted", "answered"),
    ):
        shares = [(f"IoU ≥ {t}", [percent(group(one, key).get(t)) for one in stages.values()]) for t in THRESHOLDS]
        add(title, shares)
    keys = ("ver", "ver_turn1", "ver_final", "unparsable", "mean_iou")
    add(
        "Verification and localisation",
        [(METRICS[key], [percent(one.get(key)) for one in stages.values()]) for key in keys],
    )
    counted = {
        "text tokens a reply": "text",
        "soft tokens a refinement": "soft",
        "tokens of a refinement in words": "hard",
    }
    counts = [
        (name, [quantity(group(one, "tokens").get(key)) for one in stages.values()]) for name, key in counted.items()
    ]
    failed = [NOTHING if one.get("failed") is None else f"{one['failed']:,}" for one in stages.values()]
    add("Counts", [*counts, ("failed queries, left out", failed)])
    if not rows:
        return ""
    return section(
        "All figures",
        table(["", *(f"after {STAGE_NAMES[s]}" for s in stages)], rows),
        note(
            "Percent with 95 % bootstrap intervals over queries. A rank is one more than the number of videos that "
            "score strictly higher than the right one. VCMR counts a query only if the right video was accepted with a "
            "span of that IoU; accepting a wrong video ends the loop with nothing. An unparsable answer is a wrong one."
        ),
    )
