"""The report's figures: numbers in, one inline SVG out.

Each function draws one figure with matplotlib's object interface (no global state, no display) and returns the `<svg>`
element as text, ready to be put into a page. Text stays text, so figures take the page's font and can be searched; colours
become the page's variables, so one drawing serves a light page and a dark one. Every figure carries a title and a
description for those who cannot see it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from vsr1.eval.calibration import Bin

# What is drawn in one of these colours takes the page's variable instead, see `_svg`.
INK, MUTED, GRID, AXIS = "#1f2430", "#667085", "#e6e8ec", "#c9ced6"
COLOURS = {"sft": "#2f6db5", "grpo": "#d3722c", "given": "#2f6db5"}  # told apart by every common colour vision
CONTROL = "#b3bac5"
GAIN, LOSS = "#2e8b62", "#b3372f"
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", AXIS: "axis", COLOURS["sft"]: "sft", COLOURS["grpo"]: "grpo",
    CONTROL: "control", GAIN: "gain", LOSS: "loss",
}  # fmt: skip
STAGE_NAMES = {"sft": "SFT", "grpo": "GRPO", "given": "no training here"}
LABEL_POINTS = 12.0  # from one label to the next
WIDTH, HALF = 9.6, 4.6  # inches of a figure across the page, and of one of two side by side; the page scales both
MOST_POINTS = 1500  # dots of a scatter plot, and steps of a curve, that a page is asked to draw

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names may hold dollar signs
    "text.color": INK,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}

Figures = Mapping[str, Any]  # {"value", "low", "high"} of one metric; null where it is undefined
Line = Sequence[tuple[float, Figures | None]]


def triple(figure: Figures | None, scale: float = 100.0) -> tuple[float, float, float]:
    """Value, low and high of a figure, in percent by default; NaN where it is undefined. Bounds that are missing are the
    value itself."""
    value = None if figure is None else figure.get("value")
    if figure is None or value is None:
        return math.nan, math.nan, math.nan
    low, high = (value if figure.get(bound) is None else figure[bound] for bound in ("low", "high"))
    return scale * value, scale * low, scale * high


def is_defined(figure: Figures | None) -> bool:
    return not math.isnan(triple(figure)[0])


@matplotlib.rc_context(_STYLE)
def against(
    lines: Mapping[str, Mapping[str, Line]], axis: str, baseline: str | None = None, *, shared: bool = True
) -> str:
    """Percent against a whole number, one panel a title: `lines[title][stage]` is a list of (x, figure).

    Bands are the intervals; points without a value are left out. `baseline` names a dotted line at the first point of each
    panel's first line. `shared`: all panels have one scale.
    """
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    panels = figure.subplots(1, len(lines), sharey=shared, squeeze=False)[0]
    named_ends: list[list[tuple[float, float, str, str]]] = []
    for panel, (title, named) in zip(panels, lines.items(), strict=True):
        ends: list[tuple[float, float, str, str]] = []
        named_ends.append(ends)
        start = math.nan
        for name, points in named.items():
            drawn = [(x, triple(entry)) for x, entry in points if is_defined(entry)]
            if not drawn:
                continue
            x = [place for place, _ in drawn]
            value, low, high = np.array([three for _, three in drawn]).T
            panel.fill_between(x, low, high, color=COLOURS[name], alpha=0.14, linewidth=0)
            panel.plot(x, value, color=COLOURS[name], marker="o", markersize=4.5, linewidth=1.8)
            ends.append((value[-1], x[-1], STAGE_NAMES[name], COLOURS[name]))
            panel.set_xticks(x)
            start = value[0] if math.isnan(start) else start
        if baseline is not None and not math.isnan(start):
            panel.axhline(start, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            place = (1, start), (-3, -11)
            panel.annotate(
                baseline, place[0], place[1], xycoords=("axes fraction", "data"), textcoords="offset points",
                color=MUTED, fontsize=9, ha="right",
            )  # fmt: skip
        panel.set_title(title)
        panel.set_xlabel(axis)
        panel.grid(axis="x", visible=False)
        panel.margins(x=0.09, y=0.14)
    figure.draw_without_rendering()  # the limits and sizes that places of labels depend on
    for panel, ends in zip(panels, named_ends, strict=True):
        _label_ends(panel, ends)
    panels[0].set_ylabel("percent")
    said = "; ".join(
        f"{title}, {STAGE_NAMES[name]}: {_course([(x, triple(entry)[0]) for x, entry in points])}"
        for title, named in lines.items()
        for name, points in named.items()
    )
    return _svg(figure, f"{', '.join(lines)} against {axis}", said)


def _course(points: Sequence[tuple[float, float]]) -> str:
    shown = [f"{value:.1f} at {x:g}" for x, value in points if not math.isnan(value)]
    return " ".join([shown[0], "to", shown[-1]]) if shown else "no value"


def _label_ends(panel: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name behind its end (y, x, name, colour); names of lines that end together move apart."""
    points = 72 / panel.figure.dpi
    lowest = -math.inf
    for y, x, name, colour in sorted(ends):
        at = panel.transData.transform((x, y))[1] * points
        lowest = max(at, lowest + LABEL_POINTS)
        offset = (8, lowest - at)
        panel.annotate(name, (x, y), offset, textcoords="offset points", color=colour, va="center", fontweight="bold")


