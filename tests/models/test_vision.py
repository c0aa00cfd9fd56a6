"""From a file to features: true times, the cache, and files that cannot be read."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch

from vsr1.errors import VideoError
from vsr1.models.vision import VideoEncoder, VideoFeatures, VideoSettings, blank, pair_seconds, video_token_ids
from vsr1.video import decode, encode


@pytest.fixture
def videos(embedder) -> VideoEncoder:
    return embedder.videos


def same(one: VideoFeatures, other: VideoFeatures) -> bool:
    return torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([0.0], (0.0,)),
        ([0.0, 1.0], (0.5,)),
        ([0.0, 1.0, 2.0], (0.5, 2.0)),
        ([0.0, 0.5, 3.0, 3.25, 70.0], (0.25, 3.125, 70.0)),
    ],
)
def test_a_pair_has_the_mean_time_of_its_frames(seconds, expected):
    assert pair_seconds(torch.tensor(seconds, dtype=torch.float64)) == expected


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_features_have_a_time_and_a_grid_for_each_pair(videos, frames, count):
    (found,) = videos.encode_frames([frames(count)])
    pairs = (count + 1) // 2
    assert found.grid == (pairs, 2, 2) and len(found.seconds) == pairs
    assert found.tokens.shape == (pairs * 4, 64) and found.deepstack.shape == (0, pairs * 4, 64)
    assert found.duration == count


def test_a_batch_of_different_sizes_equals_one_by_one(videos, frames):
    mixed = [frames(6, seed=1), frames(3, size=(32, 128), seed=2), frames(1, size=(200, 90), seed=3)]
    together = videos.encode_frames(mixed)
    for one, video in zip(together, mixed, strict=True):
        (alone,) = videos.encode_frames([video])
        assert one.grid == alone.grid and one.seconds == alone.seconds
        torch.testing.assert_close(one.tokens, alone.tokens, atol=1e-5, rtol=1e-4)


def test_the_text_of_a_video_shows_its_times(tokenizer, videos, frames):
    (found,) = videos.encode_frames([frames(5)])
    ids = video_token_ids(tokenizer, found)
    frame = "<|vision_start|>" + "<|video_pad|>" * 4 + "<|vision_end|>"
    assert tokenizer.decode(ids) == f"<0.5 seconds>{frame}<2.5 seconds>{frame}<4.0 seconds>{frame}"


def test_times_stay_true_in_a_long_video(tokenizer, videos, tmp_path):
    """300 seconds at 2 frames a second, of which max_frames = 16 are seen: at 0, 18.75, 37.5, .. seconds."""
    pixels = torch.randint(0, 256, (600, 32, 32, 3), dtype=torch.uint8)
    (found,) = videos.encode([encode(tmp_path / "long.mp4", pixels, fps=2.0)])
    displayed = [int(2 * 18.75 * number) / 2 for number in range(16)]  # a frame every half second
    expected = [(one + other) / 2 for one, other in zip(displayed[::2], displayed[1::2], strict=True)]
    assert found.duration == pytest.approx(300.0)
    assert found.seconds == pytest.approx(expected, abs=1e-3) and found.seconds[-1] > 270
    text = tokenizer.decode(video_token_ids(tokenizer, found))
    for second in found.seconds:
        assert f"<{second:.1f} seconds>" in text


def test_settings_choose_the_frames(embedder, files):
    few = VideoEncoder(embedder.model.visual, VideoSettings(fps=2.0, max_frames=4, min_pixels=4096, max_pixels=4096))
    many = VideoEncoder(embedder.model.visual, VideoSettings(fps=2.0, max_frames=16, min_pixels=1024, max_pixels=1024))
    assert few.encode(files[:1])[0].grid == (2, 2, 2)
    assert many.encode(files[:1])[0].grid == (4, 1, 1)


def test_encoding_a_file_equals_encoding_its_frames(videos, files):
    (expected,) = videos.encode_frames([decode(files[0], fps=1.0, max_frames=16)])
    (found,) = videos.encode(files[:1])
    assert same(found, expected) and found.seconds == expected.seconds == (0.5, 2.5)


def test_a_file_is_encoded_once(videos, files):
    first = videos.encode([files[0], files[1], files[0]])
    assert (videos.hits, videos.misses) == (1, 2)
    second = videos.encode([files[1], files[0], files[2]])
    assert (videos.hits, videos.misses) == (3, 3)
    assert second[0] is first[1] and second[1] is first[0] is first[2]
    videos.forget()
    again = videos.encode(files[:1])
    assert (videos.hits, videos.misses) == (3, 4)
    assert again[0] is not first[0] and same(again[0], first[0])


def test_the_budget_drops_what_was_not_used_for_longest(embedder, files):
    size = embedder.videos.encode(files[:1])[0].bytes
    videos = VideoEncoder(embedder.model.visual, embedder.videos.settings, cache_bytes=2 * size)

    def misses(*numbers: int) -> int:
        before = videos.misses
        videos.encode([files[number] for number in numbers])
        return videos.misses - before

    assert [misses(0), misses(1)] == [1, 1]
    assert misses(0) == 0  # so file 1 is now the oldest
    assert misses(2) == 1
    assert [misses(0), misses(2)] == [0, 0]
    assert misses(1) == 1
    assert misses(0, 1, 2, 3) > 0 and misses(3) == 0  # more than fits at once


def test_a_video_larger_than_the_budget_is_encoded_and_not_kept(embedder, files):
    videos = VideoEncoder(embedder.model.visual, embedder.videos.settings, cache_bytes=1)
    assert isinstance(videos.encode(files[:1])[0], VideoFeatures)
    videos.encode(files[:1])
    assert (videos.hits, videos.misses) == (0, 2)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_broken_file_stands_in_its_place(videos, files, tmp_path, place):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    paths: list[Path] = list(files[:2])
    paths.insert(place, broken)
    reports: list[tuple[int, int]] = []
    found = videos.encode(paths, batch=1, progress=lambda done, total: reports.append((done, total)))
    assert [isinstance(one, VideoError) for one in found] == [path == broken for path in paths]
    assert str(broken) in str(found[place])
    assert reports == [(1, 3), (2, 3), (3, 3)]
    encode(broken, torch.zeros(8, 64, 64, 3, dtype=torch.uint8), fps=4.0)
    assert isinstance(videos.encode([broken])[0], VideoFeatures)  # a failure is not remembered


def decoded(videos: VideoEncoder) -> int:
    return sum(loader.report.decoded for loader in videos._loaders.values())


def test_what_is_expected_is_decoded_before_it_is_asked_for(embedder, files):
    first = embedder.videos.encode(files[:3])
    videos = VideoEncoder(embedder.model.visual, embedder.videos.settings, isolation="thread")
    videos.expect([files[2], files[0], files[2]])
    deadline = time.monotonic() + 60
    while decoded(videos) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert decoded(videos) == 2
    found = videos.encode(files[:3])  # one of them comes as a surprise
    assert decoded(videos) == 3
    assert all(same(one, other) for one, other in zip(found, first, strict=True))
    videos.expect(files[:3])  # all are at hand
    assert decoded(videos) == 3 and videos._coming is None


def test_expectations_wait_until_they_are_asked_for(embedder, files):
    videos = VideoEncoder(embedder.model.visual, embedder.videos.settings, isolation="thread")
    videos.expect(files[:2])
    videos.encode(files[2:3])
    assert videos._coming is not None
    assert same(videos.encode(files[1:2])[0], embedder.videos.encode(files[1:2])[0])  # and the other one is lost
    assert videos._coming is None and decoded(videos) <= 3
    assert same(videos.encode(files[:1])[0], embedder.videos.encode(files[:1])[0])
    videos.forget()
    for expected in (files[:2], files[2:3]):  # another expectation takes the place of the first
        videos.expect(expected)
    assert same(videos.encode(files[2:3])[0], embedder.videos.encode(files[2:3])[0])


def test_a_copy_decodes_for_itself(embedder, files):
    videos = VideoEncoder(embedder.model.visual, embedder.videos.settings, isolation="thread")
    videos.expect(files[:1])
    twin = copy.deepcopy(videos)
    assert same(twin.encode(files[:1])[0], videos.encode(files[:1])[0])
    assert (decoded(twin), decoded(videos)) == (1, 1)


def test_frames_that_are_encoded_together_are_bounded_in_bytes(embedder, files, monkeypatch):
    videos = VideoEncoder(embedder.model.visual, embedder.videos.settings, isolation="thread")
    together = []
    whole = videos.encode_frames
    monkeypatch.setattr(videos, "encode_frames", lambda group: together.append(len(group)) or whole(group))
    videos.encode(files[:4])
    videos.forget()
    monkeypatch.setattr("vsr1.models.vision.GROUP_BYTES", 1)
    videos.encode(files[:4])
    assert together == [4, 1, 1, 1, 1]


def test_a_blank_video_keeps_everything_but_its_content(videos, files):
    (video,) = videos.encode(files[:1])
    empty = blank(video)
    assert not empty.tokens.any() and video.tokens.any()
    assert (empty.grid, empty.seconds, empty.duration) == (video.grid, video.seconds, video.duration)
    assert empty.tokens.shape == video.tokens.shape and empty.deepstack.shape == video.deepstack.shape


def test_no_files_give_no_features(videos):
    assert videos.encode([]) == []
