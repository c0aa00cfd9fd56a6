"""Frame arrays are videos like any file: true times, the nearest stored frames, and no guesses where something is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.video.arrays import write_array
from vsr1.data.annotated_videos import META as FOUND_BY
from vsr1.data.annotated_videos import Videos
from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video import FrameCache, Loader, Sampling, array, decode, probe

TIMES = [0.0, 2.5, 5.0, 7.5, 10.0]  # five frames of 10.6 s: one more is stored to make them even


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_array(tmp_path, "AO8RW", TIMES, 10.6)


def numbers(pixels: torch.Tensor) -> list[int]:
    assert pixels.dtype == torch.uint8 and all(len(frame.unique()) == 1 for frame in pixels)
    return pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"count": 5}, [0, 1, 2, 3, 3]),  # at 0, 2.12, 4.24, 6.36 and 8.48 s
        ({"fps": 0.5}, [0, 1, 2, 2, 3, 4]),  # at 0, 2, ... 10 s
        ({"fps": 1, "max_frames": 3}, [0, 1, 3]),
        ({"times": [1.24, 1.25, 1.26, 8.0, 99.0]}, [0, 0, 1, 3, 4]),
        ({"fps": 1, "span": (4.0, 8.0)}, [2, 2, 2, 3]),
        ({"count": 2, "span": (9.0, 60.0)}, [4, 4]),
    ],
)
def test_the_nearest_stored_frames_with_their_true_times(path: Path, wanted: dict, expected: list[int]) -> None:
    frames = decode(path, **wanted)
    assert numbers(frames.pixels) == expected
    assert frames.seconds.tolist() == [TIMES[index] for index in expected]
    assert (frames.duration, frames.source) == (10.6, path)
    assert tuple(frames.pixels.shape[1:]) == (8, 12, 3)


def test_probe_leaves_the_padding_out(path: Path) -> None:
    info = probe(path)
    assert (info.seconds, info.frames, info.width, info.height, info.codec) == (10.6, 5, 12, 8, "npy")
    assert (info.rotation, info.variable, info.fps) == (0, False, pytest.approx(5 / 10.6))
    assert probe(write_array(path.parent, "X1", [0.0, 1.0, 2.5], 3.0)).variable


def test_a_single_frame(tmp_path: Path) -> None:
    frames = decode(write_array(tmp_path, "short", [0.0], 0.9), fps=2)
    assert (numbers(frames.pixels), frames.seconds.tolist()) == ([0, 0], [0.0, 0.0])


def test_resized_as_files_are(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(7)), axis=-1)
    path = write_array(tmp_path, "ramp", [0.0, 1.0], 2.0, lambda index: picture)
    small = decode(path, count=2, size=(16, 32)).pixels
    assert tuple(small.shape) == (2, 16, 32, 3)
    block = picture.reshape(16, 4, 32, 2, 3).mean((1, 3))
    assert np.abs(small[1].numpy()[2:-2, 2:-2] - block[2:-2, 2:-2]).max() < 3


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_the_loader_and_its_cache_read_them(path: Path, tmp_path: Path, isolation: str) -> None:
    bare = tmp_path / "bare" / "X1.npy"
    bare.parent.mkdir()
    np.save(bare, np.zeros((2, 4, 4, 3), np.uint8))
    cache = FrameCache(tmp_path / "cache", 1 << 20)
    for known in (0, 1):
        with Loader(Sampling(fps=0.5), workers=1, isolation=isolation, cache=cache) as loader:
            (_, frames), (_, failed) = loader.results([path, bare])
        assert numbers(frames.pixels) == [0, 1, 2, 2, 3, 4] and frames.seconds.tolist()[-2:] == [7.5, 10.0]
        assert isinstance(failed, VideoError) and "there is no meta.jsonl beside it" in failed.reason
        assert loader.report.cached == known


def test_new_times_are_seen(path: Path, tmp_path: Path) -> None:
    """In memory and in a cache on disk, for frames depend on the state of meta.jsonl, too; its last row of several stands."""
    cache = FrameCache(tmp_path / "cache", 1 << 20)
    meta = path.parent / "meta.jsonl"
    found = []
    for shift in (0.0, 1.0):
        row = json.loads(meta.read_text().splitlines()[0]) | {
            "sampled_timestamps_sec": [time + shift for time in TIMES]
        }
        meta.write_text(f"{meta.read_text()}{json.dumps(row)}\n")
        with Loader(Sampling(times=[2.5]), workers=1, isolation="thread", cache=cache) as loader:
            found += [sample.frames.seconds.item() for sample in loader.load([path])]
    assert found == [2.5, 3.5]


def test_what_is_read_is_what_is_wanted(path: Path) -> None:
    assert isinstance(array.read(path).frames.base, np.memmap)


def rewritten(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is not a regular file"),
        (lambda path: rewritten(path, b""), "the file is empty"),
        (lambda path: rewritten(path, path.read_bytes()[:-1]), "cannot be read as .npy"),
        (lambda path: rewritten(path, path.read_bytes()[:40]), "cannot be read as .npy"),
        (lambda path: rewritten(path, b"not an array at all"), "cannot be read as .npy"),
        (lambda path: np.save(path, np.array([{"a": 1}]), allow_pickle=True), "cannot be read as .npy"),
        (lambda path: np.savez(path.open("wb"), np.zeros(3)), "is an archive of arrays"),
        (lambda path: np.save(path, np.zeros((6, 8, 12, 3), np.float32)), "holds float32 (6, 8, 12, 3)"),
        (lambda path: np.save(path, np.zeros((6, 8, 12), np.uint8)), "holds uint8 (6, 8, 12)"),
        (lambda path: np.save(path, np.zeros((6, 3, 8, 12), np.uint8)), "holds uint8 (6, 3, 8, 12)"),
        (lambda path: np.save(path, np.zeros((0, 8, 12, 3), np.uint8)), "holds uint8 (0, 8, 12, 3)"),
        (lambda path: np.save(path, np.zeros((8, 8, 12, 3), np.uint8)), "speaks of 6 frames, the array has 8"),
        (lambda path: (path.parent / "meta.jsonl").unlink(), "there is no meta.jsonl beside it"),
        (lambda path: (path.parent / "meta.jsonl").write_text("\n"), "has no row for it, so its frames have no times"),
        (
            lambda path: (path.parent / "meta.jsonl").write_text('{"a": 1}\n{"vi'),
            "(2 of its lines cannot be read, first",
        ),
    ],
)
def test_damage_is_one_error_that_names_it(path: Path, damage: Callable[[Path], object], reason: str) -> None:
    damage(path)
    for reader in (probe, lambda path: decode(path, fps=1)):
        with pytest.raises(VideoError) as caught:
            reader(path)
        assert caught.value.path == str(path) and reason in caught.value.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sampled_timestamps_sec": None}, "'sampled_timestamps_sec' is not there, or no list"),
        ({"sampled_timestamps_sec": [0.0, "1", 2.0, 3.0, 4.0]}, "'sampled_timestamps_sec' is not there, or no list"),
        ({"sampled_timestamps_sec": [0.0, 1.0]}, "it has 2 times for 6 frames"),
        ({"sampled_timestamps_sec": [0.0, 2.0, 1.0, 3.0, 4.0]}, "its times do not ascend"),
        ({"sampled_timestamps_sec": [-1.0, 2.0, 2.5, 3.0, 4.0]}, "its times do not ascend"),
        ({"sampled_timestamps_sec": [0.0, 2.0, 3.0, 4.0, float("nan")]}, "no list of seconds"),
        ({"source_duration_sec": 0}, "'source_duration_sec' must be above 0, is 0"),
        ({"source_duration_sec": None}, "'source_duration_sec' must be above 0, is None"),
        ({"sampled_frames_before_even_pad": 7}, "'sampled_frames_before_even_pad' is 7 of 6 frames"),
        ({"sampled_frames_before_even_pad": "5"}, "'sampled_frames_before_even_pad' is '5'"),
        ({"output_num_frames": 4}, "speaks of 4 frames, the array has 6"),
    ],
)
def test_a_row_that_does_not_fit_is_named(path: Path, changes: dict[str, object], reason: str) -> None:
    write_array(path.parent, "AO8RW", TIMES, 10.6, **changes)
    with pytest.raises(VideoError, match=r"does not fit its row of meta\.jsonl") as caught:
        decode(path, fps=1)
    assert reason in caught.value.reason


def test_a_torn_line_costs_its_own_video_alone(path: Path) -> None:
    with (path.parent / "meta.jsonl").open("a") as file:
        file.write('{"video_id": "X1", "sampled_time')
    np.save(path.with_name("X1.npy"), np.zeros((2, 4, 4, 3), np.uint8))
    assert len(decode(path, count=2)) == 2
    with pytest.raises(VideoError, match=r"no row for it \(1 of its lines cannot be read, first line 2\)"):
        decode(path.with_name("X1.npy"), count=2)


def test_no_gpu_backend_decodes_what_is_decoded(path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"'dali' reads video files, and '.*AO8RW\.npy' is a frame array"):
        decode(path, fps=1, backend="dali")
    assert len(decode(path, fps=1, backend="auto", device="cpu")) == len(decode(path, fps=1, backend="pyav"))


def test_annotations_find_them(path: Path, tmp_path: Path) -> None:
    assert FOUND_BY == array.META
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "X1.npy", np.zeros(3))  # any array, without times
    videos = Videos(tmp_path)
    assert (videos.find("AO8RW"), videos.find("AO8RW.mp4"), videos.find("X1")) == (str(path), str(path), None)
