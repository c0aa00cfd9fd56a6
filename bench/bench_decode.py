"""Decoding chosen frames of films of all sizes and codecs on the CPU, beside what others use, and what it costs training.

All contenders are asked for the same frames, uniform from the first to the last, with as many threads as FFmpeg takes by
itself. The films' frames say their numbers: a peer that gives others, or does not turn what was filmed upright, is not timed
but named below the table with what it got wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from bench.decode_peers import PUBLIC, Read, peers, uniform_indices
from bench.films import RATE, Film, make, read_numbers
from bench.harness import Bound, faster_than, within
from vsr1.data import world as worlds
from vsr1.data.vocabulary import all_words, sentence
from vsr1.models import backbone
from vsr1.models.embedder import Embedder
from vsr1.models.policy import SHORT_SYSTEM, Policy
from vsr1.models.tiny import TinyConfig
from vsr1.models.tokenizer import train_tokenizer
from vsr1.models.vision import VideoEncoder
from vsr1.train.optimizer import optimizers
from vsr1.train.sft import SftTraining, say_loss, trainable
from vsr1.train.templated import build
from vsr1.video import Frames, decode

FILMS = {
    "240p h264": Film(240, 426, 60),
    "480p h264": Film(480, 854, 60),
    "480p h264, key frames every 2 s": Film(480, 854, 30, key=2 * RATE),
    "480p hevc": Film(480, 854, 10, "libx265"),
    "480p vp9": Film(480, 854, 10, "libvpx-vp9"),
    "720p h264": Film(720, 1280, 10),
    "1080p h264": Film(1080, 1920, 8),
    "240p h264, filmed upright": Film(240, 426, 20, rotation=90),
}
CLOSE = 4.0  # of 255: by how much a peer's colours may differ from ours in the mean
CACHED = "cached frames"
BUDGET = 15.0  # seconds for each way to train: they are to be told apart by a twentieth


def ours(path: Path, indices: Sequence[int]) -> np.ndarray:
    return decode(path, times=[index / RATE for index in indices]).pixels.numpy()


def wrong(pixels: np.ndarray, truth: np.ndarray, indices: Sequence[int], turns: int = 0) -> str | None:
    """What is wrong with frames that should be `indices` and look like `truth`, which stands upright after `turns`."""
    if pixels.shape != truth.shape:
        return f"frames of {pixels.shape[1:3]} instead of {truth.shape[1:3]}" + (
            ", not turned upright" if turns else ""
        )
    found = read_numbers(np.rot90(pixels, -turns, (1, 2)))
    others = sum(one != two for one, two in zip(found, indices, strict=True))
    if others:
        return f"{others} of {len(indices)} frames are others than asked for"
    off = float(np.abs(pixels[::8].astype(np.int16) - truth[::8]).mean())
    return None if off <= CLOSE else f"colours are off by {off:.1f} of 255"


class Costs:
    """The best a contender did at any of its calls: frames and videos a second, and the CPU's milliseconds."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, float]] = {"frames/s": {}, "videos/s": {}, "CPU ms": {}}

    def counted(self, name: str, call: Callable[[], Any], frames: int) -> Any:
        wall, spent = time.perf_counter(), time.process_time()
        answer = call()
        wall, spent = time.perf_counter() - wall, 1e3 * (time.process_time() - spent)
        best = {key: numbers.get(name) for key, numbers in self.counts.items()}
        self.counts["frames/s"][name] = max(best["frames/s"] or 0, round(frames / wall))
        self.counts["videos/s"][name] = max(best["videos/s"] or 0, round(1 / wall, 1))
        self.counts["CPU ms"][name] = round(min(best["CPU ms"] or spent, spent))
        return answer


