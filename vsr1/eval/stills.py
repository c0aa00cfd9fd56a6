"""A few frames of a video for the page: chosen around spans, small, inline, and within a budget of bytes.

Videos are files that can be decoded, or frame arrays (.npy, uint8 (T, H, W, 3)) with their times in a `meta.jsonl` beside
them, as the published data has them. What cannot be read says so in its place.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vsr1.errors import VideoError, Vsr1Error
from vsr1.eval.spans import Span

FRAMES = 6
HEIGHT = 160  # pixels of a frame at most
SMALL = 100  # below this many pixels a frame is enlarged by the page, without smoothing
BUDGET = 6 << 20  # bytes of the page that frames may take
_META = "meta.jsonl"


@dataclass(frozen=True)
class Strip:
    """Frames as HTML, when they are in seconds, and the video's duration; it is None where that is not known."""

    html: str
    seconds: tuple[float, ...] = ()
    duration: float | None = None


def complete(start: Any, end: Any) -> Span | None:
    """A span of two finite seconds, or None."""
    both = all(isinstance(second, int | float) and math.isfinite(second) for second in (start, end))
    return (float(start), float(end)) if both else None


def times_around(spans: Sequence[Span], duration: float | None, count: int = FRAMES) -> list[float] | None:
    """`count` times over the spans and a little before and behind them; None where there is no span."""
    if not spans:
        return None
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    margin = max(0.3 * (last - first), 1.0)
    first, last = max(first - margin, 0.0), max(last + margin, 0.0)
    if duration:
        last = min(last, duration)
        first = min(first, last)
    return [first + (last - first) * (place + 0.5) / count for place in range(count)]


class Stills:
    """Frames of the videos that `video_path` finds, until `budget` bytes of them are in the page."""

    def __init__(self, video_path: Callable[[str], Path], budget: int = BUDGET) -> None:
        self.video_path, self.left = video_path, budget
        self._metas: dict[Path, dict[str, Any]] = {}

    def strip(self, video_id: str, true: Span | None, said: Span | None, duration: float | None = None) -> Strip:
        """Frames around the true and the given span, each marked where it lies in one; `duration` as far as it is known."""
        try:
            path = Path(self.video_path(video_id))
        except KeyError:
            return _broken(f"video '{video_id}': it is not among the videos of this run")
        spans = [span for span in (true, said) if span is not None]
        times = times_around(spans, duration)
        try:
            pixels, seconds, found = (self._array if path.suffix == ".npy" else _decoded)(path, times, duration)
        except Vsr1Error as error:
            return _broken(str(error))
        shown = [(_image(one), second) for one, second in zip(pixels, seconds, strict=True)]
        cost = sum(len(image) for image, _ in shown)
        known = tuple(second for second in seconds if second is not None)
        if cost > self.left:
            return Strip('<p class="note">Frames left out: this page has as many as it may hold.</p>', (), found)
        self.left -= cost
        images = "".join(_still(image, second, true, said) for image, second in shown)
        return Strip(f'<div class="strip">{images}</div>', known, found)

    def _array(self, path: Path, times: list[float] | None, duration: float | None) -> Any:
        """Frames of an array, the nearest to the wanted times; without any known times they are evenly spread."""
        try:
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise VideoError(path, f"cannot be read as a frame array ({error})") from error
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
            raise VideoError(path, f"holds {frames.dtype} {frames.shape}; expected frames uint8 (T, H, W, 3)")
        meta = self._meta(path.parent).get(path.stem) or {}
        clock, length = meta.get("sampled_timestamps_sec"), meta.get("source_duration_sec") or duration
        if not clock and length:
            clock = np.linspace(0.0, length, len(frames)).tolist()  # both ends are among the frames of these arrays
        if not clock:
            rows = np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))
            return [np.asarray(frames[row]) for row in rows], [None] * len(rows), None
        clock = np.asarray(clock[: len(frames)], dtype=float)  # the last frame may be there twice
        wanted = np.linspace(clock[0], clock[-1], FRAMES) if times is None else np.asarray(times)
        rows = np.unique(np.abs(clock[None] - wanted[:, None]).argmin(1))
        return [np.asarray(frames[row]) for row in rows], clock[rows].tolist(), length

    def _meta(self, folder: Path) -> dict[str, Any]:
        """What the folder's meta.jsonl says of each video; lines that are no record of one are passed over."""
        if folder not in self._metas:
            rows: dict[str, Any] = {}
            path = folder / _META
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(row, dict) and "video_id" in row:
                    rows[str(row["video_id"])] = row
            self._metas[folder] = rows
        return self._metas[folder]


def _decoded(path: Path, times: list[float] | None, duration: float | None) -> Any:
    from vsr1.video import decode  # a report without trajectories needs no decoder

    frames = decode(path, count=FRAMES) if times is None else decode(path, times=times)
    seconds = frames.seconds.tolist()
    kept = [place for place in range(len(seconds)) if place == 0 or seconds[place] > seconds[place - 1]]
    return [frames.pixels[place].numpy() for place in kept], [seconds[place] for place in kept], frames.duration


def _broken(reason: str) -> Strip:
    return Strip(f'<p class="broken">{escape(reason[:400])}</p>')


def _still(image: str, second: float | None, true: Span | None, said: Span | None) -> str:
    inside = "".join(
        f'<i class="{name}"></i>'
        for name, span in (("true", true), ("said", said))
        if second is not None and span is not None and span[0] <= second <= span[1]
    )
    when = "" if second is None else f"{second:.1f} s"
    return f'<figure>{image}<div class="in">{inside}</div><figcaption>{when}</figcaption></figure>'


def _image(pixels: np.ndarray) -> str:
    """A frame (H, W, 3) uint8 as an `<img>` of a JPEG, at most `HEIGHT` high."""
    image = Image.fromarray(pixels)
    if image.height > HEIGHT:
        width = max(round(image.width * HEIGHT / image.height), 1)
        image = image.resize((width, HEIGHT), Image.Resampling.LANCZOS)
    small = image.height < SMALL
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90 if small else 80, subsampling=0 if small else 2)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = ' class="small"' if small else ""
    return f'<img{kind} src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" alt="">'
