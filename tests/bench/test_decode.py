"""What decoding is measured by: frames that can be read, peers that choose as they are said to, errors that are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import films
from bench.bench_decode import ours, wrong
from bench.decode_peers import by_decord, by_opencv, by_public, public_indices, uniform_indices
from bench.films import Film, make, read_numbers


@pytest.fixture
def encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Encodes films into a folder of the test."""
    monkeypatch.setattr(films, "FOLDER", tmp_path)

    def encode(**options: object) -> tuple[Film, Path]:
        film = Film(96, 160, 1, key=10, **options)
        return film, make(film, tell=lambda _: None)

    return encode


def test_every_number_is_read_back():
    planes = np.zeros((4096, 48, 96), np.uint8)
    for number, plane in enumerate(planes):
        films.numbered(plane, number)
    assert read_numbers(np.repeat(planes[..., None], 3, -1)) == list(range(4096))


@pytest.mark.parametrize("rotation", [0, 90])
def test_the_frames_of_a_film_say_their_numbers(encoded, rotation):
    film, path = encoded(rotation=rotation)
    indices = list(range(film.frames))
    pixels = ours(path, indices)
    assert pixels.shape[1:3] == ((160, 96) if rotation else (96, 160))
    assert wrong(pixels, pixels, indices, rotation // 90) is None
    assert pixels.std() > 20  # there is something to decode


def test_a_film_is_made_once(encoded):
    _, path = encoded()
    path.write_bytes(b"kept")
    _, again = encoded()
    assert again.read_bytes() == b"kept"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_what_a_peer_gets_wrong_is_named(encoded):
    _, path = encoded()
    truth = ours(path, [3, 8, 9])
    assert wrong(truth, truth, [3, 8, 9]) is None
    assert wrong(ours(path, [3, 7, 9]), truth, [3, 8, 9]) == "1 of 3 frames are others than asked for"
    assert wrong(np.rot90(truth, 1, (1, 2)), truth, [3, 8, 9], 1) == (
        "frames of (160, 96) instead of (96, 160), not turned upright"
    )
    swapped = truth.copy()
    swapped[:, :20] = 255 - swapped[:, :20]
    assert "colours are off by" in (wrong(swapped, truth, [3, 8, 9]) or "")


def test_the_public_code_takes_both_ends_and_at_most_64_frames():
    assert public_indices(total=300, duration=10.0) == [0, 33, 66, 99, 132, 166, 199, 232, 265, 299]
    assert public_indices(total=12, duration=0.4) == [0]
    assert public_indices(total=3, duration=30.0) == [0, 1, 2]
    long = public_indices(total=1800, duration=90.0)
    assert (len(long), long[0], long[1], long[-1]) == (64, 0, 28, 1799)
    assert long == uniform_indices(1800, 64)


@pytest.mark.parametrize(
    ("module", "way"),
    [("cv2", by_public), ("cv2", by_opencv), ("decord", by_decord)],
    ids=["public", "opencv", "decord"],
)
def test_peers_give_the_frames_that_are_asked_for(encoded, module, way):
    read = way(pytest.importorskip(module))
    film, path = encoded()
    indices = uniform_indices(film.frames, 7)
    assert wrong(read(path, indices), ours(path, indices), indices) is None