@matplotlib.rc_context(_STYLE)
def bars(
    columns: Mapping[str, tuple[str, float]],
    rows: Mapping[str, Mapping[str, Mapping[str, Figures | None]]],
    *,
    first_is_method: bool = False,
) -> str:
    """Bars with intervals: one panel a column, one group a row name, one bar a stage.

    `columns[title]` is its unit and what its figures are multiplied by; `rows[name][stage][title]` is a figure. With
    `first_is_method` the first row is in full colour and the others, its controls, are pale. A column that no row has is
    left out.
    """
    columns = {title: unit for title, unit in columns.items() if _has_column(rows, title)}
    stages = list(dict.fromkeys(stage for named in rows.values() for stage in named))
    height = 0.85 + 0.24 * len(rows) * (len(stages) + 0.7)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    thick = 0.8 / len(stages)
    for panel, (column, (unit, scale)) in zip(panels, columns.items(), strict=True):
        for row, name in enumerate(rows):
            for place, stage in enumerate(stages):
                value, low, high = triple(rows[name].get(stage, {}).get(column), scale)
                if math.isnan(value):
                    continue
                y = row + (place - (len(stages) - 1) / 2) * thick
                pale = first_is_method and row > 0
                panel.barh(y, value, thick * 0.86, color=COLOURS[stage], alpha=0.42 if pale else 1.0)
                panel.plot([low, high], [y, y], color=INK, linewidth=1.1, alpha=0.7)
                panel.annotate(
                    f"{value:.1f}" if value >= 1 or unit == "percent" else f"{value:.2g}",
                    (high, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK,
                )  # fmt: skip
        panel.set_title(column)
        panel.grid(axis="y", visible=False)
        panel.margins(x=0.2)
        panel.set_xlim(
            0, max(panel.get_xlim()[1], 1.0 if unit == "percent" else 0.0)
        )  # bars of nothing have a scale, too
        panel.set_xlabel(unit)
        panel.locator_params(axis="x", nbins=5)
        panel.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(rows)), list(rows), color=INK)
    panels[0].set_ylim(len(rows) - 0.45, -0.55)
    if len(stages) > 1:
        handles = [Patch(color=COLOURS[stage], label=f"after {STAGE_NAMES[stage]}") for stage in stages]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(stages), labelcolor=MUTED, fontsize=9)
    return _svg(
        figure, f"{', '.join(columns)} of {', '.join(rows)}", "Bars with 95 % intervals; the table has the numbers."
    )


def _has_column(rows: Mapping[str, Mapping[str, Mapping[str, Figures | None]]], title: str) -> bool:
    return any(is_defined(figures.get(title)) for named in rows.values() for figures in named.values())


@matplotlib.rc_context(_STYLE)
def differences(named: Mapping[str, Figures], axis: str) -> str:
    """A point and an interval a name around zero, in percentage points; grey where the interval holds zero.

    Every figure must be defined.
    """
    figure = Figure(figsize=(WIDTH, 0.8 + 0.27 * len(named)), layout="constrained")
    panel = figure.subplots()
    panel.axvline(0, color=MUTED, linewidth=1)
    for row, entry in enumerate(named.values()):
        value, low, high = triple(entry)
        colour = GAIN if low > 0 else LOSS if high < 0 else CONTROL
        panel.plot([low, high], [row, row], color=colour, linewidth=2.4, solid_capstyle="round")
        panel.plot([value], [row], color=colour, marker="o", markersize=6)
    panel.set_yticks(range(len(named)), list(named), color=INK)
    panel.set_ylim(len(named) - 0.5, -0.5)
    panel.set_xlabel(axis + ", percentage points")
    panel.grid(axis="y", visible=False)
    panel.spines["left"].set_visible(False)
    said = "; ".join("{} {:+.1f} ({:+.1f} to {:+.1f})".format(name, *triple(entry)) for name, entry in named.items())
    return _svg(figure, axis, said)


