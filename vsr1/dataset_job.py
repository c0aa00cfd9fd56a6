"""A run on an annotated data set: pretrained models, its own videos and queries, the files that `vsr1 data` made of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vsr1.config import DATASET_STAGES, DatasetConfig
from vsr1.corpus import Corpus
from vsr1.data.layout import Layout, dataset
from vsr1.data.rows import protocol_text, read_grpo, read_hard_negatives, read_sft
from vsr1.data.validation import validate_file
from vsr1.errors import ConfigError
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.records import Moment
from vsr1.stages import Job, Shelves
from vsr1.train.annotated import Annotated
from vsr1.train.library import Shelf
from vsr1.train.monitor import Terminal

_ASKED: tuple[Shelves, ...] = ("grpo", "validation", "test")


def watched(config: DatasetConfig) -> str | None:
    """The split that training is watched on, if the data set has one that can be used."""
    layout, split = Layout(config.root), dataset(config.dataset).validation
    usable = split and all(path(split).exists() for path in (layout.annotations, layout.corpus))
    return split if usable else None


def splits(config: DatasetConfig) -> list[str]:
    """The splits whose videos a run needs."""
    data = dataset(config.dataset)
    return [data.train, *filter(None, [watched(config)]), data.test]


def need(config: DatasetConfig, *, training: bool = True) -> None:
    """ConfigError that names the parts of the data set that are not there; of the test split alone, without `training`."""
    data, layout = dataset(config.dataset), Layout(config.root)
    paths = [layout.annotations(data.test), layout.corpus(data.test)]
    if training:
        paths += [layout.annotations(data.train), *map(layout.corpus, splits(config)), layout.sft]
    if missing := [path for path in dict.fromkeys(paths) if not path.exists()]:
        raise ConfigError(
            f"data set '{data.name}' below '{config.root}' lacks {', '.join(map(repr, map(str, missing)))}; "
            f"make them with `vsr1 data build {data.name} --root {config.root}` (or `vsr1 data import`)"
        )


class DatasetJob(Job):
    """Nothing is made here but the policy: data and embedder are given."""

    stages = DATASET_STAGES
    config: DatasetConfig

    def __init__(self, config: DatasetConfig, monitor: Terminal, device: torch.device) -> None:
        for stage in (config.sft, config.grpo):
            if config.max_steps:
                stage.optimisation.steps = min(stage.optimisation.steps, config.max_steps)
        super().__init__(config, monitor, device)
        self.data = dataset(config.dataset)
        self.layout = Layout(config.root)
        self.watched = watched(config)
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
            config.dtype, torch.bfloat16 if self.device.type == "cuda" else torch.float32
        )
        self._embedder: Embedder | None = None
        self._moments: dict[str, list[Moment]] = {}

    def run_data(self) -> None:
        """See that everything can be read before hours are spent, and say what there is."""
        embedder = self.embedder()
        for split in splits(self.config):
            count = len(Corpus.open(self.layout.corpus(split), embedder.identity))
            self.monitor.say(f"{split}: {count} videos")
        train, kept, test = (len(self.moments(name)) for name in _ASKED)
        self.monitor.say(f"{train} queries to train on, {kept} held out, {test} to be tested")

    def embedder(self) -> Embedder:
        if self._embedder is None:
            embedder = Embedder.from_pretrained(self.config.embedder, dtype=self.dtype)
            embedder.videos.workers = self.workers
            self._embedder = embedder.to(self.device).eval().requires_grad_(False)
        return self._embedder

    def start(self, embedder: Embedder) -> Policy:
        torch.manual_seed(self.config.seed)  # a plain checkpoint gets a fresh refine head
        settings = {
            "soft_size": embedder.dimension,
            "embedder_size": embedder.model.config.text_config.hidden_size,
            "system": protocol_text(self.config.protocol_from or self.layout.sft),
        }
        return self._loaded(settings)

    def given(self) -> Policy:
        """The policy as its folder says, asked in its own words or in those of `protocol_from`."""
        settings = {"system": protocol_text(self.config.protocol_from)} if self.config.protocol_from else None
        return self._loaded(settings)

    def _loaded(self, settings: dict[str, Any] | None) -> Policy:
        policy = Policy.from_pretrained(self.config.policy, settings=settings, dtype=self.dtype)
        return self._ready(policy).to(self.device)

    def load(self, path: Path, embedder: Embedder) -> Policy:
        """With its own tower and mergers: a released policy's are not the embedder's."""
        return self._ready(Policy.from_pretrained(path))

    def _ready(self, policy: Policy) -> Policy:
        policy.videos.workers = self.workers
        policy.videos.cache_bytes = self.config.feature_cache << 20
        policy.videos.settings = policy.videos.settings.limited(self.config.max_pixels)
        policy.checkpointing = self.config.checkpointing
        return policy

    def shelf(self, name: Shelves, embedder: Embedder, policy: Policy) -> Shelf:
        split = self.data.train
        if name == "test":
            split = self.data.test
        elif name == "validation" and self.watched:
            split = self.watched
        return Shelf(Corpus.open(self.layout.corpus(split), embedder.identity), policy.videos)

    def moments(self, name: Shelves) -> list[Moment]:
        if name in self._moments:
            return self._moments[name]
        if name == "test":
            found = self._annotated(self.data.test)
        elif name == "validation" and self.watched:
            found = self._annotated(self.watched)
        else:
            inside = name == "validation"
            found = [one for one in self._training if (one.video_id in self._held_out) == inside]
        self._moments[name] = found
        return found

    def _annotated(self, split: str) -> list[Moment]:
        """The queries of a split that can be used; what was mended or refused is counted."""
        path = self.layout.annotations(split)
        corpus = Corpus.open(self.layout.corpus(split))
        report = validate_file(path, videos=corpus.video_ids)
        if len(report.moments) < report.rows:
            refused = report.rows - len(report.moments)
            self.monitor.say(f"{split}: {refused} of {report.rows} queries cannot be used (vsr1 data check '{path}')")
        return report.moments

    @cached_property
    def _training(self) -> list[Moment]:
        """Every training query once: of the GRPO file, or, where there is none, of the annotations."""
        if not self.layout.grpo.is_file():
            return self._annotated(self.data.train)
        return [
            Moment(row.query_id, row.query, row.video_id, row.start, row.end, row.duration)
            for row in read_grpo(self.layout.grpo)
            if not row.augmented
        ]

    @cached_property
    def _held_out(self) -> set[str]:
        """Training videos kept out of training: enough for `hold_out` queries, at most a tenth; none where the data set has a
        split for it. Which they are depends on their names alone."""
        if self.watched:
            return set()
        left = min(self.config.hold_out, len(self._training) // 10)
        counts = Counter(str(one.video_id) for one in self._training)
        kept: set[str] = set()
        for video_id in sorted(counts, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if left <= 0:
                break
            kept.add(video_id)
            left -= counts[video_id]
        return kept

    def source(self, policy: Policy, embedder: Embedder, shelf: Shelf) -> Annotated:
        rows = [row for row in read_sft(self.layout.sft) if row.video_id not in self._held_out]
        settings = self.config.sft
        negatives = None
        if settings.negatives:
            if not self.layout.hard_negatives.is_file():
                raise ConfigError(
                    f"sft.negatives needs '{self.layout.hard_negatives}'; or set it to 0: the whole corpus"
                )
            negatives = read_hard_negatives(self.layout.hard_negatives)
        source = Annotated(policy, rows, shelf, settings, self.config.seed, negatives)
        if source.left_out:
            self.monitor.say(f"{source.left_out} of {len(rows)} SFT rows speak of videos outside the corpus: left out")
        return source

    def video_path(self, video_id: str) -> Path:
        return self._tested.path(video_id)

    @cached_property
    def _tested(self) -> Corpus:
        return Corpus.open(self.layout.corpus(self.data.test))

    def facts(self) -> dict[str, Any]:
        return {
            "split": self.data.test,
            "dataset": self.data.name,
            "policy": self.config.policy,
            "embedder": self.config.embedder,
        }
