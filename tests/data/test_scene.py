"""What is drawn: attributes must be visible in the pixels, at one frame a second, as the queries claim."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vsr1.data.scene import BACKGROUND_RGB, OBJECT_RGB, Event, Scene, draw
from vsr1.data.vocabulary import values


def one_event(motion: str = "still", shape: str = "circle", size: str = "large", colour: str = "white") -> Scene:
    return Scene("v-1", 12, "black", "plain", (Event(3, 8, size, colour, shape, motion),))


def covered(scene: Scene) -> np.ndarray:
    """(T, H, W) bool at 1 frame/s: where the white object on black is."""
    return draw(scene, 64, 1.0).min(-1) > 120


def centres(scene: Scene) -> np.ndarray:
    """(5, 2): x, y of the object in each second of its event."""
    masks = covered(scene)[3:8]
    rows, columns = np.indices(masks.shape[1:])
    return np.array([[columns[mask].mean(), rows[mask].mean()] for mask in masks])


def test_form_and_place_in_time() -> None:
    pixels = draw(one_event(), 64, 2.0)
    assert (pixels.shape, pixels.dtype) == ((24, 64, 64, 3), np.uint8)
    bright = (pixels.min(-1) > 120).any((1, 2))
    assert np.flatnonzero(bright).tolist() == list(range(6, 16))


def test_draws_other_sizes_and_rates() -> None:
    assert draw(one_event(), 96, 5.0).shape == (60, 96, 96, 3)
    share = [(draw(one_event(), side, 1.0)[4].min(-1) > 120).mean() for side in (64, 128)]
    assert share[0] == pytest.approx(share[1], rel=0.1)


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
@pytest.mark.parametrize("size", values("size"))
@pytest.mark.parametrize("seconds", [3, 5])
def test_moving_crosses_the_frame(motion: str, axis: int, sign: int, size: str, seconds: int) -> None:
    scene = Scene("v-2", 12, "black", "plain", (Event(3, 3 + seconds, size, "white", "circle", motion),))
    masks = covered(scene)[3 : 3 + seconds]
    rows, columns = np.indices(masks.shape[1:])
    way = np.array([[columns[mask].mean(), rows[mask].mean()] for mask in masks])
    steps = sign * np.diff(way[:, axis])
    assert (steps > 2).all()
    assert steps.sum() > 64 / 3
    assert np.ptp(way[:, 1 - axis]) < 4


def test_still_stays() -> None:
    way = centres(one_event("still"))
    assert np.ptp(way, axis=0).max() < 3


def test_blink_goes_off_every_other_second() -> None:
    assert covered(one_event("blink"))[3:8].any((1, 2)).tolist() == [True, False, True, False, True]


def test_growing_grows_and_keeps_its_size_word() -> None:
    areas = {size: covered(one_event("grow", size=size))[3:8].sum((1, 2)) for size in values("size")}
    for area in areas.values():
        assert (np.diff(area) > 0).all()
        assert area[-1] > 4 * area[0]
    assert (areas["large"] > 2.5 * areas["small"]).all()


def test_sizes_differ_clearly() -> None:
    small, large = (covered(one_event(size=size))[4].sum() for size in ("small", "large"))
    assert large > 2.5 * small


def test_shapes_differ_in_every_pair() -> None:
    for size in values("size"):
        masks = {shape: covered(one_event(shape=shape, size=size))[4] for shape in values("shape")}
        for a, first in masks.items():
            for b, second in masks.items():
                if a < b:
                    assert (first ^ second).sum() > 0.3 * min(first.sum(), second.sum()), (size, a, b)


def test_bar_is_wide_and_pole_is_tall() -> None:
    def width_over_height(shape: str) -> float:
        rows, columns = np.nonzero(covered(one_event(shape=shape))[4])
        return float(np.ptp(columns) / np.ptp(rows))

    assert width_over_height("bar") > 2
    assert width_over_height("pole") < 1 / 2
    assert width_over_height("cross") == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("colour", values("colour"))
def test_object_colour_is_nearest_to_its_own(colour: str) -> None:
    scene = one_event(colour=colour)
    y, x = (round(value) for value in reversed(centres(one_event())[1]))
    pixel = draw(scene, 64, 1.0)[4, y, x].astype(float)
    distances = {name: np.abs(pixel - rgb).sum() for name, rgb in OBJECT_RGB.items()}
    assert min(distances, key=distances.__getitem__) == colour


@pytest.mark.parametrize("background", values("background_colour"))
@pytest.mark.parametrize("texture", values("texture"))
def test_background_colour_and_texture(background: str, texture: str) -> None:
    frame = draw(Scene("v-3", 12, background, texture, ()), 64, 1.0)[0].astype(float)
    low = np.percentile(frame, 10, axis=(0, 1))
    distances = {name: np.abs(low - rgb).sum() for name, rgb in BACKGROUND_RGB.items()}
    assert min(distances, key=distances.__getitem__) == background
    grey = frame.mean(-1)
    along, across = grey.mean(0).std(), grey.mean(1).std()
    if texture == "plain":
        assert max(along, across) < 2
    elif texture == "striped":
        assert across > 8
        assert along < 2
    else:
        assert min(along, across) > 4


def test_equal_scenes_equal_pixels_and_other_videos_other_pixels() -> None:
    scene = one_event()
    assert np.array_equal(draw(scene, 64, 2.0), draw(scene, 64, 2.0))
    assert not np.array_equal(draw(scene, 64, 2.0), draw(dataclasses.replace(scene, video_id="v-9"), 64, 2.0))


def test_changed_replaces_one_attribute() -> None:
    scene = Scene(
        "v",
        12,
        "black",
        "plain",
        (Event(0, 3, "small", "red", "bar", "up"), Event(4, 8, "large", "blue", "ring", "grow")),
    )
    assert scene.changed(1, "colour", "green").attributes(1) == {**scene.attributes(1), "colour": "green"}
    assert scene.changed(1, "colour", "green").attributes(0) == scene.attributes(0)
    assert scene.changed(0, "texture", "dotted").attributes(1) == {**scene.attributes(1), "texture": "dotted"}
    assert Scene.from_dict(dataclasses.asdict(scene)) == scene
