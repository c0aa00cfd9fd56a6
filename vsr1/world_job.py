"""A run on the embedded default: render a world, train vision, embedder and policy on it from nothing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vsr1.config import WORLD_STAGES, RunConfig
from vsr1.corpus import Corpus
from vsr1.data.vocabulary import all_words
from vsr1.data.world import World, build
from vsr1.models.embedder import INSTRUCTION, Embedder
from vsr1.models.policy import SHORT_SYSTEM, Policy
from vsr1.models.tokenizer import train_tokenizer
from vsr1.records import Moment
from vsr1.stages import Job, Shelves
from vsr1.train import parallel
from vsr1.train.embedder import train_embedder
from vsr1.train.library import Shelf
from vsr1.train.monitor import Terminal
from vsr1.train.templated import Templates, meanings
from vsr1.train.vision import train_vision

_LEARNED = ("train", "grpo")  # corpora that are learned from


class WorldJob(Job):
    """Everything is made here: videos, queries, models."""

    stages = WORLD_STAGES
    config: RunConfig

    def __init__(self, config: RunConfig, monitor: Terminal, device: torch.device) -> None:
        super().__init__(config, monitor, device)
        self._world: World | None = None
        self._embedder: Embedder | None = None  # kept over the stages, with the videos that it has encoded

    def world(self) -> World:
        """The rendered world."""
        if self._world is None:
            config = dataclasses.replace(self.config.world, workers=self.workers)
            with self.monitor.phase("render", 1) as phase, parallel.first_alone():
                self._world = build(self.folder / "world", config, self.config.seed, progress=phase.update)
        return self._world

    def run_world(self) -> None:
        """The first stage."""
        self.world()

    def run_embedder(self) -> None:
        """The second stage."""
        self.embedder()

    def embedder(self) -> Embedder:
        """Vision warm-up, then the embedder; both frozen afterwards."""

        if self._embedder is not None:
            return self._embedder

        def make() -> Embedder:
            world = self.world()
            torch.manual_seed(self.config.seed)
            tokenizer = train_tokenizer(tokenizer_texts())
            embedder = Embedder.tiny(tokenizer, self.config.model).to(self.device)
            embedder.videos.workers = self.workers
            train_vision(embedder.videos, world, self.config.vision, self.config.seed, self.keeper)
            train_embedder(embedder, world, self.config.embedder, self.config.seed, self.keeper)
            return embedder

        embedder = self.model("embedder", Embedder.from_pretrained, make)
        embedder.videos.workers = self.workers
        self._embedder = embedder
        return embedder

    def corpus(self, name: str, embedder: Embedder, video_ids: Sequence[str]) -> Shelf:
        """The corpus folder `name` of these videos, indexed at most once. All processes ask for those of `_LEARNED`; for the
        others the first one asks alone, which nobody may be made to wait for."""
        folder = self.folder / "corpus" / name
        paths = [self.world().video_path(video_id).absolute() for video_id in video_ids]
        with self.monitor.phase(f"index {name}", len(paths)) as phase:
            features = embedder.videos.encode_all(paths, progress=phase.update)
        if parallel.first() and not folder.is_dir():
            aside = folder.with_name(f".{name}.tmp")
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            corpus = Corpus.create(aside, embedder.dimension, embedder.identity)
            for begin in range(0, len(paths), 128):
                part = slice(begin, begin + 128)
                with torch.no_grad():
                    vectors = embedder.embed_videos(features[part])
                durations = [one.duration for one in features[part]]
                corpus.add(video_ids[part], vectors, paths=paths[part], durations=durations)
            aside.rename(folder)
        if name in _LEARNED:
            parallel.wait()
        return Shelf(Corpus.open(folder, embedder.identity), embedder.videos)

    def start(self, embedder: Embedder) -> Policy:
        torch.manual_seed(self.config.seed)
        return Policy.tiny(embedder, soft_tokens=self.config.model.soft_tokens).to(self.device)

    def load(self, path: Path, embedder: Embedder) -> Policy:
        return Policy.from_pretrained(path, videos=embedder.videos)

    def shelf(self, name: Shelves, embedder: Embedder, policy: Policy) -> Shelf:
        """Embedder and policy share one vision tower here, so the videos look the same to both."""
        return self.corpus("train" if name == "sft" else name, embedder, self._videos(name))

    def _videos(self, name: Shelves) -> list[str]:
        if name == "grpo":
            scenes = self.world().scenes("train", fold="policy")[: self.config.grpo.videos]
        else:
            scenes = self.world().scenes("train" if name == "sft" else name)
        return [scene.video_id for scene in scenes]

    def moments(self, name: Shelves) -> list[Moment]:
        if name != "grpo":
            return [query.moment for query in self.world().queries(name)]
        known = set(self._videos(name))
        queries = self.world().queries("train", fold="policy")
        return [query.moment for query in queries if query.moment.video_id in known]

    def source(self, policy: Policy, embedder: Embedder, shelf: Shelf) -> Templates:
        return Templates(policy, embedder, self.world(), shelf, self.config.sft, self.config.seed)

    def meanings(self, embedder: Embedder) -> Mapping[str, Tensor]:
        return meanings(embedder, self.world().queries("train", fold="policy"))

    def video_path(self, video_id: str) -> Path:
        return self.world().video_path(video_id)


def tokenizer_texts() -> list[str]:
    """What the tokenizer learns from: every word of the world with and without a space before it, times, and templates."""
    words = all_words()
    frame = ["a = b != c ; find d", "matched not_matched", "system user assistant", 'Query: ""', "Retrieved video: "]
    times = [f"{second} to {second + 1} s" for second in range(64)]
    # a stamp starts its line, as it does in a prompt: a space before it would split it into four tokens
    stamps = [f"<{second}.{half} seconds>" for second in range(64) for half in (0, 5)]
    return 2 * [" ".join(words), *words, *frame, *times, *stamps, INSTRUCTION, SHORT_SYSTEM]