@pytest.mark.parametrize("count", [64, 16])
@pytest.mark.parametrize("name", FILMS)
def test_decode(race: Callable[..., None], quick: bool, name: str, count: int) -> None:
    film = FILMS[name]
    if quick:
        film = Film(film.height // 2 // 2 * 2, film.width // 2 // 2 * 2, 4, film.codec, film.key // 5, film.rotation)
    path, indices, turns = make(film), uniform_indices(film.frames, count), film.rotation // 90
    truth = ours(path, indices)
    if error := wrong(truth, truth, indices, turns):
        raise AssertionError(f"vsr1: {error}")
    costs = Costs()
    contenders: dict[str, Callable[[], Any] | str] = {
        "vsr1": partial(costs.counted, "vsr1", partial(ours, path, indices), count)
    }
    for peer, read in peers().items():
        contenders[peer] = _contender(costs, name, peer, read, path, indices, truth, turns)

    def check(peer: str, pixels: np.ndarray) -> None:
        if error := wrong(pixels, truth, indices, turns):
            raise AssertionError(f"{peer}: {error}")

    goal = name == "480p h264" and count == 64
    bounds: list[Bound] = [faster_than(PUBLIC, 3), faster_than("decord", 1)] if goal else []
    case = f"{name}, {count} of {film.frames:,} frames"
    race(case, contenders, check, bounds=bounds, counts=costs.counts)


def _contender(
    costs: Costs,
    name: str,
    peer: str,
    read: Read | str,
    path: Path,
    indices: Sequence[int],
    truth: np.ndarray,
    turns: int,
) -> Callable[[], Any] | str:
    """A peer's call, or what it gets wrong with this file."""
    if isinstance(read, str):
        return read
    try:
        error = wrong(read(path, indices), truth, indices, turns)
    except Exception as broken:  # whatever a peer raises is its answer
        error = f"{type(broken).__name__}: {str(broken).splitlines()[0]}"
    if error:
        return f"{name}: {error}"
    return partial(costs.counted, peer, partial(read, path, indices), len(indices))


class Lesson:
    """SFT steps of the tiny preset: the rows' videos are other ones at every step; the tower reads them each time."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.settings = SftTraining(batch=4) if quick else SftTraining()
        config = worlds.WorldConfig(train_videos=4 * self.settings.batch, validation_videos=1, test_videos=1, workers=1)
        self.world = worlds.build(folder, config, 1)
        self.scenes = self.world.scenes("train")
        self.paths = [self.world.video_path(scene.video_id) for scene in self.scenes]
        torch.manual_seed(0)
        stamps = [f"<{second}.5 seconds>" for second in range(16)]
        tokenizer = train_tokenizer(2 * [" ".join(all_words()), *all_words(), SHORT_SYSTEM, *stamps, "a = b != c ;"])
        embedder = Embedder.tiny(tokenizer, TinyConfig()).eval().requires_grad_(False)
        self.policy = Policy.tiny(embedder, soft_tokens=8)
        groups = trainable(self.policy, self.settings.head_learning_rate)
        self.optimizers = optimizers(self.policy, groups, lr=0.0, muon=2.0, weight_decay=0.0)
        self.steps: dict[str, int] = {}
        self.others = VideoEncoder(self.policy.videos.visual, self.policy.videos.settings)  # expects nothing
        self.frames = dict(zip(self.paths, self._decode(self.paths), strict=True))

    def picked(self, index: int) -> list[int]:
        """The videos of a step."""
        return np.random.default_rng(index).choice(len(self.scenes), self.settings.batch, replace=False).tolist()

    def _decode(self, paths: Sequence[Path], videos: VideoEncoder | None = None) -> list[Frames]:
        found = (videos or self.others).frames(paths)
        return [frames for _, frames in found if isinstance(frames, Frames)]

    def cached(self, index: int) -> list[Frames]:
        return [self.frames[self.paths[one]] for one in self.picked(index)]

    def decoded(self, index: int) -> list[Frames]:
        return self._decode([self.paths[one] for one in self.picked(index)])

    def decoded_ahead(self, index: int) -> list[Frames]:
        """They were decoded during the step before, and those of the next step will be during this one."""
        frames = self._decode([self.paths[one] for one in self.picked(index)], self.policy.videos)
        self.policy.videos.expect([self.paths[one] for one in self.picked(index + 1)])
        return frames

    def step(self, read: Callable[[int], list[Frames]]) -> float:
        """The loss of the next step of this way to read, which sees the same videos as that of any other way. The learning
        rate is 0, so that nothing else decides it."""
        index = self.steps[read.__name__] = self.steps.get(read.__name__, -1) + 1
        features = self.policy.videos.encode_frames(read(index))
        rows = []
        for one, video in zip(self.picked(index), features, strict=True):
            scene = self.scenes[one]
            asked = scene.attributes(0)
            text = sentence(asked, Random(0))
            rows.append(build(self.policy, text, asked, scene.video_id, scene, video, self.settings))
        hidden, _ = backbone.run(self.policy.model.model, [row.row for row in rows])
        loss = say_loss(self.policy, hidden, rows)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()


def test_decode_in_training(race: Callable[..., None], quick: bool, tmp_path: Path) -> None:
    """A step whose videos are decoded for it, beside one whose frames lie in memory: what of a step is decoding."""
    lesson = Lesson(tmp_path / "world", quick)
    expected = pytest.approx(lesson.step(lesson.cached), rel=1e-4)
    if lesson.step(lesson.decoded) != expected or lesson.step(lesson.decoded_ahead) != expected:
        raise AssertionError("a step on decoded videos comes to another loss than one on cached frames")
    lesson.policy.videos.expect([])  # nothing goes on beside what is timed first
    videos = lesson.settings.batch
    contenders = {
        "vsr1": partial(lesson.step, lesson.decoded_ahead),
        "own, not ahead": partial(lesson.step, lesson.decoded),
        CACHED: partial(lesson.step, lesson.cached),
    }

    def check(name: str, loss: float) -> None:
        if not 0 < loss < 100:
            raise AssertionError(f"{name}: the loss is {loss}")

    race(
        f"SFT step, tiny, {videos} videos decoded during the step before",
        contenders,
        check,
        bounds=[within(1.05, CACHED)],
        budget=BUDGET,
        note="a 64 x 64 video takes some 3 ms of a core, and 32 of them a tenth of what two cores can do in a step; where the "
        "model leaves neither of them idle, no decoding beside it is cheaper than that",
    )
