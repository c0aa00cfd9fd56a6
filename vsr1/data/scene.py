"""One video of the rendered world: a background, and one object at a time that is something and does something.

A `Scene` is the whole truth of a video; `draw` turns it into frames. Shapes are drawn from signed distances with
one pixel of anti-aliasing, a whole event's frames at once, so a small video costs about a millisecond.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vsr1.data.vocabulary import BACKGROUND_ATTRIBUTES, EVENT_ATTRIBUTES

OBJECT_RGB = {
    "red": (225, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 230, 40),
    "green": (30, 185, 50),
    "cyan": (40, 225, 225),
    "blue": (40, 85, 250),
    "purple": (175, 50, 215),
    "white": (245, 245, 245),
}
BACKGROUND_RGB = {"black": (14, 14, 14), "gray": (108, 108, 108), "brown": (100, 58, 22), "navy": (14, 22, 84)}
# The mean radius in widths of the frame: a growing object passes from GROWTH[0] to GROWTH[1] times its own, so a
# growing small one ends where a growing large one is half-way, and neither covers the other's whole course.
RADIUS = {"small": 0.12, "large": 0.225}
GROWTH = (0.55, 1.45)
TRAVEL = 0.28  # how far from the centre a moving object starts and ends, in widths of the frame
SETTLE = 0.75  # seconds before its event's end at which a motion is complete, so that 1 frame/s still sees all of it
GRAIN = 2.0  # grey levels, standard deviation
TEXTURE_DEPTH = 26  # grey levels that stripes and dots rise above the background


@dataclass(frozen=True)
class Event:
    """One object between `start` and `end` (seconds, whole); the other fields are canonical words."""

    start: int
    end: int
    size: str
    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Scene:
    """The truth of one video of `duration` seconds; `events` do not overlap and are in order."""

    video_id: str
    duration: int
    background_colour: str
    texture: str
    events: tuple[Event, ...]

    def attributes(self, event: int) -> dict[str, str]:
        """The six attributes a fine query of one event names, by attribute name."""
        return {name: getattr(self.events[event], name) for name in EVENT_ATTRIBUTES} | {
            name: getattr(self, name) for name in BACKGROUND_ATTRIBUTES
        }

    def changed(self, event: int, attribute: str, value: str) -> Scene:
        """This scene with another value of one attribute, of `events[event]` or of the background."""
        row = asdict(self)
        (row["events"][event] if attribute in EVENT_ATTRIBUTES else row)[attribute] = value
        return Scene.from_dict(row)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Scene:
        """The inverse of `dataclasses.asdict`; further keys are ignored."""
        events = tuple(Event(**event) for event in row["events"])
        return cls(row["video_id"], row["duration"], row["background_colour"], row["texture"], events)


def draw(scene: Scene, size_pixels: int, fps: float) -> np.ndarray:
    """Render a scene: (T, H, W, 3) uint8 RGB with H = W = `size_pixels` and T = duration x fps frames.

    Frame i shows second i / fps. Small shifts of place, shade and grain differ from video to video; they depend on
    `video_id` alone, so the same scene always gives the same pixels.
    """
    seed = zlib.crc32(scene.video_id.encode())
    rng = np.random.default_rng(seed)
    # Grain has its own generator: it takes a number a pixel, and places must not depend on the size of the frame.
    grain = np.random.default_rng((seed, size_pixels)).normal(0, GRAIN, (size_pixels, size_pixels))
    ground = _background(scene, grain.astype(np.float32), rng)
    frames = np.repeat(ground.astype(np.uint8)[None], round(scene.duration * fps), axis=0)
    for event in scene.events:
        first, last = round(event.start * fps), round(event.end * fps)
        seconds = np.arange(last - first, dtype=np.float32) / np.float32(fps)
        colour = np.asarray(OBJECT_RGB[event.colour], np.float32) + np.float32(rng.uniform(-8, 8))
        cover = _cover(event, seconds, size_pixels, rng)[..., None]
        # Both ends lie in 0..255, so every mixture does.
        frames[first:last] = ground + cover * (np.clip(colour, 0, 255) - ground)
    return frames


def _background(scene: Scene, grain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32: the grain (H, W), with stripes or dots that repeat every eighth of the frame, coloured."""
    size_pixels = len(grain)
    place = np.arange(size_pixels, dtype=np.float32) * (8 / size_pixels)
    ground = grain + np.float32(rng.uniform(-6, 6))
    wave = np.cos(2 * np.pi * (place + np.float32(rng.uniform())))
    if scene.texture == "striped":
        ground += TEXTURE_DEPTH * (wave > 0)[:, None]
    elif scene.texture == "dotted":
        ground += 1.5 * TEXTURE_DEPTH * (wave[:, None] + wave[None, :] > 0.9)
    return np.clip(ground[..., None] + np.asarray(BACKGROUND_RGB[scene.background_colour], np.float32), 0, 255)


def _cover(event: Event, seconds: np.ndarray, size_pixels: int, rng: np.random.Generator) -> np.ndarray:
    """(n, H, W) float32 in [0, 1]: how much of each pixel the object covers at each second of its event."""
    length = event.end - event.start
    progress = np.minimum(seconds / np.float32(length - SETTLE), 1)
    radius = np.full_like(seconds, RADIUS[event.size] * rng.uniform(0.94, 1.06))
    # Small objects may sit further from the middle; a large growing one must stay inside the frame.
    spread = 0.12 if event.size == "small" else 0.05
    x, y = (np.full_like(seconds, 0.5 + rng.uniform(-spread, spread)) for _ in range(2))
    course = TRAVEL * (2 * progress - 1)
    if event.motion in ("left", "right"):
        x = 0.5 + (course if event.motion == "right" else -course)
    elif event.motion in ("up", "down"):
        y = 0.5 + (course if event.motion == "down" else -course)
    elif event.motion == "grow":
        radius = radius * (GROWTH[0] + (GROWTH[1] - GROWTH[0]) * progress)
    shake = rng.normal(0, 0.004, (2, len(seconds))).astype(np.float32)
    place = (np.arange(size_pixels, dtype=np.float32) + np.float32(0.5)) / np.float32(size_pixels)
    right = np.abs(place[None, None, :] - (x + shake[0])[:, None, None])
    below = np.abs(place[None, :, None] - (y + shake[1])[:, None, None])
    distance = _distance(event.shape, right, below, radius[:, None, None].astype(np.float32))
    cover = np.clip(0.5 - distance * size_pixels, 0, 1)
    if event.motion == "blink":
        cover[np.floor(seconds + 1e-4) % 2 == 1] = 0
    return cover


def _distance(shape: str, right: np.ndarray, below: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside, in widths of the frame.

    `right` (n, 1, W) and `below` (n, H, 1) are distances from the centre along each axis.
    """
    if shape in ("circle", "ring"):
        from_centre = np.sqrt(right**2 + below**2)
        return from_centre - radius if shape == "circle" else np.abs(from_centre - 0.78 * radius) - 0.25 * radius
    thin = (0.34 if shape == "cross" else 0.42) * radius
    wide = np.maximum(right - 1.1 * radius, below - thin)
    tall = np.maximum(right - thin, below - 1.1 * radius)
    return {"bar": wide, "pole": tall, "cross": np.minimum(wide, tall)}[shape]