@matplotlib.rc_context(_STYLE)
def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], colour: str = COLOURS["sft"]) -> str:
    """Small panels of a training stage, one a quantity: `series[name]` is (steps, values); thick line smoothed."""
    across = min(4, len(series))
    down = -(-len(series) // across)
    figure = Figure(figsize=(WIDTH, 1.75 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, (name, (steps, values)) in zip(panels, series.items(), strict=False):
        _curve(panel, np.asarray(steps, dtype=float), np.asarray(values, dtype=float), colour)
        panel.set_title(name.replace("_", " "), fontsize=9.5)
    for panel in panels[len(series) :]:
        panel.set_visible(False)
    said = "; ".join(f"{name}: {values[0]:.4g} to {values[-1]:.4g}" for name, (_, values) in series.items())
    return _svg(figure, ", ".join(series) + " against steps", said)


def _curve(panel: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """The raw values, and over them their centred mean over about a twentieth of the run."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.clip(np.arange(len(values)) - half, 0, None)
    last = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    smooth = (total[last] - total[first]) / (last - first)
    shown = thinned(len(values), 400)
    steps = steps[shown]
    if half:
        panel.plot(steps, values[shown], color=colour, alpha=0.3, linewidth=0.8)
    panel.plot(
        steps, smooth[shown], color=colour, linewidth=1.8, marker="o" if len(values) == 1 else None, markersize=4
    )
    panel.grid(axis="x", visible=False)
    panel.locator_params(nbins=4)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.tick_params(labelsize=8.5)


def thinned(count: int, most: int = MOST_POINTS) -> np.ndarray:
    """At most `most` of `count` indices, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


@matplotlib.rc_context(_STYLE)
def ranks(groups: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    """Rank after the last query against rank before, both logarithmic: one cloud for each of at most three outcomes.

    `groups[outcome]` holds (before, after). Points are jittered, because ranks are whole numbers; at most 1,500 are drawn.
    """
    figure = Figure(figsize=(HALF, 4.1), layout="constrained")
    panel = figure.subplots()
    points = np.array([(*pair, place) for place, pairs in enumerate(groups.values()) for pair in pairs], dtype=float)
    shuffled = np.random.default_rng(0).permutation(points)  # no outcome lies above the others
    shown = shuffled[thinned(len(shuffled))]
    jitter = np.exp(np.random.default_rng(1).uniform(-0.13, 0.13, (len(shown), 2)))
    shown[:, :2] *= jitter
    most = max(10.0, float(points[:, :2].max())) * 1.4
    panel.plot([0.7, most], [0.7, most], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    for place, (name, colour, marker) in enumerate(zip(groups, (GAIN, LOSS, CONTROL), "oXs", strict=False)):
        x, y = shown[shown[:, 2] == place, :2].T
        panel.scatter(x, y, s=16, color=colour, marker=marker, alpha=0.65, linewidths=0, label=name)
    panel.set(xscale="log", yscale="log", xlim=(0.7, most), ylim=(0.7, most), aspect="equal")
    ticks = [10**power for power in range(math.ceil(math.log10(most)))]
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_ticks([], minor=True)
    panel.set_xlabel("rank of the right video, first query")
    panel.set_ylabel("rank, last query")
    for word, corner, across, up in (
        ("worse", (0.03, 0.97), "left", "top"),
        ("better", (0.97, 0.12), "right", "bottom"),
    ):
        panel.annotate(word, corner, xycoords="axes fraction", color=MUTED, fontsize=9, ha=across, va=up)
    figure.legend(
        loc="outside upper left", ncols=3, labelcolor=MUTED, fontsize=8.5, handletextpad=0.1, columnspacing=0.9
    )
    said = "; ".join(f"{name}: {len(pairs)} queries" for name, pairs in groups.items())
    return _svg(figure, "Rank of the right video under the first and the last query", said)


@matplotlib.rc_context(_STYLE)
def reliability(bins: Sequence[Bin], colour: str) -> str:
    """Share of right videos against the probability that was given, and below it how many answers each bin holds.

    A point stands at its bin's mean probability; lines are 95 % Wilson intervals. Every bin must hold an answer.
    """
    figure = Figure(figsize=(HALF, 4.4), layout="constrained")
    panel, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    panel.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    panel.annotate("dotted: as often right as said", (0.03, 0.97), color=MUTED, fontsize=9, va="top")
    for one in bins:
        low, high = one.interval()
        panel.plot([one.chance, one.chance], [low, high], color=colour, linewidth=1.4, alpha=0.6)
        below.annotate(
            f"{one.count:,}", (one.centre, one.count), (0, 3), textcoords="offset points",
            ha="center", fontsize=8.5, color=INK,
        )  # fmt: skip
    panel.plot([one.chance for one in bins], [one.right for one in bins], color=colour, marker="o", linewidth=1.6)
    below.bar([one.centre for one in bins], [one.count for one in bins], width=0.086, color=colour, alpha=0.5)
    panel.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="share of right videos")
    below.set(xlabel="P(matched)", ylabel="answers")
    below.margins(y=0.3)
    below.locator_params(axis="y", nbins=3)
    below.tick_params(axis="x", pad=7)  # clear of the zero beside it
    below.grid(axis="x", visible=False)
    said = "; ".join(f"said {one.chance:.2f}, right {one.right:.2f}, {one.count} answers" for one in bins)
    return _svg(figure, "How often the shown video was right against the probability given for it", said)


def _svg(figure: Figure, title: str, description: str) -> str:
    """The figure as an `<svg>` element; ids come from its title, so figures of one page do not share them."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)  # the page gives the size
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text, count=2).replace("xlink:href", "href")  # HTML needs neither
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    opened = text.index(">") + 1
    named = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return f'{text[: opened - 1]} role="img">{named}{text[opened:]}'
