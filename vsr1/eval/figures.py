"""The report's figures: numbers in, one inline SVG out.

Each function draws one figure with matplotlib's object interface (no global state, no display) and returns the `<svg>`
element as text, ready to be put into a page. Text stays text, so figures take the page's font and can be searched.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

INK, MUTED, GRID = "#1f2430", "#667085", "#e6e8ec"
COLOURS = {"sft": "#2f6db5", "grpo": "#d3722c"}  # told apart by every common colour vision
CONTROL = "#b3bac5"
GAIN, LOSS = "#2e8b62", "#b3372f"
STAGE_NAMES = {"sft": "SFT", "grpo": "GRPO"}
FRAME_HEIGHT = 240  # pixels of a frame in the gallery at most
LABEL_POINTS = 12.0  # from one label to the next
WIDTH = 9.6  # inches; the page scales figures to its own width

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#c9ced6",
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


def triple(figure: Figures | None) -> tuple[float, float, float]:
    """Value, low and high of a figure in percent; NaN where it is undefined."""
    if figure is None:
        return math.nan, math.nan, math.nan
    value, low, high = (math.nan if figure.get(k) is None else 100.0 * figure[k] for k in ("value", "low", "high"))
    return value, low, high


@matplotlib.rc_context(_STYLE)
def against(lines: Mapping[str, Mapping[str, Line]], axis: str, baseline: str | None = None) -> str:
    """Percent against a whole number, one panel a title: `lines[title][stage or name]` is a list of (x, figure).

    Bands are the intervals; `baseline` names a dotted line at the first point of each panel's first line.
    """
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    named_ends: list[list[tuple[float, float, str, str]]] = []
    for panel, (title, named) in zip(panels, lines.items(), strict=True):
        shades = iter(["#9cc0e6", "#4f8fd0", "#1f5796", "#123a66"])
        ends: list[tuple[float, float, str, str]] = []
        named_ends.append(ends)
        for name, points in named.items():
            colour = COLOURS.get(name) or next(shades)
            x = [point for point, _ in points]
            value, low, high = np.array([triple(entry) for _, entry in points]).T
            panel.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
            panel.plot(x, value, color=colour, marker="o", markersize=4.5, linewidth=1.8)
            ends.append((value[-1], x[-1], STAGE_NAMES.get(name, name), colour))
            panel.set_xticks(x)
        if baseline is not None:
            start = triple(next(iter(named.values()))[0][1])[0]
            panel.axhline(start, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            panel.annotate(baseline, (0, start), (2, -11), textcoords="offset points", color=MUTED, fontsize=9)
        panel.set_title(title)
        panel.set_xlabel(axis)
        panel.grid(axis="x", visible=False)
        panel.margins(x=0.09, y=0.12)
    figure.draw_without_rendering()  # the limits and sizes that places of labels depend on
    for panel, ends in zip(panels, named_ends, strict=True):
        _label_ends(panel, ends)
    panels[0].set_ylabel("percent of queries")
    return _svg(figure, "against " + axis)


def _label_ends(panel: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name behind its end (y, x, name, colour); names of lines that end together move apart."""
    points = 72 / panel.figure.dpi
    lowest = -math.inf
    for y, x, name, colour in sorted(end for end in ends if not math.isnan(end[0])):
        at = panel.transData.transform((x, y))[1] * points
        lowest = max(at, lowest + LABEL_POINTS)
        offset = (8, lowest - at)
        panel.annotate(name, (x, y), offset, textcoords="offset points", color=colour, va="center", fontweight="bold")


@matplotlib.rc_context(_STYLE)
def ablations(columns: Sequence[str], rows: Mapping[str, Mapping[str, Mapping[str, Figures]]]) -> str:
    """Bars of percent with intervals: one panel a column, one group a row name, one bar a stage.

    `rows[name][stage][column]` is a figure. The first row, the method itself, is in full colour, the others are pale.
    """
    stages = list(next(iter(rows.values())))
    height = 0.5 + 0.24 * len(rows) * (len(stages) + 0.7)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    thick = 0.8 / len(stages)
    for panel, column in zip(panels, columns, strict=True):
        for row, name in enumerate(rows):
            for place, stage in enumerate(stages):
                value, low, high = triple(rows[name].get(stage, {}).get(column))
                if math.isnan(value):
                    continue
                y = row + (place - (len(stages) - 1) / 2) * thick
                colour = COLOURS[stage]
                panel.barh(y, value, thick * 0.86, color=colour, alpha=1.0 if row == 0 else 0.42)
                panel.plot([low, high], [y, y], color=INK, linewidth=1.1, alpha=0.7)
                panel.annotate(
                    f"{value:.1f}", (high, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK
                )
        panel.set_title(column)
        panel.grid(axis="y", visible=False)
        panel.margins(x=0.14)
        panel.set_xlim(left=0)
        panel.set_xlabel("percent")
        panel.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(rows)), list(rows), color=INK)
    panels[0].set_ylim(len(rows) - 0.45, -0.55)
    return _svg(figure, "ablations")


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
    return _svg(figure, "differences " + axis)


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
    return _svg(figure, "curves " + " ".join(series))


def _curve(panel: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """The raw values, and over them their centred mean over about a twentieth of the run."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.clip(np.arange(len(values)) - half, 0, None)
    last = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    smooth = (total[last] - total[first]) / (last - first)
    if half:
        panel.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
    panel.plot(steps, smooth, color=colour, linewidth=1.8, marker="o" if len(values) == 1 else None, markersize=4)
    panel.grid(axis="x", visible=False)
    panel.locator_params(nbins=4)
    panel.tick_params(labelsize=8.5)


def span_bar(spans: Mapping[str, tuple[float | None, float | None] | None], duration: float) -> str:
    """Spans in seconds on a bar as long as the video: `true` above, `said` below; what is unknown is not drawn."""
    rows = {"true": (2, "#2e8b62"), "said": (10, COLOURS["grpo"])}
    drawn = ['<rect x="0" y="8" width="100%" height="2" fill="#d9dde3"/>']
    for name, (y, colour) in rows.items():
        start, end = spans[name] or (None, None)
        if start is None or end is None or duration <= 0:
            continue
        left, right = (100 * min(max(second / duration, 0.0), 1.0) for second in (start, end))
        width = max(right - left, 0.4)  # an empty span still shows where it is
        drawn.append(f'<rect x="{left:.2f}%" y="{y}" width="{width:.2f}%" height="6" rx="2" fill="{colour}"/>')
        drawn.append(f"<title>{name}: {start:.1f} to {end:.1f} s</title>")
    return f'<svg class="bar" role="img">{"".join(drawn)}</svg>'


def strip(pixels: Sequence[np.ndarray], seconds: Sequence[float]) -> str:
    """Frames (H, W, 3) side by side as HTML, each with its time under it."""
    shown = zip(pixels, seconds, strict=True)
    images = (f'<figure><img src="{_jpeg(p)}" alt=""><figcaption>{s:.1f} s</figcaption></figure>' for p, s in shown)
    return f'<div class="strip">{"".join(images)}</div>'


def _jpeg(pixels: np.ndarray) -> str:
    """A frame (H, W, 3) uint8 as a data URI of a JPEG, at most `FRAME_HEIGHT` high.

    Small frames are enlarged in whole steps without smoothing, so that each of their pixels can be seen.
    """
    image = Image.fromarray(pixels)
    if image.height > FRAME_HEIGHT:
        image = image.resize((round(image.width * FRAME_HEIGHT / image.height), FRAME_HEIGHT), Image.Resampling.LANCZOS)
    elif (times := FRAME_HEIGHT // image.height) > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element; ids come from the label, so figures of one page do not share them."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    return re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)  # the page gives the size
